"""Folders in the form of sentence-transformers: what their modules mean in our terms. Imports no Paddle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import InputError
from common.files import read_json, read_json_list
from common.logs import log
from modeling.checkpoint_files import weights_in
from modeling.weight_files import read_weights

MODULES_FILE = "modules.json"
LENGTH_FILE = "sentence_bert_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
MODULE_CONFIG_FILE = "config.json"  # in the folder of a module
IDENTITY = "torch.nn.modules.linear.Identity"
POOLINGS = {"cls": "first_token", "mean": "mean"}  # their name -> ours
MODE_PREFIX = "pooling_mode_"  # of a mode's switch, in the files before version 6
MODE_NAMES = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}  # of these switches -> today's names


class SentenceTransformersFolder(NamedTuple):
    """How the modules of a folder turn tokens into a vector."""

    pooling: str  # see base_model.ModelConfig
    dense: Path | None  # the folder of the linear reduction's weights
    output_emb_size: int  # of the reduction; 0 without one
    max_seq_length: int | None  # None: the folder doesn't tell
    prompts: Mapping[str, str]  # those that aren't empty, by their names


def is_sentence_transformers_folder(folder: Path) -> bool:
    """Whether a folder is in this form."""
    return (folder / MODULES_FILE).is_file()


def dense_weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of the Dense module with the names of our linear reduction; {} without one. Raises InputError."""
    dense = read_sentence_transformers_folder(folder).dense if is_sentence_transformers_folder(folder) else None
    if dense is None:
        return {}
    file = weights_in(dense)
    if file is None:
        raise InputError(f"{dense}: has no weights, though {MODULES_FILE} lists it")
    weights = read_weights(file)
    if not {"linear.weight", "linear.bias"} <= weights.keys():
        raise InputError(f"{file}: isn't the weights of a Dense module (linear.weight, linear.bias)")
    return {"emb_reduce_linear.weight": weights["linear.weight"].T, "emb_reduce_linear.bias": weights["linear.bias"]}


def report_prompts(folder: Path) -> None:
    """Logs that the folder's prompts aren't put before texts, if it has any."""
    if is_sentence_transformers_folder(folder) and (prompts := read_sentence_transformers_folder(folder).prompts):
        names = ", ".join(f"{name} {text!r}" for name, text in prompts.items())
        log(f"{folder / PROMPTS_FILE}: its prompts aren't put before texts ({names}); write them into your files")


def read_sentence_transformers_folder(folder: Path) -> SentenceTransformersFolder:
    """Reads the modules. Raises InputError for modules that can't be followed, with their names."""
    file = folder / MODULES_FILE
    modules = [(_kind(file, module), str(module.get("path", ""))) for module in read_json_list(file)]
    kinds = [kind for kind, _ in modules]
    if kinds not in ([*first, *last] for first in (_ENCODER, [*_ENCODER, "Dense"]) for last in ([], ["Normalize"])):
        expected = "Transformer, Pooling, at most one Dense, and Normalize"
        raise InputError(f"{file}: has the modules {', '.join(kinds) or 'none'}; only {expected} can be used")
    paths = dict(modules)
    if paths["Transformer"]:
        remedy = "move that folder's files up, beside modules.json"
        raise InputError(f"{file}: its Transformer is in the folder {paths['Transformer']}; {remedy}")
    pooling = _pooling(folder / paths["Pooling"] / MODULE_CONFIG_FILE)
    dense = folder / paths["Dense"] if "Dense" in paths else None
    size = _dense_size(dense / MODULE_CONFIG_FILE) if dense else 0
    length = read_json(folder / LENGTH_FILE).get("max_seq_length") if (folder / LENGTH_FILE).is_file() else None
    prompts = read_json(folder / PROMPTS_FILE).get("prompts") if (folder / PROMPTS_FILE).is_file() else None
    given = {name: text for name, text in (prompts or {}).items() if text}
    return SentenceTransformersFolder(pooling, dense, size, length, given)


_ENCODER = ["Transformer", "Pooling"]


def _kind(file: Path, module: Any) -> str:
    """The class's name in a module such as `sentence_transformers.models.Pooling`."""
    if not isinstance(module, dict) or not isinstance(module.get("type"), str):
        raise InputError(f"{file}: isn't a list of modules with their types")
    return module["type"].rpartition(".")[2]


def _pooling(file: Path) -> str:
    config = read_json(file)
    mode = config.get("pooling_mode")
    if mode is None:  # before version 6, a switch for each mode
        switches = [name for name, value in config.items() if value is True and name.startswith(MODE_PREFIX)]
        mode = [MODE_NAMES.get(name, name) for name in (switch.removeprefix(MODE_PREFIX) for switch in switches)]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise InputError(f"{file}: pools by {' and '.join(modes) or 'nothing'}; only cls or mean can be used")
    return POOLINGS[modes[0]]


def _dense_size(file: Path) -> int:
    config = read_json(file)
    activation, size = config.get("activation_function", IDENTITY), config.get("out_features")
    if activation != IDENTITY or not config.get("bias", True) or not isinstance(size, int):
        problem = f"its layer has the activation {activation} and bias {config.get('bias', True)}"
        raise InputError(f"{file}: {problem}; only a layer with bias and without activation can be used")
    return size
