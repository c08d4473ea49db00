"""The service answers as /openapi.json describes it, to requests that schemathesis makes from that description."""

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi import checks

from benchmarks.service_clients import HOST
from service_helpers import DOCUMENTS, MODEL, running_search_gateway, write_index
from serving.search import SearchIndex

AUTHORIZATION = {"Authorization": "Bearer a-key"}
CHECKS = [  # positive_data_acceptance is left out: a schema can't say which characters are invisible
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.missing_required_header,
    checks.unsupported_method,
    checks.allow_header_conformance,
    checks.ignored_auth,
]
SETTINGS = hypothesis.settings(  # the same requests in each run, however slow the machine is
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
PATHS = {  # path -> whether its requests are as described; nothing in a request to /health can be wrong
    **dict.fromkeys(
        ["/search", "/documents", "/reload", "/v1/embeddings", "/v1/models", "/ernie/prediction"], (POSITIVE, NEGATIVE)
    ),
    **dict.fromkeys(["/", "/metrics", "/openapi.json"], (POSITIVE, NEGATIVE)),
    "/health": (POSITIVE,),
}


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    """What the service says of itself."""
    folder = tmp_path_factory.mktemp("described") / "index"
    write_index(folder, DOCUMENTS)
    with running_search_gateway(SearchIndex(folder, MODEL, "fp32"), ["a-key"]) as gateway:
        url = f"http://{HOST}:{gateway.server_port}/openapi.json"
        yield schemathesis.openapi.from_url(url, headers=AUTHORIZATION)


def test_all_paths_are_tried(description: schemathesis.BaseSchema) -> None:
    assert sorted(description) == sorted(PATHS)


@pytest.mark.parametrize(("path", "mode"), [(path, mode) for path, modes in PATHS.items() for mode in modes])
def test_it_answers_as_it_says(
    description: schemathesis.BaseSchema, path: str, mode: schemathesis.GenerationMode
) -> None:
    """Requests that fit the description, and others."""
    for operation in description[path].values():

        @SETTINGS
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def answers(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=AUTHORIZATION, checks=CHECKS)

        answers()
