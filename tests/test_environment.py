"""What the environment does to third parties: the scripts work in it all the same, or one line names the variable.

All scripts run in turn in one process for each environment, because Paddle reads variables when it is imported.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.service_clients import http_client, rpc_client, running_service
from helpers import ROOT, evaluation_options, refuses, run_script, train_options

Outcome = dict[str, Any]  # code, out and err of a script
Environment = dict[str, str | None]  # None: the variable is unset
NEED_PADDLE = ("train", "recall", "predict", "inference", "export", "serving", "deploy predict")
SCRIPTS = (*NEED_PADDLE, "evaluate")

# Variable -> value and why it is ignored; without a reason it makes no difference. FILE is a file in a folder's place.
VARIABLES: dict[str, tuple[str | None, str | None]] = {
    "HOME": ("FILE", None),
    "PPNLP_HOME": ("", None),
    "TMPDIR": ("FILE", None),
    "HF_HOME": ("FILE", None),
    "HF_HUB_OFFLINE": ("1", None),
    "CUDA_VISIBLE_DEVICES": ("7", None),
    "FLAGS_enable_pir_api": ("0", "exports and the static engine need Paddle's new IR"),
    "FLAGS_enable_api_kernel_fallback": ("false", "oneDNN lacks kernels that the static engine needs"),
    "FLAGS_enable_unique_name": ("1", "Paddle's optimizer would lose its state"),
    "FLAGS_selected_gpus": ("3", None),
    "FLAGS_no_such_flag": ("1", None),
    "GLOG_v": ("10", "from 6 on, Paddle's optimizer loses its state"),
    "OMP_NUM_THREADS": ("2,4", None),
    "OMP_PROC_BIND": ("true", "it would put all threads on one core; choose cores with taskset"),
    "KMP_AFFINITY": ("compact", "it would put all threads on one core; choose cores with taskset"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("BF16", "it would round in fp32, too; use --precision"),
    "MALLOC_ARENA_MAX": ("1", None),
    "PADDLE_TRAINER_ID": ("1", None),  # left over from a launcher
    "PYTHONWARNINGS": ("error", None),
    "PYTHONOPTIMIZE": ("2", None),
    "PYTHONSAFEPATH": ("1", None),
    "LC_ALL": ("POSIX", None),
}
LIMITS: Environment = {"HOME": None, "PPNLP_HOME": "FILE", "OMP_NUM_THREADS": ""}  # and few open files
REFUSED: dict[str, tuple[Environment, str, str]] = {  # environment, shell command before the start, what the line says
    "threads in words": ({"OMP_NUM_THREADS": "all"}, "", "OMP_NUM_THREADS=all: isn't a number from 1 to 1024"),
    "no thread": ({"OMP_NUM_THREADS": "0"}, "", "OMP_NUM_THREADS=0: isn't a number from 1 to 1024"),
    "too many threads": ({"OMP_NUM_THREADS": "100000"}, "", "OMP_NUM_THREADS=100000: isn't a number from 1 to 1024"),
    "an unknown allocator": ({"FLAGS_allocator_strategy": "jemalloc"}, "", "strategy=jemalloc: is none of auto"),
    "ranks in words": ({"PADDLE_TRAINERS_NUM": "two"}, "", "PADDLE_TRAINERS_NUM=two: isn't a number of 1 or more"),
    "ranks without a launcher": ({"PADDLE_TRAINERS_NUM": "2"}, "", "PADDLE_TRAINER_ID is missing beside it; unset it"),
    "no local rank": ({"PADDLE_LOCAL_SIZE": "0"}, "", "PADDLE_LOCAL_SIZE=0: isn't a number of 1 or more; unset it"),
    "a rank too many": (
        {
            "PADDLE_TRAINERS_NUM": "2",
            "PADDLE_TRAINER_ID": "2",
            "PADDLE_CURRENT_ENDPOINT": "127.0.0.1:6170",
            "PADDLE_TRAINER_ENDPOINTS": "127.0.0.1:6170,127.0.0.1:6171",
        },
        "",
        "PADDLE_TRAINER_ID=2: PADDLE_TRAINERS_NUM=2 has no such process; unset it",
    ),
    "little address space": ({}, "ulimit -v 1500000", "ulimit -v 1500000: Paddle needs more; set it to 2097152"),
    "a library that Paddle can't load": ({"PYTHONPATH": "BROKEN"}, "", "be imported (no symbol); try without"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, exported: Path) -> Path:
    """A folder with a checkpoint and an export of its own, a file, and a package paddle that can't be imported."""
    folder = tmp_path_factory.mktemp("environment")
    shutil.copytree(checkpoint, folder / "checkpoint")
    shutil.copytree(exported, folder / "exported")
    (folder / "file").touch()
    (folder / "broken").mkdir()
    (folder / "broken" / "paddle.py").write_text("raise ImportError('no symbol')\n")
    return folder


Run = Callable[..., dict[str, Outcome]]


@pytest.fixture(scope="module")
def run_all(work: Path, model_folder: Path, recall_data: Path) -> Run:
    """Runs all scripts in turn in one process, with variables and after a shell command."""
    out, pairs, corpus = work / "out", str(recall_data / "dev.csv"), str(recall_data / "corpus.csv")
    evaluation = evaluation_options(recall_data, out / "evaluation")
    checkpoint = ["--params_path", str(work / "checkpoint")]
    on_cpu = [*checkpoint, "--device", "cpu"]
    recalled = ["--recall_result_dir", str(out / "recall"), "--ann", "exact", "--engine", "static"]
    folders = ["--server_path", str(out / "server"), "--client_path", str(out / "client")]
    calls = {
        "train": ("train_batch_neg", train_options(model_folder, recall_data, out, "--max_steps", "2", *evaluation)),
        "recall": ("recall", [*on_cpu, "--corpus_file", corpus, "--similar_text_pair", pairs, *recalled]),
        "predict": ("predict", [*on_cpu, "--text_pair_file", pairs]),
        "inference": ("inference", [*on_cpu, "--text", "水稻的产量"]),
        "export": ("export_model", [*checkpoint, "--output_path", str(out / "exported")]),
        "serving": ("export_to_serving", ["--dirname", str(work / "exported"), *folders]),
        "deploy predict": ("deploy/python/predict", ["--model_dir", str(work / "exported")]),
        "evaluate": (
            "evaluate",
            ["--similar_text_pair", pairs, "--recall_result_file", str(out / "recall" / "recall_result.txt")],
        ),
    }
    content = json.dumps([(name, str(ROOT / f"{file}.py"), options) for name, (file, options) in calls.items()])

    def run(environment: Environment, before: str = "") -> dict[str, Outcome]:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(work / "checkpoint" / "static", ignore_errors=True)  # compiled anew
        values = {"FILE": str(work / "file"), "BROKEN": str(work / "broken")}
        changed = {name: values.get(value, value) for name, value in environment.items() if value is not None}
        inherited = {name: value for name, value in os.environ.items() if name not in {*environment, "OMP_NUM_THREADS"}}
        command = ["sh", "-c", f'{before or ":"}; exec "$@"', "sh", sys.executable, "tests/scripts_in_turn.py"]
        done = subprocess.run(
            command, cwd=ROOT, env={**inherited, **changed}, input=content, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def numbers(outcome: Outcome) -> np.ndarray:
    """The numbers that a script printed, without times and speeds."""
    text = re.sub(r"speed: .*", "", outcome["out"])
    return np.array([float(number) for number in re.findall(r"-?\d+\.\d+", text)])


@pytest.fixture(scope="module")
def clean(run_all: Run) -> dict[str, Outcome]:
    return run_all({})


@pytest.fixture(scope="module")
def with_variables(run_all: Run) -> dict[str, Outcome]:
    return run_all({name: value for name, (value, _) in VARIABLES.items()})


@pytest.fixture(scope="module")
def with_limits(run_all: Run) -> dict[str, Outcome]:
    return run_all(LIMITS, "ulimit -n 64; ulimit -c 0")


@pytest.mark.process
@pytest.mark.parametrize("name", SCRIPTS)
def test_harmless_variables_and_limits_change_no_result(
    name: str, clean: dict[str, Outcome], with_variables: dict[str, Outcome], with_limits: dict[str, Outcome]
) -> None:
    assert (clean[name]["code"], len(numbers(clean[name])) > 0) == (0, name != "serving"), clean[name]["err"]
    for outcome in (with_variables[name], with_limits[name]):
        assert outcome["code"] == 0, outcome["err"]
        np.testing.assert_allclose(numbers(outcome), numbers(clean[name]), atol=2e-5)


@pytest.mark.process
@pytest.mark.parametrize("variable", VARIABLES)
def test_one_line_names_each_variable_that_is_ignored(
    variable: str, clean: dict[str, Outcome], with_variables: dict[str, Outcome]
) -> None:
    lines = [line for name in SCRIPTS for line in with_variables[name]["err"].splitlines() if variable in line]
    value, why = VARIABLES[variable]
    assert lines == ([f"{variable}={value}: is ignored, because {why}"] if why else [])
    assert not any(variable in outcome["err"] for outcome in clean.values())


@pytest.mark.process
def test_a_variable_that_changes_nothing_leaves_no_folder(with_variables: dict[str, Outcome], work: Path) -> None:
    """Such as `models` in the working folder, which PaddleNLP makes there for a blank PPNLP_HOME."""
    assert with_variables["train"]["code"] == 0
    assert [name for name in ("models", "datasets", "packages", "~") if (ROOT / name).exists()] == []
    assert (work / "file").read_bytes() == b""


@pytest.mark.process
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_every_script_that_needs_paddle(case: str, run_all: Run) -> None:
    environment, before, said = REFUSED[case]
    for name, outcome in run_all(environment, before).items():
        if name in NEED_PADDLE:
            lines = outcome["err"].splitlines()
            assert (outcome["code"], len(numbers(outcome))) == (2, 0), outcome
            assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
            assert said in lines[-1]
            assert "Traceback" not in outcome["err"]


@pytest.mark.process
def test_without_any_temporary_folder_the_line_names_tmpdir(checkpoint: Path, tmp_path: Path) -> None:
    """Tempfile also tries /tmp and the working folder, so a sitecustomize stands in for a read-only system."""
    (tmp_path / "sitecustomize.py").write_text(
        "import tempfile\ndef fail(): raise FileNotFoundError(2, 'No usable temporary directory found')\n"
        "tempfile._get_default_tempdir = fail\n"
    )
    file = tmp_path / "file"
    file.touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HOME": str(file)}
    command = [sys.executable, str(ROOT / "inference.py"), "--params_path", str(checkpoint), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert refuses(done, "error: no temporary folder can be written; set TMPDIR to a folder that can")


@pytest.mark.server
def test_the_service_starts_in_a_hostile_environment(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a folder whose modules are named like ours, and removes its temporary home at the end."""
    (tmp_path / "here").mkdir()
    for name in ("data.py", "common.py", "serving.py"):
        (tmp_path / "here" / name).write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, value in {
        "HOME": str(tmp_path / "file"),
        "TMPDIR": str(tmp_path / "temporary"),
        "FLAGS_enable_pir_api": "0",
        "FLAGS_check_nan_inf": "1",
        "OMP_PLACES": "cores",
        "PADDLE_TRAINER_ID": "3",
    }.items():
        monkeypatch.setenv(name, value)
    with running_service(exported) as service, rpc_client(service) as rpc, http_client(service) as http:
        over_rpc, over_http = rpc(["水稻的产量"]), http(["水稻的产量"])
    np.testing.assert_array_equal(over_rpc, over_http)
    assert np.linalg.norm(over_rpc) == pytest.approx(1, abs=1e-5)
    log = "".join(service.log)
    assert "OMP_PLACES=cores: is ignored" in log
    assert "Traceback" not in log
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.process
def test_ranks_remove_their_temporary_homes(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end without Python's clean-up."""
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("PPNLP_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    options = ["--params_path", checkpoint, "--device", "cpu", "--text_pair_file", recall_data / "dev.csv"]
    done = run_script("predict.py", *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.process
def test_a_script_that_waits_for_other_ranks_without_a_launcher_says_so(checkpoint: Path) -> None:
    environment = {
        **os.environ,
        "PADDLE_TRAINERS_NUM": "2",
        "PADDLE_TRAINER_ID": "0",
        "PADDLE_CURRENT_ENDPOINT": "127.0.0.1:0",
        "PADDLE_TRAINER_ENDPOINTS": "127.0.0.1:0,127.0.0.1:0",
    }
    command = [sys.executable, "recall.py", "--params_path", str(checkpoint), "--device", "cpu", "--query", "水稻"]
    command += ["--corpus_file", str(checkpoint / "vocab.txt"), "--skip_bad_lines"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if "PADDLE_TRAINERS_NUM" in line)
    finally:
        process.kill()
        process.communicate()
    said = "PADDLE_TRAINERS_NUM=2: waiting for the other processes; if nothing starts them, end this and unset"
    assert line.startswith(said)
