"""Downloads over HTTP that go on after a break, show their progress, and are checked before a file gets its name.

Imports no Paddle.
"""

import base64
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session, hf_raise_for_status
from requests.utils import should_bypass_proxies
from tqdm import tqdm

from common.errors import InputError
from common.logs import log, progress_bar

ATTEMPTS = 3  # in a row without a new byte
SECONDS_BETWEEN_ATTEMPTS = 1.0
BLOCK_BYTES = 1 << 16  # a break loses what has arrived of a block
MOST_REDIRECTS = 5
PARTIAL_SUFFIX = ".incomplete"  # huggingface_hub's, so that its unfinished downloads are continued
PROXY_VARIABLES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
NOT_A_HUB = "it doesn't answer as a hub does"
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


class DownloadError(Exception):
    """An address doesn't give a file; the message says why, in a few words."""


class RemoteFile(NamedTuple):
    """A file on a server. Size and checksum are those that its headers promise."""

    url: str
    size: int  # bytes
    etag: str  # names the content: SHA-256 or Git's SHA-1 on the Hugging Face hub
    md5: str | None  # in hex
    headers: Mapping[str, str]  # for the requests

    def is_intact(self, file: Path) -> bool:
        """Whether a local file has this one's checksum; True if the server gives none."""
        if re.fullmatch("[0-9a-f]{64}", self.etag):
            return _hex_digest(file, "sha256") == self.etag
        if re.fullmatch("[0-9a-f]{40}", self.etag):  # Git's, on the hub; of the bytes alone, on some mirrors
            git_header = b"blob %d\0" % self.size
            return self.etag in (_hex_digest(file, "sha1", git_header), _hex_digest(file, "sha1"))
        return self.md5 in (None, _hex_digest(file, "md5"))


def _hex_digest(file: Path, algorithm: str, header: bytes = b"") -> str:
    digest = hashlib.new(algorithm, header, usedforsecurity=False)
    with open(file, "rb") as content:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def timeouts() -> tuple[float, float]:
    """Seconds to wait for a connection and for an answer: huggingface_hub's, 10 s each, or its variables'."""
    return constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT


@contextlib.contextmanager
def described_errors() -> Iterator[None]:
    """Inside this block, whatever a server or the network does raises DownloadError."""
    try:
        yield
    except (requests.RequestException, OfflineModeIsEnabled) as error:
        raise DownloadError(describe(error)) from error


def describe(error: Exception) -> str:
    """What is wrong with a request, in a few words."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, requests.JSONDecodeError):
        return NOT_A_HUB
    if status is not None:
        return f"status {status}"
    if isinstance(error, requests.exceptions.InvalidSchema) and "SOCKS" in str(error):
        return f"the SOCKS proxy of {_proxy_variable(error)} needs a package: pip install pysocks"
    if isinstance(error, ValueError):  # requests' errors of addresses
        return "isn't an address such as https://hf-mirror.com"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate can't be verified"
    reason = "timeout" if isinstance(error, requests.Timeout) else "no connection"
    variable = _proxy_variable(error)
    return f"{reason} through the proxy of {variable}" if variable else reason


def _proxy_variable(error: Exception) -> str | None:
    """The variable of the proxy that a request went through, if any."""
    url = getattr(getattr(error, "request", None), "url", None)
    if url and should_bypass_proxies(url, no_proxy=None):
        return None
    return next((name for name in PROXY_VARIABLES if os.environ.get(name)), None)


def look_up(url: str, headers: Mapping[str, str]) -> RemoteFile:
    """Asks a server for a file's size and checksum. Raises DownloadError."""
    headers = {**headers, "Accept-Encoding": "identity"}  # else the size would be that of compressed bytes
    with described_errors():
        for _ in range(MOST_REDIRECTS):
            answer = get_session().head(url, headers=headers, allow_redirects=False, timeout=timeouts())
            hf_raise_for_status(answer)
            # The hub tells both before it redirects to its storage, which may refuse HEAD.
            if not answer.is_redirect or "X-Linked-Etag" in answer.headers:
                break
            target = urljoin(url, answer.headers["Location"])
            if urlsplit(target).netloc != urlsplit(url).netloc:
                headers.pop("authorization", None)
            url = target
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        raise DownloadError("a web page is answered instead of the file")  # the log-in of a network, or a proxy's error
    size = answer.headers.get("X-Linked-Size") or answer.headers.get("Content-Length", "")
    if (answer.is_redirect and "X-Linked-Etag" not in answer.headers) or not size.isdecimal():
        raise DownloadError("its server tells no size")
    etag = answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag", "")
    with_md5 = re.fullmatch("[A-Za-z0-9+/]{22}==", answer.headers.get("Content-MD5", ""))
    md5 = base64.b64decode(with_md5.group()).hex() if with_md5 else None
    return RemoteFile(url, int(size), etag.removeprefix("W/").strip('"'), md5, headers)


def download(files: Sequence[tuple[RemoteFile, Path]], description: str, lock: Path, remedy: str) -> None:
    """Downloads files to paths on one disk. A path appears only when its file is complete and checked.

    lock: a file that one process locks at a time. remedy: what to do if the disk is full. Raises DownloadError, and
    InputError for a disk that can't hold the files or be written.
    """
    if not files:
        return  # the folders may be read-only
    try:
        for folder in (lock.parent, *(target.parent for _, target in files)):
            folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(lock, description):
            missing = [(file, target) for file, target in files if not target.exists()]
            for folder in {target.parent for _, target in missing}:
                _check_room(folder, missing, remedy)
            total = sum(file.size for file, _ in missing)
            with progress_bar(total, f"download {description}", "B", unit_scale=True) as bar:
                for file, target in missing:
                    _download(file, target, bar)
    except OSError as error:
        where = error.filename or lock.parent
        raise InputError(f"{where}: can't be written ({error.strerror or error}); {remedy}") from None


@contextlib.contextmanager
def _exclusive(lock: Path, description: str) -> Iterator[None]:
    """Holds a lock, which the system releases if the process is killed."""
    with open(lock, "ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"{description}: waiting for another process that downloads it")
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def _partial(target: Path, file: RemoteFile) -> Path:
    """Where a file grows until it is complete; another version of it has another name."""
    version = re.sub(r"\W", "", file.etag)
    name = target.name if version in target.name else f"{target.name}.{version}"
    return target.with_name(name + PARTIAL_SUFFIX)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_room(folder: Path, files: Sequence[tuple[RemoteFile, Path]], remedy: str) -> None:
    needed = sum(file.size - _size(_partial(target, file)) for file, target in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        problem = f"the disk has {free / 1e6:.0f} MB left, and the download needs {needed / 1e6:.0f} MB"
        raise InputError(f"{folder}: {problem}; {remedy}")


def _download(file: RemoteFile, target: Path, bar: tqdm) -> None:
    partial = _partial(target, file)
    is_continued = _size(partial) > 0
    _receive(file, partial, bar)
    if not file.is_intact(partial):
        partial.unlink()
        if not is_continued:
            raise DownloadError(f"{target.name} arrives with another checksum than promised")
        bar.update(-file.size)
        _receive(file, partial, bar)  # the part that an earlier run left was damaged
        if not file.is_intact(partial):
            partial.unlink()
            raise DownloadError(f"{target.name} arrives with another checksum than promised")
    os.replace(partial, target)


def _receive(file: RemoteFile, partial: Path, bar: tqdm) -> None:
    """Appends to `partial` until it has the file's size."""
    if _size(partial) > file.size:
        partial.unlink()
    partial.touch()
    bar.update(_size(partial))
    failures = 0
    while (before := _size(partial)) < file.size:
        try:
            with described_errors():
                _append(file, partial, before, bar)
            error = DownloadError("it sends less than promised")
        except DownloadError as reason:
            if not _is_transient(reason.__cause__):
                raise
            error = reason
        failures = 1 if _size(partial) > before else failures + 1
        if _size(partial) < file.size:
            if failures >= ATTEMPTS:
                raise error
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
    if _size(partial) > file.size:
        partial.unlink()
        raise DownloadError(f"{partial.name.removesuffix(PARTIAL_SUFFIX)} has another size than promised")


def _is_transient(cause: BaseException | None) -> bool:
    """Whether asking once more may help."""
    status = getattr(getattr(cause, "response", None), "status_code", None)
    return status in TRANSIENT_STATUS if status else not isinstance(cause, OfflineModeIsEnabled)


def _append(file: RemoteFile, partial: Path, position: int, bar: tqdm) -> None:
    """Receives what follows `position`, or all where the server can't continue."""
    headers = {**file.headers, **({"Range": f"bytes={position}-"} if position else {})}
    with get_session().get(file.url, headers=headers, stream=True, timeout=timeouts()) as answer:
        if answer.status_code == 416:  # the file has become shorter
            partial.unlink()
        hf_raise_for_status(answer)
        continues = answer.status_code == 206
        if not continues:
            bar.update(-position)
        with open(partial, "ab" if continues else "wb") as growing:
            for block in answer.iter_content(BLOCK_BYTES):
                growing.write(block)
                bar.update(len(block))
