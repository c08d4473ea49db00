"""The CPU's features and cores, and the memory that its C library keeps."""

import subprocess
import sys

import pytest

from common import cpu
from common.cpu import cpu_count, cpu_flags, cpu_threads, has_bf16
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
keep_freed_memory()
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
