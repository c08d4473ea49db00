"""The script that compares pairs of texts."""

from pathlib import Path

import pytest

import predict


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
