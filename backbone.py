"""The pretrained encoders of PaddleNLP that the dual tower stands on."""

import contextlib
import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import paddle
from paddle import nn
from paddle.base import core
from paddlenlp.transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedModel
from paddlenlp.transformers.auto.configuration import MODEL_NAMES_MAPPING
from paddlenlp.utils.download import resolve_file_path
from paddlenlp.utils.log import logger as paddlenlp_logger

from data import BACKBONE_CONFIG_FILE, VOCABULARY_FILE, TextCollator
from files import read_json
from runtime import InputError

WEIGHTS_FILES = ("model.safetensors", "model_state.pdparams")  # the first is preferred: it holds nothing but weights
NUMBERS = {"max_position_embeddings": 3, "vocab_size": 1, "pad_token_id": 0}  # that a config must have, and the least
# On a component of the last layer's output, rounding has an effect of 1e-5, padding that isn't masked one of 0.002.
LARGEST_EFFECT_OF_PADDING = 1e-3


class Backbone(NamedTuple):
    """A backbone that isn't built yet."""

    source: str  # what the user called it, for messages
    model_class: type[PretrainedModel]
    config: Any  # a PaddleNLP PretrainedConfig


def find_backbone(name_or_path: str | Path) -> Backbone:
    """Finds the class and config of a folder, or of a name that PaddleNLP knows. Downloads at most a config."""
    paddlenlp_logger.set_level("ERROR")
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / BACKBONE_CONFIG_FILE).is_file():
        raise InputError(f"{folder}: has no {BACKBONE_CONFIG_FILE}; give a PaddleNLP model folder or a name")
    if folder.is_dir():
        read_json(folder / BACKBONE_CONFIG_FILE)
    try:
        # A folder's full path: PaddleNLP would take its own config for a folder that has one of its names.
        config = AutoConfig.from_pretrained(str(folder.resolve() if folder.is_dir() else name_or_path))
    except Exception as error:  # PaddleNLP raises anything from KeyError to its own classes
        raise (_unreadable(folder, error) if folder.exists() else _not_found(name_or_path)) from None
    model_type = getattr(config, "model_type", None)
    try:
        config.architectures = [MODEL_NAMES_MAPPING[model_type] + "Model"]
        model_class = AutoModel._get_model_class_from_config(None, None, config)
    except (KeyError, AttributeError):  # the second where PaddleNLP has a config of that type, but no such class
        raise InputError(f"{name_or_path}: PaddleNLP knows no model of type {model_type!r}") from None
    for key, least in NUMBERS.items():
        value = getattr(config, key, None)
        if not isinstance(value, int) or value < least:
            problem = f"has {key} {value!r}, which must be a whole number, {least} or more"
            raise InputError(f"{name_or_path}: the config of {model_class.__name__} {problem}")
    return Backbone(str(name_or_path), model_class, config)


def _unreadable(source: str | Path, error: Exception) -> InputError:
    """For a model that is there, but not in order."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{source}: isn't a PaddleNLP model that can be read ({reason})")


def _not_found(name: str | Path) -> InputError:
    """For a name that PaddleNLP can't download."""
    return InputError(
        f"{name}: is no folder here, and can't be downloaded; check the name and the network, or give a local folder"
    )


def build_backbone(backbone: Backbone) -> PretrainedModel:
    """The encoder with random weights. Raises InputError if it isn't one that this project can use."""
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
    """Within it a GPU multiplies in float32: its TF32, Paddle's default, rounds to a thousandth."""
    is_on = core.get_cublas_switch()
    core.set_cublas_switch(False)
    try:
        yield
    finally:
        core.set_cublas_switch(is_on)


class FirstTokenLayer(nn.TransformerEncoderLayer):
    """An encoder's last layer where nothing but the first token is used: the others are keys and values alone."""

    def forward(
        self,
        src: paddle.Tensor,
        src_mask: paddle.Tensor | None = None,
        cache: None = None,
        output_attentions: bool = False,
    ) -> paddle.Tensor:
        """[B, L, H] -> [B, 1, H]; src_mask: [B, 1, 1, L]. The other arguments are those of PaddleNLP's encoders."""
        first = src[:, :1]
        first = self.norm1(first + self.dropout1(self.self_attn(first, src, src, src_mask)))
        return self.norm2(first + self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(first))))))


def compute_first_token(ptm: PretrainedModel) -> None:
    """Has the last layer compute what the pooled output takes, the first token; other layouts than BERT's stay.

    The sequence that the encoder gives is then [B, 1, H]; parameters and their names stay.
    """
    layers = getattr(getattr(ptm, "encoder", None), "layers", None)
    if not layers:
        return
    last = layers[-1]
    is_bert = type(last) is nn.TransformerEncoderLayer and type(last.self_attn) is nn.MultiHeadAttention
    if is_bert and not last.normalize_before:
        last.__class__ = FirstTokenLayer


def pretrained_weights(backbone: Backbone) -> Path:
    """The weights file of a pretrained backbone: in its folder, or downloaded into PaddleNLP's cache."""
    folder = Path(backbone.source)
    if folder.is_dir():
        for name in WEIGHTS_FILES:
            if (folder / name).is_file():
                return folder / name
        raise InputError(
            f"{folder}: has no {WEIGHTS_FILES[-1]}; use --from_scratch {folder} to start from random weights"
        )
    url = backbone.model_class.pretrained_resource_files_map.get("model_state", {}).get(backbone.source)
    try:
        file = resolve_file_path(backbone.source, [url] if url else list(WEIGHTS_FILES))
    except Exception:
        file = None
    if file is None:
        raise _not_found(backbone.source)
    return Path(file)


def load_collator(name_or_path: str | Path, max_seq_length: int) -> TextCollator:
    """The collator of a folder with a vocabulary, or of a name that PaddleNLP knows."""
    if Path(name_or_path).is_dir():
        return TextCollator.load(name_or_path, max_seq_length)
    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoTokenizer.from_pretrained(str(name_or_path)).save_pretrained(folder)
        except Exception:
            raise _not_found(name_or_path) from None
        if not (Path(folder) / VOCABULARY_FILE).is_file():
            raise InputError(f"{name_or_path}: its tokenizer has no {VOCABULARY_FILE}; need a WordPiece tokenizer")
        return TextCollator.load(folder, max_seq_length)
