"""A text has the same vector from every engine and service, alone or in a batch, with any padding."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import export_model
import export_to_serving
from base_model import SemanticIndexBase
from benchmarks.service_clients import (
    cpp_http_client,
    cpp_rpc_client,
    http_client,
    rpc_client,
    running_cpp_service,
    running_service,
)
from data import Embed, TextTokenizer, encode_texts
from encoding.encoder import load_encoder
from encoding.exported_model import load_exported
from encoding.onnx_graph import OnnxEncoder
from encoding.static_graph import StaticEncoder
from helpers import ROOT, all_pairs, cpp_environment, make_model_folder, run_script
from modeling.checkpoint import create_model, load_checkpoint, save_checkpoint

TEXTS = ["水", "水稻的产量与土壤评价" * 6 + "水稻优化", "论水稻产量研究水稻,产量" * 20, "Deep Learning 2.0!", "高血压"]
OTHERS = [title for _, title in all_pairs()[:40]]
LENGTH = 80  # 64 characters fit, 240 don't
TOLERANCE = 1e-5  # of a component
Encode = Callable[[Sequence[str]], np.ndarray]  # texts -> float32 [N, D]


@pytest.fixture(scope="module", params=["cls", "mean"])
def forms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of random weights, its export in both formats (output), and Serving's folders."""
    folder = tmp_path_factory.mktemp("forms")
    ernie = make_model_folder(folder / "ernie", max_position_embeddings=100, initializer_range=0.5)
    loaded = create_model(
        SemanticIndexBase, from_scratch=str(ernie), pooling=request.param, output_emb_size=16, max_seq_length=LENGTH
    )
    save_checkpoint(folder / "checkpoint", *loaded)
    output = ["--output_path", str(folder / "output"), "--format", "onnx"]
    assert export_model.main(["--params_path", str(folder / "checkpoint"), *output]) == 0
    paths = [f"--{name}_path={folder}/serving_{name}" for name in ("server", "client")]
    assert export_to_serving.main(["--dirname", str(folder / "output"), *paths]) == 0
    return folder


@pytest.fixture
def expected(forms: Path) -> np.ndarray:
    """The vectors of TEXTS from the checkpoint, one at a time."""
    assert [len(text) for text in TEXTS[:3]] == [1, 64, 240]
    model, tokenizer, *_ = load_checkpoint(forms / "checkpoint")
    assert [len(ids) for ids in tokenizer.tokenize(TEXTS[:3])] == [3, 66, LENGTH]
    vectors = np.concatenate([model.embed(*tokenizer([text])) for text in TEXTS])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01  # the model tells texts apart
    return vectors


def check(ways: Mapping[str, Encode], expected: np.ndarray) -> None:
    """Each way gives the expected vectors, whichever texts are in the same batch."""
    for name, encode in ways.items():
        batches = {
            "alone": np.concatenate([encode([text]) for text in TEXTS]),
            "together": encode(TEXTS),
            "in another order": encode(TEXTS[::-1])[::-1],
            "among others": encode([*OTHERS, *TEXTS])[len(OTHERS) :],
        }
        for batch, vectors in batches.items():
            np.testing.assert_allclose(vectors, expected, rtol=0, atol=TOLERANCE, err_msg=f"{name}, {batch}")


def padded(tokenizer: TextTokenizer) -> TextTokenizer:
    """A tokenizer that pads every text to the maximum."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.pad_to_max_seq_len = True
    return tokenizer


def in_process(name: str, embed: Embed, tokenizer: TextTokenizer) -> dict[str, Encode]:
    """A batch as it is, padded to the maximum, and with `encode_texts`."""
    return {
        name: lambda texts: embed(*tokenizer(texts)),
        f"{name}, padded": lambda texts: embed(*padded(tokenizer)(texts)),
        f"{name}, by length": lambda texts: encode_texts(embed, texts, tokenizer, 2),
    }


def predict(model_dir: Path, folder: Path, texts: Sequence[str]) -> np.ndarray:
    """With deploy/python/predict.py."""
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    options = ["--model_dir", model_dir, "--text_file", folder / "texts.txt", "--output", folder / "vectors.npy"]
    done = run_script(ROOT / "deploy" / "python" / "predict.py", *options)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "vectors.npy")


@pytest.mark.server
def test_one_text_has_one_vector(forms: Path, expected: np.ndarray, tmp_path: Path) -> None:
    """From a checkpoint, the static graph, OpenVINO, ONNX, predict.py, and Pipeline Serving over gRPC and HTTP."""
    model, tokenizer, *_ = load_checkpoint(forms / "checkpoint")
    exported = load_exported(forms / "output")
    with (
        running_service(forms / "serving_server", "--threads", "1") as service,
        rpc_client(service) as rpc,
        http_client(service) as http,
    ):
        ways = {
            "load_encoder": load_encoder(forms / "checkpoint").encode,
            "load_encoder, static": load_encoder(forms / "checkpoint", engine="static").encode,
            **in_process("dygraph", model.embed, tokenizer),
            **in_process("static graph", exported.embed, exported.tokenizer),
            "load_encoder, openvino": load_encoder(forms / "checkpoint", engine="openvino").encode,
            **in_process("openvino", load_exported(forms / "output", engine="openvino").embed, exported.tokenizer),
            **in_process("static, no oneDNN", StaticEncoder(forms / "output", onednn=False).embed, exported.tokenizer),
            **in_process("onnx", OnnxEncoder(forms / "output").embed, exported.tokenizer),
            "predict.py": partial(predict, forms / "output", tmp_path),
            "gRPC": rpc,
            "HTTP": http,
        }
        check(ways, expected)


@pytest.mark.cpp
def test_one_text_has_one_vector_in_cpp_serving(
    forms: Path, expected: np.ndarray, cpp_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over RPC and HTTP."""
    for name, value in cpp_environment().items():
        monkeypatch.setenv(name, value)
    tokenizer = load_exported(forms / "serving_server").tokenizer
    with running_cpp_service(cpp_program, forms / "serving_server", tokenizer) as service:
        filled = service._replace(tokenizer=padded(tokenizer))
        with (
            cpp_rpc_client(service) as rpc,
            cpp_http_client(service) as http,
            cpp_rpc_client(filled) as rpc_padded,
            cpp_http_client(filled) as http_padded,
        ):
            ways = {"RPC": rpc, "HTTP": http, "RPC, padded": rpc_padded, "HTTP, padded": http_padded}
            check(ways, expected)
