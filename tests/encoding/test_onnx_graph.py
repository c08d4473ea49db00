"""The graph in ONNX: its conversion and its vectors."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from encoding.onnx_graph import OnnxEncoder, export_onnx, onnx_packages
from encoding.static_graph import export_static
from helpers import new_model

TEXTS = ["水", "水稻的产量", "论水稻产量研究水稻,产量" * 10, "Deep Learning 2.0!"]


@pytest.mark.onnx
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_onnx_gives_the_models_vectors(model_folder: Path, tmp_path: Path, pooling: str) -> None:
    """For one text and for several, short ones and one that is cut; with any number of threads."""
    model, tokenizer = new_model(model_folder, pooling=pooling)
    export_static(model, tmp_path)
    export_onnx(tmp_path)
    for encoder in (OnnxEncoder(tmp_path), OnnxEncoder(tmp_path, threads=1)):
        for texts in (TEXTS, TEXTS[:1], TEXTS[2:3]):
            vectors = encoder.embed(*tokenizer(texts))
            assert vectors.dtype == np.float32
            np.testing.assert_allclose(vectors, model.embed(*tokenizer(texts)), atol=1e-5)


@pytest.mark.onnx
def test_a_graph_that_cannot_be_converted_is_one_line(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """paddle2onnx logs the error, and fails in its own error handling."""
    paddle2onnx, _ = onnx_packages()

    def fail(*_: object, **options: object) -> None:
        assert options == {"opset_version": 17, "optimize_tool": None}
        raise UnboundLocalError("model_str")

    monkeypatch.setattr(paddle2onnx, "export", fail)
    with pytest.raises(InputError, match=rf"^{exported}/inference\..*\.json: paddle2onnx can't convert it"):
        export_onnx(exported)
    assert not list(exported.glob("*.onnx"))
    assert logging.getLogger("paddle2onnx").level == logging.ERROR


@pytest.mark.parametrize("package", ["paddle2onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"--format onnx: .*{package}.*; install it with sh scripts/setup.sh --onnx"):
        onnx_packages()
