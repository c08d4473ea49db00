"""The backbone, an encoder of PaddleNLP: finding and building it, its pretrained weights and its tokenizer."""

import codecs
import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import paddle
from paddle import _C_ops, nn

from common.errors import InputError
from common.files import read_json, scratch_folder, write_json
from common.logs import log
from common.paddle_setup import defer_paddlenlp
from data import BACKBONE_CONFIG_FILE, TOKENIZER_CONFIG_FILE, VOCABULARY_FILE, TextTokenizer
from modeling.checkpoint_files import SAFETENSORS_FILE, TORCH_FILE, WEIGHTS_FILES, weights_in
from modeling.hub import model_folder
from modeling.hugging_face import FOLLOWS_EPSILON, NEED_ENCODER, check_config, check_layers
from modeling.tokenizer_files import ADDED_TOKENS_FILE, read_tokenizer, read_tokenizer_config

defer_paddlenlp()

import paddlenlp.data  # noqa: F401 - first, as in paddlenlp/__init__.py: it and transformers import each other
from paddlenlp.transformers import AutoConfig, AutoModel, PretrainedModel
from paddlenlp.transformers.auto.configuration import MODEL_NAMES_MAPPING
from paddlenlp.utils.log import logger as paddlenlp_logger

SMALLEST_NUMBERS = {"max_position_embeddings": 3, "vocab_size": 1, "pad_token_id": 0}  # least values in a config
CASED_SHARE = 0.1  # of words with capital letters: BERT's cased English vocabulary has a third, uncased ones have none


class Backbone(NamedTuple):
    """The class and config of an encoder."""

    source: str  # the name or folder that the user gave, for messages
    model_class: type[PretrainedModel]
    config: Any  # a PaddleNLP PretrainedConfig


def find_backbone(name_or_path: str | Path) -> Backbone:
    """The class and config of a folder or a name, see `modeling.hub`; may download the config. Raises InputError."""
    paddlenlp_logger.set_level("ERROR")
    folder = model_folder(name_or_path, tokenizer=False)
    if not (folder / BACKBONE_CONFIG_FILE).is_file():
        remedy = "give a model folder of PaddleNLP or Hugging Face, or a name"
        raise InputError(f"{folder}: has no {BACKBONE_CONFIG_FILE}; {remedy}")
    try:
        config = _config_of_folder(folder)
    except InputError:
        raise
    except Exception as error:  # PaddleNLP raises anything from KeyError to its own classes
        given_type = read_json(folder / BACKBONE_CONFIG_FILE).get("model_type")
        is_unknown = isinstance(given_type, str) and given_type not in MODEL_NAMES_MAPPING
        raise (_unknown_type(folder, given_type) if is_unknown else _unreadable(folder, error)) from None
    model_type = getattr(config, "model_type", None)
    try:
        config.architectures = [MODEL_NAMES_MAPPING[model_type] + "Model"]
        model_class = AutoModel._get_model_class_from_config(None, None, config)
    except (KeyError, AttributeError):  # AttributeError: PaddleNLP knows the type, but has no class of that name
        raise _unknown_type(name_or_path, model_type) from None
    for key, minimum in SMALLEST_NUMBERS.items():
        value = getattr(config, key, None)
        if not isinstance(value, int) or value < minimum:
            problem = f"has {key} {value!r}, which must be a whole number, {minimum} or more"
            raise InputError(f"{name_or_path}: the config of {model_class.__name__} {problem}")
    config.return_dict = False
    if model_type == "bert":  # PaddleNLP's BERT would return more than two things; most folders set use_cache
        config.use_cache = config.output_attentions = config.output_hidden_states = False
    return Backbone(str(name_or_path), model_class, config)


def _config_of_folder(folder: Path) -> Any:
    """PaddleNLP's config of a model folder."""
    content = read_json(folder / BACKBONE_CONFIG_FILE)
    check_config(folder, content)
    if (folder / BACKBONE_CONFIG_FILE).read_bytes().startswith(codecs.BOM_UTF8):  # PaddleNLP fails on it
        with scratch_folder() as copy:
            write_json(copy / BACKBONE_CONFIG_FILE, content)
            return AutoConfig.from_pretrained(str(copy))
    # The full path, because PaddleNLP takes a relative path like `ernie-1.0` for the name of its own model.
    return AutoConfig.from_pretrained(str(folder.resolve()))


def _unknown_type(source: str | Path, model_type: object) -> InputError:
    """The error for a config of a type that PaddleNLP doesn't have."""
    return InputError(f"{source}: PaddleNLP knows no model of type {model_type!r}; {NEED_ENCODER}")


def _unreadable(source: str | Path, error: Exception) -> InputError:
    """The error for a model folder that can't be loaded."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{source}: isn't a PaddleNLP model that can be read ({reason})")


def build_backbone(backbone: Backbone, *, draw: bool = True) -> PretrainedModel:
    """The encoder with random weights, in training mode; draw: False leaves them 0, to be replaced by loaded ones.

    Raises InputError if it can't be built, or has other inputs or outputs than ERNIE and BERT.
    """
    check_layers(backbone.source, backbone.config)
    try:
        with contextlib.nullcontext() if draw else _without_drawing():
            ptm = backbone.model_class(backbone.config)
    except Exception as error:
        raise _unreadable(backbone.source, error) from None
    name = f"{backbone.source}: {backbone.model_class.__name__}"
    if not {"input_ids", "token_type_ids"} <= set(inspect.signature(ptm.forward).parameters):
        raise InputError(f"{name} doesn't take input_ids and token_type_ids; {NEED_ENCODER}")
    if getattr(backbone.config, FOLLOWS_EPSILON, False):
        for layer in ptm.sublayers():
            if isinstance(layer, nn.LayerNorm):
                layer._epsilon = backbone.config.layer_norm_eps
    ptm.eval()
    ids = paddle.full([1, 3], 0 if backbone.config.pad_token_id else 1, "int64")  # any token but [PAD]
    with paddle.no_grad():
        try:
            shapes = [tuple(output.shape) for output in ptm(ids, paddle.zeros_like(ids))]
        except Exception:
            shapes = []
    if shapes != [(1, 3, backbone.config.hidden_size), (1, backbone.config.hidden_size)]:
        raise InputError(f"{name} doesn't return (sequence, pooled); {NEED_ENCODER}")
    ptm.train()
    return ptm


@contextlib.contextmanager
def _without_drawing() -> Iterator[None]:
    """Inside this block, what Paddle's layers draw is 0.

    Base ERNIE draws its 100 million weights twice, in Paddle's layers and in PaddleNLP's `init_weights`, which takes
    4 s. PaddleNLP's `no_init_weights` would also leave out what `init_weights` sets besides: epsilon of the layer norm.
    """
    drawing = {name: getattr(_C_ops, name) for name in ("gaussian", "truncated_gaussian_random", "uniform")}
    try:
        for name in drawing:
            setattr(_C_ops, name, lambda shape, *_, **__: paddle.zeros(shape))
        yield
    finally:
        for name, operator in drawing.items():
            setattr(_C_ops, name, operator)


def pretrained_weights(backbone: Backbone) -> Path:
    """The backbone's weights file, which may be downloaded if it has a name. Raises InputError if it is missing."""
    folder = model_folder(backbone.source, weights=True)
    if found := weights_in(folder):
        return found
    remedy = f"use --from_scratch {folder} to start from random weights"
    raise InputError(f"{folder}: has no {WEIGHTS_FILES[0]}, {SAFETENSORS_FILE} or {TORCH_FILE}; {remedy}")


def load_tokenizer(name_or_path: str | Path, max_seq_length: int, *, is_pytorch: bool = False) -> TextTokenizer:
    """The tokenizer of a folder, or of a name, which may be downloaded. is_pytorch: see `read_tokenizer`.

    Raises InputError.
    """
    folder = model_folder(name_or_path)
    tokenizer = read_tokenizer(folder, max_seq_length, is_pytorch=is_pytorch)
    _report_tokenizer_config(folder, tokenizer)
    return tokenizer


def _report_tokenizer_config(folder: Path, tokenizer: TextTokenizer) -> None:
    """Logs what the tokenizer's files say and TextTokenizer, which only has do_lower_case, doesn't do.

    Also a vocabulary that seems cased though texts become lower case, which is the default.
    """
    file = folder / TOKENIZER_CONFIG_FILE
    config = read_tokenizer_config(folder)
    lower = bool(config.get("do_lower_case", True))
    fixed = {"strip_accents": lower, "tokenize_chinese_chars": True, "do_basic_tokenize": True}
    if unused := [f"{name} {config[name]}" for name, value in fixed.items() if config.get(name) not in (None, value)]:
        log(f"{file}: {', '.join(unused)} can't be followed; the tokens differ from those of the model's own tokenizer")
    vocabulary = tokenizer.settings["vocabulary"]
    added_file = folder / ADDED_TOKENS_FILE
    if added := set(read_json(added_file) if added_file.is_file() else ()).difference(vocabulary):
        log(f"{added_file}: isn't used, so {len(added)} tokens are missing, such as {min(added)}")
    words = [word for word in vocabulary if not word.startswith("[")]
    cased = sum(word != word.lower() for word in words) / max(1, len(words))
    if "do_lower_case" not in config and cased > CASED_SHARE:
        problem = f"texts become lower case, but {cased:.0%} of {VOCABULARY_FILE} has capital letters"
        remedy = 'if the model is cased, write {"do_lower_case": false} into it'
        log(f"{file}: has no do_lower_case, so {problem}; {remedy}")
