"""The static graph: its export, and running it with Paddle Inference."""

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import numpy as np
import paddle
import pytest
from paddle import nn

from common.cpu import has_bf16
from common.errors import InputError
from encoding import exported_model, static_graph
from encoding.exported_files import GRAPH_NAME, WEIGHTS_SUFFIX, graph_file
from encoding.exported_model import load_exported
from encoding.static_graph import StaticEncoder, _is_running, convert_to_tensorrt, export_static
from helpers import has_gpu
from modeling.checkpoint import load_checkpoint

TEXTS = ["水", "水稻的产量", "论水稻产量研究水稻,产量" * 10, "Deep Learning 2.0!"]


def test_the_graph_gives_the_models_vectors(exported: Path, checkpoint: Path) -> None:
    """For one text and for several, short ones and one that is cut."""
    model, tokenizer, _, _ = load_checkpoint(checkpoint)
    encoder = StaticEncoder(exported)
    for texts in (TEXTS, TEXTS[:1], TEXTS[2:3]):
        tokens = tokenizer(texts)
        np.testing.assert_allclose(encoder.embed(*tokens), model.embed(*tokens), atol=1e-5)


def test_batches_of_all_shapes(exported: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of shapes with the same digits, which oneDNN's cache confuses, and after the cache was cleared."""
    monkeypatch.setattr(static_graph, "SHAPES_KEPT", 6)
    cleared: list[bool] = []
    monkeypatch.setattr(static_graph, "release_freed_memory", lambda: cleared.append(True))
    model, tokenizer, _, _ = load_checkpoint(checkpoint)
    encoder = StaticEncoder(exported)
    random = np.random.default_rng(0)
    for shape in [(1, 12), (11, 2), (1, 12), *((rows, length) for rows in (1, 2, 11, 12) for length in (1, 2, 3, 12))]:
        input_ids = random.integers(5, tokenizer.vocabulary_size, shape)
        tokens = input_ids, np.zeros_like(input_ids)
        np.testing.assert_allclose(encoder.embed(*tokens), model.embed(*tokens), atol=1e-5)
    assert len(cleared) >= 3  # by (11, 2) after (1, 12), by (1, 12) again, and by 16 shapes of which 6 are kept


def test_a_thread_has_ended_once_the_system_knows_it_no_more() -> None:
    """Without /proc, which some sandboxes lack."""
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    assert _is_running(thread.native_id)
    go.set()
    thread.join()
    while _is_running(thread.native_id):
        time.sleep(0.001)


def test_checking_for_nan_as_paddle_does_cannot_fail_in_onednn(exported: Path) -> None:
    """FLAGS_check_nan_inf=1 in the environment does the same."""
    paddle.set_flags({"FLAGS_check_nan_inf": True})
    try:
        encoder = load_exported(exported)
        assert np.isfinite(encoder.embed(*encoder.tokenizer(TEXTS))).all()
    finally:
        paddle.set_flags({"FLAGS_check_nan_inf": False})


def test_bf16_rounds_if_the_cpu_has_it(exported: Path, checkpoint: Path) -> None:
    """Its vectors are near those of fp32, but not the same; on a CPU without its instructions it is refused."""
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
    """A model in training mode keeps it and its dropout; the graph has none."""
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


def test_weights_that_are_cut_short_are_an_error(
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


def test_an_error_of_paddle_without_a_text_is_one_line(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object) -> None:
        raise RuntimeError("\n")

    monkeypatch.setattr(static_graph.inference, "create_predictor", fail)
    with pytest.raises(InputError, match=rf"^{exported}: Paddle can't load the graph \(RuntimeError\); see whether"):
        StaticEncoder(exported)


def test_paddles_attention_kernel_for_gpus_is_not_used(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives wrong vectors. A machine without a GPU can only check the configuration."""
    config = MagicMock()
    monkeypatch.setattr(static_graph.inference, "Config", lambda *_: config)
    monkeypatch.setattr(static_graph.inference, "create_predictor", lambda _: MagicMock())
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:2")
    StaticEncoder(exported, device="gpu")
    config.enable_use_gpu.assert_called_once_with(256, 2, static_graph.inference.PrecisionType.Float32)
    assert call.delete_pass("multihead_matmul_fuse_pass") in config.mock_calls


def test_an_exported_folder_is_loaded_with_its_tokenizer(exported: Path, checkpoint: Path) -> None:
    """Which cuts texts to the exported length, or to another one."""
    model, tokenizer, _, _ = load_checkpoint(checkpoint)
    loaded = load_exported(exported, threads=1)
    assert loaded.tokenizer.max_seq_length == 24
    np.testing.assert_allclose(loaded.embed(*loaded.tokenizer(TEXTS)), model.embed(*tokenizer(TEXTS)), atol=1e-5)
    assert load_exported(exported, max_seq_length=40).tokenizer.max_seq_length == 40


def test_a_changed_file_is_refused_before_paddle_reads_it(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged graph would end the process."""
    monkeypatch.setattr(exported_model, "StaticEncoder", None)
    copy = shutil.copytree(exported, tmp_path / "output")
    (copy / f"{GRAPH_NAME}.json").write_text("{}")
    with pytest.raises(InputError, match=rf"{GRAPH_NAME}\.json.*export_model\.py"):
        load_exported(copy)


# ---------------------------------------------------------------------------------------------------------------------
# TensorRT, which no machine of these tests has


def test_a_gpu_without_tensorrt_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_graph.inference, "get_trt_compile_version", lambda: (0, 0, 0))
    with pytest.raises(InputError, match="--use_tensorrt: this Paddle is built without TensorRT"):
        load_exported(exported, device="gpu", tensorrt_batch_size=4)


def test_tensorrt_is_asked_for_batches_up_to_the_given_size(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in with the signatures of paddle.tensorrt.export."""
    calls: dict[str, Any] = {}
    stand_in = SimpleNamespace(
        Input=lambda **options: options,
        PrecisionMode={"FP16": "fp16 mode"},
        TensorRTConfig=lambda inputs, save_model_dir, precision_mode: calls.update(
            inputs=inputs, target=save_model_dir, precision=precision_mode
        ),
        convert=lambda path, config: calls.update(graph=path),
    )
    monkeypatch.setitem(sys.modules, "paddle.tensorrt", SimpleNamespace(export=stand_in))
    monkeypatch.setattr(paddle, "tensorrt", SimpleNamespace(export=stand_in), raising=False)
    convert_to_tensorrt(exported, tmp_path, precision="fp16", batch_size=4, length=24)
    assert calls["graph"] == str(exported / GRAPH_NAME) and calls["target"] == str(tmp_path / GRAPH_NAME)
    assert calls["precision"] == "fp16 mode"
    assert [options["name"] for options in calls["inputs"]] == ["input_ids", "token_type_ids"]
    assert {options["max_input_shape"] for options in calls["inputs"]} == {(4, 24)}
    assert {options["input_data_type"] for options in calls["inputs"]} == {"int64"}
    assert calls["inputs"][1]["input_range"] == (0, 0)  # there may be no row for another segment


@pytest.mark.skipif(has_gpu, reason="this machine has a GPU")
def test_tensorrt_that_is_not_installed_is_named(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--use_tensorrt: No module named 'paddle.tensorrt'; install"):
        convert_to_tensorrt(exported, tmp_path, precision="fp16", batch_size=4, length=24)
