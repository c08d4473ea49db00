"""Exporting a model: the model card, and the check of each graph against the model."""

from pathlib import Path

import numpy as np
import paddle
import pytest

from base_model import SemanticIndexBase
from common import __version__
from common.errors import InputError
from common.files import read_json, sha256
from encoding import export
from encoding.exported_model import load_exported
from encoding.static_graph import StaticEncoder, export_static
from modeling.checkpoint import load_checkpoint


def test_model_card(exported: Path, checkpoint: Path) -> None:
    card = read_json(exported / "model_card.json")
    assert card["checkpoint"] == {
        "file": "model_4/model_state.pdparams",
        "sha256": sha256(checkpoint / "model_state.pdparams"),
    }
    assert card["fingerprint"] == load_checkpoint(checkpoint).fingerprint
    assert card["versions"]["semantic_index"] == __version__
    assert card["versions"]["paddle"] == paddle.__version__
    assert list(card["inputs"]) == ["input_ids", "token_type_ids"]
    assert list(card["outputs"]) == [StaticEncoder(exported).output_name]
    assert card["embedding_size"] == 16 and card["max_seq_length"] == 24
    assert 0 < card["largest_difference"]["paddle"] <= 1e-5


@pytest.mark.onnx
def test_onnx_is_exported_beside_paddles_graph(checkpoint: Path, tmp_path: Path) -> None:
    """Both are compared with the model."""
    differences = export.export_model(load_checkpoint(checkpoint), tmp_path, "onnx")
    assert differences.keys() == {"paddle", "onnx"} and 0 < max(differences.values()) <= 1e-5
    card = read_json(tmp_path / "model_card.json")
    assert card["largest_difference"] == differences
    assert card["versions"].keys() >= {"paddle2onnx", "onnxruntime"}
    assert (tmp_path / "inference.get_pooled_embedding.onnx").is_file()
    load_exported(tmp_path)


def test_safetensors_are_exported_beside_paddles_graph(checkpoint: Path, tmp_path: Path) -> None:
    """The folder is a checkpoint too then, of the same model."""
    loaded = load_checkpoint(checkpoint)
    export.export_model(loaded, tmp_path, "safetensors")
    load_exported(tmp_path)
    again = load_checkpoint(tmp_path)
    assert again.fingerprint == loaded.fingerprint and again.weights == tmp_path / "model.safetensors"


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_a_graph_that_differs_from_the_model_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    def export_another(model: SemanticIndexBase, folder: Path) -> None:
        weight = model.emb_reduce_linear.weight
        right = weight.numpy()
        weight.set_value(right + np.float32(change) * np.arange(right.size, dtype=np.float32).reshape(right.shape))
        export_static(model, folder)
        weight.set_value(right)

    monkeypatch.setattr(export, "export_static", export_another)
    with pytest.raises(InputError, match=f"^{tmp_path}: the paddle graph is off by .*, more than 1e-05"):
        export.export_model(load_checkpoint(checkpoint), tmp_path)


def test_the_check_uses_batches_like_the_tokenizers(checkpoint: Path) -> None:
    """Of several sizes and lengths up to the maximum, with padding on the right only."""
    tokenizer = load_checkpoint(checkpoint).tokenizer
    shapes = set()

    def embed(input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        shapes.add(input_ids.shape)
        assert input_ids.dtype == token_type_ids.dtype == np.int64 and not token_type_ids.any()
        assert input_ids.min() >= 0 and input_ids.max() < tokenizer.vocabulary_size
        padding = input_ids == tokenizer.pad_id
        assert not padding[:, 0].any() and (np.diff(padding.astype(int), axis=1) >= 0).all()
        return np.zeros((len(input_ids), 2), dtype=np.float32)

    def off(input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        return np.full((len(input_ids), 2), 1e-3 if len(input_ids) == 7 else 0, dtype=np.float32)

    assert export.largest_difference(embed, off, tokenizer) == pytest.approx(1e-3)
    assert shapes == {(size, length) for size in (1, 2, 7) for length in (3, 13, 24)}
