"""Milvus that fails: clients and servers that are killed, passwords, addresses, collections that go away."""

import http.server
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ann_util import IndexOptions
from common.errors import InputError
from helpers import ROOT, unit_vectors
from milvus_helpers import Milvus, running_milvus
from retrieval import milvus_server
from retrieval.milvus_collection import CollectionInfo
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_server import CollectionMissing, MilvusServer, MilvusUnavailable, connect

pytestmark = pytest.mark.milvus

ROWS, DIM = 20_000, 16
LOADER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from ann_util import IndexOptions
from common.cli import run
from helpers import unit_vectors
from retrieval import milvus_index
from retrieval.milvus_collection import CollectionInfo
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_server import MilvusServer

milvus_index.RANGE_ROWS, milvus_index.BATCH_BYTES = 1000, 20_000

def main():
    server = MilvusServer({uri!r}, token_file={token_file!r}, call_seconds=10)
    documents = [f"document {{row}}" for row in range({rows})]
    index = MilvusIndex.create(server, {alias!r}, CollectionInfo("m", "c", "fp32", True, {dim}), IndexOptions(), {rows})
    print("loading", flush=True)
    index.add(unit_vectors({rows}, {dim}), documents)
    index.finish(documents)
    index.publish({alias!r})
    return 0

run(main)
"""


def start_loader(server: MilvusServer, alias: str) -> "subprocess.Popen[str]":
    names = {"uri": server.uri, "token_file": server.token_file, "alias": alias, "rows": ROWS, "dim": DIM}
    code = LOADER.format(root=str(ROOT), tests=str(ROOT / "tests"), **names)
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_while_loading(server: MilvusServer, alias: str, seconds: float) -> None:
    """Starts a client and kills it this long after it began to send."""
    loader = start_loader(server, alias)
    assert loader.stdout and loader.stderr
    try:
        assert loader.stdout.readline() == "loading\n", loader.stderr.read()
        time.sleep(seconds)
    finally:
        loader.kill()
        loader.communicate()


def check_complete(server: MilvusServer, alias: str) -> None:
    """The collection holds exactly what an uninterrupted load would have sent."""
    loader = start_loader(server, alias)
    _, log = loader.communicate(timeout=300)
    assert loader.returncode == 0, log
    index = MilvusIndex.open(server, alias)
    documents = [f"document {row}" for row in range(ROWS)]
    ids = index.ids_of(documents)
    assert index.live_count == ROWS
    found = {each: vector for page in index._live_blocks() for each, vector in zip(*page, strict=True)}
    assert sorted(found) == sorted(ids)
    np.testing.assert_array_equal(np.array([found[each] for each in ids]), unit_vectors(ROWS, DIM))
    assert index.texts(ids) == dict(zip(ids, documents, strict=True))


@pytest.fixture
def own(milvus_program: Path, tmp_path: Path) -> Iterator[Milvus]:
    """A server that a test may kill."""
    with running_milvus(milvus_program, tmp_path / "milvus", session_seconds=5) as milvus:
        yield milvus


@pytest.mark.server
@pytest.mark.process
def test_a_load_goes_on_after_its_client_was_killed(milvus: Milvus) -> None:
    server = MilvusServer(milvus.uri, token_file=str(milvus.token_file))
    alias = f"killed_{time.monotonic_ns()}"
    for seconds in (0.3, 1.0):
        kill_while_loading(server, alias, seconds)
        with pytest.raises(CollectionMissing):
            MilvusIndex.open(server, alias)
    check_complete(server, alias)


@pytest.mark.server
@pytest.mark.process
def test_a_load_goes_on_after_its_server_was_killed(milvus_program: Path, tmp_path: Path) -> None:
    for seconds in (0.7,):
        with running_milvus(milvus_program, tmp_path / "milvus", session_seconds=5) as milvus:
            loader = start_loader(MilvusServer(milvus.uri), "killed")
            assert loader.stdout and loader.stderr
            assert loader.stdout.readline() == "loading\n", loader.stderr.read()
            time.sleep(seconds)
            milvus.kill()
            _, log = loader.communicate(timeout=200)
        assert loader.returncode == 2 and "Traceback" not in log
        assert log.strip().splitlines()[-1].startswith(f"error: Milvus at {milvus.uri}: doesn't answer; see whether")
    with running_milvus(milvus_program, tmp_path / "milvus", session_seconds=5) as milvus:
        check_complete(MilvusServer(milvus.uri), "killed")


@pytest.mark.process
def test_an_embedded_load_goes_on_after_a_kill(tmp_path: Path) -> None:
    server = MilvusServer(str(tmp_path / "milvus.db"))
    for seconds in (0.2, 0.6):
        kill_while_loading(server, "killed", seconds)
    loader = start_loader(server, "killed")
    assert loader.stdout and loader.stdout.readline() == "loading\n"
    with pytest.raises(InputError, match="another process has it open"):
        connect(server)
    loader.communicate()
    check_complete(server, "killed")


@pytest.mark.server
def test_a_wrong_password_is_one_line(milvus: Milvus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_server, "CONNECTION_SECONDS", 2)
    (tmp_path / "token").write_text("root:secret\n")
    for token_file in ("", str(tmp_path / "token")):
        with pytest.raises(InputError, match=r"refuses the user or the password; give --milvus_token_file") as raised:
            connect(MilvusServer(milvus.uri, token_file=token_file)).list_collections()
        assert "secret" not in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.setenv("MILVUS_TOKEN", "root:Milvus")
    connect(MilvusServer(milvus.uri)).list_collections()
    with pytest.raises(InputError, match="has no database nowhere; create it"):
        connect(MilvusServer(milvus.uri, database="nowhere"))


def test_an_address_without_milvus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_server, "CONNECTION_SECONDS", 2)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    try:
        for uri in ("http://127.0.0.1:1", f"http://127.0.0.1:{web.server_port}", "http://no.such.host.invalid:19530"):
            with pytest.raises(MilvusUnavailable, match="doesn't answer; see whether it runs, and whether the address"):
                connect(MilvusServer(uri))
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


@pytest.mark.parametrize("content", ["", "\n", "root:a\nroot:b\n"])
def test_a_token_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(InputError, match="token: isn't one line with user:password or a token"):
        MilvusServer("http://127.0.0.1:1", token_file=str(tmp_path / "token")).token()


@pytest.mark.server
def test_a_server_that_goes_away_and_a_collection_that_is_dropped(own: Milvus) -> None:
    server, vectors = MilvusServer(own.uri, call_seconds=3), unit_vectors(10, DIM)
    index = MilvusIndex.create(server, "one", CollectionInfo("m", "c", "fp32", True, DIM), IndexOptions(), 10)
    documents = [f"document {row}" for row in range(10)]
    index.add(vectors, documents)
    index.finish(documents)
    index.publish("one")
    connect(server).drop_alias("one")
    connect(server).drop_collection(index.name)
    with pytest.raises(CollectionMissing, match=f"has no collection {index.name}; build it"):
        index.search(vectors, 3)
    own.process.send_signal(signal.SIGKILL)
    own.process.wait()
    with pytest.raises(MilvusUnavailable, match="doesn't answer"):
        index.search(vectors, 3)


@pytest.mark.server
@pytest.mark.process
def test_a_certificate_of_ones_own(milvus_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_server, "CONNECTION_SECONDS", 2)
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    settings = {"common.security.tlsMode": 1, "tls.serverPemPath": str(certificate), "tls.serverKeyPath": str(key)}
    with running_milvus(milvus_program, tmp_path / "milvus", settings=settings) as milvus:
        uri = milvus.uri.replace("http://127.0.0.1", "https://localhost")
        certified = "--milvus_ca_file holds the authority of its certificate"
        missing = str(tmp_path / "missing.pem")
        # The good one comes last: pymilvus would use its connection for the others, too.
        for server, message in (
            (MilvusServer(uri), certified),
            (MilvusServer(uri, ca_file=str(key)), certified),
            (MilvusServer(uri, ca_file=missing), "missing.pem: no such file"),
            (MilvusServer(milvus.uri), "doesn't answer"),
        ):
            with pytest.raises(InputError, match=message) as raised:
                connect(server)
            assert "\n" not in str(raised.value)
        assert connect(MilvusServer(uri, ca_file=str(certificate))).list_collections() == []
