"""The one fast way from texts to vectors: a checkpoint, the engine that computes it, and the collator of its input."""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle

from ann_util import ExactIndex, overlap
from base_model import DEFAULT_MODEL, SemanticIndexBase
from checkpoint import load_checkpoint, weights_file
from data import Embed, TextCollator, encode_texts
from distributed import barrier, init_ranks
from files import MANIFEST_FILE, atomic_folder, check_manifest, write_manifest
from runtime import InputError, log, progress_bar
from static_graph import DTYPES, PRECISIONS, StaticEncoder, check_precision, export_static

ENGINES = ("auto", "dygraph", "static")
STATIC_FROM_TEXTS = 2000  # compiling takes seconds, which fewer texts don't win back
NOT_OF_THE_MODEL = ("_name_or_path", "paddlenlp_version")  # entries of a backbone's config
STATIC_FOLDER = "static"  # in a checkpoint's folder: compiled graphs by version and fingerprint
GRAPH_VERSION = 2  # counts the ways to compute the same vectors; a graph of another one is left where it is
SAMPLE_DOCUMENTS, SAMPLE_QUERIES, SAMPLE_TOP = 1000, 100, 10  # on which a precision is compared with fp32


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """Options of every script that encodes with a trained model."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="dygraph, or the static graph of Paddle Inference, compiled once and kept in the checkpoint's folder; "
        f"auto: static on a CPU from {STATIC_FROM_TEXTS} texts on",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="of the computation; vectors are stored as float32"
    )


class Encoder(NamedTuple):
    """Turns texts into unit vectors."""

    embed: Embed
    collator: TextCollator
    embedding_size: int
    batch_size: int  # texts of full length a batch
    fingerprint: str = ""  # of all that makes its vectors what they are, but the precision
    precision: str = "fp32"
    embed_fp32: Embed | None = None  # where the precision is another, to compare with

    def __call__(self, texts: Sequence[str], desc: str | None = None) -> np.ndarray:
        """Vectors, float32 [N, D], in the texts' order. desc: name of the progress bar, if any."""
        if not texts:
            return np.empty((0, self.embedding_size), dtype=np.float32)
        with progress_bar(len(texts), desc, "text") if desc else nullcontext() as progress:
            return encode_texts(self.embed, texts, self.collator, self.batch_size, progress)


def load_encoder(
    params_path: str | Path,
    *,
    batch_size: int,
    text_count: int,
    engine: str = "auto",
    precision: str = "fp32",
    model_name_or_path: str = DEFAULT_MODEL,
    output_emb_size: int | None = None,
    max_seq_length: int | None = None,
) -> Encoder:
    """The encoder of a checkpoint, on the device that is set; all ranks call it together.

    text_count: texts that it will be given, which decide on engine "auto"; the other arguments are the scripts'
    options, or `load_checkpoint`'s. Raises InputError, also for a precision that the device lacks.
    """
    device = paddle.get_device().split(":")[0]
    check_precision(precision, device)
    model, collator = load_checkpoint(
        params_path,
        model_name_or_path=model_name_or_path,
        output_emb_size=output_emb_size,
        max_seq_length=max_seq_length,
    )
    fingerprint = model_fingerprint(model, collator)
    if engine == "dygraph" and precision != "fp32" and device == "cpu":
        raise InputError(f"--precision {precision}: on a CPU the static engine alone has it; use --engine static")
    worthwhile = device == "cpu" and (precision != "fp32" or text_count >= STATIC_FROM_TEXTS)
    if engine == "static" or (engine == "auto" and worthwhile):
        embed = _static_embed(model, weights_file(params_path).parent, fingerprint, device, precision)
    elif precision == "fp32":
        embed = model.embed
    else:
        embed = partial(_embed_in, model, DTYPES[precision])
    embed_fp32 = None if precision == "fp32" else model.embed
    return Encoder(embed, collator, model.embedding_size, batch_size, fingerprint, precision, embed_fp32)


def model_fingerprint(model: SemanticIndexBase, collator: TextCollator) -> str:
    """SHA-256, in hex, of the weights and of all settings that the vectors depend on."""
    backbone = model.ptm.config.to_dict()
    settings = {
        "backbone": {name: value for name, value in backbone.items() if name not in NOT_OF_THE_MODEL},
        "pooling": model.config.pooling,
        "output_emb_size": model.config.output_emb_size,
        "collator": collator.settings,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(parameter.numpy()))
    return digest.hexdigest()


def _static_embed(model: SemanticIndexBase, folder: Path, fingerprint: str, device: str, precision: str) -> Embed:
    """`embed` of the compiled model, which is compiled unless that was done before; all ranks call it together."""
    compiled = folder / STATIC_FOLDER / f"{GRAPH_VERSION}-{fingerprint[:16]}"
    load = partial(StaticEncoder, device=device, precision=precision)
    rank, _ = init_ranks()
    encoder = None if rank else _load_compiled(compiled, load) or _compile(model, compiled, load)
    barrier()
    encoder = encoder or _load_compiled(compiled, load)
    if encoder:
        return encoder.embed
    with tempfile.TemporaryDirectory() as temporary:
        export_static(model, Path(temporary))
        return load(temporary).embed


def _compile(model: SemanticIndexBase, compiled: Path, load: Callable[[Path], StaticEncoder]) -> StaticEncoder | None:
    """Writes the graph and loads it; None if it couldn't be written."""
    log(f"compiling the model into {compiled}")
    try:
        with atomic_folder(compiled) as temporary:
            export_static(model, temporary)
            encoder = load(temporary)  # Paddle doesn't say so when it can't write a file to its end
            write_manifest(temporary)
    except InputError as error:
        log(f"{error}; compiling it for this run alone")
        return None
    return encoder


def _load_compiled(compiled: Path, load: Callable[[Path], StaticEncoder]) -> StaticEncoder | None:
    """The graph, or None if it isn't there as it was written, or can't be loaded."""
    if not (compiled / MANIFEST_FILE).is_file():
        return None
    try:
        check_manifest(compiled)
        return load(compiled)
    except InputError:
        return None


def _embed_in(model: SemanticIndexBase, dtype: str, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
    """`model.embed` with its matrix products in another type, on a GPU."""
    with paddle.amp.auto_cast(dtype=dtype, level="O1"):
        return model.embed(input_ids, token_type_ids)


class Fidelity(NamedTuple):
    """How far the vectors of a precision lie from those of fp32, on a sample."""

    lowest_cosine: float  # of a text's vector with its fp32 vector
    overlap: float  # share of fp32's nearest documents that are found

    def __str__(self) -> str:
        return (
            f"on a sample its vectors have cosines of {self.lowest_cosine:.5f} or more with those of fp32, and find "
            f"{100 * self.overlap:.2f} % of fp32's top {SAMPLE_TOP}"
        )


def compare_with_fp32(encoder: Encoder, documents: Sequence[str], queries: Sequence[str]) -> Fidelity:
    """Encodes the first of the texts in both precisions. Raises InputError for vectors that aren't unit vectors."""
    documents, queries = documents[:SAMPLE_DOCUMENTS], queries[:SAMPLE_QUERIES]
    twin = encoder._replace(embed=encoder.embed_fp32)
    vectors, exact_vectors = [np.concatenate([one(documents), one(queries)]) for one in (encoder, twin)]
    found = []
    for rows in (vectors, exact_vectors):
        index = ExactIndex(encoder.embedding_size)
        index.add(rows[: len(documents)])
        ids, _ = index.search(rows[len(documents) :], SAMPLE_TOP)
        # Judged by fp32's similarities: which of several equal documents is found doesn't matter.
        cosines = np.einsum("qd,qkd->qk", exact_vectors[len(documents) :], exact_vectors[ids])
        found.append(-np.sort(-cosines, axis=1))
    lowest = (vectors * exact_vectors).sum(axis=1).min()
    return Fidelity(float(lowest), overlap(found[0], found[1]))
