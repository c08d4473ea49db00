"""The tokenizer of a model folder, from vocab.txt or a WordPiece tokenizer.json. Imports no Paddle."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers.models import WordPiece

from common.errors import InputError
from common.files import read_json
from common.texts import wordpiece_tokenizer
from data import (
    CLS,
    MASK,
    PAD,
    SEP,
    SPLIT_SYMBOLS,
    TOKENIZER_CONFIG_FILE,
    UNK,
    VOCABULARY_FILE,
    TextTokenizer,
    read_vocabulary,
)

TOKENIZER_FILE = "tokenizer.json"  # a tokenizer's vocabulary and settings in one, for a folder without vocab.txt
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"  # Hugging Face's and PaddleNLP's: token -> id
SPECIAL_TOKENS = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "unk_token": UNK, "mask_token": MASK}
OTHER_VOCABULARIES = {  # files of tokenizers that this project doesn't have
    "sentencepiece.bpe.model": "SentencePiece",
    "spiece.model": "SentencePiece",
    "tokenizer.model": "SentencePiece",
    "spm.model": "SentencePiece",
    "merges.txt": "BPE",
}
NEED_WORDPIECE = "need BERT's WordPiece tokenizer (vocab.txt)"  # the remedy for others
LONGEST_WORD = 100  # characters; TextTokenizer makes [UNK] of a longer word


def has_tokenizer(folder: str | Path) -> bool:
    """Whether there is a vocabulary in a form that may be read."""
    return any((Path(folder) / name).is_file() for name in (VOCABULARY_FILE, TOKENIZER_FILE))


def check_tokenizer(folder: str | Path) -> None:
    """Raises InputError if there is a vocabulary that can't be used."""
    if has_tokenizer(folder):
        _read_vocabulary(Path(folder))


def read_tokenizer(folder: str | Path, max_seq_length: int, *, is_pytorch: bool = False) -> TextTokenizer:
    """The tokenizer of a folder. Raises InputError if it has none, or another one than BERT's.

    is_pytorch: whether its model's weights are in PyTorch's form, so that texts are split as by Hugging Face's
    tokenizer unless the folder says otherwise.
    """
    vocabulary, config = _read_vocabulary(Path(folder)), read_tokenizer_config(Path(folder))
    if is_pytorch:
        config = {"do_lower_case": True, SPLIT_SYMBOLS: False, **config}
    return TextTokenizer(vocabulary, max_seq_length, config or None)


def _read_vocabulary(folder: Path) -> list[str]:
    """The tokens in the order of their ids. Raises InputError as `read_tokenizer` does."""
    if (folder / SPECIAL_TOKENS_FILE).is_file():
        _check_special_tokens(folder / SPECIAL_TOKENS_FILE)
    if (folder / VOCABULARY_FILE).is_file():
        return read_vocabulary(folder / VOCABULARY_FILE)
    if (folder / TOKENIZER_FILE).is_file():
        return _vocabulary_of(folder / TOKENIZER_FILE)
    kind = next((kind for name, kind in OTHER_VOCABULARIES.items() if (folder / name).is_file()), None)
    problem = f"its tokenizer is {kind}" if kind else f"has no {VOCABULARY_FILE} or {TOKENIZER_FILE}"
    raise InputError(f"{folder}: {problem}; {NEED_WORDPIECE}")


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, with what only tokenizer.json says. Raises InputError."""
    has_config = (folder / TOKENIZER_CONFIG_FILE).is_file()
    config = read_json(folder / TOKENIZER_CONFIG_FILE) if has_config else {}
    if not (folder / TOKENIZER_FILE).is_file():
        return config
    content = read_json(folder / TOKENIZER_FILE)
    said = {SPLIT_SYMBOLS: True} if content.get("pre_tokenizer") == _symbol_splitter() else {}
    normalizer = _object(content, "normalizer")
    if normalizer.get("type") == "BertNormalizer":
        same = {
            "do_lower_case": "lowercase",
            "strip_accents": "strip_accents",
            "tokenize_chinese_chars": "handle_chinese_chars",
        }
        said |= {name: normalizer[other] for name, other in same.items() if isinstance(normalizer.get(other), bool)}
    return {**said, **config}


@cache
def _symbol_splitter() -> dict[str, Any]:
    """The pre_tokenizer in tokenizer.json of a TextTokenizer that splits at symbols."""
    return json.loads(wordpiece_tokenizer(WordPiece(unk_token=UNK), do_lower_case=True).to_str())["pre_tokenizer"]


def _check_special_tokens(file: Path) -> None:
    """Raises InputError if [CLS] and the others have other names. file: special_tokens_map.json."""
    for name, token in read_json(file).items():
        content = token.get("content") if isinstance(token, dict) else token
        if name in SPECIAL_TOKENS and content not in (None, SPECIAL_TOKENS[name]):
            raise InputError(f"{file}: {name} is {content!r}, not {SPECIAL_TOKENS[name]}; {NEED_WORDPIECE}")


def _vocabulary_of(file: Path) -> list[str]:
    """The tokens of tokenizer.json in the order of their ids. Raises InputError if it isn't BERT's tokenizer."""
    content = read_json(file)
    model = _object(content, "model")
    _check_wordpiece(file, content, model)
    ids = dict(_object(model, "vocab"))
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            ids[str(token.get("content"))] = token.get("id")
    if not all(type(token_id) is int for token_id in ids.values()) or set(ids.values()) != set(range(len(ids))):
        raise InputError(f"{file}: the ids of its {len(ids)} tokens aren't 0 to {len(ids) - 1}; {NEED_WORDPIECE}")
    if torn := next((token for token in ids if set(token) & set("\n\r\t")), None):  # a checkpoint has a vocab.txt
        raise InputError(f"{file}: its token {torn!r} doesn't fit into a line; {NEED_WORDPIECE}")
    if lacking := {PAD, CLS, SEP, UNK}.difference(ids):
        raise InputError(f"{file}: lacks {min(lacking)}; {NEED_WORDPIECE}")
    return sorted(ids, key=lambda token: ids[token])


def _check_wordpiece(file: Path, content: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raises InputError if tokenizer.json isn't of BERT's tokenizer. model: the member of its content."""
    if (kind := model.get("type", "WordPiece" if "continuing_subword_prefix" in model else None)) != "WordPiece":
        name = {"Unigram": "SentencePiece (Unigram)"}.get(str(kind), kind)
        raise InputError(f"{file}: its tokenizer is {name}; {NEED_WORDPIECE}")
    wanted = {"continuing_subword_prefix": "##", "unk_token": UNK, "max_input_chars_per_word": LONGEST_WORD}
    for name, value in wanted.items():
        if model.get(name, value) != value:
            raise InputError(f"{file}: has {name} {model[name]!r}, not {value!r}; {NEED_WORDPIECE}")
    for name, kind in (("normalizer", "BertNormalizer"), ("pre_tokenizer", "BertPreTokenizer")):
        is_ours = name == "pre_tokenizer" and content.get(name) == _symbol_splitter()
        if (found := _object(content, name).get("type")) != kind and not is_ours:
            raise InputError(f"{file}: its {name} is {found}, not {kind}; {NEED_WORDPIECE}")


def _object(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A member that is an object; empty if there is none."""
    member = content.get(name)
    return member if isinstance(member, dict) else {}
