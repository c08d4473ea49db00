"""The model as a static graph: its export, and Paddle Inference to run it. Imports no PaddleNLP."""

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle
from paddle import inference, nn
from paddle.static import InputSpec

from data import BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE, TextCollator, longest_text
from files import MANIFEST_FILE, check_manifest, read_json, whole_folder
from runtime import InputError, cpu_threads, give_back_freed_memory, has_bf16

GRAPH_NAME = "inference.get_pooled_embedding"  # of the files, as the original's export names them
GRAPH_SUFFIXES = (".json", ".pdmodel")  # Paddle 3 writes the first; the second comes from Paddle 2
WEIGHTS_SUFFIX = ".pdiparams"
INPUT_NAMES = ("input_ids", "token_type_ids")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # Paddle's names
BF16_COMPUTE_CAPABILITY = 8  # of a GPU: Ampere
SHAPES_KEPT = 64  # of batches, in oneDNN's cache
# Of a GPU: where a batch has as many texts as tokens, their kernel (multihead_matmul_kernel.cu of Paddle 3.3) gives all
# texts the first one's mask.
ATTENTION_PASSES = [f"multihead_matmul_fuse_pass{version}" for version in ("", "_v2", "_v3")]
GPU_MEMORY_MIB = 256  # that a predictor reserves at first
EXPORT_AGAIN = "export the model again with export_model.py"


class _PooledEmbedding(nn.Layer):
    """`get_pooled_embedding` as a forward pass, which is what Paddle exports."""

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        return self.model.get_pooled_embedding(input_ids, token_type_ids)


@contextlib.contextmanager
def _without_dropout(model: nn.Layer) -> Iterator[None]:
    """Within it the model is as it computes after training, and has no dropout at all.

    As an operator of the graph dropout would do nothing but copy, yet keep oneDNN from fusing what stands around it,
    and in bf16 have each copy converted to float32 and back.
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
    """Writes graph and weights of a SemanticIndexBase into an existing folder; batch and length stay free.

    Inputs: input_ids and token_type_ids, int64 [B, L]. Output: unit vectors, float32 [B, D]. Raises InputError for
    weights whose end is missing.
    """
    spec = [InputSpec([None, None], "int64", name) for name in INPUT_NAMES]
    with _without_dropout(model):
        graph = paddle.jit.to_static(_PooledEmbedding(model), input_spec=spec, full_graph=True)
        paddle.jit.save(graph, str(folder / GRAPH_NAME))
    # Paddle doesn't say so when it can't write a file to its end, and loads weights of which only the last lack theirs.
    weights = folder / (GRAPH_NAME + WEIGHTS_SUFFIX)
    ends = [tensor.flatten()[-16:].numpy().tobytes() for tensor in (*model.parameters(), *model.buffers())]
    if not any(_last_bytes(weights, len(end)) == end for end in ends):
        raise InputError(f"{weights}: isn't written to its end; see whether the disk is full")


def _last_bytes(file: Path, count: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - count))
        return opened.read()


def graph_file(folder: Path) -> Path:
    """The graph in an exported folder. Raises InputError if it or its weights are missing."""
    for suffix in GRAPH_SUFFIXES:
        file = folder / (GRAPH_NAME + suffix)
        if file.is_file():
            break
    else:
        raise InputError(f"{folder}: has no {GRAPH_NAME}{GRAPH_SUFFIXES[0]}; export the model with export_model.py")
    weights = folder / (GRAPH_NAME + WEIGHTS_SUFFIX)
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; {EXPORT_AGAIN}")
    return file


def choose_device(device: str | None) -> str:
    """The device to compute on, "cpu" or "gpu": for None a GPU if there is one. Raises InputError if there is none."""
    if device == "cpu":
        return device
    try:
        has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    except Exception:  # of a driver that is missing or too old
        has_gpu = False
    if device == "gpu" and not has_gpu:
        why = "no GPU is visible" if paddle.is_compiled_with_cuda() else "this Paddle is built for the CPU"
        raise InputError(f"--device gpu: {why}; use --device cpu, or set up with sh scripts/setup.sh --gpu")
    return device or ("gpu" if has_gpu else "cpu")


def check_precision(precision: str, device: str) -> None:
    """Raises InputError where this machine's `device`, "cpu" or "gpu", can't compute in a precision of PRECISIONS."""
    if precision == "int8":
        # enable_onednn_int8 leaves a graph of Paddle 3 in float32: its passes know Paddle 2's format only.
        raise InputError(f"--precision int8: Paddle {paddle.__version__} has no int8 for its graphs; use fp32 or bf16")
    if device == "cpu" and precision == "fp16":
        raise InputError("--precision fp16: a CPU doesn't compute in it; use fp32, or bf16 if it has avx512_bf16")
    if device == "cpu" and precision == "bf16" and not has_bf16():
        raise InputError("--precision bf16: this CPU lacks avx512_bf16; use fp32")
    if device == "gpu" and precision == "bf16":
        major, minor = paddle.device.cuda.get_device_capability()
        if major < BF16_COMPUTE_CAPABILITY:
            raise InputError(f"--precision bf16: this GPU's compute capability is {major}.{minor}; use fp16")


def check_tensorrt(device: str) -> None:
    """Raises InputError where `device` or this Paddle has no TensorRT."""
    if device == "cpu":
        raise InputError("--use_tensorrt: needs --device gpu, and this is the CPU; leave the option out")
    if inference.get_trt_compile_version() == (0, 0, 0):
        raise InputError("--use_tensorrt: this Paddle is built without TensorRT; leave the option out")


def convert_to_tensorrt(folder: Path, target: Path, *, precision: str, batch_size: int, length: int) -> None:
    """Writes a GPU's exported graph into an existing folder, with TensorRT engines for batches of up to `batch_size`.

    length: of all texts, which are padded to it. `enable_tensorrt_engine` of a predictor's config would not do: it
    takes the `.pdmodel` graphs of Paddle 2 alone.
    """
    try:
        from paddle.tensorrt import export as tensorrt  # which builds for the CPU lack
    except ImportError as error:
        raise InputError(f"--use_tensorrt: {error}; install the tensorrt that Paddle was built with") from None

    largest = (batch_size, length)
    shapes = {"min_input_shape": (1, length), "optim_input_shape": largest, "max_input_shape": largest}
    # It runs the graph on random numbers of these ranges; a text has but one segment.
    inputs = [
        tensorrt.Input(**shapes, input_data_type="int64", input_range=numbers, name=name)
        for name, numbers in zip(INPUT_NAMES, ((1, 10), (0, 0)), strict=True)
    ]
    config = tensorrt.TensorRTConfig(
        inputs, save_model_dir=str(target / GRAPH_NAME), precision_mode=tensorrt.PrecisionMode[precision.upper()]
    )
    tensorrt.convert(str(folder / GRAPH_NAME), config)


class _OnednnCache:
    """What Paddle keeps for oneDNN from one batch to the next: kernels, and the weights once more, in their order.

    By default there is a cache for each of the last 10 shapes of a batch, which takes 4 GB with base ERNIE, and for any
    other shape the weights are put in order anew. With a capacity of 0 all shapes have one cache, in which kernels pile
    up, 2 MB a shape; it is cleared when a thread ends that has run the predictor. Its keys are the shapes' digits, so
    that 5 × 43 and 54 × 3 are the same, and whichever comes second makes the predictor fail.
    """

    def __init__(self, config: inference.Config) -> None:
        config.set_mkldnn_cache_capacity(0)
        self._shapes: dict[str, tuple[int, ...]] = {}  # in the cache, by their digits

    def run(self, predictor: inference.Predictor, shape: tuple[int, ...]) -> None:
        """Runs the predictor on its input, which has this shape."""
        digits = "".join(map(str, shape))
        if self._shapes.setdefault(digits, shape) == shape and len(self._shapes) <= SHAPES_KEPT:
            predictor.run()
            return
        self._shapes.clear()  # first, so that it holds also where the run fails: its thread ends all the same
        with ThreadPoolExecutor(1) as thread:  # its keys hold its number as well
            task = Path("/proc/self/task") / str(thread.submit(threading.get_native_id).result())
            thread.submit(predictor.run).result()
        while task.exists():  # Python's join doesn't wait for the destructors, which are what clears the cache
            time.sleep(0.001)
        # Each thread's heap would keep what it freed, a copy of the weights, and the next thread may have another heap.
        give_back_freed_memory()


class StaticEncoder:
    """Runs an exported graph: on a CPU with oneDNN, unless told otherwise; CUDA on a GPU.

    threads: of the CPU, for all that this process computes; by default OMP_NUM_THREADS. Not to be called by several
    threads at a time. Raises InputError as the functions above do.
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
        if graph.suffix == GRAPH_SUFFIXES[0]:
            config.enable_new_ir(True)
            config.enable_new_executor(True)
        self._onednn_cache: _OnednnCache | None = None
        config.enable_memory_optim()  # fails on a new-IR graph without the two above
        if device == "gpu":
            low_precision = {"bf16": inference.PrecisionType.Bfloat16, "fp16": inference.PrecisionType.Half}
            config.enable_use_gpu(
                GPU_MEMORY_MIB,
                int(paddle.device.get_device().removeprefix("gpu:")),
                low_precision.get(precision, inference.PrecisionType.Float32),
            )
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
        except RuntimeError as error:  # Paddle doesn't say so when it can't write a file to its end
            reason = str(error).strip().splitlines()[0]
            remedy = "; see whether the disk is full, and write it again" if device == "cpu" else ""
            raise InputError(f"{folder}: Paddle can't load the graph ({reason}){remedy}") from None
        self._inputs = [self._predictor.get_input_handle(name) for name in INPUT_NAMES]
        self.output_name: str = self._predictor.get_output_names()[0]
        self._output = self._predictor.get_output_handle(self.output_name)

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 [B, D], of int64 [B, L] token ids: what `data.encode_texts` calls."""
        for handle, array in zip(self._inputs, (input_ids, token_type_ids), strict=True):
            handle.copy_from_cpu(array)
        if self._onednn_cache:
            self._onednn_cache.run(self._predictor, input_ids.shape)
        else:
            self._predictor.run()
        return self._output.copy_to_cpu()


class Exported(NamedTuple):
    """What `export_model.py` wrote, ready to use: `data.encode_texts` takes `encoder.embed` and `collator`."""

    encoder: StaticEncoder
    collator: TextCollator


def load_exported(
    model_dir: Path,
    *,
    device: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
    onednn: bool = True,
    tensorrt_batch_size: int | None = None,
    max_seq_length: int | None = None,
) -> Exported:
    """Reads an exported folder, whose files must be as its manifest says; most arguments are StaticEncoder's.

    tensorrt_batch_size: the largest batch, to run the graph in TensorRT, on texts padded to the maximum.
    max_seq_length: in place of the exported one, up to the rows of the model's position table. Raises InputError.
    """
    folder = whole_folder(model_dir)
    if not folder.is_dir():
        raise InputError(f"{model_dir}: no such model folder; export the model with export_model.py")
    graph_file(folder)
    if not (folder / MANIFEST_FILE).is_file():
        raise InputError(f"{folder}: has no {MANIFEST_FILE}, so it may be half a model; {EXPORT_AGAIN}")
    # Paddle's C++ ends the process where a graph or weights are damaged.
    check_manifest(folder, remedy=EXPORT_AGAIN)
    longest = longest_text(read_json(folder / BACKBONE_CONFIG_FILE))
    if max_seq_length and max_seq_length > longest:
        remedy = f"the position table of {folder} has {longest} rows; use at most that many tokens"
        raise InputError(f"--max_seq_length {max_seq_length}: {remedy}")
    length = max_seq_length or read_json(folder / MODEL_CONFIG_FILE)["max_seq_length"]
    collator = TextCollator.load(folder, length)
    options = {"device": device, "precision": precision, "threads": threads, "onednn": onednn}
    if not tensorrt_batch_size:
        return Exported(StaticEncoder(folder, **options), collator)
    check_tensorrt(device)
    check_precision(precision, device)
    collator.pad_to_max_seq_len = True
    with tempfile.TemporaryDirectory() as converted:
        batch_size = tensorrt_batch_size
        convert_to_tensorrt(folder, Path(converted), precision=precision, batch_size=batch_size, length=length)
        return Exported(StaticEncoder(converted, **options), collator)
