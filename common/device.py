"""The device to compute on, the precisions that it supports, and random seeds."""

import os
import random

import numpy as np
import paddle

from common.cpu import has_bf16
from common.errors import InputError

STRIDE_FLAG = "FLAGS_use_stride_kernel"
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # Paddle's names of the precisions
BF16_COMPUTE_CAPABILITY = 8  # lowest major version: Ampere and later GPUs


def choose_device(device: str | None) -> str:
    """Returns "cpu" or "gpu"; for None, "gpu" if there is one. Raises InputError for "gpu" if there is none."""
    if device == "cpu":
        return device
    try:
        has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    except Exception:  # the driver is missing or too old
        has_gpu = False
    if device == "gpu" and not has_gpu:
        remedy = "use --device cpu, or set up with sh scripts/setup.sh --gpu"
        if not paddle.is_compiled_with_cuda():
            raise InputError(f"--device gpu: this Paddle is built for the CPU; {remedy}")
        if (visible := os.environ.get(VISIBLE_VARIABLE)) is not None:
            remedy = f"{VISIBLE_VARIABLE}={visible} may hide it: unset that, or use --device cpu"
        raise InputError(f"--device gpu: no GPU is visible; {remedy}")
    return device or ("gpu" if has_gpu else "cpu")


def set_device(device: str | None) -> None:
    """Makes Paddle compute on the device that `choose_device` returns. Raises InputError as that does.

    On a CPU it also makes a transposition copy its input at once, unless the environment sets STRIDE_FLAG: training and
    encoding then take about a fifth less time (docs/benchmarks.md), with bit-identical results.
    """
    device = choose_device(device)
    # "gpu" without a number is the GPU that the launcher assigned to this rank.
    paddle.set_device(device)
    if device == "cpu" and STRIDE_FLAG not in os.environ:
        # By default a transposition only changes strides, and every kernel that reads it copies it element by element.
        paddle.set_flags({STRIDE_FLAG: False})


def check_precision(precision: str, device: str) -> None:
    """Raises InputError if this machine's `device`, "cpu" or "gpu", can't compute in `precision`, one of PRECISIONS."""
    if device == "cpu" and precision == "fp16":
        raise InputError("--precision fp16: a CPU doesn't compute in it; use fp32, or bf16 if it has avx512_bf16")
    if device == "cpu" and precision == "bf16" and not has_bf16():
        raise InputError("--precision bf16: this CPU lacks avx512_bf16; use fp32")
    if device == "gpu" and precision == "int8":
        raise InputError("--precision int8: only a CPU computes in it; use --device cpu, or fp16")
    if device == "gpu" and precision == "bf16":
        major, minor = paddle.device.cuda.get_device_capability()
        if major < BF16_COMPUTE_CAPABILITY:
            raise InputError(f"--precision bf16: this GPU's compute capability is {major}.{minor}; use fp16")


def set_seed(seed: int) -> None:
    """Seeds the random generators of Python, NumPy and Paddle."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    paddle.seed(seed)
