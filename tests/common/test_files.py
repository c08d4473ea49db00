"""Files and folders that appear whole or not at all, what a kill leaves of them, and locks."""

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import (
    HASHED_BYTES,
    LOCK_FILE,
    atomic_folder,
    atomic_write,
    clear_leftovers,
    is_within,
    locked,
    make_folder,
    prepare_file,
    read_json,
    remove_folder,
    resolve_interrupted_replace,
    restore_folder,
    scratch_folder,
    sha256,
    write_json,
)
from helpers import ROOT, file_size_limit


def written(folder: Path, raw: bytes, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def test_json_objects_round_trip_and_other_content_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"名": [1, None], "x": 0.5})
    assert read_json(path) == {"名": [1, None], "x": 0.5}
    assert "名" in path.read_text(encoding="utf-8")
    for raw in (b"", b"[1]", b"{", b"\xff", b"[" * 200_000, b"1"):
        with pytest.raises(InputError, match=f"{path}: isn't (a JSON object|UTF-8)"):
            read_json(written(tmp_path, raw, path.name))


@pytest.mark.parametrize("failure", [RuntimeError("NaN"), KeyboardInterrupt(), InputError("bad line")])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = written(tmp_path, b"old", "result.txt")

    def write() -> None:
        with atomic_write(path) as file:
            file.write("new")
            file.flush()
            assert path.read_bytes() == b"old"
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert os.listdir(tmp_path) == ["result.txt"]
    assert path.read_bytes() == b"old"


def test_atomic_write_replaces_text_and_bytes(tmp_path: Path) -> None:
    path = written(tmp_path, b"a longer old text")
    with open(path, "rb") as reader:  # one that is in the middle of the old file reads it to its end
        with atomic_write(path) as file:
            file.write("新\n")
        assert reader.read() == b"a longer old text"
    assert path.read_bytes() == "新\n".encode()
    with atomic_write(path, "wb") as file:
        file.write(b"\0\xff")
    assert path.read_bytes() == b"\0\xff"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("failure", [RuntimeError("NaN"), KeyboardInterrupt(), InputError("bad line")])
def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "model_best"
    path.mkdir()
    written(path, b"old", "config.json")

    def write() -> None:
        with atomic_folder(path) as folder:
            written(folder, b"new", "config.json")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert os.listdir(tmp_path) == ["model_best"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {"config.json": b"old"}


def test_atomic_folder_replaces_the_whole_folder(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "model_best"
    for name in ("first", "second"):
        with atomic_folder(path) as folder:
            written(folder, name.encode(), name)
    assert [file.name for file in path.iterdir()] == ["second"]
    assert os.listdir(path.parent) == ["model_best"]


def write_file(path: Path) -> None:
    with atomic_write(path) as file:
        file.write("x")


def write_folder(path: Path) -> None:
    with atomic_folder(path) as folder:
        written(folder, b"x")


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize(
    "place", ["file/below", "file/below/below", "n" * 300, "名" * 90, "/proc/none/below", ".", "/"]
)
def test_a_place_that_can_t_be_written_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, b"old", "file")
    with pytest.raises(InputError, match="can't be written"):
        write(Path(place))
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize(("mode", "content"), [("w", "一" * 100), ("wb", b"x" * 300)])
def test_buffered_data_is_written_before_the_old_file_is_replaced(
    tmp_path: Path, mode: str, content: str | bytes
) -> None:
    """A full disk is noticed when the file is closed."""
    path = tmp_path / "file"
    path.write_text("old")
    with file_size_limit(100), pytest.raises(InputError, match="can't be written"), atomic_write(path, mode) as file:
        file.write(content)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut could leave empty files. The rename is flushed before the old folder goes."""
    flushed: list[tuple[int, bool]] = []
    fsync, path = os.fsync, tmp_path / "folder"

    def spy(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append((os.fstat(descriptor).st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", spy)
    with atomic_folder(path) as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "file").write_text("content")
    written = {place.stat().st_ino for place in (path, path / "below", path / "below" / "file")}
    assert {number for number, is_there in flushed if not is_there} == written
    assert [number for number, is_there in flushed if is_there] == [tmp_path.stat().st_ino]


def test_the_longest_file_names_can_be_written(tmp_path: Path) -> None:
    names = ["n" * 255, "名" * 85]
    write_file(tmp_path / names[0])
    write_folder(tmp_path / names[1])
    assert sorted(os.listdir(tmp_path)) == names


def test_a_folder_in_a_file_s_place_and_the_reverse_are_input_errors(tmp_path: Path) -> None:
    file, folder = written(tmp_path, b"old", "file"), tmp_path / "folder"
    folder.mkdir()
    written(folder, b"old")
    with pytest.raises(InputError, match=f"{folder}: can't be written"):
        write_file(folder)
    with pytest.raises(InputError, match=f"{file}: can't be written"):
        write_folder(file)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert file.read_bytes() == b"old"
    assert os.listdir(folder) == ["file.csv"]


def test_a_link_stays_a_link_to_what_was_written(tmp_path: Path) -> None:
    disk = tmp_path / "large disk"
    disk.mkdir()
    (disk / "folder").mkdir()
    written(disk, b"old", "file")
    for name, write in (("file", write_file), ("folder", write_folder)):
        link = tmp_path / name
        link.symlink_to(disk / name)
        write(link)
        assert link.is_symlink()
    assert (disk / "file").read_bytes() == b"x"
    assert os.listdir(disk / "folder") == ["file.csv"]
    assert sorted(os.listdir(disk)) == ["file", "folder"]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "large disk"]


def test_a_loop_of_links_is_an_input_error(tmp_path: Path) -> None:
    for name, target in (("one", "other"), ("other", "one")):
        (tmp_path / name).symlink_to(tmp_path / target)
    for write in (write_file, write_folder, prepare_file):
        with pytest.raises(InputError, match=f"^{tmp_path}/one: can't be written"):
            write(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["one", "other"]


def test_only_regular_files_and_folders_are_replaced(tmp_path: Path) -> None:
    """As root, `--output /dev/null` would otherwise turn the device into a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (write_file, write_folder):
        with pytest.raises(InputError, match=f"{pipe}: can't be written"):
            write(pipe)
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


# ---------------------------------------------------------------------------------------------------------------------
# After a kill


def folder_with(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "weights").write_text(content)
    return path


def test_a_file_that_another_rank_writes_between_two_checks_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "embeddings.json"

    def written_after(check: Callable[[Path], bool]) -> Callable[[Path], bool]:
        def answer(checked: Path) -> bool:
            try:
                return check(checked)
            finally:
                path.write_text("{}")

        return answer

    monkeypatch.setattr(Path, "exists", written_after(Path.exists))
    monkeypatch.setattr(Path, "is_file", written_after(Path.is_file))
    write_json(path, {"documents": 3})
    assert read_json(path) == {"documents": 3}


def test_a_replacement_interrupted_between_its_renames_is_read_and_undone(tmp_path: Path) -> None:
    place = tmp_path / "model_best"
    replaced = folder_with(tmp_path / ".model_best.replaced", "old")
    assert resolve_interrupted_replace(place) == replaced
    clear_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["model_best"]
    assert (place / "weights").read_text() == "old"
    assert resolve_interrupted_replace(place) == place


def test_an_interrupted_replacement_behind_a_link_is_read_too(tmp_path: Path) -> None:
    folder_with(tmp_path / "disk" / ".index.replaced", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "index")
    assert (resolve_interrupted_replace(tmp_path / "link") / "weights").read_text() == "old"
    with atomic_folder(tmp_path / "link") as folder:
        written(folder, b"new", "weights")
    assert os.listdir(tmp_path / "disk") == ["index"]
    assert (resolve_interrupted_replace(tmp_path / "link") / "weights").read_text() == "new"


def test_a_replacement_interrupted_after_its_renames_is_completed(tmp_path: Path) -> None:
    place = folder_with(tmp_path / "model_best", "new")
    folder_with(tmp_path / ".model_best.replaced", "old")
    assert resolve_interrupted_replace(place) == place
    restore_folder(place)
    assert os.listdir(tmp_path) == ["model_best"]
    assert (place / "weights").read_text() == "new"


@pytest.mark.parametrize("place", ["model_best", ".", "/"])
def test_a_folder_without_an_interrupted_replacement_stands_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_interrupted_replace(place) == Path(place)


def test_a_new_replacement_removes_what_an_interrupted_one_left(tmp_path: Path) -> None:
    """If the old folder stayed under its other name, the next rename to that name would fail."""
    folder_with(tmp_path / ".model_best.replaced", "old")
    with atomic_folder(tmp_path / "model_best") as folder:
        written(folder, b"new", "weights")
    assert os.listdir(tmp_path) == ["model_best"]
    assert (tmp_path / "model_best" / "weights").read_text() == "new"


def test_a_new_replacement_completes_an_interrupted_one(tmp_path: Path) -> None:
    """The kill came after both renames."""
    (tmp_path / ".folder.replaced").mkdir()
    (tmp_path / ".folder.replaced" / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("new")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("newest")
    assert (tmp_path / "folder" / "file").read_text() == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_only_leftovers_of_ours_are_cleared(tmp_path: Path) -> None:
    folder_with(tmp_path / ".model_4.0123abcd.tmp", "half")
    written(tmp_path, b"half", ".result.txt.ffffffff.tmp")
    others = ["model_3", ".notes.tmp", ".hidden", "0123abcd.tmp"]
    for name in others:
        written(tmp_path, b"", name)
    others.append(".embeddings.0123abcd.tmp")  # has an owner
    written(folder_with(tmp_path / others[-1], "half"), b"", LOCK_FILE)
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    clear_leftovers(tmp_path / "nowhere")


def test_leftovers_of_one_folder_are_cleared_without_those_of_others(tmp_path: Path) -> None:
    """Also of a removal that was interrupted, and with a name that would be a pattern."""
    for name in ("index", "other", "index2", "[i]"):
        for leftover in (f".{name}.0123abcd.tmp", f"..{name}.replaced.89abcdef.tmp", f".{name}.replaced"):
            folder_with(tmp_path / leftover, "old")
        folder_with(tmp_path / name, "new")
    for name in ("index", "[i]"):
        clear_leftovers(tmp_path, name)
        assert not [path for path in os.listdir(tmp_path) if path.startswith((f".{name}.", f"..{name}."))]
    assert len(os.listdir(tmp_path)) == 4 + 2 * 3
    assert {(tmp_path / name / "weights").read_text() for name in ("index", "other", "index2", "[i]")} == {"new"}


def test_temporary_names_that_several_folders_may_have_are_left(tmp_path: Path) -> None:
    leftover = folder_with(tmp_path / f".{'x' * 60}.0123abcd.tmp", "half")
    clear_leftovers(tmp_path, 61 * "x")
    assert leftover.exists()
    clear_leftovers(tmp_path, 60 * "x")
    assert not leftover.exists()


def test_leftovers_that_can_t_be_removed_are_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = folder_with(tmp_path / ".model_4.0123abcd.tmp", "half")

    def refuse(path: str, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(InputError, match=rf"{leftover}: can't be removed \(Permission denied\)"):
        clear_leftovers(tmp_path)


def test_a_folder_is_renamed_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is renamed before its files are removed one by one."""
    folder = folder_with(tmp_path / "model_3", "old")
    names = []
    plain_rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: (names.extend(os.listdir(tmp_path)), plain_rmtree(path)))
    remove_folder(folder)
    assert len(names) == 1 and names[0].startswith(".model_3.") and names[0].endswith(".tmp")
    assert os.listdir(tmp_path) == []
    remove_folder(folder)


def test_an_error_in_a_folder_names_its_place(tmp_path: Path) -> None:
    message = f"^{tmp_path}/model_4/config.json: is bad$"
    with pytest.raises(InputError, match=message), atomic_folder(tmp_path / "model_4") as folder:
        raise InputError(f"{folder}/config.json: is bad")


def test_a_folder_is_made_if_files_can_be_written_into_it(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    file = written(tmp_path, b"")
    for place in (file, file / "below", Path("/proc/1/there")):
        with pytest.raises(InputError, match=f"^{place}: can't be written"):
            make_folder(place)


def test_a_file_s_folder_is_made_if_the_file_can_be_written(tmp_path: Path) -> None:
    prepare_file(tmp_path / "a" / "file")
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "b" / "file")
    prepare_file(tmp_path / "link")
    assert (tmp_path / "b").is_dir()
    for place in (tmp_path / "a", Path("/proc/1/there")):
        with pytest.raises(InputError, match=f"^{place if place.is_dir() else place.parent}: can't be written"):
            prepare_file(place)


def test_is_within_follows_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = tmp_path / "folder"  # need not exist
    assert all(is_within(path, folder) for path in (folder, folder / "a" / "b", tmp_path / "link" / "a"))
    assert is_within(folder / "a", tmp_path / "link")
    assert not any(is_within(path, folder) for path in (tmp_path, tmp_path / "folder2", tmp_path / "loop"))


# ---------------------------------------------------------------------------------------------------------------------
# Locks


@pytest.mark.process
def test_a_file_is_locked_until_the_block_or_the_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path):
            pass
        assert path.exists()
    code = """
import pathlib, sys, time
from common.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(1000)
"""
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(BlockingIOError), locked(path):
            pass
        process.kill()
    with locked(path):
        pass


def test_a_file_that_is_replaced_while_it_is_being_locked_counts_as_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock would be on the old file, which no other process looks at any more."""
    path = written(tmp_path, b"old", "lock")
    flock = fcntl.flock
    monkeypatch.setattr(
        fcntl, "flock", lambda *arguments: (os.replace(written(tmp_path, b""), path), flock(*arguments))
    )
    with pytest.raises(BlockingIOError), locked(path):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Hashes


def test_hashes_are_those_of_the_whole_file(tmp_path: Path) -> None:
    raw = os.urandom(HASHED_BYTES + 1)
    assert sha256(written(tmp_path, raw)) == hashlib.sha256(raw).hexdigest()
    with pytest.raises(InputError, match="no such file"):
        sha256(tmp_path / "none")


# ---------------------------------------------------------------------------------------------------------------------
# Temporary folders


def test_a_scratch_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder() as folder:
        (folder / "file").touch()
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_without_room_for_temporary_files_the_message_names_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"^no temporary folder can be written; set TMPDIR"), scratch_folder():
        pass
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = f"File too large.*; if {tmp_path} is full, set TMPDIR to another folder$"
    with pytest.raises(InputError, match=said), scratch_folder() as folder, file_size_limit(10):
        write_json(folder / "file.json", {"text": "longer than the limit"})
    with pytest.raises(InputError, match=r"^corpus\.csv: no such file$"), scratch_folder():
        raise InputError("corpus.csv: no such file")
    assert list(tmp_path.iterdir()) == []
