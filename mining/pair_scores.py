"""A model's scores of the texts of training pairs."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.files import atomic_write
from common.texts import DOCUMENT, QUERY
from data import TextPair
from encoding.text_encoder import Encoder
from mining.blocks import PairBlocks


def texts_of(pair: TextPair) -> tuple[str, ...]:
    """The texts whose scores a pair needs: its title and its hard negatives."""
    return pair.title, *pair.hard_negatives


def cosines(encoder: Encoder, pairs: Sequence[TextPair]) -> list[list[float]]:
    """The cosine of each pair's query with its title and each hard negative. Encodes each distinct text once."""

    def encode(texts: Iterable[str], role: str) -> dict[str, np.ndarray]:
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, encoder.encode(distinct, role=role), strict=True))

    queries = encode((pair.query for pair in pairs), QUERY)
    documents = encode((text for pair in pairs for text in texts_of(pair)), DOCUMENT)
    return [[float(queries[pair.query] @ documents[text]) for text in texts_of(pair)] for pair in pairs]


def write_training_file(path: str | Path, pairs: Iterable[TextPair], blocks: PairBlocks) -> None:
    """Writes each line's texts and their scores. pairs: those of the whole file.

    Raises InputError if a block isn't as it was written.
    """
    with atomic_write(path) as file:
        for number, block in enumerate(blocks.split(pairs)):
            scores = blocks.read(number).get("scores")
            counts = [1 + len(pair.hard_negatives) for pair in block]
            if not isinstance(scores, list) or [isinstance(row, list) and len(row) for row in scores] != counts:
                raise blocks.damaged(number)
            for pair, row in zip(block, scores, strict=True):
                columns = [pair.query, *texts_of(pair), *(f"{score:.6f}" for score in row)]
                file.write("\t".join(columns) + "\n")
