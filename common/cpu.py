"""The CPU's cores and features, and the memory that the C library keeps."""

import ctypes
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def cpu_count() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_threads() -> int:
    """The number of threads to compute with: OMP_NUM_THREADS, from `set_up_paddle` or the user, else one per core."""
    return int(os.environ.get("OMP_NUM_THREADS", cpu_count()))


def read_cpuinfo() -> str:
    """The text of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def cpu_flags(cpuinfo: str) -> set[str]:
    """The names of the CPU's features, such as avx2, in the text of /proc/cpuinfo."""
    return {flag for line in cpuinfo.splitlines() if line.startswith("flags") for flag in line.split()}


def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply in bfloat16.

    On other CPUs with AVX-512, oneDNN converts to float32 and back, which is no faster than float32
    (https://docs.openvino.ai/2021.4/openvino_docs_IE_DG_Bfloat16Inference.html).
    """
    return "avx512_bf16" in cpu_flags(read_cpuinfo())


def keep_freed_memory() -> None:
    """Makes glibc's malloc reuse the memory of freed tensors; does nothing with another C library.

    By default glibc maps memory for each large tensor and unmaps it after use, and the kernel zeroes the pages every
    time: an element-wise operation on 16 MB then takes 2 to 7 times as long. The price is that the process keeps its
    peak memory until it ends or calls `release_freed_memory`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        if not mallopt(M_MMAP_THRESHOLD, 1 << 30):
            mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that older versions of glibc accept
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def release_freed_memory() -> None:
    """Returns the memory that malloc keeps to the system; takes 0.1 s per gigabyte."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)
