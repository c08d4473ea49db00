"""Settings that have to be made before Paddle and PaddleNLP are imported."""

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import io
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from common.cpu import cpu_count, cpu_flags, keep_freed_memory, read_cpuinfo
from common.environment import given_threads, prepare_environment
from common.errors import InputError

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # the features that MKL calls AVX-512
LOADER_VARIABLES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH")  # may bring in libraries that don't fit Paddle's
IRRELEVANT_WARNINGS = (
    "No ccache found",
    "Setuptools is replacing distutils",
    "pkg_resources is deprecated",
    "Tensor do not have 'place' interface",  # from PaddleNLP's BERT in an export
)


def set_up_paddle() -> None:
    """Sets memory, threads and CPU dispatch, then imports Paddle; does nothing if Paddle has been imported already.

    Hides IRRELEVANT_WARNINGS from then on, and everything that Python prints on stderr during the import. Raises
    InputError for an environment that Paddle can't be used in, see `prepare_environment`.
    """
    if "paddle" in sys.modules:
        return
    prepare_environment(os.environ)
    keep_freed_memory(os.environ)
    os.environ.update(cpu_environment(os.environ, read_cpuinfo(), cpu_count()))
    os.environ.setdefault("GLOG_minloglevel", "2")
    # With PYTHONWARNINGS=error the imports of third parties would fail.
    warnings.filters = [each for each in warnings.filters if each[0] != "error"]
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    with _prepared_for_import(), contextlib.redirect_stderr(io.StringIO()):
        try:
            paddle = importlib.import_module("paddle")
        except Exception as error:
            raise _import_failure(error) from None
        paddle.disable_signal_handler()  # it prints a C++ stack on SIGTERM; PaddleNLP disables it too


def _import_failure(error: Exception) -> InputError:
    """The error for a Paddle that can't be imported; it names what in the environment may be the cause."""
    causes = [f"{name}={os.environ[name]}" for name in LOADER_VARIABLES if os.environ.get(name)]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        causes.append(f"ulimit -v {limit >> 10}")
    remedy = f"try without {', '.join(causes)}, or " if causes else ""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"Paddle can't be imported ({reason}); {remedy}set it up with sh scripts/setup.sh")


def cpu_environment(environ: Mapping[str, str], cpuinfo: str, cores: int) -> dict[str, str]:
    """The environment variables that make Paddle use the whole CPU, except those that the user has set.

    environ: the process's environment; cpuinfo: the text of /proc/cpuinfo; cores: how many this process may use.

    Paddle's launcher sets OMP_NUM_THREADS=1 for its ranks, so under it a 1 isn't taken for the user's choice. The ranks
    on this machine divide the cores. Raises InputError for an OMP_NUM_THREADS that isn't a number of threads.
    """
    under_launch = "PADDLE_TRAINER_ID" in environ
    chosen = {}
    threads = given_threads(environ)
    if threads is None or (under_launch and threads == 1):
        threads = max(1, cores // int(environ.get("PADDLE_LOCAL_SIZE", "1")))
    if environ.get("OMP_NUM_THREADS") != str(threads):
        chosen["OMP_NUM_THREADS"] = str(threads)
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
