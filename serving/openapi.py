"""The description of the HTTP port in OpenAPI 3.1, https://spec.openapis.org/oas/v3.1.0."""

from collections.abc import Mapping
from typing import Any

from common import __version__
from common.texts import ROLES
from serving.limits import Limits

Schema = dict[str, Any]

STRING, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


INDEX = _object({"version": STRING, "documents": COUNT}, {"problem": STRING})
HIT = _object({"id": COUNT, "score": {"type": "number"}, "document": STRING})
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
ERRORS = {  # status -> meaning, of every path whose answer takes time
    "400": "an invalid request: the message says what to change",
    "404": "no such model, or no index",
    "413": "the body is too large",
    "415": "Content-Encoding other than gzip, or a charset other than UTF-8",
    "500": "the service failed: try again",
    "503": "the service is busy or stopping: try again later",
}
NO_KEY = "no valid key"


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: Schema, media: str = JSON) -> Schema:
    return {media: {"schema": schema}}


def _response(description: str, schema: Schema, media: str = JSON) -> Schema:
    return {"description": description, "content": _content(schema, media)}


class _Operations:
    """Describes operations. has_keys: whether callers have to send a key."""

    def __init__(self, has_keys: bool) -> None:
        self._has_keys = has_keys

    def slow(
        self, summary: str, answer: Schema, body: Schema | None = None, error: str = "Error", **more: Any
    ) -> Schema:
        """One whose answer takes time. body, answer, error: their schemas."""
        operation = self.quick(summary, answer, **more)
        operation["responses"] |= {status: _response(text, _ref(error)) for status, text in ERRORS.items()}
        if body:
            operation["requestBody"] = {"required": True, "content": _content(body)}
        return operation

    def quick(self, summary: str, answer: Schema, media: str = JSON, needs_key: bool = True, **more: Any) -> Schema:
        """One that answers at once."""
        responses = {"200": _response(summary, answer, media)}
        if needs_key and self._has_keys:
            error = _ref("Prediction" if media == TEXT else "Error")
            responses["401"] = _response(NO_KEY, error)
            more["security"] = [{"key": []}]
        return {"summary": summary, "responses": responses, **more}


def describe(limits: Limits, has_keys: bool, model: str) -> Schema:
    """The description. model: the name of the model."""
    text = {"type": "string", "minLength": 1, "maxLength": limits.characters}
    texts = {"anyOf": [text, _list(text, minItems=1, maxItems=limits.texts)]}
    top_k = {"type": "integer", "minimum": 1, "maximum": limits.top_k, "default": 10}
    found = _object({"index": _ref("Index"), "results": _list(_object({"hits": _list(_ref("Hit"))}))})
    operations = _Operations(has_keys)
    slow, quick = operations.slow, operations.quick
    health = quick("whether it works", _object({"status": STRING}, {"index": _ref("Index")}), needs_key=False)
    health["responses"]["503"] = health["responses"]["200"]
    parameters = [
        {"name": "q", "in": "query", "required": True, "schema": text},
        {"name": "top_k", "in": "query", "schema": top_k},
    ]
    paths = {
        "/": {"get": quick("a page to try the search on", STRING, "text/html")},
        "/search": {
            "get": slow("the documents most similar to a query, best first", found, parameters=parameters),
            "post": slow("the same for several queries", found, _object({"query": texts}, {"top_k": top_k})),
        },
        "/reload": {"post": slow("takes the index that is now in the folder into service", _object({"index": INDEX}))},
        "/v1/embeddings": {"post": slow("vectors, in OpenAI's form", *_embeddings(texts, model))},
        "/v1/models": {"get": quick("the model, in OpenAI's form", _models())},
        f"/{model}/prediction": {
            "post": slow("vectors, in Paddle Serving's form", _ref("Prediction"), _prediction(limits), "Prediction")
        },
        "/health": {"get": health},
        "/metrics": {"get": quick("metrics in Prometheus' format", STRING, TEXT)},
        "/openapi.json": {"get": quick("this description", {"type": "object"})},
    }
    components: Schema = {"schemas": SCHEMAS}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    information = {"title": "Semantic index", "version": __version__}
    return {"openapi": "3.1.0", "info": information, "paths": paths, "components": components}


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
