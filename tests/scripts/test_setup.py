"""scripts/setup.sh, run for real on tiny packages that the tests make, without a network."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers import ROOT, Completed, refuses

pytestmark = pytest.mark.process
NO_NETWORK = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
MODULES = {
    "paddlepaddle": "paddle",
    "paddlepaddle-gpu": "paddle",
    "paddle-serving-server": "paddle_serving_server/__init__",
}
SERVER_FILE = "paddle_serving_server/server.py"
RUN_SERVER = "    def run_server(self):\n        {}\n"


def write_wheel(
    folder: Path, name: str, version: str, tag: str = "py3-none-any", others: Mapping[str, str] | None = None
) -> str:
    """Writes a wheel of one module, and of `others` by their paths; returns its entry for a lock file."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{MODULES.get(name, name.replace('-', '_'))}.py": f"version = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
        **(others or {}),
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{name.replace('-', '_')}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n    # via -r x\n"


class Repo:
    """A copy of the scripts with lock files of tiny packages, which are in wheels/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wheels = path / "wheels"
        self.stamp = path / ".venv/setup/base"

    def write(self) -> "Repo":
        for folder in (
            "wheels",
            "tests",
            "benchmarks",
            "deploy/milvus",
            "deploy/onnx",
            "deploy/openvino",
            "deploy/serving",
        ):
            (self.path / folder).mkdir(parents=True)
        shutil.copytree(ROOT / "scripts", self.path / "scripts")
        names = ("paddlepaddle", "paddlenlp", "jieba", "seqeval", "hnswlib")
        lock = [write_wheel(self.wheels, name, "1.0") for name in names]
        (self.path / "requirements.lock").write_text("# header\n" + "".join(lock))
        (self.path / "tests/requirements.lock").write_text(write_wheel(self.wheels, "pytest", "1.0"))
        (self.path / "deploy/milvus/requirements.lock").write_text(write_wheel(self.wheels, "pymilvus", "1.0"))
        (self.path / "deploy/onnx/requirements.lock").write_text(write_wheel(self.wheels, "onnxruntime", "1.0"))
        (self.path / "deploy/openvino/requirements.lock").write_text(write_wheel(self.wheels, "openvino", "1.0"))
        run_server = {SERVER_FILE: RUN_SERVER.format("os.system(command)")}
        server = write_wheel(self.wheels, "paddle-serving-server", "1.0", others=run_server)
        client = write_wheel(self.wheels, "paddle-serving-client", "1.0", "cp39-none-any")
        (self.path / "deploy/serving/requirements.lock").write_text(server + client)
        write_wheel(self.wheels, "paddlepaddle-gpu", "1.0")
        return self

    def copy(self, path: Path) -> "Repo":
        shutil.copytree(self.path, path, symlinks=True)
        return Repo(path)

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        pip = {"PIP_CONFIG_FILE": os.devnull} | (offline if "PIP_INDEX_URL" not in variables else {})
        return kept | {"PYTHON": sys.executable} | pip | variables

    def start(self, *args: str, script: str = "setup", shell: str = "sh", **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [shutil.which(shell) or shell, self.path / f"scripts/{script}.sh", *args],
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *args: str, **options: str) -> Completed:
        process = self.start(*args, **options)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def installed(self, module: str) -> str | None:
        """The version of `module` in .venv, None if it isn't installed."""
        code = f"import {module}; print({module}.version)"
        done = subprocess.run([self.path / ".venv/bin/python", "-c", code], capture_output=True, text=True)
        return done.stdout.strip() or None


def files_of(folder: Path) -> dict[Path, int]:
    """The time of the last change of each file, except those that Python compiles."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)}


@pytest.fixture
def fresh(tmp_path: Path) -> Repo:
    return Repo(tmp_path / "fresh").write()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repo, list[str]]:
    """A repository that is set up, and the output of two runs that started at the same time."""
    repo = Repo(tmp_path_factory.mktemp("setup") / "ready").write()
    runs = [repo.start(shell="sh"), repo.start(shell="bash")]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    return repo, [out for out, _ in outputs]


@pytest.fixture
def ready(two_runs: tuple[Repo, list[str]], tmp_path: Path) -> Repo:
    return two_runs[0].copy(tmp_path / "ready")


def test_setup_installs_the_lock_once_and_keeps_pip_off_the_screen(two_runs: tuple[Repo, list[str]]) -> None:
    repo, outputs = two_runs
    assert sum("installing requirements.lock" in out for out in outputs) == 1
    assert all(line.startswith("setup: ") for out in outputs for line in out.splitlines())
    assert {repo.installed(name) for name in ("paddle", "paddlenlp", "jieba", "seqeval", "hnswlib")} == {"1.0"}
    assert repo.installed("pytest") is None
    assert "Successfully installed" in (repo.path / ".venv/setup.log").read_text()


def test_second_run_changes_nothing_and_needs_no_network(ready: Repo) -> None:
    before = files_of(ready.path)
    done = ready.run(**NO_NETWORK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "setup: .venv is ready\n", "")
    assert files_of(ready.path) == before


def test_help_makes_nothing(fresh: Repo) -> None:
    done = fresh.run("--help")
    assert done.returncode == 0 and "--gpu" in done.stdout and not done.stderr
    assert not (fresh.path / ".venv").exists()


@pytest.mark.parametrize("args", [["--gpux"], ["extra"], ["--gpu=12.6"], ["--gpu", "cu12"], ["--gpu", "12.6"]])
def test_wrong_option(fresh: Repo, args: list[str]) -> None:
    assert refuses(fresh.run(*args), args[-1].removeprefix("--gpu="))
    assert not (fresh.path / ".venv").exists()


def path_with(folder: Path, **scripts: str) -> str:
    """A PATH of `folder` only: the tools that the scripts use, and `scripts` (name: body), but no Python."""
    folder.mkdir()
    for tool in ("awk", "cat", "cksum", "df", "dirname", "flock", "grep", "mkdir", "rm", "sed", "tail", "wc"):
        (folder / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    for name, body in scripts.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_wrong_python_is_named_with_the_supported_ones(fresh: Repo) -> None:
    path = path_with(fresh.path / "bin", python3="echo 3.8.18 /bin/python3")
    assert refuses(fresh.run(PATH=path, PYTHON=""), "3.8.18", "3.10, 3.11 or 3.12", "PYTHON=")
    assert refuses(fresh.run(PYTHON=str(fresh.path / "bin/python3")), "3.8.18")
    assert refuses(fresh.run(PYTHON="/nowhere/python"), "found no Python at /nowhere/python")
    assert not fresh.stamp.exists()


def test_no_python_at_all(fresh: Repo) -> None:
    assert refuses(fresh.run(PATH=path_with(fresh.path / "bin"), PYTHON=""), "found no Python;")


def test_missing_venv_module_names_the_package(fresh: Repo) -> None:
    without_venv = "case $2 in *venv*) exit 1 ;; *) echo 3.11.2 $0 ;; esac"
    # A pyenv shim of a version that isn't active fails; the next name is tried.
    path = path_with(fresh.path / "bin", **{"python3.11": "exit 127", "python3": without_venv})
    assert refuses(fresh.run(PATH=path, PYTHON=""), "Python 3.11.2", "apt-get install python3.11-venv")


def test_no_disk_space(fresh: Repo) -> None:
    full_disk = "echo header; echo /dev/x 100000000 99000000 1000000 99% /"
    path = path_with(fresh.path / "bin", df=full_disk)
    assert refuses(fresh.run(PATH=path), "needs about 3 GB", "1 GB left")
    assert not (fresh.path / ".venv/bin").exists()


def test_environment_of_someone_else_is_left_alone(fresh: Repo) -> None:
    (fresh.path / ".venv").mkdir()
    (fresh.path / ".venv/mine").write_text("x")
    before = files_of(fresh.path)
    assert refuses(fresh.run(), "not made by this script")
    assert files_of(fresh.path) == before


def test_unfinished_setup_starts_over(fresh: Repo) -> None:
    process = fresh.start()
    while not (fresh.path / ".venv/bin/python").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not fresh.stamp.exists()

    left_over = fresh.path / ".venv/lib/left_over"
    left_over.write_text("half")
    assert refuses(fresh.run(**NO_NETWORK), "no network", "HTTPS_PROXY", "PIP_INDEX_URL=https://")
    assert not fresh.stamp.exists() and not left_over.exists()

    done = fresh.run()
    assert done.returncode == 0 and "making .venv" in done.stdout
    assert fresh.installed("paddlenlp") == "1.0"


@pytest.mark.parametrize(
    ("option", "added"),
    [
        (
            "--tests",
            {"pytest", "pymilvus", "onnxruntime", "openvino", "paddle_serving_server", "paddle_serving_client"},
        ),
        ("--fast-tests", {"pytest"}),
        ("--milvus", {"pymilvus"}),
        ("--onnx", {"onnxruntime"}),
        ("--openvino", {"openvino"}),
        ("--serving", {"paddle_serving_server", "paddle_serving_client"}),  # the latter's wheel is for Python 3.9
    ],
)
def test_extras_are_added_and_a_plain_run_keeps_them(ready: Repo, option: str, added: set[str]) -> None:
    assert ready.run(option).returncode == 0
    before = files_of(ready.path)
    for args in ([], [option]):
        assert ready.run(*args).stdout == "setup: .venv is ready\n"
    modules = ("pytest", "pymilvus", "onnxruntime", "openvino", "paddle_serving_server", "paddle_serving_client")
    assert {name for name in modules if ready.installed(name) == "1.0"} == added
    assert files_of(ready.path) == before


def test_the_server_that_paddle_serving_starts_takes_its_place(ready: Repo) -> None:
    """Also if an earlier setup.sh had changed the same line."""
    assert ready.run("--serving").returncode == 0
    (server,) = ready.path.glob(f".venv/lib/*/site-packages/{SERVER_FILE}")
    changed = server.read_text()
    assert changed.startswith(RUN_SERVER.partition("{}")[0]) and "os.execvp('sh', ['sh', '-c', command + " in changed
    server.write_text(RUN_SERVER.format("sys.exit(os.waitstatus_to_exitcode(os.system(command)))"))
    assert ready.run("--serving").returncode == 0
    assert server.read_text() == changed


def test_without_network_adding_tests_leaves_a_working_environment(ready: Repo) -> None:
    assert refuses(ready.run("--tests", **NO_NETWORK), "no network")
    assert ready.run().stdout == "setup: .venv is ready\n"
    assert ready.run("--tests").returncode == 0
    assert ready.installed("pytest") == "1.0"


@pytest.mark.parametrize(("pattern", "replacement"), [("sha256:....", "sha256:0000"), (r" \\\n +--hash=\S+", "")])
def test_file_without_its_hash_in_the_lock_is_refused(ready: Repo, pattern: str, replacement: str) -> None:
    lock = ready.path / "tests/requirements.lock"
    lock.write_text(re.sub(pattern, replacement, lock.read_text()))
    assert refuses(ready.run("--tests"), "setup.log")
    assert ready.installed("pytest") is None


def test_changed_lock_and_gpu_build_make_the_environment_anew(ready: Repo) -> None:
    lock = ready.path / "requirements.lock"
    lock.write_text(
        re.sub(r"(?s)paddlenlp==.*?# via.*?\n", write_wheel(ready.wheels, "paddlenlp", "2.0"), lock.read_text())
    )
    assert ready.run("--onnx").returncode == 0
    active = str(ready.path / ".venv/bin/python")  # what an activated .venv puts first on PATH
    assert ready.run("--gpu", PYTHON=active).returncode == 0
    assert ready.installed("onnxruntime") == "1.0"  # what was added once stays
    gpu_build = ready.path / ".venv/setup/device"
    assert ready.installed("paddlenlp") == "2.0"
    assert gpu_build.read_text() == "cu126\n"
    assert list(ready.path.glob(".venv/lib/*/site-packages/paddlepaddle_gpu-1.0.dist-info"))
    assert not list(ready.path.glob(".venv/lib/*/site-packages/paddlepaddle-1.0.dist-info"))
    assert ready.run().stdout == "setup: .venv is ready\n"  # a plain run doesn't go back to the CPU build
    assert ready.run("--cpu").returncode == 0
    assert list(ready.path.glob(".venv/lib/*/site-packages/paddlepaddle-1.0.dist-info"))
    assert not list(ready.path.glob(".venv/lib/*/site-packages/paddlepaddle_gpu-1.0.dist-info"))


def test_an_environment_behind_a_link_is_not_made_anew(ready: Repo, tmp_path: Path) -> None:
    """It may be another copy's."""
    other = ready.copy(tmp_path / "other")
    shutil.rmtree(other.path / ".venv")
    (other.path / ".venv").symlink_to(ready.path / ".venv")
    assert other.run().returncode == 0
    lock = other.path / "requirements.lock"
    lock.write_text(lock.read_text() + "# changed\n")
    before = files_of(ready.path / ".venv/lib")
    assert refuses(other.run(), ".venv is a link to an environment of other packages; remove the link")
    assert files_of(ready.path / ".venv/lib") == before
    assert ready.run().stdout == "setup: .venv is ready\n"


def test_without_compiler_only_the_hnsw_index_is_left_out(ready: Repo) -> None:
    pip = [ready.path / ".venv/bin/python", "-m", "pip", "uninstall", "-qy", "hnswlib"]
    subprocess.run(pip, check=True, capture_output=True)
    (ready.path / ".venv/setup/hnswlib").unlink()
    done = ready.run(CXX="/nowhere/c++")
    assert done.returncode == 0 and "apt-get install g++" in done.stdout and "--ann exact" in done.stdout
    assert ready.installed("hnswlib") is None
    assert "compiling hnswlib" in ready.run(CXX="sh").stdout  # any program will do: the wheel is ready-made
    assert ready.installed("hnswlib") == "1.0"
    assert ready.run().stdout == "setup: .venv is ready\n"
