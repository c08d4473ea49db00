"""The device to compute on, the precisions that it has, and seeds."""

import random
from unittest.mock import MagicMock

import numpy as np
import paddle
import pytest

from common import cpu
from common.device import STRIDE_FLAG, check_precision, choose_device, set_device, set_seed
from common.errors import InputError
from helpers import has_gpu


@pytest.mark.skipif(has_gpu, reason="this machine has a GPU")
def test_without_a_gpu_the_message_names_the_cpu() -> None:
    with pytest.raises(InputError, match=r"--device gpu: .*use --device cpu"):
        set_device("gpu")
    assert choose_device(None) == "cpu"


@pytest.mark.parametrize("device", ["cpu", "gpu", None])
def test_a_failing_driver_counts_as_no_gpu(monkeypatch: pytest.MonkeyPatch, device: str | None) -> None:
    """Paddle raises OSError for CUDA's errors; for a CPU it isn't asked at all."""
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", MagicMock(side_effect=OSError("no driver")))
    if device == "gpu":
        with pytest.raises(InputError, match="--device gpu: no GPU is visible"):
            choose_device(device)
    else:
        assert choose_device(device) == "cpu"
    assert paddle.device.cuda.device_count.called == (device != "cpu")


@pytest.mark.parametrize("visible", ["", "-1", "7", "GPU-0"])
def test_a_variable_that_hides_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InputError, match=f"no GPU is visible; CUDA_VISIBLE_DEVICES={visible} may hide it: unset that"):
        choose_device("gpu")


@pytest.mark.parametrize("device", ["cpu", "gpu", None])
def test_a_gpu_is_taken_unless_the_cpu_is_named(monkeypatch: pytest.MonkeyPatch, device: str | None) -> None:
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 1)
    assert choose_device(device) == (device or "gpu")


def test_precisions_that_the_cpu_lacks_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--precision fp16"):
        check_precision("fp16", "cpu")
    monkeypatch.setattr(cpu, "read_cpuinfo", lambda: "flags : avx2 avx512f avx512_vnni")
    with pytest.raises(InputError, match="--precision bf16: this CPU lacks avx512_bf16; use fp32"):
        check_precision("bf16", "cpu")
    monkeypatch.setattr(cpu, "read_cpuinfo", lambda: "flags : avx2 avx512f avx512_bf16")
    check_precision("bf16", "cpu")
    check_precision("fp32", "cpu")


@pytest.mark.parametrize(("capability", "is_fine"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_needs_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_fine: bool
) -> None:
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
    check_precision("fp16", "gpu")
    check_precision("fp32", "gpu")
    if is_fine:
        check_precision("bf16", "gpu")
    else:
        with pytest.raises(InputError, match=r"--precision bf16: this GPU's compute capability is .*; use fp16"):
            check_precision("bf16", "gpu")


def test_transpositions_copy_on_a_cpu_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRIDE_FLAG, "1")
    paddle.set_flags({STRIDE_FLAG: True})
    set_device("cpu")
    assert paddle.get_flags(STRIDE_FLAG)[STRIDE_FLAG]
    monkeypatch.delenv(STRIDE_FLAG)
    set_device("cpu")
    assert not paddle.get_flags(STRIDE_FLAG)[STRIDE_FLAG]


@pytest.mark.parametrize("seed", [0, 1000, 2**32 - 1, 2**32 + 5])
def test_a_seed_sets_all_three_generators(seed: int) -> None:
    def draws() -> tuple[float, float, list[float]]:
        return random.random(), np.random.rand(), paddle.rand([3]).tolist()

    set_seed(seed)
    first = draws()
    assert draws() != first
    set_seed(seed)
    assert draws() == first
    set_seed(seed + 1)
    assert all(ours != theirs for ours, theirs in zip(draws(), first, strict=True))
