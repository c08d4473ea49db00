"""The documents of an index while they change, and finding them by their text."""

import io
import random
from pathlib import Path

import pytest

from common.errors import InputError
from common.texts import text_key
from helpers import VARIED_TEXTS, write_pairs
from retrieval.corpus import Corpus, SavedDocuments, parse_document, read_corpus
from retrieval.documents import DocumentFinder, Documents


def corpus_of(folder: Path, *texts: str) -> Corpus:
    return read_corpus(write_pairs(folder / "corpus.csv", [(text,) for text in texts]))


def saved_documents(folder: Path, documents: Documents) -> SavedDocuments:
    """Written as an index does."""
    (folder / "new").write_text("".join(text + "\n" for text in documents), encoding="utf-8", newline="\n")
    return SavedDocuments((folder / "new").rename(folder / "documents.txt"))


def test_documents_are_those_of_a_list(tmp_path: Path) -> None:
    """After random changes, by every way of reading, also after they were saved."""
    numbers = random.Random(0)
    twin = [f"文{row}" for row in range(20)]
    documents = Documents(corpus_of(tmp_path, *twin))
    for step in range(60):
        if numbers.random() < 0.5:
            new = [f"新{step} {row}" for row in range(numbers.randrange(4))]
            documents.extend(new)
            twin += new
        else:
            ids = numbers.sample(range(len(twin)), 3)
            documents.delete(ids)
            twin = ["" if row in ids else text for row, text in enumerate(twin)]
        start, end, stride = numbers.randrange(-30, 30), numbers.randrange(-30, 99), numbers.choice([-2, 1, 3])
        assert (len(documents), list(documents), documents[-2]) == (len(twin), twin, twin[-2])
        assert documents[start:end:stride] == twin[start:end:stride]
        saved = saved_documents(tmp_path, documents)
        assert (list(saved), Documents(saved).sha256) == (twin, documents.sha256)
        if step % 20 == 19:
            documents = Documents(saved)
    with pytest.raises(IndexError):
        documents[len(twin)]


def test_the_hash_is_that_of_a_corpus_without_the_deleted_documents(tmp_path: Path) -> None:
    documents = Documents(corpus_of(tmp_path, "甲", "乙"))
    assert documents.sha256 == corpus_of(tmp_path / "same", "甲", "乙").sha256
    documents.extend(["丙"])
    documents.delete([0])
    assert documents.sha256 == corpus_of(tmp_path / "left", "乙", "丙").sha256


def test_an_empty_line_is_bad_where_nothing_can_be_deleted(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "documents.txt", [("甲",), ("",), ("乙",)])
    assert list(SavedDocuments(path)) == ["甲", "", "乙"]
    with pytest.raises(InputError, match=r"documents\.txt:2: the line is empty"):
        Corpus(path)


@pytest.mark.parametrize("scanned_bytes", [1, 2, 7, 1 << 24])
@pytest.mark.parametrize("lines", ["", "甲", "甲\n", "\n\n", "甲\n\nbc\n丁", "a\r\n b \n"])
def test_saved_documents_are_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, scanned_bytes: int
) -> None:
    """As they were written, wherever the blocks end that are scanned for line ends."""
    monkeypatch.setattr("retrieval.corpus.SCANNED_BYTES", scanned_bytes)
    path = tmp_path / "documents.txt"
    path.write_text(lines, encoding="utf-8", newline="")
    assert list(SavedDocuments(path)) == [line.removesuffix("\n") for line in io.StringIO(lines, newline="\n")]


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_finder_finds_what_a_search_through_all_finds(tmp_path: Path, lowercase: bool) -> None:
    """Texts that differ in case, accents and punctuation, some of them deleted."""
    numbers = random.Random(1)
    texts = [text.strip() for text in VARIED_TEXTS if text_key(text)] + [
        "Wasser",
        "wasser",
        "WASSER!",
        "Wässer",
        "水 稻",
    ]
    variants = [*texts, *(text.upper() for text in texts), *(f" {text} " for text in texts), "", "anderes", "水稻"]
    documents = ["", *texts]  # the first was deleted before
    finder = DocumentFinder(documents, lowercase)
    for _ in range(200):
        if numbers.random() < 0.3:
            documents[numbers.randrange(len(documents))] = ""
        else:
            documents.append(numbers.choice(variants[:-3]).strip())
            finder.add(len(documents) - 1, documents[-1])
        text = numbers.choice(variants)
        key = text_key(text, lowercase)
        same = [row for row, document in enumerate(documents) if document and text_key(document, lowercase) == key]
        assert finder.find(text, documents) == (same[0] if same else None)


@pytest.mark.parametrize("text", [text for text in VARIED_TEXTS if text.strip()] + ["x" * (2**20 - 1)])
def test_a_document_is_read_again_as_it_was_parsed(tmp_path: Path, text: str) -> None:
    if not text_key(text):
        with pytest.raises(ValueError, match="the line is empty"):
            parse_document(text)
        return
    document = parse_document(text)
    (tmp_path / "documents.txt").write_bytes(f"文\n{document}\n文\n".encode())
    assert list(SavedDocuments(tmp_path / "documents.txt")) == ["文", document, "文"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the line is empty"),
        ("甲\n乙", "has more than one line"),
        ("甲\t乙", "2 columns, where a line holds one text"),
        ("甲\0乙", "holds a NUL character"),
        ("甲\ud800乙", r"isn't UTF-8 at byte 4: half of a surrogate pair"),
        ("x" * 2**20, r"longer than 1,048,576 bytes"),
    ],
)
def test_a_document_that_a_line_can_t_hold_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_document(text)
