import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import bench_grad_cache, harness
from helpers import all_pairs, make_model_folder, write_pairs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for texts of harness.MAX_SEQ_LENGTH."""
    return make_model_folder(tmp_path_factory.mktemp("ernie"), max_position_embeddings=harness.MAX_SEQ_LENGTH)


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """50 texts."""
    return write_pairs(tmp_path / "corpus.csv", [(title,) for _, title in all_pairs()[:50]])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Replaces the trainers' processes; the list of their commands."""
    commands: list[Sequence[str]] = []

    def run_process(command: Sequence[str | Path], report: Path, kind: type) -> harness.Training:
        assert kind is harness.Training
        commands.append(list(map(str, command)))
        steps = int(commands[-1][commands[-1].index("--steps") + 1])
        slowness = 1 + next(
            place
            for place, name in enumerate(["train_ours.py", "sentence", "reference"])
            if name in " ".join(commands[-1])
        )
        return harness.Training([9.0] + [float(slowness)] * (steps - 1), [0.5] * steps, 1 << 20, {"paddle": "3"})

    monkeypatch.setattr(harness, "run_process", run_process)
    monkeypatch.setattr(bench_grad_cache, "run_process", run_process)
    monkeypatch.setattr(harness, "BENCHMARKS_PYTHON", Path(sys.executable))
    return commands
