import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import bench_grad_cache, harness
from data import TextPair, TextTokenizer
from helpers import all_pairs

PAIRS = [TextPair(*pair) for pair in all_pairs()]


def test_the_benchmark_of_the_gradient_cache(
    folder: Path, trained: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_grad_cache.main(["--quick", "--model", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["peak_memory_ratio"] == 1
    assert result["time_per_pair_ratio"] == 0.5  # steps of twice the pairs in the same time
    assert [("--grad_cache_chunk" in command) for command in trained] == [False, True, False, True, True, True]


def test_its_texts_are_different_and_fill_the_length(folder: Path) -> None:
    pairs = bench_grad_cache.full_length(PAIRS, 400)
    assert len({text for pair in pairs for text in pair[:2]}) == 800
    tokenizer = TextTokenizer.load(folder, harness.MAX_SEQ_LENGTH)
    assert tokenizer([text for pair in pairs for text in pair[:2]])[0].min() != tokenizer.pad_id
