import argparse
import io
import re
from pathlib import Path

import numpy as np
import pytest

import clients
from clients import Response, format_frame, make_request, outputs, read_frame
from cpp_helpers import CPP, HOST, TOKENS, free_port
from helpers import run_script


@pytest.mark.process
@pytest.mark.parametrize("script", ["rpc_client.py", "http_client.py"])
def test_clients_without_a_server_or_a_model(script: str, serving_folder: Path, tmp_path: Path) -> None:
    """One line and exit code 2."""
    model_dir = ["--model_dir", serving_folder / "serving_server"]
    known = [*model_dir, "--texts", "水稻"]
    for options, named in (
        ([*known, "--endpoint", f"{HOST}:{free_port()}"], r"--endpoint 127.0.0.1:\d+: no answer .*start_server.sh"),
        ([*model_dir, "--endpoint", "here"], "argument --endpoint: here isn't host:port"),
        ([*model_dir, "--texts", "好", " "], "argument --texts: the text is empty"),
        (["--model_dir", tmp_path / "none"], "--model_dir .*none: no such folder; give the one that the server serves"),
    ):
        done = run_script(CPP / script, *options)
        assert done.returncode == 2
        assert re.match(f"error: .*{named}.*\n$", done.stderr), done.stderr


@pytest.mark.parametrize("as_bytes", [False, True])
def test_token_ids_are_sent_whole(as_bytes: bool) -> None:
    request = make_request(TOKENS, log_id=7, as_bytes=as_bytes)
    assert request.log_id == 7
    for tensor, name, array in zip(request.tensor, ("input_ids", "token_type_ids"), TOKENS, strict=True):
        assert (tensor.name, list(tensor.shape), bool(tensor.tensor_content)) == (name, [2, 4], as_bytes)
        sent = np.frombuffer(tensor.tensor_content, np.int64) if as_bytes else np.array(tensor.int64_data)
        np.testing.assert_array_equal(sent.reshape(tensor.shape), array)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_vectors_are_read_from_lists_and_bytes(as_bytes: bool) -> None:
    vectors = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    elements = {"tensor_content": vectors.tobytes()} if as_bytes else {"float_data": vectors.ravel().tolist()}
    response = Response()
    response.outputs.add().tensor.add(alias_name="output_embedding", shape=vectors.shape, **elements)
    np.testing.assert_array_equal(outputs(response)["output_embedding"], vectors)


def test_frames_are_read_as_they_are_written() -> None:
    stream = io.BytesIO(format_frame(b"payload", correlation_id=3) + b"PRPC")
    meta, payload = read_frame(stream)
    assert (meta.request.service_name, meta.request.method_name) == (clients.SERVICE, "inference")
    assert (meta.correlation_id, payload) == (3, b"payload")
    with pytest.raises(EOFError, match="isn't baidu_std"):
        read_frame(stream)
    with pytest.raises(EOFError, match="closed the connection"):
        read_frame(io.BytesIO(format_frame(b"payload")[:-1]))


def test_endpoints() -> None:
    assert clients.endpoint("localhost:9393") == ("localhost", 9393)
    assert clients.endpoint("[::1]:80") == ("::1", 80)
    for text in ("9393", ":9393", "here:", "here:x", "here:70000", "http://here:9393", "http://here:9393/"):
        with pytest.raises(argparse.ArgumentTypeError, match="isn't host:port"):
            clients.endpoint(text)


@pytest.mark.parametrize(("max_seq_length", "length"), [(None, 24), (10, 10)])
def test_texts_are_padded_to_the_models_length(serving_server: Path, max_seq_length: int | None, length: int) -> None:
    """Or to the given length."""
    tokens = clients.tokenize(["水稻"], str(serving_server), max_seq_length, None)
    assert [array.shape for array in tokens] == [(1, length)] * 2
