"""tools/check_data.py on files that a test makes."""

from pathlib import Path

import pytest

from browser_helpers import at, complaints, new_window, set_width, texts
from common.errors import InputError
from helpers import write_pairs
from tools import check_data


def test_numbers_come_before_examples(recall_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, dev, corpus = (str(recall_data / name) for name in ("train.csv", "dev.csv", "corpus.csv"))
    options = ["--train_set_file", train, "--dev", dev, "--corpus_file", corpus]
    assert check_data.main([*options, "--strict"]) in (0, 2)
    numbers, *examples = capsys.readouterr().out.split("\n\n")
    assert numbers.splitlines() == [
        f"{train}: 128 queries (128 distinct), 128 titles (128 distinct)",
        f"{dev}: 40 queries (40 distinct), 40 titles (40 distinct)",
        f"{corpus}: 168 documents (168 distinct)",
    ]
    assert "64 pairs: 0.0 with the mask" in "\n\n".join(examples)


def test_strict_tells_whether_a_rule_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [("水稻", "水稻产量的影响因素"), ("图书馆", "读者服务"), ("钢材", "裂纹扩展")]
    clean = str(write_pairs(tmp_path / "clean.csv", pairs))
    bad = str(write_pairs(tmp_path / "bad.csv", [*pairs, ("同样", "同样")]))
    assert check_data.main(["--train_set_file", clean, "--strict"]) == 0
    assert "not found: the file isn't text in UTF-8; " in capsys.readouterr().out
    assert check_data.main(["--train_set_file", bad]) == 0
    out = capsys.readouterr().out
    assert f"! {bad}: pairs whose title is the query itself: 1 of 4 (25.00 %)\n" in out
    assert f"  {bad}:4: '同样' → '同样'\n" in out
    assert check_data.main(["--train_set_file", bad, "--strict"]) == 2


def test_a_model_adds_lengths(recall_data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dev = str(recall_data / "dev.csv")
    assert check_data.main(["--dev", dev, "--params_path", str(checkpoint), "--max_seq_length", "6"]) == 0
    out = capsys.readouterr().out
    assert f"! {dev}, titles: texts that are cut to --max_seq_length (of a sample): 40 of 40 (100.00 %)\n" in out
    assert f"{dev}, queries: 99 % fit into --max_seq_length" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "nothing to check"), (["--dev", "d", "--max_seq_length", "9"], "needs the vocabulary")],
)
def test_options_that_make_no_sense(options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_data.main(options)


@pytest.mark.browser
def test_the_report_in_a_browser(tmp_path: Path, model_folder: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    pairs = [(f"问题{number}", f"答案{number}") for number in range(64)]
    bad = str(write_pairs(tmp_path / "bad.csv", [*pairs, (hostile, hostile), ("长" * 900, "短")]))
    report = tmp_path / "data.html"
    options = ["--params_path", str(model_folder), "--report", str(report)]
    assert check_data.main(["--train_set_file", bad, *options]) == 0
    window = new_window("en")
    try:
        window.get(report.as_uri())
        assert complaints(window) == []
        assert texts(window, "h2") == ["Files", "Findings", "Examples", "Lengths", "Suspected false negatives"]
        assert "pairs whose title is the query itself" in texts(window, "span.bad span[lang=en]")
        assert "texts that are cut" not in at(window, "p.quiet").text
        at(window, "#section-2 summary").click()
        line = f"{hostile}\t{hostile}"
        assert texts(window, "#section-2 details[open] li") == [f"{bad}:65: {line!r}"]
        for width in (400, 1600):
            set_width(window, width)
            assert window.execute_script("return document.documentElement.scrollWidth") <= width
        at(window, "#language").click()
        assert "标题就是 query 本身的 Pair" in texts(window, "span.bad span")
    finally:
        window.quit()
