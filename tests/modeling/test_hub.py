"""Models by name, from a small server on 127.0.0.1 that stands for the Hugging Face hub and PaddleNLP's storage."""

import base64
import hashlib
import http.server
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
import pytest
import requests
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import reset_sessions

import train_batch_neg
from base_model import SemanticIndexBase
from common import downloads
from common.errors import InputError
from common.files import read_json
from helpers import ROOT, assert_same_weights, make_model_folder, new_model, run_script
from modeling.backbone import find_backbone, load_tokenizer, pretrained_weights
from modeling.checkpoint import create_model
from modeling.hub import HUB_COPIES, model_folder
from modeling.model_cache import cached_folder

COMMIT = "0123456789" * 4
BERT = "owner/bert"
COPY = "PaddlePaddle/ernie-1.0-base-zh"


class Server(http.server.ThreadingHTTPServer):
    """Holds repositories of a hub and files at other addresses, and misbehaves as told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}  # owner/name -> file -> content
        self.files: dict[str, bytes] = {}  # other path -> content
        self.status: dict[str, tuple[int, dict[str, str]]] = {}  # end of a path -> what is answered instead
        self.breaks: dict[str, list[int]] = {}  # end of a path -> after how many bytes its next answers break off
        self.corrupt: set[str] = set()  # ends of paths whose bytes are changed
        self.silent: set[str] = set()  # ends of paths that aren't answered
        self.storage: str | None = None  # another server to which large files are redirected
        self.requests: list[tuple[str, str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def taken(self, method: str = "GET") -> list[str]:
        """Names of the files that were asked for."""
        paths = [path for kind, path, _ in self.requests if kind == method and not path.startswith("/api/")]
        return [path.partition(f"/resolve/{COMMIT}/")[2] or path for path in paths]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        if any(path.endswith(end) for end in server.silent):
            time.sleep(3)
            return
        for end, (status, headers) in server.status.items():
            if path.endswith(end):
                return self.answer(status, headers, b"<html>" if "X-Garbled" in headers else b"{}")
        if path.startswith("/api/models/"):
            return self.describe(path.removeprefix("/api/models/"))
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if name in server.repositories:
            return self.give_hub_file(server.repositories[name], revision, file)
        if path not in server.files:
            return self.answer(404, {}, b"")
        content = server.files[path]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        self.send(path, content, {"ETag": '"-bos"', "Content-MD5": md5})

    def describe(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        files = self.server.repositories.get(name)
        if files is None:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"}, b"{}")
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        siblings = [{"rfilename": file} for file in files]
        self.answer(200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    def give_hub_file(self, files: dict[str, bytes], revision: str, file: str) -> None:
        if revision not in ("main", COMMIT) or file not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
        content, headers = files[file], {"X-Repo-Commit": COMMIT}
        if not file.endswith((".safetensors", ".bin", ".pdparams")):
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return self.send(self.path, content, {**headers, "ETag": f'"{etag}"'})
        etag = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if self.server.storage:
            return self.answer(302, {**headers, "Location": f"{self.server.storage}/{etag}"}, b"")
        self.send(self.path, content, {**headers, "ETag": f'"{etag}"'})

    def send(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        if any(path.endswith(end) for end in self.server.corrupt):
            content = content[:-1] + bytes([content[-1] ^ 1])
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if first >= len(content) > 0:
            return self.answer(416, {}, b"")
        breaks = next((each for end, each in self.server.breaks.items() if path.endswith(end)), [])
        last = first + breaks.pop(0) if breaks and self.command == "GET" else None
        self.answer(206 if first else 200, headers, content[first:], stop=last and last - first)

    def answer(self, status: int, headers: dict[str, str], body: bytes, stop: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop])
        self.close_connection = True


def start_server() -> Server:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub, and empty caches."""
    server = start_server()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PPNLP_HOME", str(tmp_path / "ppnlp"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(downloads, "SECONDS_BETWEEN_ATTEMPTS", 0.0)
    reset_sessions()
    yield server
    server.shutdown()
    server.server_close()
    reset_sessions()


@pytest.fixture(scope="module")
def named_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ERNIE with weights, in PaddleNLP's form."""
    folder = make_model_folder(tmp_path_factory.mktemp("named") / "ernie")
    paddle.save(new_model(folder).model.ptm.state_dict(), str(folder / "model_state.pdparams"))
    return folder


@pytest.fixture
def ernie(hub: Server, named_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """`ernie-1.0` is the tiny ERNIE, at addresses of the server."""
    from paddlenlp.transformers.ernie.modeling import ErnieModel  # only after modeling.backbone, which sets an order
    from paddlenlp.transformers.ernie.tokenizer import ErnieTokenizer

    config = read_json(named_folder / "config.json")
    monkeypatch.setitem(ErnieModel.config_class.pretrained_init_configuration, "ernie-1.0", config)
    urls = {"vocab.txt": f"{hub.url}/bos/ernie_vocab.txt", "model_state.pdparams": f"{hub.url}/bos/ernie.pdparams"}
    vocabularies = ErnieTokenizer.pretrained_resource_files_map["vocab_file"]
    monkeypatch.setitem(vocabularies, "ernie-1.0", urls["vocab.txt"])
    weights = ErnieModel.pretrained_resource_files_map["model_state"]
    monkeypatch.setitem(weights, "ernie-1.0", urls["model_state.pdparams"])
    hub.files = {f"/bos/{url.rpartition('/')[2]}": (named_folder / file).read_bytes() for file, url in urls.items()}
    return hub


def put_bert(hub: Server, **files: bytes) -> dict[str, bytes]:
    """A repository in sentence-transformers' form, with files that nobody needs. Returns its files."""
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    needed = {
        "config.json": b'{"model_type": "bert"}',
        "vocab.txt": b"[PAD]\n[UNK]\n",
        "tokenizer_config.json": b'{"do_lower_case": false}',
        "modules.json": json.dumps(modules).encode(),
        "sentence_bert_config.json": b"{}",
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
        "model.safetensors": bytes(range(256)) * 4000,
    }
    unneeded = (
        "README.md",
        "tokenizer.json",
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/model.onnx",
        "model_state.pdparams",
    )
    hub.repositories[BERT] = {**needed, **dict.fromkeys(unneeded, b"x"), **files}
    return needed


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's address is a port that nobody listens at."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def message_of(name: str, *, weights: bool = True) -> str:
    """The line of a name that can't be used."""
    with pytest.raises(InputError) as error:
        model_folder(name, weights=weights)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# owner/name on the hub


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_a_repository_becomes_a_folder_of_the_files_that_are_needed(hub: Server, revision: str) -> None:
    needed = put_bert(hub)
    folder = model_folder(BERT + revision, weights=True)
    assert contents(folder) == needed
    assert sorted(hub.taken()) == sorted(needed)
    assert folder == Path(constants.HF_HUB_CACHE) / "models--owner--bert" / "snapshots" / COMMIT


def test_the_cache_is_huggingface_hubs(hub: Server) -> None:
    put_bert(hub)
    folder = model_folder(BERT, weights=True)
    assert snapshot_download(BERT, local_files_only=True, cache_dir=constants.HF_HUB_CACHE) == str(folder)
    blob = (folder / "model.safetensors").resolve()
    assert blob.parent == folder.parents[1] / "blobs" and blob.name == hashlib.sha256(blob.read_bytes()).hexdigest()


def test_weights_come_only_when_they_are_needed_and_of_the_same_commit(hub: Server) -> None:
    put_bert(hub)
    assert "model.safetensors" not in contents(model_folder(BERT))
    hub.requests.clear()
    assert "model.safetensors" in contents(model_folder(BERT, weights=True))
    assert hub.requests[0][1] == f"/api/models/{BERT}/revision/{COMMIT}"
    assert hub.taken() == ["model.safetensors"]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (("model.safetensors", "pytorch_model.bin"), {"model.safetensors"}),
        (
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
            {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"},
        ),
        (("pytorch_model.bin", "model_state.pdparams", "training_args.bin"), {"pytorch_model.bin"}),
        (("model_state.pdparams", "tf_model.h5"), {"model_state.pdparams"}),
    ],
)
def test_one_form_of_the_weights_is_taken(hub: Server, listed: tuple[str, ...], expected: set[str]) -> None:
    shards = {f"layer{number}": name for number, name in enumerate(listed) if "-of-" in name}
    files = {name: json.dumps({"weight_map": shards}).encode() for name in listed}
    hub.repositories[BERT] = {"config.json": b"{}", "tokenizer.json": b"{}", **files}
    assert set(contents(model_folder(BERT, weights=True))) == {"config.json", "tokenizer.json", *expected}
    hub.requests.clear()
    assert model_folder(BERT, weights=True) and not hub.requests


@pytest.mark.parametrize("weights", [False, True])
def test_a_filled_cache_asks_nobody(hub: Server, monkeypatch: pytest.MonkeyPatch, weights: bool) -> None:
    put_bert(hub)
    folder = model_folder(BERT, weights=weights)
    hub.requests.clear()
    assert model_folder(BERT, weights=weights) == cached_folder(BERT, weights=weights) == folder
    assert hub.requests == []
    no_network(monkeypatch)
    assert model_folder(BERT, weights=weights) == folder


def test_a_cache_that_others_filled_is_completed_or_used_as_it_is(
    hub: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers doesn't ask for sentence-transformers' files."""
    needed = put_bert(hub)
    folder = model_folder(BERT, weights=True)
    shutil.rmtree(folder.parents[1] / ".no_exist")
    (folder / "modules.json").unlink()
    with monkeypatch.context() as offline:
        no_network(offline)
        assert model_folder(BERT, weights=True) == folder
    assert f"{BERT}: http://127.0.0.1" in (line := capsys.readouterr().err)
    assert "modules.json" in line and "no connection" in line
    hub.requests.clear()
    assert contents(model_folder(BERT, weights=True)) == needed
    assert hub.taken("HEAD") == ["modules.json"]


def test_a_full_cache_of_others_may_be_read_only(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = put_bert(hub)
    folder = model_folder(BERT, weights=True)
    shutil.rmtree(folder.parents[1] / ".no_exist")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("mkdir", "touch", "write_text"):
        monkeypatch.setattr(Path, name, refuse)
    assert contents(model_folder(BERT, weights=True)) == needed


def test_missing_weights_of_a_cache_are_no_reason_to_go_on_without_them(
    hub: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_bert(hub)
    model_folder(BERT)
    no_network(monkeypatch)
    assert "can't be downloaded" in message_of(BERT)


def test_offline_mode_is_named(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    put_bert(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    assert "HF_HUB_OFFLINE is set); unset it" in message_of(BERT)
    assert message_of("ernie-1.0").count("HF_HUB_OFFLINE is set") == 2
    assert hub.requests == []


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong on the way


def test_a_download_goes_on_after_breaks(hub: Server) -> None:
    needed = put_bert(hub)
    hub.breaks["model.safetensors"] = [5 << 16, 5 << 16, 10]
    assert contents(model_folder(BERT, weights=True)) == needed
    ranges = [
        headers.get("range") for kind, path, headers in hub.requests if kind == "GET" and path.endswith("tensors")
    ]
    assert ranges == [None, "bytes=327680-", "bytes=655360-", "bytes=655360-"]


def test_a_later_run_goes_on_where_an_earlier_one_ended(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = put_bert(hub)
    hub.breaks["model.safetensors"] = [5 << 16]
    with monkeypatch.context() as patched:
        patched.setattr(downloads, "ATTEMPTS", 1)
        assert "no connection" in message_of(BERT)
    assert cached_folder(BERT) is None
    blobs = Path(constants.HF_HUB_CACHE) / "models--owner--bert" / "blobs"
    assert [path.stat().st_size for path in blobs.glob("*.incomplete")] == [5 << 16]
    hub.requests.clear()
    assert contents(model_folder(BERT, weights=True)) == needed
    assert ("GET", "bytes=327680-") in [(kind, headers.get("range")) for kind, _, headers in hub.requests]
    assert list(blobs.glob("*.incomplete")) == []


def test_an_interruption_leaves_no_half_file(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = put_bert(hub)
    hub.breaks["model.safetensors"] = [5 << 16]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model_folder(BERT, weights=True)
    assert cached_folder(BERT) is None
    assert contents(model_folder(BERT, weights=True)) == needed


def test_a_damaged_part_is_downloaded_again(hub: Server) -> None:
    needed = put_bert(hub)
    blob = Path(
        constants.HF_HUB_CACHE, "models--owner--bert", "blobs", hashlib.sha256(needed["model.safetensors"]).hexdigest()
    )
    blob.parent.mkdir(parents=True)
    Path(f"{blob}.incomplete").write_bytes(b"damaged")
    assert contents(model_folder(BERT, weights=True)) == needed


@pytest.mark.parametrize("file", ["model.safetensors", "vocab.txt"])
def test_a_wrong_checksum_is_named(hub: Server, file: str) -> None:
    put_bert(hub)
    hub.corrupt.add(file)
    assert "another checksum than promised" in message_of(BERT)
    assert cached_folder(BERT) is None
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_files_may_be_on_another_server(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones are in a storage of their own, and mirrors redirect others. The token isn't for those servers."""
    storage = start_server()
    needed = put_bert(hub)
    content = needed["model.safetensors"]
    storage.files = {f"/{hashlib.sha256(content).hexdigest()}": content, "/vocab.txt": needed["vocab.txt"]}
    hub.storage = storage.url
    hub.status["/vocab.txt"] = (307, {"Location": f"{storage.url}/vocab.txt"})
    hub.status[f"{COMMIT}/config.json"] = (307, {"Location": "/renamed/config.json"})
    hub.files["/renamed/config.json"] = needed["config.json"]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    try:
        assert contents(model_folder(BERT, weights=True)) == needed
    finally:
        storage.shutdown()
        storage.server_close()
    assert {headers.get("authorization") for _, _, headers in hub.requests} == {"Bearer hf_secret"}
    # Another port is another server.
    assert {(kind, headers.get("authorization")) for kind, _, headers in storage.requests} == {
        ("HEAD", None),
        ("GET", None),
    }


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (
            401,
            {"X-Error-Code": "RepoNotFound"},
            "status 401); check the name; if the repository is private, set HF_TOKEN",
        ),
        (403, {"X-Error-Code": "GatedRepo"}, "status 403); it is gated: accept its conditions on that page"),
        (403, {}, "status 403); set HF_TOKEN"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "status 404); check the revision"),
        (500, {}, "status 500); set HF_ENDPOINT to a mirror"),
    ],
)
@pytest.mark.parametrize("end", [f"/api/models/{BERT}/revision/main", f"{COMMIT}/model.safetensors"])
def test_what_the_hub_refuses_is_named(
    hub: Server, end: str, status: int, headers: dict[str, str], expected: str
) -> None:
    put_bert(hub)
    hub.status[end] = (status, headers)
    message = message_of(BERT)
    assert message.startswith(f"{BERT}: is no folder here, and can't be downloaded ({hub.url}/{BERT}: ")
    assert expected in message


def test_a_file_that_is_listed_but_missing_is_named(hub: Server) -> None:
    put_bert(hub)
    hub.status["/vocab.txt"] = (404, {"X-Error-Code": "EntryNotFound"})
    assert "vocab.txt: status 404" in message_of(BERT)


def test_an_answer_of_something_else_is_named(hub: Server) -> None:
    """Such as the log-in page of a network."""
    put_bert(hub)
    hub.status["/vocab.txt"] = (200, {"Content-Type": "text/html; charset=utf-8"})
    assert "vocab.txt: a web page is answered instead of the file" in message_of(BERT)
    hub.status["/revision/main"] = (200, {})
    assert "it doesn't answer as a hub does" in message_of(BERT)
    del hub.status["/vocab.txt"]
    hub.status["/revision/main"] = (200, {"X-Garbled": "yes"})
    assert "it doesn't answer as a hub does" in message_of(BERT)


def test_a_misspelt_repository_and_revision_are_named(hub: Server) -> None:
    put_bert(hub)
    assert "check the name; if the repository is private" in message_of("owner/brt")
    assert "check the revision after the @" in message_of(f"{BERT}@v2")


@pytest.mark.parametrize(
    "name",
    [
        "./owner/bert",
        "/owner/bert",
        "a/b/c",
        "模型/中文",
        "a--b/c",
        "-a/b",
        "a/" + "b" * 99,
        "owner/../bert",
        "owner/",
        "ernie@v1",
        "~/x",
    ],
)
def test_what_is_no_name_is_no_folder(hub: Server, name: str) -> None:
    assert message_of(name).startswith(f"{name}: is no folder here, and no owner/name")
    assert hub.requests == []


def test_no_network_and_the_proxy_are_named(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    assert f"({constants.ENDPOINT}/{BERT}: no connection); set HF_ENDPOINT to a mirror" in message_of(BERT)
    monkeypatch.setenv("http_proxy", constants.ENDPOINT)
    monkeypatch.setenv("no_proxy", "")
    assert f"{BERT}: no connection through the proxy of http_proxy)" in message_of(BERT)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert f"{BERT}: no connection);" in message_of(BERT)


def test_a_mistyped_mirror_and_a_socks_proxy_are_named(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(constants, "ENDPOINT", "hf-mirror.com")
        assert "hf-mirror.com/owner/bert: isn't an address such as https://hf-mirror.com" in message_of(BERT)
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", without_pysocks)
    assert "the SOCKS proxy of all_proxy needs a package: pip install pysocks" in message_of(BERT)


def without_pysocks(*_: object, **__: object) -> None:
    """What requests has in place of the class where pysocks isn't installed."""
    raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")


def test_a_server_that_never_answers_is_given_up(hub: Server) -> None:
    put_bert(hub)
    hub.silent.add("/revision/main")
    assert f"{BERT}: timeout); set HF_ENDPOINT" in message_of(BERT)
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("adapter_config.json", "is a LoRA adapter without the model itself"),
        ("bert-q4.gguf", "has weights in the GGUF form only"),
        ("tf_model.h5", "has weights of TensorFlow or Flax only"),
        ("onnx/model.onnx", "has an ONNX model only"),
        ("README.md", "has no weights; need model.safetensors"),
    ],
)
def test_a_repository_without_usable_weights_is_named(hub: Server, file: str, expected: str) -> None:
    hub.repositories[BERT] = {"config.json": b"{}", file: b"x"}
    assert f"{hub.url}/{BERT} {expected}" in message_of(BERT)
    assert hub.taken("HEAD") == []


def test_a_repository_without_a_config_is_named(hub: Server) -> None:
    hub.repositories[BERT] = {"model.safetensors": b"x"}
    assert "has no config.json; need a BERT or ERNIE encoder" in message_of(BERT)


def test_a_full_or_read_only_disk_is_named(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_bert(hub)
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)._replace(free=900_000)
        patched.setattr(shutil, "disk_usage", lambda _: usage)
        assert "the disk has 1 MB left, and the download needs 1 MB; free some, or set HF_HOME" in message_of(BERT)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "set HF_HOME to a folder that can be written" in message_of(BERT)


def test_progress_is_shown_in_lines(
    hub: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.logs.SECONDS_BETWEEN_LINES", 0.0)
    put_bert(hub)
    model_folder(BERT, weights=True)
    assert f"download {BERT}: 100%" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# PaddleNLP's names


def test_a_name_of_paddlenlp_is_downloaded_and_read_safely(ernie: Server, named_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = create_model(SemanticIndexBase)
    expected, expected_tokenizer = create_model(SemanticIndexBase, model_name_or_path=str(named_folder))
    for name, value in expected.ptm.state_dict().items():
        np.testing.assert_array_equal(model.ptm.state_dict()[name].numpy(), value.numpy())
    assert tokenizer.settings == expected_tokenizer.settings
    folder = tmp_path / "ppnlp/models/ernie-1.0"
    assert {path.name for path in folder.glob("[!.]*")} == {
        "config.json",
        "model_state.pdparams",
        "tokenizer_config.json",
        "vocab.txt",
    }
    ernie.requests.clear()
    create_model(SemanticIndexBase)
    assert ernie.requests == []
    (folder / "model_state.pdparams").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(InputError, match=r"os\.system|posix\.system"):
        create_model(SemanticIndexBase)


def test_the_config_of_a_name_is_paddlenlps(hub: Server, tmp_path: Path) -> None:
    """The folder's fingerprint is that of earlier versions, which let PaddleNLP make the config."""
    from paddlenlp.transformers import AutoConfig

    folder = tmp_path / "ppnlp/models/ernie-3.0-medium-zh"
    folder.mkdir(parents=True)
    (folder / "ernie_3.0_medium_zh_vocab.txt").write_bytes(b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    config = find_backbone("ernie-3.0-medium-zh").config
    expected = AutoConfig.from_pretrained("ernie-3.0-medium-zh")
    assert config.hidden_size == 768
    ignored = {"architectures": None, "_name_or_path": None}
    assert {**config.to_dict(), **ignored} == {**expected.to_dict(), **ignored}
    assert hub.requests == []
    assert load_tokenizer("ernie-3.0-medium-zh", 8).settings["config"]["do_lower_case"] is True


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_cache_of_earlier_versions_is_used(
    ernie: Server, named_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_writable: bool
) -> None:
    """They had no config.json, and the vocabulary's name was that of its address."""
    folder = tmp_path / "ppnlp/models/ernie-1.0"
    folder.mkdir(parents=True)
    shutil.copy(named_folder / "vocab.txt", folder / "ernie_vocab.txt")
    shutil.copy(named_folder / "model_state.pdparams", folder)
    if not is_writable:
        monkeypatch.setattr("modeling.hub.can_be_written", lambda _: False)
    files = contents(folder)
    assert pretrained_weights(find_backbone("ernie-1.0")).read_bytes() == files["model_state.pdparams"]
    assert load_tokenizer("ernie-1.0", 8).vocabulary_size == read_json(named_folder / "config.json")["vocab_size"]
    assert ernie.requests == []
    assert (contents(folder) == files) == (not is_writable)


def test_the_hubs_copy_takes_the_place_of_a_dead_address(
    ernie: Server, named_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ernie.files.clear()
    ernie.repositories[COPY] = contents(named_folder)
    folder = model_folder("ernie-1.0", weights=True)
    assert folder == tmp_path / "ppnlp/models/ernie-1.0"
    assert (folder / "model_state.pdparams").read_bytes() == (named_folder / "model_state.pdparams").read_bytes()
    line = f"ernie-1.0: PaddleNLP's address can't be used ({ernie.url}: vocab.txt: status 404); took {ernie.url}/{COPY}"
    assert line in capsys.readouterr().err


def test_where_nothing_works_every_address_is_named(ernie: Server, tmp_path: Path) -> None:
    ernie.silent.add("/bos/ernie_vocab.txt")
    message = message_of("ernie-1.0")
    assert f"{ernie.url}: vocab.txt: timeout; {ernie.url}/{COPY}: vocab.txt: status 404" in message
    by_hand = f"put vocab.txt and model_state.pdparams into {tmp_path}/ppnlp/models/ernie-1.0 by hand"
    assert f"set HF_ENDPOINT to a mirror of the hub, {by_hand}, or give a local folder" in message
    assert len(ernie.requests) == 2


def test_a_download_from_paddlenlps_address_goes_on_and_is_checked(ernie: Server, named_folder: Path) -> None:
    ernie.breaks["ernie.pdparams"] = [1000]
    folder = model_folder("ernie-1.0", weights=True)
    assert (folder / "model_state.pdparams").read_bytes() == (named_folder / "model_state.pdparams").read_bytes()
    shutil.rmtree(folder)
    ernie.corrupt.add("ernie.pdparams")
    ernie.files["/bos/ernie_vocab.txt"] += b"x"
    assert "model_state.pdparams arrives with another checksum" in message_of("ernie-1.0")


def test_the_token_of_the_hub_stays_on_the_hub(ernie: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    model_folder("ernie-1.0", weights=True)
    assert ernie.requests and not any("authorization" in headers for _, _, headers in ernie.requests)


def test_an_unknown_name_is_one_line(hub: Server) -> None:
    message = (
        "{}: is no folder here, and PaddleNLP has no model of that name, nor the Hugging Face hub, whose names are"
    )
    assert message_of("no-such-model").startswith(message.format("no-such-model"))
    assert message_of("ernie-3.0-bas-zh").endswith("owner/name; did you mean ernie-3.0-base-zh?")
    assert hub.requests == []


def test_a_tokenizer_without_a_word_piece_vocabulary_is_refused(hub: Server) -> None:
    assert message_of("albert-base-v1").startswith("albert-base-v1: its tokenizer has no vocab.txt; need a WordPiece")


def test_a_cache_that_cannot_be_written_is_named(ernie: Server, tmp_path: Path) -> None:
    (tmp_path / "ppnlp").mkdir()
    (tmp_path / "ppnlp/models").touch()
    assert "set PPNLP_HOME to a folder that can be written" in message_of("ernie-1.0")


def test_every_copy_has_a_name_of_paddlenlp(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    for name, copy in HUB_COPIES.items():
        assert f"https://bj.bcebos.com: vocab.txt: HF_HUB_OFFLINE is set; {hub.url}/{copy}: " in message_of(name)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def options_of(name: str, recall_data: Path, save_dir: Path) -> list[str]:
    return [
        *("--model_name_or_path", name, "--train_set_file", str(recall_data / "train.csv")),
        *("--save_dir", str(save_dir), "--max_seq_length", "24", "--batch_size", "16", "--output_emb_size", "16"),
        *("--max_steps", "2"),
    ]


@pytest.mark.parametrize("name", ["ernie-1.0", "owner/ernie"])
def test_training_from_a_name_is_training_from_its_folder(
    ernie: Server, named_folder: Path, recall_data: Path, tmp_path: Path, name: str
) -> None:
    ernie.repositories["owner/ernie"] = contents(named_folder)
    for start, save_dir in ((name, "named"), (str(named_folder), "given")):
        assert train_batch_neg.main(options_of(start, recall_data, tmp_path / save_dir)) == 0
    named, given = tmp_path / "named/model_2", tmp_path / "given/model_2"
    assert_same_weights(named, given)
    for file in ("config.json", "semantic_index.json", "tokenizer_config.json", "vocab.txt"):
        assert (named / file).read_bytes() == (given / file).read_bytes()
    run = read_json(named / "training_state.json")["run_config"]
    assert run["model_name_or_path"] == name
    shutil.rmtree(tmp_path / "ppnlp", ignore_errors=True)
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    ernie.requests.clear()
    resumed = [*options_of(name, recall_data, tmp_path / "named"), "--resume_from"]
    assert train_batch_neg.main([*resumed, "latest"]) == 0
    assert train_batch_neg.main([*resumed, str(named)]) == 0
    assert ernie.requests == []


def test_a_checkpoint_on_the_hub_gives_its_settings(
    ernie: Server, checkpoint: Path, recall_data: Path, tmp_path: Path
) -> None:
    files = contents(checkpoint)
    ernie.repositories["owner/ours"] = {file: files[file] for file in files if not file.startswith("training_")}
    options = options_of("owner/ours", recall_data, tmp_path / "named")
    del options[options.index("--output_emb_size") : options.index("--output_emb_size") + 2]
    assert train_batch_neg.main(options) == 0
    settings = read_json(tmp_path / "named/model_2/semantic_index.json")
    assert (settings["pooling"], settings["output_emb_size"]) == ("mean", 16)
    assert read_json(tmp_path / "named/model_2/training_state.json")["run_config"]["pooling"] == "mean"
    shutil.rmtree(constants.HF_HUB_CACHE)
    model, _ = create_model(SemanticIndexBase, model_name_or_path="owner/ours")
    assert (model.config.pooling, model.config.output_emb_size) == ("mean", 16)


@pytest.mark.process
def test_the_hubs_variables_are_followed_and_one_rank_downloads(
    hub: Server, named_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["owner/ernie"] = contents(named_folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    options = options_of("owner/ernie", recall_data, tmp_path / "named")
    done = run_script(ROOT / "train_batch_neg.py", *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "hf/hub/models--owner--ernie/snapshots" / COMMIT / "model_state.pdparams").is_file()
    assert sorted(hub.taken()) == ["config.json", "model_state.pdparams", "vocab.txt"]
    shutil.rmtree(tmp_path / "hf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    done = run_script(ROOT / "train_batch_neg.py", *options_of("owner/ernie", recall_data, tmp_path / "other"))
    assert (done.returncode, hub.requests) == (2, [])
    assert done.stderr.count("\n") == 1 and "HF_HUB_OFFLINE is set); unset it" in done.stderr
