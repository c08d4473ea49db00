import hashlib
from pathlib import Path

import pytest

from common.errors import InputError
from data import read_text_pairs
from examples import make_dataset
from retrieval.corpus import read_corpus

SIZES = {"train.csv": 1500, "dev.csv": 100, "test.csv": 400, "corpus.csv": 3000}
TINY = ["--documents", "60", "--train_pairs", "80", "--dev_pairs", "5", "--test_pairs", "10"]
TERMS = Path(make_dataset.TERMS_DIR)


def write_dataset(folder: Path, options: list[str]) -> dict[str, bytes]:
    assert make_dataset.main(["--output_dir", str(folder), *options]) == 0
    return {path.name: path.read_bytes() for path in (folder / "recall").iterdir()}


def digest(files: dict[str, list[str]]) -> str:
    text = "".join(f"{name}\n{line}\n" for name, lines in sorted(files.items()) for line in lines)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def pairs_of(dataset: Path, name: str) -> list[tuple[str, str]]:
    return [(pair.query, pair.title) for pair in read_text_pairs(dataset / name)]


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "a", [*TINY, "--seed", "1"])
    assert first == write_dataset(tmp_path / "b", [*TINY, "--seed", "1"])
    other = write_dataset(tmp_path / "c", [*TINY, "--seed", "2"])
    assert all(first[name] != other[name] for name in SIZES)


def test_bytes_are_those_of_every_machine() -> None:
    """Another digest with another Python version is a bug; update it if the lists or the code change."""
    lines = make_dataset.make_dataset(documents=60, train_pairs=80, dev_pairs=5, test_pairs=10, seed=0)
    assert digest(lines) == "d9166e7b1a949975dda92b63e20b2befaa9bde1e87ff4fea9a2cacb17a7e584a"


def test_sizes_and_format(dataset: Path) -> None:
    assert {path.name for path in dataset.iterdir()} == set(SIZES)
    for name, size in SIZES.items():
        content = (dataset / name).read_bytes()
        assert content.endswith(b"\n")
        assert b"\r" not in content
        lines = content.decode("utf-8").split("\n")[:-1]
        assert len(lines) == size
        for line in lines:
            columns = line.split("\t")
            assert len(columns) == (1 if name == "corpus.csv" else 2)
            assert all(column and column == column.strip() for column in columns)


def test_more_train_pairs_than_documents_gives_new_queries() -> None:
    files = make_dataset.make_dataset(documents=60, train_pairs=120, dev_pairs=5, test_pairs=10, seed=0)
    assert len(files["train.csv"]) == len(set(files["train.csv"])) == 120
    assert len({line.split("\t")[1] for line in files["train.csv"]}) == 45


def test_documents_are_distinct_and_hold_every_positive(dataset: Path) -> None:
    corpus = list(read_corpus(dataset / "corpus.csv"))
    assert len(set(corpus)) == len(corpus)
    for name in ("train.csv", "dev.csv", "test.csv"):
        assert {title for _, title in pairs_of(dataset, name)} <= set(corpus)


def test_splits_share_no_query_and_no_document(dataset: Path) -> None:
    """Nor a query that has the words of another in another order."""
    splits = [
        [("".join(sorted(query.replace(" ", ""))), title) for query, title in pairs_of(dataset, name)]
        for name in ("train.csv", "dev.csv", "test.csv")
    ]
    for column in (0, 1):
        train, dev, test = ({pair[column] for pair in split} for split in splits)
        assert not train & dev
        assert not train & test
        assert not dev & test


def test_synonyms_of_test_are_learnable_from_train(dataset: Path) -> None:
    """Most replacements of a term by a synonym in test occur in train too, so that a model can learn them."""
    synonyms = {}
    for field in make_dataset.read_fields():
        for term in (term for terms in field.sections.values() for term in terms):
            for spelling in term:
                synonyms.setdefault(spelling, set()).update(term)

    def replacements(name: str) -> list[tuple[str, str]]:
        return [
            (spelling, other)
            for query, title in pairs_of(dataset, name)
            for spelling in synonyms
            if spelling in query and spelling not in title
            for other in sorted(synonyms[spelling])
            if other in title
        ]

    known = {frozenset(pair) for pair in replacements("train.csv")}
    needed = [frozenset(pair) for pair in replacements("test.csv")]
    assert sum(pair in known for pair in needed) > len(needed) / 2


@pytest.mark.parametrize("options", [["--documents", "800"], ["--documents", "100000000"]])
def test_impossible_sizes_are_one_line_and_write_nothing(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = make_dataset.read_fields()
    few = [field._replace(sections={name: terms[:3] for name, terms in field.sections.items()}) for field in fields[:1]]
    monkeypatch.setattr(make_dataset, "read_fields", lambda: few)
    with pytest.raises(InputError, match="--documents") as error:
        make_dataset.main(["--output_dir", str(tmp_path), *options])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_more_pairs_than_queries_is_an_input_error() -> None:
    with pytest.raises(InputError, match="ask for fewer, or more --documents"):
        make_dataset.make_dataset(documents=2, train_pairs=10_000, dev_pairs=0, test_pairs=0, seed=0)


def test_word_lists_are_large_and_clean() -> None:
    files = {path.name: make_dataset.read_sections(path) for path in TERMS.glob("*.txt")}
    regions = files.pop(make_dataset.REGIONS_FILE)["regions"]
    assert len(files) >= 25
    distinct = set(regions)
    for name, sections in files.items():
        assert set(sections) == {"style", "objects", "factors", "methods", "aspects"}, name
        assert sections.pop("style")[0][0] in make_dataset.STYLES, name
        terms = [term for section in sections.values() for term in section]
        spellings = [spelling for term in terms for spelling in term]
        assert len(spellings) == len(set(spellings)), f"{name}: a spelling stands twice"
        assert all(spelling and not set(spelling) & set(" \t,=[]") for spelling in spellings), name
        distinct.update(terms)
    assert len({term[0] for term in distinct}) >= 3000
    assert sum(len(term) - 1 for term in distinct) >= 400


def test_title_patterns_of_a_kind_use_the_same_slots() -> None:
    for kinds in make_dataset.STYLES.values():
        for kind in kinds:
            slots = set(make_dataset.slots_of(kind))
            assert all(set(make_dataset.slots_of(kind._replace(titles=(title,)))) == slots for title in kind.titles)
            assert all(set(make_dataset.slots_of(kind._replace(titles=(query,)))) <= slots for query in kind.queries)
