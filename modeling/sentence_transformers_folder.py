"""Folders in the form of sentence-transformers: what their modules mean in our terms. Imports no Paddle."""

import re
from collections.abc import Mapping
from itertools import chain
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
# The folders of the modules after the encoder that this project writes.
POOLING_FOLDER, POOLER_FOLDER, REDUCTION_FOLDER, NORMALIZE_FOLDER = (
    "1_Pooling",
    "2_Pooler",
    "3_Reduction",
    "4_Normalize",
)
MODULE_FOLDERS = (POOLING_FOLDER, POOLER_FOLDER, REDUCTION_FOLDER, NORMALIZE_FOLDER)
IDENTITY = "torch.nn.modules.linear.Identity"
TANH = "torch.nn.modules.activation.Tanh"
PLAIN_LAYER = {"activation_function": IDENTITY, "bias": True, "use_residual": False}  # of Dense
POOLINGS = {"cls": "first_token", "mean": "mean"}  # their name -> ours
PROMPT_NAMES = (("query",), ("document", "passage", "corpus"))  # of queries, of documents; the first one counts
MODE_PREFIX = "pooling_mode_"  # of a mode's switch, in the files before version 6
MODE_NAMES = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}  # of these switches -> today's names


class SentenceTransformersFolder(NamedTuple):
    """How the modules of a folder turn tokens into a vector."""

    pooling: str  # see base_model.ModelConfig
    pooler: Path | None  # the folder of the pooler's weights, for the pooling "cls"
    dense: Path | None  # the folder of the linear reduction's weights
    output_emb_size: int  # of the reduction; 0 without one
    max_seq_length: int | None  # None: the folder doesn't tell
    query_prefix: str
    document_prefix: str
    other_prompts: Mapping[str, str]  # those of other roles that aren't empty, by their names


def is_sentence_transformers_folder(folder: Path) -> bool:
    """Whether a folder is in this form."""
    return (folder / MODULES_FILE).is_file()


def module_weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of the Dense modules with our names, those of pooler and linear reduction. Raises InputError."""
    if not is_sentence_transformers_folder(folder):
        return {}
    told = read_sentence_transformers_folder(folder)
    weights: dict[str, np.ndarray] = {}
    for dense, name in ((told.pooler, "ptm.pooler.dense"), (told.dense, "emb_reduce_linear")):
        if dense:
            weight, bias = _dense_weights(dense)
            weights |= {f"{name}.weight": weight.T, f"{name}.bias": bias}
    return weights


def _dense_weights(dense: Path) -> tuple[np.ndarray, np.ndarray]:
    """Weight [out, in] and bias [out] of a Dense module."""
    file = weights_in(dense)
    if file is None:
        raise InputError(f"{dense}: has no weights, though {MODULES_FILE} lists it")
    weights = read_weights(file)
    if not {"linear.weight", "linear.bias"} <= weights.keys():
        raise InputError(f"{file}: isn't the weights of a Dense module (linear.weight, linear.bias)")
    return weights["linear.weight"], weights["linear.bias"]


def report_prompts(folder: Path) -> None:
    """Logs the folder's prompts that are neither for queries nor for documents, if it has any."""
    if is_sentence_transformers_folder(folder) and (prompts := read_sentence_transformers_folder(folder).other_prompts):
        names = ", ".join(f"{name} {text!r}" for name, text in prompts.items())
        remedy = "to train with one of them, give it as --query_prefix or --document_prefix"
        log(f"{folder / PROMPTS_FILE}: prompts for other tasks aren't used ({names}); {remedy}")


def read_sentence_transformers_folder(folder: Path) -> SentenceTransformersFolder:
    """Reads the modules. Raises InputError for modules that can't be followed, with their names."""
    file = folder / MODULES_FILE
    modules = [(_kind(file, module), str(module.get("path", ""))) for module in read_json_list(file)]
    kinds = [kind for kind, _ in modules]
    if not re.fullmatch("Transformer,Pooling(,Dense){0,2}(,Normalize)?", ",".join(kinds)):
        expected = "Transformer, Pooling, Dense and Normalize, in this order,"
        raise InputError(f"{file}: has the modules {', '.join(kinds) or 'none'}; only {expected} can be used")
    if modules[0][1]:
        remedy = "move that folder's files up, beside modules.json"
        raise InputError(f"{file}: its Transformer is in the folder {modules[0][1]}; {remedy}")
    pooling = _pooling(folder / modules[1][1] / MODULE_CONFIG_FILE)
    layers = [folder / path for kind, path in modules if kind == "Dense"]
    # A layer with tanh of the first token's size is the pooler.
    pooler = layers.pop(0) if layers and pooling == POOLINGS["cls"] and _activation(layers[0]) == TANH else None
    if len(layers) > 1:
        raise InputError(f"{file}: has two Dense modules; only one can be used")
    size = _dense_size(layers[0] / MODULE_CONFIG_FILE) if layers else 0
    pooling, dense = "cls" if pooler else pooling, layers[0] if layers else None
    length = read_json(folder / LENGTH_FILE).get("max_seq_length") if (folder / LENGTH_FILE).is_file() else None
    query, document, others = _prompts(folder)
    if (query or document) and read_json(folder / modules[1][1] / MODULE_CONFIG_FILE).get("include_prompt") is False:
        raise InputError(f"{file}: its Pooling leaves prompts out (include_prompt false), which can't be followed")
    return SentenceTransformersFolder(pooling, pooler, dense, size, length, query, document, others)


def _prompts(folder: Path) -> tuple[str, str, dict[str, str]]:
    """The prompts of queries, of documents, and those of other tasks by their names."""
    file = folder / PROMPTS_FILE
    prompts = (read_json(file).get("prompts") if file.is_file() else None) or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise InputError(f"{file}: its prompts aren't texts by names")
    given = {name: text for name, text in prompts.items() if text}
    query, document = (next((given[name] for name in names if name in given), "") for names in PROMPT_NAMES)
    return query, document, {name: given[name] for name in given if name not in chain.from_iterable(PROMPT_NAMES)}


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


def _activation(dense: Path) -> str:
    return str(read_json(dense / MODULE_CONFIG_FILE).get("activation_function", IDENTITY))


def _dense_size(file: Path) -> int:
    config = read_json(file)
    other = {name: config[name] for name, value in PLAIN_LAYER.items() if config.get(name, value) != value}
    if other or not isinstance(config.get("out_features"), int):
        found = ", ".join(f"{name} {value}" for name, value in other.items()) or "no out_features"
        raise InputError(f"{file}: has {found}; only a layer with bias and without activation can be used")
    return int(config["out_features"])
