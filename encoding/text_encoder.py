"""An encoder, which turns texts into vectors, and how close the vectors of a precision are to those of fp32."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np

from ann_util import ExactIndex, recall_vs_exact
from common.logs import progress_bar
from common.texts import DOCUMENT, QUERY
from data import Embed, TextTokenizer, encode_texts

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
    fidelity: "Fidelity | None" = None  # of a calibrated precision, from its calibration

    def encode(self, texts: Sequence[str], desc: str | None = None, role: str | None = None) -> np.ndarray:
        """Unit vectors, float32 [N, D], in the texts' order.

        desc: name of a progress bar; None shows none. role: see `TextTokenizer.prefixed`.
        """
        if not texts:
            return np.empty((0, self.embedding_size), dtype=np.float32)
        with progress_bar(len(texts), desc, "text") if desc else nullcontext() as progress:
            prefixed = self.tokenizer.prefixed(texts, role)
            return encode_texts(self.embed, prefixed, self.tokenizer, self.batch_size, progress)


class Fidelity(NamedTuple):
    """How close the vectors of a precision are to those of fp32, on a sample."""

    lowest_cosine: float  # between a text's vector and its fp32 vector
    recall_vs_fp32: float  # share of fp32's SAMPLE_TOP nearest documents that are found

    def __str__(self) -> str:
        cosines = f"on a sample its vectors have cosines of {self.lowest_cosine:.5f} or more with those of fp32"
        return f"{cosines}, and find {100 * self.recall_vs_fp32:.2f} % of fp32's top {SAMPLE_TOP}"


class TextSample(NamedTuple):
    """Texts in hand, for calibrating a precision and comparing it with fp32."""

    documents: Sequence[str] = ()
    queries: Sequence[str] = ()
    roles: tuple[str | None, str | None] = (DOCUMENT, QUERY)  # of documents and queries; see `TextTokenizer.prefixed`


def compare_with_fp32(encoder: Encoder, texts: TextSample) -> Fidelity:
    """Encodes the first documents and queries in both precisions; without queries, documents are searched for.

    Raises InputError for a vector whose norm isn't 1.
    """
    documents, roles = texts.documents[:SAMPLE_DOCUMENTS], texts.roles
    queries = (texts.queries or documents)[:SAMPLE_QUERIES]
    if not texts.queries:
        roles = roles[0], roles[0]
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
