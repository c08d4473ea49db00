"""recall.py: its options, what it encodes, writes, keeps and prints, and kills."""

import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
import recall
from common.errors import InputError
from common.texts import DOCUMENT
from data import read_hits
from encoding.encoder import load_encoder
from encoding.engines import FIDELITY_FILE, OPENVINO_FOLDER
from helpers import ROOT, run_script, write_pairs
from retrieval import pipeline
from retrieval.corpus import Corpus, read_corpus
from retrieval.embedding_store import EmbeddingsMetadata
from retrieval.lexical_index import Fusion
from retrieval.live_index import LiveIndex
from retrieval.saved_index import load_index

Capture = pytest.CaptureFixture[str]


def options(checkpoint: Path, recall_data: Path, folder: Path, *more: str) -> list[str]:
    """Options of a search of the tiny corpus."""
    return [
        *("--device", "cpu", "--params_path", str(checkpoint), "--recall_result_dir", str(folder / "out")),
        *("--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")),
        *("--recall_num", "20", *more),
    ]


def result(folder: Path) -> str:
    """What recall.py wrote."""
    return (folder / "out" / "recall_result.txt").read_text(encoding="utf-8")


def same_hits(one: str, other: str) -> bool:
    """Whether two results have the same documents, and the same cosines except for rounding."""
    rows, expected = ([line.split("\t") for line in text.splitlines()] for text in (one, other))
    for table in (rows, expected):
        table.sort()  # of two nearly equal documents either may come first
    names = [[row[:2] for row in table] for table in (rows, expected)]
    cosines = [[float(row[2]) for row in table] for table in (rows, expected)]
    return names[0] == names[1] and np.allclose(*cosines, atol=1e-5)


def without(arguments: list[str], option: str) -> list[str]:
    """The arguments without an option and its value."""
    place = arguments.index(option)
    return [*arguments[:place], *arguments[place + 2 :]]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 16 rows instead of thousands."""
    monkeypatch.setattr(EmbeddingsMetadata.__new__, "__defaults__", (16, "float32"))


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_a_second_run_encodes_nothing(
    checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str], ann: str
) -> None:
    """A run without one of the shards encodes that one; the result stays the same."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", ann, "--target_recall", "0")
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
    checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str], ann: str, capsys: Capture
) -> None:
    """With the corpus file and without it; ef is as it was tuned."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", ann, "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0
    first, output = result(tmp_path), capsys.readouterr().out
    encoded.clear()
    for again in (arguments, without(arguments, "--corpus_file")):
        (tmp_path / "out" / "recall_result.txt").unlink()
        assert recall.main(again) == 0
        assert result(tmp_path) == first
        assert output.endswith(capsys.readouterr().out)  # all but the line about writing the index
    assert not encoded


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("vector_dtype", ["float16", "int8"])
def test_vectors_of_less_room_find_the_same(
    checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str], vector_dtype: str, capsys: Capture
) -> None:
    """The ten best of nearly all queries; shards and index of this type are used again."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact")
    assert recall.main(arguments) == 0
    expected = [line.split("\t")[:2] for line in result(tmp_path).splitlines()]
    vectors, index = tmp_path / "vectors", tmp_path / "index"
    kept = [*arguments, "--vector_dtype", vector_dtype, "--embedding_dir", str(vectors), "--index_dir", str(index)]
    for again in (False, True):
        encoded.clear()
        capsys.readouterr()
        assert recall.main(kept) == 0
        assert encoded == ([] if again else list(read_corpus(recall_data / "corpus.csv")))
        found = [line.split("\t")[:2] for line in result(tmp_path).splitlines()]
        assert sum(hit in expected for hit in found) > 0.97 * len(expected) == 0.97 * len(found)
        out, err = capsys.readouterr()
        assert f"the exact index in {vector_dtype} found 100.00 %" in out
        assert "have no effect: --embedding_dir\n" in err if again else "no effect" not in err
    for file in (*vectors.glob("*.npy"), index / "vectors.npy"):
        assert np.load(file).dtype == vector_dtype
    with pytest.raises(InputError, match=rf"another vector_dtype \({vector_dtype}, not float32\)"):
        recall.main([*arguments, "--embedding_dir", str(vectors)])


@pytest.mark.usefixtures("small_shards")
def test_a_rescored_index_finds_what_float32_does(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Its shards are in float32, so that those that are there are used."""
    kept = ["--embedding_dir", str(tmp_path / "vectors")]
    assert recall.main(options(checkpoint, recall_data, tmp_path, "--ann", "exact", *kept)) == 0
    expected = result(tmp_path)
    kept += ["--ann", "rescored", "--index_dir", str(tmp_path / "index")]
    with pytest.raises(InputError, match="--ann rescored: give the --vector_dtype"):
        recall.main(options(checkpoint, recall_data, tmp_path, *kept))
    for _ in range(2):
        assert recall.main(options(checkpoint, recall_data, tmp_path, *kept, "--vector_dtype", "int8")) == 0
        out, err = capsys.readouterr()
        assert "the index in int8, rescored in float32, found 100.00 % of exact search's top" in out
        assert "more exact" not in err
        assert same_hits(result(tmp_path), expected)


@pytest.mark.usefixtures("small_shards")
def test_more_exact_vectors_that_are_there_are_used(
    checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str], capsys: Capture
) -> None:
    """An index in int8 is made of those in float32, without encoding."""
    kept = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--embedding_dir", str(tmp_path / "vectors"))
    assert recall.main(kept) == 0
    encoded.clear()
    assert recall.main([*kept, "--vector_dtype", "int8", "--index_dir", str(tmp_path / "index")]) == 0
    assert not encoded
    assert f"{tmp_path / 'vectors'}: keeps its vectors in float32, which is more exact than" in capsys.readouterr().err
    assert np.load(tmp_path / "vectors" / "embeddings_000000.npy").dtype == np.float32
    assert np.load(tmp_path / "index" / "vectors.npy").dtype == np.int8


@pytest.mark.parametrize("more", [[], ["--index_dir", "index"]])
def test_a_type_of_vectors_that_nothing_would_have_is_refused(
    checkpoint: Path, recall_data: Path, tmp_path: Path, more: list[str]
) -> None:
    arguments = options(checkpoint, recall_data, tmp_path, "--vector_dtype", "int8", *more)
    with pytest.raises(InputError, match="--ann hnswlib keeps its vectors in float32; use --ann exact, or give"):
        recall.main(arguments)
    milvus = ["--ann", "milvus", "--index_dir", str(tmp_path / "milvus")]
    with pytest.raises(InputError, match=r"--ann milvus keeps .* use --ann exact, an --milvus_index_type that takes"):
        recall.main(options(checkpoint, recall_data, tmp_path, "--vector_dtype", "int8", *milvus))


@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_added_documents_are_found(
    checkpoint: Path, recall_data: Path, tmp_path: Path, ann: str, capsys: Capture
) -> None:
    """The result is that of an index of all; adding them again is refused; the corpus file still fits."""
    documents = list(read_corpus(recall_data / "corpus.csv"))
    part = write_pairs(tmp_path / "part.csv", [(text,) for text in documents[:100]])
    more = write_pairs(tmp_path / "more.csv", [(text,) for text in documents[90:]])
    assert recall.main(options(checkpoint, recall_data, tmp_path, "--ann", "exact")) == 0
    expected = result(tmp_path)
    index = ["--ann", ann, "--target_recall", "0", "--index_dir", str(tmp_path / "index")]
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


@pytest.mark.parametrize("is_compacted", [False, True])
@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_an_index_that_was_changed_while_it_was_open_is_searched_and_added_to(
    checkpoint: Path, recall_data: Path, tmp_path: Path, ann: str, is_compacted: bool, capsys: Capture
) -> None:
    """The result is that of a new index of the documents that are left; what was deleted can be added again."""
    encoder = load_encoder(checkpoint)
    documents = list(read_corpus(recall_data / "corpus.csv"))
    part = str(write_pairs(tmp_path / "part.csv", [(text,) for text in documents[:100]]))
    index = ["--ann", ann, "--target_recall", "0", "--hnsw_ef", "200", "--index_dir", str(tmp_path / "index")]
    assert recall.main(options(checkpoint, recall_data, tmp_path, *index, "--corpus_file", part)) == 0
    live = LiveIndex(tmp_path / "index", encoder.fingerprint, lowercase=encoder.tokenizer.lowercases)
    assert all(live.add(documents[100:130], encoder.encode(documents[100:130], role=DOCUMENT)).is_new)
    assert live.delete([*range(20), 129]) == 21
    live.close(compact=is_compacted)
    left = documents[20:129]
    for added, corpus in (([], left), (documents[15:25], [*left, *documents[15:20]])):
        name = str(write_pairs(tmp_path / "left.csv", [(text,) for text in corpus]))
        assert recall.main([*options(checkpoint, recall_data, tmp_path, "--ann", "exact"), "--corpus_file", name]) == 0
        expected = result(tmp_path)
        capsys.readouterr()
        arguments = options(checkpoint, recall_data, tmp_path, *index[-2:], "--corpus_file", part)
        if added:
            more = str(write_pairs(tmp_path / "more.csv", [(text,) for text in added]))
            assert recall.main([*arguments, "--add_corpus", more]) == 0
            assert f" of {len(corpus)} documents\n" in capsys.readouterr().out
        assert recall.main(arguments) == 0
        assert f"searched {len(corpus)} documents" in capsys.readouterr().out
        assert same_hits(result(tmp_path), expected)
    assert load_index(tmp_path / "index").documents[15:20] == [""] * 5
    assert recall.main([*arguments, "--corpus_file", name]) == 0  # it fits those that are left, too


def test_an_index_without_documents_left_is_one_line(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    """It can be tuned and added to."""
    arguments = options(checkpoint, recall_data, tmp_path, "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0
    with LiveIndex(tmp_path / "index") as live:
        live.delete(range(10**4))
    for more in ([], ["--target_recall", "0.9"]):
        with pytest.raises(InputError, match="the corpus is empty: there is nothing to search"):
            recall.main([*without(arguments, "--corpus_file"), *more])
    added = str(write_pairs(tmp_path / "more.csv", [("新的文献",)]))
    queries = ["--query", "水稻", "--add_corpus", added]
    assert recall.main([*without(without(arguments, "--corpus_file"), "--similar_text_pair"), *queries]) == 0
    assert len(load_index(tmp_path / "index").index.live_ids()) == 1


def test_a_corpus_file_with_or_without_added_documents_fits_the_index(
    checkpoint: Path, recall_data: Path, tmp_path: Path
) -> None:
    """They can be added when the index is built, too."""
    documents = list(read_corpus(recall_data / "corpus.csv"))
    part = write_pairs(tmp_path / "part.csv", [(text,) for text in documents[:100]])
    more = write_pairs(tmp_path / "more.csv", [(text,) for text in documents[100:]])
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--index_dir", str(tmp_path / "index"))
    assert recall.main([*arguments, "--corpus_file", str(part), "--add_corpus", str(more)]) == 0
    for corpus in (part, recall_data / "corpus.csv"):
        assert recall.main([*arguments, "--corpus_file", str(corpus)]) == 0
    with pytest.raises(InputError, match="was built from another corpus"):
        recall.main([*arguments, "--corpus_file", str(more)])


def test_an_index_whose_replacement_was_interrupted_is_searched_and_added_to(
    checkpoint: Path, recall_data: Path, tmp_path: Path
) -> None:
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0
    first, arguments = result(tmp_path), without(arguments, "--corpus_file")
    (tmp_path / "index").rename(tmp_path / ".index.replaced")
    assert recall.main(arguments) == 0
    assert result(tmp_path) == first
    more = write_pairs(tmp_path / "more.csv", [("新的文献",)])
    assert recall.main([*arguments, "--add_corpus", str(more)]) == 0
    assert list(load_index(tmp_path / "index").documents)[-1] == "新的文献"


def test_many_added_documents_are_encoded_by_the_static_engine(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    arguments = options(folder, recall_data, tmp_path, "--ann", "exact", "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0
    monkeypatch.setattr("encoding.encoder.STATIC_FROM_TEXTS", 50)  # 40 queries
    assert recall.main(arguments) == 0
    assert not (folder / "static").exists()
    more = write_pairs(tmp_path / "more.csv", [(f"水稻土壤{number}",) for number in range(10)])
    assert recall.main([*arguments, "--add_corpus", str(more)]) == 0
    assert (folder / "static").exists()


def test_options_of_a_new_index_are_named_if_one_is_saved(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = options(checkpoint, recall_data, tmp_path, "--index_dir", str(tmp_path / "index"))
    of_new_index = ["--hnsw_m", "20", "--hnsw_ef", "50", "--embedding_dir", str(tmp_path / "vectors")]
    for given in (of_new_index, ["--target_recall", "0.9"]):
        assert recall.main([*arguments, *given]) == 0
        assert "no effect" not in capsys.readouterr().err
    assert recall.main([*arguments, *of_new_index]) == 0
    assert f"{tmp_path / 'index'}: is searched as it was built" in (error := capsys.readouterr().err)
    assert "have no effect: --hnsw_m, --hnsw_ef, --embedding_dir\n" in error


def test_an_index_of_something_else_is_refused(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    """Another corpus, another model, and a folder that isn't an index."""
    arguments = options(checkpoint, recall_data, tmp_path, "--index_dir", str(tmp_path / "index"))
    recall.main(arguments)
    changed = write_pairs(tmp_path / "corpus.csv", [("新的文献",)])
    with pytest.raises(InputError, match=r"another corpus.*--add_corpus"):
        recall.main([*arguments, "--corpus_file", str(changed)])
    with pytest.raises(InputError, match=r"another model.*give the model that it was built with"):
        recall.main([*arguments, "--max_seq_length", "20"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"isn't a saved index.*another --index_dir"):
        recall.main([*arguments, "--index_dir", str(tmp_path / "folder")])
    (tmp_path / "vectors").mkdir()
    keep = options(checkpoint, recall_data, tmp_path, "--embedding_dir", str(tmp_path / "vectors"))
    recall.main(keep)
    with pytest.raises(InputError, match="vectors of another corpus"):
        recall.main([*keep, "--corpus_file", str(changed)])


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index_dir", "none", "--query", "水"], "--corpus_file is needed: --index_dir none isn't there yet"),
        (["--query", "水"], "--corpus_file is needed: there is no --index_dir"),
        (["--corpus_file", "x"], "nothing to search for"),
        (["--corpus_file", "x", "--query", "水", "--add_corpus", "y"], "--add_corpus: give the --index_dir"),
    ],
)
def test_too_few_options_are_refused(arguments: list[str], message: str) -> None:
    """Before any file is read."""
    with pytest.raises(InputError, match=message):
        recall.main(["--params_path", "missing", *arguments])


@pytest.mark.parametrize("option", ["--embedding_dir", "--recall_result_dir"])
@pytest.mark.parametrize("place", ["index", "index/below/below", "link/below", "other/../index"])
def test_folders_in_the_folder_of_the_index_are_refused(
    checkpoint: Path, tmp_path: Path, option: str, place: str
) -> None:
    """Before the corpus is read: writing the index would remove them."""
    (tmp_path / "link").symlink_to(tmp_path / "index")
    arguments = ["--index_dir", str(tmp_path / "index"), "--corpus_file", "missing", "--query", "水"]
    with pytest.raises(InputError, match=f"^{option} .*{place}: lies in --index_dir"):
        recall.main(["--params_path", str(checkpoint), *arguments, option, str(tmp_path / place)])


@pytest.mark.parametrize("place", [".", "index_2", "other"])
def test_an_index_may_lie_in_or_beside_the_other_folders(tmp_path: Path, place: str) -> None:
    recall.check_folders(str(tmp_path / "index"), {"--embedding_dir": str(tmp_path / place), "--other": None})


def test_a_precision_that_a_cpu_lacks_is_refused(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--precision fp16"):
        recall.main(options(checkpoint, recall_data, tmp_path, "--precision", "fp16"))


def test_a_corpus_of_one_line_and_texts_longer_than_the_maximum(
    checkpoint: Path, recall_data: Path, tmp_path: Path
) -> None:
    corpus = write_pairs(tmp_path / "corpus.csv", [("水稻" * 5000,)])
    pairs = write_pairs(tmp_path / "pairs.csv", [("水稻" * 3000, "水稻" * 5000)])
    given = ["--corpus_file", str(corpus), "--similar_text_pair", str(pairs), "--recall_num", "50"]
    assert recall.main(options(checkpoint, recall_data, tmp_path, *given)) == 0
    assert len(result(tmp_path).splitlines()) == 1


def test_positives_that_the_corpus_lacks_are_reported(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    corpus = write_pairs(tmp_path / "corpus.csv", [("水稻",), ("玉米",)])
    assert recall.main(options(checkpoint, recall_data, tmp_path, "--corpus_file", str(corpus))) == 0
    assert "lacks 40 titles of the pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "name"), [("--tune_ef", "target_recall"), ("--similar_text_pair", "similar_text_pair_file")]
)
def test_other_names_of_options(old: str, name: str) -> None:
    """The one of version 1.0.0, and the one of the document."""
    for option in (old, f"--{name}"):
        args = recall.build_parser().parse_args(["--params_path", "model", option, "0.9"])
        assert str(getattr(args, name)) == "0.9"


@pytest.mark.parametrize("option", ["--index_dir", "--recall_result_dir", "--recall_result_file"])
def test_a_file_or_folder_that_cannot_be_written_is_found_before_encoding(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(pipeline, "encode_queries", lambda *_: pytest.fail("encoded"))
    (tmp_path / "file").touch()
    place = tmp_path if option.endswith("file") else tmp_path / "file" / "below"
    with pytest.raises(InputError, match=f"^{tmp_path}.*: can't be written"):
        recall.main([*options(checkpoint, recall_data, tmp_path), option, str(place)])


# ---------------------------------------------------------------------------------------------------------------------
# Searching


def test_queries_of_options_and_typed_ones(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The hits are printed; a typed line that can't be a query is reported and skipped."""
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


def test_a_closed_stdin_has_no_queries() -> None:
    assert list(recall.typed_queries(None)) == []


def test_equal_vectors_and_small_corpora(checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: Capture) -> None:
    """Documents that differ in unknown characters have equal vectors; there may be fewer of them than hits wanted."""
    documents = [("论水稻产量研究水稻,产量" + chr(0x3400 + row),) for row in range(30)]
    corpus = write_pairs(tmp_path / "corpus.csv", [*documents * 2, ("隧道",)])
    arguments = options(checkpoint, recall_data, tmp_path, "--corpus_file", str(corpus), "--target_recall", "0")
    assert recall.main(arguments) == 0
    assert "100.00 % of exact search's top 20" in capsys.readouterr().out
    assert recall.main([*arguments, "--recall_num", "50"]) == 0
    assert "top 31" in capsys.readouterr().out


def test_options_without_effect_on_exact_search_are_named(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact")
    assert recall.main([*arguments, "--hnsw_m", "20", "--target_recall", "0.9"]) == 0
    assert "--ann exact: --hnsw_m, --target_recall have no effect on it\n" in capsys.readouterr().err
    assert recall.main(arguments) == 0
    assert "no effect" not in capsys.readouterr().err


@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_a_repeated_document_counts_once(
    checkpoint: Path, recall_data: Path, tmp_path: Path, ann: str, capsys: Capture
) -> None:
    """The result, and so the metrics, are those of the distinct documents."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", ann, "--recall_num", "5")
    arguments += ["--target_recall", "0", "--hnsw_ef", "500"]  # finds all, however the graph is built
    assert recall.main(arguments) == 0
    expected = result(tmp_path)
    documents = list(Corpus(recall_data / "corpus.csv"))
    repeated = write_pairs(tmp_path / "corpus.csv", [(text,) for text in [*documents, *documents[::2] * 6]])
    assert recall.main([*arguments, "--corpus_file", str(repeated), "--index_dir", str(tmp_path / "index")]) == 0
    assert f"{repeated}: left out 504 line(s) of 672 that repeat another one" in capsys.readouterr().err
    assert same_hits(result(tmp_path), expected)
    assert len(load_index(tmp_path / "index").documents) == len(documents)


# ---------------------------------------------------------------------------------------------------------------------
# Words beside vectors


def mrr_at_10(recall_data: Path, folder: Path, capsys: Capture) -> float:
    """As evaluate.py judges the result; it has nothing else to say about it."""
    capsys.readouterr()
    files = ["--similar_text_pair", str(recall_data / "dev.csv"), "--recall_result_file"]
    assert evaluate.main([*files, str(folder / "out" / "recall_result.txt"), "--recall_num", "10"]) == 0
    output, error = capsys.readouterr()
    assert error == ""
    return float(output.split("mrr@10=")[1].split()[0])


def test_words_and_vectors_are_fused_and_judged_like_any_result(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Against the two results of one way each; the untrained model finds less than the words."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--lexical", "bm25")
    hits, recalls = {}, {}
    for mode, k in (("vector", "168"), ("lexical", "168"), ("hybrid", "20")):
        assert recall.main([*arguments, "--mode", mode, "--recall_num", k, "--rrf_k", "60"]) == 0
        recalls[mode] = mrr_at_10(recall_data, tmp_path, capsys)
        hits[mode] = read_hits(tmp_path / "out" / "recall_result.txt")
    assert recalls["vector"] < recalls["hybrid"] <= recalls["lexical"]
    for query, fused in hits["hybrid"].items():
        scores: dict[str, float] = {}
        for mode in ("vector", "lexical"):
            for rank, document in enumerate(hits[mode][query][:100], 1):
                scores[document] = scores.get(document, 0) + 1 / (60 + rank)
        assert len(fused) == 20
        assert [scores[document] for document in fused] == pytest.approx(sorted(scores.values(), reverse=True)[:20])


@pytest.mark.usefixtures("small_shards")
def test_words_are_kept_in_the_index_and_used_without_the_option(
    checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str], capsys: Capture
) -> None:
    """An index that was saved without them gets them, and nothing is encoded again; added documents' words, too."""
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--index_dir", str(tmp_path / "index"))
    assert recall.main(arguments) == 0
    by_vectors = result(tmp_path)
    encoded.clear()
    capsys.readouterr()
    assert recall.main([*arguments, "--lexical", "bm25"]) == 0
    fused, output = result(tmp_path), capsys.readouterr().out
    assert f"wrote {tmp_path / 'index'}: the exact index of 168 documents\n" in output
    assert "found 100.00 % of exact search's top 100; fused with BM25, weight 1, k 10\n" in output
    assert fused != by_vectors
    for more, expected in (((), fused), (("--lexical", "bm25"), fused), (("--mode", "vector"), by_vectors)):
        assert recall.main([*arguments, *more]) == 0
        output, error = capsys.readouterr()
        assert result(tmp_path) == expected
        assert error == "" and "wrote" not in output.replace("wrote " + str(tmp_path / "out"), "")
    assert not encoded
    more = write_pairs(tmp_path / "more.csv", [("编号GB7714的水稻",)])
    assert recall.main([*arguments, "--add_corpus", str(more)]) == 0
    capsys.readouterr()
    assert recall.main([*without(arguments, "--similar_text_pair"), "--mode", "lexical", "--query", "gb7714"]) == 0
    assert [line[4:].split("  ")[1:] for line in capsys.readouterr().out.splitlines()[1:]] == [["编号GB7714的水稻"]]


def test_printed_hits_say_which_way_found_them(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """If both ways are searched."""
    arguments = without(options(checkpoint, recall_data, tmp_path), "--similar_text_pair")
    arguments += ["--lexical", "bm25", "--query", "论水稻产量研究水稻,产量"]
    assert recall.main([*arguments, "--recall_num", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0] == f"  1  {2 / 11:.4f}  both     论水稻产量研究水稻,产量"
    assert {line.split()[2] for line in lines[1:]} == {"vector", "lexical", "both"}
    assert recall.main([*arguments, "--mode", "vector"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  1  1.0000  论水稻产量研究水稻,产量"


def test_a_weight_is_tuned_on_pairs_and_kept_in_the_index(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The best line of the table is what later runs use; a given weight holds for its run alone."""
    index = ["--ann", "exact", "--index_dir", str(tmp_path / "index"), "--lexical", "bm25", "--lexical_weight", "0.1"]
    arguments = options(checkpoint, recall_data, tmp_path, *index)
    assert recall.main(arguments) == 0
    before = mrr_at_10(recall_data, tmp_path, capsys)
    assert load_index(tmp_path / "index").fusion == Fusion(0.1, 10)
    assert recall.main([*arguments, "--tune_lexical_weight", "--recall_num", "10"]) == 0
    output, error = capsys.readouterr()
    assert "--lexical_weight: no effect, since --tune_lexical_weight chooses them\n" in error
    head, *lines = output[: output.index("searched")].splitlines()
    assert head.split() == ["mode", "lexical_weight", "rrf_k", "recall@10", "mrr@10"]
    modes = [line.split()[0] for line in lines]
    assert [modes.count(mode) for mode in ("vector", "lexical", "hybrid")] == [1, 1, 10]
    best = [float(word) for word in lines[modes.index("hybrid")].split()[1:]]
    assert best[3] == pytest.approx(mrr_at_10(recall_data, tmp_path, capsys), abs=0.006)
    assert best[3] == max(float(line.split()[-1]) for line in lines if line.startswith("hybrid"))
    assert best[3] > before
    assert load_index(tmp_path / "index").fusion == Fusion(best[0], int(best[1]))
    for given in (["--rrf_k", "3"], ["--lexical_weight", "0"]):
        assert recall.main([*without(arguments, "--lexical_weight"), *given]) == 0
        assert load_index(tmp_path / "index").fusion == Fusion(best[0], int(best[1]))
        assert f", k {3 if given[0] == '--rrf_k' else int(best[1])}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mode", "hybrid"], "^--mode hybrid: the index has no words; add --lexical bm25$"),
        (["--mode", "lexical"], "^--mode lexical: the index has no words; add --lexical bm25$"),
        (["--tune_lexical_weight"], "^--tune_lexical_weight: only --mode hybrid has a weight; add --lexical bm25$"),
        (["--lexical", "bm25", "--mode", "vector", "--tune_lexical_weight"], "; leave out --mode vector$"),
        (["--lexical", "bm25", "--tune_lexical_weight"], "--tune_lexical_weight: give the --similar_text_pair_file"),
    ],
)
def test_options_that_need_words_or_pairs_are_refused(checkpoint: Path, more: list[str], message: str) -> None:
    """Before the corpus is read."""
    with pytest.raises(InputError, match=message):
        recall.main(["--params_path", str(checkpoint), "--corpus_file", "missing", "--query", "水", *more])


def test_options_of_the_fusion_without_effect_are_named(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = options(checkpoint, recall_data, tmp_path, "--lexical_weight", "1", "--rrf_k", "10")
    assert recall.main(arguments) == 0
    assert "--lexical_weight, --rrf_k: no effect, since the mode is vector\n" in capsys.readouterr().err


@pytest.mark.usefixtures("small_shards")
def test_a_run_that_is_stopped_while_it_indexes_words_encodes_nothing_again(
    checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ["--index_dir", str(tmp_path / "index"), "--embedding_dir", str(tmp_path / "vectors")]
    arguments = options(checkpoint, recall_data, tmp_path, "--ann", "exact", "--lexical", "bm25", *folders)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("retrieval.lexical_index.split_terms", stop)
        with pytest.raises(KeyboardInterrupt):
            recall.main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "vectors"]
    encoded.clear()
    assert recall.main(arguments) == 0
    assert not encoded and load_index(tmp_path / "index").lexical is not None


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.process
def test_two_ranks_share_the_encoding_and_find_the_same(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    """A second run, in one process, encodes nothing."""
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


@pytest.mark.process
def test_two_ranks_build_an_index_without_queries(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    arguments = ["--corpus_file", recall_data / "corpus.csv", "--params_path", checkpoint, "--device", "cpu"]
    arguments += ["--ann", "exact", "--index_dir", tmp_path / "index", "--recall_result_dir", tmp_path / "out"]
    arguments += ["--lexical", "bm25"]
    done = run_script("recall.py", *arguments, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    saved = load_index(tmp_path / "index")
    assert len(saved.documents) == len(saved.lexical) == len(read_corpus(recall_data / "corpus.csv"))


@pytest.mark.openvino
@pytest.mark.process
def test_two_ranks_calibrate_int8_once(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    """A second run, in one process, takes the same graph and finds the same."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns(OPENVINO_FOLDER, "static"))
    more = ("--ann", "exact", "--precision", "int8", "--min_overlap", "0.8")
    arguments = options(model, recall_data, tmp_path, *more)
    done = run_script("recall.py", *arguments, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    logs = "".join(log.read_text(encoding="utf-8") for log in (tmp_path / "log").glob("workerlog.*"))
    assert logs.count("int8: calibrating on") == 1
    (fidelity,) = (model / OPENVINO_FOLDER).glob(f"*/{FIDELITY_FILE}")
    written = fidelity.stat().st_mtime_ns
    assert recall.main(options(model, recall_data, tmp_path / "alone", *more)) == 0
    assert fidelity.stat().st_mtime_ns == written
    assert same_hits(result(tmp_path), result(tmp_path / "alone"))


SLOW_RECALL = """
import time
import recall
from common.cli import run
from retrieval.embedding_store import EmbeddingsMetadata, Embeddings
EmbeddingsMetadata.__new__.__defaults__ = (16, "float32")
write = Embeddings.write
def slow_write(self, number, vectors):
    write(self, number, vectors)
    print(number, flush=True)
    time.sleep(0.5)
Embeddings.write = slow_write
run(recall.main)
"""


@pytest.mark.process
def test_a_killed_run_is_resumed(checkpoint: Path, recall_data: Path, tmp_path: Path, encoded: list[str]) -> None:
    """At most one shard is encoded again; the result is that of an uninterrupted run."""
    exact = ["--ann", "exact", "--embedding_dir"]
    expected = options(checkpoint, recall_data, tmp_path / "whole", *exact, str(tmp_path / "w"))
    arguments = options(checkpoint, recall_data, tmp_path, *exact, str(tmp_path / "vectors"))
    command = [sys.executable, "-c", SLOW_RECALL, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(4)]
        process.send_signal(signal.SIGKILL)
    assert lines == ["0\n", "1\n", "2\n", "3\n"]
    assert not any((tmp_path / "out").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingsMetadata.__new__, "__defaults__", (16, "float32"))
        assert recall.main(arguments) == 0
        again = len(encoded)
        assert recall.main(expected) == 0
    corpus = len(read_corpus(recall_data / "corpus.csv"))
    assert corpus - 5 * 16 <= again <= corpus - 4 * 16
    for shard in sorted((tmp_path / "w").glob("*.npy")):
        assert (tmp_path / "vectors" / shard.name).read_bytes() == shard.read_bytes()
    assert result(tmp_path) == result(tmp_path / "whole")


@pytest.mark.process
def test_vectors_that_a_killed_run_left_are_removed_by_the_next(
    checkpoint: Path, recall_data: Path, tmp_path: Path
) -> None:
    """Those of a run that hasn't ended stay, and so does a folder that isn't ours."""
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


@pytest.mark.process
def test_a_full_disk_is_one_line(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    """A file size limit stands in for it."""
    arguments = options(checkpoint, recall_data, tmp_path, "--index_dir", str(tmp_path / "index"))
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); sys.dont_write_bytecode = True; "
    limited += "import recall; from common.cli import run; run(recall.main)"
    done = run_script("-c", limited, *arguments)
    assert done.returncode == 2, done.stderr
    assert "can't be written" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "index").exists()
