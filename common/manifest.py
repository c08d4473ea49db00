"""The manifest of a folder: the size and SHA-256 of each file, by which damaged and changed files are found."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json, sha256, write_json

MANIFEST_FILE = "manifest.json"
CHECKPOINT_REMEDY = f"take another checkpoint, or remove {MANIFEST_FILE} if you changed the files on purpose"


def write_manifest(folder: Path, **more: Any) -> None:
    """Writes the manifest of the files in a folder into the folder; `more`: further entries."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    write_json(folder / MANIFEST_FILE, {"files": {path.name: _fingerprint(path) for path in files}, **more})


def read_manifest(folder: Path, remedy: str = CHECKPOINT_REMEDY) -> dict[str, Any]:
    """The folder's manifest, or one that lists no files if there is none. Raises InputError if it can't be read."""
    if not (folder / MANIFEST_FILE).is_file():
        return {"files": {}}
    manifest = read_json(folder / MANIFEST_FILE)
    if not isinstance(manifest.get("files"), dict):
        raise InputError(f"{folder / MANIFEST_FILE}: isn't a manifest; {remedy}")
    return manifest


def check_manifest(
    folder: Path, *, only: Callable[[str], bool] = lambda name: True, remedy: str = CHECKPOINT_REMEDY
) -> None:
    """Raises InputError for the first file that is missing or differs from the manifest; passes without a manifest.

    only: tells for a file's name whether the file is checked; remedy: what the user can do, for the message.
    """
    for name, expected in read_manifest(folder, remedy)["files"].items():
        path = folder / name
        if not only(name):
            continue
        if not path.is_file():
            raise InputError(f"{path}: is missing, though {MANIFEST_FILE} lists it; {remedy}")
        if _fingerprint(path) != expected:
            raise InputError(f"{path}: isn't as it was written (see {MANIFEST_FILE}); {remedy}")


def check_replaceable(folder: Path, option: str, mark: str, others: Iterable[str] = ()) -> None:
    """Raises InputError if replacing a folder would lose a file that no export wrote.

    option: the option that names the folder, for the message; mark: a file that every export of this kind has, without
    which the folder's manifest doesn't count; others: files that an export may have besides those in its manifest.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    written = {MANIFEST_FILE}
    if mark in names:
        written.update(others, read_manifest(folder)["files"])
    if names - written:
        raise InputError(f"{option} {folder}: holds {min(names - written)}, which no export wrote; give another folder")


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
