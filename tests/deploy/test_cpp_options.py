"""Options and files with which the C++ server refuses to start."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.cpu import has_bf16
from cpp_helpers import CPP, HOST, Server, free_port
from helpers import cpp_environment
from serving.settings import IDLE_TIMEOUT_S

pytestmark = pytest.mark.cpp
CPU_REFUSES = [  # options of Paddle Serving, the document's first, and the one that is named
    (["--gpu_id", "2", "--thread", "5", "--ir_optim", "True", "--use_trt", "--precision", "FP16"], "--gpu_id"),
    (["--use_trt"], "--use_trt"),
    (["--precision", "FP16"], "--precision FP16"),
    (["--precision", "int8"], "--precision int8"),
    (["--use_xpu"], "--use_xpu"),
    (["--use_lite"], "--use_lite"),
    *([] if has_bf16() else [(["--precision", "BF16"], "--precision bf16")]),
]
BAD_VALUES = [(["--model", "nope"], "--model nope"), (["--port", "99999"], "-port 99999")]


@pytest.mark.parametrize(("options", "named"), CPU_REFUSES + BAD_VALUES)
def test_what_start_server_refuses(cpp_program: Path, serving_folder: Path, options: list[str], named: str) -> None:
    """Wrong values and what a CPU can't do, by name, before it starts anything."""
    done = subprocess.run(
        ["sh", CPP / "start_server.sh", "--model", serving_folder / "serving_server", *options],
        env=cpp_environment(SERVING_BIN=str(cpp_program)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {named}: .*\n", done.stderr)


@pytest.mark.parametrize(("options", "named"), CPU_REFUSES)
def test_paddle_serving_passes_on_what_the_server_refuses(
    cpp_program: Path, serving_folder: Path, options: list[str], named: str
) -> None:
    """The document's command itself, with what setup.sh --serving changes in Paddle Serving."""
    command = ["-m", "paddle_serving_server.serve", "--model", "serving_server", "--port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *command, *options],
        cwd=serving_folder,
        env=cpp_environment(SERVING_BIN=f"exec {cpp_program}", PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and f"error: {named}: " in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-port", "x"], "-port x: give a number from 0 to 65535"),
        (["-resource_path", "nowhere"], "nowhere/resource.prototxt: can't be read"),
        (["-host", "nowhere"], "SERVING_HOST nowhere: can't listen on nowhere"),
        (["-host", "192.0.2.1"], "SERVING_HOST 192.0.2.1: can't listen on 192.0.2.1"),
        (["-port", "1", "-host", "[::ffff:1]"], "give an address of this machine"),
        (["---x"], "---x: isn't an option"),
        (["-max_queue_texts", "5"], "-max_queue_texts: isn't an option of this server or of Paddle Serving"),
        (["--idle_timeout", "5"], "-idle_timeout: isn't an option"),
        (["-idle_timeout_s", "0"], "-idle_timeout_s 0: give a number from 1 to 86400"),
        (["-idle_timeout_s", "5s"], "-idle_timeout_s 5s: give a number"),
        (["-idle_timeout_s"], "-idle_timeout_s true: give a number"),
        (["-enable_prometheus=True"], "--enable_prometheus: this server has no metrics"),
    ],
)
def test_bad_options(
    cpp_program: Path, serving_folder: Path, cpp_server: Server, options: list[str], message: str
) -> None:
    """One line and exit code 2."""
    files = ["-resource_path", f"workdir_{cpp_server.port}", "-port", "0"]
    done = subprocess.run(
        [cpp_program, *files, *options],
        cwd=serving_folder,
        env=cpp_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["x", "0", "-1", "86401", "1.5", "620 s"])
def test_bad_variables(cpp_program: Path, serving_folder: Path, cpp_server: Server, value: str) -> None:
    """Named by the server itself, and by start_server.sh before it starts anything."""
    files = ["-resource_path", f"workdir_{cpp_server.port}", "-port", "0"]
    model = ["--model", serving_folder / "serving_server"]
    for command in ([cpp_program, *files], ["sh", CPP / "start_server.sh", *model]):
        done = subprocess.run(
            command,
            cwd=serving_folder,
            env=cpp_environment(SERVING_BIN=str(cpp_program), SERVING_IDLE_TIMEOUT_S=value),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        message = f"error: SERVING_IDLE_TIMEOUT_S {value}: give a number from 1 to 86400\n"
        assert (done.returncode, done.stderr) == (2, message)


def test_variables_of_others_are_named(cpp_program: Path, serving_folder: Path, cpp_server: Server) -> None:
    """Misspelled ones, and those of web_service.py; each of ours is used."""
    files = ["-resource_path", f"workdir_{cpp_server.port}", "-port", "x"]
    ours = {"SERVING_HOST": HOST, "SERVING_IDLE_TIMEOUT_S": "75", "SERVING_BIN": "x", "SERVING_MAX_QUEUED_TEXTS": "1"}
    done = subprocess.run(
        [cpp_program, *files],
        cwd=serving_folder,
        env=cpp_environment(SERVING_IDLE_TIMEOUT="75", SERVING_RPC_PORT="1", SERVER_X="1", **ours),
        capture_output=True,
        text=True,
        check=False,
    )
    note, _, _ = done.stderr.partition("\n")
    named, _, rest = note.removeprefix("note: ").partition(": ")
    assert (sorted(named.split(", ")), rest) == (
        ["SERVING_IDLE_TIMEOUT", "SERVING_RPC_PORT"],
        "no setting of this server, ignored",
    )


def test_idle_connections_stay_open_as_long_as_the_pipeline_services() -> None:
    source = (CPP / "server" / "options.h").read_text()
    assert f"int idle_timeout_s = {IDLE_TIMEOUT_S};" in source


@pytest.mark.parametrize(
    ("content", "message"), [(b"{}", "isn't the graph of a model of this project"), (b"\0", "isn't a graph")]
)
def test_damaged_graphs(
    cpp_program: Path, serving_folder: Path, cpp_server: Server, tmp_path: Path, content: bytes, message: str
) -> None:
    """They are refused before Paddle sees them."""
    copy = tmp_path / "serving_server"
    copy.mkdir()
    (copy / "graph.json").write_bytes(content)
    (copy / "graph.pdiparams").write_bytes(b"")
    workdir = tmp_path / "workdir"
    for file in (serving_folder / f"workdir_{cpp_server.port}").rglob("*.prototxt"):
        target = workdir / file.relative_to(serving_folder / f"workdir_{cpp_server.port}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text().replace(f"workdir_{cpp_server.port}", "workdir"))
    done = subprocess.run(
        [cpp_program, "-resource_path", "workdir"],
        cwd=tmp_path,
        env=cpp_environment(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2 and message in done.stderr.decode()
