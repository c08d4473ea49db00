"""Pairs cut from texts, and the training on them."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import InputError
from data import parse_pair
from helpers import ROOT
from tools import pretrain


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("压力性损伤的护理研究进展", list("压力性损伤的护理研究进展")),
        ("how to treat a cold at home", ["how", "to", "treat", "a", "cold", "at", "home"]),
        ("用PaddleNLP 2.8训练ERNIE模型，很快", [*"用", "PaddleNLP", "2.8", *"训练", "ERNIE", *"模型", "，", *"很快"]),
    ],
)
def test_pieces_are_whole_units_in_their_order(text: str, units: list[str]) -> None:
    rng = random.Random(0)
    for _ in range(200):
        pair = pretrain.cut_pair(text, rng)
        for piece in pair or ():
            found = pretrain.UNIT.findall(piece)
            starts = [at for at in range(len(units)) if units[at : at + len(found)] == found]
            assert piece in text and starts and 0.1 <= round(len(found) / len(units), 1) <= 0.5
    firsts, seconds = zip(*(pretrain.cut_pair(text, rng) or ("", "") for _ in range(200)), strict=True)
    assert len(set(firsts)) > 5 and len(set(seconds)) > 5


def test_short_texts_are_not_cut_and_the_seed_decides() -> None:
    texts = ["五个字的文", "压力性损伤的护理研究进展", "a b c d e"]
    pairs = list(pretrain.cut_pairs(texts, 3, seed=1))
    assert len(pairs) == 3 and pairs == list(pretrain.cut_pairs(texts, 3, seed=1))
    assert pairs != list(pretrain.cut_pairs(texts, 3, seed=2))
    assert all(first in texts[1] and second in texts[1] and first != second for first, second in pairs)


@pytest.mark.parametrize("nothing", ["\ue41f", "\u200b", "\ufffd"])
def test_a_piece_that_shows_nothing_is_left_out(nothing: str) -> None:
    """A document of classical Chinese has characters of a font's private use; training would refuse such a title."""
    pairs = list(pretrain.cut_pairs([f"小 字 {nothing} 儿 {nothing} 也"], 200, seed=1))
    assert 20 < len(pairs) < 200
    for first, second in pairs:
        parse_pair(f"{first}\t{second}")


def test_every_text_counts_once(tmp_path: Path) -> None:
    (tmp_path / "corpus.csv").write_text("甲乙丙\n丁戊己\n甲乙丙。\n", encoding="utf-8")
    (tmp_path / "train.csv").write_text("丁戊己\t庚辛壬\n", encoding="utf-8")
    files = [str(tmp_path / "corpus.csv"), str(tmp_path / "train.csv")]
    assert list(pretrain.read_distinct_texts(files, skip_bad_lines=False)) == ["甲乙丙", "丁戊己", "庚辛壬"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("甲乙丙\n", "nothing to cut"), ("\n甲乙丙丁戊己庚辛\n", r"texts\.csv:1: the line is empty")],
)
def test_texts_that_can_not_be_used_leave_no_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "texts.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        pretrain.main(["--text_file", str(tmp_path / "texts.csv"), "--save_dir", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.process
def test_a_checkpoint_comes_of_it_and_is_kept(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    """The same command cuts the same pairs, so that an interrupted training would go on."""
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), "--text_file", str(recall_data / "corpus.csv")]
    command += ["--save_dir", str(tmp_path), "--from_scratch", str(model_folder), "--batch_size", "8"]
    command += ["--max_steps", "2", "--resume_from", "latest"]
    logs = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        assert f"{tmp_path / pretrain.PAIRS_FILE}: " in done.stderr
        logs.append(done.stdout + done.stderr)
    assert "global step" in logs[0] or "wrote" in logs[0]
    assert "wrote" not in logs[1] and str(tmp_path / "model_2") in logs[1]
