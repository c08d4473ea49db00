"""The description of the HTTP port in OpenAPI 3.1, https://spec.openapis.org/oas/v3.1.0."""

from collections.abc import Mapping
from typing import Any

from common import __version__
from common.texts import ROLES
from retrieval.hybrid_search import MODES
from serving.limits import Limits

Schema = dict[str, Any]

STRING, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
ID = {**COUNT, "maximum": 2**63 - 1, "format": "int64"}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


MODE = {"enum": list(MODES)}
INDEX = _object(
    {"version": STRING, "documents": COUNT, "model": STRING, "modes": _list(MODE, minItems=1)}, {"problem": STRING}
)
HIT = _object({"id": ID, "score": {"type": "number"}, "document": STRING, "found_by": MODE})
ERROR_DETAIL = _object(
    {
        "message": STRING,
        "type": {"enum": ["invalid_request_error", "server_error"]},
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
)
PREDICTION = _object(
    {
        "err_no": {"type": "integer"},
        "err_msg": STRING,
        "key": _list(STRING),
        "value": _list(STRING),
        "tensors": _list(_object({}), maxItems=0),
    }
)
ERROR = _object({"error": ERROR_DETAIL})
SCHEMAS = {"Index": INDEX, "Hit": HIT, "Error": ERROR, "Prediction": PREDICTION}
JSON, TEXT = "application/json", "text/plain"
ERRORS = {  # status -> meaning
    "400": "an invalid request: the message says what to change",
    "401": "no valid key",
    "404": "no such model, or no index",
    "413": "the body is too large",
    "415": "Content-Encoding other than gzip, or a charset other than UTF-8",
    "500": "the service failed: try again",
    "503": "the service is busy or stopping, or its index doesn't answer: try again later",
}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: Schema, media: str = JSON) -> Schema:
    return {media: {"schema": schema}}


def _response(description: str, schema: Schema, media: str = JSON) -> Schema:
    return {"description": description, "content": _content(schema, media)}


def _operation(
    summary: str,
    answer: Schema,
    body: Schema | None = None,
    error: str = "Error",
    media: str = JSON,
    errors: Mapping[str, str] = ERRORS,
    **more: Any,
) -> Schema:
    """An operation. answer, body, error: their schemas, the last one's name; media: the answer's content type."""
    responses = {status: _response(text, _ref(error)) for status, text in errors.items()}
    operation = {"summary": summary, "responses": {"200": _response(summary, answer, media), **responses}, **more}
    if body:
        operation["requestBody"] = {"required": True, "content": _content(body)}
    return operation


def describe(limits: Limits, has_keys: bool, model: str) -> Schema:
    """The description. model: the name of the model."""
    text = {"type": "string", "minLength": 1, "maxLength": limits.characters}
    texts = {"anyOf": [text, _list(text, minItems=1, maxItems=limits.texts)]}
    top_k = {"type": "integer", "minimum": 1, "maximum": limits.top_k, "default": 10}
    mode: Schema = {**MODE, "description": "default: hybrid if the index has words, else vector"}
    results = _list(_object({"hits": _list(_ref("Hit"))}))
    found = _object({"index": _ref("Index"), "mode": MODE, "results": results})
    parameters = [
        {"name": "q", "in": "query", "required": True, "schema": text},
        {"name": "top_k", "in": "query", "schema": top_k},
        {"name": "mode", "in": "query", "schema": mode},
    ]
    health = _object({"status": STRING}, {"index": _ref("Index")})
    prediction = "vectors, in Paddle Serving's form"
    paths: dict[str, dict[str, Schema]] = {
        "/": {"get": _operation("a page to try the search on", STRING, media="text/html")},
        "/search": {
            "get": _operation("the documents most similar to a query, best first", found, parameters=parameters),
            "post": _operation(
                "the same for several queries", found, _object({"query": texts}, {"top_k": top_k, "mode": mode})
            ),
        },
        "/documents": _documents(texts, limits),
        "/reload": {
            "post": _operation("takes the newest version of the index into service", _object({"index": INDEX}))
        },
        "/v1/embeddings": {"post": _operation("vectors, in OpenAI's form", *_embeddings(texts, model))},
        "/v1/models": {"get": _operation("the model, in OpenAI's form", _models())},
        f"/{model}/prediction": {
            "post": _operation(prediction, _ref("Prediction"), _prediction(limits), error="Prediction")
        },
        "/health": {"get": _operation("whether the service works", health, security=[])},
        "/metrics": {"get": _operation("metrics in Prometheus' format", STRING, error="Prediction", media=TEXT)},
        "/openapi.json": {"get": _operation("this description", {"type": "object"})},
    }
    paths["/health"]["get"]["responses"] = {
        "200": _response("it works", health),
        "503": _response("it is stopping, no encoder can be started, or its index doesn't answer", health),
    }
    description: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Semantic index", "version": __version__},
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }
    if has_keys:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}]
    return description


def _embeddings(texts: Schema, model: str) -> tuple[Schema, Schema]:
    """The schemas of answer and body of /v1/embeddings."""
    vector = {"anyOf": [_list({"type": "number"}), {"type": "string", "contentEncoding": "base64"}]}
    embedding = _object({"object": {"const": "embedding"}, "index": COUNT, "embedding": vector})
    usage = _object({"prompt_tokens": COUNT, "total_tokens": COUNT})
    answer = _object({"object": {"const": "list"}, "data": _list(embedding), "model": {"const": model}, "usage": usage})
    optional: dict[str, Schema] = {
        "model": {"const": model},
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "dimensions": {"type": "integer", "minimum": 1, "description": "the model's, if it is given"},
        "input_type": {"enum": list(ROLES), "description": "for models with prefixes: what the texts are in a search"},
        "user": STRING,
    }
    return answer, _object({"input": texts}, optional)


def _documents(texts: Schema, limits: Limits) -> Schema:
    """The operations of /documents."""
    errors = {**ERRORS, "403": "the service is read-only"}
    added = _object({"id": ID, "is_new": {"type": "boolean"}})
    ids = _list(ID, maxItems=limits.texts)
    which = {**_object({}, {"ids": ids, "documents": texts}), "minProperties": 1}
    of_post = _object({"index": _ref("Index"), "documents": _list(added)})
    of_delete = _object({"index": _ref("Index"), "deleted": COUNT})
    return {
        "post": _operation("adds documents", of_post, _object({"documents": texts}), errors=errors),
        "delete": _operation("deletes documents by id or text", of_delete, which, errors=errors),
    }


def _models() -> Schema:
    """The schema of the answer of /v1/models."""
    model = _object({"id": STRING, "object": {"const": "model"}, "created": COUNT, "owned_by": STRING})
    return _object({"object": {"const": "list"}, "data": _list(model)})


def _prediction(limits: Limits) -> Schema:
    """The schema of a body in Paddle Serving's form."""
    texts = {"description": 'a text for each key; that of the key "role" is what the texts are, query or document'}
    keys = {"description": 'in any order "0", "1", ..., and "role"'}
    most = limits.texts + 1
    number = {"type": "integer", "minimum": -(2**63) + 1, "maximum": 2**63 - 1}
    optional: dict[str, Schema] = {
        "name": STRING,
        "method": {},
        "clientip": {},
        "logid": number,
        "tensors": _list({}, maxItems=0),
    }
    return _object(
        {
            "key": _list(STRING, minItems=1, maxItems=most, **keys),
            "value": _list(STRING, minItems=1, maxItems=most, **texts),
        },
        optional,
    )
