"""What each path of the HTTP port answers."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from retrieval.hybrid_search import MODES, SearchHits
from serving import installed_packages
from serving.adapter import SERVICE, PipelineService, Request, Response, error_response
from serving.http_messages import (
    SURROGATE,
    ErrorForm,
    HttpAnswer,
    HttpRequest,
    check_names,
    error_json,
    json_answer,
    parse_json,
    parse_query,
    take_choice,
    take_ids,
    take_integer,
    take_texts,
)
from serving.limits import BAD_REQUEST, RequestError
from serving.openai_routes import OpenAIRoutes
from serving.openapi import describe
from serving.page import read_page

with installed_packages():
    from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

PREDICTION_PATH = f"/{SERVICE}/prediction"
PREDICTION_FIELDS = ("clientip", "key", "logid", "method", "name", "value")  # of a Request, without tensors
PREDICTION_EXAMPLE = '{"key": ["0"], "value": ["text"]}'
SEARCH_EXAMPLE = '{"query": "text", "top_k": 10}'
ADD_EXAMPLE = '{"documents": ["text"]}'
DELETE_EXAMPLE = '{"ids": [7]}, or {"documents": ["text"]}'
DEFAULT_TOP_K = 10
SCORE_DIGITS = 6  # a cosine of float32 has 7

Respond = Callable[[HttpRequest], HttpAnswer]  # raises RequestError


class Route(NamedTuple):
    """What a path answers.

    waits: whether its answers take time: they are computed in a thread, and count as requests in progress and in the
    metrics. needs_key: whether it needs a key if the service has any.
    """

    methods: Mapping[str, Respond]
    waits: bool = True
    needs_key: bool = True
    errors: ErrorForm = error_json

    @property
    def allowed(self) -> list[str]:
        """The methods of this path, HEAD among them."""
        return [name for method in self.methods for name in ((method, "HEAD") if method == "GET" else (method,))]


class Routes:
    """The paths of a service."""

    def __init__(self, service: PipelineService) -> None:
        self._service = service
        self._page_answer = read_page()

    def by_path(self) -> dict[str, Route]:
        """Path -> what it answers."""
        openai = OpenAIRoutes(self._service)
        return {
            "/": Route({"GET": self._page}, waits=False),
            PREDICTION_PATH: Route({"POST": self._predict}, errors=serving_error),
            "/search": Route({"GET": self._search_query, "POST": self._search}),
            "/documents": Route({"POST": self._add_documents, "DELETE": self._delete_documents}),
            "/reload": Route({"POST": self._reload}),
            "/v1/embeddings": Route({"POST": openai.embeddings}),
            "/v1/models": Route({"GET": openai.models}, waits=False),
            "/openapi.json": Route({"GET": self._description}, waits=False),
            "/health": Route({"GET": self._health}, waits=False, needs_key=False, errors=serving_error),
            "/metrics": Route({"GET": self._metrics}, waits=False, errors=serving_error),
        }

    def _page(self, _: HttpRequest) -> HttpAnswer:
        return self._page_answer

    def _predict(self, request: HttpRequest) -> HttpAnswer:
        return HttpAnswer(response_json(self._service.predict(parse_prediction(request.body))))

    def _add_documents(self, request: HttpRequest) -> HttpAnswer:
        content = parse_json(request.body, ADD_EXAMPLE)
        check_names(content, ("documents",))
        state, added = self._service.add(take_texts(content, "documents"))
        documents = [{"id": row, "is_new": is_new} for row, is_new in zip(*added, strict=True)]
        return json_answer({"index": state._asdict(), "documents": documents})

    def _delete_documents(self, request: HttpRequest) -> HttpAnswer:
        content = parse_json(request.body, DELETE_EXAMPLE)
        check_names(content, ("ids", "documents"))
        documents = take_texts(content, "documents") if "documents" in content else []
        state, deleted = self._service.delete(take_ids(content, "ids"), documents)
        return json_answer({"index": state._asdict(), "deleted": deleted})

    def _search(self, request: HttpRequest) -> HttpAnswer:
        content = parse_json(request.body, SEARCH_EXAMPLE)
        check_names(content, ("query", "top_k", "mode"))
        return self._found(take_texts(content, "query"), content, "query")

    def _search_query(self, request: HttpRequest) -> HttpAnswer:
        parameters: dict[str, Any] = parse_query(request.query)
        check_names(parameters, ("q", "top_k", "mode"))
        top_k = parameters.get("top_k", "")
        if top_k.isascii() and top_k.isdecimal() and len(top_k) < 10:
            parameters["top_k"] = int(top_k)
        return self._found(take_texts(parameters, "q"), parameters, "q")

    def _found(self, queries: Sequence[str], content: Mapping[str, Any], param: str) -> HttpAnswer:
        top_k = take_integer(content, "top_k", DEFAULT_TOP_K, self._service.limits.top_k)
        hits = self._service.search(queries, top_k, take_choice(content, "mode", MODES, None), param)
        results = [{"hits": list(_hits(hits.found, hits.documents, row))} for row in range(len(queries))]
        return json_answer({"index": hits.state._asdict(), "mode": hits.mode, "results": results})

    def _reload(self, _: HttpRequest) -> HttpAnswer:
        index = self._service.check_index()
        index.reload()
        return json_answer({"index": index.state._asdict()})

    def _description(self, _: HttpRequest) -> HttpAnswer:
        return json_answer(describe(self._service.limits, self._service.keys is not None, SERVICE))

    def _health(self, _: HttpRequest) -> HttpAnswer:
        service, status = self._service, self._service.status
        content: dict[str, Any] = {"status": status}
        if service.index is not None:
            content["index"] = service.index.state._asdict()
            if service.index.problem:
                content["index"]["problem"] = service.index.problem
        answer = json_answer(content)
        return answer if status == "ok" else answer._replace(status=HTTPStatus.SERVICE_UNAVAILABLE)

    def _metrics(self, _: HttpRequest) -> HttpAnswer:
        return HttpAnswer(self._service.metrics.text(), content_type=CONTENT_TYPE_PLAIN_0_0_4)


def _hits(found: SearchHits, documents: Mapping[int, str], query: int) -> Iterator[dict[str, Any]]:
    """How an answer tells of the hits of a query."""
    ids = found.ids[query]
    for each, (score, way, document) in zip(ids[ids >= 0].tolist(), found.of(query, documents), strict=True):
        yield {"id": each, "score": round(score, SCORE_DIGITS), "document": document, "found_by": way}


def parse_prediction(body: bytes) -> Request:
    """The Request in a JSON object such as PREDICTION_EXAMPLE. Raises RequestError."""
    content = parse_json(body, PREDICTION_EXAMPLE)
    if content.pop("tensors", None):
        raise RequestError(BAD_REQUEST, "tensors aren't accepted: send texts as values")
    check_names(content, PREDICTION_FIELDS)
    keys, values = _strings(content, "key"), _strings(content, "value")
    name = content.get("name", "")
    logid = content.get("logid", 0)
    if not isinstance(name, str) or isinstance(logid, bool) or not isinstance(logid, int) or abs(logid) >= 2**63:
        raise RequestError(BAD_REQUEST, "name must be a string, and logid a number of 64 bits")
    try:
        return Request(key=keys, value=values, name=name, logid=logid)
    except ValueError:
        raise RequestError(BAD_REQUEST, f"key, value or name {SURROGATE}") from None


def _strings(content: Mapping[str, Any], field: str) -> Sequence[str]:
    strings = content.get(field, [])
    if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
        raise RequestError(BAD_REQUEST, f"{field} must be a list of strings")
    return strings


def response_json(response: Response) -> bytes:
    """As Serving's gateway writes it: err_no, err_msg, key, value, tensors."""
    content = {"err_no": response.err_no, "err_msg": response.err_msg}
    content |= {"key": list(response.key), "value": list(response.value), "tensors": []}
    return json.dumps(content, ensure_ascii=False).encode()


def serving_error(_: HTTPStatus, error: RequestError) -> bytes:
    """An error in the form of Paddle Serving."""
    return response_json(error_response(error.number, str(error)))
