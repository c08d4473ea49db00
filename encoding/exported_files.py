"""Finds exported models and checks their files. Imports no Paddle."""

from pathlib import Path

from common.errors import InputError
from common.files import read_json, resolve_interrupted_replace
from common.manifest import MANIFEST_FILE, check_manifest
from data import BACKBONE_CONFIG_FILE, max_position_tokens

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
    longest = max_position_tokens(read_json(folder / BACKBONE_CONFIG_FILE))
    if max_seq_length and max_seq_length > longest:
        limit = f"the position table of {folder} has {longest} rows"
        raise InputError(f"--max_seq_length {max_seq_length}: {limit}; use at most that many tokens")
    return folder
