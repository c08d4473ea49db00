"""File formats, tokenizing, and `encode_texts`, the only way from texts to vectors. Imports no Paddle."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.processors import BertProcessing
from tqdm import tqdm

from common.columns import ColumnCheck
from common.errors import InputError
from common.files import atomic_write, open_for_reading, read_json, write_json
from common.lines import Line, read_lines
from common.logs import log
from common.texts import TextSet, has_visible_text, wordpiece_tokenizer

PAIR_COLUMNS = ("query", "title", "hard negative")
PADDING_TOKENS = 100  # maximum per batch; an additional batch costs as much as 20 (base ERNIE) to 400 (tiny) tokens
SORTING_WINDOW = 16384  # texts sorted by length at a time: enough for batches of even length, in little memory
BOM = "\ufeff"

BACKBONE_CONFIG_FILE = "config.json"  # this and the next three are files of a checkpoint or an exported model
MODEL_CONFIG_FILE = "semantic_index.json"
VOCABULARY_FILE = "vocab.txt"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SAMPLE_TEXTS = [  # the original's samples, for scripts that are given no text
    "国有企业引入非国有资本对创新绩效的影响——基于制造业国有上市公司的经验证据",
    "试论翻译过程中的文化差异与语言空缺翻译过程,文化差异,语言空缺,文化对比",
]
SPLIT_SYMBOLS = "split_symbols"  # this project's own entry of tokenizer_config.json
PAD, CLS, SEP, MASK, UNK = "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"

TokenIds = tuple[np.ndarray, np.ndarray]  # (input_ids, token_type_ids), int64 [B, L] each
Embed = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (input_ids, token_type_ids) -> float32 [B, D]


class TextPair(NamedTuple):
    """A query, a title that answers it, and hard negatives: texts that look relevant but aren't.

    teacher_scores: how well the title and each hard negative answer the query, by another model; () without one.
    """

    query: str
    title: str
    hard_negatives: tuple[str, ...] = ()
    teacher_scores: tuple[float, ...] = ()


class Hit(NamedTuple):
    """A line of a recall result: `document` was recalled for `query`; `score` is what the hits are sorted by."""

    query: str
    document: str
    score: float


def _strip(text: str) -> str:
    """Without white space and BOMs at both ends, where concatenated files have them; "" if nothing is visible."""
    text = text.strip()
    while text.startswith(BOM) or text.endswith(BOM):
        text = text.strip(BOM).strip()
    return text if has_visible_text(text) else ""


def parse_pair(text: str) -> TextPair:
    """`query<TAB>title[<TAB>hard negative]...`; empty hard negatives don't count. Raises ValueError with the reason."""
    fields = [_strip(field) for field in text.split("\t")]
    if not any(fields):
        raise ValueError("the line is empty")
    if len(fields) < 2:
        raise ValueError("1 column, where query<TAB>title[<TAB>hard negative]... has 2 or more")
    _check_filled(query=fields[0], title=fields[1])
    return TextPair(fields[0], fields[1], tuple(filter(None, fields[2:])))


def parse_scored_pair(text: str) -> TextPair:
    """A pair as in `parse_pair`, then a score for its title and each hard negative. Raises ValueError."""
    fields = [_strip(field) for field in text.split("\t")]
    scored, is_even = divmod(len(fields) - 1, 2)  # the title and the hard negatives
    if is_even or not scored:
        form = "query<TAB>title[<TAB>hard negative]...<TAB>score... has a score for the title and each hard negative"
        raise ValueError(f"{len(fields)} column(s), where {form}: 3, 5, 7, ... columns")
    query, title, *hard_negatives = fields[: 1 + scored]
    _check_filled(query=query, title=title)
    if not all(hard_negatives):
        raise ValueError("a hard negative is empty")
    scores = tuple(_number(field) for field in fields[1 + scored :])
    if not all(map(math.isfinite, scores)):
        raise ValueError("a score isn't a finite number")
    return TextPair(query, title, tuple(hard_negatives), scores)


def parse_labelled_pair(text: str) -> tuple[TextPair, bool]:
    """`query<TAB>title<TAB>label`; True for label 1, False for 0. Raises ValueError with the reason."""
    fields = [_strip(field) for field in text.split("\t")]
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} column(s), where query<TAB>title<TAB>label has 3")
    _check_filled(query=fields[0], title=fields[1])
    label = _number(fields[2])
    if label not in (0, 1):
        raise ValueError("the label is neither 0 nor 1")
    return TextPair(fields[0], fields[1]), label == 1


def _number(text: str) -> float:
    """The number that a text is, NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _check_filled(**fields: str) -> None:
    for name, text in fields.items():
        if not text:
            raise ValueError(f"the {name} is empty")


def parse_text(text: str) -> str:
    """A line that is one text. Raises ValueError with the reason."""
    if tabs := text.count("\t"):
        raise ValueError(f"{tabs + 1} columns, where a line holds one text")
    text = _strip(text)
    if not text:
        raise ValueError("the line is empty")
    return text


def parse_unsupervised(text: str) -> TextPair:
    """A line that is one text, as its own title. Raises ValueError with the reason."""
    text = parse_text(text)
    return TextPair(text, text)


def parse_hit(text: str) -> Hit:
    """`query<TAB>document<TAB>score`. Raises ValueError with the reason."""
    fields = text.split("\t")
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} column(s), where query<TAB>document<TAB>score has 3")
    query, document = _strip(fields[0]), _strip(fields[1])
    _check_filled(query=query, document=document)
    score = _number(fields[2])
    if not math.isfinite(score):
        raise ValueError("the third column isn't a finite number")
    return Hit(query, document, score)


def pair_lines(
    path: str | Path,
    *,
    skip_bad_lines: bool = False,
    label_column: bool = False,
    check_columns: bool = True,
    third_column: bool = True,
    teacher_scores: bool = False,
    unsupervised: bool = False,
) -> Iterator[Line[TextPair]]:
    """The lines of a file of pairs; with `label_column` without the lines with label 0, whose number is logged.

    check_columns: whether columns that don't hold texts are an error; third_column: whether the caller uses the hard
    negatives; teacher_scores: whether the texts are followed by scores; unsupervised: whether a line is one text, which
    is its own title. At most one of label_column, teacher_scores and unsupervised is true. Raises InputError as
    `read_lines` does.
    """
    has_texts = third_column and not (label_column or teacher_scores)
    check = ColumnCheck(PAIR_COLUMNS, optional=1, last_repeats=True, third_column=has_texts)
    if unsupervised:
        check = ColumnCheck(["text"])
    if not label_column:
        parse = parse_unsupervised if unsupervised else parse_scored_pair if teacher_scores else parse_pair
        yield from read_lines(path, parse, skip_bad_lines, check=check if check_columns else None)
        return
    kept = left_out = 0
    remedy = "correct them, or leave out --label_column if the file has no labels, or the lines with --skip_bad_lines"
    for line in read_lines(path, parse_labelled_pair, skip_bad_lines, remedy, check if check_columns else None):
        pair, label = line.row or (None, True)
        kept, left_out = kept + (pair is not None and label), left_out + (not label)
        if label:
            yield Line(line.number, line.offset, pair)
    if not kept:
        raise InputError(f"{path}: no line has label 1, so there are no pairs of similar texts")
    log(f"{path}: took {kept} pairs with label 1, left out {left_out} with label 0")


def read_text_pairs(
    path: str | Path,
    *,
    skip_bad_lines: bool = False,
    label_column: bool = False,
    check_columns: bool = True,
    teacher_scores: bool = False,
    unsupervised: bool = False,
) -> list[TextPair]:
    """The pairs of a training or evaluation file. Options and errors as for `pair_lines`."""
    lines = pair_lines(
        path,
        skip_bad_lines=skip_bad_lines,
        label_column=label_column,
        check_columns=check_columns,
        teacher_scores=teacher_scores,
        unsupervised=unsupervised,
    )
    return [line.row for line in lines if line.row is not None]


def read_texts(path: str | Path, *, skip_bad_lines: bool = False, check_columns: bool = True) -> list[str]:
    """The texts of a file, one per line. Options and errors as for `pair_lines`."""
    check = ColumnCheck(["text"]) if check_columns else None
    return [line.row for line in read_lines(path, parse_text, skip_bad_lines, check=check) if line.row is not None]


def read_hits(path: str | Path) -> dict[str, list[str]]:
    """Reads a recall result: query -> its documents, best first. Logs and raises what `read_scored_hits` does."""
    return ranking_by_query(read_scored_hits(path))


def read_scored_hits(path: str | Path) -> list[Hit]:
    """Reads a recall result: each query's hits, best first. Raises InputError as `read_lines` does.

    Logs how many queries have documents whose scores aren't in that order.
    """
    remedy = "write the recall result again with recall.py"
    hits = [line.row for line in read_lines(path, parse_hit, remedy=remedy) if line.row]
    scores: dict[str, float] = {}
    unsorted = set()
    for hit in hits:
        if hit.score > scores.get(hit.query, math.inf):
            unsorted.add(hit.query)
        scores[hit.query] = hit.score
    if unsorted:
        log(f"{path}: the scores of {len(unsorted)} queries go up; their documents count in the order of the lines")
    return hits


def ranking_by_query(hits: Iterable[Hit]) -> dict[str, list[str]]:
    """Query -> its documents, in the order of the hits."""
    documents: dict[str, list[str]] = {}
    for hit in hits:
        documents.setdefault(hit.query, []).append(hit.document)
    return documents


def positives_by_query(pairs: Iterable[TextPair]) -> dict[str, set[str]]:
    """Query -> all its titles; the queries are in the order of their first pairs.

    Queries, and titles of a query, with the same `text_key` are one, in the first spelling.
    """
    queries = TextSet()
    titles: dict[str, TextSet] = {}
    for pair in pairs:
        titles.setdefault(queries.setdefault(pair.query), TextSet()).add(pair.title)
    return {query: set(texts) for query, texts in titles.items()}


def write_hits(path: str | Path, hits: Iterable[Hit]) -> None:
    """Writes a recall result: lines `query<TAB>document<TAB>score`. Raises InputError if it can't be written."""
    with atomic_write(path) as file:
        file.writelines(f"{hit.query}\t{hit.document}\t{hit.score}\n" for hit in hits)


def write_vectors(path: str | Path, vectors: np.ndarray) -> None:
    """Writes an array to a .npy file. Raises InputError if it can't be written."""
    vectors = np.ascontiguousarray(vectors)
    with atomic_write(path, "wb") as file:
        # np.save reports no error if the disk is full and only the last 4 KB don't fit.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(vectors))
        file.write(vectors.data)


def read_vocabulary(path: str | Path) -> list[str]:
    """The tokens in the order of their ids. Raises InputError if the file isn't a vocabulary."""
    with open_for_reading(path) as file:
        try:
            lines = file.read().decode("utf-8-sig").rstrip("\r\n").split("\n")
        except UnicodeDecodeError:
            raise InputError(f"{path}: isn't UTF-8; convert it with iconv") from None
    # Some vocabularies that PaddleNLP lists have a second column, a frequency.
    vocabulary = [line.rstrip("\r").split("\t")[0] for line in lines]
    for token in (PAD, CLS, SEP, UNK):
        if token not in vocabulary:
            similar = next((line for line in vocabulary if line.strip().upper() == token), None)
            instead = "" if similar is None else f", but has {similar!r} in line {vocabulary.index(similar) + 1}"
            raise InputError(f"{path}: isn't a vocabulary, it lacks {token}{instead}")
    return vocabulary


def write_vocabulary(path: str | Path, vocabulary: Iterable[str]) -> None:
    """Writes one token per line. Raises InputError if the file can't be written."""
    with atomic_write(path) as file:
        file.writelines(f"{token}\n" for token in vocabulary)


def max_position_tokens(config: Mapping[str, Any]) -> int:
    """The number of tokens that a backbone's position table covers. config: the content of its config.json."""
    # RoBERTa numbers its positions from pad_token_id + 1 on.
    unused = config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0
    return config["max_position_embeddings"] - unused


def check_max_seq_length(max_seq_length: int | None, config: Mapping[str, Any], source: str | Path) -> int:
    """The `max_position_tokens` of a backbone's config. Raises InputError if max_seq_length is more; source: for it."""
    longest = max_position_tokens(config)
    if max_seq_length and max_seq_length > longest:
        limit = f"the position table of {source} has {longest} rows"
        raise InputError(f"--max_seq_length {max_seq_length}: {limit}; use at most that many tokens")
    return longest


class TextTokenizer:
    """Turns texts into padded token ids, in all scripts and services.

    vocabulary: tokens in the order of their ids; max_seq_length: tokens of a text, including [CLS] and [SEP], to which
    longer texts are cut; config: the content of tokenizer_config.json, of which only `do_lower_case` (it strips accents
    too) and `split_symbols` are used, see `wordpiece_tokenizer`; both are true by default. Set `pad_to_max_seq_len` to
    pad every batch to max_seq_length instead of its longest text, and `prefixes`, by role, to what `prefixed` puts
    before texts.
    """

    def __init__(self, vocabulary: Sequence[str], max_seq_length: int, config: Mapping[str, Any] | None = None) -> None:
        self._vocabulary, self._config = list(vocabulary), dict(config or {"do_lower_case": True})
        self.max_seq_length = max_seq_length
        self.prefixes: Mapping[str, str] = {}
        self.pad_to_max_seq_len = False
        id_of_token = {token: token_id for token_id, token in enumerate(self._vocabulary)}
        # A longer word becomes [UNK]; PaddleNLP has the same limit.
        model = WordPiece(id_of_token, unk_token=UNK, max_input_chars_per_word=100)
        self.lowercases = bool(self._config.get("do_lower_case", True))
        self.splits_symbols = bool(self._config.get(SPLIT_SYMBOLS, True))
        self._tokenizer = wordpiece_tokenizer(model, self.lowercases, self.splits_symbols)
        self._tokenizer.post_processor = BertProcessing((SEP, id_of_token[SEP]), (CLS, id_of_token[CLS]))
        self._tokenizer.enable_truncation(max_seq_length)
        self.pad_id = id_of_token[PAD]

    @classmethod
    def load(cls, folder: str | Path, max_seq_length: int) -> "TextTokenizer":
        """Reads `vocab.txt` and, if it exists, `tokenizer_config.json`. Raises InputError if they can't be used."""
        config_file = Path(folder) / TOKENIZER_CONFIG_FILE
        config = read_json(config_file) if config_file.exists() else None
        return cls(read_vocabulary(Path(folder) / VOCABULARY_FILE), max_seq_length, config)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load` and PaddleNLP's tokenizers read. Raises InputError if they can't be written."""
        write_vocabulary(Path(folder) / VOCABULARY_FILE, self._vocabulary)
        write_json(Path(folder) / TOKENIZER_CONFIG_FILE, self._config)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the token ids depend on."""
        settings = {"vocabulary": self._vocabulary, "config": self._config, "max_seq_length": self.max_seq_length}
        prefixes = {role: prefix for role, prefix in self.prefixes.items() if prefix}
        return {**settings, "prefixes": prefixes} if prefixes else settings  # earlier versions' fingerprints have none

    @property
    def vocabulary_size(self) -> int:
        """Number of lines of the vocabulary, which is one more than the largest token id."""
        return len(self._vocabulary)

    def prefixed(self, texts: Sequence[str], role: str | None) -> Sequence[str]:
        """The texts after the prefix of a role, one of ROLES; None is neither and has no prefix."""
        prefix = self.prefixes.get(role or "")
        return [prefix + text for text in texts] if prefix else texts

    def prefix_length(self, role: str | None) -> int:
        """The number of tokens of the prefix of a role."""
        return len(self._uncut_tokenizer.encode(self.prefixes.get(role or "", ""), add_special_tokens=False).ids)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, including [CLS] and [SEP], at most max_seq_length."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    @cached_property
    def _uncut_tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.no_truncation()
        return tokenizer

    def to_json(self) -> str:
        """The content of a tokenizer.json of Hugging Face that tokenizes in the same way, without cutting."""
        return self._uncut_tokenizer.to_str()

    def count(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of each uncut text, with [CLS] and [SEP], and how many of them are [UNK]; int64 [N] each."""
        token_ids = [encoding.ids for encoding in self._uncut_tokenizer.encode_batch_fast(list(texts))]
        unknown_id = self._uncut_tokenizer.token_to_id(UNK)
        return np.array([len(ids) for ids in token_ids]), np.array([ids.count(unknown_id) for ids in token_ids])

    def lengths(self, token_ids: Sequence[Sequence[int]]) -> list[int]:
        """The number of tokens of each text; with `pad_to_max_seq_len` always max_seq_length."""
        return [self.max_seq_length if self.pad_to_max_seq_len else len(text_ids) for text_ids in token_ids]

    def pad(self, token_ids: Sequence[Sequence[int]]) -> TokenIds:
        """(input_ids, token_type_ids), int64 [B, L], where L is the largest of `lengths`. All token types are 0."""
        input_ids = np.full((len(token_ids), max(self.lengths(token_ids))), self.pad_id, dtype=np.int64)
        for row, text_ids in enumerate(token_ids):
            input_ids[row, : len(text_ids)] = text_ids
        return input_ids, np.zeros_like(input_ids)

    def __call__(self, texts: Sequence[str]) -> TokenIds:
        """Tokenizes and pads a batch of texts."""
        return self.pad(self.tokenize(texts))


def encode_texts(
    embed: Embed, texts: Sequence[str], tokenizer: TextTokenizer, batch_size: int, progress: tqdm | None = None
) -> np.ndarray:
    """Vectors of the texts, float32 [N, D], in the order of the texts; [0, 0] for no texts.

    Texts are sorted by length, a window at a time. A batch has at most `batch_size * max_seq_length` tokens and, unless
    `pad_to_max_seq_len` is set, PADDING_TOKENS of padding. progress: a `progress_bar`, updated after every batch.
    """
    vectors = np.empty((0, 0), dtype=np.float32)
    for start in range(0, len(texts), SORTING_WINDOW):
        token_ids = tokenizer.tokenize(texts[start : start + SORTING_WINDOW])
        by_length = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
        for rows in _batches_of_tokens(by_length, tokenizer.lengths(token_ids), batch_size * tokenizer.max_seq_length):
            batch_vectors = embed(*tokenizer.pad([token_ids[row] for row in rows]))
            if not len(vectors):
                vectors = np.empty((len(texts), batch_vectors.shape[1]), dtype=np.float32)
            vectors[start + np.array(rows)] = batch_vectors
            if progress:
                progress.update(len(rows))
    return vectors


def _batches_of_tokens(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Cuts rows of increasing length into batches of at most max_tokens tokens and PADDING_TOKENS of padding."""
    batch: list[int] = []
    unpadded = 0
    for row in rows:
        padded = (len(batch) + 1) * lengths[row]
        if batch and (padded > max_tokens or padded - unpadded - lengths[row] > PADDING_TOKENS):
            yield batch
            batch, unpadded = [], 0
        batch.append(row)
        unpadded += lengths[row]
    if batch:
        yield batch
