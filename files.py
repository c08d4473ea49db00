"""Files that appear whole or not at all, and the manifest that tells whether a folder is as it was written."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime import InputError

MANIFEST_FILE = "manifest.json"
CHECKPOINT_REMEDY = f"take another checkpoint, or remove {MANIFEST_FILE} if you changed the files on purpose"
REPLACED_SUFFIX = ".replaced"
TEMPORARY_SUFFIX = ".tmp"
LOCK_FILE = "lock"  # in a temporary folder: its owner has it, and others look at that before they remove the folder
HASHED_BYTES = 1 << 20  # at a time

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def open_for_reading(path: str | Path) -> io.BufferedReader:
    """Opens a file for bytes. Raises InputError if it is missing, no file, or can't be read."""
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
    """Reads a JSON object. Raises InputError for anything else."""
    with open_for_reading(path) as file:
        try:
            content = json.loads(file.read())
        except (ValueError, RecursionError):
            content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: isn't a JSON object")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _temporary_name(path: Path) -> Path:
    # Cut, so that it isn't too long where the name itself isn't.
    return path.with_name(f".{path.name[:60]}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")


def _replaced_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:60]}{REPLACED_SUFFIX}")


def _link_target(path: Path) -> Path:
    """Where a link leads, since that is what is replaced, or the path itself; in a loop of links it ends at one."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path  # `resolve` fails at a loop


def _replaceable(path: str | Path, is_kind: Callable[[Path], bool]) -> Path:
    """The file or folder to write: a link's target. Raises InputError if something of another kind is there."""
    path = Path(path)
    try:
        target = _link_target(path)
        # In this order: another rank may write the same file between the two looks.
        if target.name and not target.is_symlink() and (not target.exists() or is_kind(target)):
            return target
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error})") from None
    raise InputError(f"{path}: can't be written (something else is there)")


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a file that appears under `path` only when the block has ended well. Makes the folder if need be.

    mode: "w" for UTF-8 text with LF, "wb" for bytes. Raises InputError if the file can't be written.
    """
    path = _replaceable(path, Path.is_file)
    temporary = _temporary_name(path)
    text_options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **text_options) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives a new folder that takes the place of `path` only when the block has ended well and its files are on disk.

    A kill between the two renames of a replacement leaves the old folder beside its place: see `whole_folder`. Raises
    InputError, with the old folder in its place, if it can't be written.
    """
    path = _replaceable(path, Path.is_dir)
    temporary = _temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _flush_to_disk(written)
        restore_folder(path)
        if path.exists():
            path.rename(_replaced_name(path))
        temporary.rename(path)
        _flush_to_disk(path.parent)
        remove_folder(_replaced_name(path))
    except InputError as error:
        raise InputError(str(error).replace(str(temporary), str(path))) from None
    except OSError as error:
        with contextlib.suppress(OSError):
            restore_folder(path)
        raise InputError(f"{path}: can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_folder(path: str | Path) -> Path:
    """`path`, or the folder that it held before a kill cut its replacement short."""
    path = Path(path)
    place = _link_target(path)
    replaced = _replaced_name(place) if place.name else place
    return replaced if replaced.is_dir() and not path.exists() else path


def restore_folder(path: Path) -> None:
    """Ends a replacement that a kill cut short: the old folder goes back, or away if the new one has its place."""
    if whole_folder(path) != path:
        _replaced_name(path).rename(path)
    else:
        remove_folder(_replaced_name(path))


def remove_folder(path: Path) -> None:
    """Removes a folder, if it is there, so that no kill leaves a part of it under its name."""
    if path.is_dir():
        temporary = path if path.name.endswith(TEMPORARY_SUFFIX) else _temporary_name(path)
        if temporary != path:
            path.rename(temporary)
        shutil.rmtree(temporary)


def clear_leftovers(folder: str | Path) -> None:
    """Removes what killed writers left in a folder that nobody else is writing to. Raises InputError if it can't.

    A folder with a LOCK_FILE is left to those who know what the lock is of.
    """
    try:
        for path in Path(folder).glob(f".*{REPLACED_SUFFIX}"):
            restore_folder(path.with_name(path.name[1:].removesuffix(REPLACED_SUFFIX)))
        for path in Path(folder).glob(f".*.{'[0-9a-f]' * 8}{TEMPORARY_SUFFIX}"):
            if (path / LOCK_FILE).exists():
                continue
            remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename}: can't be removed ({error.strerror})") from None


def make_folder(path: str | Path) -> None:
    """Makes a folder, if it isn't there, that files can be written into. Raises InputError if they can't."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror})") from None


def prepare_file(path: str | Path) -> None:
    """Makes the folder of a file that long work will write. Raises InputError if the file couldn't be written."""
    make_folder(_replaceable(path, Path.is_file).parent)


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is the folder or lies in it, links resolved; neither need be there."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))  # `resolve` fails at a loop of links


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object for people to read. Raises InputError if it can't be written."""
    with atomic_write(path) as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
        file.write("\n")


# ---------------------------------------------------------------------------------------------------------------------
# Locks


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps a file, which it makes if need be, from all others that ask for it here; a killed process gives it back.

    Raises OSError if that can't be, and of its kinds BlockingIOError where another has the file.
    """
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise BlockingIOError  # another had it when this opened it, and has put a new one in its place
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


def write_manifest(folder: Path) -> None:
    """Writes the size and SHA-256 of each file in a folder beside them."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    write_json(folder / MANIFEST_FILE, {"files": {path.name: _fingerprint(path) for path in files}})


def check_manifest(folder: Path, ignored: str = "", remedy: str = CHECKPOINT_REMEDY) -> None:
    """Raises InputError naming the first file that isn't as the folder's manifest says; without a manifest all is well.

    ignored: beginning of the names of files that aren't looked at; remedy: what the user can do.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return
    files = read_json(folder / MANIFEST_FILE).get("files")
    if not isinstance(files, dict):
        raise InputError(f"{folder / MANIFEST_FILE}: isn't a manifest; {remedy}")
    for name, expected in files.items():
        if ignored and name.startswith(ignored):
            continue
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: is missing, though {MANIFEST_FILE} lists it; {remedy}")
        if _fingerprint(path) != expected:
            raise InputError(f"{path}: isn't as it was written (see {MANIFEST_FILE}); {remedy}")


def check_replaceable(folder: Path, option: str, mark: str, others: Iterable[str] = ()) -> None:
    """Raises InputError if a folder holds anything that no export wrote: replacing it would lose that.

    option: names the folder; mark: a file that the exports of this kind have; others: that they may have, beside those
    that the folder's manifest lists.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    written = {MANIFEST_FILE}
    if mark in names:
        written.update(others)
        if MANIFEST_FILE in names:
            written.update(read_json(folder / MANIFEST_FILE).get("files") or ())
    if names - written:
        raise InputError(f"{option} {folder}: holds {min(names - written)}, which no export wrote; give another folder")


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


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
