"""Reading a text file line by line, and what is wrong with lines and files that can't be used."""

import io
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from common.columns import ColumnCheck
from common.errors import InputError
from common.files import open_for_reading
from common.logs import log

REPORTED_BAD_LINES = 10
UNCHECKED = "; if it is meant so, add --no_column_check"

MAX_LINE_BYTES = 1 << 20  # a file with a longer line probably isn't a text file
OTHER_FILES = {  # first bytes -> what the file is, and what to do
    b"PK\x03\x04": "a zip archive or an Excel workbook; save its table as text with tabs, in UTF-8",
    b"\xd0\xcf\x11\xe0": "an Excel or Word document; save its table as text with tabs, in UTF-8",
    b"\x1f\x8b": "compressed with gzip; unpack it: gunzip",
    b"BZh": "compressed with bzip2; unpack it: bunzip2",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it: unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it: unzstd",
    b"PAR1": "a Parquet file; write its texts as lines, in UTF-8",
    b"\xff\xfe": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
}
PAIRS_OF_BYTES = re.compile(rb"[\x81-\xfe][\x40-\xfe]")  # characters of GB18030
CESU8 = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")
CUT_START = re.compile(rb"[\x80-\xbf]")
CUT_END = re.compile(rb"[\xc2-\xdf](?![\x80-\xbf])|[\xe0-\xef](?![\x80-\xbf]{2})|[\xf0-\xf4](?![\x80-\xbf]{3})")


Row = TypeVar("Row")


@dataclass
class Line(Generic[Row]):
    """A line of a file; `row` is its parsed content, or None for a bad line that was skipped."""

    number: int  # from 1
    offset: int  # of its first byte
    row: Row | None


def read_lines(
    path: str | Path,
    parse: Callable[[str], Row],
    skip_bad_lines: bool = False,
    remedy: str = "correct them, or leave them out with --skip_bad_lines",
    check: ColumnCheck | None = None,
) -> Iterator[Line[Row]]:
    """Parses a UTF-8 file line by line; a BOM and CRLF line ends are accepted.

    Bad lines raise an InputError at the end of the file, with their number and the first ten. With `skip_bad_lines`
    each is yielded with `row` None instead, and their number is logged. Also raises InputError for a file that is
    missing, can't be opened, has no good line, or in which `check` finds something. remedy: what the user can do about
    bad lines.
    """
    reasons: list[str] = []
    decoder = LineDecoder()
    bad = good = 0
    with open_for_reading(path) as file:
        for number, offset, raw in split_lines(file, path):
            row: Row | None = None
            try:
                text = decoder.decode(raw)
                if check:
                    check.add(number, text)
                row = parse(text)
                good += 1
            except ValueError as error:
                bad += 1
                if len(reasons) < REPORTED_BAD_LINES:
                    reasons.append(f"{path}:{number}: {error}")
            if row is not None or skip_bad_lines:
                yield Line(number, offset, row)
    if check and (findings := check.findings()):
        raise InputError("\n".join(f"{path}: {finding}" for finding in findings) + UNCHECKED)
    if bad and not skip_bad_lines:
        remedy = decoder.remedy() or (check and check.remedy_for_bad_lines()) or remedy
        raise InputError("\n".join([f"{path}: {bad} bad line(s); {remedy}. The first:", *reasons]))
    if not good:
        why = f"can be used; the first: {reasons[0]}" if bad else "(the file is empty)"
        raise InputError(f"{path}: no line in it {why}")
    if bad:
        log(f"{path}: left out {bad} bad line(s) of {bad + good}, the first: {reasons[0]}")


def split_lines(file: io.BufferedReader, name: object) -> Iterator[tuple[int, int, bytes | None]]:
    """(line number, offset, bytes) of each line; the bytes of a line that is too long are None. Skips a BOM.

    name: of the file. Raises InputError if its first bytes show that it is no text in UTF-8.
    """
    start = file.read(max(map(len, OTHER_FILES)))
    for magic, kind in OTHER_FILES.items():
        if start.startswith(magic):
            raise InputError(f"{name}: is {kind}")
    offset = len(BOM_UTF8) if start.startswith(BOM_UTF8) else 0
    file.seek(offset)
    number = 0
    while raw := file.readline(MAX_LINE_BYTES):
        number += 1
        size = len(raw)
        if size == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while rest := file.readline(MAX_LINE_BYTES):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            raw = None
        yield number, offset, raw
        offset += size


class LineDecoder:
    """Decodes lines, and tells a file in another encoding from one with damaged lines."""

    def __init__(self) -> None:
        self._good = 0  # lines with characters beyond ASCII, which prove that a file is UTF-8
        self._undecodable = self._gb18030 = self._with_nul = self._lines = 0

    def decode(self, raw: bytes | None) -> str:
        """The text of a line. Raises ValueError with the reason if it can't be used."""
        self._lines += 1
        if raw is None:
            raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
        if b"\0" in raw:
            self._with_nul += 1
            raise ValueError("holds a NUL character")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self._undecodable += 1
            self._gb18030 += _is_gb18030(raw)
            raise ValueError(f"isn't UTF-8 at byte {error.start + 1}: {_damage(raw, error.start)}") from None
        self._good += not raw.isascii()
        return text

    def remedy(self) -> str | None:
        """What to do if most lines aren't UTF-8; None if only some are damaged. Call it after the last line."""
        if self._with_nul > self._lines / 2:
            return "the file seems to be UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
        if self._undecodable <= self._good:
            return None
        if self._gb18030 == self._undecodable:
            return "the file isn't UTF-8; convert it: iconv -f GB18030 -t UTF-8"
        return "the file isn't UTF-8; find out its encoding, and convert it with iconv"


def _is_gb18030(raw: bytes) -> bool:
    """Whether the bytes are Chinese in GB18030, whose common characters have two high bytes, unlike Latin-1's text."""
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return False
    trail_bytes = [pair[1] for pair in PAIRS_OF_BYTES.findall(raw)]
    return sum(trail >= 0xA1 for trail in trail_bytes) > len(trail_bytes) / 2


def _damage(raw: bytes, start: int) -> str:
    """What is wrong with the bytes from `start` on, where they stop being UTF-8."""
    if CESU8.match(raw, start):
        return "a character in CESU-8, which Java and MySQL write"
    if raw[start] == 0xED and raw[start + 1 : start + 2] >= b"\xa0":
        return "half of a surrogate pair"
    if CUT_START.match(raw, start) or CUT_END.match(raw, start):
        return "a cut character"
    return f"byte {raw[start]:#x}, which UTF-8 doesn't have"
