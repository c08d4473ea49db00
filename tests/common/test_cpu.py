"""The CPU's features and cores, control groups, and the memory that the C library keeps."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import cpu
from common.cpu import cpu_count, cpu_flags, cpu_threads, has_bf16, keep_freed_memory, memory_limit
from helpers import ROOT


def test_flags_are_those_of_the_flags_lines() -> None:
    assert cpu_flags("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx avx2\nbugs\t\t: spectre\n") >= {"avx", "avx2"}
    assert "spectre" not in cpu_flags("flags\t\t: fpu\nbugs\t\t: spectre\n")
    assert cpu_flags("") == set()


@pytest.mark.parametrize(("flags", "expected"), [("avx2 avx512f avx512_bf16", True), ("avx2 avx512f", False)])
def test_bf16_needs_a_flag_of_its_own(monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool) -> None:
    monkeypatch.setattr(cpu, "read_cpuinfo", lambda: f"flags\t\t: {flags}\n")
    assert has_bf16() is expected


def test_threads_are_those_of_the_environment_or_one_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cpu_threads() == cpu_count() >= 1


@pytest.mark.process
def test_freed_memory_is_kept_until_it_is_released() -> None:
    """In a process of its own, whose heap keeps 200 MB."""
    script = """
import numpy as np
from common.cpu import release_freed_memory, keep_freed_memory
def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
keep_freed_memory({})
start = resident_mb()
arrays = [np.ones(1_000_000) for _ in range(25)]
stays = np.ones(1_000_000)  # at the heap's end, so that no part of it can go by itself
del arrays
print(resident_mb() - start > 150)
release_freed_memory()
print(resident_mb() - start < 50, stays.sum())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "1000000.0"]


# ---------------------------------------------------------------------------------------------------------------------
# Control groups

GROUPS = "sys/fs/cgroup"


def make_system(root: Path, files: dict[str, str]) -> Path:
    """A folder with /proc and /sys of a system."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "6400000 100000\n"}, 8),
        # The limit of a group above it, as of a Slurm job or a systemd slice.
        ({"proc/self/cgroup": "0::/job/step\n", f"{GROUPS}/job/cpu.max": "300000 100000\n"}, 3),
        # Version 1 without a limit and with one, and in a container that sees the path outside of it.
        ({"proc/self/cgroup": "3:cpu,cpuacct:/\n", f"{GROUPS}/cpu/cpu.cfs_quota_us": "-1\n"}, 8),
        (
            {
                "proc/self/cgroup": "12:memory:/a\n3:cpuacct,cpu:/docker/1f\n1:name=systemd:/a\n0::/a\n",
                f"{GROUPS}/cpu/cpu.cfs_quota_us": "400000\n",
                f"{GROUPS}/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        # Without /proc, and with files that hold something else.
        ({f"{GROUPS}/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "many 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/cpu.max": "0 0\n"}, 8),
    ],
)
def test_cores_follow_the_quota_of_control_groups(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpu_count(make_system(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", f"{GROUPS}/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": "0::/pod/a\n", f"{GROUPS}/pod/memory.max": "1048576\n"}, 1 << 20),
        ({"proc/self/cgroup": "4:memory:/a\n", f"{GROUPS}/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None),
        ({"proc/self/cgroup": "4:memory:/a\n", f"{GROUPS}/memory/a/memory.limit_in_bytes": "2097152\n"}, 2 << 20),
    ],
)
def test_memory_follows_the_limit_of_control_groups(files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_limit(make_system(tmp_path, files)) == (limit or machine)


@pytest.mark.parametrize(
    ("environ", "set_thresholds"),
    [
        ({}, {cpu.M_MMAP_THRESHOLD, cpu.M_TRIM_THRESHOLD}),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, {cpu.M_TRIM_THRESHOLD}),
        ({"MALLOC_TRIM_THRESHOLD_": "100000"}, {cpu.M_MMAP_THRESHOLD}),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=0:glibc.malloc.arena_max=1"}, {cpu.M_MMAP_THRESHOLD}),
    ],
)
def test_thresholds_of_malloc_that_the_user_sets_stay(
    environ: dict[str, str], set_thresholds: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    library = SimpleNamespace(mallopt=lambda name, _: calls.append(name) or 1)
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: library)
    keep_freed_memory(environ)
    assert set(calls) == set_thresholds
