"""Files for Milvus's bulk import, and their import by a real server."""

import os
import re
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

import recall
from ann_util import IndexOptions
from common.errors import InputError
from helpers import unit_vectors
from milvus_helpers import Milvus
from retrieval import milvus_bulk
from retrieval.corpus import Corpus, read_corpus
from retrieval.milvus_bulk import BulkFolder, ImportJobs, bulk_files, import_corpus
from retrieval.milvus_collection import CollectionInfo, document_id
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_place import MilvusOptions, find_place
from retrieval.milvus_server import MilvusServer

DIM, ROWS, RANGE = 16, 3000, 500


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 1,000 documents."""
    monkeypatch.setattr(milvus_bulk, "RANGE_ROWS", RANGE)
    monkeypatch.setattr(milvus_bulk, "FILE_BYTES", 2 * RANGE * 4 * DIM)


@pytest.fixture
def vectors() -> np.ndarray:
    return unit_vectors(ROWS, DIM)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    file = tmp_path / "corpus.csv"
    file.write_text("".join(f"文档 {row}\n" for row in range(ROWS)), encoding="utf-8")
    return read_corpus(file)


@pytest.fixture
def folder(tmp_path: Path) -> BulkFolder:
    (tmp_path / "bulk").mkdir()
    return BulkFolder(tmp_path / "bulk", str(tmp_path / "bulk"))


@pytest.fixture
def server(milvus: Milvus) -> MilvusServer:
    return MilvusServer(milvus.uri, token_file=str(milvus.token_file))


@pytest.fixture
def alias() -> str:
    """A name that no other test uses."""
    return f"test_{uuid.uuid4().hex[:12]}"


def info_of(corpus: str = "c") -> CollectionInfo:
    return CollectionInfo("m" * 64, corpus, "fp32", True, DIM)


def new_index(server: MilvusServer, alias: str) -> MilvusIndex:
    """The collection of a build, also of an interrupted one."""
    return MilvusIndex.create(server, alias, info_of(), IndexOptions(), ROWS)


def assert_has_all(index: MilvusIndex, vectors: np.ndarray, corpus: Corpus) -> None:
    """Every document is found by its own vector, with its own text."""
    index.finish(corpus)
    index.ef = 200
    ids, similarities = index.search(vectors[::50], 1)
    assert ids[:, 0].tolist() == index.ids_of(list(corpus)[::50])
    np.testing.assert_allclose(similarities, 1, atol=1e-5)
    assert [index.documents[each] for each in ids[:, 0].tolist()] == list(corpus)[::50]


def test_files_hold_the_rows_that_insertion_sends(tmp_path: Path, vectors: np.ndarray, corpus: Corpus) -> None:
    files = bulk_files(tmp_path, info_of(), ROWS)
    ids = np.array([document_id(text) for text in corpus])
    assert [len(file) for file in files] == [1000, 1000, 1000] and not files[0].is_complete()
    assert [list(file.write(ids, vectors, corpus)) for file in files] == [[RANGE, RANGE]] * 3
    table = parquet.read_table(files[1].path)
    assert table.column_names == ["id", "text", "vector"]
    assert table["id"].to_pylist() == ids[1000:2000].tolist()
    assert table["text"].to_pylist() == corpus[1000:2000]
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors[1000:2000])
    assert parquet.ParquetFile(files[1].path).num_row_groups == 2
    assert all(file.is_complete() for file in files)


def test_a_file_that_was_damaged_or_interrupted_is_not_complete(
    tmp_path: Path, vectors: np.ndarray, corpus: Corpus
) -> None:
    file = bulk_files(tmp_path, info_of(), ROWS)[0]
    next(file.write(np.zeros(ROWS, np.int64), vectors, corpus))  # a generator that is closed after the first part
    assert not file.is_complete() and not list(tmp_path.glob("*.parquet"))
    list(file.write(np.zeros(ROWS, np.int64), vectors, corpus))
    assert file.is_complete()
    content = bytearray(file.path.read_bytes())
    content[len(content) // 2] ^= 1
    file.path.write_bytes(content)
    assert not file.is_complete()


def test_files_of_another_corpus_have_other_names(tmp_path: Path) -> None:
    first, second = (bulk_files(tmp_path, info_of(corpus), 10)[0].path for corpus in "ab")
    assert first != second and re.fullmatch(r"[0-9a-f]{12}_000000\.parquet", first.name)


def test_a_document_that_is_too_long_is_named_before_a_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "corpus.csv").write_text(f"短\n{'长' * 22_000}\n", encoding="utf-8")
    corpus = read_corpus(tmp_path / "corpus.csv", check_columns=False)
    file = bulk_files(tmp_path, info_of(), 2)[0]
    with pytest.raises(InputError, match=r"document 1 .* has 66000 bytes, and Milvus takes up to 65535"):
        list(file.write(np.zeros(2, np.int64), unit_vectors(2, DIM), corpus))
    assert not list(tmp_path.glob("*.parquet*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"milvus_bulk_dir": "bulk"}, "an embedded Milvus can't import files"),
        ({"milvus_bulk_path": "bulk", "milvus_uri": "http://127.0.0.1:1"}, "give that, too"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_place(MilvusOptions(**options), "milvus", str(tmp_path))


def test_the_server_sees_the_folder_under_its_own_name_or_another() -> None:
    assert MilvusOptions().bulk_folder() is None
    assert MilvusOptions(milvus_bulk_dir="bulk").bulk_folder() == (Path("bulk"), str(Path("bulk").absolute()))
    assert MilvusOptions(milvus_bulk_dir="bulk", milvus_bulk_path="a/b").bulk_folder() == (Path("bulk"), "a/b")


@pytest.mark.milvus
@pytest.mark.server
def test_an_imported_corpus_is_found(
    server: MilvusServer, alias: str, vectors: np.ndarray, corpus: Corpus, folder: BulkFolder
) -> None:
    index = new_index(server, alias)
    import_corpus(index, vectors, corpus, folder)
    assert_has_all(index, vectors, corpus)
    exact = index.search_exactly(vectors[:3], 2)  # with the vectors that are here
    assert exact[0][:, 0].tolist() == index.ids_of(corpus[:3])
    index.publish(alias)
    assert len(MilvusIndex.open(server, alias)) == ROWS


@pytest.mark.milvus
@pytest.mark.server
def test_an_interrupted_import_goes_on(
    server: MilvusServer,
    alias: str,
    vectors: np.ndarray,
    corpus: Corpus,
    folder: BulkFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the server imports meanwhile isn't imported twice, and files that are there aren't written twice."""

    def interrupt(jobs: ImportJobs, job: int, file: milvus_bulk.BulkFile) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(milvus_bulk, "JOBS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(ImportJobs, "_is_done", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_corpus(new_index(server, alias), vectors, corpus, folder)
    written = {file: os.stat(file).st_mtime_ns for file in folder.path.iterdir()}
    assert len(written) == 6
    started: list[str] = []
    start = ImportJobs._start
    monkeypatch.setattr(ImportJobs, "_start", lambda jobs, file: started.append(file.path.name) or start(jobs, file))
    index = new_index(server, alias)
    import_corpus(index, vectors, corpus, folder)
    assert [name[-14:] for name in started] == ["000002.parquet"]
    assert {file: os.stat(file).st_mtime_ns for file in folder.path.iterdir()} == written
    assert_has_all(index, vectors, corpus)


@pytest.mark.milvus
@pytest.mark.server
def test_files_that_the_server_does_not_see_are_copied_by_the_user(
    server: MilvusServer, alias: str, vectors: np.ndarray, corpus: Corpus, folder: BulkFolder, tmp_path: Path
) -> None:
    elsewhere = folder._replace(server_path=str(tmp_path / "elsewhere"))
    with pytest.raises(InputError) as refused:
        import_corpus(new_index(server, alias), vectors, corpus, elsewhere)
    remedy = (
        f"for a bucket `mc mirror {folder.path} ALIAS/BUCKET/bulk`, and run this again with --milvus_bulk_path bulk"
    )
    assert "finds no file" in str(refused.value) and str(refused.value).endswith(remedy)
    shutil.copytree(folder.path, elsewhere.server_path)
    index = new_index(server, alias)
    import_corpus(index, vectors, corpus, elsewhere)
    assert_has_all(index, vectors, corpus)


@pytest.mark.milvus
@pytest.mark.server
def test_an_import_is_not_mixed_with_an_interrupted_insertion(
    server: MilvusServer, alias: str, vectors: np.ndarray, corpus: Corpus, folder: BulkFolder
) -> None:
    """An import doesn't replace documents: those that were sent would be there twice."""
    new_index(server, alias).add(vectors[:10], corpus[:10])
    with pytest.raises(InputError, match=r"has 10 of the 1000 documents of .*; run this without --milvus_bulk_dir"):
        import_corpus(new_index(server, alias), vectors, corpus, folder)
    assert not list(folder.path.iterdir())


@pytest.mark.milvus
@pytest.mark.server
def test_a_file_that_is_not_parquet_is_refused_by_the_server(
    server: MilvusServer, alias: str, corpus: Corpus, folder: BulkFolder
) -> None:
    file = bulk_files(folder.path, info_of(), ROWS)[0]
    file.path.write_bytes(b"no Parquet")
    with pytest.raises(InputError, match=rf"can't import {file.path} \(.+\); look into its log"):
        ImportJobs(new_index(server, alias), folder).run([file])


@pytest.mark.milvus
@pytest.mark.server
def test_recall_finds_the_same_in_an_imported_collection(
    checkpoint: Path, recall_data: Path, server: MilvusServer, alias: str, tmp_path: Path
) -> None:
    found = []
    of_milvus = ["--ann", "milvus", "--milvus_uri", server.uri, "--milvus_token_file", server.token_file]
    bulk = [*of_milvus, "--milvus_collection", alias, "--milvus_bulk_dir", str(tmp_path / "bulk" / "files")]
    for engine in (["--ann", "exact"], bulk):
        files = ["--corpus_file", recall_data / "corpus.csv", "--similar_text_pair_file", recall_data / "dev.csv"]
        options = ["--device", "cpu", "--params_path", checkpoint, "--recall_result_dir", tmp_path, *files, *engine]
        assert recall.main([*map(str, options), "--recall_num", "20"]) == 0
        lines = (tmp_path / "recall_result.txt").read_text(encoding="utf-8").splitlines()
        found.append(sorted(line.split("\t") for line in lines))
    assert len(found[0]) > 20 and [row[:2] for row in found[0]] == [row[:2] for row in found[1]]
    cosines = [[float(row[2]) for row in rows] for rows in found]
    np.testing.assert_allclose(*cosines, atol=1e-5)
    assert len(list((tmp_path / "bulk" / "files").glob("*.parquet"))) == 1
