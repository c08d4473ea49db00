"""What must happen before Paddle and PaddleNLP are imported."""

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

    Third-party warnings that don't concern the user are hidden.
    """
    if "paddle" in sys.modules:
        return
    keep_freed_memory()
    os.environ.update(cpu_environment(os.environ, read_cpuinfo(), cpu_count()))
    os.environ.setdefault("GLOG_minloglevel", "2")
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    gc.disable()  # garbage collection takes a sixth of the import's time
    with _default_signals(), contextlib.redirect_stderr(io.StringIO()):  # it warns about any OMP_NUM_THREADS but 1
        paddle = importlib.import_module("paddle")
        paddle.disable_signal_handler()  # it prints a native stack for SIGTERM; paddlenlp/__init__.py does this too
    gc.enable()


def cpu_environment(environ: Mapping[str, str], cpuinfo: str, cores: int) -> dict[str, str]:
    """The variables that make Paddle use the whole CPU, except those that the user has set.

    environ: the process's environment; cpuinfo: the text of /proc/cpuinfo; cores: cores of this machine.

    Under `paddle.distributed.launch` an OMP_NUM_THREADS of 1 counts as unset: importing Paddle in the launcher sets it.
    The ranks on this machine share its cores.
    """
    under_launch = "PADDLE_TRAINER_ID" in environ
    chosen = {}
    if "OMP_NUM_THREADS" not in environ or (under_launch and environ["OMP_NUM_THREADS"] == "1"):
        chosen["OMP_NUM_THREADS"] = str(max(1, cores // int(environ.get("PADDLE_LOCAL_SIZE", "1"))))
    if "MKL_DEBUG_CPU_TYPE" not in environ and "AuthenticAMD" in cpuinfo:
        # On AMD the MKL inside the Paddle wheel takes a slow path; this variable selects a faster one (7: AVX-512,
        # 5: AVX2). A type that the CPU lacks causes an illegal instruction, so its flags are checked first.
        flags = cpu_flags(cpuinfo)
        if flags >= AVX512:
            chosen["MKL_DEBUG_CPU_TYPE"] = "7"
        elif "avx2" in flags:
            chosen["MKL_DEBUG_CPU_TYPE"] = "5"
    return chosen


@contextlib.contextmanager
def _default_signals() -> Iterator[None]:
    """Lets SIGINT and SIGTERM end the process: the import's native part would turn an exception into ImportError."""
    is_main_thread = threading.current_thread() is threading.main_thread()  # no other may set handlers
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if is_main_thread}
    handlers = {n: handler for n, handler in handlers.items() if callable(handler)}  # the others aren't Python's
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def defer_paddlenlp() -> None:
    """Makes `import paddlenlp.data`, then `import paddlenlp.transformers`, skip the rest of PaddleNLP.

    `paddlenlp/__init__.py` imports its taskflow, data sets and data augmentation, and with them scikit-learn, pandas
    and pyarrow: half of its import time. Here the package's own code runs only when an attribute is missing, as in
    `from paddlenlp import Taskflow`. Does nothing if PaddleNLP has been imported already.
    """
    if "paddlenlp" in sys.modules:
        return
    spec = importlib.util.find_spec("paddlenlp")
    if spec is None or spec.loader is None:  # not installed: the import itself says so
        return
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def load_all(name: str) -> Any:
        if name.startswith("__"):  # the import system looks for optional attributes such as __file__
            raise AttributeError(name)
        del vars(package)["__getattr__"]
        loader.exec_module(package)
        return getattr(package, name)

    # Its modules import its version.
    vars(package).update(__version__=importlib.metadata.version("paddlenlp"), __getattr__=load_all)
    sys.modules["paddlenlp"] = package
