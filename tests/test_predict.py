"""The script that compares pairs of texts."""

from pathlib import Path

import numpy as np
import pytest

import predict
from data import read_text_pairs
from encoding.encoder import load_encoder
from helpers import run_script


def test_skipped_lines_are_counted_and_keep_their_place(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("一\t二\n坏\n三\t四\n", encoding="utf-8")
    options = ["--params_path", str(checkpoint), "--device", "cpu", "--text_pair_file", str(pairs)]
    assert predict.main([*options, "--skip_bad_lines"]) == 0
    out, err = capsys.readouterr()
    assert [line == "nan" for line in out.splitlines()] == [False, True, False]
    assert f"{pairs}: left out 1 bad line(s) of 3" in err


@pytest.fixture
def cosines(checkpoint: Path, recall_data: Path) -> np.ndarray:
    """Those of the pairs in dev.csv."""
    encoder, pairs = load_encoder(checkpoint), read_text_pairs(recall_data / "dev.csv")
    return (encoder.encode([pair.query for pair in pairs]) * encoder.encode([pair.title for pair in pairs])).sum(axis=1)


@pytest.mark.parametrize("padding", [(), ("--pad_to_max_seq_len",)])
def test_cosines_are_in_the_order_of_the_lines(
    checkpoint: Path,
    recall_data: Path,
    cosines: np.ndarray,
    padding: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However the texts are padded."""
    options = ["--params_path", str(checkpoint), "--text_pair_file", str(recall_data / "dev.csv"), "--device", "cpu"]
    assert predict.main([*options, *padding]) == 0
    found = [float(line) for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(found, cosines, rtol=0, atol=1e-5)


@pytest.mark.process
def test_two_ranks_print_each_cosine_once(
    checkpoint: Path, recall_data: Path, tmp_path: Path, cosines: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU though the launcher sees GPUs, in the order of the lines, and nan for one that is left out."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    lines = (recall_data / "dev.csv").read_text(encoding="utf-8").splitlines()
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("\n".join([*lines[:2], "one column", *lines[2:]]), encoding="utf-8")
    options = ["--params_path", checkpoint, "--text_pair_file", pairs, "--device", "cpu", "--skip_bad_lines"]
    done = run_script("predict.py", *options, "--batch_size", "2", ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    own, others = ((tmp_path / "log" / f"workerlog.{rank}").read_text().splitlines() for rank in (0, 1))
    found = [float(line) for line in own if line == "nan" or line.lstrip("-").startswith("0.")]
    np.testing.assert_allclose(found, [*cosines[:2], np.nan, *cosines[2:]], rtol=0, atol=1e-5)
    assert not any(line == "nan" or line.lstrip("-").startswith("0.") for line in others)
