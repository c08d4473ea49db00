"""A model's scores of a training file, a block of its pairs at a time, which the ranks divide among them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.distributed import barrier, init_ranks
from common.errors import InputError
from common.files import atomic_write, clear_leftovers, make_folder, read_json, write_json, write_or_compare
from common.logs import is_main_process, progress_bar
from common.texts import DOCUMENT, QUERY
from data import TextPair
from encoding.encoder import Encoder

BLOCK_PAIRS = 1024  # which an interruption can cost
METADATA_FILE = "scoring.json"

Pairs = Callable[[], Iterator[TextPair]]  # reads the training file anew in each call


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


class ScoredBlocks:
    """The scores of a training file's blocks, in a folder, so that an interrupted run can be resumed.

    metadata: all that decides on the scores, as JSON values. Raises InputError if the folder is another run's.
    """

    def __init__(self, folder: Path, pair_count: int, metadata: Mapping[str, Any]) -> None:
        self.folder = folder
        if is_main_process():
            make_folder(folder)
            clear_leftovers(folder)
        barrier()
        if difference := write_or_compare(folder / METADATA_FILE, {**metadata, "block_pairs": BLOCK_PAIRS}):
            problem = f"an interrupted run has scored there with another {difference}"
            raise InputError(f"{folder}: {problem}; give the same again, or remove the folder to start anew")
        self._sizes = [min(BLOCK_PAIRS, pair_count - start) for start in range(0, pair_count, BLOCK_PAIRS)]

    def missing(self) -> list[int]:
        """Numbers of the blocks that haven't been written yet."""
        return [number for number in range(len(self._sizes)) if not self._file(number).is_file()]

    def score_missing(self, encoder: Encoder, pairs: Pairs) -> None:
        """Scores the blocks that are missing; each rank a share of them, which rank 0 must see.

        Raises InputError if it doesn't, or if a block can't be written.
        """
        rank, world_size = init_ranks()
        numbers = {number for number in self.missing() if number % world_size == rank}
        with progress_bar(sum(self._sizes[number] for number in numbers), "scoring", "pair") as progress:
            for number, block in enumerate(_blocks(pairs())):
                if number in numbers:
                    write_json(self._file(number), {"scores": cosines(encoder, block)})
                    progress.update(len(block))
        barrier()
        if is_main_process() and self.missing():  # the others may already see the folder removed
            raise InputError(f"{self.folder}: lacks blocks of other processes; all machines must see the same folder")

    def write_training_file(self, path: str | Path, pairs: Pairs) -> None:
        """Writes each line's texts and their scores. Raises InputError if a block isn't as it was written."""
        with atomic_write(path) as file:
            for number, block in enumerate(_blocks(pairs())):
                scores = read_json(self._file(number)).get("scores")
                counts = [1 + len(pair.hard_negatives) for pair in block]
                if not isinstance(scores, list) or [isinstance(row, list) and len(row) for row in scores] != counts:
                    raise InputError(f"{self._file(number)}: isn't as it was written; remove it and run again")
                for pair, row in zip(block, scores, strict=True):
                    columns = [pair.query, *texts_of(pair), *(f"{score:.6f}" for score in row)]
                    file.write("\t".join(columns) + "\n")

    def _file(self, number: int) -> Path:
        return self.folder / f"block_{number:06d}.json"


def _blocks(pairs: Iterator[TextPair]) -> Iterator[list[TextPair]]:
    while block := list(islice(pairs, BLOCK_PAIRS)):
        yield block
