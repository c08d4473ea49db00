"""The backbone: an encoder of PaddleNLP, its weights and its tokenizer."""

import contextlib
import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import paddle
from paddle.base import core

from common.errors import InputError
from common.files import read_json
from common.paddle_setup import defer_paddlenlp
from data import BACKBONE_CONFIG_FILE, VOCABULARY_FILE, TextTokenizer
from modeling.checkpoint_files import WEIGHTS_FILES

defer_paddlenlp()

import paddlenlp.data  # noqa: F401 - first, as in paddlenlp/__init__.py: it and transformers import each other
from paddlenlp.transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedModel
from paddlenlp.transformers.auto.configuration import MODEL_NAMES_MAPPING
from paddlenlp.utils.download import resolve_file_path
from paddlenlp.utils.log import logger as paddlenlp_logger

SMALLEST_NUMBERS = {"max_position_embeddings": 3, "vocab_size": 1, "pad_token_id": 0}  # required in a config
# Rounding changes a component of the last layer's output by 1e-5, padding that isn't masked by 0.002.
LARGEST_EFFECT_OF_PADDING = 1e-3


class Backbone(NamedTuple):
    """The class and config of an encoder."""

    source: str  # the name or folder that the user gave, for messages
    model_class: type[PretrainedModel]
    config: Any  # a PaddleNLP PretrainedConfig


def find_backbone(name_or_path: str | Path) -> Backbone:
    """The class and config for a folder or a name that PaddleNLP knows; may download a config. Raises InputError."""
    paddlenlp_logger.set_level("ERROR")
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / BACKBONE_CONFIG_FILE).is_file():
        raise InputError(f"{folder}: has no {BACKBONE_CONFIG_FILE}; give a PaddleNLP model folder or a name")
    if folder.is_dir():
        read_json(folder / BACKBONE_CONFIG_FILE)
    try:
        # The full path, because PaddleNLP uses its own config for a relative folder that has one of its names.
        config = AutoConfig.from_pretrained(str(folder.resolve() if folder.is_dir() else name_or_path))
    except Exception as error:  # PaddleNLP raises anything from KeyError to its own classes
        raise (_unreadable(folder, error) if folder.exists() else _not_found(name_or_path)) from None
    model_type = getattr(config, "model_type", None)
    try:
        config.architectures = [MODEL_NAMES_MAPPING[model_type] + "Model"]
        model_class = AutoModel._get_model_class_from_config(None, None, config)
    except (KeyError, AttributeError):  # AttributeError: PaddleNLP has a config of that type, but no such class
        raise InputError(f"{name_or_path}: PaddleNLP knows no model of type {model_type!r}") from None
    for key, least in SMALLEST_NUMBERS.items():
        value = getattr(config, key, None)
        if not isinstance(value, int) or value < least:
            problem = f"has {key} {value!r}, which must be a whole number, {least} or more"
            raise InputError(f"{name_or_path}: the config of {model_class.__name__} {problem}")
    return Backbone(str(name_or_path), model_class, config)


def _unreadable(source: str | Path, error: Exception) -> InputError:
    """The error for a model folder that can't be loaded."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{source}: isn't a PaddleNLP model that can be read ({reason})")


def _not_found(name: str | Path) -> InputError:
    """The error for a name that PaddleNLP can't download."""
    remedy = "check the name and the network, or give a local folder"
    return InputError(f"{name}: is no folder here, and can't be downloaded; {remedy}")


def build_backbone(backbone: Backbone) -> PretrainedModel:
    """The encoder with random weights. Raises InputError if this project can't use it."""
    try:
        ptm = backbone.model_class(backbone.config)
    except Exception as error:
        raise _unreadable(backbone.source, error) from None
    name = f"{backbone.source}: {backbone.model_class.__name__}"
    wanted = "need an encoder such as ERNIE or BERT"
    if not {"input_ids", "token_type_ids"} <= set(inspect.signature(ptm.forward).parameters):
        raise InputError(f"{name} doesn't take input_ids and token_type_ids; {wanted}")
    ptm.eval()
    config = backbone.config
    padded = paddle.full([1, 3], 0 if config.pad_token_id else 1, "int64")
    padded[0, 2] = config.pad_token_id
    with paddle.no_grad(), _without_tf32():
        try:
            alone, outputs = [list(ptm(ids, paddle.zeros_like(ids))) for ids in (padded[:, :2], padded)]
            shapes = [tuple(output.shape) for output in outputs]
        except Exception:
            shapes = []
    if shapes != [(1, 3, config.hidden_size), (1, config.hidden_size)]:
        raise InputError(f"{name} doesn't return (sequence, pooled); {wanted}")
    if not (alone[0] - outputs[0][:, :2]).abs().max() < LARGEST_EFFECT_OF_PADDING:
        raise InputError(f"{name} doesn't mask padding, so a text's vector would change with it; {wanted}")
    ptm.train()
    return ptm


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Inside this block a GPU multiplies in float32: TF32, Paddle's default, has a rounding error of a thousandth."""
    is_on = core.get_cublas_switch()
    core.set_cublas_switch(False)
    try:
        yield
    finally:
        core.set_cublas_switch(is_on)


def pretrained_weights(backbone: Backbone) -> Path:
    """The weights file of a pretrained backbone, in its folder or PaddleNLP's cache. Raises InputError if missing."""
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
    """The tokenizer of a folder with a vocabulary, or of a name that PaddleNLP knows. Raises InputError."""
    if Path(name_or_path).is_dir():
        return TextTokenizer.load(name_or_path, max_seq_length)
    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoTokenizer.from_pretrained(str(name_or_path)).save_pretrained(folder)
        except Exception:
            raise _not_found(name_or_path) from None
        if not (Path(folder) / VOCABULARY_FILE).is_file():
            raise InputError(f"{name_or_path}: its tokenizer has no {VOCABULARY_FILE}; need a WordPiece tokenizer")
        return TextTokenizer.load(folder, max_seq_length)
