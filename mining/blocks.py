"""Work on the pairs of a training file, a block of them at a time, which the ranks divide among them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from common.distributed import barrier, init_ranks
from common.errors import InputError
from common.files import clear_leftovers, make_folder, read_json, write_json, write_or_compare
from common.logs import is_main_process, log, progress_bar

BLOCK_PAIRS = 1024  # an interruption costs the block: less than a minute of encoding with a 12-layer ERNIE on 2 cores

Block = TypeVar("Block", bound=Sequence[Any])
Item = TypeVar("Item")


class PairBlocks:
    """The results of the blocks of a training file, in a folder, so that an interrupted run can be resumed.

    pair_count: pairs of the file; metadata: all that decides on the results, as JSON values; work: what is done, for
    messages and the name of the metadata's file. Raises InputError if the folder is another run's.
    """

    def __init__(self, folder: Path, pair_count: int, metadata: Mapping[str, Any], work: str) -> None:
        self.folder, self._work = folder, work
        if is_main_process():
            make_folder(folder)
            clear_leftovers(folder)
        barrier()
        if difference := write_or_compare(folder / f"{work}.json", {**metadata, "block_pairs": BLOCK_PAIRS}):
            problem = f"an interrupted run of {work} had another {difference}"
            raise InputError(f"{folder}: {problem}; give the same again, or remove the folder to start anew")
        starts = range(0, pair_count, BLOCK_PAIRS)
        self.rows = [range(start, min(start + BLOCK_PAIRS, pair_count)) for start in starts]  # of each block

    def missing(self) -> list[int]:
        """Numbers of the blocks that haven't been written yet."""
        return [number for number in range(len(self.rows)) if not self._file(number).is_file()]

    def split(self, pairs: Iterable[Item]) -> Iterator[list[Item]]:
        """The pairs of each block. pairs: those of the whole file, in order."""
        iterator = iter(pairs)
        return (list(islice(iterator, len(rows))) for rows in self.rows)

    def compute_missing(self, blocks: Iterable[Block], compute: Callable[[Block], Mapping[str, Any]]) -> None:
        """Computes the blocks that are missing, each rank a share of them, which rank 0 must see.

        blocks: all, in order; compute: returns the result of one as JSON values. Raises InputError if rank 0 doesn't
        see them all, or if a block can't be written.
        """
        rank, world_size = init_ranks()
        missing = self.missing()
        if len(missing) < len(self.rows):
            log(f"{self.folder}: goes on; {len(self.rows) - len(missing)} of {len(self.rows)} blocks are done")
        numbers = {number for number in missing if number % world_size == rank}
        with progress_bar(sum(len(self.rows[number]) for number in numbers), self._work, "pair") as progress:
            for number, block in enumerate(blocks):
                if number in numbers:
                    write_json(self._file(number), compute(block))
                    progress.update(len(block))
        barrier()
        if rank == 0 and self.missing():  # rank 0 alone needs all, and may have removed the folder already
            raise InputError(f"{self.folder}: lacks blocks of other processes; all machines must see the same folder")

    def read(self, number: int) -> dict[str, Any]:
        """The result of a block. Raises InputError if it isn't JSON."""
        return read_json(self._file(number))

    def damaged(self, number: int) -> InputError:
        """The error for a result that isn't one of the block."""
        return InputError(f"{self._file(number)}: isn't as it was written; remove it and run again")

    def _file(self, number: int) -> Path:
        return self.folder / f"block_{number:06d}.json"
