"""Variables, limits and homes that third parties would stumble over, dealt with before their import. No Paddle here."""

import atexit
import contextlib
import os
import resource
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.files import scratch_folder
from common.logs import log

LEAST_ADDRESS_SPACE = 2 << 30  # bytes; Paddle and PaddleNLP map 1.6 GB of files, stacks and heaps
MOST_THREADS = 1024  # OpenMP ends the process if it can't start them all
RANK_VARIABLES = {"PADDLE_TRAINERS_NUM": 1, "PADDLE_TRAINER_ID": 0, "PADDLE_LOCAL_SIZE": 1}  # with their least values
LAUNCHER_VARIABLES = ("PADDLE_TRAINER_ID", "PADDLE_CURRENT_ENDPOINT", "PADDLE_TRAINER_ENDPOINTS")  # with several ranks
ALLOCATORS = ("auto_growth", "naive_best_fit", "thread_local")
# Folders in HOME: Paddle makes the first at its import and writes into the second in an export; VisualDL, in training.
HOME_FOLDERS = (".cache/paddle/dataset", ".cache/paddle/to_static_tmp", ".visualdl/conf")
PPNLP_FOLDERS = ("models", "datasets", "packages")  # in PPNLP_HOME; PaddleNLP makes them at its import
HUB_CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")  # by which huggingface_hub finds its cache
BLOCK_BYTES = 4096  # written to see whether a disk has room

_cleanup = contextlib.ExitStack()  # removes the process's folders


class Override(NamedTuple):
    """A variable that makes a script fail, or changes its speed or result unseen."""

    harmless: tuple[str, ...]  # values that it keeps, in lower case
    value: str | None  # what replaces other values; None: the variable is removed
    why: str


_ON, _OFF = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")
_PINS = Override(("false", "none", "disabled"), None, "it would put all threads on one core; choose cores with taskset")
_ROUNDS = Override(("strict",), None, "it would round in fp32, too; use --precision")
OVERRIDES = {
    "FLAGS_enable_pir_api": Override(_ON, "1", "exports and the static engine need Paddle's new IR"),
    "FLAGS_enable_api_kernel_fallback": Override(_ON, "1", "oneDNN lacks kernels that the static engine needs"),
    # In Paddle 3.3 each step of the optimizer then renames the parameters, by whose names AdamW keeps its moments.
    "GLOG_v": Override(("0", "1", "2", "3", "4", "5"), None, "from 6 on, Paddle's optimizer loses its state"),
    "GLOG_vmodule": Override((), None, "Paddle's optimizer may lose its state, as with GLOG_v=6"),
    "FLAGS_enable_unique_name": Override(_OFF, None, "Paddle's optimizer would lose its state"),
    # Paddle loads libgomp and libiomp. The one binds the first thread to a core, and the other's threads inherit that.
    **dict.fromkeys(("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"), _PINS),
    # https://uxlfoundation.github.io/oneDNN/dev_guide_attributes_fpmath_mode.html
    **dict.fromkeys(("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"), _ROUNDS),
}


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Checks the process's environment and limits, and changes in `environ` what third parties would stumble over.

    Logs a line for each variable of the user that has no effect. Raises InputError, also without a temporary folder
    that takes the place of a home that can't be written.
    """
    check_limits(environ)
    check_ranks(environ)
    check_working_folder()
    if "PADDLE_TRAINER_ID" in environ and environ.get("PADDLE_TRAINERS_NUM", "1") == "1":
        environ["PADDLE_TRAINER_ID"] = "0"  # left over from a launcher: as another rank, this process would wait
    for name, override in OVERRIDES.items():
        value = environ.get(name, "").strip()
        if value and value.lower() not in override.harmless:
            log(f"{name}={value}: is ignored, because {override.why}")
            del environ[name]
            environ.update({name: override.value} if override.value else {})
    environ.update(writable_homes(environ))


def check_limits(environ: Mapping[str, str]) -> None:
    """Raises InputError for a limit or variable with which Paddle would fail or end the process."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit not in (resource.RLIM_INFINITY, -1) and limit < LEAST_ADDRESS_SPACE:
        least = LEAST_ADDRESS_SPACE >> 10
        raise InputError(f"ulimit -v {limit >> 10}: Paddle needs more; set it to {least} or more, or to unlimited")
    allocator = environ.get("FLAGS_allocator_strategy", ALLOCATORS[0])
    if allocator not in ALLOCATORS:
        raise InputError(f"FLAGS_allocator_strategy={allocator}: is none of {', '.join(ALLOCATORS)}; unset it")


def check_ranks(environ: Mapping[str, str]) -> None:
    """Raises InputError for variables of Paddle's launcher that it can't have set."""
    remedy = "unset it, or start with python -m paddle.distributed.launch"
    for name, least in RANK_VARIABLES.items():
        value = environ.get(name, str(least))
        if not value.isdecimal() or int(value) < least:
            raise InputError(f"{name}={value}: isn't a number of {least} or more; {remedy}")
    count = int(environ.get("PADDLE_TRAINERS_NUM", "1"))
    missing = [name for name in LAUNCHER_VARIABLES if not environ.get(name)]
    if count > 1 and missing:
        raise InputError(f"PADDLE_TRAINERS_NUM={count}: {missing[0]} is missing beside it; {remedy}")
    if count > 1 and int(environ["PADDLE_TRAINER_ID"]) >= count:
        problem = f"PADDLE_TRAINER_ID={environ['PADDLE_TRAINER_ID']}: PADDLE_TRAINERS_NUM={count} has no such process"
        raise InputError(f"{problem}; {remedy}")


def check_working_folder() -> None:
    """Raises InputError for a working folder that Paddle can't use: it takes the full paths of what it writes."""
    try:
        folder = os.getcwd()
        folder.encode("utf-8")
    except FileNotFoundError:
        raise InputError("the working folder has been removed; change to another one with cd") from None
    except UnicodeEncodeError:
        raise InputError(
            f"{folder!a}: the working folder's name isn't UTF-8; rename it, or change to another"
        ) from None


def given_threads(environ: Mapping[str, str]) -> int | None:
    """The threads that OMP_NUM_THREADS asks for; None if it is missing or blank. Raises InputError for other texts."""
    text = environ.get("OMP_NUM_THREADS", "")
    first = text.split(",")[0].strip()  # in a list, the others are for nested regions, which Paddle has none of
    if not text.strip():
        return None
    if not first.isdecimal() or not 1 <= int(first) <= MOST_THREADS:
        raise InputError(f"OMP_NUM_THREADS={text}: isn't a number from 1 to {MOST_THREADS}; correct it, or unset it")
    return int(first)


def writable_homes(environ: Mapping[str, str]) -> dict[str, str]:
    """HOME and PPNLP_HOME for libraries that write there at their import, where the user's can't be written.

    They are in a temporary folder until the process ends. PaddleNLP still finds the models in its usual folder, but
    doesn't download any that would be lost. Raises InputError if there is no temporary folder.
    """
    home = Path(environ["HOME"] if environ.get("HOME") else os.path.expanduser("~"))
    ppnlp_home = Path(environ["PPNLP_HOME"]).expanduser() if environ.get("PPNLP_HOME") else home / ".paddlenlp"
    home_is_fine = home.is_absolute() and all(can_be_written(home / folder) for folder in HOME_FOLDERS)
    ppnlp_is_fine = all(os.path.isdir(ppnlp_home / name) for name in PPNLP_FOLDERS) or can_be_written(ppnlp_home)
    if home_is_fine and ppnlp_is_fine:
        return {"PPNLP_HOME": str(ppnlp_home)} if "PPNLP_HOME" in environ else {}
    temporary = folder_of_process()
    if not ppnlp_is_fine:
        usual, ppnlp_home = ppnlp_home, temporary / "paddlenlp"
        ppnlp_home.mkdir()
        for name in PPNLP_FOLDERS:
            if os.path.isdir(usual / name):
                (ppnlp_home / name).symlink_to(usual.absolute() / name)
            else:
                (ppnlp_home / name).touch()  # not a folder, so nothing is downloaded into it
    changes = {"PPNLP_HOME": str(ppnlp_home)}
    if not home_is_fine:
        changes["HOME"] = str(temporary)
        if not any(environ.get(name) for name in HUB_CACHE_VARIABLES):  # models of the hub are still found
            changes["HF_HOME"] = str(home / ".cache/huggingface")
    return changes


def folder_of_process() -> Path:
    """A new folder that is removed when the process ends, or by `remove_temporary_home`. Raises InputError."""
    atexit.register(remove_temporary_home)
    return _cleanup.enter_context(scratch_folder())


def remove_temporary_home() -> None:
    """Removes the folders of `folder_of_process`, if any; for processes that end with `os._exit`."""
    _cleanup.close()


def can_be_written(folder: Path) -> bool:
    """Whether files can be written in a folder, which may have to be created first, and its disk has room."""
    # os.path, because Path.exists fails in a folder without permission.
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(BLOCK_BYTES))
            file.flush()
    except OSError:
        return False
    return True
