"""The script that turns texts into vectors."""

from pathlib import Path

import numpy as np
import pytest

import inference
from common.errors import InputError
from common.vector_dtypes import to_dtype
from data import SAMPLE_TEXTS, read_texts
from encoding.encoder import Encoder, load_encoder
from helpers import file_size_limit


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


def test_vectors_of_a_file_are_in_the_order_of_its_lines(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors.npy"
    options = ["--params_path", str(checkpoint), "--text_file", str(recall_data / "corpus.csv"), "--device", "cpu"]
    assert inference.main([*options, "--output", str(output)]) == 0
    expected = load_encoder(checkpoint).encode(read_texts(recall_data / "corpus.csv"))
    np.testing.assert_allclose(np.load(output), expected, rtol=0, atol=1e-6)


def test_vectors_are_written_in_less_room(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors.npy"
    options = ["--params_path", str(checkpoint), "--device", "cpu", "--vector_dtype", "int8"]
    assert inference.main([*options, "--output", str(output)]) == 0
    expected = load_encoder(checkpoint).encode(SAMPLE_TEXTS[:1])
    np.testing.assert_array_equal(np.load(output), to_dtype(expected, "int8"))
    with pytest.raises(InputError, match="--vector_dtype int8: give the --output file"):
        inference.main(options)


@pytest.mark.parametrize("missing", [1, 1000, 10_000])
def test_a_full_disk_is_an_error_and_leaves_nothing(
    checkpoint: Path, recall_data: Path, tmp_path: Path, missing: int
) -> None:
    """Also if only the last byte doesn't fit, which np.save doesn't report."""
    output = tmp_path / "vectors.npy"
    options = ["--params_path", str(checkpoint), "--text_file", str(recall_data / "corpus.csv"), "--device", "cpu"]
    size = 128 + 168 * 16 * 4  # the header and the vectors of the corpus
    with file_size_limit(size - missing), pytest.raises(InputError, match=f"^{output}: can't be written"):
        inference.main([*options, "--output", str(output)])
    assert list(tmp_path.iterdir()) == []
    with file_size_limit(size):
        assert inference.main([*options, "--output", str(output)]) == 0
    assert output.stat().st_size == size
