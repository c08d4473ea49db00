"""Vectors in the form of OpenAI's API, so that its clients work: /v1/embeddings and /v1/models.

https://platform.openai.com/docs/api-reference/embeddings; `input_type` is an addition, as in the APIs of Cohere, Voyage
and NVIDIA.
"""

import base64
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.texts import ROLES
from serving.adapter import SERVICE, PipelineService
from serving.http_messages import (
    HttpAnswer,
    HttpRequest,
    check_names,
    json_answer,
    parse_json,
    take_choice,
    take_integer,
    take_texts,
)
from serving.limits import BAD_REQUEST, NO_SUCH_SERVICE, RequestError

EXAMPLE = f'{{"input": "text", "model": "{SERVICE}"}}'
FIELDS = ("input", "model", "encoding_format", "dimensions", "input_type", "user")
ENCODING_FORMATS = ("float", "base64")
OWNER = "semantic-index"
MAX_DIMENSIONS = 1 << 20  # any number that no model has


class OpenAIRoutes:
    """What these paths answer."""

    def __init__(self, service: PipelineService) -> None:
        self._service = service
        self._created = int(time.time())

    def models(self, _: HttpRequest) -> HttpAnswer:
        """The one model."""
        model = {"id": SERVICE, "object": "model", "created": self._created, "owned_by": OWNER}
        return json_answer({"object": "list", "data": [model]})

    def embeddings(self, request: HttpRequest) -> HttpAnswer:
        """The vectors of texts. Raises RequestError."""
        content = parse_json(request.body, EXAMPLE)
        check_names(content, FIELDS)
        _check_model(content)
        texts = take_texts(content, "input")
        encoding_format = take_choice(content, "encoding_format", ENCODING_FORMATS, "float")
        role = take_choice(content, "input_type", ROLES, None)
        dimensions = take_integer(content, "dimensions", None, MAX_DIMENSIONS)
        vectors = self._service.embed(texts, role, "input")
        if dimensions not in (None, vectors.shape[1]):
            problem = f"the model's vectors have {vectors.shape[1]} dimensions: leave this out"
            raise RequestError(BAD_REQUEST, problem, "dimensions")
        tokens = self._service.count_tokens(texts, role)
        data = [
            {
                "object": "embedding",
                "index": row,
                "embedding": _base64(vector) if encoding_format == "base64" else vector,
            }
            for row, vector in enumerate(vectors if encoding_format == "base64" else vectors.tolist())
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_answer({"object": "list", "data": data, "model": SERVICE, "usage": usage})


def _check_model(content: Mapping[str, Any]) -> None:
    """Raises RequestError for another model, and for a `user`, which isn't used, that isn't a string."""
    if not all(isinstance(content.get(name, ""), str) for name in ("model", "user")):
        raise RequestError(BAD_REQUEST, "model and user must be strings")
    if content.get("model", SERVICE) != SERVICE:
        raise RequestError(NO_SUCH_SERVICE, f"no such model: this one is named {SERVICE}", "model")


def _base64(vector: np.ndarray) -> str:
    """A vector's float32 values, little-endian, as OpenAI's clients read them."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
