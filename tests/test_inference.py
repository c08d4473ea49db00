"""The script that turns texts into vectors."""

from pathlib import Path

import numpy as np
import pytest

import inference
from common.errors import InputError
from data import SAMPLE_TEXTS
from encoding.encoder import Encoder, load_encoder


def test_vectors_that_cannot_be_written_are_not_computed(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("encoded"))
    (tmp_path / "file").write_text("")
    options = ["--params_path", str(checkpoint), "--text_file", str(recall_data / "corpus.csv")]
    for place in (tmp_path, tmp_path / "file" / "in_a_file"):
        with pytest.raises(InputError, match="can't be written"):
            inference.main([*options, "--output", str(place)])


def test_vectors_are_printed_or_written(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, output = SAMPLE_TEXTS[:2], tmp_path / "new" / "vectors.npy"
    expected = load_encoder(checkpoint).encode(texts)
    options = ["--params_path", str(checkpoint), "--device", "cpu"]
    assert inference.main([*options, "--text", texts[0], "--text", texts[1], "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{list(expected.shape)}\nwrote {output}\n"
    np.testing.assert_array_equal(np.load(output), expected)
    assert inference.main(options) == 0
    shape, vectors = capsys.readouterr().out.split("\n", 1)
    assert shape == str([1, expected.shape[1]])
    found = np.array(vectors.replace("[", " ").replace("]", " ").split(), np.float32)
    np.testing.assert_allclose(found, expected[0], atol=1e-6)
