"""Encoding texts with a checkpoint: `load_encoder` chooses the engine and returns an Encoder."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import paddle

from base_model import SemanticIndexBase
from common.device import DTYPES
from common.errors import InputError
from common.files import scratch_folder
from common.options import OPENVINO, STATIC, STATIC_FROM_TEXTS
from data import Embed
from encoding.engines import (
    Calibration,
    CompiledFrom,
    check_engine,
    fastest_engine,
    load_int8,
    load_kept,
    load_openvino,
)
from encoding.static_graph import StaticEncoder, export_static
from encoding.text_encoder import Encoder, TextSample
from modeling.checkpoint import load_checkpoint

STATIC_FOLDER = "static"  # in a checkpoint's folder: holds compiled graphs, by GRAPH_VERSION and fingerprint
GRAPH_VERSION = 2  # raise it when graphs compute differently; graphs of other versions are ignored


def load_encoder(
    params_path: str | Path,
    *,
    batch_size: int = 32,
    text_count: int = 0,
    engine: str = "auto",
    precision: str = "fp32",
    model_name_or_path: str | None = None,
    output_emb_size: int | None = None,
    max_seq_length: int | None = None,
    sample: TextSample | None = None,
    calibration_texts: Sequence[str] | None = None,
    min_overlap: float = 0.0,
) -> Encoder:
    """The encoder of a checkpoint, on Paddle's current device; with several ranks, all must call it together.

    text_count: about how many texts it will encode; on a CPU, engine "auto" is the faster of static and, if installed,
    openvino from STATIC_FROM_TEXTS on, or with another precision than fp32. sample: texts in hand, on which int8 is
    calibrated and compared with fp32, unless that was done before. calibration_texts: texts to calibrate on instead.
    The other arguments are command-line options; model_name_or_path, output_emb_size and max_seq_length are explained
    at `load_checkpoint`. Raises InputError, also if the device or the engine lacks the precision.
    """
    device = paddle.get_device().split(":")[0]
    check_engine(engine, precision, device, calibration_texts)
    if engine == "dygraph" and precision != "fp32" and device == "cpu":
        raise InputError(f"--precision {precision}: on a CPU only compiled graphs have it; use --engine static")
    model, tokenizer, fingerprint, weights = load_checkpoint(
        params_path,
        model_name_or_path=model_name_or_path,
        output_emb_size=output_emb_size,
        max_seq_length=max_seq_length,
    )
    source = CompiledFrom(weights.parent, fingerprint, partial(_exported, model))
    encoder = Encoder(model.embed, tokenizer, model.embedding_size, batch_size, fingerprint)
    if precision == "int8":
        return load_int8(source, encoder, Calibration(calibration_texts, sample or TextSample(), min_overlap))
    prefers_compiled = device == "cpu" and (precision != "fp32" or text_count >= STATIC_FROM_TEXTS)
    loaders: dict[str, Callable[[], Embed]] = {
        STATIC: lambda: _load_static(model, source, device, precision).embed,
        OPENVINO: lambda: load_openvino(source, precision).embed,
    }
    if engine in loaders:
        embed = loaders[engine]()
    elif engine == "auto" and prefers_compiled:
        embed = fastest_engine(source, precision, tokenizer.vocabulary_size, loaders)
    elif precision == "fp32":
        embed = model.embed
    else:
        embed = partial(_embed_amp, model, DTYPES[precision])
    return encoder._replace(embed=embed, precision=precision, embed_fp32=None if precision == "fp32" else model.embed)


@contextlib.contextmanager
def _exported(model: SemanticIndexBase) -> Iterator[Path]:
    """A temporary folder with the model's graph."""
    with scratch_folder() as folder:
        export_static(model, folder)
        yield folder


def _load_static(model: SemanticIndexBase, source: CompiledFrom, device: str, precision: str) -> StaticEncoder:
    """The static graph, compiled if it isn't kept yet; all ranks must call this together."""
    folder = source.folder / STATIC_FOLDER / f"{GRAPH_VERSION}-{source.fingerprint[:16]}"
    return load_kept(
        folder, lambda target: export_static(model, target), partial(StaticEncoder, device=device, precision=precision)
    )


def _embed_amp(model: SemanticIndexBase, dtype: str, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
    """`model.embed` with matrix products in `dtype`, by automatic mixed precision."""
    with paddle.amp.auto_cast(dtype=dtype, level="O1"):
        return model.embed(input_ids, token_type_ids)
