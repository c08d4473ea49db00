"""The text files that stages exchange, and the one way from text to tokens, batches and vectors. Imports no Paddle."""

import argparse
import hashlib
import io
import math
import mmap
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import BertProcessing
from tokenizers.trainers import WordPieceTrainer

from files import atomic_write, open_for_reading, read_json, write_json
from runtime import InputError, Progress, at_least, log, progress_bar

MAX_LINE_BYTES = 1 << 20  # a longer line is a file without line ends, not a text
REPORTED_BAD_LINES = 10
PADDING_TOKENS = 100  # of a batch, at most: what another batch costs, 20 (base ERNIE) to 400 (2 layers x 32)
SORTING_WINDOW = 16384  # texts sorted by length at a time: long enough for even batches, small in memory
LENGTH_CHUNKS = 4  # of a batch: 30 tokens a text are padded to 36 (classical pairs); one chunk pads to 64, 8 to 33
LENGTH_WINDOW = 4  # batches that --group_by_length sorts together: pads to 32.6 tokens a text, 32 batches to 32.1
BOM = "\ufeff"
UTF8_BOM = BOM.encode()

BACKBONE_CONFIG_FILE = "config.json"  # of a checkpoint or an exported model, as are the next three
MODEL_CONFIG_FILE = "semantic_index.json"
VOCABULARY_FILE = "vocab.txt"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SAMPLE_TEXTS = [  # the document's, encoded where the user gives none
    "国有企业引入非国有资本对创新绩效的影响——基于制造业国有上市公司的经验证据",
    "试论翻译过程中的文化差异与语言空缺翻译过程,文化差异,语言空缺,文化对比",
]
PAD, CLS, SEP, MASK, UNK = "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"

Row = TypeVar("Row")
TokenIds = tuple[np.ndarray, np.ndarray]  # (input_ids, token_type_ids), int64 [B, L] each
Embed = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (input_ids, token_type_ids) -> float32 [B, D]


class TextPair(NamedTuple):
    """A query, a title that answers it and, where the file has a third column, one that doesn't."""

    query: str
    title: str
    hard_negative: str | None = None


class Hit(NamedTuple):
    """A line of a recall result: `document` was recalled for `query` with `score`, a cosine."""

    query: str
    document: str
    score: float


# ---------------------------------------------------------------------------------------------------------------------
# Options


def add_encoding_args(
    parser: argparse.ArgumentParser,
    batch_size: int = 32,
    *,
    batch: str = "texts of max_seq_length tokens, or more that are shorter",
    length: str = "the checkpoint's",
) -> None:
    """Options of every script that turns texts into vectors.

    batch: what `--batch_size` counts; length: what `--max_seq_length` is by default.
    """
    parser.add_argument("--batch_size", type=at_least(1), default=batch_size, help=f"in a batch: {batch}")
    parser.add_argument(
        "--max_seq_length",
        type=at_least(3),
        help=f"tokens a text, [CLS] and [SEP] included; longer texts are cut (default: {length})",
    )


def add_skip_bad_lines_arg(parser: argparse.ArgumentParser) -> None:
    """The switch for files with lines that can't be read."""
    parser.add_argument("--skip_bad_lines", action="store_true", help="leave bad lines out and say how many they were")


def text_argument(text: str) -> str:
    """An argparse type: a text of one character or more."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # Python marks bytes of an argument that it can't decode
        raise argparse.ArgumentTypeError("the text isn't UTF-8") from None
    return text


def add_evaluation_file_args(parser: argparse.ArgumentParser, *, train: bool = False, required: bool = False) -> None:
    """The files that an evaluation reads, and the recall result that it writes; training has defaults for them."""
    parser.add_argument(
        "--similar_text_pair_file",
        "--similar_text_pair",
        required=required,
        default="./recall/dev.csv" if train else None,
        help="pairs whose queries are searched and whose titles are the right answers",
    )
    parser.add_argument(
        "--corpus_file",
        required=required,
        default="./recall/corpus.csv" if train else None,
        help="documents to search, one a line",
    )
    parser.add_argument("--recall_result_dir", default="recall_result_dir", help="folder of the recall result")
    parser.add_argument(
        "--recall_result_file",
        default="recall_result_init.txt" if train else "recall_result.txt",
        help="name of the recall result in it",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Line(NamedTuple):
    """A line of a file as `read_lines` gives it; `row` is None for a bad line that was skipped."""

    number: int  # from 1
    offset: int  # of its first byte
    row: Any


def _strip(text: str) -> str:
    """The text without white space at its ends, and without the byte order marks that joined files have within."""
    text = text.strip()
    while text.startswith(BOM) or text.endswith(BOM):
        text = text.strip(BOM).strip()
    return text


def parse_pair(text: str) -> TextPair:
    """`query<TAB>title`, with an optional hard negative after a second tab. Raises ValueError with the reason."""
    fields = [_strip(field) for field in text.split("\t")]
    if not any(fields):
        raise ValueError("the line is empty")
    if len(fields) not in (2, 3):
        raise ValueError(f"{len(fields)} column(s), where query<TAB>title[<TAB>hard negative] has 2 or 3")
    if not fields[0] or not fields[1]:
        raise ValueError("the query is empty" if not fields[0] else "the title is empty")
    return TextPair(fields[0], fields[1], (fields[2] or None) if len(fields) == 3 else None)


def parse_text(text: str) -> str:
    """A line that is one text. Raises ValueError with the reason."""
    if "\t" in text:
        raise ValueError(f"{text.count(chr(9)) + 1} columns, where a line holds one text")
    text = _strip(text)
    if not text:
        raise ValueError("the line is empty")
    return text


def parse_hit(text: str) -> Hit:
    """`query<TAB>document<TAB>cosine`. Raises ValueError with the reason."""
    fields = text.split("\t")
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} column(s), where query<TAB>document<TAB>cosine has 3")
    query, document = _strip(fields[0]), _strip(fields[1])
    if not query or not document:
        raise ValueError("the query is empty" if not query else "the document is empty")
    try:
        score = float(fields[2])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError("the third column isn't a finite number")
    return Hit(query, document, score)


def read_lines(
    path: str | Path,
    parse: Callable[[str], Row],
    skip_bad_lines: bool = False,
    remedy: str = "correct them, or leave them out with --skip_bad_lines",
) -> Iterator[Line]:
    """Parses the lines of a UTF-8 file (with or without BOM, LF or CRLF) one after the other.

    Bad lines are collected to the end of the file. Then InputError names the first ten and counts all, or, with
    `skip_bad_lines`, each has come as a Line with row None and their number is logged. A file that is missing, can't
    be read or has no good line is an InputError too.
    """
    bad_lines: list[str] = []
    bad = good = 0
    with open_for_reading(path) as file:
        for number, offset, raw in _split_lines(file):
            try:
                row = parse(_decode(raw))
                good += 1
            except ValueError as error:
                row = None
                bad += 1
                if len(bad_lines) < REPORTED_BAD_LINES:
                    bad_lines.append(f"{path}:{number}: {error}")
            if row is not None or skip_bad_lines:
                yield Line(number, offset, row)
    if bad and not skip_bad_lines:
        raise InputError("\n".join([f"{path}: {bad} bad line(s); {remedy}. The first:", *bad_lines]))
    if not good:
        raise InputError(f"{path}: no line in it {'can be used' if bad else '(the file is empty)'}")
    if bad:
        log(f"{path}: left out {bad} bad line(s) of {bad + good}, the first: {bad_lines[0]}")


def _split_lines(file: io.BufferedReader) -> Iterator[tuple[int, int, bytes | None]]:
    """(line number, offset, bytes) of each line; None for the bytes of one that is too long."""
    offset = len(UTF8_BOM) if file.read(len(UTF8_BOM)) == UTF8_BOM else 0
    file.seek(offset)
    number = 0
    while raw := file.readline(MAX_LINE_BYTES):
        number += 1
        size = len(raw)
        if size == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while rest := file.readline(MAX_LINE_BYTES):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            raw = None
        yield number, offset, raw
        offset += size


def _decode(raw: bytes | None) -> str:
    if raw is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    if b"\0" in raw:
        raise ValueError("holds a NUL character (if the file is UTF-16, try iconv -f UTF-16 -t UTF-8)")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"isn't UTF-8 at byte {error.start + 1} (try iconv -f GB18030 -t UTF-8)") from None


def read_text_pairs(path: str | Path, *, skip_bad_lines: bool = False) -> list[TextPair]:
    """The pairs of a training, evaluation or prediction file. Raises InputError as `read_lines` does."""
    return [line.row for line in read_lines(path, parse_pair, skip_bad_lines) if line.row is not None]


def read_texts(path: str | Path, *, skip_bad_lines: bool = False) -> list[str]:
    """The texts of a file, one a line. Raises InputError as `read_lines` does."""
    return [line.row for line in read_lines(path, parse_text, skip_bad_lines) if line.row is not None]


class Corpus(Sequence[str]):
    """The documents of a file, one a line; a document's row number is its id. The file is mapped, not held in memory.

    sha256: of the documents, a line each, in hex: files that differ in BOM, line ends or skipped lines alone have the
    same. distinct: leaves out repeated lines, which `sha256` is of as well. Raises InputError as `read_lines` does, and
    on access when the file has been changed since.
    """

    def __init__(self, path: str | Path, *, skip_bad_lines: bool = False, distinct: bool = False) -> None:
        digest, hashes = hashlib.sha256(), array("q")
        self._path, self._file = path, open_for_reading(path)
        self._state = self._current_state()

        def good_lines() -> Iterator[int]:
            for line in read_lines(path, parse_text, skip_bad_lines):
                if line.row is not None:
                    digest.update(line.row.encode() + b"\n")
                    if distinct:
                        hashes.append(hash(line.row))
                    yield line.offset

        self._offsets = np.fromiter(good_lines(), dtype=np.int64)
        self.sha256 = digest.hexdigest()
        self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        repeated = self._repeated(np.frombuffer(hashes, np.int64))
        if repeated:
            log(f"{path}: left out {len(repeated)} line(s) of {len(self)} that repeat another one")
            self._offsets = np.delete(self._offsets, repeated)

    def _repeated(self, hashes: np.ndarray) -> list[int]:
        """The rows whose text is that of an earlier one, from the hash of each row, int64; texts are compared too."""
        in_order = np.sort(hashes)
        often = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
        seen: set[str] = set()
        rows = []
        for row in np.flatnonzero(np.isin(hashes, often)).tolist():
            text = self[row]
            if text in seen:
                rows.append(row)
            seen.add(text)
        return rows

    def _current_state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int | slice) -> Any:
        if self._current_state() != self._state:  # beyond the end of a file that was cut, reading kills the process
            raise InputError(f"{self._path}: was changed while it was in use; start again")
        if isinstance(row, slice):
            return [self._read(offset) for offset in self._offsets[row]]
        return self._read(self._offsets[row])

    def _read(self, offset: np.int64) -> str:
        start = int(offset)
        end = self._bytes.find(b"\n", start)
        return parse_text(self._bytes[start : len(self._bytes) if end < 0 else end].decode("utf-8"))


def read_corpus(path: str | Path, *, skip_bad_lines: bool = False) -> Corpus:
    """The distinct documents to search; says how many lines are repeated. Raises InputError as `read_lines` does."""
    return Corpus(path, skip_bad_lines=skip_bad_lines, distinct=True)


def read_hits(path: str | Path) -> dict[str, list[str]]:
    """A recall result as `documents_by_query`. Raises InputError as `read_lines` does."""
    remedy = "write the recall result again with recall.py"
    return documents_by_query(line.row for line in read_lines(path, parse_hit, remedy=remedy))


def documents_by_query(hits: Iterable[Hit]) -> dict[str, list[str]]:
    """query -> recalled documents, best first."""
    documents: dict[str, list[str]] = {}
    for hit in hits:
        documents.setdefault(hit.query, []).append(hit.document)
    return documents


def titles_by_query(pairs: Iterable[TextPair]) -> dict[str, set[str]]:
    """All titles that the pairs give each distinct query, in the order of the queries' first lines."""
    titles: dict[str, set[str]] = {}
    for pair in pairs:
        titles.setdefault(pair.query, set()).add(pair.title)
    return titles


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_hits(path: str | Path, hits: Iterable[Hit]) -> None:
    """Writes a recall result, `query<TAB>document<TAB>cosine` a line. Raises InputError if it can't be written."""
    with atomic_write(path) as file:
        file.writelines(f"{hit.query}\t{hit.document}\t{hit.score}\n" for hit in hits)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def read_vocabulary(path: str | Path) -> list[str]:
    """The tokens in the order of their ids. Raises InputError if a special token is missing."""
    with open_for_reading(path) as file:
        try:
            lines = file.read().decode("utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            raise InputError(f"{path}: isn't a vocabulary (not UTF-8)") from None
    # Some vocabularies that PaddleNLP lists have a second column, a frequency.
    vocabulary = [line.rstrip("\r").split("\t")[0] for line in lines]
    missing = [token for token in (PAD, CLS, SEP, UNK) if token not in vocabulary]
    if missing:
        raise InputError(f"{path}: isn't a vocabulary, it lacks {', '.join(missing)}")
    return vocabulary


def write_vocabulary(path: str | Path, vocabulary: Iterable[str]) -> None:
    """Writes a token a line. Raises InputError if it can't be written."""
    with atomic_write(path) as file:
        file.writelines(f"{token}\n" for token in vocabulary)


def _tokenizer(model: WordPiece, do_lower_case: bool) -> Tokenizer:
    """Tokenises as PaddleNLP's ErnieTokenizer and BertTokenizer do, without their special-token syntax in texts."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=do_lower_case, lowercase=do_lower_case
    )
    # BERT splits at punctuation alone; PaddleNLP splits at symbols and the few characters of its `_is_symbol` as well.
    symbols = Split(Regex(r"[\p{S}\x{AD}\x{B2}\x{B5}\x{BA}\x{D8}\x{14B}\x{1B1}\x{3007}]"), "isolated")
    tokenizer.pre_tokenizer = PreTokenizers([BertPreTokenizer(), symbols])
    return tokenizer


def build_vocabulary(texts: Iterable[str], size: int = 30000) -> list[str]:
    """A WordPiece vocabulary for a model from scratch: special tokens, all characters, then frequent word pieces.

    size: bounds the pieces beyond the characters. The same texts give the same vocabulary.
    """
    texts = list(texts)

    def train(first_tokens: list[str], size: int) -> list[str]:
        tokenizer = _tokenizer(WordPiece(unk_token=UNK), do_lower_case=True)
        trainer = WordPieceTrainer(vocab_size=size, special_tokens=first_tokens, min_frequency=2, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        vocabulary = tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    special_tokens = [PAD, CLS, SEP, MASK, UNK]  # [PAD] first: ERNIE's pad_token_id is 0
    # The trainer numbers the characters within words (##x) in the order of a hash table that differs in each process,
    # and breaks ties by these numbers; given as first tokens they keep their order.
    inner_characters = [token for token in train(special_tokens, 0) if token.startswith("##") and len(token) == 3]
    return train(special_tokens + sorted(inner_characters), size)


def longest_text(config: Mapping[str, Any]) -> int:
    """Tokens that a backbone's position table has rows for; config: the content of its config.json."""
    # RoBERTa numbers its positions from pad_token_id + 1 on.
    unused = config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0
    return config["max_position_embeddings"] - unused


class TextCollator:
    """From texts to padded token ids: the one tokenising and padding of training, recall, prediction and deployment.

    vocabulary: tokens in the order of their ids; max_seq_length: tokens of a text with [CLS] and [SEP];
    config: the content of tokenizer_config.json, of which `do_lower_case` (strips accents too) matters here.
    pad_to_max_seq_len: set it to pad every batch to max_seq_length instead of its longest text.
    """

    def __init__(self, vocabulary: Sequence[str], max_seq_length: int, config: Mapping[str, Any] | None = None) -> None:
        self._vocabulary, self._config = list(vocabulary), dict(config or {"do_lower_case": True})
        self.max_seq_length = max_seq_length
        self.pad_to_max_seq_len = False
        ids = {token: row for row, token in enumerate(self._vocabulary)}
        # 100 is PaddleNLP's limit as well: a longer word is unknown.
        model = WordPiece(ids, unk_token=UNK, max_input_chars_per_word=100)
        self._tokenizer = _tokenizer(model, bool(self._config.get("do_lower_case", True)))
        self._tokenizer.post_processor = BertProcessing((SEP, ids[SEP]), (CLS, ids[CLS]))
        self._tokenizer.enable_truncation(max_seq_length)
        self.pad_id = ids[PAD]

    @classmethod
    def load(cls, folder: str | Path, max_seq_length: int) -> "TextCollator":
        """Reads `vocab.txt` and, if there is one, `tokenizer_config.json`. Raises InputError."""
        config_file = Path(folder) / TOKENIZER_CONFIG_FILE
        config = read_json(config_file) if config_file.exists() else None
        return cls(read_vocabulary(Path(folder) / VOCABULARY_FILE), max_seq_length, config)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load` and PaddleNLP's tokenizers read. Raises InputError if they can't be written."""
        write_vocabulary(Path(folder) / VOCABULARY_FILE, self._vocabulary)
        write_json(Path(folder) / TOKENIZER_CONFIG_FILE, self._config)

    @property
    def settings(self) -> dict[str, Any]:
        """All that its token ids depend on."""
        return {"vocabulary": self._vocabulary, "config": self._config, "max_seq_length": self.max_seq_length}

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return len(self._vocabulary)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with [CLS] and [SEP], at most max_seq_length of them."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def lengths(self, ids: Sequence[Sequence[int]]) -> list[int]:
        """Tokens that each text takes at least in a padded batch."""
        return [self.max_seq_length if self.pad_to_max_seq_len else len(text_ids) for text_ids in ids]

    def pad(self, ids: Sequence[Sequence[int]]) -> TokenIds:
        """(input_ids, token_type_ids), int64 [B, longest]; the second is all zeros, a text being one segment."""
        length = max(self.lengths(ids))
        input_ids = np.full((len(ids), length), self.pad_id, dtype=np.int64)
        for row, row_ids in enumerate(ids):
            input_ids[row, : len(row_ids)] = row_ids
        return input_ids, np.zeros_like(input_ids)

    def __call__(self, texts: Sequence[str]) -> TokenIds:
        """Tokenises and pads texts in their order."""
        return self.pad(self.tokenize(texts))


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


def encode_texts(
    embed: Embed,
    texts: Sequence[str],
    collator: TextCollator,
    batch_size: int,
    progress: Progress | None = None,
) -> np.ndarray:
    """Vectors of the texts, float32 [N, D], in their order; [0, 0] of no texts.

    Texts are sorted by length in windows, so that batches hold little padding; a batch has `batch_size` texts of
    max_seq_length tokens, or more that are shorter, and ends before its padding exceeds PADDING_TOKENS. progress: is
    told of every batch.
    """
    out = np.empty((0, 0), dtype=np.float32)
    for start in range(0, len(texts), SORTING_WINDOW):
        ids = collator.tokenize(texts[start : start + SORTING_WINDOW])
        by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for rows in _batches_of_tokens(by_length, collator.lengths(ids), batch_size * collator.max_seq_length):
            vectors = embed(*collator.pad([ids[row] for row in rows]))
            if not len(out):
                out = np.empty((len(texts), vectors.shape[1]), dtype=np.float32)
            out[start + np.array(rows)] = vectors
            if progress:
                progress.update(len(rows))
    return out


def _batches_of_tokens(rows: Sequence[int], lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Cuts rows of growing length into batches of at most `tokens` tokens and PADDING_TOKENS of padding, or one row."""
    batch: list[int] = []
    unpadded = 0
    for row in rows:
        padded = (len(batch) + 1) * lengths[row]
        if batch and (padded > tokens or padded - unpadded - lengths[row] > PADDING_TOKENS):
            yield batch
            batch, unpadded = [], 0
        batch.append(row)
        unpadded += lengths[row]
    if batch:
        yield batch


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Training batches


class PairBatch(NamedTuple):
    """What one process encodes for a batch, and what the batch is scored against.

    Its B pairs, of which H have a hard negative, are the texts queries, titles, hard negatives, in this order;
    T = 2 B + H. `sizes` has (B, H) of every rank whose titles are scored together, and `place` says which is ours.
    """

    chunks: list[TokenIds]  # our texts, longest first, a few at a time
    chunk_rows: np.ndarray  # int64 [T], where each text stands among the rows of the chunks
    sizes: list[tuple[int, int]]
    place: int
    mask: np.ndarray | None  # bool [all B, all B + all H], True where a text is no negative for the query


class PositivesMask:
    """Says which titles of a batch must not serve as negatives, from the texts of the whole training file.

    A title or hard negative is masked for a query if the file pairs that query, on any line, with an equal text.
    """

    def __init__(self, pairs: Sequence[TextPair]) -> None:
        text_ids: dict[str, int] = {}

        def ids(texts: Iterable[str | None]) -> np.ndarray:
            return np.array([-1 if text is None else text_ids.setdefault(text, len(text_ids)) for text in texts])

        self._queries = ids(pair.query for pair in pairs)
        self._titles = ids(pair.title for pair in pairs)
        self._hard_negatives = ids(pair.hard_negative for pair in pairs)
        # All (query, title) combinations of the file as one sorted array of numbers, to look many up at once.
        self._texts = len(text_ids)
        self._positives = np.unique(self._queries * self._texts + self._titles)

    def __call__(self, query_rows: np.ndarray, title_rows: np.ndarray, hard_negative_rows: np.ndarray) -> np.ndarray:
        """bool [len(query_rows), len(title_rows) + len(hard_negative_rows)]; arguments are rows of the training file.

        A query's own title counts as masked here as well: the loss leaves the diagonal alone.
        """
        columns = np.concatenate([self._titles[title_rows], self._hard_negatives[hard_negative_rows]])
        combinations = self._queries[query_rows][:, None] * self._texts + columns[None, :]
        found = np.searchsorted(self._positives, combinations)
        return self._positives[np.minimum(found, len(self._positives) - 1)] == combinations


class PairCollator:
    """From rows of the training file to a PairBatch; tokenises all texts once, when it is made.

    chunk_texts: encode so many texts at a time; by default a batch is cut into LENGTH_CHUNKS parts of equal size.
    """

    def __init__(
        self,
        collator: TextCollator,
        pairs: Sequence[TextPair],
        *,
        mask_duplicates: bool = True,
        chunk_texts: int | None = None,
    ) -> None:
        self._collator, self._chunk_texts = collator, chunk_texts
        self._positives_mask = PositivesMask(pairs) if mask_duplicates else None
        self._has_hard_negative = np.array([pair.hard_negative is not None for pair in pairs])
        queries, titles, hard_negatives = zip(*pairs, strict=True)
        # The queries, the titles, and the hard negatives that there are.
        self._texts = TokenisedTexts(
            collator, [*queries, *titles, *(text for text in hard_negatives if text is not None)]
        )
        self._hard_negative_texts = 2 * len(pairs) + np.cumsum(self._has_hard_negative) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, int64 [N]: what encoding it costs."""
        count, lengths = len(self._has_hard_negative), self._texts.lengths
        total = lengths[:count] + lengths[count : 2 * count]
        total[self._has_hard_negative] += lengths[2 * count :]
        return total

    def __call__(self, rank_rows: Sequence[np.ndarray], place: int = 0) -> PairBatch:
        """The batch of `rank_rows[place]`, scored against the texts of all `rank_rows`: int64 [B] each, some empty."""
        hard_negative_rows = [rows[self._has_hard_negative[rows]] for rows in rank_rows]
        rows = rank_rows[place]
        titles = rows + len(self._has_hard_negative)
        hard_negatives = self._hard_negative_texts[hard_negative_rows[place]]
        ids = [self._texts[text] for text in np.concatenate([rows, titles, hard_negatives])]
        longest_first = np.argsort([-len(text_ids) for text_ids in ids], kind="stable")
        parts = -(-len(ids) // self._chunk_texts) if self._chunk_texts else LENGTH_CHUNKS
        chunks = [chunk for chunk in np.array_split(longest_first, max(1, parts)) if len(chunk)]
        all_rows = np.concatenate(rank_rows)
        return PairBatch(
            chunks=[self._collator.pad([ids[text] for text in chunk]) for chunk in chunks],
            chunk_rows=np.argsort(longest_first),
            sizes=[(len(pairs), len(hard)) for pairs, hard in zip(rank_rows, hard_negative_rows, strict=True)],
            place=place,
            mask=self._positives_mask(all_rows, all_rows, np.concatenate(hard_negative_rows))
            if self._positives_mask
            else None,
        )


class TokenisedTexts(Sequence[np.ndarray]):
    """The token ids of many texts, held as one array of the smallest fitting type."""

    def __init__(self, collator: TextCollator, texts: Sequence[str]) -> None:
        dtype = np.min_scalar_type(collator.vocabulary_size)
        tokens, lengths = [], []
        with progress_bar(len(texts), "tokenising", "text") as progress:
            for window in batched(texts, SORTING_WINDOW):
                ids = collator.tokenize(window)
                tokens.append(np.fromiter(chain.from_iterable(ids), dtype))
                lengths.append(np.array([len(text_ids) for text_ids in ids]))
                progress.update(len(window))
        self.lengths = np.concatenate(lengths)
        self._tokens = np.concatenate(tokens)
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: Any) -> np.ndarray:
        return self._tokens[self._ends[row] - self.lengths[row] : self._ends[row]]


def epoch_batches(
    count: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    world_size: int = 1,
    lengths: np.ndarray | None = None,
) -> list[list[np.ndarray]]:
    """Rows of every batch of an epoch for every rank: `[batch][rank]` is int64 [batch_size].

    The order depends on (seed, epoch) alone. The ranks take a batch's rows in turns, so that lengths are shared out
    evenly too. No row is dropped: where the last batch has fewer of them than ranks, some ranks have none. lengths:
    int64 [count]; with them, pairs of similar length come together: each LENGTH_WINDOW batches' rows are sorted, cut
    into batches and these shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(count)
    batch_rows = batch_size * world_size
    batches = [order[start : start + batch_rows] for start in range(0, count, batch_rows)]
    if lengths is not None:
        batches = [batch for window in batched(batches, LENGTH_WINDOW) for batch in _by_length(window, lengths, random)]
    return [[rows[rank::world_size] for rank in range(world_size)] for rows in batches]


def _by_length(batches: list[np.ndarray], lengths: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """The rows of `batches` sorted by length and cut into batches of the same sizes, in random order."""
    rows = np.concatenate(batches)
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    cuts = np.cumsum([len(batch) for batch in batches])[:-1]
    by_length = np.split(rows, cuts)
    return [by_length[place] for place in random.permutation(len(by_length))]
