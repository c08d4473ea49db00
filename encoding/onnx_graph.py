"""The exported graph in ONNX: converting it, and running it with ONNX Runtime; needs `setup.sh --onnx`."""

import importlib
import logging
from pathlib import Path
from types import ModuleType

import numpy as np

from common.cpu import cpu_threads
from common.errors import InputError
from common.logs import stdout_to_stderr
from encoding.exported_files import GRAPH_NAME, INPUT_NAMES, WEIGHTS_SUFFIX, graph_file

ONNX_SUFFIX = ".onnx"
OPSET = 17  # the first that has layer normalization as an operator
LOG_ERRORS = 3  # ONNX Runtime's log level; at the default, it warns about each unused constant of the graph


def onnx_packages() -> tuple[ModuleType, ModuleType]:
    """Imports paddle2onnx and onnxruntime. Raises InputError if one is missing."""
    try:
        return importlib.import_module("paddle2onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError(f"--format onnx: {error}; install it with sh scripts/setup.sh --onnx") from None


def export_onnx(folder: Path) -> None:
    """Converts the graph that `static_graph.export_static` wrote into the folder. Raises InputError if that fails."""
    onnx_packages()
    (folder / (GRAPH_NAME + ONNX_SUFFIX)).write_bytes(convert_to_onnx(folder))


def convert_to_onnx(folder: Path) -> bytes:
    """The graph that `static_graph.export_static` wrote into the folder, in ONNX, with its weights.

    Raises InputError if paddle2onnx, which PaddleNLP brings, can't convert it.
    """
    paddle2onnx = importlib.import_module("paddle2onnx")
    logging.getLogger("paddle2onnx").setLevel(logging.ERROR)
    graph, weights = graph_file(folder), folder / (GRAPH_NAME + WEIGHTS_SUFFIX)
    try:
        with stdout_to_stderr():
            # The default optimize_tool folds constants with Polygraphy, which installs packages from the network.
            return paddle2onnx.export(str(graph), str(weights), opset_version=OPSET, optimize_tool=None)
    except UnboundLocalError:  # a bug of its error handling; it has logged the error before
        raise InputError(f"{graph}: paddle2onnx can't convert it (see above)") from None


class OnnxEncoder:
    """Runs an exported ONNX graph on the CPU; threads: by default as `cpu_threads` says."""

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        _, onnxruntime = onnx_packages()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = LOG_ERRORS
        options.intra_op_num_threads = threads or cpu_threads()
        file = Path(folder) / (GRAPH_NAME + ONNX_SUFFIX)
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 [B, D], for int64 [B, L] token ids; for `data.encode_texts`."""
        return self._session.run(None, dict(zip(INPUT_NAMES, (input_ids, token_type_ids), strict=True)))[0]
