"""Kills, signals, lost ranks, full disks: none of them costs more than the steps since the last checkpoint.

These tests attack whole processes; what the modules do about signals and failures is tested beside them.
"""

import builtins
import contextlib
import errno
import io
import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import train_batch_neg
from batch_negative import loop as loop_module
from batch_negative.batches import epoch_batches
from batch_negative.evaluator import Evaluator
from batch_negative.loop import TrainingLoop
from batch_negative.resume import read_training_state
from common.errors import InputError
from common.files import write_json
from common.manifest import MANIFEST_FILE, check_manifest
from helpers import (
    ROOT,
    all_pairs,
    assert_same_bits,
    assert_same_weights,
    evaluation_options,
    latest_folder,
    poisoned,
    run_script,
    train_options,
    write_pairs,
)
from modeling.checkpoint import load_checkpoint
from modeling.checkpoint_files import step_folder, step_folders
from modeling.training_progress import EVALUATIONS_FILE

pytestmark = pytest.mark.process

RENAMES = frozenset(["os.rename"])  # audit events of Python
CHANGES = RENAMES | {"os.mkdir", "os.remove", "os.rmdir"}


# ---------------------------------------------------------------------------------------------------------------------
# A fault at each operation of saving


class Unfinished:
    """A file opened for writing, which a fault may end with half of its content."""

    def __init__(self, file: Any, fault: Callable[[Callable[[], None]], None]) -> None:
        self._file, self._fault = file, fault

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        def truncate() -> None:
            self._file.flush()
            os.truncate(self._file.name, os.path.getsize(self._file.name) // 2)

        self._fault(truncate)
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def arm(number: int, fail: Callable[[], None], changes: frozenset[str]) -> None:
    """Has this process `fail` at its n-th operation on the disk: a change, a file half written, a flush."""
    count = itertools.count(1)

    def fault(before: Callable[[], None] = lambda: None) -> None:
        if next(count) == number:
            before()
            fail()

    def audit(event: str, arguments: tuple) -> None:
        if event in changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            fault()

    def open_unfinished(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = plain_open(file, mode, *arguments, **options)
        return Unfinished(opened, fault) if "w" in mode else opened

    def fsync(descriptor: int) -> None:
        fault()
        plain_fsync(descriptor)

    plain_open, plain_fsync = io.open, os.fsync
    builtins.open = io.open = open_unfinished
    os.fsync = fsync
    sys.addaudithook(audit)


class Ended(NamedTuple):
    """What became of a process that was to fail."""

    status: int
    message: str


def in_a_fork(folder: Path, work: Callable[[], None]) -> Ended:
    """Does `work` in a copy of this process whose current folder is `folder`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            work()
            os._exit(0)
        except InputError as error:
            os.write(writing, str(error).encode())
            os._exit(2)
        finally:  # nothing of pytest's may run here
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        message = pipe.read().decode()
    return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), message)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_is_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Failed(NamedTuple):
    """A saving that was to fail: the folder it was in, and what became of it."""

    folder: Path
    ended: Ended


STEPS = 5
ATTACKED = 4  # the step whose savings fail
SAVINGS = {"new": 50, "replaced": 60, "best": 50, "evaluations": 5}  # how many operations each has at least
WITHOUT_REMOVALS = {"new": 30, "replaced": 30, "best": 30, "evaluations": 3}


@pytest.fixture(scope="module")
def evaluated(model_folder: Path, recall_data: Path) -> list[str]:
    """Options of a training in the current folder: each step is saved, evaluated, and the best so far."""
    options = evaluation_options(recall_data, Path("results"), "--max_steps", str(STEPS), "--save_steps", "1")
    options += ["--eval_steps", "1", "--keep_checkpoints", "2"]
    return train_options(model_folder, recall_data, Path("checkpoints"), *options)


class Attacks:
    """Makes savings fail at each of their operations, in copies of this process and of its folder."""

    def __init__(self, fail: Callable[[], None], operations: frozenset[str]) -> None:
        self._fail, self._operations = fail, operations
        self.cases: dict[str, list[Failed]] = {}

    def __call__(self, name: str, save: Callable[[], None]) -> None:
        """Attacks a saving; what becomes of it is a case of this name."""
        run, self.cases[name] = Path.cwd(), []
        for number in itertools.count(1):
            folder = Path(shutil.copytree(run, run.with_name(f"{name} {number}")))
            ended = in_a_fork(folder, partial(self._save_and_fail, number, save))
            if ended.status == 0:
                break
            self.cases[name].append(Failed(folder, ended))

    def _save_and_fail(self, number: int, save: Callable[[], None]) -> None:
        arm(number, self._fail, self._operations)
        save()


@pytest.fixture
def fail_everywhere(
    evaluated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, list[Failed]]]:
    """Trains in the folder `run`, and attacks a step's savings.

    They are a new checkpoint, one that replaces another, the best model, and the evaluations.
    """
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # it would warn of each fork
    monkeypatch.setattr(Evaluator, "is_best", True)

    def fail_all(fail: Callable[[], None], operations: frozenset[str]) -> dict[str, list[Failed]]:
        attacks = Attacks(fail, operations)
        with monkeypatch.context() as patched:
            attack_savings(patched, attacks)
            assert train_batch_neg.main(evaluated) == 0
        return attacks.cases

    return fail_all


def attack_savings(monkeypatch: pytest.MonkeyPatch, attack: Attacks) -> None:
    """Has the savings of the step ATTACKED attacked before they are done."""
    plain_save_step, plain_save_checkpoint = TrainingLoop._save, loop_module.save_checkpoint

    def save_step(loop: TrainingLoop, step: int) -> None:
        save = partial(plain_save_step, loop, step)
        if step == ATTACKED:
            attack("new", save)
            other = step_folder(Path("checkpoints"), step)  # the step before stands for another training's
            shutil.copytree(step_folder(Path("checkpoints"), step - 1), other)
            attack("replaced", save)
            shutil.rmtree(other)
        save()

    def save_best(folder: Path, *arguments: Any, **named: Any) -> None:
        save = partial(plain_save_checkpoint, folder, *arguments, **named)
        if folder.name == "model_best" and latest_step(folder.parent) == ATTACKED:
            attack("best", save)
        save()

    def save_evaluations(path: Path, content: dict[str, Any]) -> None:
        if path.parent.name == f"model_{ATTACKED}":
            attack("evaluations", partial(write_json, path, content))
        write_json(path, content)

    monkeypatch.setattr(TrainingLoop, "_save", save_step)
    monkeypatch.setattr(loop_module, "save_checkpoint", save_best)
    monkeypatch.setattr(loop_module, "write_json", save_evaluations)


def latest_step(save_dir: Path) -> int:
    return int(step_folders(save_dir)[-1].name.removeprefix("model_"))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".replaced"))]


def assert_goes_on(run: Path, options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training resumed in `folder` ends with the bits and the evaluations of the one in `run`."""
    monkeypatch.chdir(folder)
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    for name in (f"model_{STEPS - 1}", f"model_{STEPS}"):
        assert_same_bits(run / "checkpoints" / name, folder / "checkpoints" / name)
        ours, theirs = (place / "checkpoints" / name / EVALUATIONS_FILE for place in (folder, run))
        assert ours.read_text() == theirs.read_text()
    assert_same_weights(run / "checkpoints" / "model_best", folder / "checkpoints" / "model_best")
    report = Path("results") / "evaluate_result.txt"
    assert (folder / report).read_text() == (run / report).read_text()


def test_a_kill_at_any_operation_of_saving_leaves_a_checkpoint_that_resumes(
    fail_everywhere: Callable[..., dict[str, list[Failed]]],
    evaluated: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of those with the same manifest, which has the SHA-256 of every file, and the same evaluations is resumed."""
    cases = fail_everywhere(kill, CHANGES)
    assert cases.keys() == SAVINGS.keys()
    resumed: dict[str, set[tuple[str, str]]] = {}
    for name, failed in cases.items():
        assert len(failed) >= SAVINGS[name]
        resumed[name] = set()
        for folder, ended in failed:
            assert ended.status == -signal.SIGKILL
            save_dir = folder / "checkpoints"
            if name == "best":  # it can be read whatever a kill left of it
                assert load_checkpoint(save_dir / "model_best")
            train_batch_neg.prepare_folders(save_dir, None)
            assert leftovers(save_dir) == []
            check_manifest(save_dir / "model_best")
            for step in step_folders(save_dir):
                assert read_training_state(step)
            latest = latest_folder(save_dir)
            assert latest is not None
            history = latest / EVALUATIONS_FILE
            state = (latest / MANIFEST_FILE).read_text(), history.read_text() if history.exists() else ""
            if state not in resumed[name]:
                resumed[name].add(state)
                assert_goes_on(tmp_path / "run", evaluated, folder, monkeypatch)
    # The step before and the new one; only the new one, not evaluated; the new one without and with its evaluation.
    assert {name: len(states) for name, states in resumed.items()} == {
        "new": 2,
        "replaced": 2,
        "best": 1,
        "evaluations": 2,
    }


def test_a_full_disk_at_any_operation_of_saving_leaves_the_last_checkpoint(
    fail_everywhere: Callable[..., dict[str, list[Failed]]],
) -> None:
    cases = fail_everywhere(disk_is_full, RENAMES)
    assert cases.keys() == SAVINGS.keys()
    for name, failed in cases.items():
        assert len(failed) >= WITHOUT_REMOVALS[name]
        for folder, ended in failed:
            assert ended.status == 2
            place, reason = ended.message.split(": ", 1)
            assert place.startswith("checkpoints/model_")
            assert reason in (
                "can't be written (No space left on device)",
                "can't be removed (No space left on device)",
            )
            assert leftovers(folder) == []
            assert latest_folder(folder / "checkpoints")
            check_manifest(folder / "checkpoints" / "model_best")


# ---------------------------------------------------------------------------------------------------------------------
# Signals, and ranks that are lost

SCRIPT = """
import os, signal, time
from common.cli import run
from common.paddle_setup import set_up_paddle
set_up_paddle()
import train_batch_neg
from batch_negative import evaluator
from batch_negative.trainer import Trainer
from modeling import checkpoint

train_step, encode_queries, write_manifest = Trainer.step, evaluator.encode_queries, checkpoint.write_manifest

def slow_step(*arguments, **options):
    time.sleep(0.5)
    return train_step(*arguments, **options)

def endless_evaluation(*arguments, **options):
    if os.environ.get("PADDLE_TRAINER_ID", "0") == os.environ["ENDLESS_EVALUATION"]:
        print("evaluating", flush=True)
        time.sleep(1000)
    return encode_queries(*arguments, **options)

def interrupted(folder, **more):
    os.kill(os.getpid(), signal.SIGINT)
    write_manifest(folder, **more)

Trainer.step = slow_step
if "ENDLESS_EVALUATION" in os.environ:
    evaluator.encode_queries = endless_evaluation
if "INTERRUPTED_SAVING" in os.environ:
    checkpoint.write_manifest = interrupted
run(train_batch_neg.main)
"""
SECONDS_TO_START = 300.0  # of a script on a busy machine
SECONDS_TO_END = 60.0


class Script:
    """A training that runs, maybe on several ranks. All of its processes have `folder` on their command lines."""

    def __init__(self, folder: Path, options: list[str], *launch: str, **environment: str) -> None:
        self.folder, self.log = folder, folder / f"log {len(list(folder.glob('log *')))}"
        (folder / "script.py").write_text(SCRIPT)
        if launch:
            launch = ("-m", "paddle.distributed.launch", "--log_dir", f"{self.log} of ranks", *launch)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launch, str(folder / "script.py"), *options],
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def output(self, rank: int | None = None) -> str:
        """What a rank of this launcher printed, or the script itself."""
        file = self.log if rank is None else Path(f"{self.log} of ranks") / f"workerlog.{rank}"
        return file.read_text(errors="replace") if file.exists() else ""

    def wait_for(self, text: str, rank: int | None = None) -> None:
        """Returns when the text has been printed."""
        end = time.monotonic() + SECONDS_TO_START
        while text not in self.output(rank):
            assert self.process.poll() is None and time.monotonic() < end, self.output(rank)
            time.sleep(0.02)

    def end(self) -> int:
        """Waits for the script's end and returns its exit code; nothing that it started is left."""
        code = self.process.wait(SECONDS_TO_END)
        time.sleep(0.5)  # for the kernel
        assert processes(self.folder) == {}
        return code


def processes(folder: Path) -> dict[int, str]:
    """Process id -> rank, or "" for a launcher, of what runs with a folder on its command line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if str(folder).encode() in (process / "cmdline").read_bytes():
                variables = (process / "environ").read_bytes().split(b"\0")
                ranks = [pair.split(b"=")[1].decode() for pair in variables if pair.startswith(b"PADDLE_TRAINER_ID=")]
                found[int(process.name)] = ranks[0] if ranks else ""
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Starts a Script in tmp_path; what still runs at the end of the test is killed."""
    yield partial(Script, tmp_path)
    for process in processes(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def signal_options(model_folder: Path, recall_data: Path, folder: Path, *options: str) -> list[str]:
    """Twelve steps, saved after every four and evaluated after every six."""
    steps = ["--max_steps", "12", "--batch_size", "8", "--save_steps", "4", "--eval_steps", "6", "--log_steps", "1"]
    options = evaluation_options(recall_data, folder / "results", *steps, *options)
    return train_options(model_folder, recall_data, folder / "checkpoints", *options)


@pytest.fixture(scope="module")
def whole(model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training of one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_batch_neg.main(signal_options(model_folder, recall_data, folder)) == 0
    return folder / "checkpoints" / "model_12"


@pytest.fixture(scope="module")
def whole_of_two(model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of an uninterrupted training of two ranks."""
    folder = tmp_path_factory.mktemp("whole_of_two")
    options = signal_options(model_folder, recall_data, folder)
    done = run_script("train_batch_neg.py", *options, ranks=2, log_dir=folder / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "checkpoints"


@pytest.mark.parametrize(
    ("number", "line", "environment"),
    [
        (signal.SIGTERM, "global step 2/", {"INTERRUPTED_SAVING": "1"}),
        (signal.SIGINT, "evaluating", {"ENDLESS_EVALUATION": "0"}),
    ],
    ids=["step", "evaluation"],
)
def test_a_signal_ends_a_training_after_the_step_and_loses_nothing(
    whole: Path,
    start: Callable[..., Script],
    model_folder: Path,
    recall_data: Path,
    tmp_path: Path,
    number: signal.Signals,
    line: str,
    environment: dict[str, str],
) -> None:
    """A second signal, in the middle of saving, changes nothing."""
    options = signal_options(model_folder, recall_data, tmp_path)
    script = start(options, **environment)
    script.wait_for(line)
    script.process.send_signal(number)
    assert script.end() == 128 + number
    folder = latest_folder(tmp_path / "checkpoints")
    step = folder.name.removeprefix("model_")
    assert step == "6" if line == "evaluating" else 2 < int(step) < 12
    said = f"stopped by {number.name} after step {step}: wrote {folder}; go on with --resume_from latest"
    assert said in script.output().splitlines()
    assert "Traceback" not in script.output()
    assert leftovers(tmp_path) == []
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    assert_same_bits(whole, tmp_path / "checkpoints" / "model_12")


@pytest.mark.parametrize("step", [4, 12])
def test_a_kill_in_an_evaluation_costs_that_alone(
    start: Callable[..., Script], model_folder: Path, recall_data: Path, tmp_path: Path, step: int
) -> None:
    """The step had been saved; the resumed training evaluates it first."""
    options = signal_options(model_folder, recall_data, tmp_path / "killed", "--eval_steps", str(step))
    (tmp_path / "killed").mkdir()
    script = start(options, ENDLESS_EVALUATION="0")
    script.wait_for("evaluating")
    script.process.kill()
    assert script.end() == -signal.SIGKILL
    save_dir = tmp_path / "killed" / "checkpoints"
    assert latest_folder(save_dir) == save_dir / f"model_{step}"
    script = start([*options, "--resume_from", "latest"])
    assert script.process.wait(SECONDS_TO_START) == 0
    assert "recall@5=" in script.output().split("global step")[0]
    assert leftovers(tmp_path) == []

    whole = signal_options(model_folder, recall_data, tmp_path / "whole", "--eval_steps", str(step))
    assert train_batch_neg.main(whole) == 0
    checkpoints = [tmp_path / name / "checkpoints" / "model_12" for name in ("killed", "whole")]
    assert_same_bits(*checkpoints)
    histories = [read_training_state(folder).progress["evaluator"] for folder in checkpoints]
    assert histories[0] == histories[1]
    reports = [(tmp_path / name / "results" / "evaluate_result.txt").read_text() for name in ("killed", "whole")]
    assert reports[0] == reports[1] and reports[0].count("global step") == 12 // step


def test_stopped_and_killed_ranks_lose_nothing(
    whole_of_two: Path, start: Callable[..., Script], model_folder: Path, recall_data: Path, tmp_path: Path
) -> None:
    """The launcher is told to stop, the resumed training loses a rank, and the next one comes to the end."""
    options = [*signal_options(model_folder, recall_data, tmp_path), "--resume_from", "latest"]
    save_dir = tmp_path / "checkpoints"
    script = start(options, "--nproc_per_node", "2")
    script.wait_for("global step 1/", rank=0)
    assert sorted(processes(tmp_path).values()) == ["", "0", "1"]
    script.process.send_signal(signal.SIGTERM)
    assert script.end() == signal.SIGTERM  # which is how this launcher reports it
    stopped = latest_folder(save_dir)
    assert stopped in step_folders(save_dir)[-1:] and leftovers(tmp_path) == []
    said = f"stopped by SIGTERM after step {stopped.name[6:]}: wrote {stopped}; go on with --resume_from latest"
    assert said in script.output(rank=0).splitlines()
    assert "Traceback" not in script.output(rank=0) + script.output(rank=1)

    script = start(options, "--nproc_per_node", "2")
    script.wait_for("global step 9/", rank=0)
    (rank_1,) = [process for process, rank in processes(tmp_path).items() if rank == "1"]
    os.kill(rank_1, signal.SIGKILL)
    assert script.end() != 0
    assert f"resuming from {stopped}" in script.output(rank=0)
    assert latest_folder(save_dir) == save_dir / "model_8"

    done = run_script("train_batch_neg.py", *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_bits(whole_of_two / "model_12", save_dir / "model_12")


def test_two_machines_train_as_one_and_stop_together(
    whole_of_two: Path, start: Callable[..., Script], model_folder: Path, recall_data: Path, tmp_path: Path
) -> None:
    """Two launchers; the one without rank 0 is told to stop while the other waits for it in an evaluation."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{free.getsockname()[1]}"
    options = signal_options(model_folder, recall_data, tmp_path)
    machines = [
        start(options, "--master", master, "--nnodes", "2", "--nproc_per_node", "1", ENDLESS_EVALUATION="1")
        for _ in range(2)
    ]
    ranks: dict[str, int] = {}
    end = time.monotonic() + SECONDS_TO_START
    while len(ranks) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
        ranks = {rank: process for process, rank in processes(tmp_path).items() if rank}
    first, second = sorted(machines, key=lambda machine: machine.process.pid != parent(int(ranks["0"])))
    second.wait_for("evaluating", rank=0)
    second.process.send_signal(signal.SIGTERM)
    first.process.wait(SECONDS_TO_END)
    assert second.end() == signal.SIGTERM
    assert first.process.returncode == 128 + signal.SIGTERM
    save_dir = tmp_path / "checkpoints"
    assert [folder.name for folder in step_folders(save_dir)] == ["model_4", "model_6"]
    assert_same_weights(whole_of_two / "model_4", save_dir / "model_4", 1e-5)  # more threads on each rank
    assert latest_folder(save_dir) == save_dir / "model_6"
    assert len(list((save_dir / "visualdl").iterdir())) == 1
    said = f"stopped by SIGTERM after step 6: wrote {save_dir / 'model_6'}; go on with --resume_from latest"
    assert said in first.output(rank=0).splitlines()
    for part in ("global step", "stopped by", "training on"):
        assert part in first.output(rank=0)
        assert part not in second.output(rank=0)


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_disk_that_fills_up_ends_the_training_with_one_line(
    start: Callable[..., Script], model_folder: Path, recall_data: Path, tmp_path: Path
) -> None:
    """A limit on the size of its files stands in: half of the weights still fit."""
    options = [*signal_options(model_folder, recall_data, tmp_path), "--save_steps", "1"]
    script = start(options)
    script.wait_for("global step 3/")
    resource.prlimit(script.process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert script.end() == 2
    save_dir = tmp_path / "checkpoints"
    last = step_folders(save_dir)[-1]
    following = step_folder(save_dir, int(last.name.removeprefix("model_")) + 1)
    assert script.output().splitlines()[-1] == f"error: {following}: can't be written (File too large)"
    assert "Traceback" not in script.output()
    assert latest_folder(save_dir) == last
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("shared", [True, False])
def test_a_nan_loss_on_one_rank_stops_all(checkpoint: Path, model_folder: Path, tmp_path: Path, shared: bool) -> None:
    """[UNK] has a vector that overflows, and a line of rank 1's in the third step has an unknown character."""
    steps = epoch_batches(64, 8, seed=1000, epoch=1, world_size=2)
    pairs = all_pairs()[:64]
    pairs[steps[2][1][5]] = ("鑫", pairs[steps[2][1][5]][1])
    file = write_pairs(tmp_path / "data" / "train.csv", pairs)
    options = ["--epochs", "1", "--batch_size", "8", "--save_steps", "1", "--init_from_ckpt"]
    options += [str(poisoned(checkpoint, tmp_path / "poisoned")), *([] if shared else ["--no_cross_device_negatives"])]
    options = train_options(model_folder, tmp_path / "data", tmp_path / "checkpoints", *options)
    done = run_script("train_batch_neg.py", *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 2
    assert processes(tmp_path) == {}
    rows = [[*steps[2][0], *steps[2][1]]] * 2 if shared else [[], steps[2][1]]
    for rank in range(2):
        lines = ", ".join(str(row + 1) for row in sorted(rows[rank]))
        where = f"the batch has lines {lines} of {file}" if lines else "another process names the batch's lines"
        output = (tmp_path / "log" / f"workerlog.{rank}").read_text()
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: the loss of step 3 is nan; {where}; ")
        assert "Traceback" not in output
    assert latest_folder(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "model_2"
