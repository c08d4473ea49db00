"""The exported graph in OpenVINO: converting it, quantizing it to int8, running it; needs `setup.sh --openvino`."""

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from common.cpu import cpu_threads
from common.device import check_precision
from common.errors import InputError
from common.logs import stdout_to_stderr
from data import TokenIds
from encoding.exported_files import INPUT_NAMES
from encoding.onnx_graph import convert_to_onnx

OPENVINO_FILE = "openvino.xml"  # the graph; its weights are in openvino.bin
INSTALL_OPENVINO = "install it with sh scripts/setup.sh --openvino"
WHOLE_TEXTS_RANK = 2
FLOAT_TYPES = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # OpenVINO's names, by precision


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def openvino_package(name: str = "openvino") -> ModuleType:
    """Imports openvino or nncf. Raises InputError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--engine openvino: {error}; {INSTALL_OPENVINO}") from None


@cache
def _core() -> Any:
    """The one `openvino.Core` of the process, which is never freed.

    Each one sets up a stack for signal handlers, and frees it even if another one has noted it as the stack before its
    own: with two of them the next signal can end the process.
    """
    return openvino_package().Core()


def convert_to_openvino(exported: Path, folder: Path) -> None:
    """Writes the graph that `static_graph.export_static` wrote into `exported` in OpenVINO's format into `folder`.

    Its weights stay float32. Raises InputError.
    """
    _save(_read_graph(exported), folder)


def quantize(exported: Path, folder: Path, batches: Sequence[TokenIds]) -> None:
    """Writes the graph in `exported` with matrix products in int8 into `folder`.

    batches: token ids by which the ranges of the activations are measured. NNCF's scheme for transformers smooths the
    activations' outliers into the weights first (SmoothQuant, https://arxiv.org/abs/2211.10438). The layers after the
    pooling stay in float32: they take no time, and in int8 they cost most of the accuracy (docs/benchmarks.md). Raises
    InputError.
    """
    graph = _read_graph(exported)
    with stdout_to_stderr():  # NNCF's progress
        nncf = openvino_package("nncf")
        nncf.set_log_level("ERROR")
        items = [dict(zip(INPUT_NAMES, tokens, strict=True)) for tokens in batches]
        transformer = nncf.ModelType.TRANSFORMER
        quantized = nncf.quantize(
            graph,
            nncf.Dataset(items),
            model_type=transformer,
            subset_size=len(items),
            ignored_scope=nncf.IgnoredScope(names=_products_after_pooling(graph)),
        )
    _save(quantized, folder)


def _read_graph(exported: Path) -> Any:
    return _core().read_model(convert_to_onnx(exported))


def _products_after_pooling(graph: Any) -> list[str]:
    """The names of the matrix products of whole texts, [B, D]; all others are of tokens, with one or two more axes."""
    products = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
    return [node.get_friendly_name() for node in products if len(node.get_output_partial_shape(0)) == WHOLE_TEXTS_RANK]


def _save(graph: Any, folder: Path) -> None:
    try:
        openvino_package().save_model(graph, folder / OPENVINO_FILE, compress_to_fp16=False)
    except RuntimeError as error:
        raise InputError(f"{folder}: OpenVINO can't write the graph ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class OpenVinoEncoder:
    """Runs a graph that `convert_to_openvino` or `quantize` wrote, on the CPU. Only one thread may call it at a time.

    precision: fp32 or bf16 for the former, int8 for the latter, whose other operators compute in fp32; in bf16 they
    weren't faster. threads: by default as `cpu_threads` says. Raises InputError if the graph can't be loaded or the
    CPU lacks the precision.
    """

    def __init__(self, folder: str | Path, *, precision: str = "fp32", threads: int | None = None) -> None:
        check_precision(precision, "cpu")
        settings = {
            "PERFORMANCE_HINT": "LATENCY",  # one batch at a time on all threads
            "INFERENCE_NUM_THREADS": threads or cpu_threads(),
            "INFERENCE_PRECISION_HINT": FLOAT_TYPES[precision],  # by default bf16 where the CPU has it
            # Pinned, the calling thread would stay on one core, and with it all threads that Paddle starts later.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            compiled = _core().compile_model(Path(folder) / OPENVINO_FILE, "CPU", settings)
        except RuntimeError as error:
            raise InputError(f"{folder}: OpenVINO can't load the graph ({_first_line(error)})") from None
        self._request, self._output = compiled.create_infer_request(), compiled.output(0)

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 [B, D], for int64 [B, L] token ids; for `data.encode_texts`."""
        inputs = dict(zip(INPUT_NAMES, (input_ids, token_type_ids), strict=True))
        # Copied, because OpenVINO reuses the memory for the next batch.
        return self._request.infer(inputs, share_inputs=True)[self._output].copy()
