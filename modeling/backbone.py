"""The backbone, an encoder of PaddleNLP: finding and building it, its pretrained weights and its tokenizer."""

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import paddle
from paddle.base import core

from common.environment import can_be_written
from common.errors import InputError
from common.files import read_json, scratch_folder
from common.paddle_setup import defer_paddlenlp
from data import BACKBONE_CONFIG_FILE, VOCABULARY_FILE, TextTokenizer
from modeling.checkpoint_files import WEIGHTS_FILES

defer_paddlenlp()

import paddlenlp.data  # noqa: F401 - first, as in paddlenlp/__init__.py: it and transformers import each other
from paddlenlp.transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedModel
from paddlenlp.transformers.auto.configuration import MODEL_NAMES_MAPPING
from paddlenlp.utils.download import resolve_file_path
from paddlenlp.utils.env import MODEL_HOME
from paddlenlp.utils.log import logger as paddlenlp_logger

PROXY_VARIABLES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
SMALLEST_NUMBERS = {"max_position_embeddings": 3, "vocab_size": 1, "pad_token_id": 0}  # least values in a config
# On a component of the last layer's output: rounding changes it by 1e-5, padding that isn't masked by 0.002.
LARGEST_EFFECT_OF_PADDING = 1e-3


class Backbone(NamedTuple):
    """The class and config of an encoder."""

    source: str  # the name or folder that the user gave, for messages
    model_class: type[PretrainedModel]
    config: Any  # a PaddleNLP PretrainedConfig


def find_backbone(name_or_path: str | Path) -> Backbone:
    """The class and config of a folder or a name that PaddleNLP knows; may download the config. Raises InputError."""
    paddlenlp_logger.set_level("ERROR")
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / BACKBONE_CONFIG_FILE).is_file():
        raise InputError(f"{folder}: has no {BACKBONE_CONFIG_FILE}; give a PaddleNLP model folder or a name")
    if folder.is_dir():
        read_json(folder / BACKBONE_CONFIG_FILE)
    try:
        # The full path, because PaddleNLP takes a relative path like `ernie-1.0` for the name of its own model.
        config = AutoConfig.from_pretrained(str(folder.resolve() if folder.is_dir() else name_or_path))
    except Exception as error:  # PaddleNLP raises anything from KeyError to its own classes
        raise (_unreadable(folder, error) if folder.exists() else _not_found(name_or_path)) from None
    model_type = getattr(config, "model_type", None)
    try:
        config.architectures = [MODEL_NAMES_MAPPING[model_type] + "Model"]
        model_class = AutoModel._get_model_class_from_config(None, None, config)
    except (KeyError, AttributeError):  # AttributeError: PaddleNLP knows the type, but has no class of that name
        raise InputError(f"{name_or_path}: PaddleNLP knows no model of type {model_type!r}") from None
    for key, minimum in SMALLEST_NUMBERS.items():
        value = getattr(config, key, None)
        if not isinstance(value, int) or value < minimum:
            problem = f"has {key} {value!r}, which must be a whole number, {minimum} or more"
            raise InputError(f"{name_or_path}: the config of {model_class.__name__} {problem}")
    return Backbone(str(name_or_path), model_class, config)


def _unreadable(source: str | Path, error: Exception) -> InputError:
    """The error for a model folder that can't be loaded."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{source}: isn't a PaddleNLP model that can be read ({reason})")


def _not_found(name: str | Path) -> InputError:
    """The error for a name that is no folder, and that PaddleNLP doesn't know or can't download."""
    proxy = next((name for name in PROXY_VARIABLES if os.environ.get(name)), None)
    remedy = f"check the name and {f'the proxy ({proxy})' if proxy else 'the network'}, or give a local folder"
    if not can_be_written(Path(MODEL_HOME)):  # `writable_homes` also makes it a file
        remedy = "set PPNLP_HOME to a folder that can be written, for PaddleNLP's downloads, or give a local folder"
    return InputError(f"{name}: is no folder here, and can't be downloaded; {remedy}")


def build_backbone(backbone: Backbone) -> PretrainedModel:
    """The encoder with random weights, in training mode.

    Raises InputError if it can't be built, has other inputs or outputs than ERNIE and BERT, or doesn't mask padding.
    """
    try:
        ptm = backbone.model_class(backbone.config)
    except Exception as error:
        raise _unreadable(backbone.source, error) from None
    name = f"{backbone.source}: {backbone.model_class.__name__}"
    remedy = "need an encoder such as ERNIE or BERT"
    if not {"input_ids", "token_type_ids"} <= set(inspect.signature(ptm.forward).parameters):
        raise InputError(f"{name} doesn't take input_ids and token_type_ids; {remedy}")
    ptm.eval()
    config = backbone.config
    padded = paddle.full([1, 3], 0 if config.pad_token_id else 1, "int64")  # any token but [PAD]
    padded[0, 2] = config.pad_token_id
    with paddle.no_grad(), _without_tf32():
        try:
            short_outputs, outputs = [list(ptm(ids, paddle.zeros_like(ids))) for ids in (padded[:, :2], padded)]
            shapes = [tuple(output.shape) for output in outputs]
        except Exception:
            shapes = []
    if shapes != [(1, 3, config.hidden_size), (1, config.hidden_size)]:
        raise InputError(f"{name} doesn't return (sequence, pooled); {remedy}")
    if not (short_outputs[0] - outputs[0][:, :2]).abs().max() < LARGEST_EFFECT_OF_PADDING:  # NaN too
        raise InputError(f"{name} doesn't mask padding, so a text's vector would change with it; {remedy}")
    ptm.train()
    return ptm


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Inside this block a GPU multiplies in float32: Paddle's default, TF32, rounds to about a thousandth."""
    is_on = core.get_cublas_switch()
    core.set_cublas_switch(False)
    try:
        yield
    finally:
        core.set_cublas_switch(is_on)


def pretrained_weights(backbone: Backbone) -> Path:
    """The backbone's weights file, in its folder or downloaded into PaddleNLP's cache. Raises InputError if missing."""
    folder = Path(backbone.source)
    if folder.is_dir():
        for name in WEIGHTS_FILES:
            if (folder / name).is_file():
                return folder / name
        remedy = f"use --from_scratch {folder} to start from random weights"
        raise InputError(f"{folder}: has no {WEIGHTS_FILES[0]}; {remedy}")
    url = backbone.model_class.pretrained_resource_files_map.get("model_state", {}).get(backbone.source)
    try:
        file = resolve_file_path(backbone.source, [url] if url else list(WEIGHTS_FILES))
    except Exception:
        file = None
    if file is None:
        raise _not_found(backbone.source)
    return Path(file)


def load_tokenizer(name_or_path: str | Path, max_seq_length: int) -> TextTokenizer:
    """The tokenizer of a folder with a vocab.txt, or of a name, which PaddleNLP may download. Raises InputError."""
    if Path(name_or_path).is_dir():
        return TextTokenizer.load(name_or_path, max_seq_length)
    with scratch_folder() as folder:
        try:
            AutoTokenizer.from_pretrained(str(name_or_path)).save_pretrained(folder)
        except Exception:
            raise _not_found(name_or_path) from None
        if not (folder / VOCABULARY_FILE).is_file():
            raise InputError(f"{name_or_path}: its tokenizer has no {VOCABULARY_FILE}; need a WordPiece tokenizer")
        return TextTokenizer.load(folder, max_seq_length)
