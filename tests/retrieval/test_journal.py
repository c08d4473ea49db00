"""The journal of a saved index: torn and damaged records, other indexes, full disks."""

import errno
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from helpers import file_size_limit, unit_vectors
from retrieval import journal as journal_module
from retrieval.journal import JOURNAL_FILE, Change, Journal, journal_state, read_journal

DIM = 4
NOTHING = np.empty((0, DIM), np.float32)
CHANGES = [
    Change(["文献", 'a "quoted" \\ text \u2028'], unit_vectors(2, DIM), []),
    Change([], NOTHING, [0, 7, 10**12]),
    Change(["水稻"], unit_vectors(1, DIM, seed=1), [3]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a journal needs of an index."""
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path


def write(folder: Path, changes: list[Change]) -> list[int]:
    """Appends changes; where each record begins, and where the last one ends."""
    journal = Journal(folder)
    ends = [journal.size]
    for change in changes:
        journal.append(change)
        ends.append(journal.size)
    journal.close()
    return ends


def read(folder: Path) -> list[tuple[list[str], list[list[float]], list[int]]]:
    return [comparable(change) for change in read_journal(folder, DIM, journal_state(folder).end)]


def comparable(change: Change) -> tuple[list[str], list[list[float]], list[int]]:
    assert change.vectors.dtype == np.float32 and change.vectors.shape == (len(change.documents), DIM)
    return change.documents, change.vectors.tolist(), change.deleted


def test_changes_are_read_as_they_were_written(folder: Path) -> None:
    assert read(folder) == []
    write(folder, [])
    assert read(folder) == []
    write(folder, CHANGES[:2])
    write(folder, CHANGES[2:])
    assert read(folder) == [comparable(change) for change in CHANGES]


@pytest.mark.usefixtures("fast_disk")
def test_a_journal_that_ends_anywhere_has_its_whole_records(folder: Path) -> None:
    """At every byte, and it takes more: a torn record is cut off when it is opened to be written, and not before."""
    ends = write(folder, CHANGES)
    path = folder / JOURNAL_FILE
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = [comparable(change) for change, end in zip(CHANGES, ends[1:], strict=True) if end <= size]
        assert read(folder) == kept
        assert path.stat().st_size == size
        assert write(folder, [])[0] == max([end for end in ends if end <= size], default=ends[0])
        assert path.stat().st_size in ends
        write(folder, CHANGES[:1])
        assert read(folder) == [*kept, comparable(CHANGES[0])]


def test_a_flipped_bit_anywhere_is_named(folder: Path) -> None:
    """Never taken for a torn record: in any byte of any record, and of the beginning."""
    ends = write(folder, CHANGES)
    path = folder / JOURNAL_FILE
    whole = path.read_bytes()
    numbers = random.Random(2)
    for byte in range(len(whole)):
        content = bytearray(whole)
        content[byte] ^= 1 << numbers.randrange(8)
        path.write_bytes(content)
        record = sum(end <= byte for end in ends)
        message = rf"record {record} isn't as it was written; restore the folder from a backup, or remove the journal"
        message = message if record else "isn't a journal that this version reads|belongs to another index"
        for attempt in (lambda: read(folder), lambda: Journal(folder)):
            with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: ({message})"):
                attempt()
        assert path.read_bytes() == content


def test_a_journal_of_another_index_is_refused(folder: Path) -> None:
    write(folder, CHANGES)
    (folder / "manifest.json").write_text("{ }")
    for attempt in (lambda: read(folder), lambda: Journal(folder)):
        with pytest.raises(InputError, match=r"journal\.bin: belongs to another index, .*; restore the folder, or"):
            attempt()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]\n",
        b"{\n",
        b'{"documents": ["a"], "deleted": []}\n' + 3 * bytes(4),
        b'{"documents": [1], "deleted": []}\n' + DIM * bytes(4),
        b'{"documents": [], "deleted": ["1"]}\n',
        b'{"documents": []}\n',
    ],
)
def test_a_record_that_no_change_wrote_is_named(folder: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Change, "to_bytes", lambda _: body)
    write(folder, CHANGES[:1])
    with pytest.raises(InputError, match=r"journal\.bin: record 1 can't be understood \(.*\); restore the folder"):
        read(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Full and broken disks


def test_a_full_disk_leaves_nothing_of_a_record(folder: Path) -> None:
    """At any byte of it; the journal takes the next one that fits."""
    journal = Journal(folder)
    journal.append(CHANGES[0])
    size = journal.size
    for free in (0, 1, 5, 16, 40):
        with file_size_limit(size + free), pytest.raises(InputError, match=r"journal\.bin: can't be written \(File"):
            journal.append(CHANGES[0])
        assert (folder / JOURNAL_FILE).stat().st_size == journal.size == size
    journal.append(CHANGES[1])
    assert read(folder) == [comparable(change) for change in CHANGES[:2]]


def test_a_full_disk_while_the_journal_is_created_leaves_the_index_as_it_is(folder: Path) -> None:
    with file_size_limit(10), pytest.raises(InputError, match=r"journal\.bin: can't be written"):
        Journal(folder)
    assert read(folder) == []
    write(folder, CHANGES)
    assert len(read(folder)) == 3


def test_a_record_that_may_not_be_on_disk_is_not_acknowledged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fsync` fails, then even the removal of the record; the next record replaces it."""
    journal = Journal(folder)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for failing in (["fsync"], ["fsync", "ftruncate"]):
        with monkeypatch.context() as patch:
            for name in failing:
                patch.setattr(journal_module.os, name, fail)
            with pytest.raises(InputError, match=r"journal\.bin: can't be written \(Input/output error\)"):
                journal.append(CHANGES[0])
    journal.append(CHANGES[1])
    assert read(folder) == [comparable(CHANGES[1])]


def test_a_record_is_on_disk_before_it_is_acknowledged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a test can tell: `fsync` comes after the last byte. The name of a new journal is flushed, too."""
    flushed = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    journal = Journal(folder)
    assert flushed[:3:2] == [str(folder / JOURNAL_FILE), str(folder)]
    journal.append(CHANGES[0])
    assert flushed[-2:] == [str(folder / JOURNAL_FILE), journal.size]
    assert journal.size == (folder / JOURNAL_FILE).stat().st_size


def test_a_folder_that_can_t_be_written_is_an_input_error(folder: Path) -> None:
    (folder / JOURNAL_FILE).mkdir()
    with pytest.raises(InputError, match=r"journal\.bin: can't be written \(Is a directory\)"):
        Journal(folder)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_journal_that_is_no_longer_in_its_folder_takes_nothing(folder: Path, is_replaced: bool) -> None:
    """Else an acknowledged change would be gone with the old folder."""
    journal = Journal(folder)
    (folder / JOURNAL_FILE).rename(folder / "old")
    if is_replaced:
        write(folder, [])
    with pytest.raises(InputError, match=f"^{folder}: was replaced while it was in use; open it again"):
        journal.append(CHANGES[0])
