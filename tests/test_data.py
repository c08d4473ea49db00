"""Readers, writers, tokens and vectors, each fast path against a slow, obvious twin."""

import json
import math
import os
import random
import re
import tempfile
import tracemalloc
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer

import data
from common import logs
from common.errors import InputError
from common.files import read_json, write_json
from common.lines import MAX_LINE_BYTES
from common.logs import progress_bar
from data import (
    CLS,
    MASK,
    PAD,
    SEP,
    UNK,
    Hit,
    TextPair,
    TextTokenizer,
    encode_texts,
    max_position_tokens,
    positives_by_query,
    read_hits,
    read_text_pairs,
    read_texts,
    read_vocabulary,
    write_hits,
    write_vectors,
    write_vocabulary,
)
from examples.vocabulary import build_vocabulary
from helpers import VARIED_TEXTS, random_texts, small_tokenizer
from retrieval.corpus import Corpus, read_corpus

BOM = b"\xef\xbb\xbf"

READERS: dict[str, Callable] = {"pairs": read_text_pairs, "corpus": Corpus, "hits": read_hits}
FORMS: dict[str, Callable] = {
    **READERS,
    "scored": partial(read_text_pairs, teacher_scores=True),
    "unsupervised": partial(read_text_pairs, unsupervised=True),
}
CLEAN = {
    "pairs": "深度学习\t深度学习综述\n图像分割\t医学图像分割\n".encode(),
    "corpus": "深度学习综述\n医学图像分割\n".encode(),
    "hits": "深度学习\t深度学习综述\t0.5\n图像分割\t医学图像分割\t-0.25\n".encode(),
    "scored": "深度学习\t深度学习综述\t0.5\n图像分割\t医学图像分割\t图像检索\t0.5\t-1\n".encode(),
    "unsupervised": "深度学习综述\n医学图像分割\n".encode(),
}


def content(result: object) -> object:
    """What a reader returned, a corpus as a list."""
    return result if isinstance(result, (list, dict)) else list(result)


def written(folder: Path, raw: bytes, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Readers


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "unclean",
    [
        lambda raw: BOM + raw,
        lambda raw: raw.replace(b"\n", b"\r\n"),
        lambda raw: raw.removesuffix(b"\n"),
        lambda raw: (BOM + raw.replace(b"\n", b"\r\n")).removesuffix(b"\r\n"),
    ],
    ids=["bom", "crlf", "no final newline", "all three"],
)
def test_bom_crlf_and_missing_final_newline_read_like_a_clean_file(
    tmp_path: Path, reader: str, unclean: Callable[[bytes], bytes]
) -> None:
    read = READERS[reader]
    clean = content(read(written(tmp_path, CLEAN[reader])))
    assert len(clean) == 2
    assert content(read(written(tmp_path, unclean(CLEAN[reader])))) == clean


@pytest.mark.parametrize("reader", READERS)
def test_byte_order_marks_of_concatenated_files_are_not_part_of_a_text(tmp_path: Path, reader: str) -> None:
    """Written at the beginning of a file, such a text would lose it."""
    read = READERS[reader]
    clean = content(read(written(tmp_path, CLEAN[reader])))
    joined = BOM + BOM + CLEAN[reader].replace(b"\n", b"\n " + BOM, 1)
    assert content(read(written(tmp_path, joined))) == clean


def test_pairs_keep_order_duplicates_and_the_hard_negative(tmp_path: Path) -> None:
    path = written(tmp_path, "问\t答\n问\t答\n 问 \t另答\t 难负例 \n别问\t答\t\n别问\t答\t \n".encode())
    assert read_text_pairs(path) == [
        TextPair("问", "答"),
        TextPair("问", "答"),
        TextPair("问", "另答", ("难负例",)),
        TextPair("别问", "答"),
        TextPair("别问", "答"),
    ]


def test_pairs_with_several_hard_negatives_and_a_teachers_scores(tmp_path: Path) -> None:
    path = written(tmp_path, "问\t答\t甲\t\t 乙 \n问\t答\n".encode())
    assert read_text_pairs(path) == [TextPair("问", "答", ("甲", "乙")), TextPair("问", "答")]
    path = written(tmp_path, "问\t答\t甲\t乙\t0.9\t-1e-1\t3\n问\t答\t 0.5 \n".encode())
    assert read_text_pairs(path, teacher_scores=True) == [
        TextPair("问", "答", ("甲", "乙"), (0.9, -0.1, 3.0)),
        TextPair("问", "答", (), (0.5,)),
    ]


def test_a_text_is_its_own_title_and_held_once(tmp_path: Path) -> None:
    pairs = read_text_pairs(written(tmp_path, "甲文\n 乙文\n甲文\n".encode()), unsupervised=True)
    assert pairs == [TextPair("甲文", "甲文"), TextPair("乙文", "乙文"), TextPair("甲文", "甲文")]
    assert all(pair.query is pair.title for pair in pairs)


def test_documents_to_search_are_distinct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The first of equal lines stays; also where texts that differ have one hash."""
    path = written(tmp_path, b"a\nb\n a\r\nc\nb\na\n")
    assert list(Corpus(path)) == ["a", "b", "a", "c", "b", "a"]
    assert capsys.readouterr().err == ""
    for hash_of in (hash, lambda _: 1):
        monkeypatch.setattr(data, "hash", hash_of, raising=False)
        assert list(read_corpus(path)) == ["a", "b", "c"]
        assert capsys.readouterr().err == f"{path}: left out 3 line(s) of 6 that repeat another one\n"
    assert read_corpus(path).sha256 == Corpus(path).sha256


def test_hits_keep_the_order_of_each_query(tmp_path: Path) -> None:
    path = written(tmp_path, b"q\tx\t0.1\np\ty\t0.9\nq\tz\t0.8\nq\tx\t1e-3\n")
    assert read_hits(path) == {"q": ["x", "z", "x"], "p": ["y"]}


def test_positives_by_query_keeps_the_order_of_first_lines() -> None:
    titles = positives_by_query([TextPair("b", "1"), TextPair("a", "2"), TextPair("b", "3"), TextPair("b", "1")])
    assert list(titles.items()) == [("b", {"1", "3"}), ("a", {"2"})]


def test_texts_keep_order_and_duplicates(tmp_path: Path) -> None:
    path = written(tmp_path, b"b\n a\r\n\xff\nb\na\tb\nc")
    assert read_texts(path, skip_bad_lines=True) == ["b", "a", "b", "c"] == list(Corpus(path, skip_bad_lines=True))
    with pytest.raises(InputError, match=f"{path}: 2 bad line"):
        read_texts(path)


BAD_LINES = [
    ("pairs", "只有一列".encode(), "1 column"),
    ("scored", b"a\tb\tc\t0.5", "4 column(s), where"),
    ("scored", b"a\tb", "2 column(s), where"),
    ("scored", b"a", "1 column(s), where"),
    ("scored", b"a\tb\tc\t0.5\tnan", "a score isn't a finite number"),
    ("scored", b"a\tb\tc\t0.5\td", "a score isn't a finite number"),
    ("scored", b"a\tb\t\t0.5\t0.1", "a hard negative is empty"),
    ("scored", b"\tb\t0.5", "the query is empty"),
    ("unsupervised", b"a\tb", "2 columns, where a line holds one text"),
    ("pairs", b"\ttitle", "query is empty"),
    ("pairs", b"query\t", "title is empty"),
    ("pairs", "\u3000\ttitle".encode(), "query is empty"),
    ("pairs", b"", "the line is empty"),
    ("pairs", "问\t答".encode("utf-16-le"), "NUL"),
    ("corpus", b"", "empty"),
    ("corpus", b" \r", "empty"),
    ("corpus", b"a\tb\tc\td", "4 columns"),
    ("hits", b"q\tt", "2 column"),
    ("hits", b"q\tt\t0.5\t1", "4 column"),
    ("hits", b"q\tt\tnan", "finite"),
    ("hits", b"q\tt\tinf", "finite"),
    ("hits", b"q\tt\thigh", "finite"),
    ("hits", b"q\tt\t", "finite"),
    ("hits", b"\tt\t0.5", "empty"),
    ("hits", b"q\t\t0.5", "empty"),
    *[(reader, b"a\0b\tc\t1", "NUL") for reader in READERS],
    *[(reader, "中文\t标题\t1".encode("gb18030"), "isn't UTF-8 at byte 1") for reader in READERS],
    *[(reader, b"x" * 10_000_000, "longer than") for reader in READERS],
]


@pytest.mark.parametrize(("reader", "line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_with_file_number_and_reason(tmp_path: Path, reader: str, line: bytes, reason: str) -> None:
    first, second = CLEAN[reader].splitlines(keepends=True)
    path = written(tmp_path, first + line + b"\n" + second)
    with pytest.raises(InputError) as error:
        FORMS[reader](path)
    message = str(error.value).split("\n")
    assert len(message) == 2
    assert message[0].startswith(f"{path}: 1 bad line(s)")
    assert message[1].startswith(f"{path}:2: ")
    assert reason in message[1]
    assert len(message[1]) < 300 + len(str(path))


@pytest.mark.parametrize("reader", ["pairs", "corpus"])
def test_skip_bad_lines_leaves_them_out_and_says_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: str
) -> None:
    first, second = CLEAN[reader].splitlines(keepends=True)
    path = written(tmp_path, b"\0\n" + first + b"\xff\n" + b"x" * (MAX_LINE_BYTES + 1) + b"\n" + second + b"\t\t\t\n")
    clean = content(READERS[reader](written(tmp_path, CLEAN[reader], "clean.csv"), skip_bad_lines=True))
    assert capsys.readouterr().err == ""
    assert content(READERS[reader](path, skip_bad_lines=True)) == clean
    log = capsys.readouterr().err
    assert log.count("\n") == 1
    assert f"{path}: left out 4 bad line(s) of 6" in log
    assert f"{path}:1: " in log


def test_a_bad_recall_result_suggests_no_option_that_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_hits(written(tmp_path, b"q\tt\t0.5\nq\tt\n"))
    assert "--skip_bad_lines" not in str(error.value)


def test_the_first_ten_bad_lines_and_the_count_of_all_come_in_one_message(tmp_path: Path) -> None:
    path = written(tmp_path, b"".join(b"no tab\n" if row % 2 else b"q\tt\n" for row in range(60)))
    with pytest.raises(InputError) as error:
        read_text_pairs(path)
    head, *lines = str(error.value).split("\n")
    assert f"{path}: 30 bad line(s)" in head
    assert "--skip_bad_lines" in head
    assert [int(line.removeprefix(f"{path}:").split(":")[0]) for line in lines] == list(range(2, 22, 2))


def test_the_length_limit_is_per_line_and_later_lines_keep_their_numbers(tmp_path: Path) -> None:
    longest = b"x" * (MAX_LINE_BYTES - 1)
    path = written(tmp_path, longest + b"\n" + longest + b"xxxxx\nafter\n" + longest)
    assert [len(text) for text in Corpus(path, skip_bad_lines=True)] == [len(longest), 5, len(longest)]
    with pytest.raises(InputError, match=f"{path}:2: longer than"):
        read_corpus(path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("raw", [b"", BOM], ids=["empty", "only a BOM"])
def test_an_empty_file_is_an_input_error(tmp_path: Path, reader: str, raw: bytes) -> None:
    path = written(tmp_path, raw)
    with pytest.raises(InputError, match=f"{path}: .*empty"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", ["pairs", "corpus"])
def test_a_file_without_a_good_line_is_an_input_error_even_when_bad_ones_are_skipped(
    tmp_path: Path, reader: str
) -> None:
    path = written(tmp_path, b"\xff\n\0\n")
    with pytest.raises(InputError, match=f"{path}: no line in it can be used"):
        READERS[reader](path, skip_bad_lines=True)


@pytest.mark.parametrize("read", [*READERS.values(), read_vocabulary, read_json])
def test_a_missing_file_and_a_folder_are_input_errors(tmp_path: Path, read: Callable) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/none: no such file"):
        read(tmp_path / "none")
    with pytest.raises(InputError, match=f"{tmp_path}: is a folder"):
        read(tmp_path)
    with pytest.raises(InputError, match="can't be read"):
        read(written(tmp_path, b"file") / "below a file")


@pytest.fixture
def forbidden_file() -> Iterator[Path]:
    """A file that this process, even if root started it, may not read; not in tmp_path, which others can't enter."""
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), b"a\tb\n")
        path.chmod(0)
        os.chmod(folder, 0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield path
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("read", [*READERS.values(), read_vocabulary, read_json])
def test_a_file_without_permission_is_an_input_error(forbidden_file: Path, read: Callable) -> None:
    with pytest.raises(InputError, match=f"{forbidden_file}: can't be read .Permission denied"):
        read(forbidden_file)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_an_input_error(reader: str) -> None:
    """`--corpus_file <(zcat corpus.gz)` gives one; files are read more than once, so it can't be used."""
    reading, writing = os.pipe()
    try:
        os.write(writing, CLEAN[reader])
        os.close(writing)
        with pytest.raises(InputError, match=f"/dev/fd/{reading}"):
            READERS[reader](f"/dev/fd/{reading}")
    finally:
        os.close(reading)


# ---------------------------------------------------------------------------------------------------------------------
# Corpus


def twin_lines(raw: bytes) -> list[str | None]:
    """The lines of a file, None for those that no reader takes."""
    pieces = raw.removeprefix(BOM).split(b"\n")
    if pieces[-1] == b"":
        pieces.pop()
    lines: list[str | None] = []
    for piece in pieces:
        try:
            lines.append(None if b"\0" in piece else piece.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            lines.append(None)
    return lines


def bare(text: str) -> str:
    """Less white space and byte order marks at its ends, a character at a time; "" if it has invisible ones alone."""
    while text and (text[0].isspace() or text[0] == "\ufeff"):
        text = text[1:]
    while text and (text[-1].isspace() or text[-1] == "\ufeff"):
        text = text[:-1]
    invisible = (unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Mn", "Zs", "Zl", "Zp") for c in text)
    return "" if all(invisible) else text


def twin_corpus(raw: bytes) -> list[str | None]:
    return [bare(line) if line and bare(line) and "\t" not in line else None for line in twin_lines(raw)]


def twin_pairs(raw: bytes) -> list[TextPair | None]:
    rows: list[TextPair | None] = []
    for line in twin_lines(raw):
        fields = [] if line is None else [bare(field) for field in line.split("\t")]
        if len(fields) == 2 and all(fields):
            rows.append(TextPair(fields[0], fields[1]))
        elif len(fields) > 2 and all(fields[:2]):
            rows.append(TextPair(fields[0], fields[1], tuple(text for text in fields[2:] if text)))
        else:
            rows.append(None)
    return rows


def is_finite_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def twin_hits(raw: bytes) -> list[tuple[str, str] | None]:
    rows: list[tuple[str, str] | None] = []
    for line in twin_lines(raw):
        fields = [] if line is None else [bare(field) for field in line.split("\t")]
        good = len(fields) == 3 and all(fields) and is_finite_number(fields[2])
        rows.append((fields[0], fields[1]) if good else None)
    return rows


@pytest.mark.parametrize("skip_bad_lines", [False, True])
def test_corpus_access_equals_a_list(tmp_path: Path, skip_bad_lines: bool) -> None:
    bad = [b"\xff\xfe\r\n", b"a\tb\n", b"\n"] if skip_bad_lines else []
    good = [f" 文档{row}号 \r\n".encode() if row % 3 else f"文档 {row}\n".encode() for row in range(20)]
    raw = BOM + b"".join([*good[:5], *bad, *good[5:], "最后一行".encode()])
    corpus = read_corpus(written(tmp_path, raw), skip_bad_lines=skip_bad_lines)
    twin = [text for text in twin_corpus(raw) if text is not None]
    assert len(corpus) == len(twin) == 21
    assert [corpus[row] for row in range(-21, 21)] == [twin[row] for row in range(-21, 21)]
    assert corpus[np.int64(7)] == twin[7]
    for rows in (slice(None), slice(3, 9), slice(-4, None), slice(None, None, -2), slice(5, 5), slice(10, 1000)):
        assert corpus[rows] == twin[rows]
    assert list(corpus) == twin
    assert twin[-1] in corpus
    assert corpus.index("文档 6") == 6
    for row in (21, -22):
        with pytest.raises(IndexError):
            corpus[row]


@pytest.mark.parametrize("change", ["cut", "rewritten", "replaced"])
def test_a_corpus_that_is_changed_while_in_use_is_an_input_error(tmp_path: Path, change: str) -> None:
    """Another file that takes its name changes nothing."""
    raw = "".join(f"文档{row}\n" for row in range(5_000)).encode()
    corpus = read_corpus(written(tmp_path, raw))
    path = next(tmp_path.iterdir())
    if change == "replaced":
        (tmp_path / "new").write_bytes(b"a\n")
        os.replace(tmp_path / "new", path)
        assert corpus[4_999] == "文档4999" and corpus[:1] == ["文档0"]
        return
    path.write_bytes(b"" if change == "cut" else raw[1:] + b"\n")
    for rows in (4_999, slice(0, 10)):
        with pytest.raises(InputError, match=f"{path}: was changed while it was in use"):
            corpus[rows]


def test_corpus_holds_no_texts_in_memory(tmp_path: Path) -> None:
    lines = [("文" * 300 + f"{number}\n").encode() for number in range(5_000)]
    path = written(tmp_path, b"".join(lines))
    tracemalloc.start()
    corpus = read_corpus(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(corpus) == len(lines)
    assert peak < path.stat().st_size / 10


# ---------------------------------------------------------------------------------------------------------------------
# Any bytes at all

FRAGMENTS = [b"\t", b"\t", b"\t", b"\n", b"\n", b"\r\n", b"\r", b" ", BOM, b"\0", b"0.5", b"-1e3", b"nan", b"x", b"yz"]


def random_file(rng: random.Random) -> bytes:
    """Lines that one of the readers takes or all refuse, with every kind of damage in between."""
    damage = rng.choice([0.0, 0.02, 0.3, 1.0])
    widths = rng.choice([[1], [2, 3], [3], [1, 2, 3, 4]])
    pieces = [BOM] if rng.random() < 0.2 else []
    for _ in range(rng.randrange(12)):
        columns = rng.choice(widths)
        fields = ["".join(rng.choices("深度学习综述 图像a1", k=rng.randrange(1, 6))).encode() for _ in range(columns)]
        if columns == 3 and rng.random() < 0.7:
            fields[2] = rng.choice([b"0.5", b"-0.25", b"1", b"1e-3", b"0", b"nan" if damage else b"2"])
        pieces += [b"\t".join(fields), rng.choice([b"\n", b"\n", b"\r\n"])]
        while rng.random() < damage * 0.8:
            pieces.append(rng.choice([*FRAGMENTS, rng.randbytes(rng.randrange(4))]))
    return b"".join(pieces)


def bad_line_numbers(message: str, path: Path) -> list[int]:
    return [int(number) for number in re.findall(rf"(?m)^{re.escape(str(path))}:(\d+): ", message)]


@pytest.mark.parametrize("reader", READERS)
def test_a_thousand_random_files_give_the_twin_s_rows_or_an_input_error(tmp_path: Path, reader: str) -> None:
    rng = random.Random(20240607)
    twin = {"pairs": twin_pairs, "corpus": twin_corpus, "hits": twin_hits}[reader]
    read = partial(read_text_pairs, check_columns=False) if reader == "pairs" else READERS[reader]
    outcomes = {"read": 0, "skipped": 0, "refused": 0}
    path = tmp_path / "random.csv"
    for _ in range(1000):
        raw = random_file(rng)
        path.write_bytes(raw)
        rows = twin(raw)
        good: object = [row for row in rows if row is not None]
        bad = [number for number, row in enumerate(rows, 1) if row is None]
        if reader == "hits":
            good = {query: [title for other, title in good if other == query] for query, _ in good}
        if good and not bad:
            outcomes["read"] += 1
            assert content(read(path)) == good, raw
        else:
            outcomes["refused"] += 1
            with pytest.raises(InputError) as error:
                read(path)
            assert bad_line_numbers(str(error.value), path) == bad[:10], raw
            assert not bad or f"{len(bad)} bad line(s)" in str(error.value), raw
        if reader != "hits":
            if good:
                outcomes["skipped"] += bool(bad)
                assert content(read(path, skip_bad_lines=True)) == good, raw
            else:
                with pytest.raises(InputError):
                    read(path, skip_bad_lines=True)
    assert outcomes["read"] > 20  # the files aren't all good or all bad
    assert outcomes["refused"] > 200
    assert reader == "hits" or outcomes["skipped"] > 200


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_hits_round_trip(tmp_path: Path) -> None:
    hits = [
        Hit("查询", "标题\u2028另一行", 0.1 + 0.2),
        Hit("查询", "a\rb", np.float32(1 / 3)),
        Hit("q", "查询", -1.0),
        Hit("查询", "x", 1e-12),
    ]
    path = tmp_path / "new" / "folder" / "result.txt"
    write_hits(path, iter(hits))
    assert read_hits(path) == {"查询": ["标题\u2028另一行", "a\rb", "x"], "q": ["查询"]}
    scores = [line.row.score for line in data.read_lines(path, data.parse_hit)]
    np.testing.assert_allclose(scores, [hit.score for hit in hits], rtol=1e-7)
    assert b"\r\n" not in path.read_bytes()


def test_vectors_round_trip_under_any_name(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    write_vectors(tmp_path / "new" / "vectors", vectors)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["vectors"]
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "vectors"), vectors)
    with pytest.raises(InputError, match=f"{tmp_path}: can't be written"):
        write_vectors(tmp_path, vectors)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

SPECIAL_TOKENS = [PAD, CLS, SEP, MASK, UNK]


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    """Every character on its own and inside words, so that no difference hides behind [UNK]."""
    vocabulary = build_vocabulary(VARIED_TEXTS)
    characters = sorted({character for text in VARIED_TEXTS for character in text if not character.isspace()})
    pieces = [piece for character in characters for piece in (character, f"##{character}")]
    return list(dict.fromkeys([*vocabulary, *pieces]))


@pytest.fixture(scope="module")
def ernie_tokenizers(vocabulary: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Callable]:
    """PaddleNLP's tokenizer for `do_lower_case` true and false."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paddlenlp.data  # noqa: F401 - first, as in modeling/backbone.py
        from paddlenlp.transformers import ErnieTokenizer
    path = tmp_path_factory.mktemp("ernie") / "vocab.txt"
    write_vocabulary(path, vocabulary)
    return {do_lower_case: ErnieTokenizer(str(path), do_lower_case=do_lower_case) for do_lower_case in (True, False)}


@pytest.mark.parametrize("do_lower_case", [True, False])
@pytest.mark.parametrize("max_seq_length", [3, 10, 512])
def test_token_ids_equal_paddlenlp_s(
    vocabulary: list[str], ernie_tokenizers: dict[bool, Callable], do_lower_case: bool, max_seq_length: int
) -> None:
    tokenizer = TextTokenizer(vocabulary, max_seq_length, {"do_lower_case": do_lower_case})
    theirs = ernie_tokenizers[do_lower_case]
    lengths = set()
    for text, ids in zip(VARIED_TEXTS, tokenizer.tokenize(VARIED_TEXTS), strict=True):
        expected = theirs(text, max_seq_len=max_seq_length)
        assert ids == expected["input_ids"], text
        assert not any(expected["token_type_ids"])
        lengths.add(len(ids))
    assert max(lengths) == max_seq_length or max_seq_length == 512
    assert min(lengths) == 2


def test_token_ids_equal_paddlenlp_s_on_random_mixtures(
    vocabulary: list[str], ernie_tokenizers: dict[bool, Callable]
) -> None:
    rng = random.Random(5)
    characters = sorted(set("".join(VARIED_TEXTS)))
    texts = ["".join(rng.choices(characters, k=rng.randrange(1, 40))) for _ in range(300)]
    ids = TextTokenizer(vocabulary, 64).tokenize(texts)
    assert ids == [ernie_tokenizers[True](text, max_seq_len=64)["input_ids"] for text in texts]


@pytest.mark.parametrize("do_lower_case", [True, False])
@pytest.mark.parametrize("max_seq_length", [3, 10, 512])
def test_token_ids_without_split_symbols_equal_hugging_face_s(
    vocabulary: list[str], do_lower_case: bool, max_seq_length: int
) -> None:
    """Those of the BERT tokenizer in its own library, which is what transformers runs."""
    theirs = BertWordPieceTokenizer({token: row for row, token in enumerate(vocabulary)}, lowercase=do_lower_case)
    theirs.enable_truncation(max_seq_length)
    config = {"do_lower_case": do_lower_case, "split_symbols": False}
    rng = random.Random(6)
    characters = sorted(set("".join(VARIED_TEXTS)))
    texts = [*VARIED_TEXTS, *("".join(rng.choices(characters, k=rng.randrange(1, 140))) for _ in range(1000))]
    ids = TextTokenizer(vocabulary, max_seq_length, config).tokenize(texts)
    assert ids == [encoding.ids for encoding in theirs.encode_batch(texts)]
    if max_seq_length == 512:
        splitting = TextTokenizer(vocabulary, max_seq_length, {**config, "split_symbols": True})
        assert sum(one != other for one, other in zip(ids, splitting.tokenize(texts), strict=True)) > 500


@pytest.mark.parametrize("split_symbols", [True, False])
def test_special_tokens_typed_in_a_text_are_ordinary_text(split_symbols: bool) -> None:
    vocabulary = [*SPECIAL_TOKENS, *"[]", "sep", "cls", "pad", "unk", "mask", "a"]
    ids = {token: row for row, token in enumerate(vocabulary)}
    tokenizer = TextTokenizer(vocabulary, 32, {"split_symbols": split_symbols})
    for token in SPECIAL_TOKENS:
        inside = [ids["["], ids[token[1:-1].lower()], ids["]"]]
        assert tokenizer.tokenize([f"a{token}a"]) == [[ids[CLS], ids["a"], *inside, ids["a"], ids[SEP]]]


def test_padding_and_token_types() -> None:
    tokenizer = small_tokenizer()
    texts = ["深度", "医学图像分割方法综述", ""]
    ids = tokenizer.tokenize(texts)
    input_ids, token_type_ids = tokenizer(texts)
    assert input_ids.dtype == token_type_ids.dtype == np.int64
    assert input_ids.shape == token_type_ids.shape == (3, 12)
    for row, row_ids in enumerate(ids):
        assert input_ids[row].tolist() == row_ids + [0] * (12 - len(row_ids))
    assert not token_type_ids.any()
    tokenizer.pad_to_max_seq_len = True
    padded = tokenizer(texts)[0]
    assert padded.shape == (3, 16)
    np.testing.assert_array_equal(padded[:, :12], input_ids)
    assert not padded[:, 12:].any()


def test_padding_takes_the_vocabulary_s_pad_id() -> None:
    tokenizer = TextTokenizer(["a", CLS, SEP, UNK, PAD], 8)
    assert tokenizer.pad_id == 4
    assert tokenizer(["a", "a a"])[0].tolist() == [[1, 0, 2, 4], [1, 0, 0, 2]]


@pytest.mark.parametrize(
    "config", [None, {"do_lower_case": False, "model_max_length": 513, "名": "值"}, {"split_symbols": False}]
)
def test_save_and_load_round_trip(tmp_path: Path, vocabulary: list[str], config: dict | None) -> None:
    tokenizer = TextTokenizer(vocabulary, 32, config)
    tokenizer.save(tmp_path)
    loaded = TextTokenizer.load(tmp_path, 32)
    assert loaded.tokenize(VARIED_TEXTS) == tokenizer.tokenize(VARIED_TEXTS)
    assert loaded.vocabulary_size == len(vocabulary)
    assert read_vocabulary(tmp_path / "vocab.txt") == vocabulary
    assert read_json(tmp_path / "tokenizer_config.json") == (config or {"do_lower_case": True})


def test_a_folder_without_tokenizer_config_means_lower_case(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "vocab.txt", [*SPECIAL_TOKENS, "a", "A"])
    assert TextTokenizer.load(tmp_path, 8).tokenize(["A"]) == [[1, 5, 2]]
    write_json(tmp_path / "tokenizer_config.json", {"do_lower_case": False})
    assert TextTokenizer.load(tmp_path, 8).tokenize(["A"]) == [[1, 6, 2]]


@pytest.mark.parametrize(("value", "ids"), [(None, [1, 6, 2]), (0, [1, 6, 2]), (1, [1, 5, 2])])
def test_do_lower_case_need_not_be_a_bool(tmp_path: Path, value: object, ids: list[int]) -> None:
    """PaddleNLP takes anything for true or false as Python does."""
    write_vocabulary(tmp_path / "vocab.txt", [*SPECIAL_TOKENS, "a", "A"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": value}), encoding="utf-8")
    assert TextTokenizer.load(tmp_path, 8).tokenize(["A"]) == [ids]


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\t0\n", "\t0\r\n"])
@pytest.mark.parametrize("final", [True, False])
def test_vocabulary_with_repeated_lines_second_column_and_crlf(
    tmp_path: Path, ernie_tokenizers: dict[bool, Callable], separator: str, final: bool
) -> None:
    """Every line has an id; a repeated token has that of its last line, as in PaddleNLP."""
    tokens = [*SPECIAL_TOKENS, "习", "学", "习", "深"]
    write_vocabulary(tmp_path / "clean.txt", tokens)
    expected = type(ernie_tokenizers[True])(str(tmp_path / "clean.txt"))("深学习")["input_ids"]
    written(tmp_path, (separator.join(tokens) + separator * final).encode(), "vocab.txt")
    tokenizer = TextTokenizer.load(tmp_path, 8)
    assert (tokenizer.vocabulary_size, tokenizer.tokenize(["深学习"])) == (9, [expected])
    tokenizer.save(tmp_path)
    saved = TextTokenizer.load(tmp_path, 8)
    assert (saved.vocabulary_size, saved.tokenize(["深学习"])) == (9, [expected])


@pytest.mark.parametrize(("model_type", "expected"), [("ernie", 514), ("bert", 514), ("roberta", 512)])
def test_a_backbone_s_longest_text(model_type: str, expected: int) -> None:
    """RoBERTa's first positions stay unused."""
    config = {"model_type": model_type, "max_position_embeddings": 514, "pad_token_id": 1}
    assert max_position_tokens(config) == expected


@pytest.mark.parametrize("missing", [PAD, CLS, SEP, UNK])
def test_a_vocabulary_without_a_special_token_is_an_input_error(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "vocab.txt"
    write_vocabulary(path, [token for token in SPECIAL_TOKENS if token != missing])
    with pytest.raises(InputError, match=f"{path}: .*{re.escape(missing)}"):
        TextTokenizer.load(tmp_path, 8)


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"\x80\x04}."])
def test_a_file_that_isn_t_a_vocabulary_is_an_input_error(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(InputError, match=r"isn't a vocabulary|isn't UTF-8"):
        read_vocabulary(written(tmp_path, raw))


def test_a_folder_without_a_vocabulary_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocab\.txt: no such file"):
        TextTokenizer.load(tmp_path, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


class FakeEmbed:
    """A vector of sums that depends on the real tokens and their places but not on padding; keeps the batch shapes."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.lengths: list[np.ndarray] = []  # real tokens of each text, a batch at a time
        self.tokens = 0

    def __call__(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        assert not token_type_ids.any()
        self.shapes.append(input_ids.shape)
        self.lengths.append((input_ids != 0).sum(1))
        self.tokens += int(self.lengths[-1].sum())
        places = np.arange(1, input_ids.shape[1] + 1)
        sums = [input_ids.sum(1), (input_ids * places).sum(1), (input_ids != 0).sum(1)]
        return np.stack(sums, axis=1).astype(np.float32)


@pytest.mark.parametrize("window", [1, 16, 50, 100, 16384])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_encode_texts_equals_one_text_at_a_time(monkeypatch: pytest.MonkeyPatch, window: int, batch_size: int) -> None:
    monkeypatch.setattr(data, "SORTING_WINDOW", window)
    texts, tokenizer, embed = random_texts(100), small_tokenizer(64), FakeEmbed()
    twin = np.concatenate([embed(*tokenizer([text])) for text in texts])
    vectors = encode_texts(FakeEmbed(), texts, tokenizer, batch_size)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, twin)
    assert len(np.unique(twin, axis=0)) > 95  # so that a wrong order shows


@pytest.mark.parametrize(("count", "padded", "batches"), [(200, 1.15, 3.0), (1000, 1.07, 1.6), (5000, 1.02, 1.2)])
def test_encode_texts_batches_hold_little_padding(count: int, padded: float, batches: float) -> None:
    """Batches of few texts are smaller for it; those of many texts are full."""
    texts, tokenizer = random_texts(count), small_tokenizer(64)
    embed, unsorted = FakeEmbed(), FakeEmbed()
    encode_texts(embed, texts, tokenizer, 32)
    for start in range(0, len(texts), 32):
        unsorted(*tokenizer(texts[start : start + 32]))
    ratio, unsorted_ratio = (
        sum(rows * length for rows, length in fake.shapes) / fake.tokens for fake in (embed, unsorted)
    )
    assert ratio < padded < 1.5 < unsorted_ratio
    assert all(rows * length <= 32 * 64 for rows, length in embed.shapes)
    assert len(embed.shapes) < batches * embed.tokens / (32 * 64) + 1
    for batch, following in pairwise(embed.lengths):
        joined = [*batch, following[0]]
        padded_tokens = len(joined) * max(joined)
        assert padded_tokens > 32 * 64 or padded_tokens - sum(joined) > data.PADDING_TOKENS


def test_encode_texts_without_texts() -> None:
    assert encode_texts(FakeEmbed(), [], small_tokenizer(), 8).shape == (0, 0)


def test_encode_texts_reports_every_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logs, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar(20, "corpus", "text") as progress:
        encode_texts(FakeEmbed(), random_texts(20), small_tokenizer(64), 8, progress=progress)
    error = capsys.readouterr().err
    assert "corpus" in error
    assert "20/20" in error
