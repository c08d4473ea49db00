"""Vectors on disk, the saved index, and recall.py over both, with its faults."""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import embeddings
import encoder as encoder_module
import numpy as np
import pytest

import recall
from ann_util import DEFAULT_TARGET_RECALL, HnswIndex, IndexOptions, build_index
from base_model import SemanticIndexBase
from common.errors import InputError
from common.files import read_json
from common.manifest import write_manifest
from data import Corpus, read_corpus
from encoding.encoder import compare_with_fp32, load_encoder
from encoding.exported_files import GRAPH_NAME, WEIGHTS_SUFFIX
from helpers import ROOT, file_size_limit, run_script, write_pairs
from modeling.checkpoint import load_checkpoint, model_fingerprint
from retrieval.embedding_store import Embeddings, EmbeddingsMetadata
from retrieval.pipeline import sample_of
from retrieval.saved_index import SavedIndex, load_index, locked_index, save_index

DIM = 8


def unit_vectors(count: int, seed: int = 0) -> np.ndarray:
    """float32 [count, DIM]."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def description(documents: int, **changes: object) -> EmbeddingsMetadata:
    """Of vectors in shards of 10."""
    return EmbeddingsMetadata("model", "fp32", "corpus", documents, DIM, 10)._replace(**changes)


def written(folder: Path, vectors: np.ndarray) -> Embeddings:
    """All of the vectors on disk."""
    stored = Embeddings(folder, description(len(vectors)))
    for number, rows in enumerate(stored.shards):
        stored.write(number, vectors[rows])
    return stored


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings


@pytest.mark.parametrize("count", [1, 9, 10, 11, 35])
def test_embeddings_read_like_the_array(tmp_path: Path, count: int) -> None:
    """Slices within a shard, over several, beyond the end and of nothing."""
    vectors = unit_vectors(count)
    stored = written(tmp_path, vectors)
    assert (stored.shape, stored.ndim, len(stored)) == (vectors.shape, 2, count)
    for start in range(0, count + 2, 3):
        for stop in range(0, count + 2, 4):
            np.testing.assert_array_equal(stored[start:stop], vectors[start:stop])


def test_an_index_over_embeddings_is_the_one_over_the_array(tmp_path: Path) -> None:
    """Both engines read them a block at a time."""
    vectors, queries = unit_vectors(95), unit_vectors(7, 1)
    for ann in ("exact", "hnswlib"):
        indexes = [build_index(IndexOptions(ann), rows) for rows in (written(tmp_path, vectors), vectors)]
        answers = [index.search(queries, 95) for index in indexes]
        np.testing.assert_array_equal(answers[0][0], answers[1][0])


def test_missing_shards_are_those_without_a_note(tmp_path: Path) -> None:
    """The vectors alone, as a kill leaves them, don't count."""
    stored = Embeddings(tmp_path, description(35))
    assert stored.missing() == [0, 1, 2, 3]
    stored.write(2, unit_vectors(10))
    stored.write(3, unit_vectors(5))
    (tmp_path / "embeddings_000003.json").unlink()
    assert Embeddings(tmp_path, description(35)).missing() == [0, 1, 3]


@pytest.mark.parametrize(("name", "value"), [("model", "m"), ("corpus", "c"), ("dimension", 9), ("precision", "bf16")])
def test_embeddings_of_something_else_are_refused(tmp_path: Path, name: str, value: object) -> None:
    """By the name of what differs."""
    written(tmp_path, unit_vectors(35))
    with pytest.raises(InputError, match=f"another {name} .*remove this one"):
        Embeddings(tmp_path, description(35, **{name: value}))


@pytest.mark.parametrize(("row", "value"), [(3, np.nan), (4, 0.0)])
def test_vectors_that_are_none_are_never_stored(tmp_path: Path, row: int, value: float) -> None:
    """The message has the row of the corpus."""
    vectors = unit_vectors(10)
    vectors[row] = value
    stored = Embeddings(tmp_path, description(35))
    with pytest.raises(InputError, match=f"corpus vector {10 + row} "):
        stored.write(1, vectors)
    with pytest.raises(InputError, match=r"\[rows, 8\]"):
        stored.write(1, vectors[:, :4])
    assert [path.name for path in tmp_path.iterdir()] == [embeddings.DESCRIPTION_FILE]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def flip_a_bit(file: Path, random_numbers: random.Random) -> None:
    """In a random byte."""
    content = bytearray(file.read_bytes())
    content[random_numbers.randrange(len(content))] ^= 1 << random_numbers.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_in_shards_are_refused(tmp_path: Path, seed: int) -> None:
    """25 in each of 4 runs, in any shard."""
    vectors, numbers = unit_vectors(35), random.Random(seed)
    for attempt in range(25):
        folder = tmp_path / str(attempt)
        written(folder, vectors)
        flip_a_bit(numbers.choice(sorted(folder.glob("*.npy"))), numbers)
        with pytest.raises(InputError, match=r"\.npy: isn't as it was written"):
            build_index(IndexOptions("exact"), Embeddings(folder, description(35)))


@pytest.mark.parametrize("ann", ["hnswlib", "exact"])
def test_flipped_bytes_in_a_saved_index_are_refused(tmp_path: Path, ann: str) -> None:
    """100 for each engine, in any file that it loads."""
    corpus = read_corpus(write_pairs(tmp_path / "corpus.csv", [(f"文{row}",) for row in range(50)]))
    saved = SavedIndex(build_index(IndexOptions(ann), unit_vectors(50)), corpus, "model", corpus.sha256)
    save_index(tmp_path / "whole", saved)
    numbers = random.Random(1)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir() if path.name != "manifest.json")
    assert len(files) == 3
    for attempt in range(100):
        shutil.copytree(tmp_path / "whole", tmp_path / str(attempt))
        flip_a_bit(tmp_path / str(attempt) / numbers.choice(files), numbers)
        with pytest.raises(InputError, match="isn't as it was written"):
            load_index(tmp_path / str(attempt))


@pytest.mark.parametrize("missing", ["manifest.json", "index.json", "documents.txt", "hnsw.bin"])
def test_an_index_without_one_of_its_files_is_refused(tmp_path: Path, missing: str) -> None:
    """Before native code looks at it."""
    corpus = read_corpus(write_pairs(tmp_path / "corpus.csv", [("文",), ("字",)]))
    save_index(tmp_path / "i", SavedIndex(build_index(IndexOptions(), unit_vectors(2)), corpus, "m", corpus.sha256))
    (tmp_path / "i" / missing).unlink()
    with pytest.raises(InputError, match=missing):
        load_index(tmp_path / "i")


@pytest.mark.parametrize("ann", ["hnswlib", "exact"])
def test_a_full_disk_leaves_the_index_that_was_there(tmp_path: Path, ann: str) -> None:
    """It has the room for all but the vectors."""
    corpus = read_corpus(write_pairs(tmp_path / "corpus.csv", [(f"文{row}",) for row in range(500)]))
    saved = SavedIndex(build_index(IndexOptions(ann), unit_vectors(500)), corpus, "model", corpus.sha256)
    save_index(tmp_path / "index", saved)
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    saved.index.add(unit_vectors(1, 1))
    message = f"^{tmp_path}/index.*: can't be written"
    with file_size_limit(15_000), pytest.raises(InputError, match=message):
        save_index(tmp_path / "index", saved, ["新"])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.csv", "index"]


# ---------------------------------------------------------------------------------------------------------------------
# The encoder


def test_engines_agree_and_the_compiled_model_is_kept(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second load compiles nothing; another length isn't the same model."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    texts = list(read_corpus(recall_data / "corpus.csv"))
    options = {"batch_size": 8, "text_count": len(texts)}
    dygraph = load_encoder(folder, engine="dygraph", **options)
    assert not (folder / encoder_module.STATIC_FOLDER).exists()
    static = load_encoder(folder, engine="static", **options)
    np.testing.assert_allclose(static(texts), dygraph(texts), atol=1e-5)
    files = {path: path.stat().st_mtime_ns for path in (folder / encoder_module.STATIC_FOLDER).rglob("*")}
    load_encoder(folder, engine="static", **options)
    assert files == {path: path.stat().st_mtime_ns for path in (folder / encoder_module.STATIC_FOLDER).rglob("*")}
    monkeypatch.setattr(encoder_module, "GRAPH_VERSION", encoder_module.GRAPH_VERSION + 1)
    load_encoder(folder, engine="static", **options)  # by its own way to compute, not by the graph that is there
    assert len(list((folder / encoder_module.STATIC_FOLDER).iterdir())) == 2
    assert load_checkpoint(folder)  # its manifest doesn't mind
    assert load_encoder(folder, engine="dygraph", max_seq_length=20, **options).fingerprint != dygraph.fingerprint


def test_a_damaged_or_unwritable_compiled_model_is_made_again(checkpoint: Path, tmp_path: Path) -> None:
    """Beside the checkpoint if it can be, else for this run alone."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    expected = load_encoder(folder, engine="static", batch_size=4, text_count=1)(["水稻"])
    (graph,) = (folder / encoder_module.STATIC_FOLDER).rglob(f"{GRAPH_NAME}.json")
    graph.write_text("{}")
    np.testing.assert_array_equal(load_encoder(folder, engine="static", batch_size=4, text_count=1)(["水稻"]), expected)
    shutil.rmtree(folder / encoder_module.STATIC_FOLDER)
    (folder / encoder_module.STATIC_FOLDER).write_text("in the way")
    np.testing.assert_array_equal(load_encoder(folder, engine="static", batch_size=4, text_count=1)(["水稻"]), expected)


def test_a_compiled_model_cut_short_is_not_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether this run wrote it to a full disk or an earlier one did, with a manifest that agrees."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    export_static = encoder_module.export_static

    def on_a_full_disk(model: SemanticIndexBase, target: Path) -> None:
        export_static(model, target)
        if folder in target.parents:
            os.truncate(target / (GRAPH_NAME + WEIGHTS_SUFFIX), 1000)

    def vectors() -> np.ndarray:
        return load_encoder(folder, engine="static", batch_size=4, text_count=1)(["水稻"])

    with monkeypatch.context() as patch:
        patch.setattr(encoder_module, "export_static", on_a_full_disk)
        expected = vectors()
    assert not list((folder / encoder_module.STATIC_FOLDER).iterdir())

    np.testing.assert_array_equal(vectors(), expected)
    (compiled,) = (folder / encoder_module.STATIC_FOLDER).iterdir()
    weights = compiled / (GRAPH_NAME + WEIGHTS_SUFFIX)
    size = weights.stat().st_size
    os.truncate(weights, 1000)
    write_manifest(compiled)
    np.testing.assert_array_equal(vectors(), expected)
    assert weights.stat().st_size == size


def test_auto_compiles_for_many_texts(checkpoint: Path, tmp_path: Path) -> None:
    """And not for a few."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    load_encoder(folder, batch_size=4, text_count=encoder_module.STATIC_FROM_TEXTS - 1)
    assert not (folder / encoder_module.STATIC_FOLDER).exists()
    load_encoder(folder, batch_size=4, text_count=encoder_module.STATIC_FROM_TEXTS)
    assert (folder / encoder_module.STATIC_FOLDER).exists()


def test_fingerprints_tell_models_apart(checkpoint: Path) -> None:
    """By any weight, and by the settings."""
    model, tokenizer = load_checkpoint(checkpoint)
    first = model_fingerprint(model, tokenizer)
    assert first == model_fingerprint(*load_checkpoint(checkpoint))
    config, model.config = model.config, replace(model.config, pooling="cls")
    assert first != model_fingerprint(model, tokenizer)
    model.config = config
    bias = model.emb_reduce_linear.bias
    bias.set_value(bias + 1e-6)
    assert first != model_fingerprint(model, tokenizer)


def test_a_precision_is_compared_with_fp32(checkpoint: Path, recall_data: Path) -> None:
    """Rounded vectors stand in for a precision that this machine may lack."""
    texts = list(read_corpus(recall_data / "corpus.csv"))
    exact = load_encoder(checkpoint, engine="dygraph", batch_size=8, text_count=1)

    def rounded(*tokens: np.ndarray) -> np.ndarray:
        vectors = np.round(exact.embed(*tokens), 1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    same = compare_with_fp32(exact._replace(embed_fp32=exact.embed), texts, texts[:50])
    assert same.overlap == 1
    assert same.lowest_cosine == pytest.approx(1, abs=1e-5)
    encoder = exact._replace(embed=rounded, embed_fp32=exact.embed)
    coarse = compare_with_fp32(encoder, texts, texts[:50])
    worst = (encoder(texts) * exact(texts)).sum(axis=1).min()
    assert 0.5 < worst < 0.999
    assert coarse.lowest_cosine == pytest.approx(worst, abs=1e-6)
    assert 0.2 < coarse.overlap < 1


# ---------------------------------------------------------------------------------------------------------------------
# recall.py


def options(checkpoint: Path, recall_data: Path, folder: Path, *more: str) -> list[str]:
    """Of a search of the tiny corpus."""
    return [
        *("--device", "cpu", "--params_path", str(checkpoint), "--recall_result_dir", str(folder / "out")),
        *("--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")),
        *("--recall_num", "20", *more),
    ]


def result(folder: Path) -> str:
    """What recall.py wrote."""
    return (folder / "out" / "recall_result.txt").read_text(encoding="utf-8")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 rows, in place of thousands."""
    monkeypatch.setattr(EmbeddingsMetadata.__new__, "__defaults__", (16,))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of the corpus as they are encoded."""
    texts: list[str] = []
    encode_texts = recall.encode_texts

    def spy(embed, rows, *arguments):
        texts.extend(rows)
        return encode_texts(embed, rows, *arguments)

    monkeypatch.setattr(recall, "encode_texts", spy)
    return texts


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_a_second_run_encodes_nothing(
    checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str], ann: str
) -> None:
    """And a run without a shard encodes that one; the result stays the same."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", ann, "--tune_ef", "0")
    assert recall.main(arguments) == 0
    assert not list((tmp_path / "out").glob(".*"))  # without --embedding_dir, no vectors stay
    first, corpus = result(tmp_path), list(read_corpus(recall_data / "corpus.csv"))
    assert encoded == corpus
    kept = [*arguments, "--embedding_dir", str(tmp_path / "vectors")]
    for removed, again in (([], corpus), ([], []), (["000003.json", "000003.npy"], corpus[48:64])):
        for name in removed:
            (tmp_path / "vectors" / f"embeddings_{name}").unlink()
        encoded.clear()
        assert recall.main(kept) == 0
        assert encoded == again
        assert same_hits(result(tmp_path), first)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_a_saved_index_is_searched_without_encoding(
    checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str], ann: str, capsys
) -> None:
    """With the corpus file and without it; ef is as it was tuned."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", ann, "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0
    first, output = result(tmp_path), capsys.readouterr().out
    encoded.clear()
    without_corpus = [
        *arguments[: arguments.index("--corpus_file")],
        *arguments[arguments.index("--corpus_file") + 2 :],
    ]
    for again in (arguments, without_corpus):
        (tmp_path / "out" / "recall_result.txt").unlink()
        assert recall.main(again) == 0
        assert result(tmp_path) == first
        assert output.endswith(capsys.readouterr().out)  # all but the line about writing the index
    assert not encoded


@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_added_documents_are_found(checkpoint: Path, recall_data: Path, tmp_path: Path, ann: str, capsys) -> None:
    """They give what an index of all gives; adding them again is refused; the corpus file still fits."""
    documents = list(read_corpus(recall_data / "corpus.csv"))
    part = write_pairs(tmp_path / "part.csv", [(text,) for text in documents[:100]])
    more = write_pairs(tmp_path / "more.csv", [(text,) for text in documents[90:]])
    assert recall.main(options(checkpoint, recall_data, tmp_path, "--ann", "exact")) == 0
    expected = result(tmp_path)
    index = ["--ann", ann, "--tune_ef", "0", "--index_dir", str(tmp_path / "index")]
    assert recall.main(options(checkpoint, recall_data, tmp_path, *index, "--corpus_file", str(part))) == 0
    assert result(tmp_path) != expected
    capsys.readouterr()
    add = [*options(checkpoint, recall_data, tmp_path, *index, "--corpus_file", str(part)), "--add_corpus", str(more)]
    assert recall.main(add) == 0
    assert "left out 10 documents" in capsys.readouterr().err
    assert same_hits(result(tmp_path), expected)
    with pytest.raises(InputError, match="has all of its documents already"):
        recall.main(add)
    assert recall.main(options(checkpoint, recall_data, tmp_path, *index, "--corpus_file", str(part))) == 0
    assert same_hits(result(tmp_path), expected)


def same_hits(one: str, other: str) -> bool:
    """Whether two results have the same documents, and cosines but for rounding."""
    rows, expected = ([line.split("\t") for line in text.splitlines()] for text in (one, other))
    for table in (rows, expected):
        table.sort()  # of two documents that are nearly as similar, either may come first
    names = [[row[:2] for row in table] for table in (rows, expected)]
    cosines = [[float(row[2]) for row in table] for table in (rows, expected)]
    return names[0] == names[1] and np.allclose(*cosines, atol=1e-5)


def saved_ef(folder: Path) -> int:
    """Of an index."""
    return read_json(folder / "index.json")["ef"]


def test_an_index_keeps_its_ef_or_its_share_when_documents_are_added(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """An `ef` that was given stays; one that was tuned is tuned again, to the same share."""
    shares = []
    monkeypatch.setattr(HnswIndex, "tune_ef", lambda *arguments: shares.append(arguments[-1]))
    index = ["--index_dir", str(tmp_path / "index")]
    texts = iter([f"新的文献{number}" for number in range(9)])

    def search(*more: str) -> int:
        assert recall.main([*options(checkpoint, recall_data, tmp_path), *index, *more]) == 0
        return saved_ef(tmp_path / "index")

    def add(*more: str) -> int:
        return search("--add_corpus", str(write_pairs(tmp_path / "more.csv", [(next(texts),)])), *more)

    assert search("--tune_ef", "0", "--hnsw_ef", "300") == 300
    assert add() == 300
    assert search("--tune_ef", "0", "--hnsw_ef", "77") == 77
    assert "no effect" not in capsys.readouterr().err
    assert add() == 77
    assert not shares
    search("--tune_ef", "0.9")
    add()
    assert shares == [0.9, 0.9]
    index = ["--index_dir", str(tmp_path / "index_2")]
    search()
    add()
    add("--tune_ef", "0.8")
    assert shares[2:] == [DEFAULT_TARGET_RECALL, DEFAULT_TARGET_RECALL, 0.8]


def test_added_documents_never_lower_ef(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where --recall_num, for which it is tuned, is smaller than it was; --tune_ef may."""
    monkeypatch.setattr(HnswIndex, "tune_ef", lambda index, queries, k, share: setattr(index, "ef", 2 * k))
    arguments = [*options(checkpoint, recall_data, tmp_path), "--index_dir", str(tmp_path / "index")]
    for number, (more, ef) in enumerate(
        [(["--recall_num", "30"], 60), (["--recall_num", "5"], 60), (["--recall_num", "40"], 80)]
    ):
        added = ["--add_corpus", str(write_pairs(tmp_path / "more.csv", [(f"新的文献{number}",)]))] if number else []
        assert recall.main([*arguments, *more, *added]) == 0
        assert saved_ef(tmp_path / "index") == ef
    assert recall.main([*arguments, "--recall_num", "5", "--tune_ef", "0.9"]) == 0
    assert saved_ef(tmp_path / "index") == 10


@pytest.mark.parametrize("option", ["--index_dir", "--recall_result_dir", "--recall_result_file"])
def test_a_place_that_cannot_be_written_is_found_before_anything_is_encoded(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(recall, "encode_queries", lambda *_: pytest.fail("encoded"))
    (tmp_path / "file").touch()
    place = tmp_path if option.endswith("file") else tmp_path / "file" / "below"
    with pytest.raises(InputError, match=f"^{tmp_path}.*: can't be written"):
        recall.main([*options(checkpoint, recall_data, tmp_path), option, str(place)])


@pytest.mark.usefixtures("small_shards")
def test_shards_that_another_machine_wrote_elsewhere_are_missed(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with two machines whose folders aren't one: this process encodes its share alone."""
    monkeypatch.setattr(recall, "init_ranks", lambda: (0, 2))
    arguments = options(checkpoint, recall_data, tmp_path, "--embedding_dir", str(tmp_path / "vectors"))
    with pytest.raises(InputError, match=f"^{tmp_path}/vectors: lacks what other processes encoded; all must see"):
        recall.main(arguments)


def test_an_index_that_appears_while_another_is_built_is_not_replaced(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact")
    assert recall.main([*arguments, "--index_dir", str(tmp_path / "other")]) == 0

    def build_late(*values: object) -> object:
        shutil.copytree(tmp_path / "other", tmp_path / "index")
        return build_index(*values)

    monkeypatch.setattr(recall, "build_index", build_late)
    with pytest.raises(InputError, match=f"^{tmp_path}/index: another run has written it meanwhile"):
        recall.main([*arguments, "--index_dir", str(tmp_path / "index")])
    assert load_index(tmp_path / "index")


def test_a_closed_stdin_has_no_queries() -> None:
    assert list(recall.typed_queries(None)) == []


def test_a_corpus_file_with_what_was_added_fits_the_index(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    documents = list(read_corpus(recall_data / "corpus.csv"))
    part = write_pairs(tmp_path / "part.csv", [(text,) for text in documents[:100]])
    more = write_pairs(tmp_path / "more.csv", [(text,) for text in documents[100:]])
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--index_dir", str(tmp_path / "index"))
    assert recall.main([*arguments, "--corpus_file", str(part), "--add_corpus", str(more)]) == 0
    for corpus in (part, recall_data / "corpus.csv"):
        assert recall.main([*arguments, "--corpus_file", str(corpus)]) == 0
    with pytest.raises(InputError, match="was built from another corpus"):
        recall.main([*arguments, "--corpus_file", str(more)])


def test_an_index_that_a_kill_left_beside_its_place_is_searched_and_added_to(
    checkpoint: Path, recall_data: Path, tmp_path: Path
) -> None:
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0
    first, without_corpus = result(tmp_path), arguments.index("--corpus_file")
    del arguments[without_corpus : without_corpus + 2]
    (tmp_path / "index").rename(tmp_path / ".index.replaced")
    assert recall.main(arguments) == 0
    assert result(tmp_path) == first
    more = write_pairs(tmp_path / "more.csv", [("新的文献",)])
    assert recall.main([*arguments, "--add_corpus", str(more)]) == 0
    assert list(load_index(tmp_path / "index").documents)[-1] == "新的文献"


@pytest.mark.parametrize("count", [1, 200, 400, 1000, 12_345])
def test_ef_is_tuned_on_other_queries_than_it_is_judged_by(count: int) -> None:
    judged, tuned = (sample_of(np.arange(count), other=other) for other in (False, True))
    assert min(count, recall.SAMPLE) <= len(judged) <= 2 * recall.SAMPLE
    if count >= 2 * recall.SAMPLE:
        assert not set(judged) & set(tuned)


def test_the_index_is_judged_by_a_sample_of_many_queries() -> None:
    """Each of the sample by its own answer."""
    rng = np.random.default_rng(0)
    vectors, queries = (rng.standard_normal((count, 8), np.float32) for count in (500, 1500))
    vectors, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vectors, queries))
    index = recall.build_index(recall.IndexOptions(ann="exact"), vectors)
    assert recall.search(index, queries, 10).index_overlap == 1


def test_many_added_documents_are_encoded_by_the_static_engine(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    arguments = options(folder, recall_data, tmp_path, "--ann", "exact", "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0
    monkeypatch.setattr("encoder.STATIC_FROM_TEXTS", 50)  # 40 queries
    assert recall.main(arguments) == 0
    assert not (folder / "static").exists()
    more = write_pairs(tmp_path / "more.csv", [(f"新的文献{number}",) for number in range(10)])
    assert recall.main([*arguments, "--add_corpus", str(more)]) == 0
    assert (folder / "static").exists()


def test_of_two_runs_that_change_an_index_one_is_refused(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, while the other is at it; a search isn't, nor what comes afterwards."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0
    files = {name: str(write_pairs(tmp_path / name, [(f"文献{name}",)])) for name in ("one", "other")}

    def save_late(*values: object) -> SavedIndex:
        monkeypatch.undo()
        assert recall.main(arguments) == 0
        for more in (["--add_corpus", files["other"]], ["--tune_ef", "0.9"]):
            with pytest.raises(InputError, match=f"^{tmp_path}/index: another run is changing it"):
                recall.main([*arguments, *more])
        return save_index(*values)

    monkeypatch.setattr(recall, "save_index", save_late)
    assert recall.main([*arguments, "--add_corpus", files["one"]]) == 0
    assert recall.main([*arguments, "--add_corpus", files["other"]]) == 0
    assert list(load_index(tmp_path / "index").documents)[-2:] == ["文献one", "文献other"]


def test_options_of_a_new_index_are_named_where_one_is_saved(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = options(checkpoint, recall_data, tmp_path, "--index_dir", str(tmp_path / "index"))
    of_new_index = ["--hnsw_m", "20", "--hnsw_ef", "50", "--embedding_dir", str(tmp_path / "vectors")]
    for given in (of_new_index, ["--tune_ef", "0.9"]):
        assert recall.main([*arguments, *given]) == 0
        assert "no effect" not in capsys.readouterr().err
    assert recall.main([*arguments, *of_new_index]) == 0
    assert f"{tmp_path / 'index'}: is searched as it was built" in (error := capsys.readouterr().err)
    assert "has no effect: --hnsw_m, --hnsw_ef, --embedding_dir\n" in error


def test_an_index_of_something_else_is_refused(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    """Another corpus, another model, and a folder that is no index."""
    arguments = options(checkpoint, recall_data, tmp_path, "--index_dir", str(tmp_path / "index"))
    recall.main(arguments)
    changed = write_pairs(tmp_path / "corpus.csv", [("新的文献",)])
    with pytest.raises(InputError, match=r"another corpus.*--add_corpus"):
        recall.main([*arguments, "--corpus_file", str(changed)])
    with pytest.raises(InputError, match=r"another model.*--params_path"):
        recall.main([*arguments, "--max_seq_length", "20"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"isn't a saved index.*another --index_dir"):
        recall.main([*arguments, "--index_dir", str(tmp_path / "folder")])
    (tmp_path / "vectors").mkdir()
    with pytest.raises(InputError, match="another corpus"):
        keep = options(checkpoint, recall_data, tmp_path, "--embedding_dir", str(tmp_path / "vectors"))
        recall.main(keep)
        recall.main([*keep, "--corpus_file", str(changed)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index_dir", "none", "--query", "水"], "--corpus_file is needed: --index_dir none isn't there yet"),
        (["--query", "水"], "--corpus_file is needed: there is no --index_dir"),
        (["--corpus_file", "x"], "nothing to search for"),
        (["--corpus_file", "x", "--query", "水", "--add_corpus", "y"], "--add_corpus: give the --index_dir"),
    ],
)
def test_options_that_say_too_little(arguments: list[str], message: str) -> None:
    """Are refused before any file is read."""
    with pytest.raises(InputError, match=message):
        recall.main(["--params_path", "missing", *arguments])


@pytest.mark.parametrize("option", ["--embedding_dir", "--recall_result_dir"])
@pytest.mark.parametrize("place", ["index", "index/below/below", "link/below", "other/../index"])
def test_folders_in_that_of_the_index_are_refused(tmp_path: Path, option: str, place: str) -> None:
    """Before any file is read: writing the index would remove them."""
    (tmp_path / "link").symlink_to(tmp_path / "index")
    arguments = ["--index_dir", str(tmp_path / "index"), "--corpus_file", "missing", "--query", "水"]
    with pytest.raises(InputError, match=f"^{option} .*{place}: lies in --index_dir"):
        recall.main(["--params_path", "missing", *arguments, option, str(tmp_path / place)])


@pytest.mark.parametrize("place", [".", "index_2", "other"])
def test_an_index_may_lie_in_or_beside_the_other_folders(tmp_path: Path, place: str) -> None:
    recall.check_folders(str(tmp_path / "index"), {"--embedding_dir": str(tmp_path / place), "--other": None})


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_precisions_that_a_cpu_lacks(checkpoint: Path, recall_data: Path, tmp_path: Path, precision: str) -> None:
    """Are refused by name."""
    with pytest.raises(InputError, match=f"--precision {precision}"):
        recall.main(options(checkpoint, recall_data, tmp_path, "--precision", precision))


def test_search_by_hand(checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The hits of --query and of each typed line; what is no query is passed over."""
    arguments = [
        *("--device", "cpu", "--params_path", str(checkpoint), "--index_dir", str(tmp_path / "index")),
        *("--recall_num", "3"),
    ]
    recall.main([*arguments, "--corpus_file", str(recall_data / "corpus.csv")])
    capsys.readouterr()
    typed = "土壤的模型\n\n".encode() + "隧道\n".encode("gb18030") + "隧道的评价\r\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8", errors="surrogateescape"))
    recall.main([*arguments, "--query", "水稻的产量", "--query", "论水稻产量研究水稻,产量", "--interactive"])
    output, error = capsys.readouterr()
    lines = output.splitlines()
    assert [line.split(" ")[0] for line in lines[::4]] == [
        "水稻的产量",
        "论水稻产量研究水稻,产量",
        "土壤的模型",
        "隧道的评价",
    ]
    assert all(line.endswith(" ms)") for line in lines[::4])
    assert lines[5] == "  1  1.0000  论水稻产量研究水稻,产量"
    assert "not a query: the line is empty" in error
    assert "not a query: 'utf-8' codec can't decode byte" in error


def test_two_ranks_share_the_encoding_and_find_the_same(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    """With kept vectors and a saved index; the second run, on one process, encodes nothing."""
    arguments = options(checkpoint, recall_data, tmp_path, "--embedding_dir", str(tmp_path / "vectors"))
    alone = options(checkpoint, recall_data, tmp_path / "alone", "--ann", "exact")
    done = run_script("recall.py", *arguments, "--ann", "exact", ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    assert recall.main(alone) == 0
    assert same_hits(result(tmp_path), result(tmp_path / "alone"))
    notes = sorted((tmp_path / "vectors").glob("*.json"))
    before = [note.stat().st_mtime_ns for note in notes]
    assert recall.main(arguments) == 0
    assert before == [note.stat().st_mtime_ns for note in notes]


SLOW_RECALL = """
import sys, time
from common.cli import run
from common.paddle_setup import set_up_paddle
set_up_paddle()
import recall
from retrieval.embedding_store import EmbeddingsMetadata, Embeddings
EmbeddingsMetadata.__new__.__defaults__ = (16,)
write = Embeddings.write
def slow_write(self, number, vectors):
    write(self, number, vectors)
    print(number, flush=True)
    time.sleep(0.5)
Embeddings.write = slow_write
run(recall.main)
"""


def test_a_killed_run_goes_on(checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str]) -> None:
    """Redoing the shard in hand at most; what comes out is as if nothing had happened."""
    exact = ["--ann", "exact", "--embedding_dir"]
    expected = options(checkpoint, recall_data, tmp_path / "whole", *exact, str(tmp_path / "w"))
    arguments = options(checkpoint, recall_data, tmp_path, *exact, str(tmp_path / "vectors"))
    command = [sys.executable, "-c", SLOW_RECALL, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(4):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not any((tmp_path / "out").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingsMetadata.__new__, "__defaults__", (16,))
        assert recall.main(arguments) == 0
        again = len(encoded)
        assert recall.main(expected) == 0
    corpus = len(read_corpus(recall_data / "corpus.csv"))
    assert corpus - 5 * 16 <= again <= corpus - 4 * 16
    for shard in sorted((tmp_path / "w").glob("*.npy")):
        assert (tmp_path / "vectors" / shard.name).read_bytes() == shard.read_bytes()
    assert result(tmp_path) == result(tmp_path / "whole")


def test_vectors_that_a_killed_run_left_are_removed_by_the_next(
    checkpoint: Path, recall_data: Path, tmp_path: Path
) -> None:
    """Not those of one that still runs, nor what isn't ours."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact")
    out = tmp_path / "out"
    (out / ".embeddings.notes.tmp").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", SLOW_RECALL, *arguments], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        folders = sorted(out.iterdir())
        assert len(folders) == 2
        assert recall.main(arguments) == 0
        assert sorted(out.iterdir()) == [*folders, out / "recall_result.txt"]
        assert process.poll() is None
        process.kill()
    assert recall.main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == [".embeddings.notes.tmp", "recall_result.txt"]


@pytest.mark.parametrize("place", ["npy", "json"])
def test_a_kill_at_any_write_of_a_shard_leaves_it_missing(tmp_path: Path, place: str) -> None:
    """Nothing half-written is taken for a shard."""
    script = (
        "import sys, os, numpy as np, embeddings, files\n"
        "replace = os.replace\n"
        f"os.replace = lambda a, b: os._exit(9) if str(b).endswith('1.{place}') else replace(a, b)\n"
        "vectors = np.eye(8, dtype=np.float32)\n"
        "stored = embeddings.Embeddings(sys.argv[1], embeddings.EmbeddingsMetadata('m', 'fp32', 'c', 16, 8, 8))\n"
        "stored.write(0, vectors)\nstored.write(1, vectors)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 9
    stored = Embeddings(tmp_path, EmbeddingsMetadata("m", "fp32", "c", 16, 8, 8))
    assert stored.missing() == [1]
    np.testing.assert_array_equal(stored[:8], np.eye(8))


def test_a_full_disk_is_one_line(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    """A file size limit stands in for it."""
    arguments = options(checkpoint, recall_data, tmp_path, "--index_dir", str(tmp_path / "index"))
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); sys.dont_write_bytecode = True; "
    limited += "from runtime import run, set_up_paddle; set_up_paddle(); import recall; run(recall.main)"
    done = run_script("-c", limited, *arguments)
    assert done.returncode == 2, done.stderr
    assert "can't be written" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "index").exists()


def test_repeated_documents_and_small_corpora(checkpoint: Path, recall_data: Path, tmp_path: Path, capsys) -> None:
    """More than a few equal documents, which are one, but for a space in this place; more hits than documents."""
    documents = [("论水稻产量研究水稻" + " " * spaces + ",产量",) for spaces in range(30)]
    corpus = write_pairs(tmp_path / "corpus.csv", [*documents * 2, ("隧道",)])
    arguments = options(checkpoint, recall_data, tmp_path, "--corpus_file", str(corpus), "--tune_ef", "0")
    assert recall.main(arguments) == 0
    assert "100.00 % of exact search's top 20" in capsys.readouterr().out
    assert recall.main([*arguments, "--recall_num", "50"]) == 0
    assert "top 31" in capsys.readouterr().out


@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_a_repeated_document_takes_no_other_s_place(
    checkpoint: Path, recall_data: Path, tmp_path: Path, ann: str, capsys
) -> None:
    """The result, and so the metrics, are those of the distinct documents, however often a line comes."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", ann, "--recall_num", "5")
    arguments += ["--tune_ef", "0", "--hnsw_ef", "500"]  # with which hnswlib finds all, however its threads build
    assert recall.main(arguments) == 0
    expected = result(tmp_path)
    documents = list(Corpus(recall_data / "corpus.csv"))
    repeated = write_pairs(tmp_path / "corpus.csv", [(text,) for text in [*documents, *documents[::2] * 6]])
    assert recall.main([*arguments, "--corpus_file", str(repeated), "--index_dir", str(tmp_path / "index")]) == 0
    assert f"{repeated}: left out 504 line(s) of 672 that repeat another one" in capsys.readouterr().err
    assert same_hits(result(tmp_path), expected)
    assert len(load_index(tmp_path / "index").documents) == len(documents)


def test_an_index_is_locked_before_it_is_loaded(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what another run adds in between would be lost."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0

    def load_locked(folder: str) -> SavedIndex:
        with pytest.raises(InputError, match="another run is changing it"), locked_index(folder):
            pass
        return load_index(folder)

    monkeypatch.setattr(recall, "load_index", load_locked)
    assert recall.main([*arguments, "--add_corpus", str(write_pairs(tmp_path / "more.csv", [("新的文献",)]))]) == 0
