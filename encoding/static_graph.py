"""The model as a static graph: exporting it, and running it with Paddle Inference. Imports no PaddleNLP."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
from paddle import inference, nn
from paddle.static import InputSpec

from common.cpu import cpu_threads, release_freed_memory
from common.device import check_precision
from common.errors import InputError
from encoding.exported_files import GRAPH_NAME, GRAPH_SUFFIXES, INPUT_NAMES, WEIGHTS_SUFFIX, graph_file

SHAPES_KEPT = 64  # shapes of batches in oneDNN's cache
# Left out on a GPU: if a batch has as many texts as tokens, their kernel (multihead_matmul_kernel.cu of Paddle 3.3)
# applies the first text's mask to all texts.
ATTENTION_PASSES = [f"multihead_matmul_fuse_pass{version}" for version in ("", "_v2", "_v3")]
GPU_MEMORY_MIB = 256  # that a predictor reserves at first


class _PooledEmbedding(nn.Layer):
    """A model whose forward pass is `get_pooled_embedding`, because Paddle exports the forward pass."""

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        """Unit vectors, float32 [B, D]."""
        return self.model.get_pooled_embedding(input_ids, token_type_ids)


@contextlib.contextmanager
def _without_dropout(model: nn.Layer) -> Iterator[None]:
    """Inside this block the model is in evaluation mode, and its dropout rates are 0, so that a graph has no dropout.

    Dropout only copies in inference, but keeps oneDNN from fusing the operators around it, and in bf16 each copy is
    converted to float32 and back.
    """
    training = model.training
    rates = [
        (layer, name, getattr(layer, name))
        for layer in model.sublayers()
        for kind, name in ((nn.Dropout, "p"), (nn.MultiHeadAttention, "dropout"))
        if isinstance(layer, kind)
    ]
    model.eval()
    for layer, name, _ in rates:
        setattr(layer, name, 0.0)
    try:
        yield
    finally:
        for layer, name, rate in rates:
            setattr(layer, name, rate)
        if training:
            model.train()


def export_static(model: nn.Layer, folder: Path) -> None:
    """Writes the graph and weights of a SemanticIndexBase into an existing folder, for any batch size and length.

    Inputs: input_ids and token_type_ids, int64 [B, L]. Output: unit vectors, float32 [B, D]. Raises InputError if the
    end of the weights is missing.
    """
    spec = [InputSpec([None, None], "int64", name) for name in INPUT_NAMES]
    with _without_dropout(model):
        graph = paddle.jit.to_static(_PooledEmbedding(model), input_spec=spec, full_graph=True)
        paddle.jit.save(graph, str(folder / GRAPH_NAME))
    # Paddle reports no error if a full disk cuts the file short, and loads it if only the last tensor is incomplete.
    weights = folder / (GRAPH_NAME + WEIGHTS_SUFFIX)
    ends = [tensor.flatten()[-16:].numpy().tobytes() for tensor in (*model.parameters(), *model.buffers())]
    if not any(_last_bytes(weights, len(end)) == end for end in ends):  # any tensor may be the last
        raise InputError(f"{weights}: isn't written to its end; see whether the disk is full")


def _last_bytes(file: Path, count: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - count))
        return opened.read()


def check_tensorrt(device: str) -> None:
    """Raises InputError if `device` is the CPU, or this Paddle is built without TensorRT."""
    if device == "cpu":
        raise InputError("--use_tensorrt: needs --device gpu, and this is the CPU; leave the option out")
    if inference.get_trt_compile_version() == (0, 0, 0):
        raise InputError("--use_tensorrt: this Paddle is built without TensorRT; leave the option out")


def convert_to_tensorrt(folder: Path, target: Path, *, precision: str, batch_size: int, length: int) -> None:
    """Converts the graph in `folder` to one with TensorRT engines in `target`, which must exist.

    It takes batches of up to `batch_size` texts, all padded to `length` tokens. A predictor's `enable_tensorrt_engine`
    takes only the `.pdmodel` graphs of Paddle 2. Raises InputError if TensorRT is missing.
    """
    try:
        from paddle.tensorrt import export as tensorrt  # not in builds for the CPU
    except ImportError as error:
        raise InputError(f"--use_tensorrt: {error}; install the tensorrt that Paddle was built with") from None

    largest = (batch_size, length)
    shapes = {"min_input_shape": (1, length), "optim_input_shape": largest, "max_input_shape": largest}
    # The conversion runs the graph on random numbers in these ranges; all token_type_ids are 0.
    inputs = [
        tensorrt.Input(**shapes, input_data_type="int64", input_range=numbers, name=name)
        for name, numbers in zip(INPUT_NAMES, ((1, 10), (0, 0)), strict=True)
    ]
    config = tensorrt.TensorRTConfig(
        inputs, save_model_dir=str(target / GRAPH_NAME), precision_mode=tensorrt.PrecisionMode[precision.upper()]
    )
    tensorrt.convert(str(folder / GRAPH_NAME), config)


class _OnednnCache:
    """Runs a predictor so that Paddle's cache of oneDNN kernels and reordered weights stays small and correct.

    By default there is a cache for each of the last 10 shapes of a batch, 4 GB with base ERNIE, and any other shape
    reorders the weights again. With a capacity of 0 all shapes share one cache, which grows by 2 MB per shape and is
    cleared when a thread that has run the predictor ends. Its keys are the concatenated digits of a shape: 5 × 43 and
    54 × 3 have the same key, and the second of them makes the predictor fail.
    """

    def __init__(self, config: inference.Config) -> None:
        config.set_mkldnn_cache_capacity(0)
        self._shapes: dict[str, tuple[int, ...]] = {}  # the cached shapes by their digits

    def run(self, predictor: inference.Predictor, shape: tuple[int, ...]) -> None:
        """Runs the predictor on its input of this shape, and clears the cache if it is full or has the shape's key."""
        digits = "".join(map(str, shape))
        if self._shapes.setdefault(digits, shape) == shape and len(self._shapes) <= SHAPES_KEPT:
            predictor.run()
            return
        self._shapes.clear()  # before the run, because the thread ends also if the run fails
        with ThreadPoolExecutor(1) as thread:
            number = thread.submit(threading.get_native_id).result()
            thread.submit(predictor.run).result()
        while _is_running(number):  # Python's join doesn't wait for the thread's destructors, which clear the cache
            time.sleep(0.001)
        # Otherwise each thread's heap keeps the copy of the weights that it freed.
        release_freed_memory()


def _is_running(thread: int) -> bool:
    """Whether a thread of this process, by the system's number, hasn't ended; needs no /proc."""
    try:
        os.sched_getaffinity(thread)
    except ProcessLookupError:
        return False
    return True


class StaticEncoder:
    """Runs an exported graph, on a CPU with oneDNN or on a GPU with CUDA. Only one thread may call it at a time.

    threads: CPU threads for everything that this process computes, by default as `cpu_threads` says; onednn: False
    computes on a CPU without it. Raises InputError if the graph can't be loaded or the device lacks the precision.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "cpu",
        precision: str = "fp32",
        threads: int | None = None,
        onednn: bool = True,
    ) -> None:
        graph = graph_file(Path(folder))
        check_precision(precision, device)
        if device == "cpu" and precision == "bf16" and not onednn:
            raise InputError("--precision bf16: needs oneDNN on a CPU; leave out --enable_mkldnn False")
        config = inference.Config(str(graph), str(Path(folder) / (GRAPH_NAME + WEIGHTS_SUFFIX)))
        config.disable_glog_info()
        # FLAGS_check_nan_inf=1 fails at outputs that oneDNN hasn't allocated; norms are checked wherever vectors go.
        paddle.set_flags({"FLAGS_check_nan_inf": False})
        if graph.suffix == GRAPH_SUFFIXES[0]:
            config.enable_new_ir(True)
            config.enable_new_executor(True)
        self._onednn_cache: _OnednnCache | None = None
        config.enable_memory_optim()  # fails on a new-IR graph without the two above
        if device == "gpu":
            low_precision = {"bf16": inference.PrecisionType.Bfloat16, "fp16": inference.PrecisionType.Half}
            number = int(paddle.device.get_device().removeprefix("gpu:"))
            precision_type = low_precision.get(precision, inference.PrecisionType.Float32)
            config.enable_use_gpu(GPU_MEMORY_MIB, number, precision_type)
            for name in ATTENTION_PASSES:
                config.delete_pass(name)
        else:
            config.disable_gpu()
            config.set_cpu_math_library_num_threads(threads or cpu_threads())
            if onednn:
                config.enable_mkldnn()
                self._onednn_cache = _OnednnCache(config)
            else:
                config.disable_mkldnn()
            if precision == "bf16":
                config.enable_mkldnn_bfloat16()
        try:
            self._predictor = inference.create_predictor(config)
        except RuntimeError as error:  # for example if a full disk cut the file short, which Paddle doesn't report
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            remedy = "; see whether the disk is full, and write it again" if device == "cpu" else ""
            raise InputError(f"{folder}: Paddle can't load the graph ({reason}){remedy}") from None
        self._inputs = [self._predictor.get_input_handle(name) for name in INPUT_NAMES]
        self.output_name: str = self._predictor.get_output_names()[0]
        self._output = self._predictor.get_output_handle(self.output_name)

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 [B, D], for int64 [B, L] token ids; for `data.encode_texts`."""
        for handle, array in zip(self._inputs, (input_ids, token_type_ids), strict=True):
            handle.copy_from_cpu(array)
        if self._onednn_cache:
            self._onednn_cache.run(self._predictor, input_ids.shape)
        else:
            self._predictor.run()
        return self._output.copy_to_cpu()
