"""Homes that can't be written, threads, ranks and limits; tests/test_environment.py runs whole scripts with them."""

import os
import resource
from pathlib import Path

import pytest

from common import environment
from common.environment import (
    MOST_THREADS,
    can_be_written,
    check_limits,
    check_ranks,
    check_working_folder,
    given_threads,
    prepare_environment,
    remove_temporary_home,
    writable_homes,
)
from common.errors import InputError
from helpers import file_size_limit

# ---------------------------------------------------------------------------------------------------------------------
# Homes


@pytest.fixture(autouse=True)
def _no_temporary_home_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


def test_a_home_that_can_be_written_is_used(tmp_path: Path) -> None:
    assert writable_homes({"HOME": str(tmp_path / "home")}) == {}
    homes = {"HOME": str(tmp_path / "home"), "PPNLP_HOME": str(tmp_path / "ppnlp")}
    assert writable_homes(homes) == {"PPNLP_HOME": homes["PPNLP_HOME"]}
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


@pytest.mark.parametrize("kind", ["a file", "a broken link", "a relative path", "a file below", "a full disk"])
def test_a_home_that_cannot_be_written_is_replaced_until_the_end(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "home"
    if kind == "a file":
        home.touch()
    elif kind == "a broken link":
        home.symlink_to(tmp_path / "missing" / "home")
    elif kind == "a file below":
        (home / ".cache").mkdir(parents=True)
        (home / ".cache" / "paddle").touch()
    elif kind == "a relative path":
        home = Path("~")
    with file_size_limit(100 if kind == "a full disk" else 1 << 30):
        homes = writable_homes({"HOME": str(home)})
    assert (Path(homes["HOME"]).parent, os.listdir(tmp_path / "temporary")) == (
        tmp_path / "temporary",
        [Path(homes["HOME"]).name],
    )
    assert can_be_written(Path(homes["HOME"]) / ".cache" / "paddle")
    if kind == "a file below":  # PaddleNLP's own folder can be written
        assert homes["PPNLP_HOME"] == str(home / ".paddlenlp")
    remove_temporary_home()
    assert os.listdir(tmp_path / "temporary") == []


def test_models_in_a_cache_that_cannot_be_written_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image that brings them; but nothing is downloaded into a folder that would be removed."""
    home, cache = tmp_path / "home", tmp_path / "home" / ".paddlenlp"
    (cache / "models" / "ernie-1.0").mkdir(parents=True)
    monkeypatch.setattr(environment, "can_be_written", lambda folder: not folder.is_relative_to(cache))
    homes = writable_homes({"HOME": str(home)})
    assert list(homes) == ["PPNLP_HOME"]
    replaced = Path(homes["PPNLP_HOME"])
    assert (replaced / "models" / "ernie-1.0").is_dir()
    assert not (replaced / "datasets").is_dir()
    assert (replaced / "datasets").exists()  # so PaddleNLP makes no folder there
    (cache / "datasets").mkdir()
    (cache / "packages").mkdir()
    assert writable_homes({"HOME": str(home)}) == {}  # PaddleNLP has nothing to make there
    remove_temporary_home()


@pytest.mark.parametrize("variable", [None, "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
def test_models_of_the_hub_are_found_in_a_home_that_cannot_be_written(tmp_path: Path, variable: str | None) -> None:
    (tmp_path / "home").touch()
    homes = writable_homes({"HOME": str(tmp_path / "home"), **({variable: "/models"} if variable else {})})
    assert homes.get("HF_HOME") == (None if variable else str(tmp_path / "home/.cache/huggingface"))
    remove_temporary_home()


def test_a_home_of_paddlenlp_is_never_a_folder_named_like_a_shortcut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writable_homes({"HOME": str(tmp_path), "PPNLP_HOME": ""}) == {"PPNLP_HOME": str(tmp_path / ".paddlenlp")}
    homes = writable_homes({"HOME": str(tmp_path), "PPNLP_HOME": "~/models of PaddleNLP"})
    assert homes == {"PPNLP_HOME": str(tmp_path / "models of PaddleNLP")}


# ---------------------------------------------------------------------------------------------------------------------
# Variables and limits


@pytest.mark.parametrize(("text", "threads"), [(None, None), ("", None), (" ", None), ("3", 3), (" 3 ", 3), ("4,2", 4)])
def test_threads_that_openmp_understands(text: str | None, threads: int | None) -> None:
    assert given_threads({} if text is None else {"OMP_NUM_THREADS": text}) == threads


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "all", "0x4", ",2", str(MOST_THREADS + 1)])
def test_threads_that_openmp_would_take_for_one_or_fail_with(text: str) -> None:
    with pytest.raises(InputError, match=f"^OMP_NUM_THREADS={text}: isn't a number from 1 to 1024; correct it"):
        given_threads({"OMP_NUM_THREADS": text})


RANKS = {
    "PADDLE_TRAINERS_NUM": "2",
    "PADDLE_TRAINER_ID": "1",
    "PADDLE_CURRENT_ENDPOINT": "127.0.0.1:6171",
    "PADDLE_TRAINER_ENDPOINTS": "127.0.0.1:6170,127.0.0.1:6171",
    "PADDLE_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("name", "value"), [*((name, "") for name in RANKS), *(("PADDLE_TRAINER_ID", rank) for rank in ("2", "-1", "x"))]
)
def test_variables_that_no_launcher_sets(name: str, value: str) -> None:
    check_ranks({})
    check_ranks(RANKS)
    with pytest.raises(InputError, match=f"{name}.*unset it, or start with python -m paddle.distributed.launch"):
        check_ranks({**RANKS, name: value})


def test_a_single_process_is_rank_0(tmp_path: Path) -> None:
    """Whatever a launcher has left in the environment."""
    environ = {"HOME": str(tmp_path), "PADDLE_TRAINER_ID": "3", "PADDLE_TRAINERS_NUM": "1"}
    prepare_environment(environ)
    assert environ["PADDLE_TRAINER_ID"] == "0"
    environ = {"HOME": str(tmp_path), **RANKS}
    prepare_environment(environ)
    assert environ == {"HOME": str(tmp_path), **RANKS}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLAGS_enable_pir_api", "True"),
        ("FLAGS_enable_pir_api", ""),
        ("GLOG_v", "5"),
        ("OMP_PROC_BIND", "FALSE"),
        ("KMP_AFFINITY", "none"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT"),
    ],
)
def test_harmless_values_stay_and_need_no_line(
    name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"HOME": str(tmp_path), name: value}
    prepare_environment(environ)
    assert environ[name] == value
    assert capsys.readouterr().err == ""


def test_a_working_folder_that_paddle_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_working_folder()
    (tmp_path / "bad\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "bad\udcff")
    with pytest.raises(InputError, match=r"bad\\udcff': the working folder's name isn't UTF-8; rename it"):
        check_working_folder()
    (tmp_path / "bad\udcff").rmdir()
    with pytest.raises(InputError, match=r"^the working folder has been removed; change to another one with cd$"):
        check_working_folder()


def test_a_small_address_space_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (resource.RLIM_INFINITY, 2 << 30):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        check_limits({})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, 1 << 30))
    with pytest.raises(InputError, match=r"^ulimit -v 1048576: Paddle needs more; set it to 2097152 or more"):
        check_limits({})
