"""deploy/python/predict.py: vectors, similarities and its benchmark."""

import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from common.errors import InputError
from data import encode_texts
from encoding import engines, static_graph
from helpers import ROOT, about_texts_alone, has_gpu, run_script, write_pairs
from modeling.checkpoint import load_checkpoint

SCRIPT = ROOT / "deploy" / "python" / "predict.py"
LONG_TEXT = "论水稻产量研究水稻,产量" * 10  # longer than the position table


@pytest.mark.process
def test_documents_command_prints_the_documents_output(exported: Path, tmp_path: Path) -> None:
    """Shape, vector and two similarities, from any folder, without importing PaddleNLP."""
    code = """
import runpy, sys
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "paddle" in sys.modules
    for name in ("paddlenlp.transformers", "base_model", "modeling.checkpoint"):
        assert name not in sys.modules
"""
    done = run_script("-c", code, SCRIPT, f"--model_dir={exported}", cwd=tmp_path)
    assert done.returncode == 0
    assert about_texts_alone(done.stderr)  # the tiny model doesn't know the document's text
    match = re.fullmatch(r"\(1, 16\)\n\[\[([^\]]*)\]\]\n(\[.*\])\n", done.stdout)
    vector = np.array(match.group(1).split(), dtype=np.float32)
    assert vector.shape == (16,) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    similarities = json.loads(match.group(2))
    assert len(similarities) == 2 and all(-1 <= value <= 1 for value in similarities)
    assert list(tmp_path.iterdir()) == []


def test_vectors_of_options_and_files(
    exported: Path, checkpoint: Path, deploy_predict: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of --text come first; all equal the model's."""
    (tmp_path / "texts.txt").write_text("玉米\n\n土壤的评价\n", encoding="utf-8")
    options = ["--text", "水", "--text", LONG_TEXT, "--text_file", str(tmp_path / "texts.txt"), "--skip_bad_lines"]
    output = tmp_path / "vectors.npy"
    assert (
        deploy_predict.main(["--model_dir", str(exported), "--output", str(output), "--batch_size", "3", *options]) == 0
    )
    assert capsys.readouterr().out == f"(4, 16)\nwrote {output}\n"
    model, tokenizer, *_ = load_checkpoint(checkpoint)
    expected = encode_texts(model.embed, ["水", LONG_TEXT, "玉米", "土壤的评价"], tokenizer, 1)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)


def test_similarities_of_a_file(
    exported: Path, checkpoint: Path, deploy_predict: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One for each line, nan for a bad one; without texts no vectors are printed."""
    pairs = [("水稻的产量", "论水稻产量研究"), ("只有一列",), ("水", LONG_TEXT)]
    file = write_pairs(tmp_path / "pairs.tsv", pairs)
    assert deploy_predict.main(["--model_dir", str(exported), "--text_pair_file", str(file), "--skip_bad_lines"]) == 0
    first, bad, last = capsys.readouterr().out.strip().strip("[]").split(", ")
    model, tokenizer, *_ = load_checkpoint(checkpoint)
    vectors = encode_texts(model.embed, [*pairs[0], *pairs[2]], tokenizer, 1)
    assert bad == "nan"
    assert [float(first), float(last)] == pytest.approx([vectors[0] @ vectors[1], vectors[2] @ vectors[3]], abs=1e-5)


def test_max_seq_length_cuts_the_texts(
    exported: Path, checkpoint: Path, deploy_predict: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original's deployment ignored the option."""
    vectors = []
    for length in (12, 40):
        output = tmp_path / f"{length}.npy"
        options = ["--text", LONG_TEXT, "--max_seq_length", str(length), "--output", str(output)]
        assert deploy_predict.main(["--model_dir", str(exported), *options]) == 0
        model, tokenizer, *_ = load_checkpoint(checkpoint, max_seq_length=length)
        vectors.append(np.load(output))
        np.testing.assert_allclose(vectors[-1], model.embed(*tokenizer([LONG_TEXT])), atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_original_switches_take_true_and_false(
    exported: Path, deploy_predict: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `--enable_mkldnn True` and as a bare `--enable_mkldnn`; all give the same similarities."""
    printed = []
    on_cpu = ["--model_dir", str(exported), "--device", "cpu", "--cpu_threads", "1"]
    for options in ([], ["--enable_mkldnn"], ["--enable_mkldnn", "False", "--use_tensorrt", "False"]):
        assert deploy_predict.main([*on_cpu, *options]) == 0
        printed.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert printed[1:] == [pytest.approx(printed[0], abs=1e-5)] * 2


def test_benchmark_prints_percentiles_and_throughput(
    exported: Path,
    deploy_predict: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deploy_predict, "BENCHMARK_SECONDS", 0.0)
    options = ["--benchmark", "--batch_size", "4", "--save_log_path", str(tmp_path / "logs")]
    assert deploy_predict.main(["--model_dir", str(exported), *options]) == 0
    lines = dict(line.split("=") for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["batch_size", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "texts_per_s"]
    figures = json.loads((tmp_path / "logs" / "benchmark.json").read_text())
    assert {name: round(value, 2) for name, value in figures.items()} == {n: float(v) for n, v in lines.items()}
    assert 0 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p95_ms"] <= figures["p99_ms"]


def test_benchmark_counts_texts(deploy_predict: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that takes 0.1 s for each batch: batches of 4 are 40 texts/s. They are full, in the texts' order."""
    now = iter(np.arange(1000) * 0.1)
    batches = []
    monkeypatch.setattr(deploy_predict.time, "perf_counter", lambda: next(now))
    model = SimpleNamespace(tokenizer=lambda texts: batches.append(texts) or (texts, texts), embed=lambda *_: None)
    figures = deploy_predict.measure(model, ["a", "b", "c"], 4)
    assert figures["texts_per_s"] == pytest.approx(40) and figures["p50_ms"] == pytest.approx(100)
    assert batches[:2] == [["a", "b", "c", "a"], ["b", "c", "a", "b"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", " "], "argument --text: the text is empty"),
        (["--text", "\udcff"], "argument --text: the text isn't UTF-8"),
        (["--use_tensorrt", "yes"], "argument --use_tensorrt: 'yes' is neither True nor False"),
        (["--batch_size", "0"], "argument --batch_size: 0 is out of range"),
        (["--cpu_threads", "0"], "argument --cpu_threads: 0 is out of range"),
        (["--max_seq_length", "2"], "argument --max_seq_length: 2 is out of range"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
    ],
)
def test_wrong_options_are_one_line(
    deploy_predict: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        deploy_predict.main(options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["--device", "gpu"],
            "--device gpu: .*; use --device cpu",
            marks=pytest.mark.skipif(has_gpu, reason="this machine has a GPU"),
        ),
        (["--device", "cpu", "--precision", "fp16"], "--precision fp16: a CPU doesn't compute in it; use fp32"),
        (["--device", "cpu", "--use_tensorrt"], "--use_tensorrt: needs --device gpu, and this is the CPU; leave"),
        (["--max_seq_length", "41"], "--max_seq_length 41: the position table of .* has 40 rows; use at most"),
        (["--text_file", "missing.txt"], "missing.txt: no such file"),
        (["--output", "/proc/1/vectors.npy"], "^/proc/1: can't be written"),
        (["--benchmark", "--save_log_path", "/proc/1/logs"], "^/proc/1/logs: can't be written"),
        (["--benchmark", "--output", "vectors.npy"], "^--output vectors.npy: with --benchmark there are no vectors"),
    ],
)
def test_what_the_machine_or_model_lacks_is_refused(
    exported: Path, deploy_predict: ModuleType, options: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        deploy_predict.main(["--model_dir", str(exported), *options])


def test_bf16_needs_onednn(exported: Path, deploy_predict: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engines, static_graph):
        monkeypatch.setattr(module, "check_precision", lambda precision, device: None)
    options = ["--device", "cpu", "--precision", "bf16", "--enable_mkldnn", "False"]
    with pytest.raises(InputError, match="--precision bf16: needs oneDNN on a CPU; leave out --enable_mkldnn False"):
        deploy_predict.main(["--model_dir", str(exported), *options])


@pytest.mark.process
def test_errors_end_the_program_with_code_2_and_one_line(tmp_path: Path) -> None:
    done = run_script(SCRIPT, "--model_dir", tmp_path / "missing")
    message = f"error: {tmp_path}/missing: no such model folder; export the model with export_model.py\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
