"""The checkpoint folder, which says everything about a model, and what a training needs to go on from it."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import paddle

from backbone import (
    WEIGHTS_FILES,
    Backbone,
    build_backbone,
    find_backbone,
    load_collator,
    pretrained_weights,
)
from base_model import DEFAULT_EMBEDDING_SIZE, DEFAULT_MODEL, ModelConfig, SemanticIndexBase
from data import BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE, VOCABULARY_FILE, TextCollator, longest_text
from files import (
    MANIFEST_FILE,
    atomic_folder,
    check_manifest,
    read_json,
    remove_folder,
    whole_folder,
    write_json,
    write_manifest,
)
from runtime import InputError, log
from weights import read_weights, write_safetensors

DEFAULT_TRAIN_LENGTH = 512  # train_batch_neg.py's default, cut to the position table
REPORTED_PARAMETERS = 3

TRAINING_PREFIX = "training_"  # of the files that only `--resume_from` reads
TRAINING_STATE_FILE = TRAINING_PREFIX + "state.json"
OPTIMIZER_FILE = TRAINING_PREFIX + "optimizer.safetensors"
STEP_FOLDER = "model_"  # and the number of the step
PROGRESS_KEYS = ("step", "shape", "evaluator", "loss_scaler")  # of a training state's progress
NOT_ARRAYS = ("LR_Scheduler", "master_weights")  # of AdamW: the rate follows from the step; parameters are float32

Model = TypeVar("Model", bound=SemanticIndexBase)


class LoadedModel(NamedTuple):
    """A model and the collator that makes its input."""

    model: Any  # of the class that was asked for
    collator: TextCollator


class TrainingState(NamedTuple):
    """What a training needs beside the model to go on: all else follows from the options and the step."""

    progress: dict[str, Any]  # PROGRESS_KEYS, as JSON can hold them
    optimizer: dict[str, np.ndarray]  # `optimizer_arrays`


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
    checkpoint = _checked_weights_file(init_from_ckpt) if init_from_ckpt else None
    if checkpoint and not from_scratch and (checkpoint.parent / BACKBONE_CONFIG_FILE).is_file():
        model_name_or_path = str(checkpoint.parent)
    source = from_scratch or model_name_or_path
    if from_scratch and not Path(from_scratch).is_dir():
        raise InputError(f"--from_scratch {from_scratch}: no such folder")
    backbone = find_backbone(source)
    if max_seq_length is None:
        max_seq_length = min(DEFAULT_TRAIN_LENGTH, _longest(backbone))
    config = ModelConfig(output_emb_size, pooling, dropout, max_seq_length)
    collator = _collator_beside(checkpoint, source, backbone, max_seq_length)
    weights_file = checkpoint or (None if from_scratch else pretrained_weights(backbone))
    model = cls(build_backbone(backbone), config)
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
    file = _checked_weights_file(path)
    source = file.parent if (file.parent / BACKBONE_CONFIG_FILE).is_file() else model_name_or_path
    backbone = find_backbone(source)
    weights = read_weights(file)
    config = _read_model_config(file, weights)
    if output_emb_size is not None and output_emb_size != config.output_emb_size:
        raise InputError(
            f"--output_emb_size {output_emb_size}: {file} has {config.output_emb_size}; leave the option out"
        )
    model = cls(build_backbone(backbone), config)
    _set_weights(model, weights, file, backbone, head_is_optional=False)
    model.eval()
    length = max_seq_length or min(config.max_seq_length, _longest(backbone))
    collator = _collator_beside(file, source, backbone, length)
    _check_vocabulary(collator, backbone)
    return LoadedModel(model, collator)


def save_checkpoint(
    folder: str | Path,
    model: SemanticIndexBase,
    collator: TextCollator,
    *,
    notes: Mapping[str, str] | None = None,
    training: TrainingState | None = None,
) -> None:
    """Writes a folder from which `load_checkpoint` needs nothing else; a folder of that name is replaced as a whole.

    notes: further text files, name -> content; training: what `read_training_state` gives back. Raises InputError if
    it can't be written, or a weight isn't finite: nothing could be made of such a model.
    """
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, array in weights.items():
        if not np.isfinite(array).all():
            remedy = "lower the learning rate; earlier checkpoints are kept"
            raise InputError(f"{folder}: isn't written, since {name} holds numbers that aren't finite; {remedy}")
    with atomic_folder(folder) as temporary:
        safetensors_file, pdparams_file = (temporary / name for name in WEIGHTS_FILES)
        paddle.save(model.state_dict(), str(pdparams_file))
        write_safetensors(safetensors_file, weights)
        write_model_files(temporary, model, collator)
        for name, content in (notes or {}).items():
            (temporary / name).write_text(content, encoding="utf-8")
        if training:
            write_json(temporary / TRAINING_STATE_FILE, training.progress)
            write_safetensors(temporary / OPTIMIZER_FILE, training.optimizer)
        write_manifest(temporary)


def write_model_files(folder: Path, model: SemanticIndexBase, collator: TextCollator) -> None:
    """Writes all that describes a model but its weights: both configs and the vocabulary."""
    write_json(folder / BACKBONE_CONFIG_FILE, model.ptm.config.to_dict())
    write_json(folder / MODEL_CONFIG_FILE, asdict(replace(model.config, max_seq_length=collator.max_seq_length)))
    collator.save(folder)


def read_training_state(folder: Path) -> TrainingState:
    """What `save_checkpoint` was given. Raises InputError if a file of the folder isn't as it was written."""
    for name in (TRAINING_STATE_FILE, MANIFEST_FILE):
        if not (folder / name).is_file():
            remedy = "take its weights alone with --init_from_ckpt"
            raise InputError(f"{folder}: has no {name}, so no training can go on from it; {remedy}")
    check_manifest(folder)
    progress = read_json(folder / TRAINING_STATE_FILE)
    if missing := [key for key in PROGRESS_KEYS if key not in progress]:
        raise InputError(f"{folder / TRAINING_STATE_FILE}: isn't a training state, it lacks {', '.join(missing)}")
    return TrainingState(progress, read_weights(folder / OPTIMIZER_FILE))


def step_folder(save_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return save_dir / f"{STEP_FOLDER}{step}"


def step_folders(save_dir: Path) -> list[Path]:
    """The checkpoints of a training, by step."""
    names = [path.name.removeprefix(STEP_FOLDER) for path in save_dir.glob(f"{STEP_FOLDER}*") if path.is_dir()]
    return [step_folder(save_dir, step) for step in sorted(int(name) for name in names if re.fullmatch("[0-9]+", name))]


def other_training(folder: Path, saved: Mapping[str, Any], shape: Mapping[str, Any]) -> str | None:
    """Why the training that wrote `folder`, of the shape `saved`, isn't the one of `shape`; None if it is."""
    for name, value in shape.items():
        if name not in saved:
            remedy = f"if it is this training's, give --resume_from {folder}"
            return f"{folder}: doesn't tell its {name}, since an older version wrote it; {remedy}"
        if saved[name] != value:
            remedy = "go on with the same, or take its weights alone with --init_from_ckpt into another --save_dir"
            return f"{folder}: was trained with {name} {saved[name]}, not {value}; {remedy}"
    return None


def latest_checkpoint(save_dir: Path, shape: Mapping[str, Any] | None = None) -> Path | None:
    """The newest checkpoint that a training can go on from, or None; those that are passed over are logged.

    shape: what the training that wrote it must share, None for nothing. Raises InputError, about the newest, if all
    are other trainings'.
    """
    others = []
    for folder in reversed(step_folders(save_dir)):
        try:
            saved = read_training_state(folder).progress["shape"]
        except InputError as error:
            log(f"passed over {error}")
            continue
        if other := other_training(folder, saved, shape or {}):
            others.append((folder.name, other))
            continue
        if others:
            log(f"passed over {', '.join(name for name, _ in others)}: another training's")
        return folder
    if others:
        raise InputError(others[0][1])
    return None


def remove_old_checkpoints(save_dir: Path, step: int, keep: int, shape: Mapping[str, Any]) -> None:
    """Removes all but the newest `keep` of a training's checkpoints up to a step's. Raises InputError if it can't.

    Those of later steps stay and don't count: a training that had to go on from an earlier one passed them over. So do
    those of trainings of another shape.
    """
    folders = step_folders(save_dir)
    folders = folders[: folders.index(step_folder(save_dir, step)) + 1]
    for folder in [folder for folder in folders if _is_of(folder, shape)][:-keep]:
        try:
            remove_folder(folder)
        except OSError as error:
            raise InputError(f"{folder}: can't be removed ({error.strerror})") from None


def _is_of(folder: Path, shape: Mapping[str, Any]) -> bool:
    """Whether a training of this shape wrote `folder`, as far as one can read."""
    try:
        return other_training(folder, read_json(folder / TRAINING_STATE_FILE)["shape"], shape) is None
    except (InputError, KeyError):
        return False


def optimizer_arrays(model: SemanticIndexBase, optimizer: paddle.optimizer.Optimizer) -> dict[str, np.ndarray]:
    """The optimizer's state as `<parameter>.<name of the accumulator>` -> array."""
    state = {name: value.numpy() for name, value in optimizer.state_dict().items() if name not in NOT_ARRAYS}
    return {
        f"{name}.{key.removeprefix(parameter.name + '_')}": value
        for name, parameter in model.named_parameters()
        for key, value in state.items()
        if key.startswith(parameter.name + "_")
    }


def restore_optimizer(
    model: SemanticIndexBase, optimizer: paddle.optimizer.Optimizer, arrays: Mapping[str, np.ndarray]
) -> None:
    """Gives an optimizer that has taken no step the state that `optimizer_arrays` read."""
    internal_names = {name: parameter.name for name, parameter in model.named_parameters()}
    state = {}
    for key, value in arrays.items():
        name, accumulator = key.rsplit(".", 1)
        state[f"{internal_names[name]}_{accumulator}"] = paddle.to_tensor(value)
    optimizer.set_state_dict(state)


def _checked_weights_file(path: str | Path) -> Path:
    """`weights_file`, in a folder whose model is as its manifest says."""
    file = weights_file(path)
    check_manifest(file.parent, ignored=TRAINING_PREFIX)
    return file


def weights_file(path: str | Path) -> Path:
    """The weights file of a checkpoint given as a folder or as the file itself. Raises InputError if there is none."""
    path = Path(path)
    folder = whole_folder(path)
    if folder.is_dir():
        for name in WEIGHTS_FILES:
            if (folder / name).is_file():
                return folder / name
        raise InputError(f"{path}: has no {' or '.join(reversed(WEIGHTS_FILES))}{_newest_in(path)}")
    file = whole_folder(path.parent) / path.name
    if not file.is_file():
        raise InputError(f"{path}: no such checkpoint{_newest_in(path)}")
    return file


def _newest_in(path: Path) -> str:
    """For a message about a checkpoint that isn't there: the newest one of the training that `path` leads to."""
    folder = next((folder for folder in (path, *path.parents) if folder.is_dir()), path)
    checkpoints = step_folders(folder)
    return f"; the newest in {folder} is {checkpoints[-1].name}" if checkpoints else ""


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


def _longest(backbone: Backbone) -> int:
    """`longest_text` of a backbone."""
    return longest_text(backbone.config.to_dict())


def _collator_beside(file: Path | None, source: str | Path, backbone: Backbone, max_seq_length: int) -> TextCollator:
    """The collator of the checkpoint's folder if it has a vocabulary, else the backbone's."""
    if max_seq_length > _longest(backbone):
        remedy = f"the position table of {backbone.source} has {_longest(backbone)} rows; use at most that many tokens"
        raise InputError(f"--max_seq_length {max_seq_length}: {remedy}")
    has_vocabulary = file is not None and (file.parent / VOCABULARY_FILE).is_file()
    return load_collator(file.parent if has_vocabulary else source, max_seq_length)


def _check_vocabulary(collator: TextCollator, backbone: Backbone) -> None:
    rows = backbone.config.vocab_size
    if collator.vocabulary_size > rows:
        raise InputError(f"{backbone.source}: its {VOCABULARY_FILE} has more lines than the model's {rows} embeddings")
    if collator.pad_id != backbone.config.pad_token_id:
        raise InputError(f"{backbone.source}: pad_token_id isn't the line number of [PAD] in {VOCABULARY_FILE}")


def _set_weights(
    model: SemanticIndexBase, weights: Mapping[str, np.ndarray], file: Path, backbone: Backbone, head_is_optional: bool
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
    if report or head_is_optional:
        log(f"{file}: took {len(fitting)} of {len(parameters)} parameters" + (f" ({report})" if report else ""))
    for name in fitting:
        parameters[name].set_value(_as_float32(weights[name]))


def _as_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:  # as which Paddle saves bfloat16: the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _with_our_names(weights: Mapping[str, np.ndarray], backbone_prefix: str) -> dict[str, np.ndarray]:
    """Names of a plain PaddleNLP backbone (`embeddings.…` or `ernie.embeddings.…`) become ours (`ptm.embeddings.…`)."""
    if any(name.startswith("ptm.") for name in weights):
        return dict(weights)
    return {"ptm." + name.removeprefix(backbone_prefix + "."): array for name, array in weights.items()}


def _some(names: list[str]) -> str:
    more = len(names) - REPORTED_PARAMETERS
    return ", ".join(names[:REPORTED_PARAMETERS]) + (f" and {more} more" if more > 0 else "")
