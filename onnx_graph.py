"""The exported graph in ONNX: its conversion, and ONNX Runtime to run it. Both come with `setup.sh --onnx`."""

import importlib
import logging
from pathlib import Path
from types import ModuleType

import numpy as np

from runtime import InputError, cpu_threads
from static_graph import GRAPH_NAME, INPUT_NAMES, WEIGHTS_SUFFIX, graph_file

ONNX_SUFFIX = ".onnx"
OPSET = 17  # the first with a layer normalisation of its own
LOG_ERRORS = 3  # ONNX Runtime's severity; a warning would come for each constant that the graph doesn't use


def onnx_packages() -> tuple[ModuleType, ModuleType]:
    """paddle2onnx and onnxruntime. Raises InputError where one is missing."""
    try:
        return importlib.import_module("paddle2onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError(f"--format onnx: {error}; install it with sh scripts/setup.sh --onnx") from None


def export_onnx(folder: Path) -> None:
    """Writes the ONNX graph beside the one that `static_graph.export_static` wrote. Raises InputError if it can't."""
    paddle2onnx, _ = onnx_packages()
    logging.getLogger("paddle2onnx").setLevel(logging.ERROR)
    graph, weights = graph_file(folder), folder / (GRAPH_NAME + WEIGHTS_SUFFIX)
    try:
        # By default it also folds constants with Polygraphy, and lets that install packages from the network.
        onnx = paddle2onnx.export(str(graph), str(weights), opset_version=OPSET, optimize_tool=None)
    except UnboundLocalError:  # what its own handling of errors ends in, after it has logged them
        raise InputError(f"{graph}: paddle2onnx can't convert it (see above)") from None
    (folder / (GRAPH_NAME + ONNX_SUFFIX)).write_bytes(onnx)


class OnnxEncoder:
    """Runs an exported ONNX graph on the CPU."""

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        _, onnxruntime = onnx_packages()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = LOG_ERRORS
        options.intra_op_num_threads = threads or cpu_threads()
        file = Path(folder) / (GRAPH_NAME + ONNX_SUFFIX)
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 [B, D], of int64 [B, L] token ids: what `data.encode_texts` calls."""
        return self._session.run(None, dict(zip(INPUT_NAMES, (input_ids, token_type_ids), strict=True)))[0]
