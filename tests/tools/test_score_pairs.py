"""Scoring a training file with the script, against the cosines of texts that are encoded one by one."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.texts import DOCUMENT, QUERY
from data import TextPair, read_text_pairs
from encoding.encoder import Encoder, load_encoder
from helpers import all_pairs, run_script, run_without_paddle, write_pairs
from mining import blocks
from tools import score_pairs

NEGATIVES = [title for _, title in all_pairs()[60:66]]
# Of 0 to 3 hard negatives; the last two pairs share all of their texts with others.
ROWS = [(query, title, *NEGATIVES[row % 3 : row % 3 + row % 4]) for row, (query, title) in enumerate(all_pairs()[:9])]
ROWS += [(ROWS[3][0], ROWS[1][1], NEGATIVES[0]), (ROWS[3][0], NEGATIVES[0])]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 4)


@pytest.fixture(scope="module")
def train_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "train.csv", ROWS)


def arguments(checkpoint: Path, train_set: Path, output: Path) -> list[str]:
    files = ["--train_set_file", str(train_set), "--output", str(output)]
    return ["--params_path", str(checkpoint), "--device", "cpu", *files]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[float]]:
    """The cosine of each query with its title and hard negatives."""
    encoder = load_encoder(checkpoint)
    return [
        [float(encoder.encode([query], role=QUERY)[0] @ encoder.encode([text], role=DOCUMENT)[0]) for text in texts]
        for query, *texts in ROWS
    ]


def check(output: Path, expected: list[list[float]], rows: list[tuple[str, ...]] = ROWS) -> None:
    """The output has all texts in order, and their scores."""
    pairs = read_text_pairs(output, teacher_scores=True)
    assert pairs == [
        TextPair(query, title, tuple(negatives), pair.teacher_scores)
        for (query, title, *negatives), pair in zip(rows, pairs, strict=True)
    ]
    for pair, scores in zip(pairs, expected, strict=True):
        np.testing.assert_allclose(pair.teacher_scores, scores, rtol=0, atol=1e-5)
    assert {path.name for path in output.parent.iterdir()} == {output.name}


def test_scores_are_the_cosines_of_the_texts(
    checkpoint: Path, train_set: Path, expected: list[list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score_pairs.main(arguments(checkpoint, train_set, tmp_path / "scored.csv")) == 0
    check(tmp_path / "scored.csv", expected)
    assert capsys.readouterr().out == f"wrote {tmp_path}/scored.csv: the scores of {len(ROWS)} pairs\n"


def test_an_interrupted_run_goes_on(
    checkpoint: Path, train_set: Path, expected: list[list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each distinct text of a block is encoded once, and no block twice; other inputs are refused."""
    encoded: list[str] = []
    encode = Encoder.encode

    def spy(encoder: Encoder, texts: list[str], **options: str) -> np.ndarray:
        if len(encoded) > 20:
            raise KeyboardInterrupt
        encoded.extend(texts)
        return encode(encoder, texts, **options)

    options = arguments(checkpoint, train_set, tmp_path / "scored.csv")
    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "encode", spy)
        with pytest.raises(KeyboardInterrupt):
            score_pairs.main(options)
    block_rows = [ROWS[:4], ROWS[4:8], ROWS[8:]]
    texts_of = [{row[0] for row in block} | {(text,) for row in block for text in row[1:]} for block in block_rows]
    assert len(encoded) == len(texts_of[0]) + len(texts_of[1]) > 20
    assert not (tmp_path / "scored.csv").exists()

    other = write_pairs(tmp_path / "other.csv", ROWS[1:])
    with pytest.raises(InputError, match=r"scored.csv.scoring: an interrupted run of scoring had another train"):
        score_pairs.main(arguments(checkpoint, other, tmp_path / "scored.csv"))
    other.unlink()
    block = tmp_path / "scored.csv.scoring" / "block_000001.json"
    content = block.read_text()
    block.write_text(json.dumps({"scores": [[0.5]]}))
    with pytest.raises(InputError, match=r"block_000001.json: isn't as it was written; remove it"):
        score_pairs.main(options)
    block.write_text(content)

    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "encode", None)  # all that is left is to write the file
        assert score_pairs.main(options) == 0
    check(tmp_path / "scored.csv", expected)


def test_bad_lines_are_left_out_and_reported_once(
    checkpoint: Path, expected: list[list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    lines = ["\t".join(row) for row in ROWS]
    bad = tmp_path / "bad.csv"
    bad.write_text("\n".join([*lines[:2], "one column", *lines[2:], "at the end"]) + "\n", encoding="utf-8")
    options = arguments(checkpoint, bad, folder / "scored.csv")
    with pytest.raises(InputError, match=f"{bad}:3: 1 column"):
        score_pairs.main(options)
    assert not folder.exists()
    assert score_pairs.main([*options, "--skip_bad_lines"]) == 0
    check(folder / "scored.csv", expected)
    assert capsys.readouterr().err.count("left out 2 bad line(s)") == 1


@pytest.mark.process
def test_what_cannot_be_used_is_refused_without_paddle(checkpoint: Path, train_set: Path, tmp_path: Path) -> None:
    script, output = "tools/score_pairs.py", tmp_path / "scored.csv"
    pairs = write_pairs(tmp_path / "pairs.csv", [row[:2] for row in ROWS])
    code, _, err = run_without_paddle(script, *arguments(checkpoint, pairs, output))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {pairs}: no line has a hard negative, ")
    code, _, err = run_without_paddle(script, *arguments(checkpoint, train_set, train_set))
    assert (code, err) == (2, f"error: --output {train_set}: would replace a file that is read; give another one\n")
    assert run_without_paddle(script, "--help")[0] == 0


@pytest.mark.process
def test_two_ranks_share_the_blocks(checkpoint: Path, expected: list[list[float]], tmp_path: Path) -> None:
    """1,100 pairs: a block for each."""
    many = write_pairs(tmp_path / "many.csv", ROWS * 100)
    options = arguments(checkpoint, many, tmp_path / "out" / "scored.csv")
    done = run_script("tools/score_pairs.py", *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path / "out" / "scored.csv", expected * 100, ROWS * 100)
