"""The folder of a saved index: writing, reading, damage, locks, and which model and corpus it fits."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import recall
from ann_util import IndexOptions, build_index
from common.errors import InputError
from common.files import read_json, write_json
from common.manifest import write_manifest
from encoding.encoder import load_encoder
from helpers import file_size_limit, flip_a_bit, unit_vectors, write_pairs
from retrieval.corpus import Corpus, read_corpus
from retrieval.lexical_index import DEFAULT_FUSION, Fusion, LexicalIndex
from retrieval.saved_index import (
    LocalDocumentIndex,
    has_index,
    has_lexical_index,
    load_index,
    locked_index,
    save_fusion,
    save_index,
)

DIM = 8


def corpus_of(folder: Path, count: int) -> Corpus:
    """Documents 文0, 文1, ..."""
    return read_corpus(write_pairs(folder / "corpus.csv", [(f"文{row}",) for row in range(count)]))


def saved_index(
    folder: Path, count: int, ann: str = "hnswlib", has_words: bool = False, vector_dtype: str = "float32"
) -> LocalDocumentIndex:
    """One of random vectors, saved as `index` in the folder."""
    corpus = corpus_of(folder, count)
    index = build_index(IndexOptions(ann, vector_dtype=vector_dtype), unit_vectors(count, DIM))
    saved = LocalDocumentIndex(index, corpus, "model", corpus.sha256)
    lexical = LexicalIndex.build(corpus, count) if has_words else None
    return save_index(folder / "index", replace(saved, lexical=lexical))


@pytest.mark.parametrize(
    ("ann", "vector_dtype"),
    [("hnswlib", "float32"), ("exact", "float32"), ("exact", "float16"), ("exact", "int8"), ("rescored", "int8")],
)
def test_a_saved_index_answers_as_before(tmp_path: Path, ann: str, vector_dtype: str) -> None:
    """Also after documents were added to it; its documents are those in its folder."""
    saved = saved_index(tmp_path, 50, ann, vector_dtype=vector_dtype)
    queries = unit_vectors(5, DIM, seed=1)
    for count in (50, 57):
        loaded = load_index(tmp_path / "index")
        assert type(loaded.index) is type(saved.index)
        assert (loaded.model, loaded.corpus) == ("model", saved.corpus)
        assert list(loaded.documents) == list(saved.documents) == [f"文{row}" for row in range(count)]
        assert saved.documents.path == tmp_path / "index" / "documents.txt"
        for found, expected in zip(loaded.index.search(queries, 10), saved.index.search(queries, 10), strict=True):
            np.testing.assert_array_equal(found, expected)
        loaded.index.add(unit_vectors(7, DIM, seed=2))
        saved = save_index(tmp_path / "index", loaded, [f"文{row}" for row in range(50, 57)])
    assert loaded.corpus != loaded.documents.sha256


def test_an_index_that_recall_py_saved_is_searched_from_python(
    checkpoint: Path, recall_data: Path, tmp_path: Path
) -> None:
    """As the documentation shows it."""
    options = ["--params_path", str(checkpoint), "--corpus_file", str(recall_data / "corpus.csv"), "--device", "cpu"]
    assert recall.main([*options, "--recall_result_dir", str(tmp_path), "--index_dir", str(tmp_path / "index")]) == 0

    encoder = load_encoder(checkpoint)
    saved = load_index(tmp_path / "index")
    ids, cosines = saved.index.search(encoder.encode(["论水稻产量研究水稻,产量"]), k=5)
    assert saved.documents[ids[0][0]] == "论水稻产量研究水稻,产量"
    assert cosines[0][0] == pytest.approx(1, abs=1e-5)
    assert ids.shape == cosines.shape == (1, 5)
    assert (saved.model, list(saved.documents)) == (encoder.fingerprint, list(read_corpus(recall_data / "corpus.csv")))


def test_an_index_whose_replacement_was_interrupted_is_found(tmp_path: Path) -> None:
    assert not has_index(tmp_path / "index")
    saved_index(tmp_path, 3)
    (tmp_path / "index").rename(tmp_path / ".index.replaced")
    assert has_index(tmp_path / "index")
    assert len(load_index(tmp_path / "index").documents) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize(
    ("ann", "has_words", "count"), [("hnswlib", False, 3), ("exact", False, 3), ("exact", True, 7)]
)
def test_a_flipped_bit_is_refused(tmp_path: Path, ann: str, has_words: bool, count: int) -> None:
    """100 times for each kind of index, in any file that is loaded and in the manifest."""
    saved_index(tmp_path, 50, ann, has_words)
    numbers = random.Random(1)
    others = {"manifest.json", "fusion.json"}
    files = sorted(path.name for path in (tmp_path / "index").iterdir() if path.name not in others)
    assert len(files) == count
    for attempt in range(100):
        shutil.copytree(tmp_path / "index", tmp_path / str(attempt))
        flip_a_bit(tmp_path / str(attempt) / numbers.choice(files), numbers)
        with pytest.raises(InputError, match=r"isn't as it was written .*; remove the folder and build the index"):
            load_index(tmp_path / str(attempt))


@pytest.mark.parametrize("missing", ["manifest.json", "index.json", "documents.txt", "hnsw.bin"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    """Before native code reads the index."""
    saved_index(tmp_path, 2)
    (tmp_path / "index" / missing).unlink()
    with pytest.raises(InputError, match=missing):
        load_index(tmp_path / "index")


@pytest.mark.parametrize("changed", [{"ann": "faiss"}, {"dimension": ...}, {"model": ...}])
def test_a_wrong_description_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    """Even if the manifest agrees with it; `...` removes an entry."""
    saved_index(tmp_path, 2, "exact")
    content = {**read_json(tmp_path / "index" / "index.json"), **changed}
    write_json(tmp_path / "index" / "index.json", {key: value for key, value in content.items() if value is not ...})
    write_manifest(tmp_path / "index")
    with pytest.raises(InputError, match=r"index\.json: isn't the description of an index"):
        load_index(tmp_path / "index")


def test_another_number_of_documents_than_vectors_is_refused(tmp_path: Path) -> None:
    saved_index(tmp_path, 3, "exact")
    write_pairs(tmp_path / "index" / "documents.txt", [("文0",), ("文1",)])
    write_manifest(tmp_path / "index")
    with pytest.raises(InputError, match=f"^{tmp_path}/index: has 2 documents and 3 vectors; remove the folder"):
        load_index(tmp_path / "index")


def test_words_of_another_number_of_documents_are_refused(tmp_path: Path) -> None:
    saved_index(tmp_path, 3, "exact", has_words=True)
    content = read_json(tmp_path / "index" / "index.json")
    write_json(tmp_path / "index" / "index.json", {**content, "lexical": {**content["lexical"], "documents": 2}})
    write_manifest(tmp_path / "index")
    with pytest.raises(InputError, match=f"^{tmp_path}/index: has 3 documents and the words of 2; remove the folder"):
        load_index(tmp_path / "index")


@pytest.mark.parametrize(("ann", "limit"), [("hnswlib", 15_000), ("exact", 15_000), ("words", 30_000)])
def test_a_full_disk_leaves_the_earlier_index(tmp_path: Path, ann: str, limit: int) -> None:
    """The limit leaves room for all files but the vectors or, in the last case, the words."""
    saved = saved_index(tmp_path, 500, "exact" if ann == "words" else ann)
    if ann == "words":
        words = LexicalIndex.build([f"{' '.join(map(str, range(20)))} {row}" for row in range(501)], 501)
        saved = replace(saved, lexical=words)
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    saved.index.add(unit_vectors(1, DIM, seed=1))
    with file_size_limit(limit), pytest.raises(InputError, match=f"^{tmp_path}/index.*: can't be written"):
        save_index(tmp_path / "index", saved, ["新"])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.csv", "index"]


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_words_are_saved_with_the_index(tmp_path: Path) -> None:
    """And saved again with it; an index without words, as earlier versions wrote, has none."""
    saved = saved_index(tmp_path, 50, has_words=True)
    for _ in range(2):
        loaded = load_index(tmp_path / "index")
        assert has_lexical_index(tmp_path / "index") and loaded.fusion == DEFAULT_FUSION
        for found, expected in zip(loaded.lexical.search(["文7"], 5), saved.lexical.search(["文7"], 5), strict=True):
            np.testing.assert_array_equal(found, expected)
        saved = save_index(tmp_path / "index", loaded)
    saved_index(tmp_path, 50)
    assert not has_lexical_index(tmp_path / "index") and load_index(tmp_path / "index").lexical is None


def test_words_are_indexed_anew_if_documents_were_added_or_deleted(tmp_path: Path) -> None:
    """Else they are written as they are."""
    saved = saved_index(tmp_path, 10, "exact", has_words=True)
    saved.index.add(unit_vectors(2, DIM, seed=1))
    saved = save_index(tmp_path / "index", saved, ["文10", "新"])
    expected = LexicalIndex.build(saved.documents, 12)
    for lexical in (saved.lexical, load_index(tmp_path / "index").lexical):
        assert lexical.search(["文1", "新"], 12)[0].tolist() == expected.search(["文1", "新"], 12)[0].tolist()
    assert save_index(tmp_path / "index", saved).lexical is saved.lexical
    saved.lexical.delete([11])
    assert saved.lexical.has_changes and not save_index(tmp_path / "index", saved).lexical.has_changes


def test_a_fusion_is_kept_in_an_index(tmp_path: Path) -> None:
    """Also when it is saved again; not while another run changes the index, which would lose it."""
    saved_index(tmp_path, 3, has_words=True)
    save_fusion(tmp_path / "index", Fusion(0.5, 60))
    save_index(tmp_path / "index", load_index(tmp_path / "index"))
    with locked_index(tmp_path / "index"), pytest.raises(InputError, match="another run is changing it"):
        save_fusion(tmp_path / "index", Fusion(1.0, 1))
    assert load_index(tmp_path / "index").fusion == Fusion(0.5, 60)


# ---------------------------------------------------------------------------------------------------------------------
# Locks, and what an index fits


def test_one_run_at_a_time_changes_an_index(tmp_path: Path) -> None:
    """It can be loaded meanwhile."""
    saved_index(tmp_path, 3)
    with locked_index(tmp_path / "index"):
        assert load_index(tmp_path / "index")
        with (
            pytest.raises(InputError, match=f"^{tmp_path}/index: another run is changing it; run this again when"),
            locked_index(tmp_path / "index"),
        ):
            pass
    with locked_index(tmp_path / "index"):
        pass


def test_a_folder_other_than_an_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder: isn't a saved index, .*manifest\.json; give another --index_dir"):
        load_index(tmp_path / "folder")
    with pytest.raises(InputError, match="isn't a saved index"), locked_index(tmp_path / "folder"):
        pass


def test_an_index_fits_its_model_and_its_corpus(tmp_path: Path) -> None:
    """With or without the documents that were added."""
    first = saved_index(tmp_path, 3)
    first.index.add(unit_vectors(1, DIM, seed=1))
    save_index(tmp_path / "index", first, ["文3"])
    for corpus in (corpus_of(tmp_path / "same", 3), corpus_of(tmp_path / "all", 4), None):
        load_index(tmp_path / "index", "model", corpus)
    with pytest.raises(InputError, match=r"another corpus, or .*changed since; add documents with --add_corpus"):
        load_index(tmp_path / "index", "model", corpus_of(tmp_path / "other", 2))
    with pytest.raises(InputError, match=r"another model or --max_seq_length; give the model that it was built with"):
        load_index(tmp_path / "index", "other", None)


def test_vectors_of_another_precision_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index of version 2.0.0 doesn't tell its precision, so nothing is said."""
    corpus = corpus_of(tmp_path, 3)
    index = build_index(IndexOptions("exact"), unit_vectors(3, DIM))
    for saved, precision, line in (
        ("bf16", "fp32", f"--precision fp32: the vectors of {tmp_path / 'index'} were computed in bf16\n"),
        ("bf16", "bf16", ""),
        ("fp32", None, ""),
        (None, "bf16", ""),
    ):
        save_index(tmp_path / "index", LocalDocumentIndex(index, corpus, "model", corpus.sha256, saved))
        capsys.readouterr()
        assert load_index(tmp_path / "index", "model", corpus, precision).precision == saved
        assert capsys.readouterr().err == line
