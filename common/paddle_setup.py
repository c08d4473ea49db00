"""Settings that have to be made before Paddle and PaddleNLP are imported."""

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from common.cpu import cpu_count, cpu_flags, keep_freed_memory, read_cpuinfo

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # the features that MKL calls AVX-512
IRRELEVANT_WARNINGS = (
    "No ccache found",
    "Setuptools is replacing distutils",
    "pkg_resources is deprecated",
    "Tensor do not have 'place' interface",  # from PaddleNLP's BERT in an export
)


def set_up_paddle() -> None:
    """Sets memory, threads and CPU dispatch, then imports Paddle; does nothing if Paddle has been imported already.

    Hides IRRELEVANT_WARNINGS from then on, and everything that Python prints on stderr during the import.
    """
    if "paddle" in sys.modules:
        return
    keep_freed_memory()
    os.environ.update(cpu_environment(os.environ, read_cpuinfo(), cpu_count()))
    os.environ.setdefault("GLOG_minloglevel", "2")
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    with _prepared_for_import(), contextlib.redirect_stderr(io.StringIO()):
        paddle = importlib.import_module("paddle")
        paddle.disable_signal_handler()  # it prints a C++ stack on SIGTERM; PaddleNLP disables it too


def cpu_environment(environ: Mapping[str, str], cpuinfo: str, cores: int) -> dict[str, str]:
    """The environment variables that make Paddle use the whole CPU, except those that the user has set.

    environ: the process's environment; cpuinfo: the text of /proc/cpuinfo; cores: how many this process may use.

    Paddle's launcher sets OMP_NUM_THREADS=1 for its ranks, so under it a 1 isn't taken for the user's choice. The ranks
    on this machine divide the cores.
    """
    under_launch = "PADDLE_TRAINER_ID" in environ
    chosen = {}
    if "OMP_NUM_THREADS" not in environ or (under_launch and environ["OMP_NUM_THREADS"] == "1"):
        chosen["OMP_NUM_THREADS"] = str(max(1, cores // int(environ.get("PADDLE_LOCAL_SIZE", "1"))))
    if "MKL_DEBUG_CPU_TYPE" not in environ and "AuthenticAMD" in cpuinfo:
        # On AMD the MKL inside the Paddle wheel takes a slow path; this variable selects a faster one (7: AVX-512,
        # 5: AVX2). A type that the CPU lacks causes an illegal instruction, so its flags are checked first.
        flags = cpu_flags(cpuinfo)
        if AVX512.issubset(flags):
            chosen["MKL_DEBUG_CPU_TYPE"] = "7"
        elif "avx2" in flags:
            chosen["MKL_DEBUG_CPU_TYPE"] = "5"
    return chosen


@contextlib.contextmanager
def _prepared_for_import() -> Iterator[None]:
    """Inside this block SIGINT and SIGTERM end the process: an exception of their handler would become an ImportError.

    Garbage collection is off, since it would take a sixth of the import's time.
    """
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):  # not SIG_DFL, SIG_IGN or a C handler
                handlers[number] = handler
                signal.signal(number, signal.SIG_DFL)
    collects_garbage = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects_garbage:
            gc.enable()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def defer_paddlenlp() -> None:
    """Lets PaddleNLP's submodules be imported without running `paddlenlp/__init__.py`; import `paddlenlp.data` first.

    That file imports taskflow, datasets and data augmentation, and with them scikit-learn, pandas and pyarrow: half of
    the import time. It runs when an attribute is first missing, as in `from paddlenlp import Taskflow`. Does nothing if
    PaddleNLP has been imported already.
    """
    if "paddlenlp" in sys.modules:
        return
    spec = importlib.util.find_spec("paddlenlp")
    if spec is None or spec.loader is None:  # not installed: the import itself says so
        return
    # Not importlib's LazyLoader: importing a submodule would make it run the package's code.
    package, loader = importlib.util.module_from_spec(spec), spec.loader
    namespace = vars(package)

    def load_all(name: str) -> Any:
        if name.startswith("__"):  # the import system looks for optional attributes such as __file__
            raise AttributeError(name)
        del namespace["__getattr__"]
        loader.exec_module(package)
        return getattr(package, name)

    namespace["__getattr__"] = load_all  # PEP 562
    namespace["__version__"] = importlib.metadata.version("paddlenlp")  # its modules import this
    sys.modules["paddlenlp"] = package
