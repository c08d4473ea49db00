"""What version 1.0.0 wrote still works: checkpoints, trainings, vectors, indexes and exported models."""

import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import batch_negative.training_log  # noqa: F401 - VisualDL starts `file` when it is imported
import inference
import recall
import train_batch_neg
from common.errors import InputError
from common.files import read_json
from data import read_texts
from encoding.encoder import load_encoder
from helpers import V1, assert_same_weights, write_pairs
from modeling.checkpoint import load_checkpoint
from retrieval import pipeline
from retrieval.corpus import read_corpus
from retrieval.saved_index import load_index

CHECKPOINT = V1 / "run" / "model_4"
CORPUS = V1 / "recall" / "corpus.csv"
PADDLENLP = "3.0.0b4"  # the fingerprints contain what it writes into a model's config
needs_paddlenlp = pytest.mark.skipif(version("paddlenlp") != PADDLENLP, reason=f"needs PaddleNLP {PADDLENLP}")


@pytest.fixture
def vectors() -> np.ndarray:
    """The vectors of the corpus."""
    return np.load(V1 / "vectors.npy")


@pytest.fixture
def search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """A function that runs recall.py with the checkpoint and gives the lines that it prints."""

    def run(*options: str | Path) -> list[str]:
        capsys.readouterr()
        arguments = ["--device", "cpu", "--params_path", CHECKPOINT, "--recall_result_dir", tmp_path / "out", *options]
        assert recall.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("name", ["", "model_state.pdparams", "model.safetensors"])
@pytest.mark.parametrize("engine", ["dygraph", "static"])
def test_a_checkpoint_gives_the_same_vectors(vectors: np.ndarray, tmp_path: Path, name: str, engine: str) -> None:
    """By its folder and by each of its two weights files."""
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model_4")
    encoder = load_encoder(folder / name, engine=engine)
    np.testing.assert_allclose(encoder.encode(read_texts(CORPUS)), vectors, rtol=0, atol=1e-5)


def test_inference_writes_the_same_vectors(vectors: np.ndarray, tmp_path: Path) -> None:
    output = tmp_path / "vectors.npy"
    options = ["--params_path", CHECKPOINT, "--text_file", CORPUS, "--output", output, "--device", "cpu"]
    assert inference.main([str(option) for option in options]) == 0
    np.testing.assert_allclose(np.load(output), vectors, rtol=0, atol=1e-5)


@needs_paddlenlp
@pytest.mark.parametrize("name", ["", "model_state.pdparams", "model.safetensors"])
def test_the_fingerprint_is_that_of_indexes_and_stored_vectors(name: str) -> None:
    fingerprint = load_checkpoint(CHECKPOINT / name).fingerprint
    for file in ("index_hnswlib/index.json", "index_exact/index.json", "embeddings/embeddings.json"):
        assert read_json(V1 / file)["model"] == fingerprint
    assert read_json(V1 / "output" / "model_card.json")["fingerprint"] == fingerprint


@pytest.mark.parametrize("name", ["model_state.pdparams", "model.safetensors", "semantic_index.json", "vocab.txt"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model_4")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^{folder / name}: isn't as it was written"):
        load_checkpoint(folder / name if name == "model.safetensors" else folder)


def test_a_training_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights become those of the uninterrupted training, and its evaluations are kept.

    Training pads as version 1 did: without padding, dropout takes other elements.
    """
    monkeypatch.setattr("modeling.packed_texts.pack_texts", lambda _: None)
    shutil.copytree(V1 / "run" / "model_2", tmp_path / "run" / "model_2")
    for name in ("recall", "ernie"):
        shutil.copytree(V1 / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    options = [
        *("--from_scratch", "ernie", "--train_set_file", "recall/train.csv", "--save_dir", "run"),
        *("--output_emb_size", "8", "--pooling", "mean", "--max_seq_length", "24", "--batch_size", "8"),
        *("--learning_rate", "2e-3", "--margin", "0.2", "--scale", "30", "--max_steps", "4", "--save_steps", "2"),
        *("--evaluate", "--recall_num", "5", "--best_metric", "recall@5", "--resume_from", "latest", "--device", "cpu"),
    ]
    assert train_batch_neg.main(options) == 0
    assert_same_weights(tmp_path / "run" / "model_4", CHECKPOINT, tolerance=1e-5)
    reports = read_json(tmp_path / "run" / "model_4" / "training_evaluations.json")["reports"]
    expected = read_json(CHECKPOINT / "training_state.json")["evaluator"]["reports"]
    assert len(expected) == 2 and reports == expected


# ---------------------------------------------------------------------------------------------------------------------
# Stored vectors and indexes


@needs_paddlenlp
def test_stored_vectors_are_not_encoded_again(
    search: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "encode_texts", lambda *_: pytest.fail("encoded"))
    folder = shutil.copytree(V1 / "embeddings", tmp_path / "embeddings")
    query = read_texts(CORPUS)[7]
    lines = search("--ann", "exact", "--corpus_file", CORPUS, "--embedding_dir", folder, "--query", query)
    assert lines[1] == f"  1  1.0000  {query}"
    for file in (V1 / "embeddings").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


@needs_paddlenlp
@pytest.mark.parametrize("ann", ["hnswlib", "exact"])
def test_a_saved_index_answers(search: Callable[..., list[str]], tmp_path: Path, vectors: np.ndarray, ann: str) -> None:
    """With its corpus file, and after documents were added and it was tuned again."""
    folder = shutil.copytree(V1 / f"index_{ann}", tmp_path / "index")
    documents = read_texts(CORPUS)
    target = read_json(folder / "index.json").get("share")
    assert (target is None) == (ann == "exact")
    assert load_index(folder).index.target_recall == (target or 0)
    np.testing.assert_allclose(load_index(folder).index.search(vectors, 1)[1], 1, atol=1e-5)

    lines = search("--index_dir", folder, "--corpus_file", CORPUS, "--query", documents[7], "--recall_num", "3")
    assert len(lines) == 4 and lines[1] == f"  1  1.0000  {documents[7]}"

    added = write_pairs(tmp_path / "more.csv", [("小麦",), (documents[0],)])
    lines = search("--index_dir", folder, "--add_corpus", added, "--query", "小麦", "--recall_num", "3")
    assert lines[0].startswith(f"wrote {folder}: ") and lines[0].endswith(" of 49 documents")
    assert lines[2] == "  1  1.0000  小麦"
    saved = load_index(folder)
    assert list(saved.documents) == [*documents, "小麦"]
    assert (saved.model, saved.corpus) == (load_checkpoint(CHECKPOINT).fingerprint, read_corpus(CORPUS).sha256)
    assert read_json(folder / "index.json").get("target_recall") == target


@pytest.mark.parametrize("ann", ["hnswlib", "exact"])
def test_a_damaged_index_is_refused_by_name(tmp_path: Path, ann: str) -> None:
    for file in (V1 / f"index_{ann}").iterdir():
        if file.name != "manifest.json":
            folder = shutil.copytree(V1 / f"index_{ann}", tmp_path / file.name)
            content = (folder / file.name).read_bytes()
            (folder / file.name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            message = rf"^{re.escape(str(folder / file.name))}: isn't as it was written .*; remove the folder"
            with pytest.raises(InputError, match=message):
                load_index(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Exported models


def test_an_exported_model_gives_the_same_vectors(
    vectors: np.ndarray, deploy_predict: ModuleType, tmp_path: Path
) -> None:
    """With deploy/python/predict.py."""
    output = tmp_path / "vectors.npy"
    options = ["--model_dir", V1 / "output", "--text_file", CORPUS, "--output", output, "--device", "cpu"]
    assert deploy_predict.main([str(option) for option in options]) == 0
    np.testing.assert_allclose(np.load(output), vectors, rtol=0, atol=1e-5)


def test_a_damaged_export_is_refused_by_name(deploy_predict: ModuleType, tmp_path: Path) -> None:
    for file in (V1 / "output").iterdir():
        if file.name != "manifest.json":
            folder = shutil.copytree(V1 / "output", tmp_path / file.name)
            content = (folder / file.name).read_bytes()
            (folder / file.name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            message = rf"^{re.escape(str(folder / file.name))}: isn't as it was written .*; export the model again"
            with pytest.raises(InputError, match=message):
                deploy_predict.main(["--model_dir", str(folder), "--text", "水稻"])
