"""The CPU's cores and features, and the memory that the C library keeps."""

import ctypes
import math
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def cpu_count(root: Path = Path("/")) -> int:
    """The number of cores that this process may use: those of its affinity, and no more than its control group's quota.

    A part of a core counts as one, as in the JVM. root: the folder of /proc and /sys.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [math.inf]
    for group in _control_groups("cpu", root):
        numbers = _read_numbers(group / "cpu.max")
        if not numbers:  # version 1, whose quota is -1 without a limit
            numbers = [*_read_numbers(group / "cpu.cfs_quota_us"), *_read_numbers(group / "cpu.cfs_period_us")]
        if len(numbers) == 2 and min(numbers) > 0:
            quotas.append(numbers[0] / numbers[1])
    return math.ceil(min(cores, *quotas))


def memory_limit(root: Path = Path("/")) -> float:
    """The bytes of memory that this process may use: the machine's or, if that is less, its control group's limit."""
    limits = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    for group in _control_groups("memory", root):
        limits += _read_numbers(group / "memory.max") + _read_numbers(group / "memory.limit_in_bytes")
    return min(limits)


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders, which may be missing, of this process's control group and those above it, in versions 1 and 2.

    A container may see the path that its group has outside of it, while its own is at the top: each is tried.
    """
    mount = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    for line in (*lines, "0::/", f"1:{controller}:/"):
        _, controllers, path = line.split(":", 2)  # version 2 names no controllers
        if not controllers or controller in controllers.split(","):
            top = mount / controller if controllers else mount
            group = Path(path.strip("/"))
            yield from (top / folder for folder in (group, *group.parents))


def _read_numbers(file: Path) -> list[float]:
    """The numbers in a file of a control group; none if it is missing."""
    try:
        return [math.inf if word == "max" else float(word) for word in file.read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        return []


def cpu_threads() -> int:
    """The number of threads to compute with: OMP_NUM_THREADS, which `set_up_paddle` checks, else one per core."""
    return int(os.environ.get("OMP_NUM_THREADS", cpu_count()))


def read_cpuinfo() -> str:
    """The text of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def cpu_flags(cpuinfo: str) -> set[str]:
    """The names of the CPU's features, such as avx2, in the text of /proc/cpuinfo."""
    return {flag for line in cpuinfo.splitlines() if line.startswith("flags") for flag in line.split()}


def cpu_name() -> str:
    """The processor's name in /proc/cpuinfo, else the machine's architecture."""
    fields = dict(line.partition(":")[::2] for line in read_cpuinfo().splitlines())
    names = {name.strip(): value.strip() for name, value in fields.items()}
    return names.get("model name") or platform.machine()


def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply in bfloat16.

    On other CPUs with AVX-512, oneDNN converts to float32 and back, which is no faster than float32
    (https://docs.openvino.ai/2021.4/openvino_docs_IE_DG_Bfloat16Inference.html).
    """
    return "avx512_bf16" in cpu_flags(read_cpuinfo())


def keep_freed_memory(environ: Mapping[str, str]) -> None:
    """Makes glibc's malloc reuse the memory of freed tensors; does nothing with another C library or malloc.

    Leaves the thresholds that `environ`, the process's environment, sets, for example by MALLOC_TRIM_THRESHOLD_.

    By default glibc maps memory for each large tensor and unmaps it after use, and the kernel zeroes the pages every
    time: an element-wise operation on 16 MB then takes 2 to 7 times as long. The price is that the process keeps its
    peak memory until it ends or calls `release_freed_memory`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not mallopt:
        return
    tunables = environ.get("GLIBC_TUNABLES", "")
    has_threshold = "MALLOC_MMAP_THRESHOLD_" in environ or "malloc.mmap_threshold" in tunables
    if not has_threshold and not mallopt(M_MMAP_THRESHOLD, 1 << 30):
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that older versions of glibc accept
    if "MALLOC_TRIM_THRESHOLD_" not in environ and "malloc.trim_threshold" not in tunables:
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def release_freed_memory() -> None:
    """Returns the memory that malloc keeps to the system; takes 0.1 s per gigabyte."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)
