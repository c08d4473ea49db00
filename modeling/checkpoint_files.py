"""Finds checkpoints and checks their files. Imports no Paddle."""

import re
from pathlib import Path

from common.errors import InputError
from common.files import read_json, resolve_interrupted_replace
from common.logs import log
from common.manifest import check_manifest
from data import BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE
from modeling.tokenizer_files import check_tokenizer, has_tokenizer, read_tokenizer_config
from modeling.weight_files import INDEX_SUFFIX

SAFETENSORS_FILE = "model.safetensors"
TORCH_FILE = "pytorch_model.bin"
PADDLE_WEIGHTS = "model_state.pdparams"
WEIGHTS_FILES = (PADDLE_WEIGHTS, SAFETENSORS_FILE)  # in this order; version 1 wrote both
HUGGING_FACE_FILES = (f"{SAFETENSORS_FILE}{INDEX_SUFFIX}", TORCH_FILE, f"{TORCH_FILE}{INDEX_SUFFIX}")  # after these
TRAINING_PREFIX = "training_"  # of the files that only --resume_from reads
STEP_FOLDER = "model_"  # followed by the step's number


def step_folder(save_dir: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return save_dir / f"{STEP_FOLDER}{step}"


def step_folders(save_dir: Path) -> list[Path]:
    """The checkpoint folders in `save_dir`, in the order of their steps."""
    names = [path.name.removeprefix(STEP_FOLDER) for path in save_dir.glob(f"{STEP_FOLDER}*") if path.is_dir()]
    return [step_folder(save_dir, step) for step in sorted(int(name) for name in names if re.fullmatch("[0-9]+", name))]


def find_checkpoint_folder(path: str) -> Path:
    """The checkpoint whose folder `--resume_from` names. Raises InputError if it is missing."""
    folder = resolve_interrupted_replace(path)
    if not folder.is_dir():
        raise InputError(f"--resume_from {path}: no such folder; give a checkpoint's folder or latest")
    return folder


def find_weights(path: str | Path) -> Path:
    """The weights file of a checkpoint, given as a folder or as the file itself. Raises InputError if it is missing."""
    path = Path(path)
    folder = resolve_interrupted_replace(path)
    if folder.is_dir():
        if file := weights_in(folder):
            return file
        raise InputError(f"{path}: has no {', '.join(WEIGHTS_FILES)} or {TORCH_FILE}{_newest_in(path)}")
    file = resolve_interrupted_replace(path.parent) / path.name
    if not file.is_file():
        raise InputError(f"{path}: no such checkpoint{_newest_in(path)}")
    return file


def weights_in(folder: Path) -> Path | None:
    """The weights file of a folder in PaddleNLP's or Hugging Face's form; the index if they are in shards."""
    return next(iter(_all_weights_in(folder)), None)


def _all_weights_in(folder: Path) -> list[Path]:
    """The weights files of a folder; the first one counts."""
    files = (folder / name for name in (*WEIGHTS_FILES, *HUGGING_FACE_FILES))
    return [file for file in files if file.is_file()]


def report_other_weights(file: Path) -> None:
    """Logs the weights files beside `file`, which aren't used; not for a checkpoint, of which version 1 wrote two."""
    others = [other.name for other in _all_weights_in(file.parent) if other != file]
    if others and not (file.parent / MODEL_CONFIG_FILE).is_file():
        log(f"{file.parent}: has several weights files; using {file.name}, not {', '.join(others)}")


def check_checkpoint(path: str | Path) -> Path:
    """Finds the weights file of a checkpoint, and checks the other files that inference needs. Raises InputError."""
    weights = find_weights(path)
    folder = weights.parent
    check_manifest(folder, only=lambda name: name not in WEIGHTS_FILES and not name.startswith(TRAINING_PREFIX))
    for name in (BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE):
        if (folder / name).is_file():
            read_json(folder / name)
    check_tokenizer(folder)
    return weights


def lowercases(*sources: str | Path | None) -> bool:
    """Whether the tokenizer of a model lowercases: that of the first source that is a folder with a vocabulary.

    True without such a folder, as for most models that are given by name, also if the name is in a cache: the first run
    and a resumed one have to take the same documents for equal.
    """
    folder = next((Path(source) for source in sources if source and has_tokenizer(source)), None)
    return folder is None or bool(read_tokenizer_config(folder).get("do_lower_case", True))


def _newest_in(path: Path) -> str:
    """The end of a message about a missing checkpoint: the newest one in `path` or its nearest existing parent."""
    folder = next((folder for folder in (path, *path.parents) if folder.is_dir()), path)
    checkpoints = step_folders(folder)
    return f"; the newest in {folder} is {checkpoints[-1].name}" if checkpoints else ""
