"""A real pretrained model: every engine, export and service gives the vectors of sentence-transformers.

These are in data/pretrained as sums of components; see make.py there.
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import export_model
import export_to_serving
from base_model import SemanticIndexBase
from benchmarks.service_clients import http_client, running_service
from data import encode_texts
from encoding import export
from encoding.encoder import load_encoder
from encoding.exported_model import load_exported
from encoding.onnx_graph import OnnxEncoder
from helpers import ROOT, run_script
from modeling.checkpoint import create_model, load_checkpoint, save_checkpoint
from pretrained import SAMPLE, make_texts, model_folder

LENGTH = 512  # no text is cut
BATCH_SIZE = 4  # texts of LENGTH tokens
TOLERANCE = 1e-5  # of a component; a component that is off changes each sum by as much


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder; links, so that no compiled graph gets into the package."""
    folder = tmp_path_factory.mktemp("pretrained") / "all-MiniLM-L6-v2"
    folder.mkdir()
    for file in model_folder().iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts(model_folder() / "vocab.txt")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    """What a training from the model would save if it had no steps."""
    checkpoint = folder.parent / "model_0"
    model, tokenizer = create_model(SemanticIndexBase, model_name_or_path=str(folder), max_seq_length=LENGTH)
    save_checkpoint(checkpoint, model, tokenizer)
    return checkpoint


def exported(checkpoint: Path, form: str) -> Path:
    """The checkpoint in a format of export_model.py."""
    output = checkpoint.parent / form
    if not output.is_dir():
        options = ["--params_path", str(checkpoint), "--output_path", str(output), "--format", form]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "CHECKED_BATCH_SIZES", (2,))  # fewer texts: others test the check
            assert export_model.main(options) == 0
    return output


def assert_sentence_transformers(vectors: np.ndarray, rows: slice = SAMPLE, name: str = "whole") -> None:
    """Whether the vectors are those of sentence-transformers."""
    expected = load_file(ROOT / "tests" / "data" / "pretrained" / "expected.safetensors")
    sums = vectors.astype(np.float64) @ expected["signs"]
    np.testing.assert_allclose(sums, expected[name][rows], rtol=0, atol=TOLERANCE)


def test_a_thousand_texts_have_the_vectors_of_sentence_transformers(checkpoint: Path, texts: list[str]) -> None:
    """From the checkpoint, with the engine for many texts."""
    encoder = load_encoder(checkpoint, engine="static", batch_size=BATCH_SIZE)
    lengths = encoder.tokenizer.count(texts)[0] - 2  # without [CLS] and [SEP]
    assert len(texts) == 1000 and lengths.min() == 1 and 400 <= lengths.max() <= LENGTH - 2
    assert_sentence_transformers(encoder.encode(texts), slice(None))


def test_tokens_are_those_of_the_models_own_tokenizer(folder: Path, texts: list[str]) -> None:
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_padding()
    theirs.no_truncation()
    ours = load_checkpoint(folder, max_seq_length=LENGTH).tokenizer
    assert ours.tokenize(texts) == [encoding.ids for encoding in theirs.encode_batch(texts)]


def test_the_folder_itself_gives_them(folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without a training, also cut at its own 256 tokens."""
    for length, name in ((LENGTH, "whole"), (None, "cut")):
        loaded = load_checkpoint(folder, max_seq_length=length)
        vectors = encode_texts(loaded.model.embed, texts[SAMPLE], loaded.tokenizer, BATCH_SIZE)
        assert_sentence_transformers(vectors, SAMPLE if name == "whole" else slice(None), name)
        assert loaded.tokenizer.max_seq_length == (length or 256)
    assert "took" not in capsys.readouterr().err  # all of its weights fit


def test_exports_that_are_checkpoints_give_them(checkpoint: Path, texts: list[str]) -> None:
    for form in ("safetensors", "sentence-transformers"):
        loaded = load_checkpoint(exported(checkpoint, form))
        vectors = encode_texts(loaded.model.embed, texts[SAMPLE], loaded.tokenizer, BATCH_SIZE)
        assert_sentence_transformers(vectors)


@pytest.mark.onnx
def test_the_exported_graphs_give_them(checkpoint: Path, texts: list[str]) -> None:
    """Paddle's and ONNX."""
    output = exported(checkpoint, "onnx")
    paddle_graph = load_exported(output)
    for embed in (paddle_graph.embed, OnnxEncoder(output).embed):
        assert_sentence_transformers(encode_texts(embed, texts[SAMPLE], paddle_graph.tokenizer, BATCH_SIZE))


@pytest.mark.onnx
@pytest.mark.server
def test_paddle_inference_and_the_service_give_them(checkpoint: Path, texts: list[str], tmp_path: Path) -> None:
    """predict.py, and the Pipeline service over HTTP."""
    output = exported(checkpoint, "onnx")  # holds all that the format paddle does
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts[SAMPLE]), encoding="utf-8")
    options = ["--model_dir", output, "--text_file", tmp_path / "texts.txt", "--output", tmp_path / "vectors.npy"]
    done = run_script(ROOT / "deploy" / "python" / "predict.py", *options)
    assert done.returncode == 0, done.stderr
    assert_sentence_transformers(np.load(tmp_path / "vectors.npy"))
    paths = [f"--{name}_path={tmp_path}/{name}" for name in ("server", "client")]
    assert export_to_serving.main(["--dirname", str(output), *paths]) == 0
    with running_service(tmp_path / "server") as service, http_client(service) as http:
        assert_sentence_transformers(http(texts[SAMPLE]))
