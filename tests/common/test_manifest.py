"""Manifests: whether the files of a folder are as they were written."""

import hashlib
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import read_json
from common.manifest import MANIFEST_FILE, check_manifest, check_replaceable, write_manifest


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A folder with three files and their manifest."""
    folder = tmp_path / "model_4"
    folder.mkdir()
    for name in ("config.json", "training_state", "weights"):
        (folder / name).write_bytes(name.encode() * 3)
    write_manifest(folder)
    return folder


def test_a_manifest_has_the_size_and_hash_of_each_file(listed: Path) -> None:
    check_manifest(listed)
    raw = (listed / "weights").read_bytes()
    files = read_json(listed / MANIFEST_FILE)["files"]
    assert list(files) == ["config.json", "training_state", "weights"]
    assert files["weights"] == {"bytes": 21, "sha256": hashlib.sha256(raw).hexdigest()}
    (listed / "notes").write_bytes(b"")  # files that aren't listed aren't checked
    check_manifest(listed)
    write_manifest(listed)
    check_manifest(listed)
    assert list(read_json(listed / MANIFEST_FILE)["files"]) == ["config.json", "notes", "training_state", "weights"]


@pytest.mark.parametrize("raw", [None, b"", b"weightsweightsweight", b"weightsweightsweightz", b"weights" * 4])
def test_a_file_that_is_not_as_listed_is_refused_by_name(listed: Path, raw: bytes | None) -> None:
    (listed / "weights").unlink()
    if raw is not None:
        (listed / "weights").write_bytes(raw)
    with pytest.raises(InputError, match=f"^{listed}/weights: is.*; take another checkpoint"):
        check_manifest(listed)
    check_manifest(listed, only=lambda name: name != "weights")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"files": []}', b'{"files'])
def test_a_damaged_manifest_is_refused(listed: Path, raw: bytes) -> None:
    (listed / MANIFEST_FILE).write_bytes(raw)
    with pytest.raises(InputError, match=f"^{listed}/{MANIFEST_FILE}: isn't a"):
        check_manifest(listed)


def test_a_folder_without_a_manifest_is_not_checked(listed: Path) -> None:
    (listed / MANIFEST_FILE).unlink()
    (listed / "weights").unlink()
    check_manifest(listed)


def test_a_folder_is_replaced_only_if_it_holds_nothing_but_an_export(listed: Path) -> None:
    check_replaceable(listed.parent / "new", "--output_path", "config.json")
    check_replaceable(listed, "--output_path", "config.json")
    (listed / "cache").write_bytes(b"")
    check_replaceable(listed, "--output_path", "config.json", others=["cache"])
    message = f"^--output_path {listed}: holds cache, which no export wrote"
    with pytest.raises(InputError, match=message):
        check_replaceable(listed, "--output_path", "config.json")
    with pytest.raises(InputError, match=f"^--output_path {listed}: holds cache"):  # no export of this kind
        check_replaceable(listed, "--output_path", "model_card.json", others=["cache"])
