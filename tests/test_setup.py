"""The set-up scripts, run for real on tiny packages that the tests make: no network."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_NETWORK = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
MODULES = {
    "paddlepaddle": "paddle",
    "paddlepaddle-gpu": "paddle",
    "paddle-serving-server": "paddle_serving_server/__init__",
}
SERVER_FILE = "paddle_serving_server/server.py"
RUN_SERVER = "    def run_server(self):\n        {}\n"
DATA_FILES = ["corpus.csv", "dev.csv", "test.csv", "train.csv"]


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
    """A copy of the scripts beside lock files of tiny packages, which wheels/ holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wheels = path / "wheels"
        self.stamp = path / ".venv/setup/base"

    def write(self) -> "Repo":
        for folder in ("wheels", "tests", "benchmarks", "deploy/onnx", "deploy/serving"):
            (self.path / folder).mkdir(parents=True)
        shutil.copytree(ROOT / "scripts", self.path / "scripts")
        names = ("paddlepaddle", "paddlenlp", "jieba", "seqeval", "hnswlib")
        lock = [write_wheel(self.wheels, name, "1.0") for name in names]
        (self.path / "requirements.lock").write_text("# header\n" + "".join(lock))
        (self.path / "tests/requirements.lock").write_text(write_wheel(self.wheels, "pytest", "1.0"))
        (self.path / "deploy/onnx/requirements.lock").write_text(write_wheel(self.wheels, "onnxruntime", "1.0"))
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

    def run(self, *args: str, **options: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **options)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def installed(self, module: str) -> str | None:
        """The version of `module` in .venv, None where it isn't installed."""
        code = f"import {module}; print({module}.version)"
        done = subprocess.run([self.path / ".venv/bin/python", "-c", code], capture_output=True, text=True)
        return done.stdout.strip() or None


def refuses(done: subprocess.CompletedProcess[str], *words: str) -> bool:
    """Whether a run ended with exit code 2 and one line on stderr that holds all `words`."""
    return done.returncode == 2 and done.stderr.count("\n") == 1 and all(word in done.stderr for word in words)


def files_of(folder: Path) -> dict[Path, int]:
    """When each was written; what Python compiles on the way doesn't count."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)}


@pytest.fixture
def fresh(tmp_path: Path) -> Repo:
    return Repo(tmp_path / "fresh").write()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repo, list[str]]:
    """A set-up repository, and what two runs that started at once printed."""
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
    """A PATH of `folder` alone: the tools that the scripts use, and `scripts` (name: body), but no Python."""
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
        ("--tests", {"pytest", "onnxruntime", "paddle_serving_server", "paddle_serving_client"}),
        ("--onnx", {"onnxruntime"}),
        ("--serving", {"paddle_serving_server", "paddle_serving_client"}),  # the latter's wheel is for Python 3.9
    ],
)
def test_extras_are_added_and_a_plain_run_keeps_them(ready: Repo, option: str, added: set[str]) -> None:
    assert ready.run(option).returncode == 0
    before = files_of(ready.path)
    for args in ([], [option]):
        assert ready.run(*args).stdout == "setup: .venv is ready\n"
    modules = ("pytest", "onnxruntime", "paddle_serving_server", "paddle_serving_client")
    assert {name for name in modules if ready.installed(name) == "1.0"} == added
    assert files_of(ready.path) == before


def test_the_server_that_paddle_serving_starts_takes_its_place(ready: Repo) -> None:
    """Also where an earlier setup.sh had changed the same line."""
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


def pins(path: Path) -> dict[tuple[str, str], str]:
    """(name, marker) -> version, of every pin in a requirements or lock file."""
    lines = re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s;\\]+) *(?:; *([^\\#\n]*))?", path.read_text())
    return {(name.replace("_", "-").lower(), (marker or "").strip()): version for name, version, marker in lines}


@pytest.mark.parametrize("folder", [".", "tests", "benchmarks", "deploy/onnx", "deploy/serving"])
def test_lock_holds_every_direct_pin(folder: str) -> None:
    requirements = ROOT / folder / "requirements.txt"
    direct, lock = pins(requirements), pins(requirements.with_suffix(".lock"))
    lines = [line for line in requirements.read_text().splitlines() if line and not line.startswith("#")]
    assert len(direct) == len(lines) > 0
    assert {name: version for name, version in direct.items() if lock.get(name) != version} == (
        {("torch", ""): "2.13.0+cpu"} if folder == "benchmarks" else {}
    )


@pytest.mark.parametrize("folder", [".", "tests", "benchmarks", "deploy/onnx", "deploy/serving"])
def test_lock_names_no_place(folder: str) -> None:
    lines = (ROOT / folder / "requirements.lock").read_text().splitlines()
    entries = [line for line in lines if not line.lstrip().startswith("#")]
    assert all(re.match(r"[A-Za-z0-9._-]+==[^/]*$|    --hash=sha256:[0-9a-f]{64}", line) for line in entries if line)
    assert not [line for line in lines if "file:" in line or "--find-links" in line]


@pytest.mark.parametrize("folder", ["tests", "deploy/onnx", "deploy/serving"])
def test_extra_locks_agree_with_the_main_lock(folder: str) -> None:
    main, extra = pins(ROOT / "requirements.lock"), pins(ROOT / folder / "requirements.lock")
    shared = {name for name, _ in main} & {name for name, _ in extra}
    assert shared
    versions = {name: {version for (other, _), version in main.items() if other == name} for name in shared}
    assert [pin for pin, version in extra.items() if pin[0] in shared and version not in versions[pin[0]]] == []


class RangeHandler(BaseHTTPRequestHandler):
    """Serves the server's `body` at /data.zip, from the offset that the request names."""

    def do_GET(self) -> None:
        body, start = self.server.body, int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        self.server.offsets.append(start)
        if self.path != "/data.zip":
            return self.send_error(404)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[start:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler) as server:
        server.offsets = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def dataset(path: Path, top: str = "", files: list[str] = DATA_FILES) -> bytes:
    """A ZIP archive of the dataset's layout, written to `path`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{top}milvus/milvus_data.csv", "文献\n")
        archive.writestr("__MACOSX/recall/train.csv", "shadow")
        for name in files:
            archive.writestr(f"{top}recall/{name}", f"{name} 检索\t文献\n")
    return path.read_bytes()


def download(
    *args: str | Path, server: ThreadingHTTPServer, name: str = "data.zip"
) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.server_port}/{name}"
    return subprocess.run(
        ["sh", ROOT / "scripts/download_data.sh", *args],
        env=os.environ | {"LITERATURE_SEARCH_DATA_URL": url, "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("top", ["", "literature_search_data/"])
def test_download_unpacks_and_checks(tmp_path: Path, server: ThreadingHTTPServer, top: str) -> None:
    server.body = dataset(tmp_path / "data.zip", top)
    target = tmp_path / "new folder"
    done = download(target, server=server)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (target / "recall").iterdir()) == DATA_FILES
    assert (target / "recall/train.csv").read_text() == "train.csv 检索\t文献\n"
    assert [path.name for path in target.iterdir()] == ["recall"]
    again = download(target, server=server)
    assert again.returncode == 0 and len(server.offsets) == 1  # what is there isn't downloaded again
    assert download("--check", target, server=server).returncode == 0


def test_download_goes_on_where_it_broke_off(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    server.body = dataset(tmp_path / "data.zip")
    target = tmp_path / "target"
    target.mkdir()
    (target / "literature_search_data.zip.part").write_bytes(server.body[:100])
    assert download(target, server=server).returncode == 0
    assert server.offsets == [100]
    assert (target / "recall/dev.csv").read_text() == "dev.csv 检索\t文献\n"


def test_download_takes_an_archive_that_the_user_put_there(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    dataset(tmp_path / "literature_search_data.zip")
    assert download(tmp_path, server=server).returncode == 0
    assert server.offsets == []
    assert (tmp_path / "literature_search_data.zip").exists()


def test_download_never_overwrites(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    server.body = dataset(tmp_path / "data.zip")
    (tmp_path / "recall").mkdir()
    (tmp_path / "recall/train.csv").write_text("mine")
    assert refuses(download(tmp_path, server=server), "dev.csv test.csv corpus.csv", "nothing is overwritten")
    assert (tmp_path / "recall/train.csv").read_text() == "mine"
    assert server.offsets == []


def test_download_refuses_what_is_not_the_dataset(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    target = tmp_path / "target"
    server.body = dataset(tmp_path / "data.zip", files=DATA_FILES[1:])
    assert refuses(download(target, server=server), "lacks (or holds empty): corpus.csv")
    server.body = b"<html>not found</html>"
    assert refuses(download(target, server=server), "not a ZIP archive")
    failed = download(target, server=server, name="nothing.zip")
    assert failed.returncode == 2 and "nothing.zip" in failed.stderr and "proxy" in failed.stderr
    assert not (target / "recall").exists()
    assert [path.name for path in target.iterdir() if path.suffix != ".part"] == []


@pytest.mark.parametrize("broken", ["missing", "empty", "folder"])
def test_layout_check(tmp_path: Path, server: ThreadingHTTPServer, broken: str) -> None:
    assert refuses(download("--check", tmp_path, server=server), "no folder")
    (tmp_path / "recall").mkdir()
    for name in DATA_FILES:
        (tmp_path / "recall" / name).write_text("x\n")
    assert download("--check", tmp_path, server=server).returncode == 0
    test_file = tmp_path / "recall/test.csv"
    test_file.unlink()
    if broken == "empty":
        test_file.touch()
    elif broken == "folder":
        test_file.mkdir()
    assert refuses(download("--check", tmp_path, server=server), "test.csv")
    assert server.offsets == []


@pytest.mark.parametrize("args", [["--what"], ["a", "b"]])
def test_download_wrong_options(server: ThreadingHTTPServer, args: list[str]) -> None:
    assert refuses(download(*args, server=server), args[-1])
