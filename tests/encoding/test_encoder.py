"""From a checkpoint to vectors: the engines, the compiled graph that is kept, and precisions."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from base_model import SemanticIndexBase
from common.errors import InputError
from common.manifest import write_manifest
from common.options import STATIC_FROM_TEXTS
from encoding import encoder as encoder_module
from encoding import engines
from encoding.encoder import STATIC_FOLDER, load_encoder
from encoding.exported_files import GRAPH_NAME, WEIGHTS_SUFFIX
from encoding.text_encoder import Encoder, TextSample, compare_with_fp32
from modeling.checkpoint import load_checkpoint
from retrieval.corpus import read_corpus


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint in which a compiled graph can be written."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def static_encoder(folder: Path) -> Encoder:
    return load_encoder(folder, engine="static", batch_size=4)


def test_engines_agree_and_the_compiled_graph_is_kept(
    folder: Path, recall_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second load compiles nothing; a graph of another GRAPH_VERSION isn't used; another length is another model."""
    texts = list(read_corpus(recall_data / "corpus.csv"))
    dygraph = load_encoder(folder, engine="dygraph", batch_size=8)
    assert not (folder / STATIC_FOLDER).exists()
    static = load_encoder(folder, engine="static", batch_size=8)
    np.testing.assert_allclose(static.encode(texts), dygraph.encode(texts), atol=1e-5)
    assert static.fingerprint == dygraph.fingerprint == load_checkpoint(folder).fingerprint
    files = {path: path.stat().st_mtime_ns for path in (folder / STATIC_FOLDER).rglob("*")}
    static_encoder(folder)
    assert files == {path: path.stat().st_mtime_ns for path in (folder / STATIC_FOLDER).rglob("*")}
    monkeypatch.setattr(encoder_module, "GRAPH_VERSION", encoder_module.GRAPH_VERSION + 1)
    static_encoder(folder)
    assert len(list((folder / STATIC_FOLDER).iterdir())) == 2
    assert load_checkpoint(folder)  # its manifest doesn't cover the graphs
    assert load_encoder(folder, engine="dygraph", max_seq_length=20).fingerprint != dygraph.fingerprint


def test_vectors_are_in_the_order_of_the_texts(checkpoint: Path) -> None:
    """Whatever the lengths; no texts give no vectors."""
    encoder = load_encoder(checkpoint, batch_size=2)
    texts = ["水稻的产量" * 9, "桥", "论糖尿病影响因素研究糖尿病,影响因素", "水"]
    expected = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(texts, "texts"), expected, atol=1e-6)
    empty = encoder.encode([])
    assert empty.shape == (0, encoder.embedding_size) == (0, 16) and empty.dtype == np.float32


def test_a_damaged_compiled_graph_is_compiled_again(folder: Path) -> None:
    """Into the checkpoint's folder or, if that can't be written, for this run alone."""
    expected = static_encoder(folder).encode(["水稻"])
    (graph,) = (folder / STATIC_FOLDER).rglob(f"{GRAPH_NAME}.json")
    graph.write_text("{}")
    np.testing.assert_array_equal(static_encoder(folder).encode(["水稻"]), expected)
    assert graph.read_text() != "{}"
    shutil.rmtree(folder / STATIC_FOLDER)
    (folder / STATIC_FOLDER).write_text("in the way")
    np.testing.assert_array_equal(static_encoder(folder).encode(["水稻"]), expected)


def test_a_compiled_graph_of_another_user_is_compiled_for_this_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that can neither be read nor written; a root's tests can't make one."""
    expected = static_encoder(folder).encode(["水稻"])
    (graph,) = (folder / STATIC_FOLDER).iterdir()
    is_link, is_file, isfile = Path.is_symlink, Path.is_file, os.path.isfile

    def is_symlink(path: Path) -> bool:
        if path == graph:
            raise PermissionError(13, "Permission denied", str(path))
        return is_link(path)

    monkeypatch.setattr(Path, "is_symlink", is_symlink)
    monkeypatch.setattr(os.path, "isfile", lambda path: Path(path).parent != graph and isfile(path))
    monkeypatch.setattr(Path, "is_file", lambda path: is_symlink(path.parent) or is_file(path))
    capsys.readouterr()
    np.testing.assert_array_equal(static_encoder(folder).encode(["水稻"]), expected)
    assert f"{graph}: can't be written (Permission denied); compiling it for this run alone" in capsys.readouterr().err


def test_a_compiled_graph_that_is_cut_short_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that this run wrote to a full disk, nor one of an earlier run whose manifest agrees with it."""
    export_static = encoder_module.export_static

    def on_a_full_disk(model: SemanticIndexBase, target: Path) -> None:
        export_static(model, target)
        if folder in target.parents:
            os.truncate(target / (GRAPH_NAME + WEIGHTS_SUFFIX), 1000)

    with monkeypatch.context() as patch:
        patch.setattr(encoder_module, "export_static", on_a_full_disk)
        expected = static_encoder(folder).encode(["水稻"])
    assert not list((folder / STATIC_FOLDER).iterdir())

    np.testing.assert_array_equal(static_encoder(folder).encode(["水稻"]), expected)
    (compiled,) = (folder / STATIC_FOLDER).iterdir()
    weights = compiled / (GRAPH_NAME + WEIGHTS_SUFFIX)
    size = weights.stat().st_size
    os.truncate(weights, 1000)
    write_manifest(compiled)
    np.testing.assert_array_equal(static_encoder(folder).encode(["水稻"]), expected)
    assert weights.stat().st_size == size


def test_engine_auto_compiles_for_many_texts_only(folder: Path) -> None:
    load_encoder(folder, text_count=STATIC_FROM_TEXTS - 1)
    assert not (folder / STATIC_FOLDER).exists()
    load_encoder(folder, text_count=STATIC_FROM_TEXTS)
    assert (folder / STATIC_FOLDER).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Precisions


def test_a_precision_that_a_cpu_or_an_engine_lacks_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--precision fp16: a CPU doesn't compute in it"):
        load_encoder(checkpoint, precision="fp16")
    monkeypatch.setattr(engines, "check_precision", lambda *_: None)
    with pytest.raises(InputError, match="--precision bf16: on a CPU only compiled graphs have it"):
        load_encoder(checkpoint, precision="bf16", engine="dygraph")


def test_a_precision_is_compared_with_fp32(checkpoint: Path, recall_data: Path) -> None:
    """Rounded vectors stand in for a precision that this machine may lack."""
    texts = list(read_corpus(recall_data / "corpus.csv"))
    exact = load_encoder(checkpoint, engine="dygraph", batch_size=8)

    def rounded(*tokens: np.ndarray) -> np.ndarray:
        vectors = np.round(exact.embed(*tokens), 1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    same = compare_with_fp32(exact._replace(embed_fp32=exact.embed), TextSample(texts, texts[:50]))
    assert same.recall_vs_fp32 == 1
    assert same.lowest_cosine == pytest.approx(1, abs=1e-5)
    encoder = exact._replace(embed=rounded, embed_fp32=exact.embed)
    coarse = compare_with_fp32(encoder, TextSample(texts, texts[:50]))
    worst = (encoder.encode(texts) * exact.encode(texts)).sum(axis=1).min()
    assert 0.5 < worst < 0.999
    assert coarse.lowest_cosine == pytest.approx(worst, abs=1e-6)
    assert 0.2 < coarse.recall_vs_fp32 < 1
    assert str(coarse).startswith(f"on a sample its vectors have cosines of {worst:.5f} or more with those of fp32")
