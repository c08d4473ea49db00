"""The vocabulary of a model that is trained from scratch."""

import json
import random
import re
import subprocess
import sys

import pytest

from data import TextTokenizer
from examples.vocabulary import build_vocabulary
from helpers import ROOT, VARIED_TEXTS


def test_build_vocabulary_starts_with_special_tokens_and_covers_all_characters() -> None:
    vocabulary = build_vocabulary(iter(VARIED_TEXTS))
    assert vocabulary[:5] == ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    assert len(set(vocabulary)) == len(vocabulary)
    tokenizer = TextTokenizer(vocabulary, 512)
    short_words = [text for text in VARIED_TEXTS if not re.search(r"\w{100}", text)]
    assert len(short_words) > 10
    assert not any(4 in ids for ids in tokenizer.tokenize(short_words))


@pytest.mark.process
def test_build_vocabulary_is_the_same_in_every_process() -> None:
    texts = ["深度学习", "deep learning learns", "learned deeply", *VARIED_TEXTS]
    command = (
        f"import json; from examples.vocabulary import build_vocabulary; "
        f"print(json.dumps(build_vocabulary({texts!r}, 250)))"
    )
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == build_vocabulary(texts, 250) == build_vocabulary(texts, 250)


def test_build_vocabulary_s_size_bounds_the_pieces_beyond_the_characters() -> None:
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(500)]
    characters = 5 + 2 * 8  # special tokens, then each character at the start of a word and inside it
    assert [len(build_vocabulary(texts, size)) for size in (characters, 50, 60)] == [characters, 50, 60]
    assert len(build_vocabulary(texts[:1], 30000)) < 30
    assert len(build_vocabulary(texts, 10)) == characters
