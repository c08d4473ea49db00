"""Requests and answers over HTTP, apart from how they are sent: bodies, fields, errors. Imports no Paddle."""

import json
import re
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote

from serving.limits import (
    BAD_REQUEST,
    FORBIDDEN,
    INTERNAL_ERROR,
    NO_SEARCH,
    NO_SUCH_SERVICE,
    OK,
    OVERLOADED,
    STOPPING,
    RequestError,
)

STATUSES = {
    OK: HTTPStatus.OK,
    BAD_REQUEST: HTTPStatus.BAD_REQUEST,
    FORBIDDEN: HTTPStatus.FORBIDDEN,
    NO_SUCH_SERVICE: HTTPStatus.NOT_FOUND,
    OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
    STOPPING: HTTPStatus.SERVICE_UNAVAILABLE,
    NO_SEARCH: HTTPStatus.SERVICE_UNAVAILABLE,
    INTERNAL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
}
Default = TypeVar("Default", int, None)
JSON_TYPE = "application/json"
SURROGATE = "holds half of a surrogate pair, which isn't text"
MAX_PARAMETERS = 16  # of a query string


class HttpRequest(NamedTuple):
    """A request whose body has arrived and isn't compressed."""

    query: str  # what follows the ? of its target
    body: bytes


class HttpAnswer(NamedTuple):
    """An answer to it."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = JSON_TYPE
    headers: Mapping[str, str] = {}


ErrorForm = Callable[[HTTPStatus, RequestError], bytes]  # the body of an answer that is an error


def json_answer(content: Mapping[str, Any]) -> HttpAnswer:
    """An answer in JSON."""
    return HttpAnswer(json.dumps(content, ensure_ascii=False).encode())


def error_json(status: HTTPStatus, error: RequestError) -> bytes:
    """An error in OpenAI's form, https://platform.openai.com/docs/guides/error-codes."""
    code = "model_not_found" if error.param == "model" else None
    if status == HTTPStatus.UNAUTHORIZED:
        code = "invalid_api_key"
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    content = {"message": str(error), "type": kind, "param": error.param, "code": code}
    return json.dumps({"error": content}, ensure_ascii=False).encode()


def split_target(target: str) -> tuple[str, str]:
    """Path and query of a request's target, without a slash at the path's end and, as to a proxy, scheme and host."""
    path, _, query = re.sub(r"^https?://[^/?]*", "", target, flags=re.IGNORECASE).partition("?")
    return path.rstrip("/") or "/", query


def is_gzip(headers: Mapping[str, str]) -> bool:
    """Whether the headers say that the body is compressed with gzip."""
    return headers.get("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip")


def content_problem(headers: Mapping[str, str], body: bytes) -> str | None:
    """What is wrong with how the headers say that a body is encoded, if anything."""
    if not is_gzip(headers) and headers.get("Content-Encoding", "").strip().lower() not in ("", "identity"):
        return "Content-Encoding has to be gzip, or nothing"
    charset = re.search(r";\s*charset\s*=\s*\"?([^\s;\"]*)", headers.get("Content-Type", ""), re.IGNORECASE)
    if charset and charset[1].lower() not in ("", "utf-8", "utf8") and not body.isascii():
        return "Content-Type names a charset other than UTF-8: send UTF-8"
    return None


def decompress(body: bytes, limit: int) -> bytes:
    """A gzip body's content, or its first limit + 1 bytes. Raises RequestError if it is damaged."""
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: gzip alone
    try:
        content = stream.decompress(body, limit + 1)
    except zlib.error:
        raise RequestError(BAD_REQUEST, "the compressed body is damaged") from None
    if len(content) <= limit and (not stream.eof or stream.unused_data):
        raise RequestError(BAD_REQUEST, "the compressed body is damaged")
    return content


def parse_json(body: bytes, example: str) -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError; example: a body, for its message."""
    if not body:
        raise RequestError(BAD_REQUEST, f"the body is empty: send JSON such as {example}")
    try:
        content = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)  # a BOM is allowed
    except UnicodeDecodeError:
        raise RequestError(BAD_REQUEST, "the body isn't UTF-8") from None
    except RecursionError:
        raise RequestError(BAD_REQUEST, "the body's JSON is nested too deeply") from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(BAD_REQUEST, f"the body isn't JSON{where}") from None
    if not isinstance(content, dict):
        raise RequestError(BAD_REQUEST, f"the body isn't an object such as {example}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} isn't JSON")


def parse_query(query: str) -> dict[str, str]:
    """The parameters of a query string. Raises RequestError if one is there twice or isn't UTF-8."""
    # curl sends what isn't ASCII as it is, and Tornado decodes that as Latin-1.
    ascii_query = quote(query, safe=string.printable, encoding="latin-1")
    try:
        pairs = parse_qsl(ascii_query, keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise RequestError(BAD_REQUEST, "the query string isn't UTF-8, or has too many parameters") from None
    parameters = dict(pairs)
    if len(parameters) < len(pairs):
        raise RequestError(BAD_REQUEST, "the query string has a parameter twice: send several queries with POST")
    return parameters


def check_names(content: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises RequestError if there are other fields than these."""
    if not content.keys() <= set(names):
        raise RequestError(BAD_REQUEST, f"unknown fields: a request has {', '.join(names)}")


def take_texts(content: Mapping[str, Any], name: str) -> list[str]:
    """The texts of a field that is a string or a list of strings. Raises RequestError."""
    given = content.get(name)
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(BAD_REQUEST, f"{name} must be a string or a list of strings", name)
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise RequestError(BAD_REQUEST, f"{name} {SURROGATE}", name) from None
    return texts


def take_integer(content: Mapping[str, Any], name: str, default: Default, most: int) -> int | Default:
    """The value of a field from 1 to `most`, or the default. Raises RequestError."""
    if name not in content:
        return default
    value = content[name]
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # 3.0 is one in JSON
    if isinstance(value, bool) or not is_whole or not 1 <= value <= most:
        raise RequestError(BAD_REQUEST, f"{name} must be a whole number from 1 to {most}", name)
    return int(value)


def take_ids(content: Mapping[str, Any], name: str) -> list[int]:
    """The ids in a field that is a list of whole numbers, or no ids without it. Raises RequestError."""
    ids = content.get(name, [])
    if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < 2**63 for each in ids):
        raise RequestError(BAD_REQUEST, f"{name} must be a list of ids, as /search and POST /documents give them", name)
    return ids


def take_choice(content: Mapping[str, Any], name: str, choices: Sequence[str], default: str | None) -> str | None:
    """The value of a field that is one of the choices, or the default. Raises RequestError."""
    if name not in content:
        return default
    if content[name] not in choices:
        raise RequestError(BAD_REQUEST, f"{name} must be one of {', '.join(choices)}", name)
    return content[name]
