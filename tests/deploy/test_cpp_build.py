"""The build of the C++ server, and tests of its parts."""

import gzip
import os
import re
import resource
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from google.protobuf import json_format

from clients import format_frame, make_request
from cpp_helpers import CPP, GOOD, TOKENS
from helpers import ROOT


@pytest.mark.process
def test_cudas_libraries_are_found_where_pip_puts_them(tmp_path: Path) -> None:
    """A GPU build of Paddle asks the linker for them by name."""
    shutil.copytree(CPP, tmp_path / "deploy" / "C++", ignore=shutil.ignore_patterns("build"))
    venv.create(tmp_path / ".venv", symlinks=True)
    (site_packages,) = tmp_path.glob(".venv/lib/*/site-packages")
    folders = [site_packages / "nvidia" / name / "lib" for name in ("cublas", "cudnn")]
    for folder in folders:
        folder.mkdir(parents=True)
    program = tmp_path / "serving"
    program.write_text('#!/bin/sh\necho "$LD_LIBRARY_PATH"\nexit 2\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["sh", tmp_path / "deploy" / "C++" / "start_server.sh"],
        env={**os.environ, "SERVING_BIN": str(program), "LD_LIBRARY_PATH": "/mine"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    *nvidia, mine = done.stdout.strip().split(":")
    assert (sorted(nvidia), mine) == (sorted(map(str, folders)), "/mine")


@pytest.mark.cpp
def test_builds_take_turns_and_paths_may_hold_spaces(tmp_path: Path) -> None:
    """CMake is replaced by a script that fails while another one runs."""
    paddle = tmp_path / "a b*" / "paddle"
    (paddle / "version").mkdir(parents=True)
    (paddle / "__init__.py").touch()
    (paddle / "version" / "__init__.py").write_text("cuda_version = 'False'\n")
    cmake = tmp_path / "cmake"
    cmake.write_text('#!/bin/sh\nmkdir "$0.on" || exit\nprintf "%s\\n" "$@" >>"$0.log"\nsleep 0.3\nrmdir "$0.on"\n')
    cmake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "a b*")}
    command = ["sh", CPP / "build.sh", "--build-dir", tmp_path / "c d", "--python", sys.executable]
    builds = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [build.communicate()[0] for build in builds] == [f"{tmp_path}/c d/serving\n"] * 2
    assert cmake.with_suffix(".log").read_text().splitlines().count(f"-DPADDLE_FOLDER={paddle}") == 2


@pytest.mark.process
def test_missing_packages_are_named(tmp_path: Path) -> None:
    """By build.sh, which installs nothing by default."""
    (tmp_path / "dpkg-query").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "dpkg-query").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", CPP / "build.sh"], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    packages = "g++ cmake make libboost-dev libprotobuf-dev protobuf-compiler zlib1g-dev"
    assert done.stderr == f"error: these packages are missing: sudo apt-get install {packages}\n"


@pytest.mark.process
def test_a_build_of_another_place_is_made_anew(tmp_path: Path) -> None:
    """CMake refuses its cache after the repository was moved or copied."""
    (tmp_path / "dpkg-query").write_text("#!/bin/sh\necho install ok installed\n")
    (tmp_path / "cmake").write_text("#!/bin/sh\nexit 1\n")
    for program in ("dpkg-query", "cmake"):
        (tmp_path / program).chmod(0o755)
    cache = tmp_path / "build" / "CMakeCache.txt"
    cache.parent.mkdir()
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["sh", CPP / "build.sh", "--python", sys.executable, "--build-dir", cache.parent]
    for place, kept in ((cache.parent, True), (tmp_path / "elsewhere", False)):
        cache.write_text(f"CMAKE_CACHEFILE_DIR:INTERNAL={place}\n")
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "the build failed" in done.stderr
        assert cache.exists() == kept


@pytest.mark.cpp
def test_how_texts_are_batched(tmp_path: Path) -> None:
    """batcher_test.cpp ends at the first failed expectation and names it."""
    sources = [ROOT / "tests" / "batcher_test.cpp", CPP / "server" / "batcher.cpp"]
    program = tmp_path / "batcher_test"
    subprocess.run(["g++", "-std=c++17", "-pthread", "-I", CPP / "server", *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.cpp
def test_cores_follow_the_control_groups_quota(tmp_path: Path) -> None:
    """Of both versions, at the process's own group, above it, and at the top, as in a container."""
    program = tmp_path / "cores_test"
    sources = [ROOT / "tests" / "cores_test.cpp", CPP / "server" / "cores.cpp"]
    subprocess.run(["g++", "-std=c++17", "-I", CPP / "server", *sources, "-o", program], check=True)
    all_cores = len(os.sched_getaffinity(0))
    own = {"proc/self/cgroup": "0::/pod/own\n"}
    version_1 = {"proc/self/cgroup": "9:memory:/other\n4:cpu,cpuacct:/pod/own\n"}
    period = {"sys/fs/cgroup/cpu/pod/own/cpu.cfs_period_us": "100000\n"}
    for number, (files, expected) in enumerate(
        [
            ({}, all_cores),
            ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
            ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, all_cores),
            ({**own, "sys/fs/cgroup/pod/own/cpu.max": "100000 100000\n"}, 1),
            ({**own, "sys/fs/cgroup/pod/cpu.max": "1000 100000\n", "sys/fs/cgroup/pod/own/cpu.max": "max 100000\n"}, 1),
            ({**own, "sys/fs/cgroup/pod/own/cpu.max": "100001 100000\n"}, min(2, all_cores)),
            ({**own, "sys/fs/cgroup/pod/own/cpu.max": "nonsense\n"}, all_cores),
            ({**version_1, **period, "sys/fs/cgroup/cpu/pod/own/cpu.cfs_quota_us": "90000\n"}, 1),
            ({**version_1, **period, "sys/fs/cgroup/cpu/pod/own/cpu.cfs_quota_us": "-1\n"}, all_cores),
            ({"proc/self/cgroup": "nonsense\n"}, all_cores),
        ]
    ):
        for name, content in files.items():
            file = tmp_path / str(number) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        done = subprocess.run([program, tmp_path / str(number)], capture_output=True, text=True, check=True)
        assert int(done.stdout) == expected, files


@pytest.mark.cpp
def test_the_parsers_survive_any_input(tmp_path: Path) -> None:
    """libFuzzer, starting from requests that they accept."""
    done = subprocess.run(
        ["sh", CPP / "build.sh", "--fuzz", "--build-dir", tmp_path / "build", "--python", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = json_format.MessageToJson(make_request(TOKENS), preserving_proto_field_name=True).encode()
    for kind, content in enumerate([GOOD, text, format_frame(GOOD), gzip.compress(GOOD)]):
        (corpus / str(kind)).write_bytes(bytes([kind]) + content)
    # It compares the largest memory so far, which a process inherits from the one that starts it.
    limit = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) + 256
    options = ["-max_total_time=15", f"-rss_limit_mb={limit}", "-max_len=4096", "-seed=1", "-print_final_stats=1"]
    done = subprocess.run(
        [done.stdout.strip(), *options, corpus], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)[1]) > 1000
