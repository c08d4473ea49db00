"""The keys that callers of a service have to send. Imports neither Paddle nor Serving."""

import base64
import binascii
import contextlib
import hmac
import stat
from collections.abc import Iterable
from pathlib import Path

from common.errors import InputError
from common.files import open_for_reading
from serving.limits import service_log

CHALLENGES = ("Bearer", 'Basic realm="semantic index", charset="UTF-8"')  # of these a browser asks for the second
NO_KEY = "no valid key: send the header Authorization: Bearer KEY"


class ApiKeys:
    """Keys of which a caller has to send one."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def accept(self, authorization: str | None) -> bool:
        """Whether an Authorization header holds one of the keys: Bearer KEY, or Basic with the key as the password.

        Takes as long for any other key of the same length.
        """
        given = _given_key(authorization or "")
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0


def _given_key(authorization: str) -> bytes:
    """The key in an Authorization header; b"" if there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(value.strip().encode(), validate=True).partition(b":")[2]
    return b""


def read_api_keys(path: str | Path) -> ApiKeys:
    """The keys in a file, one per line. Raises InputError if there is none, or one can't be sent in a header."""
    with open_for_reading(path) as file:
        lines = file.read().splitlines()
    for number, line in enumerate(lines, 1):
        if not all(0x21 <= byte <= 0x7E for byte in line.strip()):
            raise InputError(f"{path}:{number}: a key has only ASCII letters, digits and signs; write one key per line")
    keys = [line.strip().decode() for line in lines if line.strip()]
    if not keys:
        raise InputError(f"{path}: holds no key; write one per line, such as those of openssl rand -hex 32")
    if Path(path).stat().st_mode & stat.S_IROTH:
        service_log(f"note: {path}: every user of this machine can read the keys; chmod 600 {path}")
    return ApiKeys(keys)
