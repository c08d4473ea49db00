"""The exported graph gives the model's vectors."""

import os
from pathlib import Path
from unittest.mock import MagicMock, call

import numpy as np
import paddle
import pytest
import runtime
import static_graph
from paddle import nn

from common.cpu import has_bf16
from common.device import check_precision, choose_device
from common.errors import InputError
from encoding.exported_files import GRAPH_NAME, WEIGHTS_SUFFIX, graph_file
from encoding.static_graph import StaticEncoder, export_static
from modeling.checkpoint import load_checkpoint

TEXTS = ["水", "水稻的产量", "论水稻产量研究水稻,产量" * 10, "Deep Learning 2.0!"]


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the graph of a trained model."""
    folder = tmp_path_factory.mktemp("exported")
    export_static(load_checkpoint(checkpoint).model, folder)
    return folder


def test_graph_gives_the_models_vectors(exported: Path, checkpoint: Path) -> None:
    """For one text and for several, short and cut ones."""
    model, tokenizer = load_checkpoint(checkpoint)
    encoder = StaticEncoder(exported)
    for texts in (TEXTS, TEXTS[:1], TEXTS[2:3]):
        tokens = tokenizer(texts)
        np.testing.assert_allclose(encoder.embed(*tokens), model.embed(*tokens), atol=1e-5)


def test_batches_of_all_shapes(exported: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the same digits, which Paddle's cache for oneDNN confuses, and when that has been cleared."""
    monkeypatch.setattr(static_graph, "SHAPES_KEPT", 6)
    given_back: list[bool] = []
    monkeypatch.setattr(static_graph, "give_back_freed_memory", lambda: given_back.append(True))
    model, tokenizer = load_checkpoint(checkpoint)
    encoder = StaticEncoder(exported)
    random = np.random.default_rng(0)
    for shape in [(1, 12), (11, 2), (1, 12), *((rows, length) for rows in (1, 2, 11, 12) for length in (1, 2, 3, 12))]:
        input_ids = random.integers(5, tokenizer.vocabulary_size, shape)
        tokens = input_ids, np.zeros_like(input_ids)
        np.testing.assert_allclose(encoder.embed(*tokens), model.embed(*tokens), atol=1e-5)
    assert len(given_back) >= 3  # (1, 12) and (11, 2), back again, and 16 shapes of which 6 are kept


def test_bf16_rounds_where_the_cpu_has_it(exported: Path, checkpoint: Path) -> None:
    """Its vectors are near those of fp32, but not the same; a CPU without its instructions refuses by name."""
    if not has_bf16():
        with pytest.raises(InputError, match="--precision bf16: this CPU lacks avx512_bf16"):
            StaticEncoder(exported, precision="bf16")
        return
    tokens = load_checkpoint(checkpoint).tokenizer(TEXTS)
    vectors, exact = [StaticEncoder(exported, precision=precision).embed(*tokens) for precision in ("bf16", "fp32")]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert ((vectors * exact).sum(axis=1) > 0.999).all()
    assert np.abs(vectors - exact).max() > 1e-5


def test_export_leaves_the_model_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    """A model in training goes on training, with dropout; the graph has none."""
    model = load_checkpoint(checkpoint).model

    def rates() -> list[float]:
        layers = model.sublayers()
        return [layer.p for layer in layers if isinstance(layer, nn.Dropout)] + [
            layer.dropout for layer in layers if isinstance(layer, nn.MultiHeadAttention)
        ]

    before = rates()
    assert any(before)
    for training in (True, False):
        model.train() if training else model.eval()
        export_static(model, tmp_path)
        assert model.training is training and rates() == before
    assert "dropout" not in graph_file(tmp_path).read_text(encoding="utf-8")


def test_weights_that_lack_their_end_are_an_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paddle writes as much as the disk takes, and loads weights whose last parameter is cut short."""
    model = load_checkpoint(checkpoint).model
    weights = tmp_path / (GRAPH_NAME + WEIGHTS_SUFFIX)
    save = paddle.jit.save

    def save_in_part(*arguments: object) -> None:
        save(*arguments)
        os.truncate(weights, weights.stat().st_size - 8)

    monkeypatch.setattr(paddle.jit, "save", save_in_part)
    with pytest.raises(InputError, match=f"{weights.name}: isn't written to its end"):
        export_static(model, tmp_path)
    StaticEncoder(tmp_path)


@pytest.mark.parametrize("missing", ["json", "pdiparams"])
def test_missing_files_are_named(exported: Path, tmp_path: Path, missing: str) -> None:
    """Half an export is refused before Paddle sees it."""
    for file in exported.iterdir():
        if not file.name.endswith(missing):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=f"{missing}.*export_model.py"):
        graph_file(tmp_path)


def test_a_gpu_s_own_attention_is_left_out(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives wrong vectors; the configuration is all that a machine without a GPU can see of it."""
    config = MagicMock()
    monkeypatch.setattr(static_graph.inference, "Config", lambda *_: config)
    monkeypatch.setattr(static_graph.inference, "create_predictor", lambda _: MagicMock())
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:2")
    StaticEncoder(exported, device="gpu")
    config.enable_use_gpu.assert_called_once_with(256, 2, static_graph.inference.PrecisionType.Float32)
    assert call.delete_pass("multihead_matmul_fuse_pass") in config.mock_calls


@pytest.mark.parametrize("device", ["cpu", "gpu", None])
def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch, device: str | None) -> None:
    """Paddle raises OSError for CUDA's errors; a CPU doesn't ask for it at all."""
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", MagicMock(side_effect=OSError("no driver")))
    if device == "gpu":
        with pytest.raises(InputError, match="--device gpu: no GPU is visible"):
            choose_device(device)
    else:
        assert choose_device(device) == "cpu"
    assert paddle.device.cuda.device_count.called == (device != "cpu")


def test_precisions_that_the_machine_lacks_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has isn't."""
    for precision in ("int8", "fp16"):
        with pytest.raises(InputError, match=f"--precision {precision}"):
            check_precision(precision, "cpu")
    monkeypatch.setattr(runtime, "read_cpuinfo", lambda: "flags : avx2 avx512f avx512_vnni")
    with pytest.raises(InputError, match="--precision bf16: this CPU lacks avx512_bf16; use fp32"):
        check_precision("bf16", "cpu")
    monkeypatch.setattr(runtime, "read_cpuinfo", lambda: "flags : avx2 avx512f avx512_bf16")
    check_precision("bf16", "cpu")
    check_precision("fp32", "cpu")
