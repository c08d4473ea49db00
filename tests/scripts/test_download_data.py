"""scripts/download_data.sh against a server of the tests."""

import os
import re
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers import ROOT, Completed, refuses

pytestmark = pytest.mark.process
DATA_FILES = ["corpus.csv", "dev.csv", "test.csv", "train.csv"]


class RangeHandler(BaseHTTPRequestHandler):
    """Serves the server's `body` at /data.zip, from the offset that the request names."""

    def do_GET(self) -> None:
        body, start = self.server.body, int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        self.server.offsets.append(start)
        if self.path != "/data.zip":
            return self.send_error(404)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[start:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler) as server:
        server.offsets = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def dataset(path: Path, top: str = "", files: list[str] = DATA_FILES) -> bytes:
    """A ZIP archive in the dataset's layout, written to `path`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{top}milvus/milvus_data.csv", "文献\n")
        archive.writestr("__MACOSX/recall/train.csv", "shadow")
        for name in files:
            archive.writestr(f"{top}recall/{name}", f"{name} 检索\t文献\n")
    return path.read_bytes()


def download(*args: str | Path, server: ThreadingHTTPServer, name: str = "data.zip") -> Completed:
    url = f"http://127.0.0.1:{server.server_port}/{name}"
    return subprocess.run(
        ["sh", ROOT / "scripts/download_data.sh", *args],
        env=os.environ | {"LITERATURE_SEARCH_DATA_URL": url, "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("top", ["", "literature_search_data/"])
def test_download_unpacks_and_checks(tmp_path: Path, server: ThreadingHTTPServer, top: str) -> None:
    server.body = dataset(tmp_path / "data.zip", top)
    target = tmp_path / "new folder"
    done = download(target, server=server)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (target / "recall").iterdir()) == DATA_FILES
    assert (target / "recall/train.csv").read_text() == "train.csv 检索\t文献\n"
    assert [path.name for path in target.iterdir()] == ["recall"]
    again = download(target, server=server)
    assert again.returncode == 0 and len(server.offsets) == 1  # what is there isn't downloaded again
    assert download("--check", target, server=server).returncode == 0


def test_download_goes_on_where_it_broke_off(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    server.body = dataset(tmp_path / "data.zip")
    target = tmp_path / "target"
    target.mkdir()
    (target / "literature_search_data.zip.part").write_bytes(server.body[:100])
    assert download(target, server=server).returncode == 0
    assert server.offsets == [100]
    assert (target / "recall/dev.csv").read_text() == "dev.csv 检索\t文献\n"


def test_download_takes_an_archive_that_the_user_put_there(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    dataset(tmp_path / "literature_search_data.zip")
    assert download(tmp_path, server=server).returncode == 0
    assert server.offsets == []
    assert (tmp_path / "literature_search_data.zip").exists()


def test_download_never_overwrites(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    server.body = dataset(tmp_path / "data.zip")
    (tmp_path / "recall").mkdir()
    (tmp_path / "recall/train.csv").write_text("mine")
    assert refuses(download(tmp_path, server=server), "dev.csv test.csv corpus.csv", "nothing is overwritten")
    assert (tmp_path / "recall/train.csv").read_text() == "mine"
    assert server.offsets == []


def test_download_refuses_what_is_not_the_dataset(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    target = tmp_path / "target"
    server.body = dataset(tmp_path / "data.zip", files=DATA_FILES[1:])
    assert refuses(download(target, server=server), "lacks (or holds empty): corpus.csv")
    server.body = b"<html>not found</html>"
    assert refuses(download(target, server=server), "not a ZIP archive")
    failed = download(target, server=server, name="nothing.zip")
    assert failed.returncode == 2 and "nothing.zip" in failed.stderr and "proxy" in failed.stderr
    assert not (target / "recall").exists()
    assert [path.name for path in target.iterdir() if path.suffix != ".part"] == []


@pytest.mark.parametrize("broken", ["missing", "empty", "folder"])
def test_layout_check(tmp_path: Path, server: ThreadingHTTPServer, broken: str) -> None:
    assert refuses(download("--check", tmp_path, server=server), "no folder")
    (tmp_path / "recall").mkdir()
    for name in DATA_FILES:
        (tmp_path / "recall" / name).write_text("x\n")
    assert download("--check", tmp_path, server=server).returncode == 0
    test_file = tmp_path / "recall/test.csv"
    test_file.unlink()
    if broken == "empty":
        test_file.touch()
    elif broken == "folder":
        test_file.mkdir()
    assert refuses(download("--check", tmp_path, server=server), "test.csv")
    assert server.offsets == []


@pytest.mark.parametrize("args", [["--what"], ["a", "b"]])
def test_download_wrong_options(server: ThreadingHTTPServer, args: list[str]) -> None:
    assert refuses(download(*args, server=server), args[-1])
