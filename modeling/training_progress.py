"""What a checkpoint tells of its training: step, options and evaluations. Imports no Paddle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json
from common.logs import log
from modeling.checkpoint_files import TRAINING_PREFIX

STATE_FILE = TRAINING_PREFIX + "state.json"
EVALUATIONS_FILE = TRAINING_PREFIX + "evaluations.json"  # written after the checkpoint, so not in its manifest
PROGRESS_KEYS = ("step", "run_config", "evaluator", "loss_scaler")  # in STATE_FILE
OLD_NAMES = {"shape": "run_config", "no_mask_duplicates": "no_false_negative_mask"}  # version 1's name -> today's
LATER_OPTIONS = {  # as a checkpoint that lacks them was trained
    "label_column": False,
    "symmetric_pairs": None,
    "query_prefix": "",
    "document_prefix": "",
    "unsupervised": False,
    "teacher_scores": False,
    "distillation_weight": 1.0,
    "teacher_scale": None,
}


def read_progress(folder: Path) -> dict[str, Any]:
    """The values of PROGRESS_KEYS of a checkpoint, with today's names. Raises InputError if they can't be read."""
    progress = _with_new_names(read_json(folder / STATE_FILE))
    if (folder / EVALUATIONS_FILE).is_file():
        try:
            progress["evaluator"] = read_json(folder / EVALUATIONS_FILE)
        except InputError as error:  # a power failure can cut the file short
            log(f"{error}; the evaluation counts as missing")
    if missing := [key for key in PROGRESS_KEYS if key not in progress]:
        raise InputError(f"{folder / STATE_FILE}: isn't a training state, it lacks {', '.join(missing)}")
    progress["run_config"] = _with_later_options(progress["run_config"])
    return progress


def read_run_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint. Raises InputError or KeyError if it can't be read."""
    return _with_later_options(_with_new_names(read_json(folder / STATE_FILE))["run_config"])


def _with_later_options(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration with today's names, and with the options that its version didn't have."""
    return {**LATER_OPTIONS, **_with_new_names(run_config)}


def _with_new_names(content: Mapping[str, Any]) -> dict[str, Any]:
    return {OLD_NAMES.get(name, name): value for name, value in content.items()}
