"""The semantic indexing model, and the checkpoint folder that says everything about it."""

import argparse
import inspect
import random
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddlenlp.transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedModel
from paddlenlp.transformers.auto.configuration import MODEL_NAMES_MAPPING
from paddlenlp.utils.download import resolve_file_path
from paddlenlp.utils.log import logger as paddlenlp_logger

from data import VOCABULARY_FILE, TextCollator, atomic_folder, read_json, write_json
from runtime import InputError, at_least, log
from weights import read_weights

DEFAULT_MODEL = "ernie-1.0"
DEFAULT_EMBEDDING_SIZE = 256
DEFAULT_TRAIN_LENGTH = 512  # train_batch_neg.py's default, cut to the position table
DEFAULT_LENGTH = 64  # of a checkpoint that doesn't tell: the original's default in recall and predict
REPORTED_PARAMETERS = 3

WEIGHTS_FILE = "model_state.pdparams"
BACKBONE_CONFIG_FILE = "config.json"
MODEL_CONFIG_FILE = "semantic_index.json"


@dataclass(frozen=True)
class ModelConfig:
    """What turns a backbone into a semantic indexing model; a checkpoint's semantic_index.json holds it."""

    output_emb_size: int = DEFAULT_EMBEDDING_SIZE  # 0: the backbone's hidden size, without a reduction
    pooling: str = "cls"  # "cls": the backbone's pooled output; "mean": the mean of its last layer over real tokens
    dropout: float = 0.1  # after the reduction, in training
    max_seq_length: int = DEFAULT_LENGTH


class SemanticIndexBase(nn.Layer):
    """An encoder whose unit vectors lie close where texts mean the same.

    ptm: a PaddleNLP encoder that gives (sequence, pooled) from input_ids and token_type_ids.
    """

    def __init__(self, ptm: PretrainedModel, config: ModelConfig) -> None:
        super().__init__()
        self.ptm = ptm
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        if config.output_emb_size:
            initial = paddle.ParamAttr(initializer=nn.initializer.TruncatedNormal(std=0.02))  # as in the original
            self.emb_reduce_linear = nn.Linear(ptm.config.hidden_size, config.output_emb_size, weight_attr=initial)

    @property
    def embedding_size(self) -> int:
        """Length of a vector."""
        return self.config.output_emb_size or self.ptm.config.hidden_size

    def get_pooled_embedding(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        """Unit vectors, float32 [B, D], of int64 [B, L] token ids padded with the backbone's pad_token_id."""
        sequence, pooled = self.ptm(input_ids, token_type_ids)
        if self.config.pooling == "mean":
            real = (input_ids != self.ptm.config.pad_token_id).astype(sequence.dtype).unsqueeze(-1)
            pooled = (sequence * real).sum(axis=1) / real.sum(axis=1)
        if self.config.output_emb_size:
            pooled = self.emb_reduce_linear(pooled)
        return F.normalize(self.dropout(pooled), axis=-1)

    def cosine_sim(
        self,
        query_input_ids: paddle.Tensor,
        query_token_type_ids: paddle.Tensor,
        title_input_ids: paddle.Tensor,
        title_token_type_ids: paddle.Tensor,
    ) -> paddle.Tensor:
        """Cosine of each query with the title of the same row, float32 [B]."""
        query_emb = self.get_pooled_embedding(query_input_ids, query_token_type_ids)
        title_emb = self.get_pooled_embedding(title_input_ids, title_token_type_ids)
        return (query_emb * title_emb).sum(axis=-1)

    @paddle.no_grad()
    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """`get_pooled_embedding` on arrays, without dropout: what `data.encode_texts` calls."""
        training = self.training
        self.eval()
        vectors = self.get_pooled_embedding(paddle.to_tensor(input_ids), paddle.to_tensor(token_type_ids))
        if training:
            self.train()
        return vectors.astype("float32").numpy()


Model = TypeVar("Model", bound=SemanticIndexBase)


class LoadedModel(NamedTuple):
    """A model and the collator that makes its input."""

    model: Any  # of the class that was asked for
    collator: TextCollator


# ---------------------------------------------------------------------------------------------------------------------
# Options, device and seeds


def add_device_arg(parser: argparse.ArgumentParser, default: str | None) -> None:
    """`--device`; a default of None means a GPU where this Paddle has one."""
    help_text = "where to compute" if default else "where to compute (default: gpu if there is one, else cpu)"
    parser.add_argument("--device", choices=["cpu", "gpu"], default=default, help=help_text)


def add_checkpoint_args(parser: argparse.ArgumentParser, params_path: str | None = None) -> None:
    """Options of the scripts that use a trained model; without a default, `--params_path` is required."""
    parser.add_argument(
        "--params_path",
        required=params_path is None,
        default=params_path,
        help="checkpoint: its folder, or the .pdparams file in it",
    )
    parser.add_argument(
        "--output_emb_size", type=at_least(0), help="length of a vector; the checkpoint knows it, another is an error"
    )
    parser.add_argument(
        "--model_name_or_path",
        default=DEFAULT_MODEL,
        help="backbone of a checkpoint that has no config.json, such as the original scripts' ones",
    )


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Options of training that make the model."""
    parser.add_argument(
        "--model_name_or_path",
        default=DEFAULT_MODEL,
        help="pretrained PaddleNLP encoder: a name, or a folder with config, vocabulary and weights",
    )
    parser.add_argument(
        "--from_scratch", metavar="FOLDER", help="start from random weights; FOLDER has a config.json and a vocab.txt"
    )
    parser.add_argument("--init_from_ckpt", help="start from the weights of this checkpoint (folder or .pdparams)")
    parser.add_argument(
        "--output_emb_size",
        type=at_least(0),
        default=DEFAULT_EMBEDDING_SIZE,
        help="length of a vector; 0 keeps the backbone's hidden size, without a reduction",
    )
    parser.add_argument(
        "--pooling",
        choices=["cls", "mean"],
        default="cls",
        help="cls: the pooled output; mean: the mean over tokens, which learns faster from scratch",
    )
    parser.add_argument("--dropout", type=at_least(0.0, float, 1.0), default=0.1, help="dropout of the vector")


def set_device(device: str | None) -> None:
    """Computes on "cpu" or "gpu" (None: a GPU if there is one). Raises InputError if there is no GPU."""
    has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if device == "gpu" and not has_gpu:
        why = "no GPU is visible" if paddle.is_compiled_with_cuda() else "this Paddle is built for the CPU"
        raise InputError(f"--device gpu: {why}; use --device cpu, or set up with sh scripts/setup.sh --gpu")
    # Without a number, Paddle takes the GPU that the launcher gave this rank.
    paddle.set_device(device or ("gpu" if has_gpu else "cpu"))


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and Paddle."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    paddle.seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


class _Backbone(NamedTuple):
    """A backbone that isn't built yet."""

    source: str  # what the user called it, for messages
    model_class: type[PretrainedModel]
    config: Any  # a PaddleNLP PretrainedConfig


def _backbone(name_or_path: str | Path) -> _Backbone:
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
    if getattr(config, "model_type", None) not in MODEL_NAMES_MAPPING:
        raise InputError(f"{name_or_path}: PaddleNLP knows no model of type {getattr(config, 'model_type', None)!r}")
    config.architectures = [MODEL_NAMES_MAPPING[config.model_type] + "Model"]
    model_class = AutoModel._get_model_class_from_config(None, None, config)
    return _Backbone(str(name_or_path), model_class, config)


def _unreadable(source: str | Path, error: Exception) -> InputError:
    """For a model that is there, but not in order."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{source}: isn't a PaddleNLP model that can be read ({reason})")


def _not_found(name: str | Path) -> InputError:
    """For a name that PaddleNLP can't download."""
    return InputError(
        f"{name}: is no folder here, and can't be downloaded; check the name and the network, or give a local folder"
    )


def _build(backbone: _Backbone) -> PretrainedModel:
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
    ids = paddle.zeros([1, 3], dtype="int64") + (0 if backbone.config.pad_token_id else 1)
    with paddle.no_grad():
        try:
            shapes = [tuple(output.shape) for output in ptm(ids, paddle.zeros_like(ids))]
        except Exception:
            shapes = []
    hidden_size = backbone.config.hidden_size
    if shapes != [(1, 3, hidden_size), (1, hidden_size)]:
        raise InputError(f"{name} doesn't return (sequence, pooled); {wanted}")
    ptm.train()
    return ptm


def _pretrained_weights(backbone: _Backbone) -> Path:
    """The weights file of a pretrained backbone: in its folder, or downloaded into PaddleNLP's cache."""
    folder = Path(backbone.source)
    if folder.is_dir():
        for name in ("model.safetensors", WEIGHTS_FILE):
            if (folder / name).is_file():
                return folder / name
        raise InputError(f"{folder}: has no {WEIGHTS_FILE}; use --from_scratch {folder} to start from random weights")
    url = backbone.model_class.pretrained_resource_files_map.get("model_state", {}).get(backbone.source)
    try:
        file = resolve_file_path(backbone.source, [url] if url else ["model.safetensors", WEIGHTS_FILE])
    except Exception:
        file = None
    if file is None:
        raise _not_found(backbone.source)
    return Path(file)


def _load_collator(name_or_path: str | Path, max_seq_length: int) -> TextCollator:
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


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def create_model(
    cls: type[Model],
    *,
    model_name_or_path: str = DEFAULT_MODEL,
    from_scratch: str | None = None,
    init_from_ckpt: str | None = None,
    output_emb_size: int = DEFAULT_EMBEDDING_SIZE,
    pooling: str = "cls",
    dropout: float = 0.1,
    max_seq_length: int | None = None,
) -> LoadedModel:
    """The model that a training starts from, in training mode.

    Its backbone has pretrained weights, the weights of `init_from_ckpt`, or, with `from_scratch`, random ones.
    max_seq_length: by default 512 or the size of the position table. Raises InputError.
    """
    checkpoint = _weights_file(init_from_ckpt) if init_from_ckpt else None
    if checkpoint and not from_scratch and (checkpoint.parent / BACKBONE_CONFIG_FILE).is_file():
        model_name_or_path = str(checkpoint.parent)
    source = from_scratch or model_name_or_path
    if from_scratch and not Path(from_scratch).is_dir():
        raise InputError(f"--from_scratch {from_scratch}: no such folder")
    backbone = _backbone(source)
    if max_seq_length is None:
        max_seq_length = min(DEFAULT_TRAIN_LENGTH, _longest(backbone))
    config = ModelConfig(output_emb_size, pooling, dropout, max_seq_length)
    collator = _collator_beside(checkpoint, source, backbone, max_seq_length)
    weights_file = checkpoint or (None if from_scratch else _pretrained_weights(backbone))
    model = cls(_build(backbone), config)
    _check_vocabulary(collator, backbone)
    if weights_file:
        _set_weights(model, read_weights(weights_file), weights_file, backbone, head_is_optional=True)
    return LoadedModel(model, collator)


def load_checkpoint(
    path: str | Path,
    cls: type[Model] = SemanticIndexBase,
    *,
    model_name_or_path: str = DEFAULT_MODEL,
    output_emb_size: int | None = None,
    max_seq_length: int | None = None,
) -> LoadedModel:
    """A trained model, in evaluation mode.

    path: the checkpoint's folder, or the .pdparams file in it. A checkpoint of the original scripts has no configs: its
    backbone is `model_name_or_path`, its embedding size is read off the weights. output_emb_size: checked against the
    checkpoint's; max_seq_length: in place of the checkpoint's. Raises InputError.
    """
    file = _weights_file(path)
    source = file.parent if (file.parent / BACKBONE_CONFIG_FILE).is_file() else model_name_or_path
    backbone = _backbone(source)
    weights = read_weights(file)
    config = _read_model_config(file, weights)
    if output_emb_size is not None and output_emb_size != config.output_emb_size:
        raise InputError(
            f"--output_emb_size {output_emb_size}: {file} has {config.output_emb_size}; leave the option out"
        )
    model = cls(_build(backbone), config)
    _set_weights(model, weights, file, backbone, head_is_optional=False)
    model.eval()
    length = max_seq_length or min(config.max_seq_length, _longest(backbone))
    collator = _collator_beside(file, source, backbone, length)
    _check_vocabulary(collator, backbone)
    return LoadedModel(model, collator)


def save_checkpoint(
    folder: str | Path, model: SemanticIndexBase, collator: TextCollator, notes: Mapping[str, str] | None = None
) -> None:
    """Writes a folder from which `load_checkpoint` needs nothing else; a folder of that name is replaced as a whole.

    notes: further text files, name -> content. Raises InputError if it can't be written.
    """
    with atomic_folder(folder) as temporary:
        paddle.save(model.state_dict(), str(temporary / WEIGHTS_FILE))
        write_json(temporary / BACKBONE_CONFIG_FILE, model.ptm.config.to_dict())
        write_json(temporary / MODEL_CONFIG_FILE, asdict(model.config))
        collator.save(temporary)
        for name, content in (notes or {}).items():
            (temporary / name).write_text(content, encoding="utf-8")


def _weights_file(path: str | Path) -> Path:
    """The weights file of a checkpoint given as a folder or as the file itself."""
    path = Path(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path}: {f'has no {WEIGHTS_FILE}' if path.is_dir() else 'no such checkpoint'}")
    return file


def _read_model_config(file: Path, weights: Mapping[str, np.ndarray]) -> ModelConfig:
    """The ModelConfig beside a weights file, or the original scripts' one, which only the weights tell."""
    config_file = file.parent / MODEL_CONFIG_FILE
    if not config_file.is_file():
        reduction = weights.get("emb_reduce_linear.weight")
        return ModelConfig(output_emb_size=0 if reduction is None else int(reduction.shape[-1]))
    content = read_json(config_file)
    try:
        config = ModelConfig(**{field.name: field.type(content[field.name]) for field in fields(ModelConfig)})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{config_file}: isn't a model config (see {error})") from None
    if config.pooling not in ("cls", "mean") or config.output_emb_size < 0 or not 0 <= config.dropout < 1:
        raise InputError(f"{config_file}: has a value out of range")
    return config


def _longest(backbone: _Backbone) -> int:
    """Positions that the backbone has vectors for."""
    return backbone.config.max_position_embeddings


def _collator_beside(file: Path | None, source: str | Path, backbone: _Backbone, max_seq_length: int) -> TextCollator:
    """The collator of the checkpoint's folder if it has a vocabulary, else the backbone's."""
    if max_seq_length > _longest(backbone):
        remedy = f"the position table of {backbone.source} has {_longest(backbone)} rows; use at most that many tokens"
        raise InputError(f"--max_seq_length {max_seq_length}: {remedy}")
    has_vocabulary = file is not None and (file.parent / VOCABULARY_FILE).is_file()
    return _load_collator(file.parent if has_vocabulary else source, max_seq_length)


def _check_vocabulary(collator: TextCollator, backbone: _Backbone) -> None:
    rows = backbone.config.vocab_size
    if collator.vocabulary_size > rows:
        raise InputError(f"{backbone.source}: its {VOCABULARY_FILE} has more lines than the model's {rows} embeddings")
    if collator.pad_id != backbone.config.pad_token_id:
        raise InputError(f"{backbone.source}: pad_token_id isn't the line number of [PAD] in {VOCABULARY_FILE}")


def _set_weights(
    model: SemanticIndexBase, weights: Mapping[str, np.ndarray], file: Path, backbone: _Backbone, head_is_optional: bool
) -> None:
    """Copies the weights of `file` into the model, and says which don't fit.

    Raises InputError if a parameter is missing or has another shape; those of the reduction may, if it is optional.
    """
    weights = _with_our_names(weights, backbone.model_class.base_model_prefix)
    parameters = model.state_dict()
    fitting = [name for name in parameters if name in weights and weights[name].shape == tuple(parameters[name].shape)]
    problems = {
        "missing": [name for name in parameters if name not in weights],
        "wrong-shaped": [
            f"{name} {list(weights[name].shape)} instead of {list(parameter.shape)}"
            for name, parameter in parameters.items()
            if name in weights and name not in fitting
        ],
        "unexpected": [name for name in weights if name not in parameters],
    }
    serious = [
        name
        for kind in ("missing", "wrong-shaped")
        for name in problems[kind]
        if not (head_is_optional and name.startswith("emb_reduce_linear."))
    ]
    report = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
    if serious:
        raise InputError(f"{file}: doesn't fit {backbone.model_class.__name__} of {backbone.source} ({report})")
    if report:
        log(f"{file}: {report}; all other parameters were taken")
    for name in fitting:
        parameters[name].set_value(weights[name])


def _with_our_names(weights: Mapping[str, np.ndarray], backbone_prefix: str) -> dict[str, np.ndarray]:
    """Names of a plain PaddleNLP backbone (`embeddings.…` or `ernie.embeddings.…`) become ours (`ptm.embeddings.…`)."""
    if any(name.startswith("ptm.") for name in weights):
        return dict(weights)
    return {"ptm." + name.removeprefix(backbone_prefix + "."): array for name, array in weights.items()}


def _some(names: list[str]) -> str:
    more = len(names) - REPORTED_PARAMETERS
    return ", ".join(names[:REPORTED_PARAMETERS]) + (f" and {more} more" if more > 0 else "")
