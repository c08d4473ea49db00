"""Reading files, writing files and folders that appear whole or not at all, and locks."""

import contextlib
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError

REPLACED_SUFFIX = ".replaced"  # of the old folder while a new one takes its place
TEMPORARY_SUFFIX = ".tmp"
LOCK_FILE = "lock"  # in a temporary folder: while its owner holds the lock, nobody else removes the folder
KEPT_NAME = 60  # characters of a name that begin its temporary name, which might otherwise become too long
HASHED_BYTES = 1 << 20  # per read


def open_for_reading(path: str | Path) -> io.BufferedReader:
    """Opens a file for reading bytes. Raises InputError if it is missing, isn't a file, or can't be read."""
    try:
        if Path(path).is_fifo():
            raise InputError(f"{path}: is a pipe; give a file")
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give the file in it") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object; a BOM is accepted. Raises InputError if the file can't be opened or holds anything else."""
    content = _load_json(path, "object")
    if not isinstance(content, dict):
        raise InputError(f"{path}: isn't a JSON object")
    return content


def read_json_list(path: str | Path) -> list[Any]:
    """Reads a JSON list, as `read_json` reads an object."""
    content = _load_json(path, "list")
    if not isinstance(content, list):
        raise InputError(f"{path}: isn't a JSON list")
    return content


def _load_json(path: str | Path, kind: str) -> Any:
    """The content of a JSON file; None if it is JSON that Python doesn't read."""
    with open_for_reading(path) as file:
        try:
            return json.loads(file.read().decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise InputError(f"{path}: isn't UTF-8; convert it with iconv") from None
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise InputError(f"{path}: isn't a JSON {kind} ({error.msg} at {where})") from None
        except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
            return None


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises InputError if it can't be read."""
    digest = hashlib.sha256()
    with open_for_reading(path) as file:
        try:
            while block := file.read(HASHED_BYTES):
                digest.update(block)
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror})") from None
    return digest.hexdigest()


def _temporary_name(path: Path) -> Path:
    # Shortened, because a name of the longest legal length would become too long.
    return path.with_name(f".{path.name[:KEPT_NAME]}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")


def _replaced_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:KEPT_NAME]}{REPLACED_SUFFIX}")


def _link_target(path: Path) -> Path:
    """The path itself or, for a link, its target, since that is what gets replaced; a link if links form a loop."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path  # `resolve` fails on a loop


def _replaceable(path: str | Path, is_kind: Callable[[Path], bool]) -> Path:
    """The file or folder to write, with links followed. Raises InputError if it exists and isn't of the kind."""
    path = Path(path)
    try:
        target = _link_target(path)
        # In this order, because another rank may write the same file between the two checks.
        if target.name and not target.is_symlink() and (not target.exists() or is_kind(target)):
            return target
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error})") from None
    raise InputError(f"{path}: can't be written (something else is there)")


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a file for writing that appears at `path` only if the block succeeds. Creates its folder if needed.

    mode: "w" for UTF-8 text with LF, "wb" for bytes. Raises InputError for an OSError, also one of the block.
    """
    path = _replaceable(path, Path.is_file)
    temporary = _temporary_name(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=encoding, newline=newline) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON object. Raises InputError if it can't be written."""
    with atomic_write(path) as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
        file.write("\n")


def write_or_compare(
    path: str | Path, content: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> str | None:
    """Writes a JSON object if the file isn't there; several processes may do so at once, with the same content.

    defaults: entries that a file of an earlier version lacks.
    Returns the first entry of `content` that the file has otherwise, as `name (its value, not the new one)`, or None.
    Raises InputError if the file can't be read or written.
    """
    if not Path(path).exists():
        write_json(path, content)
    saved = {**(defaults or {}), **read_json(path)}
    for name, value in content.items():
        if saved.get(name) != value:
            return f"{name} ({saved.get(name)}, not {value})"
    return None


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new folder that replaces `path` once the block has succeeded and the files are flushed to disk.

    A kill between the two renames of a replacement leaves the old folder under another name, which
    `resolve_interrupted_replace` finds. If the folder can't be written, raises InputError and keeps the old one.
    """
    path = _replaceable(path, Path.is_dir)
    temporary = _temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            flush_to_disk(written)
        restore_folder(path)
        if path.exists():
            path.rename(_replaced_name(path))
        temporary.rename(path)
        flush_to_disk(path.parent)
        remove_folder(_replaced_name(path))
    except InputError as error:  # of a file that the block writes
        raise InputError(str(error).replace(str(temporary), str(path))) from None
    except OSError as error:
        with contextlib.suppress(OSError):
            restore_folder(path)
        raise InputError(f"{path}: can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Makes a file's content, or the names in a folder, outlast a crash of the system."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolve_interrupted_replace(path: str | Path) -> Path:
    """Returns `path`, or where the old folder is if a kill interrupted its replacement between the two renames."""
    path = Path(path)
    target = _link_target(path)
    replaced = _replaced_name(target) if target.name else target
    return replaced if replaced.is_dir() and not path.exists() else path


def restore_folder(path: Path) -> None:
    """Ends an interrupted replacement: puts the old folder back, or removes it if the new one is in place."""
    if resolve_interrupted_replace(path) != path:
        _replaced_name(path).rename(path)
    else:
        remove_folder(_replaced_name(path))


def remove_folder(path: Path) -> None:
    """Removes a folder if it exists. Renames it first, so that a kill never leaves a part of it under its name."""
    if path.is_dir():
        if not path.name.endswith(TEMPORARY_SUFFIX):
            path = path.rename(_temporary_name(path))
        shutil.rmtree(path)


def clear_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Removes what killed writers left in a folder that nobody else writes to, and ends interrupted replacements.

    name: of the only file or folder that it is about; then others may be written meanwhile. Raises InputError if it
    can't. Skips folders with a LOCK_FILE, which `retrieval.embedding_store` removes itself.
    """
    if name and len(name) > KEPT_NAME:  # then others may have the same temporary names
        return
    names = glob.escape(name) if name else "*"
    try:
        for path in Path(folder).glob(f".{names}{REPLACED_SUFFIX}"):
            restore_folder(path.with_name(path.name[1:].removesuffix(REPLACED_SUFFIX)))
        for written in (names, f".{names}{REPLACED_SUFFIX}"):
            for path in Path(folder).glob(f".{written}.{'[0-9a-f]' * 8}{TEMPORARY_SUFFIX}"):
                if not path.is_dir():
                    path.unlink(missing_ok=True)
                elif not (path / LOCK_FILE).exists():
                    remove_folder(path)
    except OSError as error:
        raise InputError(f"{error.filename}: can't be removed ({error.strerror})") from None


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in TMPDIR, or else in /tmp, until the block ends. Raises InputError if it can't be written."""
    try:
        temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    except OSError:
        raise InputError("no temporary folder can be written; set TMPDIR to a folder that can") from None
    with temporary as folder:
        try:
            yield Path(folder)
        except (InputError, OSError) as error:
            if folder not in str(error):  # it is about another file
                raise
            raise InputError(f"{error}; if {tempfile.gettempdir()} is full, set TMPDIR to another folder") from None


def make_folder(path: str | Path) -> None:
    """Creates a folder if needed. Raises InputError if files can't be written into it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror})") from None


def prepare_file(path: str | Path) -> None:
    """Creates the folder of a file that will be written after long work. Raises InputError if it can't be written."""
    make_folder(_replaceable(path, Path.is_file).parent)


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is the folder or lies in it, with links resolved; neither needs to exist."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))  # `resolve` fails on a loop of links


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file, which is created if needed; the system releases it if the process is killed.

    Raises BlockingIOError if another process holds it or has just replaced the file, other OSErrors if it can't lock.
    """
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise BlockingIOError  # its holder replaced the file between our open and our lock
        yield
