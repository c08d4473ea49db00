"""Models by name that are on this machine already, in the caches of huggingface_hub and PaddleNLP.

Imports no Paddle.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants

from common.files import read_json
from data import BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE, TOKENIZER_CONFIG_FILE, VOCABULARY_FILE
from modeling.checkpoint_files import PADDLE_WEIGHTS
from modeling.sentence_transformers_folder import LENGTH_FILE, MODULES_FILE, PROMPTS_FILE
from modeling.tokenizer_files import ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_FILE

# Without those of the weights and of sentence-transformers' modules.
SMALL_FILES = (
    BACKBONE_CONFIG_FILE,
    VOCABULARY_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    MODULES_FILE,
    LENGTH_FILE,
    PROMPTS_FILE,
    MODEL_CONFIG_FILE,
)
# One form of the weights is taken, the first that a repository has.
WEIGHT_FORMS = (
    r"model\.safetensors",
    r"model\.safetensors\.index\.json|model-\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model\.bin\.index\.json|pytorch_model-\d+-of-\d+\.bin",
    re.escape(PADDLE_WEIGHTS),
)
MODULE_FOLDER = r"[1-9]\d*_\w+/"  # 1_Pooling, 2_Dense, ...; 0 is the encoder itself
PART = r"(?![.-])[A-Za-z0-9_.-]+(?<![.-])"
REPOSITORY = f"{PART}/{PART}"  # as the hub has them: ASCII, no -- or .., at most 96 characters
LONGEST_REPOSITORY = 96
REVISION = r"[A-Za-z0-9_-][A-Za-z0-9_./-]*"
COMMIT = r"[0-9a-f]{40}"


class Repository(NamedTuple):
    """A repository on the hub at a revision, in the hub's cache."""

    name: str  # owner/name
    revision: str  # a branch, tag or commit

    @property
    def cache(self) -> Path:
        """The folder in which huggingface_hub keeps it."""
        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"

    @property
    def page(self) -> str:
        """Its address, for messages."""
        return f"{constants.ENDPOINT}/{self.name}"

    def snapshot(self) -> Path | None:
        """The cached files of this revision, if there are any."""
        reference = self.cache / "refs" / self.revision
        is_reference = not re.fullmatch(COMMIT, self.revision) and reference.is_file()
        commit = reference.read_text(encoding="utf-8").strip() if is_reference else self.revision
        folder = self.cache / "snapshots" / commit
        return folder if folder.is_dir() else None


def cached_folder(name_or_path: str | Path, *, tokenizer: bool = True, weights: bool = False) -> Path | None:
    """The local folder of a model if `model_folder` would download nothing, else None."""
    name = str(name_or_path)
    if os.path.exists(name):  # Path.exists fails on some names
        return Path(name)
    folder = paddlenlp_cache() / name
    needed = [BACKBONE_CONFIG_FILE]
    needed += [TOKENIZER_CONFIG_FILE, VOCABULARY_FILE] if tokenizer else []
    needed += [PADDLE_WEIGHTS] if weights else []
    if re.fullmatch(f"{REPOSITORY}|[\\w.-]+", name) and all((folder / file).is_file() for file in needed):
        return folder
    if not (repository := named_repository(name)) or not (snapshot := repository.snapshot()):
        return None
    return None if unknown_files(repository, snapshot, weights) else snapshot


def named_repository(name: str) -> Repository | None:
    """The repository that a text names, if it has the form of such a name."""
    matched = re.fullmatch(f"({REPOSITORY})(?:@({REVISION}))?", name)
    if not matched or ".." in name or "--" in matched[1] or len(matched[1]) > LONGEST_REPOSITORY:
        return None
    return Repository(matched[1], matched[2] or constants.DEFAULT_REVISION)


def paddlenlp_cache() -> Path:
    """Where PaddleNLP keeps models by their names."""
    home = os.environ.get("PPNLP_HOME") or os.path.expanduser("~/.paddlenlp")
    return Path(home).expanduser() / "models"


def weights_files(listed: Sequence[str]) -> list[str]:
    """The files of the first form of WEIGHT_FORMS that a folder has."""
    forms = ([file for file in listed if re.fullmatch(form, file)] for form in WEIGHT_FORMS)
    return next((files for files in forms if files), [])


def relative_files(folder: Path) -> list[str]:
    """The files in a folder and the folders in it, as paths relative to it."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def unknown_files(repository: Repository, snapshot: Path, weights: bool) -> list[str]:
    """The files that a cached snapshot may lack: neither there, nor noted as absent from the repository."""
    cached = set(relative_files(snapshot))
    absent = repository.cache / ".no_exist" / snapshot.name  # huggingface_hub's notes
    needed = [file for file in SMALL_FILES if file != TOKENIZER_FILE or VOCABULARY_FILE not in cached]
    for folder, kind in module_folders(snapshot).items():
        needed.append(f"{folder}/{BACKBONE_CONFIG_FILE}")
        if kind.endswith("Dense"):
            needed += [f"{folder}/{file}" for file in missing_weights(snapshot / folder)]
    needed += missing_weights(snapshot) if weights else []
    return [file for file in needed if file not in cached and not (absent / file).exists()]


def missing_weights(folder: Path) -> list[str]:
    """The weights files that a folder lacks, "weights" if it has none; shards are those that its index names."""
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    found = weights_files(names)
    index = next((name for name in found if name.endswith(".index.json")), None)
    if index is None:
        return ["weights"] if not found or "-of-" in found[0] else []
    weight_map = read_json(folder / index).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return sorted(shards.difference(names))


def module_folders(snapshot: Path) -> dict[str, str]:
    """The folders of sentence-transformers' modules that follow the encoder -> their type."""
    try:
        modules = json.loads((snapshot / MODULES_FILE).read_text(encoding="utf-8"))
        folders = {str(module["path"]): str(module["type"]) for module in modules}
    except (OSError, ValueError, TypeError, KeyError):  # whoever reads the folder says what is wrong with it
        return {}
    return {folder: kind for folder, kind in folders.items() if re.fullmatch(MODULE_FOLDER, f"{folder}/")}
