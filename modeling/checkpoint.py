"""Creating a model, and saving it in and loading it from a checkpoint folder, which describes it completely."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import paddle
from paddle.base import core

from base_model import ModelConfig, SemanticIndexBase
from common import __version__
from common.errors import InputError
from common.files import atomic_folder, write_json
from common.logs import log
from common.manifest import check_manifest, read_manifest, write_manifest
from common.options import DEFAULT_MODEL
from data import (
    BACKBONE_CONFIG_FILE,
    MODEL_CONFIG_FILE,
    VOCABULARY_FILE,
    TextTokenizer,
    check_max_seq_length,
    max_position_tokens,
)
from modeling.backbone import Backbone, build_backbone, find_backbone, load_tokenizer, pretrained_weights
from modeling.checkpoint_files import WEIGHTS_FILES, check_checkpoint, report_other_weights
from modeling.hub import model_folder
from modeling.hugging_face import NEED_ENCODER, NEED_SUPPORTED, from_pytorch, has_pytorch_names, is_other_pytorch_model
from modeling.model_settings import (
    DEFAULT_TRAIN_LENGTH,
    NOT_OF_THE_MODEL,
    ModelSettings,
    has_model_config,
    held_settings,
    read_model_config,
    reduced_size,
    report_assumed,
    report_backbone_dropout,
    report_difference,
    report_scratch_folder,
)
from modeling.sentence_transformers_folder import module_weights, report_prompts
from modeling.tokenizer_files import has_tokenizer
from modeling.weight_files import read_weights

REPORTED_PARAMETERS = 3  # names in a message
PROBED_TOKENS = 32
POOLER = "ptm.pooler."
# On the length of a unit vector's change: rounding makes up 1e-6, 30 tokens of padding that isn't masked 0.006 or more.
LARGEST_EFFECT_OF_PADDING = 5e-4

Model = TypeVar("Model", bound=SemanticIndexBase)


class LoadedModel(NamedTuple):
    """A model and the tokenizer for its input."""

    model: Any  # of the class that was asked for
    tokenizer: TextTokenizer


class LoadedCheckpoint(NamedTuple):
    """What a checkpoint holds for inference."""

    model: Any  # of the class that was asked for
    tokenizer: TextTokenizer
    fingerprint: str  # see `model_fingerprint`
    weights: Path  # the weights file


def create_model(
    cls: type[Model],
    *,
    model_name_or_path: str | None = None,
    from_scratch: str | None = None,
    init_from_ckpt: str | None = None,
    output_emb_size: int | None = None,
    pooling: str | None = None,
    dropout: float | None = None,
    max_seq_length: int | None = None,
    query_prefix: str | None = None,
    document_prefix: str | None = None,
) -> LoadedModel:
    """The model that a training starts from, in training mode. The arguments are options of train_batch_neg.py.

    Its weights are those of `init_from_ckpt` if given, else random with `from_scratch`, else pretrained; the linear
    reduction's are random unless the file has them in the right shape. A setting that is None is the checkpoint's; if
    it has none, the default of ModelSettings. Logs what is given and differs, and what is assumed. Raises InputError.
    """
    values = (output_emb_size, pooling, dropout, max_seq_length, query_prefix, document_prefix)
    named = zip(ModelSettings._fields, values, strict=True)
    given = {name: value for name, value in named if value is not None}
    if not (init_from_ckpt or from_scratch):
        model_folder(model_name_or_path or DEFAULT_MODEL, weights=True)  # before its settings are looked at
    held = held_settings(init_from_ckpt, from_scratch, model_name_or_path)
    settings = held.resolve(given)
    checkpoint = check_checkpoint(init_from_ckpt) if init_from_ckpt else None
    if checkpoint:
        _check_weights_file(checkpoint)
    backbone = find_backbone(from_scratch) if from_scratch else _find_backbone(checkpoint, model_name_or_path)
    weights_file = checkpoint or (None if from_scratch else pretrained_weights(backbone))
    weights = read_weights(weights_file) if weights_file else {}
    default_length = settings.max_seq_length or DEFAULT_TRAIN_LENGTH
    tokenizer = _load_tokenizer(checkpoint, backbone, weights, max_seq_length, default_length)
    settings = settings._replace(max_seq_length=tokenizer.max_seq_length)
    held.report(given, settings, from_scratch or model_name_or_path)
    if from_scratch:
        report_scratch_folder(Path(from_scratch), checkpoint and checkpoint.parent, backbone, tokenizer, settings)
    report_backbone_dropout(dropout, backbone)
    _check_vocabulary(tokenizer, backbone)
    weights = _named_weights(weights, weights_file, backbone) if weights_file else {}
    model = cls(build_backbone(backbone), ModelConfig(**settings._asdict()))
    tokenizer.prefixes = model.config.prefixes
    if weights_file:
        report_other_weights(weights_file)
        _set_weights(model, weights, weights_file, backbone, head_is_optional=True)
        report_prompts(weights_file.parent)
    _check_padding(model, backbone)
    return LoadedModel(model, tokenizer)


def load_checkpoint(
    params_path: str | Path,
    cls: type[Model] = SemanticIndexBase,
    *,
    model_name_or_path: str | None = None,
    output_emb_size: int | None = None,
    max_seq_length: int | None = None,
) -> LoadedCheckpoint:
    """A trained model, in evaluation mode.

    params_path: the checkpoint's folder, or the weights file in it. A checkpoint of the original scripts has no
    configs: its backbone is `model_name_or_path`, its embedding size is read from the weights, and what else is assumed
    is logged. output_emb_size, if given, must be the checkpoint's; max_seq_length replaces the checkpoint's, which is
    logged. Raises InputError.
    """
    file = check_checkpoint(params_path)
    backbone = _find_backbone(file, model_name_or_path)
    try:
        weights = read_weights(file)
    except InputError:
        _check_weights_file(file)  # says more about a damaged file
        raise
    has_config = has_model_config(file.parent)
    config = read_model_config(file.parent) if has_config else ModelConfig(output_emb_size=reduced_size(weights))
    if output_emb_size is not None and output_emb_size != config.output_emb_size:
        problem = f"--output_emb_size {output_emb_size}: {file} has {config.output_emb_size}"
        raise InputError(f"{problem}; leave the option out")
    tokenizer = _load_tokenizer(file, backbone, weights, max_seq_length, config.max_seq_length)
    _check_vocabulary(tokenizer, backbone)
    weights = _named_weights(weights, file, backbone)
    model = cls(build_backbone(backbone, draw=False), config)
    tokenizer.prefixes = config.prefixes
    report_other_weights(file)
    _set_weights(model, weights, file, backbone, head_is_optional=False)
    report_prompts(file.parent)
    _check_padding(model, backbone)
    model.eval()
    if has_config:
        report_difference("max_seq_length", tokenizer.max_seq_length, file.parent, config.max_seq_length)
    assumed = {"pooling": config.pooling, "max_seq_length": None if max_seq_length else tokenizer.max_seq_length}
    report_assumed(file, assumed, model_name_or_path)
    fingerprint = model_fingerprint(model, tokenizer)
    # The fingerprint covers the weights, so the file needs hashing only if it differs, as with another max_seq_length.
    if fingerprint != read_manifest(file.parent).get("fingerprint"):
        _check_weights_file(file)
    return LoadedCheckpoint(model, tokenizer, fingerprint, file)


def save_checkpoint(
    folder: str | Path,
    model: SemanticIndexBase,
    tokenizer: TextTokenizer,
    add_files: Callable[[Path], object] | None = None,
) -> None:
    """Writes a folder that is all `load_checkpoint` needs; replaces an existing folder as a whole.

    add_files: writes more files into the folder that it is given. Raises InputError if the folder can't be written, or
    if a weight isn't finite.
    """
    for name, value in model.state_dict().items():
        if not np.isfinite(value.numpy()).all():
            remedy = "lower the learning rate; earlier checkpoints are kept"
            raise InputError(f"{folder}: isn't written, since {name} holds numbers that aren't finite; {remedy}")
    with atomic_folder(folder) as temporary:
        paddle.save(model.state_dict(), str(temporary / WEIGHTS_FILES[0]))
        write_model_files(temporary, model, tokenizer)
        if add_files:
            add_files(temporary)
        write_manifest(temporary, fingerprint=model_fingerprint(model, tokenizer))


def write_model_files(folder: Path, model: SemanticIndexBase, tokenizer: TextTokenizer) -> None:
    """Writes what describes a model besides its weights: both configs and the tokenizer's files."""
    config = replace(model.config, max_seq_length=tokenizer.max_seq_length)
    write_json(folder / BACKBONE_CONFIG_FILE, model.ptm.config.to_dict())
    write_json(folder / MODEL_CONFIG_FILE, {**asdict(config), "version": __version__})
    tokenizer.save(folder)


def model_fingerprint(model: SemanticIndexBase, tokenizer: TextTokenizer) -> str:
    """SHA-256, in hex, of the weights and of all settings that the vectors depend on, except the precision.

    Indexes and vectors that earlier versions saved contain it, so the way to compute it must not change.
    """
    backbone = model.ptm.config.to_dict()
    settings = {
        "backbone": {name: value for name, value in backbone.items() if name not in NOT_OF_THE_MODEL},
        "pooling": model.config.pooling,
        "output_emb_size": model.config.output_emb_size,
        "collator": tokenizer.settings,  # version 1's name for the tokenizer
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(parameter.numpy()).data)
    return digest.hexdigest()


def _check_weights_file(file: Path) -> None:
    """Raises InputError if the weights file differs from the manifest beside it."""
    check_manifest(file.parent, only=lambda name: name == file.name)


def _find_backbone(file: Path | None, model_name_or_path: str | None) -> Backbone:
    """The backbone in the folder of `file`, a weights file, if that has a config, else the given or default one."""
    if file and (file.parent / BACKBONE_CONFIG_FILE).is_file():
        if model_name_or_path:
            log(f"--model_name_or_path {model_name_or_path}: isn't used, {file.parent} has its own config.json")
        return find_backbone(file.parent)
    name = model_name_or_path or DEFAULT_MODEL
    backbone = find_backbone(name)
    if Path(name).is_dir() and name in backbone.model_class.pretrained_init_configuration:
        log(f"{name}: using the folder of that name here, not PaddleNLP's model")
    return backbone


def _load_tokenizer(
    file: Path | None,
    backbone: Backbone,
    weights: Mapping[str, np.ndarray],
    max_seq_length: int | None,
    default_length: int,
) -> TextTokenizer:
    """The tokenizer in the folder of `file` if that has a vocabulary, else the backbone's.

    It splits texts as the model's own does, whose weights (as read from the file) tell where the model comes from.
    Texts are cut at max_seq_length or, if it is None, at default_length or a shorter position table. Raises InputError,
    also if max_seq_length exceeds the position table.
    """
    longest = check_max_seq_length(max_seq_length, backbone.config.to_dict(), backbone.source)
    source = file.parent if file and has_tokenizer(file.parent) else backbone.source
    is_pytorch = has_pytorch_names(weights, backbone.config.model_type)
    return load_tokenizer(source, max_seq_length or min(default_length, longest), is_pytorch=is_pytorch)


def _check_vocabulary(tokenizer: TextTokenizer, backbone: Backbone) -> None:
    """Raises InputError if the tokenizer's ids don't fit the backbone's embeddings."""
    rows = backbone.config.vocab_size
    if tokenizer.vocabulary_size > rows:
        problem = f"its vocabulary has {tokenizer.vocabulary_size} tokens, more than the model's {rows} embeddings"
        raise InputError(f"{backbone.source}: {problem}; give the {VOCABULARY_FILE} of this model")
    if tokenizer.pad_id != backbone.config.pad_token_id:
        raise InputError(f"{backbone.source}: pad_token_id isn't the line number of [PAD] in {VOCABULARY_FILE}")


def _named_weights(weights: Mapping[str, np.ndarray], file: Path, backbone: Backbone) -> dict[str, np.ndarray]:
    """The weights of a file with our names (`ptm.embeddings.…`); before the model is built, since the form counts.

    Raises InputError if they are PyTorch's, and of a model that can't be used.
    """
    if has_pytorch_names(weights, backbone.config.model_type):
        return {**from_pytorch(weights, file, backbone.config), **module_weights(file.parent)}
    if any(name.startswith("ptm.") for name in weights):
        return dict(weights)
    prefix = backbone.model_class.base_model_prefix + "."  # PaddleNLP's are `embeddings.…` or `ernie.embeddings.…`
    return {"ptm." + name.removeprefix(prefix): array for name, array in weights.items()}


def _set_weights(
    model: SemanticIndexBase, weights: Mapping[str, np.ndarray], file: Path, backbone: Backbone, head_is_optional: bool
) -> None:
    """Copies the weights of `file` into the model, and logs the names that don't fit.

    Raises InputError if a parameter is missing or has another shape. With `head_is_optional` the linear reduction's
    may: it keeps its values. The number of parameters taken is then always logged. The pooler may be missing if the
    pooling doesn't use it.
    """
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
    missing = problems["missing"]
    if model.config.pooling != "cls":
        missing = [name for name in missing if not name.startswith(POOLER)]
    errors = missing + problems["wrong-shaped"]
    if head_is_optional:
        errors = [error for error in errors if not error.startswith("emb_reduce_linear.")]
    if errors and all(error in missing and error.startswith(POOLER) for error in errors):
        remedy = "train from it with --pooling first_token or mean"
        raise InputError(f"{file}: has no pooler (pooler.dense), which cls pooling needs; {remedy}")
    report = "; ".join(f"{len(names)} {kind}: {_first_names(names)}" for kind, names in problems.items() if names)
    if errors and is_other_pytorch_model(weights, backbone.config.model_type):
        raise InputError(f"{file}: is PyTorch's {backbone.config.model_type}; {NEED_SUPPORTED}, or PaddleNLP's form")
    if errors:
        raise InputError(f"{file}: doesn't fit {backbone.model_class.__name__} of {backbone.source} ({report})")
    if report or head_is_optional:
        log(f"{file}: took {len(fitting)} of {len(parameters)} parameters" + (f" ({report})" if report else ""))
    for name in fitting:
        if parameters[name].is_floating_point():
            parameters[name].set_value(np.require(_as_float32(weights[name]), requirements=["C", "A"]))
        else:  # a buffer, such as ALBERT's position ids
            parameters[name].set_value(weights[name].astype(parameters[name].numpy().dtype))


def _check_padding(model: SemanticIndexBase, backbone: Backbone) -> None:
    """Raises InputError if padding changes a vector; not if a vector isn't finite, which encoding reports."""
    config = backbone.config
    ids = np.full((1, min(PROBED_TOKENS, max_position_tokens(config.to_dict()))), config.pad_token_id)
    ids[0, :2] = 0 if config.pad_token_id else 1  # any token but [PAD]
    with _without_tf32():
        alone, padded = (model.embed(tokens, np.zeros_like(tokens)) for tokens in (ids[:, :2], ids))
    if np.linalg.norm(alone - padded) > LARGEST_EFFECT_OF_PADDING:
        name = f"{backbone.source}: {backbone.model_class.__name__}"
        raise InputError(f"{name} doesn't mask padding, so a text's vector would change with it; {NEED_ENCODER}")


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Inside this block a GPU multiplies in float32: Paddle's default, TF32, rounds to about a thousandth."""
    is_on = core.get_cublas_switch()
    core.set_cublas_switch(False)
    try:
        yield
    finally:
        core.set_cublas_switch(is_on)


def _as_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:  # Paddle saves bfloat16 as uint16: the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _first_names(names: list[str]) -> str:
    more = len(names) - REPORTED_PARAMETERS
    return ", ".join(names[:REPORTED_PARAMETERS]) + (f" and {more} more" if more > 0 else "")
