"""From a model's name to a local folder: PaddleNLP's names, and repositories of the Hugging Face hub.

What a cache has is used from there, without a network. A branch is therefore not followed once it is in the cache.
"""

import contextlib
import difflib
import importlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers

from common.distributed import barrier
from common.downloads import NOT_A_HUB, DownloadError, RemoteFile, described_errors, download, look_up, timeouts
from common.environment import can_be_written, folder_of_process
from common.errors import InputError
from common.files import write_json
from common.logs import is_main_process, log, process_count
from data import BACKBONE_CONFIG_FILE, TOKENIZER_CONFIG_FILE, VOCABULARY_FILE
from modeling.checkpoint_files import PADDLE_WEIGHTS
from modeling.model_cache import (
    COMMIT,
    MODULE_FOLDER,
    SMALL_FILES,
    Repository,
    cached_folder,
    missing_weights,
    module_folders,
    named_repository,
    paddlenlp_cache,
    unknown_files,
    weights_files,
)
from modeling.sentence_transformers_folder import MODULES_FILE
from modeling.tokenizer_files import TOKENIZER_FILE

UNUSABLE_FORMS = {  # a file's name -> what a repository is that has such a file and no usable weights
    r"adapter_config\.json": "is a LoRA adapter without the model itself; merge it into its base model first",
    r".*\.gguf": "has weights in the GGUF form only",
    r"(tf_model.*\.h5|flax_model.*\.msgpack)": "has weights of TensorFlow or Flax only",
    r"(.*/)?[^/]*\.onnx": "has an ONNX model only",
}
NEED_WEIGHTS = "need model.safetensors, pytorch_model.bin or model_state.pdparams"
# PaddlePaddle's own copies on the hub of models that PaddleNLP knows by name: huggingface.co/PaddlePaddle.
HUB_COPIES = {
    "ernie-1.0": "PaddlePaddle/ernie-1.0-base-zh",
    **{
        name: f"PaddlePaddle/{name}"
        for name in (
            "ernie-1.0-base-zh",
            "ernie-1.0-large-zh-cw",
            "ernie-2.0-base-zh",
            "ernie-2.0-base-en",
            "ernie-2.0-large-en",
            "ernie-3.0-base-zh",
            "ernie-3.0-medium-zh",
            "ernie-3.0-micro-zh",
            "ernie-3.0-nano-zh",
        )
    },
}


class NamedModel(NamedTuple):
    """What PaddleNLP's tables say about a name."""

    config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    urls: dict[str, str]  # VOCABULARY_FILE and PADDLE_WEIGHTS -> its address


def model_folder(name_or_path: str | Path, *, tokenizer: bool = True, weights: bool = False) -> Path:
    """The local folder of a model: the path itself if it exists, else that of a name, which may be downloaded.

    tokenizer, weights: whether they are needed, besides the config. Under a launcher rank 0 downloads, and the others
    wait. Raises InputError.
    """
    if os.path.exists(name_or_path):  # Path.exists fails on some names
        return Path(name_or_path)
    needed = {"tokenizer": tokenizer, "weights": weights}
    folder = _folder_of_name(str(name_or_path), **needed) if is_main_process() else None
    if process_count() > 1:
        barrier()
    return folder or _folder_of_name(str(name_or_path), **needed)  # downloads only on another machine


def _folder_of_name(name: str, tokenizer: bool, weights: bool) -> Path:
    if folder := cached_folder(name, tokenizer=tokenizer, weights=weights):
        return folder
    if "/" not in name and "@" not in name:
        return _paddlenlp_folder(name, tokenizer, weights)
    if repository := named_repository(name):
        return _hub_folder(repository, name, weights)  # its small files come together
    raise InputError(f"{name}: is no folder here, and no owner/name or owner/name@revision of the Hugging Face hub")


# ---------------------------------------------------------------------------------------------------------------------
# The Hugging Face hub


def _hub_folder(repository: Repository, name: str, weights: bool) -> Path:
    """The snapshot of a repository, with what was missing downloaded. name: as the user gave it."""
    snapshot = repository.snapshot()
    try:
        return _download_snapshot(repository, name, snapshot, weights)
    except DownloadError as error:
        has_config = snapshot and (snapshot / BACKBONE_CONFIG_FILE).is_file()
        if snapshot and has_config and not (weights and missing_weights(snapshot)):
            unknown = ", ".join(unknown_files(repository, snapshot, weights))
            log(f"{name}: {repository.page} can't be asked ({error}); using {snapshot} without {unknown}")
            return snapshot
        files = f"{BACKBONE_CONFIG_FILE}, {VOCABULARY_FILE} (or {TOKENIZER_FILE}) and the weights"
        problem = f"is no folder here, and can't be downloaded ({repository.page}: {error})"
        remedy = f"set HF_ENDPOINT to a mirror of the hub, or put {files} into a folder by hand, and give that"
        raise InputError(f"{name}: {problem}; {_remedy_of(error) or remedy}") from None


def _remedy_of(error: Exception) -> str | None:
    """What helps where the hub refuses a repository; None if it can't be reached."""
    cause = error.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return "unset it to download the model, or give a local folder"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, GatedRepoError):
        return "it is gated: accept its conditions on that page, and set HF_TOKEN to your token"
    if isinstance(cause, RevisionNotFoundError):
        return "check the revision after the @"
    if isinstance(cause, RepositoryNotFoundError):
        return "check the name; if the repository is private, set HF_TOKEN to a token that may read it"
    if status in (401, 403):
        return "set HF_TOKEN to a token that may read it"
    return None


def _download_snapshot(repository: Repository, name: str, snapshot: Path | None, weights: bool) -> Path:
    """Downloads what a cached snapshot lacks, and returns it. Raises DownloadError, and InputError for a repository."""
    revision = snapshot.name if snapshot else repository.revision  # a branch may have moved since
    try:
        with described_errors():
            api = HfApi(endpoint=constants.ENDPOINT)
            info = api.model_info(repository.name, revision=revision, timeout=timeouts()[1])
        listed = [sibling.rfilename for sibling in info.siblings or []]
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # JSON of something else
        raise DownloadError(NOT_A_HUB) from error
    if missing := _missing_files(listed, weights):
        raise InputError(f"{name}: {repository.page} {_what_it_is(listed) or missing}")
    if not re.fullmatch(COMMIT, str(info.sha)):
        raise DownloadError("it names no commit")
    snapshot = repository.cache / "snapshots" / str(info.sha)
    wanted = [file for file in _files_to_take(listed, weights) if not (snapshot / file).exists()]
    if wanted:
        _check_writable(repository.cache, name, "HF_HOME")
    found = _look_up_all(_hub_urls(repository, snapshot.name, wanted), build_hf_headers())
    names = {file: _blob_name(remote.etag, f"{info.sha}-{file}") for file, remote in found.items()}
    blobs = {file: repository.cache / "blobs" / name for file, name in names.items()}
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / repository.cache.name / "semantic_index.lock"
    pairs = [(remote, blobs[file]) for file, remote in found.items()]
    download(pairs, name, lock, "free some, or set HF_HOME to a folder on another disk")
    for file, blob in blobs.items():
        pointer = snapshot / file
        pointer.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # by another process meanwhile, or the blob had been deleted
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    with contextlib.suppress(OSError):  # a cache that can't be written, and lacks nothing: the next run asks again
        _note_absent_files(repository, snapshot, listed)
        if not re.fullmatch(COMMIT, repository.revision):  # last, since it makes the snapshot known
            reference = repository.cache / "refs" / repository.revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(snapshot.name, encoding="utf-8")
    return snapshot


def _blob_name(etag: str, otherwise: str) -> str:
    """The name of a file in huggingface_hub's cache: its checksum, or another one for an etag that is none."""
    return etag if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag) else re.sub(r"[^\w-]", "_", otherwise)


def _look_up_all(urls: Mapping[str, str], headers: Mapping[str, str]) -> dict[str, RemoteFile]:
    """What servers say about files. urls: file -> its address. Raises DownloadError."""
    found = {}
    for file, url in urls.items():
        try:
            found[file] = look_up(url, headers)
        except DownloadError as error:
            raise DownloadError(f"{file}: {error}") from error.__cause__
    return found


def _hub_urls(repository: Repository, revision: str, files: Iterable[str]) -> dict[str, str]:
    return {file: f"{repository.page}/resolve/{quote(revision, safe='')}/{quote(file)}" for file in files}


def _files_to_take(listed: Sequence[str], weights: bool) -> list[str]:
    """Those of a repository's files that we need."""
    taken = [file for file in SMALL_FILES if file in listed]
    if VOCABULARY_FILE in taken and TOKENIZER_FILE in taken:
        taken.remove(TOKENIZER_FILE)
    folders = {file.partition("/")[0] for file in listed if re.match(MODULE_FOLDER, file)}
    for folder in sorted(folders) if MODULES_FILE in listed else ():
        of_module = [file.removeprefix(f"{folder}/") for file in listed if file.startswith(f"{folder}/")]
        taken += [f"{folder}/{file}" for file in (BACKBONE_CONFIG_FILE, *weights_files(of_module)) if file in of_module]
    return taken + (weights_files(listed) if weights else [])


def _missing_files(listed: Sequence[str], weights: bool) -> str:
    """What a repository lacks to be used, for a message; empty if nothing."""
    if BACKBONE_CONFIG_FILE not in listed:
        return f"has no {BACKBONE_CONFIG_FILE}; need a BERT or ERNIE encoder in PaddleNLP's or Hugging Face's form"
    return f"has no weights; {NEED_WEIGHTS}" if weights and not weights_files(listed) else ""


def _what_it_is(listed: Sequence[str]) -> str | None:
    """Why a repository without config or usable weights can't be used."""
    if weights_files(listed):
        return None
    found = (text for form, text in UNUSABLE_FORMS.items() if any(re.fullmatch(form, file) for file in listed))
    return next((f"{text}; {NEED_WEIGHTS}" for text in found), None)


def _note_absent_files(repository: Repository, snapshot: Path, listed: Sequence[str]) -> None:
    """Notes, as huggingface_hub does, which files a repository doesn't have, so that nobody has to ask again."""
    modules = [f"{folder}/{BACKBONE_CONFIG_FILE}" for folder in module_folders(snapshot)]
    for file in {*SMALL_FILES, *modules}.difference(listed):
        note = repository.cache / ".no_exist" / snapshot.name / file
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _check_writable(folder: Path, name: str, variable: str) -> None:
    if not can_be_written(folder):  # `writable_homes` also makes it a file
        problem = f"{name}: is no folder here, and can't be downloaded into {folder}"
        raise InputError(f"{problem}; set {variable} to a folder that can be written, or give a local folder")


# ---------------------------------------------------------------------------------------------------------------------
# PaddleNLP's names


def _paddlenlp_folder(name: str, tokenizer: bool, weights: bool) -> Path:
    """The folder of a name of PaddleNLP in its cache, with what was missing downloaded."""
    model = _named_model(name)
    folder = paddlenlp_cache() / name
    wanted = [*([VOCABULARY_FILE] if tokenizer else []), *([PADDLE_WEIGHTS] if weights else [])]
    if missing := [file for file in wanted if file not in model.urls]:
        raise InputError(f"{name}: PaddleNLP has no {missing[0]} for this name; give a local folder")
    # Earlier versions of PaddleNLP named a file as its address does.
    others = {file: folder / urlsplit(model.urls[file]).path.rpartition("/")[2] for file in wanted}
    missing = [file for file in wanted if not (folder / file).is_file() and not others[file].is_file()]
    if missing:
        _check_writable(folder, name, "PPNLP_HOME")
        _download_named(name, {file: model.urls[file] for file in missing}, folder)
    links = {file: others[file] for file in wanted if not (folder / file).is_file()}
    configs = {BACKBONE_CONFIG_FILE: model.config, TOKENIZER_CONFIG_FILE: model.tokenizer_config}
    configs = {file: content for file, content in configs.items() if not (folder / file).is_file()}
    if not can_be_written(folder):  # a full cache that others share: a folder of our own refers to it
        links = {path.name: path for path in folder.glob("[!.]*") if path.is_file()} | links
        folder = folder_of_process()
    for file, target in links.items():
        with contextlib.suppress(FileExistsError):  # by another process meanwhile
            (folder / file).symlink_to(target.absolute())
    for file, content in configs.items():
        write_json(folder / file, content)
    return folder


def _download_named(name: str, urls: Mapping[str, str], folder: Path) -> None:
    """Downloads files of a name of PaddleNLP: from their addresses or, if those fail, from the hub's copy."""
    host = "{0.scheme}://{0.netloc}".format(urlsplit(next(iter(urls.values()))))
    sources: list[tuple[str, Mapping[str, str], dict[str, str]]] = [(host, urls, {})]
    if name in HUB_COPIES:
        copy = Repository(HUB_COPIES[name], constants.DEFAULT_REVISION)
        sources.append((copy.page, _hub_urls(copy, copy.revision, urls), build_hf_headers()))
    tried = []
    for page, addresses, headers in sources:
        try:
            pairs = [(remote, folder / file) for file, remote in _look_up_all(addresses, headers).items()]
            download(pairs, name, folder / ".lock", "free some, or set PPNLP_HOME to a folder on another disk")
        except DownloadError as error:
            tried.append(f"{page}: {error}")
        else:
            if tried:
                log(f"{name}: PaddleNLP's address can't be used ({tried[0]}); took {page}")
            return
    by_hand = f"put {' and '.join(urls)} into {folder} by hand, or give a local folder"
    mirror = "set HF_ENDPOINT to a mirror of the hub, " if name in HUB_COPIES else ""
    raise InputError(f"{name}: is no folder here, and can't be downloaded ({'; '.join(tried)}); {mirror}{by_hand}")


def _named_model(name: str) -> NamedModel:
    """What PaddleNLP's tables say about a name. Raises InputError if they don't have it, or no vocab.txt for it."""
    # Only here, because modeling.backbone has to import PaddleNLP first.
    from paddlenlp.transformers import AutoConfig
    from paddlenlp.transformers.auto.configuration import MODEL_NAMES_MAPPING

    configs = [config for of_module in AutoConfig.MAPPING_NAMES.values() for config in of_module]
    by_name = {known: config for config in configs for known in config.pretrained_init_configuration}
    if name not in by_name:
        similar = difflib.get_close_matches(name, [*by_name, *HUB_COPIES], n=1)
        problem = f"{name}: is no folder here, and PaddleNLP has no model of that name"
        remedy = f"did you mean {similar[0]}?" if similar else "check the name, or give a local folder"
        raise InputError(f"{problem}, nor the Hugging Face hub, whose names are owner/name; {remedy}")
    config_class = by_name[name]
    package = config_class.__module__.rpartition(".")[0]
    modeling = importlib.import_module(f"{package}.modeling")
    model_class = getattr(modeling, f"{MODEL_NAMES_MAPPING[config_class.model_type]}Model", None)
    weights = getattr(model_class, "pretrained_resource_files_map", {}).get("model_state", {}).get(name)
    vocabulary, tokenizer_config = _named_vocabulary(name, f"{package}.tokenizer")
    if not vocabulary or not vocabulary.endswith(".txt"):
        raise InputError(f"{name}: its tokenizer has no {VOCABULARY_FILE}; need a WordPiece tokenizer")
    config = {"model_type": config_class.model_type, **config_class.pretrained_init_configuration[name]}
    urls = {VOCABULARY_FILE: vocabulary, **({PADDLE_WEIGHTS: weights} if weights else {})}
    return NamedModel(config, tokenizer_config, urls)


def _named_vocabulary(name: str, module: str) -> tuple[str | None, dict[str, Any]]:
    """The address of the vocabulary, and the settings, of the first tokenizer in PaddleNLP's module with that name."""
    for tokenizer in vars(importlib.import_module(module)).values():
        files = getattr(tokenizer, "pretrained_resource_files_map", {})
        if url := files.get("vocab_file", {}).get(name):
            return url, dict(tokenizer.pretrained_init_configuration.get(name, {}))
    return None, {}
