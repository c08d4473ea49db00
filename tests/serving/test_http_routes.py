"""What the paths of the HTTP port answer, to good requests and to bad ones."""

import base64
import contextlib
import gzip
import http.client
import itertools
import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest

from benchmarks.service_clients import HOST, read_metrics
from common.texts import DOCUMENT, QUERY
from helpers import file_size_limit
from retrieval.saved_index import load_index
from service_helpers import (
    DOCUMENTS,
    LIMITS,
    MODEL,
    SECRET,
    as_json,
    at,
    get,
    post,
    running_search_gateway,
    text_vectors,
    until,
    write_index,
)
from serving import http_gateway
from serving.http_gateway import HttpGateway
from serving.http_routes import PREDICTION_PATH
from serving.search import SearchIndex

SEARCH, EMBEDDINGS = "/search", "/v1/embeddings"
KEYS = ("first-key", "second-key")
KEY = {"Authorization": "Bearer second-key"}
ORIGIN = "https://page.example"


def expected_hits(query: str, top_k: int) -> list[dict[str, Any]]:
    """By a slow and obvious search."""
    scores = text_vectors(DOCUMENTS) @ text_vectors(["问:" + query])[0]
    rows = np.argsort(-scores)[:top_k]
    return [
        {"id": row, "score": pytest.approx(scores[row], abs=2e-6), "document": DOCUMENTS[row], "found_by": "vector"}
        for row in rows
    ]


def send(gateway: HttpGateway, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    """The answer to a request without a body, which is read already."""
    connection = http.client.HTTPConnection(HOST, gateway.server_port, timeout=30)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer


# ---------------------------------------------------------------------------------------------------------------------
# /search


@pytest.mark.parametrize(
    ("fields", "queries", "top_k"),
    [
        ({"query": "文7"}, ["文7"], 10),
        ({"query": ["文7"], "top_k": 1}, ["文7"], 1),
        ({"query": ["文1", "水稻", "文1"], "top_k": 20}, ["文1", "水稻", "文1"], 20),
        ({"query": "水稻", "top_k": 3.0}, ["水稻"], 3),
    ],
)
def test_search_finds_the_most_similar_documents(
    search_gateway: HttpGateway, fields: dict[str, Any], queries: list[str], top_k: int
) -> None:
    """A list of results in the order of the queries, also for one query; the queries get their prefix."""
    status, content = post(at(search_gateway), as_json(**fields), SEARCH)
    index = search_gateway.service.index
    assert status == 200
    assert content["index"] == index.state._asdict()
    assert content["results"] == [{"hits": expected_hits(query, top_k)} for query in queries]


@pytest.mark.parametrize(("mode", "way"), [("lexical", "lexical"), ("hybrid", "hybrid"), (None, "hybrid")])
def test_hits_say_which_way_found_them(tmp_path: Path, mode: str | None, way: str) -> None:
    """A document that is the query is found by both ways; the address takes a mode, too."""
    write_index(tmp_path / "index", DOCUMENTS, has_words=True)
    with running_search_gateway(SearchIndex(tmp_path / "index", MODEL, "fp32")) as gateway:
        fields = {"mode": mode} if mode else {}
        status, content = post(at(gateway), as_json(query=DOCUMENTS[3], top_k=3, **fields), SEARCH)
        assert (status, content["mode"]) == (200, mode or "hybrid")
        assert (DOCUMENTS[3], way) in [(hit["document"], hit["found_by"]) for hit in content["results"][0]["hits"]]
        parameters = urlencode({"q": DOCUMENTS[3], "top_k": 3, **fields})
        assert json.loads(get(at(gateway), f"{SEARCH}?{parameters}")[1]) == content


@pytest.mark.parametrize("query", ["文7", "a b+c&d=e", "水稻 100%"])
def test_search_with_get(search_gateway: HttpGateway, query: str) -> None:
    """Also if the client doesn't encode what isn't ASCII."""
    status, body = get(at(search_gateway), f"{SEARCH}?top_k=2&q={quote(query)}")
    assert (status, json.loads(body)["results"]) == (200, [{"hits": expected_hits(query, 2)}])
    answer = send(search_gateway, "HEAD", f"{SEARCH}?q=a")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")


def test_a_service_without_an_index_says_so(gateway: HttpGateway) -> None:
    for path, body in ((SEARCH, as_json(query="a")), ("/reload", b"")):
        status, content = post(at(gateway), body, path)
        assert status == 404 and "start web_service.py with --index_dir" in content["error"]["message"]


def test_reload_takes_a_new_index_into_service(
    search_gateway: HttpGateway, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it is broken, the one before stays, and /health and the log say so."""
    service, version = at(search_gateway), search_gateway.service.index.state.version
    write_index(tmp_path / "index", ["水稻", "小麦"])
    status, content = post(service, b"", "/reload")
    assert (status, content["index"]["documents"]) == (200, 2) and content["index"]["version"] != version
    assert json.loads(get(service, "/health")[1]) == {"status": "ok", "index": content["index"]}
    assert read_metrics(service)["semantic_index_index_documents"] == 2

    (tmp_path / "index" / "manifest.json").write_text("{}")
    status, failed = post(service, b"", "/reload")
    problem = failed["error"]["message"]
    assert (status, failed["error"]["type"]) == (500, "server_error") and "stays in service" in problem
    health = get(service, "/health")
    assert health[0] == 200
    assert json.loads(health[1]) == {"status": "ok", "index": {**content["index"], "problem": problem}}
    assert len(post(service, as_json(query="水稻"), SEARCH)[1]["results"][0]["hits"]) == 2
    assert str(tmp_path) in capsys.readouterr().err and str(tmp_path) not in problem


# ---------------------------------------------------------------------------------------------------------------------
# /v1


def test_vectors_in_openais_form(search_gateway: HttpGateway) -> None:
    texts = ["水稻", "文7"]
    for fields in ({}, {"encoding_format": "float", "model": "ernie", "dimensions": 8, "user": "me"}):
        status, content = post(at(search_gateway), as_json(input=texts, **fields), EMBEDDINGS)
        assert status == 200 and content["object"] == "list" and content["model"] == "ernie"
        assert [(data["object"], data["index"]) for data in content["data"]] == [("embedding", 0), ("embedding", 1)]
        np.testing.assert_array_equal(
            np.array([data["embedding"] for data in content["data"]], np.float32), text_vectors(texts)
        )
    status, content = post(at(search_gateway), as_json(input="水稻", encoding_format="base64"), EMBEDDINGS)
    vector = np.frombuffer(base64.b64decode(content["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(vector, text_vectors(["水稻"])[0])


@pytest.mark.parametrize(("role", "prefix"), [({}, ""), ({"input_type": QUERY}, "问:"), ({"input_type": DOCUMENT}, "")])
def test_input_type_is_the_role(search_gateway: HttpGateway, role: dict[str, str], prefix: str) -> None:
    """Usage counts the tokens that the model sees, with the prefix, [CLS] and [SEP], and without those that are cut."""
    _, content = post(at(search_gateway), as_json(input=["水稻", "水" * 30], **role), EMBEDDINGS)
    expected = text_vectors([prefix + "水稻", prefix + "水" * 30])
    np.testing.assert_allclose([data["embedding"] for data in content["data"]], expected, atol=1e-7)
    tokens = len(prefix) + 4 + 24
    assert content["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_models_names_the_one_model(search_gateway: HttpGateway) -> None:
    (model,) = json.loads(get(at(search_gateway), "/v1/models")[1])["data"]
    assert (model["id"], model["object"]) == ("ernie", "model") and model["created"] > 1_700_000_000


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

BODIES = [  # for every path that takes a body
    (b"", 400, "the body is empty: send JSON such as"),
    (b"{", 400, "isn't JSON at character 1"),
    (b"[" * 100_000 + b"]" * 100_000, 413, "at most 10000 bytes"),
    (b"[" * 4_000 + b"]" * 4_000, 400, "nested too deeply"),
    (b'{"query": NaN}', 400, "isn't JSON"),
    (b'"text"', 400, "isn't an object such as"),
    (b'{"query": "\xff"}', 400, "isn't UTF-8"),
    (as_json(query="a", input="a", text="a"), 400, "unknown fields: a request has "),
    (as_json(**{SECRET: 1}), 400, "unknown fields: a request has "),
    (b" " * 10_000_000, 413, "at most 10000 bytes"),
]
TEXTS = [  # values of the field with the texts
    ([], "no texts: send at least one"),
    ("", "text 0 is empty"),
    (["水稻", " \n"], "text 1 is empty"),
    ("\u200b", "text 0 holds only invisible characters"),
    ("水" * (LIMITS.characters + 1), "characters: send at most 100"),
    (["水"] * 500, f"500 texts: send at most {LIMITS.texts}"),
    (None, "must be a string or a list of strings"),
    (1, "must be a string or a list of strings"),
    ([1, 2], "must be a string or a list of strings"),
    ([["水稻"]], "must be a string or a list of strings"),
    ({"text": "水稻"}, "must be a string or a list of strings"),
    ("\ud800", "holds half of a surrogate pair"),
]
OPTIONS = [
    *[(SEARCH, "top_k", value, 400) for value in (0, -1, 21, 10**9, 1.5, "ten", "5", True, None, [5])],
    *[(EMBEDDINGS, "dimensions", value, 400) for value in (0, 7, 9, "8", True)],
    *[(EMBEDDINGS, "encoding_format", value, 400) for value in ("int8", 1, None, [])],
    *[(EMBEDDINGS, "input_type", value, 400) for value in ("passage", None)],
    (EMBEDDINGS, "model", "gpt-4", 404),
    (EMBEDDINGS, "model", None, 400),
    (EMBEDDINGS, "user", 7, 400),
]


def refused(gateway: HttpGateway, body: bytes, path: str, status: int) -> dict[str, Any]:
    """The error in the answer, which holds nothing of the request."""
    got, content = post(at(gateway), body, path)
    assert got == status, content
    error = content["error"]
    assert list(content) == ["error"] and list(error) == ["message", "type", "param", "code"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert "水" not in error["message"] and SECRET not in error["message"]
    return error


@pytest.fixture
def answers(search_gateway: HttpGateway, capsys: pytest.CaptureFixture[str]) -> Any:
    """After the test, the next request works, and nothing was logged."""
    yield
    assert post(at(search_gateway), as_json(query="文7", top_k=1), SEARCH)[0] == 200
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("path", [SEARCH, EMBEDDINGS])
@pytest.mark.parametrize(("body", "status", "message"), BODIES, ids=lambda value: str(value)[:20])
def test_bad_bodies(search_gateway: HttpGateway, path: str, body: bytes, status: int, message: str) -> None:
    assert message in refused(search_gateway, body, path, status)["message"]


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(("path", "field"), [(SEARCH, "query"), (EMBEDDINGS, "input")])
@pytest.mark.parametrize(("value", "message"), TEXTS, ids=lambda value: str(value)[:20])
def test_bad_texts(search_gateway: HttpGateway, path: str, field: str, value: Any, message: str) -> None:
    error = refused(search_gateway, as_json(**{field: value}), path, 400)
    assert message in error["message"] and error["param"] == field


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(("path", "field", "value", "status"), OPTIONS, ids=lambda value: str(value)[:20])
def test_bad_options(search_gateway: HttpGateway, path: str, field: str, value: Any, status: int) -> None:
    error = refused(
        search_gateway, as_json(**{"query" if path == SEARCH else "input": "水稻", field: value}), path, status
    )
    assert field in error["message"] or error["param"] == field
    assert (error["code"] == "model_not_found") == (status == 404)


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "q must be a string"),
        ("q=", "text 0 is empty"),
        ("q=a&q=b", "a parameter twice"),
        ("q=%ff", "isn't UTF-8"),
        ("q=a&k=1", "unknown fields: a request has q, top_k"),
        ("q=a&" + "&".join(f"x{number}=1" for number in range(30)), "too many parameters"),
        ("q=" + "a" * 101, "characters: send at most 100"),
        *[
            (f"q=a&top_k={value}", "top_k must be")
            for value in ("0", "-1", "21", "ten", "", "1e1", "%D9%A3", "9" * 5000)
        ],
    ],
)
def test_bad_queries(search_gateway: HttpGateway, query: str, message: str) -> None:
    status, body = get(at(search_gateway), f"{SEARCH}?{query}")
    assert status == 400 and message in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [(SEARCH, "GET, HEAD, POST"), (EMBEDDINGS, "POST"), ("/v1/models", "GET, HEAD"), ("/reload", "POST")],
)
def test_wrong_methods(search_gateway: HttpGateway, path: str, methods: str) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"} - set(methods.split(", ")):
        answer = send(search_gateway, method, path)
        assert (answer.status, answer.headers["Allow"]) == (405, methods)


# ---------------------------------------------------------------------------------------------------------------------
# Keys and CORS


def described_paths(gateway: HttpGateway) -> list[tuple[str, str]]:
    """Method and path of all that /openapi.json describes."""
    connection = http.client.HTTPConnection(HOST, gateway.server_port, timeout=30)
    connection.request("GET", "/openapi.json", headers=KEY)
    paths = json.loads(connection.getresponse().read())["paths"]
    connection.close()
    return [(method.upper(), path) for path, operations in paths.items() for method in operations]


def test_the_description_names_every_route(search_gateway: HttpGateway) -> None:
    routes = search_gateway.routes.items()
    assert sorted(described_paths(search_gateway)) == sorted(
        (method, path) for path, route in routes for method in route.methods
    )


@pytest.mark.parametrize("search_gateway", [(KEYS, "")], indirect=True)
@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer ", "second-key", "Basic second-key"])
def test_every_route_but_health_needs_a_key(search_gateway: HttpGateway, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    paths = described_paths(search_gateway)
    assert len(paths) >= 9
    for method, path in paths:
        answer = send(search_gateway, method, path, **headers)
        if path == "/health":
            assert answer.status == 200
        else:
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), path


@pytest.mark.parametrize("search_gateway", [(KEYS, "")], indirect=True)
def test_any_of_the_keys_opens_every_route(search_gateway: HttpGateway) -> None:
    for key in KEYS:
        for method, path in described_paths(search_gateway):
            assert send(search_gateway, method, path, Authorization=f"Bearer {key}").status in (200, 400), path
    assert post(at(search_gateway), as_json(query="a"), SEARCH, KEY)[0] == 200
    status, content = post(at(search_gateway), as_json(input="a"), EMBEDDINGS)
    assert (status, content["error"]["code"]) == (401, "invalid_api_key")
    assert post(at(search_gateway), as_json(key=["0"], value=["a"]), PREDICTION_PATH)[1]["err_msg"].startswith(
        "no valid key"
    )


@pytest.mark.parametrize("search_gateway", [(KEYS, "")], indirect=True)
def test_a_body_without_a_key_is_not_kept(search_gateway: HttpGateway) -> None:
    """Nor counted as a request in progress."""
    with socket.create_connection((HOST, search_gateway.server_port), timeout=30) as connection:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n" + b" " * 99)
        assert send(search_gateway, "GET", "/health").status == 200
        assert not search_gateway.taken


@pytest.mark.parametrize(
    ("search_gateway", "origin", "allowed"),
    [
        (((), ""), ORIGIN, None),
        (((), ORIGIN), ORIGIN, ORIGIN),
        (((), ORIGIN), "https://other.example", None),
        (((), ORIGIN), "null", None),
        (((), "*"), "https://other.example", "*"),
        ((KEYS, ORIGIN), ORIGIN, ORIGIN),
    ],
    indirect=["search_gateway"],
)
def test_pages_of_an_allowed_origin_may_call(search_gateway: HttpGateway, origin: str, allowed: str | None) -> None:
    """A browser asks first, without a key; by default no page of another origin may."""
    asked = send(search_gateway, "OPTIONS", SEARCH, Origin=origin, Access_Control_Request_Method="POST")
    assert asked.headers["Access-Control-Allow-Origin"] == allowed
    if allowed:
        assert asked.status == 204
        assert "POST" in asked.headers["Access-Control-Allow-Methods"]
        assert asked.headers["Access-Control-Allow-Headers"] == "Authorization, Content-Type"
    answer = send(search_gateway, "GET", f"{SEARCH}?q=a", Origin=origin, **KEY)
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, allowed)
    assert (answer.headers["Vary"] == "Origin") == bool(search_gateway.cors)


@pytest.fixture
def writable_gateway(tmp_path: Path) -> Iterator[HttpGateway]:
    write_index(tmp_path / "index", DOCUMENTS)
    index = SearchIndex(tmp_path / "index", MODEL, "fp32", writable=True)
    with running_search_gateway(index, KEYS) as gateway:
        yield gateway


def change(gateway: HttpGateway, method: str, **fields: object) -> tuple[int, dict[str, Any]]:
    return request(gateway, method, "/documents", as_json(**fields))


def request(gateway: HttpGateway, method: str, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(HOST, gateway.server_port, timeout=30)
    connection.request(method, path, body, {**KEY, **headers})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def test_documents_are_added_and_deleted(writable_gateway: HttpGateway) -> None:
    """The answer has the version after the change, and the next search finds what was added, as a line holds it."""
    status, content = change(writable_gateway, "POST", documents=[" 新一\r", DOCUMENTS[3]])
    assert writable_gateway.service._encoders[0].batches == [["新一", DOCUMENTS[3]]]
    assert (status, content["documents"]) == (200, [{"id": 50, "is_new": True}, {"id": 3, "is_new": False}])
    found = post(at(writable_gateway), as_json(query="新一", top_k=20), SEARCH, KEY)[1]
    assert found["index"] == content["index"] and found["index"]["documents"] == 51
    assert change(writable_gateway, "DELETE", ids=[50], documents=[DOCUMENTS[3], "没有"])[1]["deleted"] == 2
    status, content = change(writable_gateway, "DELETE", ids=[50])
    assert (status, content["deleted"], content["index"]["documents"]) == (200, 0, 49)


@pytest.mark.parametrize(
    ("method", "fields", "param", "message"),
    [
        ("POST", {}, "documents", "must be a string or a list of strings"),
        ("POST", {"documents": []}, "documents", "no texts"),
        ("POST", {"documents": ["a"] * 5}, "documents", "send at most 4"),
        ("POST", {"documents": ["a", "b\nc"]}, "documents", "document 1 (counted from 0): has more than one line"),
        ("POST", {"documents": "a\tb"}, "documents", "2 columns, where a line holds one text: send it as one line"),
        ("POST", {"documents": "\u200b"}, "documents", "only invisible characters"),
        ("POST", {"documents": "a\0b"}, "documents", "holds a NUL character"),
        ("POST", {"documents": ["a"], "ids": [1]}, None, "unknown fields"),
        ("DELETE", {}, "documents", "no texts"),
        ("DELETE", {"ids": "1"}, "ids", "must be a list of ids"),
        ("DELETE", {"ids": [True]}, "ids", "must be a list of ids"),
        ("DELETE", {"ids": [-1]}, "ids", "must be a list of ids"),
        ("DELETE", {"ids": [1.5]}, "ids", "must be a list of ids"),
        ("DELETE", {"ids": [2**63]}, "ids", "must be a list of ids"),
        ("DELETE", {"ids": [1] * 5}, "ids", "5 ids: send at most 4"),
    ],
)
def test_changes_that_are_refused(
    writable_gateway: HttpGateway, method: str, fields: dict[str, object], param: str | None, message: str
) -> None:
    """Before a text is encoded."""
    status, content = change(writable_gateway, method, **fields)
    assert (status, content["error"]["param"]) == (400, param)
    assert writable_gateway.service._encoders[0].batches == []
    assert message in content["error"]["message"]
    assert json.loads(get(at(writable_gateway), "/health")[1])["index"]["documents"] == 50


@pytest.mark.parametrize("search_gateway", [(KEYS, "")], indirect=True)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_read_only_service_says_so(search_gateway: HttpGateway, method: str) -> None:
    status, content = change(search_gateway, method, documents=["a"])
    assert (status, content["error"]["message"].partition(":")[0]) == (403, "the service is read-only")


# ---------------------------------------------------------------------------------------------------------------------
# Faults: large texts, slow and vanishing clients, a full disk

CHANGING_OR_SEARCHING = [("POST", SEARCH, "query"), ("POST", "/documents", "documents")]


def document_count(gateway: HttpGateway) -> int:
    """Of the index in service."""
    return json.loads(get(at(gateway), "/health")[1])["index"]["documents"]


def works(gateway: HttpGateway) -> bool:
    """Whether nothing is in progress, and a search is answered."""
    until(lambda: not gateway.taken)
    return post(at(gateway), as_json(query=DOCUMENTS[7], top_k=1), SEARCH, KEY)[0] == 200


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize(
    ("method", "path", "field"),
    [
        *CHANGING_OR_SEARCHING,
        ("GET", SEARCH, "query"),
        ("DELETE", "/documents", "documents"),
        ("POST", EMBEDDINGS, "input"),
        ("POST", "/reload", "text"),
    ],
)
def test_a_text_of_10_mb(writable_gateway: HttpGateway, method: str, path: str, field: str, encoding: str) -> None:
    body = as_json(**{field: "a" * 10_000_000})
    sent = gzip.compress(body) if encoding == "gzip" else body
    status, content = request(writable_gateway, method, path, sent, **{"Content-Encoding": encoding})
    assert (status, content["error"]["message"]) == (413, f"send at most {LIMITS.bytes} bytes")
    assert writable_gateway.service._encoders[0].batches == [] and document_count(writable_gateway) == 50
    assert works(writable_gateway)


def test_an_address_of_10_mb(search_gateway: HttpGateway) -> None:
    """It isn't read as a whole, so the connection ends."""
    with socket.create_connection((HOST, search_gateway.server_port), timeout=30) as connection:
        with contextlib.suppress(OSError):  # it ends while this sends
            connection.sendall(b"GET /search?q=" + b"a" * 10_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: search_gateway.server.open == 0)
    assert works(search_gateway)


def send_part(gateway: HttpGateway, method: str, path: str, field: str, part: float) -> socket.socket:
    """A connection on which this part of a request with one text has been sent."""
    body = as_json(**{field: "新一"})
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nAuthorization: {KEY['Authorization']}\r\nContent-Length: {len(body)}"
    )
    connection = socket.create_connection((HOST, gateway.server_port), timeout=30)
    connection.sendall(f"{head}\r\n\r\n".encode() + body[: int(part * len(body))])
    return connection


@pytest.mark.parametrize(("method", "path", "field"), CHANGING_OR_SEARCHING)
def test_a_client_that_vanishes(writable_gateway: HttpGateway, method: str, path: str, field: str) -> None:
    """Within a body, nothing is done; after it, what was asked for is done as a whole, and found by others."""
    encoder, started, go = writable_gateway.service._encoders[0], threading.Event(), threading.Event()
    encode = encoder.encode

    def late(texts: Sequence[str]) -> np.ndarray:
        started.set()
        assert go.wait(30)
        return encode(texts)

    encoder.encode = late
    with send_part(writable_gateway, method, path, field, 0.5):
        until(lambda: len(writable_gateway.taken) == 1)
    until(lambda: not writable_gateway.taken)
    assert not started.is_set()
    with send_part(writable_gateway, method, path, field, 1.0) as connection:
        assert started.wait(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
    go.set()
    assert works(writable_gateway)
    assert document_count(writable_gateway) == (51 if path == "/documents" else 50)


@pytest.mark.parametrize(("method", "path", "field"), CHANGING_OR_SEARCHING)
def test_a_slow_client_loses_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, path: str, field: str
) -> None:
    """One that has a key, and sends a byte of its body from time to time."""
    monkeypatch.setattr(http_gateway, "REQUEST_SECONDS", 0.5)
    write_index(tmp_path / "index", DOCUMENTS)
    index = SearchIndex(tmp_path / "index", MODEL, "fp32", writable=True)
    with running_search_gateway(index, KEYS) as gateway:
        with send_part(gateway, method, path, field, 0.0) as connection:
            until(lambda: len(gateway.taken) == 1)
            connection.settimeout(0.05)
            for byte in itertools.chain(b"{", itertools.repeat(ord(" "), 200)):
                try:
                    connection.sendall(bytes([byte]))
                    assert connection.recv(4096) == b""
                    break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            else:
                raise AssertionError("it is still connected")
        assert gateway.service._encoders[0].batches == [] and document_count(gateway) == 50
        assert works(gateway)


def test_a_full_disk_changes_nothing(
    writable_gateway: HttpGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service goes on, and takes changes again when there is room."""
    journal = tmp_path / "index" / "journal.bin"
    assert change(writable_gateway, "POST", documents="新零")[0] == 200
    before = journal.read_bytes()
    with file_size_limit(len(before) + 20):
        for method, fields in (("POST", {"documents": ["新一", "新二"]}), ("DELETE", {"ids": [3]})):
            status, content = change(writable_gateway, method, **fields)
            assert (status, content["error"]["type"]) == (500, "server_error")
            assert content["error"]["message"] == "the change couldn't be written: the service's log says why"
        found = post(at(writable_gateway), as_json(query=["新一", DOCUMENTS[3]], top_k=20), SEARCH, KEY)[1]
        documents = [{hit["document"] for hit in result["hits"]} for result in found["results"]]
        assert "新一" not in documents[0] and DOCUMENTS[3] in documents[1]
    assert journal.read_bytes() == before
    assert capsys.readouterr().err == 2 * f"error: {journal}: can't be written (File too large)\n"
    assert change(writable_gateway, "POST", documents=["新一"])[1]["documents"] == [{"id": 51, "is_new": True}]
    assert list(load_index(tmp_path / "index").documents) == [*DOCUMENTS, "新零", "新一"]
