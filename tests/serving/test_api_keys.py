from pathlib import Path

import pytest

from common.errors import InputError
from serving.api_keys import read_api_keys


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    file = folder / "keys.txt"
    file.write_bytes(content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize(
    ("authorization", "is_accepted"),
    [
        ("Bearer first-key", True),
        ("Bearer second", True),
        ("bearer  second ", True),
        ("Bearer second-key", False),
        ("Bearer secon", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("second", False),
        ("Basic second", False),
        ("Bearer first-key second", False),
        ("Bearer schl\xfcssel", False),
        ("", False),
        (None, False),
    ],
)
def test_one_of_the_keys_is_accepted(tmp_path: Path, authorization: str | None, is_accepted: bool) -> None:
    keys = read_api_keys(key_file(tmp_path, b"first-key\r\n\n  second \n"))
    assert keys.accept(authorization) == is_accepted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key; write one per line"),
        (b"\n \n", "holds no key"),
        (b"good\na key\n", ":2: a key has only ASCII"),
        ("密钥\n".encode(), ":1: a key has only ASCII"),
        (b"good\n\xff\n", ":2: a key has only ASCII"),
    ],
)
def test_a_bad_key_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_api_keys(key_file(tmp_path, content))
    assert "good" not in str(error.value)


def test_a_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_api_keys(tmp_path / "keys.txt")


@pytest.mark.parametrize(("mode", "is_noted"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_key_file_that_others_can_read_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: int, is_noted: bool
) -> None:
    file = key_file(tmp_path, b"key\n", mode)
    read_api_keys(file)
    assert (
        capsys.readouterr().err
        == is_noted * f"note: {file}: every user of this machine can read the keys; chmod 600 {file}\n"
    )
