"""Texts with the same words are one text: never each other's negatives, one document, the right answer."""

import itertools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import common.texts
import evaluate
import recall
import train_batch_neg
from batch_negative.batches import PairBatcher
from common.texts import TextHashes, TextSet, has_visible_text, rough_key, text_ids, text_key
from data import Hit, TextPair, TextTokenizer, positives_by_query, read_hits, write_hits
from examples.vocabulary import build_vocabulary
from helpers import VARIED_TEXTS, all_pairs, evaluation_options, random_texts, train_options, write_pairs
from retrieval.corpus import read_corpus
from retrieval.saved_index import load_index

A, B, C, D = "水稻的产量", "论水稻产量研究", "土壤的品质", "论土壤品质研究"
X, Y = "iPhone 的 Mañana", "论iphone研究"
MARGIN, SCALE = 0.2, 30.0

# What the mask has to hold: the columns (titles, then hard negatives) that are no negatives of each query, besides its
# own title. The first four are named in the issue.
MASKS: dict[str, tuple[list[tuple[str, ...]], bool | None, list[set[int]]]] = {
    "paraphrases both ways": ([(A, B), (B, A), (C, D)], None, [{1}, {0}, set()]),
    "a hard negative that is the query": ([(A, B, A), (C, D)], None, [{2}, set()]),
    "the reverse direction alone": ([(A, B), (B, C), (D, X)], True, [set(), {0, 1}, set()]),
    "a query in another case": ([(X, Y), (C, X.upper())], None, [{1}, set()]),
    "a query with invisible characters": ([(A, B), (C, "水\u200b稻的\u2060产量")], None, [{1}, set()]),
    "a query with other spaces": ([(X, Y), (C, "iPhone\u3000的   Mañana")], None, [{1}, set()]),
    "a query without accents": ([(X, Y), (C, "iphone 的 manana")], None, [{1}, set()]),
    "a title in another case": ([(A, "X研究"), (A, "深度"), (C, "x研究")], None, [{1, 2}, {0, 2}, {0}]),
    "a hard negative that is a title": ([(A, B, D), (A, D)], None, [{1, 2}, {0, 2}]),
    "a hard negative in the reverse direction": ([(A, B, C), (C, A)], True, [{1, 2}, {2}]),
    "one direction, as in search": ([(A, B), (B, C), (D, X)], None, [set(), {0}, set()]),
    "both directions, but told otherwise": ([(A, B, C), (B, A), (C, A)], False, [{1, 2}, {0, 2}, {1, 3}]),
    "a text paired with itself": ([(A, A), (A, B), (C, A)], None, [{1, 2}, {0, 2}, {0}]),
    "two paraphrases of one text": ([(A, B), (A, C), (B, A)], None, [{1, 2}, {0, 2}, {0}]),
}


def tokenizer() -> TextTokenizer:
    return TextTokenizer(build_vocabulary([A, B, C, D, X, Y, "深度X研究"]), 24)


@pytest.mark.parametrize("name", MASKS)
def test_no_text_is_its_own_negative(name: str) -> None:
    rows, symmetric, expected = MASKS[name]
    pairs = [TextPair(query, title, tuple(hard_negatives)) for query, title, *hard_negatives in rows]
    mask = PairBatcher(tokenizer(), pairs, symmetric_pairs=symmetric)([np.arange(len(pairs))]).mask
    assert mask is not None
    found = [set(np.flatnonzero(mask[row]).tolist()) - {row} for row in range(len(pairs))]
    assert found == [columns - {row} for row, columns in enumerate(expected)]


@pytest.mark.parametrize(
    ("pairs", "symmetric"),
    [
        ([(A, B), (B, A)], True),
        ([(A, B), (B.upper() + "\u200b", A)], True),
        ([(A, A), (C, D)], False),  # a text paired with itself says nothing
        ([(A, B), (C, D), (B, C)], False),
        ([(f"问{row}", f"答{row}") for row in range(200)] + [("答7", "问7")], False),  # one pair may be a coincidence
        ([(f"问{row}", f"答{row}") for row in range(200)] + [(f"答{row}", f"问{row}") for row in range(3)], True),
    ],
)
def test_the_file_says_whether_its_pairs_are_symmetric(pairs: list[tuple[str, str]], symmetric: bool) -> None:
    texts = [text for pair in pairs for text in pair]
    batcher = PairBatcher(TextTokenizer(build_vocabulary(texts), 24), [TextPair(*pair) for pair in pairs])
    assert batcher.mask is not None
    assert batcher.mask.symmetric == symmetric


def obvious_loss(query_vectors: np.ndarray, title_vectors: np.ndarray, pairs: Sequence[tuple[str, str]]) -> float:
    """The loss of one batch, in which a title that is the query, or a paraphrase of it, is no negative."""
    losses = []
    for row, (query, title) in enumerate(pairs):
        logits = [SCALE * (query_vectors[row] @ title_vectors[row] - MARGIN)]
        for column, (other_query, other) in enumerate(pairs):
            is_paraphrase = {(query, other), (other, query)} & set(pairs)
            if column != row and other != query and not is_paraphrase and other != title and other_query != title:
                logits.append(SCALE * (query_vectors[row] @ title_vectors[column]))
        losses.append(np.log(np.exp(np.array(logits) - logits[0]).sum()))
    return float(np.mean(losses))


def test_the_loss_of_paraphrases_both_ways_is_that_of_an_obvious_twin(
    still_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.device import set_seed
    from modeling.checkpoint import load_checkpoint

    set_seed(0)
    pairs = [pair for query, title in all_pairs()[:8] for pair in ((query, title), (title, query))]
    train_set_file = write_pairs(tmp_path / "train.csv", pairs)
    options = train_options(still_model_folder, tmp_path, tmp_path / "save", "--learning_rate", "0", "--max_steps", "1")
    options += ["--dropout", "0"]
    assert train_batch_neg.main(options) == 0
    output = capsys.readouterr()
    assert f"{train_set_file}: 100 % of the pairs are given in both directions" in output.err
    loss = float(re.findall(r"loss: ([0-9.]+)", output.out)[0])
    model, tokens = load_checkpoint(tmp_path / "save" / "model_1")[:2]
    vectors = [model.embed(*tokens(list(texts))) for texts in zip(*pairs, strict=True)]
    assert loss == pytest.approx(obvious_loss(*vectors, pairs), abs=1e-4)
    assert train_batch_neg.main([*options, "--no_false_negative_mask"]) == 0
    unmasked = float(re.findall(r"loss: ([0-9.]+)", capsys.readouterr().out)[0])
    assert unmasked > loss + 1  # each query's own text is a negative


# ---------------------------------------------------------------------------------------------------------------------
# Documents

TWINS = {  # texts that a tokenizer that lowercases can't tell apart
    "case": ("iPhone手机壳", "IPHONE手机壳"),
    "zero-width space": ("水稻产量", "水稻\u200b产量"),
    "word joiner": ("水稻产量", "\u2060水稻产量"),
    "soft hyphen": ("soil", "so\u00adil"),
    "control character": ("水稻产量", "水稻\x01产量"),
    "spaces": ("水稻 产量", "水稻产量"),
    "ideographic space": ("soil test", "soil\u3000test"),
    "accents": ("café", "cafe"),
    "composition": ("n\u0303", "ñ"),
    "Greek": ("ΟΔΥΣΣΕΎΣ", "οδυσσευσ"),
}
OTHERS = {  # texts that look alike, with other words
    "width": ("ABC", "ＡＢＣ"),
    "punctuation": ("水稻,产量", "水稻，产量"),
    "a space in a word": ("soil", "so il"),
    "order": ("水稻产量", "产量水稻"),
    "unknown characters": ("龘", "靐"),
    "symbols": ("★★", "★"),
    "final sigma": ("ΟΔΥΣΣΕΎΣ", "οδυσσεύς"),
}


@pytest.mark.parametrize("name", [*TWINS, *OTHERS])
def test_texts_with_equal_tokens_have_equal_keys_and_others_don_t(name: str) -> None:
    first, second = (TWINS | OTHERS)[name]
    tokens = TextTokenizer(build_vocabulary([first, second]), 64).tokenize([first, second])
    assert (tokens[0] == tokens[1]) == (text_key(first) == text_key(second)) == (name in TWINS)
    if name in TWINS:
        assert rough_key(first) == rough_key(second)


def test_keys_equal_where_tokens_do() -> None:
    """In random mixtures of scripts, symbols and invisible characters."""
    rng = np.random.default_rng(5)
    characters = sorted(set("".join(VARIED_TEXTS)) | set("aAéÉ ,，\u200b\u00ad"))
    texts = ["".join(rng.choice(characters[:40], size=3)) for _ in range(1500)] + random_texts(50)
    for lowercase in (True, False):
        config = {"do_lower_case": lowercase}
        tokens = TextTokenizer(build_vocabulary([*texts, *map(str.lower, texts)]), 64, config).tokenize(texts)
        ids = [tuple(token_ids) for token_ids in tokens]
        keys = [text_key(text, lowercase) for text in texts]
        assert len(set(zip(ids, keys, strict=True))) == len(set(keys))  # a key has one row of tokens
        assert len({(rough_key(text), text_key(text)) for text in texts}) == len({text_key(text) for text in texts})


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_one_document(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = TWINS[name]
    path = write_pairs(tmp_path / "corpus.csv", [(first,), ("土壤品质",), (second,), (first,)])
    assert list(read_corpus(path)) == [first, "土壤品质"]
    assert "left out 2 line(s) of 4 that repeat another one" in capsys.readouterr().err


def test_case_matters_to_a_tokenizer_that_keeps_it(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "corpus.csv", [("Polish",), ("polish",), ("pol\u00adish",), ("café",), ("cafe",)])
    assert list(read_corpus(path, lowercase=False)) == ["Polish", "polish", "café", "cafe"]


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_recall_takes_the_checkpoint_s_case(
    checkpoint: Path, recall_data: Path, tmp_path: Path, do_lower_case: bool
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "manifest.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": do_lower_case}))
    corpus = write_pairs(tmp_path / "corpus.csv", [("水稻A",), ("水稻a",), ("水稻A\u200b",), ("土壤",)])
    more = write_pairs(tmp_path / "more.csv", [("土 壤",), ("土壤B",), ("土壤b",)])
    options = ["--params_path", str(folder), "--device", "cpu", "--index_dir", str(tmp_path / "index")]
    options += ["--recall_result_dir", str(tmp_path), "--ann", "exact"]
    assert recall.main([*options, "--corpus_file", str(corpus)]) == 0
    assert recall.main([*options, "--add_corpus", str(more)]) == 0
    cased = ["水稻A", "水稻a", "土壤", "土壤B", "土壤b"]
    assert list(load_index(tmp_path / "index").documents) == (["水稻A", "土壤", "土壤B"] if do_lower_case else cased)


def test_a_set_of_texts_is_that_of_their_keys() -> None:
    texts = [text for twins in (*TWINS.values(), *OTHERS.values()) for text in twins]
    found = TextSet(texts)
    first_of = {text_key(text): text for text in reversed(texts)}
    assert sorted(found) == sorted(first_of.values())
    assert len(found) == len(first_of)
    assert [found.find(text) for text in texts] == [first_of[text_key(text)] for text in texts]
    found.discard("CAFÉ")
    assert found.find("cafe") is None
    assert len(found) == len(first_of) - 1
    assert found.find("水") is None
    assert [found.setdefault(text) for text in ("水", " 水", "水 ")] == ["水"] * 3
    assert len(found) == len(first_of)


@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_are_equal_for_the_same_texts_alone(lowercase: bool) -> None:
    words = ["apple", "Apple", "pear", "fig", "ｆｉｇ", "a-b", "a - b", "水稻", "水 稻", "…", "..."]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 4))) for _ in range(500)]
    keys = [text_key(text, lowercase) for text in texts]
    assert text_ids(texts, lowercase).tolist() == [keys.index(key) for key in keys]
    assert text_ids([]).tolist() == []


def test_a_key_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many texts have the same letters."""
    texts = ["水稻" + "".join(marks) for marks in itertools.product("。，！？", repeat=3)]
    asked: list[str] = []

    def counted(text: str, lowercase: bool = True) -> str:
        asked.append(text)
        return text_key(text, lowercase)

    monkeypatch.setattr(common.texts, "text_key", counted)
    assert list(TextSet(texts)) == texts
    assert len(asked) < 2 * len(texts)
    assert text_ids([*texts, *texts]).tolist() == [*range(64), *range(64)]


def test_ids_need_few_of_the_texts() -> None:
    """Those whose rough hash isn't theirs alone, also if it is by chance."""
    texts = ["水", "B", "水", "b", "C", "b", "D", "c++", "D"]
    hashes = TextHashes.join([TextHashes.of(texts[:4]), TextHashes.of(texts[4:])])
    hashes.rough[7] = hashes.rough[6]
    asked: list[int] = []

    def text(row: int) -> str:
        asked.append(row)
        return texts[row]

    assert hashes.ids(text).tolist() == [0, 1, 0, 1, 4, 1, 6, 7, 6]
    assert sorted(set(asked)) == [1, 3, 6, 7]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_of_the_title_is_the_right_answer(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    title, document = TWINS[name]
    pairs = write_pairs(tmp_path / "dev.csv", [("查询", title), ("查 询", document), ("第二", "标题")])
    result = tmp_path / "result.txt"
    write_hits(result, [Hit("查询", document, 0.9), Hit("第二", "其他", 0.8), Hit("第二", "标题", 0.7)])
    arguments = ["--similar_text_pair_file", str(pairs), "--recall_result_file", str(result)]
    assert evaluate.main(arguments) == 0
    output = capsys.readouterr()
    assert "recall@1=50.0\nrecall@5=100.0\n" in output.out
    assert all(line.startswith("--recall_num 10") for line in output.err.splitlines())


def test_a_query_s_own_text_is_left_out_of_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With paraphrases both ways the corpus holds the queries; a query that is its own title has to find itself."""
    pairs = write_pairs(tmp_path / "dev.csv", [(A, B), (B, A), (C, C)])
    result = tmp_path / "result.txt"
    hits = [(A, "水稻的 产量"), (A, B), (A, C), (B, B), (B, C), (B, A), (C, C), (C, A)]
    write_hits(result, [Hit(query, document, 0.5) for query, document in hits])
    assert evaluate.main(["--similar_text_pair_file", str(pairs), "--recall_result_file", str(result)]) == 0
    output = capsys.readouterr()
    assert "recall@1=66.667\nrecall@5=100.0\n" in output.out
    assert output.err.endswith("\n2 of 3 queries recalled their own text, which is left out\n")


def test_an_evaluation_in_training_says_so_too(
    model_folder: Path, recall_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [pair for query, title in all_pairs()[:10] for pair in ((query, title), (title, query))]
    write_pairs(tmp_path / "dev.csv", pairs)
    write_pairs(tmp_path / "corpus.csv", sorted({(text,) for pair in pairs for text in pair}))
    options = train_options(model_folder, recall_data, tmp_path / "save", "--max_steps", "1")
    assert train_batch_neg.main([*options, *evaluation_options(tmp_path, tmp_path)]) == 0
    assert "20 of 20 queries recalled their own text" in capsys.readouterr().err


def test_queries_and_titles_with_the_same_words_are_one() -> None:
    pairs = [TextPair("iPhone 壳", "手机壳A"), TextPair("iphone壳", "手机壳a"), TextPair("IPHONE壳", "保护套")]
    assert positives_by_query(pairs) == {"iPhone 壳": {"手机壳A", "保护套"}}


def test_cosines_that_go_up_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as distances of another search engine."""
    path = tmp_path / "result.txt"
    write_hits(path, [Hit("甲", "a", 0.1), Hit("甲", "b", 0.2), Hit("乙", "a", 0.9), Hit("乙", "b", 0.9)])
    assert read_hits(path) == {"甲": ["a", "b"], "乙": ["a", "b"]}
    assert f"{path}: the scores of 1 queries go up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        *[(character, False) for character in "\u200b\u2060\u00ad\ufeff\x00\x01\x7f\u0085\u200d\ufffd\u0301\ufe0f"],
        *[(" \u200b\u3000\u2060 ", False), ("", False), ("\u200b水", True), ("。", True), ("😀", True), ("0", True)],
    ],
)
def test_visible_text(text: str, visible: bool) -> None:
    assert has_visible_text(text) == visible
    tokens = TextTokenizer(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], 8).tokenize([text])[0]
    assert (len(tokens) > 2) == visible


def test_many_masked_titles_are_told(
    model_folder: Path, recall_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as in a file whose query column has few different texts: there is little to learn from."""
    distinct, titles = zip(*all_pairs()[:40], strict=True)
    for queries, share in ((["水稻", "土壤"], "49"), (distinct, None)):
        pairs = write_pairs(
            tmp_path / "train.csv", [(queries[row % len(queries)], title) for row, title in enumerate(titles)]
        )
        options = train_options(model_folder, recall_data, tmp_path / "save", "--train_set_file", str(pairs))
        assert train_batch_neg.main([*options, "--batch_size", "40", "--max_steps", "1"]) == 0
        line = capsys.readouterr().err.splitlines()[-1]
        end = f", of which {share} % are masked" if share else ""
        assert line.endswith(f"a query has 39 other titles as negatives{end}")
