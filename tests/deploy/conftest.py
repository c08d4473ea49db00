import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
import export_to_serving
from clients import make_request, outputs
from cpp_helpers import TOLERANCE, Server, free_port, start, stop
from data import TextTokenizer
from helpers import cpp_environment
from modeling.checkpoint import load_checkpoint


@pytest.fixture(scope="session")
def serving_folder(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with serving_server and serving_client, written by export_to_serving.py."""
    folder = tmp_path_factory.mktemp("serving")
    paths = ["--server_path", str(folder / "serving_server"), "--client_path", str(folder / "serving_client")]
    export_to_serving.main(["--dirname", str(exported), *paths, "--fetch_alias_names", "output_embedding"])
    return folder


@pytest.fixture(scope="session")
def serving_server(serving_folder: Path) -> Path:
    """What the server loads."""
    return serving_folder / "serving_server"


@pytest.fixture(scope="session")
def cpp_server(cpp_program: Path, serving_folder: Path) -> Iterator[Server]:
    """One C++ server for all tests, started with the document's command."""
    port = free_port()
    command = [sys.executable, "-u", "-m", "paddle_serving_server.serve", "--model", "serving_server", "--port", port]
    options = ["--thread", 5, "--ir_optim", "True"]
    variables = cpp_environment(SERVING_BIN=f"exec {cpp_program}", PYTHONPATH="")
    server = start([*command, *options], port, cwd=serving_folder, env=variables)
    yield server
    stop(server)


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> tuple[Callable[..., np.ndarray], TextTokenizer]:
    """What computes the expected vectors, and the tokenizer."""
    model, tokenizer, *_ = load_checkpoint(checkpoint)
    return model.embed, tokenizer


@pytest.fixture
def cpp_answers(cpp_server: Server, model: Any) -> Iterator[None]:
    """After the test, the next requests get the right vectors."""
    yield
    embed, tokenizer = model
    tokens = tokenizer(["水稻"])
    for send in (clients.http_inference, clients.rpc_inference):
        vectors = outputs(send(cpp_server.address, make_request(tokens), 60))["output_embedding"]
        np.testing.assert_allclose(vectors, embed(*tokens), atol=TOLERANCE)


@pytest.fixture
def start_alone(cpp_program: Path, serving_folder: Path, cpp_server: Server) -> Callable[..., Server]:
    """Starts a further server without Paddle Serving, on the files that it wrote for the first."""

    def start_with(*options: Any) -> Server:
        port = free_port()
        files = ["-resource_path", f"workdir_{cpp_server.port}"]
        return start([cpp_program, *files, "-port", port, *options], port, cwd=serving_folder, env=cpp_environment())

    return start_with
