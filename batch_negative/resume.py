"""What a training saves to be resumed exactly, and which checkpoint it resumes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle

from batch_negative.evaluator import Evaluator
from batch_negative.model import SemanticIndexBatchNeg
from common.device import set_seed
from common.distributed import broadcast_parameters
from common.errors import InputError
from common.files import remove_folder, write_json
from common.logs import log
from common.manifest import MANIFEST_FILE, check_manifest
from modeling.checkpoint import LoadedModel, create_model, load_checkpoint
from modeling.checkpoint_files import TRAINING_PREFIX, find_checkpoint_folder, step_folder, step_folders
from modeling.model_settings import read_model_config
from modeling.training_progress import STATE_FILE, read_progress, read_run_config
from modeling.weight_files import read_weights, write_safetensors

OPTIMIZER_FILE = TRAINING_PREFIX + "optimizer.safetensors"
NOT_SAVED = ("LR_Scheduler", "master_weights")  # of AdamW: the step gives the learning rate; parameters are float32


class TrainingState(NamedTuple):
    """What resuming a training needs, besides the model and the same options."""

    progress: dict[str, Any]  # values of PROGRESS_KEYS, as JSON values
    optimizer: dict[str, np.ndarray]  # see `optimizer_arrays`

    def write(self, folder: Path) -> None:
        """Writes the state into a checkpoint's folder. Raises InputError if it can't be written."""
        write_json(folder / STATE_FILE, self.progress)
        write_safetensors(folder / OPTIMIZER_FILE, self.optimizer)


def read_training_state(folder: Path) -> TrainingState:
    """The training state of a checkpoint. Raises InputError if there is none, or if a file has changed."""
    for name in (STATE_FILE, MANIFEST_FILE):
        if not (folder / name).is_file():
            remedy = "take its weights alone with --init_from_ckpt"
            raise InputError(f"{folder}: has no {name}, so no training can be resumed from it; {remedy}")
    check_manifest(folder)
    return TrainingState(read_progress(folder), read_weights(folder / OPTIMIZER_FILE))


class Start(NamedTuple):
    """What a training starts from."""

    loaded: LoadedModel
    state: TrainingState | None  # None for a new training
    checkpoint: Path | None  # the one that is resumed from

    @property
    def step(self) -> int:
        """Number of steps taken before."""
        return self.state.progress["step"] if self.state else 0

    def is_in(self, save_dir: Path) -> bool:
        """Whether the checkpoint that is resumed from is this step's in save_dir."""
        return self.checkpoint is not None and self.checkpoint.resolve() == step_folder(save_dir, self.step).resolve()


def start_or_resume(
    resume_from: str | None,
    save_dir: Path,
    run_config: Mapping[str, Any],
    evaluator: Evaluator | None,
    seed: int,
    model_options: Mapping[str, Any],
) -> Start:
    """A new model, or that of the checkpoint that `resume_from` names, the same on all ranks.

    From a checkpoint it restores the evaluator's history, too. model_options: arguments of `create_model`, for a new
    model. Raises InputError, also for a checkpoint of another run.
    """
    found = find_resumed(resume_from, save_dir, run_config) if resume_from else None
    if found:
        checkpoint, state = found
        if evaluator and state.progress["evaluator"]:
            check_resumable(checkpoint, state.progress["evaluator"], evaluator.conditions)
            evaluator.restore(state.progress["evaluator"])
        model, tokenizer, _, _ = load_checkpoint(checkpoint, SemanticIndexBatchNeg)
        model.train()
        return Start(LoadedModel(model, tokenizer), state, checkpoint)
    if earlier := step_folders(save_dir):
        kept = "this one's will replace those of the same steps"
        log(f"{save_dir}: holds an earlier training's checkpoints, up to {earlier[-1].name}; {kept}")
    set_seed(seed)
    loaded = create_model(SemanticIndexBatchNeg, **model_options)
    broadcast_parameters(loaded.model)
    return Start(loaded, None, None)


def find_resumed(resume_from: str, save_dir: Path, run_config: Mapping[str, Any]) -> tuple[Path, TrainingState] | None:
    """The checkpoint that `--resume_from` names; None if it is "latest" and there is none yet.

    Raises InputError, also for a checkpoint of another run.
    """
    if resume_from == "latest":
        latest = latest_checkpoint(save_dir, run_config)
        if latest:
            log(f"resuming from {latest[0]}")
        else:
            log(f"{save_dir}: no checkpoint to go on from yet; starting a new training")
        return latest
    folder = find_checkpoint_folder(resume_from)
    state = read_training_state(folder)
    check_resumable(folder, state.progress["run_config"], run_config)
    return folder, state


def latest_checkpoint(save_dir: Path, run_config: Mapping[str, Any] | None = None) -> tuple[Path, TrainingState] | None:
    """The newest checkpoint that a run can be resumed from, or None; those that are passed over are logged.

    run_config: the configuration of the run; None accepts every run's. Raises InputError if all usable checkpoints
    belong to other runs.
    """
    mismatches: dict[str, str] = {}  # folder -> why it belongs to another run
    for folder in reversed(step_folders(save_dir)):
        try:
            state = read_training_state(folder)
        except InputError as error:
            log(f"passed over {error}")
            continue
        if mismatch := resume_mismatch(folder, state.progress["run_config"], run_config or {}):
            mismatches[folder.name] = mismatch
            continue
        if mismatches:
            log(f"passed over {', '.join(mismatches)}: another training's")
        return folder, state
    if mismatches:
        raise InputError(next(iter(mismatches.values())))  # about the newest one
    return None


def resume_mismatch(folder: Path, saved: Mapping[str, Any], run_config: Mapping[str, Any]) -> str | None:
    """Why the run of `run_config` can't be resumed from `folder`, whose configuration is `saved`; None if it can."""
    for name, value in run_config.items():
        if name not in saved:
            remedy = f"if it is this training's, give --resume_from {folder}"
            return f"{folder}: doesn't tell its {name}, since an older version wrote it; {remedy}"
        trained = saved[name]
        if name == "max_seq_length" and trained is None and value is not None:
            trained = read_model_config(folder).max_seq_length  # None: the option wasn't given
        if trained != value:
            remedy = "go on with the same, or take its weights alone with --init_from_ckpt into another --save_dir"
            return f"{folder}: was trained with {name} {trained}, not {value}; {remedy}"
    return None


def check_resumable(folder: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises InputError if a value that was saved in `folder` isn't ours; values that weren't saved aren't compared."""
    if mismatch := resume_mismatch(folder, saved, {name: value for name, value in ours.items() if name in saved}):
        raise InputError(mismatch)


def remove_old_checkpoints(save_dir: Path, step: int, keep: int, run_config: Mapping[str, Any]) -> None:
    """Removes a run's checkpoints up to a step except the newest `keep`. Raises InputError if it can't.

    Checkpoints of later steps stay and don't count: the run was resumed from an earlier one because they couldn't be
    used. Checkpoints of other runs stay too.
    """
    folders = step_folders(save_dir)
    folders = folders[: folders.index(step_folder(save_dir, step)) + 1]
    for folder in [folder for folder in folders if _belongs_to(folder, run_config)][:-keep]:
        try:
            remove_folder(folder)
        except OSError as error:
            raise InputError(f"{folder}: can't be removed ({error.strerror})") from None


def _belongs_to(folder: Path, run_config: Mapping[str, Any]) -> bool:
    """Whether a run with this configuration wrote the checkpoint; False if its training state can't be read."""
    try:
        return resume_mismatch(folder, read_run_config(folder), run_config) is None
    except (InputError, KeyError):
        return False


def optimizer_arrays(model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer) -> dict[str, np.ndarray]:
    """The optimizer's state: `<parameter>.<accumulator>` -> array."""
    state = {name: value.numpy() for name, value in optimizer.state_dict().items() if name not in NOT_SAVED}
    return {
        f"{name}.{key.removeprefix(parameter.name + '_')}": value
        for name, parameter in model.named_parameters()
        for key, value in state.items()
        if key.startswith(parameter.name + "_")
    }


def restore_optimizer(
    model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer, arrays: Mapping[str, np.ndarray]
) -> None:
    """Sets the state that `optimizer_arrays` returned in an optimizer that has taken no step."""
    internal_names = {name: parameter.name for name, parameter in model.named_parameters()}
    state = {}
    for key, value in arrays.items():
        name, accumulator = key.rsplit(".", 1)
        state[f"{internal_names[name]}_{accumulator}"] = paddle.to_tensor(value)
    optimizer.set_state_dict(state)
