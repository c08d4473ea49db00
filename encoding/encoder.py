"""Encoding texts with a checkpoint: `load_encoder` chooses the engine and returns an Encoder."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle

from ann_util import ExactIndex, recall_vs_exact
from base_model import SemanticIndexBase
from common.device import DTYPES, check_precision
from common.distributed import barrier, init_ranks
from common.errors import InputError
from common.files import atomic_folder, scratch_folder
from common.logs import log, progress_bar
from common.manifest import MANIFEST_FILE, check_manifest, write_manifest
from common.options import STATIC_FROM_TEXTS
from common.texts import DOCUMENT, QUERY
from data import Embed, TextTokenizer, encode_texts
from encoding.static_graph import StaticEncoder, export_static
from modeling.checkpoint import load_checkpoint

STATIC_FOLDER = "static"  # in a checkpoint's folder: holds compiled graphs, by GRAPH_VERSION and fingerprint
GRAPH_VERSION = 2  # raise it when graphs compute differently; graphs of other versions are ignored
SAMPLE_DOCUMENTS, SAMPLE_QUERIES, SAMPLE_TOP = 1000, 100, 10  # for the comparison of a precision with fp32


class Encoder(NamedTuple):
    """Turns texts into unit vectors: an engine's `embed`, and how to call it."""

    embed: Embed
    tokenizer: TextTokenizer
    embedding_size: int
    batch_size: int  # in texts of max_seq_length tokens; see `data.encode_texts`
    fingerprint: str = ""  # see `model_fingerprint`
    precision: str = "fp32"
    embed_fp32: Embed | None = None  # None if the precision is fp32

    def encode(self, texts: Sequence[str], desc: str | None = None, role: str | None = None) -> np.ndarray:
        """Unit vectors, float32 [N, D], in the texts' order.

        desc: name of a progress bar; None shows none. role: see `TextTokenizer.prefixed`.
        """
        if not texts:
            return np.empty((0, self.embedding_size), dtype=np.float32)
        with progress_bar(len(texts), desc, "text") if desc else nullcontext() as progress:
            prefixed = self.tokenizer.prefixed(texts, role)
            return encode_texts(self.embed, prefixed, self.tokenizer, self.batch_size, progress)


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
) -> Encoder:
    """The encoder of a checkpoint, on Paddle's current device; with several ranks, all must call it together.

    text_count: about how many texts it will encode; on a CPU, engine "auto" is static from STATIC_FROM_TEXTS on, or
    with another precision than fp32. The other arguments are command-line options; the last three are explained at
    `load_checkpoint`. Raises InputError, also if the device or the engine lacks the precision.
    """
    device = paddle.get_device().split(":")[0]
    check_precision(precision, device)
    if engine == "dygraph" and precision != "fp32" and device == "cpu":
        raise InputError(f"--precision {precision}: on a CPU only the static engine has it; use --engine static")
    model, tokenizer, fingerprint, weights = load_checkpoint(
        params_path,
        model_name_or_path=model_name_or_path,
        output_emb_size=output_emb_size,
        max_seq_length=max_seq_length,
    )
    prefers_static = device == "cpu" and (precision != "fp32" or text_count >= STATIC_FROM_TEXTS)
    if engine == "static" or (engine == "auto" and prefers_static):
        embed = _static_embed(model, weights.parent, fingerprint, device, precision)
    elif precision == "fp32":
        embed = model.embed
    else:
        embed = partial(_embed_amp, model, DTYPES[precision])
    embed_fp32 = None if precision == "fp32" else model.embed
    return Encoder(embed, tokenizer, model.embedding_size, batch_size, fingerprint, precision, embed_fp32)


def _static_embed(model: SemanticIndexBase, folder: Path, fingerprint: str, device: str, precision: str) -> Embed:
    """`embed` of the compiled graph, which rank 0 compiles if it isn't kept yet; all ranks must call this together."""
    compiled = folder / STATIC_FOLDER / f"{GRAPH_VERSION}-{fingerprint[:16]}"
    load = partial(StaticEncoder, device=device, precision=precision)
    rank, _ = init_ranks()
    encoder = None if rank else _load_compiled(compiled, load) or _compile(model, compiled, load)
    barrier()
    encoder = encoder or _load_compiled(compiled, load)
    if encoder:
        return encoder.embed
    with scratch_folder() as temporary:  # the graph can't be kept, so each rank compiles its own
        export_static(model, temporary)
        return load(temporary).embed


def _compile(model: SemanticIndexBase, compiled: Path, load: Callable[[Path], StaticEncoder]) -> StaticEncoder | None:
    """Compiles the graph into the folder and loads it; None if it can't be written or loaded."""
    log(f"compiling the model into {compiled}")
    try:
        with atomic_folder(compiled) as temporary:
            export_static(model, temporary)
            encoder = load(temporary)  # Paddle reports no error for a file that is cut short on a full disk
            write_manifest(temporary)
    except InputError as error:
        log(f"{error}; compiling it for this run alone")
        return None
    return encoder


def _load_compiled(compiled: Path, load: Callable[[Path], StaticEncoder]) -> StaticEncoder | None:
    """Loads a graph that is kept; None if it is missing, changed, or can't be loaded."""
    if not os.path.isfile(compiled / MANIFEST_FILE):  # Path.is_file fails in another user's folder
        return None
    try:
        check_manifest(compiled)
        return load(compiled)
    except InputError:
        return None


def _embed_amp(model: SemanticIndexBase, dtype: str, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
    """`model.embed` with matrix products in `dtype`, by automatic mixed precision."""
    with paddle.amp.auto_cast(dtype=dtype, level="O1"):
        return model.embed(input_ids, token_type_ids)


class Fidelity(NamedTuple):
    """How close the vectors of a precision are to those of fp32, on a sample."""

    lowest_cosine: float  # between a text's vector and its fp32 vector
    recall_vs_fp32: float  # share of fp32's SAMPLE_TOP nearest documents that are found

    def __str__(self) -> str:
        cosines = f"on a sample its vectors have cosines of {self.lowest_cosine:.5f} or more with those of fp32"
        return f"{cosines}, and find {100 * self.recall_vs_fp32:.2f} % of fp32's top {SAMPLE_TOP}"


def compare_with_fp32(
    encoder: Encoder,
    documents: Sequence[str],
    queries: Sequence[str],
    roles: tuple[str | None, str | None] = (DOCUMENT, QUERY),
) -> Fidelity:
    """Encodes the first documents and queries in both precisions. Raises InputError for a vector whose norm isn't 1.

    roles: those of `documents` and `queries`.
    """
    documents, queries = documents[:SAMPLE_DOCUMENTS], queries[:SAMPLE_QUERIES]
    encoders = (encoder, encoder._replace(embed=encoder.embed_fp32 or encoder.embed))
    vectors, fp32_vectors = [
        np.concatenate([each.encode(documents, role=roles[0]), each.encode(queries, role=roles[1])])
        for each in encoders
    ]
    found = []
    for rows in (vectors, fp32_vectors):
        index = ExactIndex(encoder.embedding_size)
        index.add(rows[: len(documents)])
        ids, _ = index.search(rows[len(documents) :], SAMPLE_TOP)
        # Compared by fp32's cosines: which of several equal documents is found doesn't matter.
        cosines = np.einsum("qd,qkd->qk", fp32_vectors[len(documents) :], fp32_vectors[ids])
        found.append(-np.sort(-cosines, axis=1))
    lowest = (vectors * fp32_vectors).sum(axis=1).min()
    return Fidelity(float(lowest), recall_vs_exact(found[0], found[1]))
