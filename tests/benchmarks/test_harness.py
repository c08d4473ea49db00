import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import paddle
import pytest

from batch_negative.model import SemanticIndexBatchNeg
from benchmarks import bench_encode, bench_train, harness
from common.cli import run
from common.errors import InputError
from data import UNK, TextTokenizer, read_text_pairs, read_vocabulary
from helpers import ROOT, run_script
from modeling.checkpoint import create_model

IN_ANOTHER_ENVIRONMENT = "sentence_transformers_train.py"
SCRIPTS = sorted(
    file.name
    for file in (ROOT / "benchmarks").glob("*.py")
    if "__main__" in file.read_text(encoding="utf-8") and file.name != IN_ANOTHER_ENVIRONMENT
)


@pytest.mark.parametrize("benchmark", [bench_train, bench_encode])
def test_without_the_peers_environment_one_line_says_how_to_make_it(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "BENCHMARKS_PYTHON", tmp_path / ".venv-benchmarks" / "bin" / "python")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: benchmark.main(["--quick"]))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sh scripts/setup.sh --benchmarks" in line


def test_inputs_that_are_not_given_are_made(tmp_path: Path) -> None:
    with harness.benchmark_inputs(None, None, harness.MEDIUM_ERNIE) as inputs:
        model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(inputs.model))
        assert (model.ptm.config.num_hidden_layers, model.ptm.config.hidden_size) == (4, 256)
        assert inputs.pairs[0] == read_text_pairs(inputs.folder / "recall" / "train.csv")[0]
        tokens = TextTokenizer.load(inputs.model, 64).tokenize([pair.title for pair in inputs.pairs[:100]])
        unknown = read_vocabulary(inputs.model / "vocab.txt").index(UNK)
        assert not any(unknown in ids for ids in tokens)


@pytest.mark.process
def test_a_trainers_failure_is_passed_on(tmp_path: Path) -> None:
    refuses = "import sys; print('error: no such file', file=sys.stderr); sys.exit(2)"
    with pytest.raises(InputError, match="no such file"):
        harness.run_process([sys.executable, "-c", refuses], tmp_path / "report.json", harness.Training)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        harness.run_process([sys.executable, "-c", "1 / 0"], tmp_path / "report.json", harness.Training)


def test_warming_up_is_not_timed(corpus_file: Path) -> None:
    encoded: list[int] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        encoded.append(len(texts))
        return np.arange(float(len(texts)))[:, None]

    encoding = harness.measure_encoding(encode, str(corpus_file), ["paddlepaddle"], warm_up=7, passes=3)
    assert encoded == [7, 50, 50, 50]
    assert len(encoding.pass_seconds) == 3
    assert encoding.vectors == [[3.0 * row] for row in range(harness.SAMPLE)]
    assert encoding.versions == {"paddlepaddle": paddle.__version__}


def test_no_benchmark_hides_a_module_of_the_project() -> None:
    """`python benchmarks/NAME.py` puts benchmarks/ first in Python's path."""
    project = {file.stem for file in ROOT.glob("*.py")} | {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert {"data", "common"} <= project
    assert not project & {file.stem for file in (ROOT / "benchmarks").glob("*.py")}


@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_any_folder(script: str, tmp_path: Path) -> None:
    done = run_script(ROOT / "benchmarks" / script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script}")
