"""Finds exported models and checks their files. Imports no Paddle."""

from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from common.files import read_json, resolve_interrupted_replace
from common.logs import log
from common.manifest import MANIFEST_FILE, check_manifest
from common.texts import ROLES
from data import BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE, TextTokenizer, check_max_seq_length

GRAPH_NAME = "inference.get_pooled_embedding"  # file name without suffix, as in the original
GRAPH_SUFFIXES = (".json", ".pdmodel")  # of Paddle 3, of Paddle 2
WEIGHTS_SUFFIX = ".pdiparams"
INPUT_NAMES = ("input_ids", "token_type_ids")
MODEL_CARD_FILE = "model_card.json"
EXPORT_AGAIN = "export the model again with export_model.py"


def graph_file(folder: Path) -> Path:
    """The graph's file in an exported folder. Raises InputError if it or its weights are missing."""
    candidates = [folder / (GRAPH_NAME + suffix) for suffix in GRAPH_SUFFIXES]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise InputError(f"{folder}: has no {GRAPH_NAME}{GRAPH_SUFFIXES[0]}; export the model with export_model.py")
    weights = folder / (GRAPH_NAME + WEIGHTS_SUFFIX)
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; {EXPORT_AGAIN}")
    return file


def find_exported(model_dir: str | Path) -> Path:
    """The folder of an exported model. Raises InputError if it isn't one; doesn't check what its files hold."""
    folder = resolve_interrupted_replace(model_dir)
    if not folder.is_dir():
        raise InputError(f"{model_dir}: no such model folder; export the model with export_model.py")
    graph_file(folder)
    if not (folder / MANIFEST_FILE).is_file():
        raise InputError(f"{folder}: has no {MANIFEST_FILE}, so it may be half a model; {EXPORT_AGAIN}")
    return folder


def check_exported(model_dir: str | Path, max_seq_length: int | None = None) -> Path:
    """The folder of an exported model. Raises InputError if a file has changed, or max_seq_length is too large."""
    folder = find_exported(model_dir)
    # A damaged graph or weights would end the process inside Paddle's C++.
    check_manifest(folder, remedy=EXPORT_AGAIN)
    check_max_seq_length(max_seq_length, read_json(folder / BACKBONE_CONFIG_FILE), folder)
    return folder


class ModelCard(NamedTuple):
    """What the service tells of an exported model."""

    fingerprint: str  # see `modeling.checkpoint.model_fingerprint`
    embedding_size: int
    max_seq_length: int


def read_card(model_dir: str | Path) -> ModelCard:
    """The card of an exported model. Raises InputError if it is missing or lacks something."""
    file = Path(model_dir) / MODEL_CARD_FILE
    content = read_json(file)
    values: list[Any] = [content.get(name) for name in ModelCard._fields]
    if [type(value) for value in values] != [str, int, int]:
        raise InputError(f"{file}: isn't a model card; {EXPORT_AGAIN}")
    return ModelCard(*values)


def exported_tokenizer(model_dir: str | Path, max_seq_length: int | None = None) -> TextTokenizer:
    """The tokenizer of an exported model, with its prefixes.

    max_seq_length: the tokens to which texts are cut, instead of the exported length, which is logged. Raises
    InputError if the folder's files can't be used.
    """
    file = Path(model_dir) / MODEL_CONFIG_FILE
    config = read_json(file)
    exported = config.get("max_seq_length")
    if not isinstance(exported, int):
        raise InputError(f"{file}: has no max_seq_length; {EXPORT_AGAIN}")
    if max_seq_length and max_seq_length != exported:
        log(f"--max_seq_length {max_seq_length}: {model_dir} was exported with {exported}")
    tokenizer = TextTokenizer.load(model_dir, max_seq_length or exported)
    tokenizer.prefixes = {role: config.get(f"{role}_prefix", "") for role in ROLES}  # earlier versions have none
    if not all(isinstance(prefix, str) for prefix in tokenizer.prefixes.values()):
        raise InputError(f"{file}: has a prefix that isn't a text; {EXPORT_AGAIN}")
    return tokenizer
