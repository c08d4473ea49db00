"""The fixtures that several test files share."""

import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy.testing  # noqa: F401 - its import starts lscpu, which fast tests refuse
import pytest
import visualdl  # noqa: F401 - its import starts `file`

from common.paddle_setup import set_up_paddle
from helpers import ROOT, all_pairs, make_model_folder, train_options, write_pairs
from milvus_helpers import Milvus, running_milvus, unpack_server

set_up_paddle()
FAST = "SEMANTIC_INDEX_FAST_TESTS"  # scripts/test.sh --fast sets it
# The files that take longest. They begin first, so that no process of pytest waits for one of them at the end.
LONG_FILES = {
    "test_docs.py",
    "test_faults.py",
    "test_milvus_faults.py",
    "test_quickstart.py",
    "test_vector_consistency.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of long files to the front; scripts/test.sh keeps xdist from sorting the files itself."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(autouse=True)
def _no_processes_in_fast_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps `scripts/test.sh --fast` fast: a test that starts a process has to be marked, and is left out there."""
    if os.environ.get(FAST):

        def refuse(*arguments: object, **_: object) -> None:
            raise AssertionError(f"starts {arguments}: mark the test with process, server or cpp")

        monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.fixture(autouse=True)
def _all_threads() -> Iterator[None]:
    """Gives the next test all threads again: a predictor's number of them is its whole process's."""
    yield
    from paddle.base import core

    core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that write very often: what is written need not outlast a crash of the system."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def milvus_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of a real Milvus server."""
    return unpack_server(tmp_path_factory.mktemp("milvus_program"))


@pytest.fixture(scope="session")
def milvus(milvus_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Milvus]:
    """A running Milvus server that wants a password; tests use collections of their own."""
    with running_milvus(milvus_program, tmp_path_factory.mktemp("milvus"), authorization=True) as milvus:
        yield milvus


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ERNIE without weights."""
    return make_model_folder(tmp_path_factory.mktemp("ernie"))


@pytest.fixture(scope="session")
def still_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ERNIE without weights and without dropout."""
    folder = tmp_path_factory.mktemp("still_ernie")
    return make_model_folder(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="session")
def recall_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv, dev.csv and corpus.csv."""
    folder = tmp_path_factory.mktemp("data") / "recall"
    pairs = all_pairs()
    write_pairs(folder / "train.csv", pairs[:128])
    write_pairs(folder / "dev.csv", pairs[128:])
    write_pairs(folder / "corpus.csv", [(title,) for _, title in pairs])
    return folder


@pytest.fixture(scope="session")
def checkpoint(model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that a short training wrote."""
    import train_batch_neg

    save_dir = tmp_path_factory.mktemp("checkpoints")
    train_batch_neg.main(train_options(model_folder, recall_data, save_dir, "--max_steps", "4"))
    return save_dir / "model_4"


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What export_model.py makes of the checkpoint."""
    import export_model

    folder = tmp_path_factory.mktemp("exported") / "output"
    assert export_model.main(["--params_path", str(checkpoint), "--output_path", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def deploy_predict() -> ModuleType:
    """deploy/python/predict.py."""
    spec = importlib.util.spec_from_file_location("deploy_predict", ROOT / "deploy" / "python" / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cpp_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ server, built with AddressSanitizer, once for all of pytest's processes; needs `cpp_environment`."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # of all processes
    folder = base / "cpp_build"
    with (base / "cpp_build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "serving").is_file():
            options = ["--sanitize", "--build-dir", folder, "--python", sys.executable]
            command = ["sh", ROOT / "deploy" / "C++" / "build.sh", *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout == f"{folder}/serving\n"
    return folder / "serving"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The documents of the corpus that have been encoded."""
    from retrieval import pipeline

    texts: list[str] = []
    encode_texts = pipeline.encode_texts

    def spy(embed: object, rows: list[str], *arguments: object) -> object:
        texts.extend(rows)
        return encode_texts(embed, rows, *arguments)

    monkeypatch.setattr(pipeline, "encode_texts", spy)
    return texts
