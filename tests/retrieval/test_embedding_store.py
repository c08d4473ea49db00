"""The vectors of a corpus on disk: shards, damage, kills, and temporary folders."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ann_util import IndexOptions, build_index
from common.errors import InputError
from common.files import read_json, write_json
from common.vector_dtypes import to_dtype, to_float32
from helpers import ROOT, file_size_limit, flip_a_bit, unit_vectors
from retrieval.embedding_store import (
    METADATA_FILE,
    Embeddings,
    EmbeddingsMetadata,
    stored_vector_dtype,
    temporary_folder,
)

DIM = 8


def metadata(documents: int, **changes: object) -> EmbeddingsMetadata:
    """Of vectors in shards of 10."""
    return EmbeddingsMetadata("model", "fp32", "corpus", documents, DIM, 10)._replace(**changes)


def written(folder: Path, vectors: np.ndarray, **changes: object) -> Embeddings:
    """All of the vectors on disk."""
    stored = Embeddings(folder, metadata(len(vectors), **changes))
    for number, rows in enumerate(stored.shards):
        stored.write(number, vectors[rows])
    return stored


# ---------------------------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.parametrize("count", [1, 9, 10, 11, 35])
def test_embeddings_read_like_an_array(tmp_path: Path, count: int) -> None:
    """Slices within a shard, over several, beyond the end, and empty ones."""
    vectors = unit_vectors(count, DIM)
    stored = written(tmp_path, vectors)
    assert (stored.shape, stored.ndim, len(stored)) == (vectors.shape, 2, count)
    for start in range(0, count + 2, 3):
        for stop in range(0, count + 2, 4):
            np.testing.assert_array_equal(stored[start:stop], vectors[start:stop])


@pytest.mark.parametrize(("vector_dtype", "size"), [("float16", 2), ("int8", 1)])
def test_embeddings_of_less_room_read_like_a_float32_array(tmp_path: Path, vector_dtype: str, size: int) -> None:
    vectors, queries = unit_vectors(25, DIM), unit_vectors(2, DIM, seed=1)
    stored = written(tmp_path, vectors, vector_dtype=vector_dtype)
    expected = to_float32(to_dtype(vectors, vector_dtype))
    assert stored.dtype == vector_dtype and not np.array_equal(expected, vectors)
    for rows in (slice(3, 7), slice(0, 25), slice(8, 21), slice(5, 5)):
        assert stored[rows].dtype == np.float32
        np.testing.assert_array_equal(stored[rows], expected[rows])
    rows = np.array([[0, 24], [11, 3]])
    products = np.einsum("qd,qkd->qk", queries, expected[rows])
    np.testing.assert_allclose(stored.inner_products(queries, rows), products, atol=1e-6)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.npy")) == 3 * 128 + vectors.size * size


def test_embeddings_of_version_2_0_are_float32(tmp_path: Path) -> None:
    """Their description has no type."""
    vectors = unit_vectors(12, DIM)
    written(tmp_path, vectors)
    content = read_json(tmp_path / METADATA_FILE)
    del content["vector_dtype"]
    write_json(tmp_path / METADATA_FILE, content)
    assert stored_vector_dtype(tmp_path) == "float32" and stored_vector_dtype(tmp_path / "new") is None
    np.testing.assert_array_equal(Embeddings(tmp_path, metadata(12))[:], vectors)
    with pytest.raises(InputError, match=r"another vector_dtype \(float32, not int8\)"):
        Embeddings(tmp_path, metadata(12, vector_dtype="int8"))


def test_inner_products_of_rows_in_any_shard(tmp_path: Path) -> None:
    vectors, queries = unit_vectors(35, DIM), unit_vectors(6, DIM, seed=1)
    rows = np.random.default_rng(0).integers(35, size=(6, 9))
    expected = np.einsum("qd,qkd->qk", queries, vectors[rows])
    np.testing.assert_allclose(written(tmp_path, vectors).inner_products(queries, rows), expected, atol=1e-6)


def test_an_index_of_embeddings_equals_the_one_of_the_array(tmp_path: Path) -> None:
    """Both kinds of index read them a block at a time."""
    vectors, queries = unit_vectors(95, DIM), unit_vectors(7, DIM, seed=1)
    for ann in ("exact", "hnswlib"):
        indexes = [build_index(IndexOptions(ann), rows) for rows in (written(tmp_path, vectors), vectors)]
        answers = [index.search(queries, 95) for index in indexes]
        np.testing.assert_array_equal(answers[0][0], answers[1][0])


def test_a_shard_without_its_json_file_counts_as_missing(tmp_path: Path) -> None:
    """A kill can leave the vectors alone."""
    stored = Embeddings(tmp_path, metadata(35))
    assert stored.missing() == [0, 1, 2, 3]
    stored.write(2, unit_vectors(10, DIM))
    stored.write(3, unit_vectors(5, DIM))
    (tmp_path / "embeddings_000003.json").unlink()
    assert Embeddings(tmp_path, metadata(35)).missing() == [0, 1, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "m"), ("corpus", "c"), ("dimension", 9), ("precision", "bf16"), ("vector_dtype", "int8")],
)
def test_embeddings_of_something_else_are_refused(tmp_path: Path, name: str, value: object) -> None:
    """The message names what differs."""
    written(tmp_path, unit_vectors(35, DIM))
    with pytest.raises(InputError, match=f"another {name} .*remove this one"):
        Embeddings(tmp_path, metadata(35, **{name: value}))


@pytest.mark.parametrize(("row", "value"), [(3, np.nan), (4, 0.0)])
def test_rows_other_than_unit_vectors_are_not_stored(tmp_path: Path, row: int, value: float) -> None:
    """The message has the row of the corpus."""
    vectors = unit_vectors(10, DIM)
    vectors[row] = value
    stored = Embeddings(tmp_path, metadata(35))
    with pytest.raises(InputError, match=f"corpus vector {10 + row} "):
        stored.write(1, vectors)
    with pytest.raises(InputError, match=r"\[rows, 8\]"):
        stored.write(1, vectors[:, :4])
    assert [path.name for path in tmp_path.iterdir()] == [METADATA_FILE]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_in_a_shard_is_refused(tmp_path: Path, seed: int) -> None:
    """25 times in each of 4 runs, in any shard."""
    vectors, numbers = unit_vectors(35, DIM), random.Random(seed)
    for attempt in range(25):
        folder = tmp_path / str(attempt)
        written(folder, vectors)
        flip_a_bit(numbers.choice(sorted(folder.glob("*.npy"))), numbers)
        with pytest.raises(InputError, match=r"\.npy: isn't as it was written"):
            build_index(IndexOptions("exact"), Embeddings(folder, metadata(35)))


def test_a_full_disk_leaves_the_shard_missing(tmp_path: Path) -> None:
    stored = Embeddings(tmp_path, metadata(35))
    with file_size_limit(300), pytest.raises(InputError, match=f"^{tmp_path}/embeddings_000000.npy: can't be written"):
        stored.write(0, unit_vectors(10, DIM))
    assert stored.missing() == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [METADATA_FILE]


@pytest.mark.process
@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_kill_at_any_write_of_a_shard_leaves_it_missing(tmp_path: Path, suffix: str) -> None:
    """Nothing half-written counts as a shard."""
    script = (
        "import sys, os, numpy as np\n"
        "from retrieval.embedding_store import Embeddings, EmbeddingsMetadata\n"
        "replace = os.replace\n"
        f"os.replace = lambda a, b: os._exit(9) if str(b).endswith('1.{suffix}') else replace(a, b)\n"
        "vectors = np.eye(8, dtype=np.float32)\n"
        "stored = Embeddings(sys.argv[1], EmbeddingsMetadata('m', 'fp32', 'c', 16, 8, 8))\n"
        "stored.write(0, vectors)\nstored.write(1, vectors)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 9
    stored = Embeddings(tmp_path, EmbeddingsMetadata("m", "fp32", "c", 16, 8, 8))
    assert stored.missing() == [1]
    np.testing.assert_array_equal(stored[:8], np.eye(8))


# ---------------------------------------------------------------------------------------------------------------------
# Temporary folders


def test_a_temporary_folder_is_removed_at_its_end_and_after_a_kill(tmp_path: Path) -> None:
    """While its owner holds the lock, others leave it alone; a folder without a lock file isn't one of ours."""
    foreign = tmp_path / ".embeddings.notes.tmp"
    foreign.mkdir()
    with temporary_folder(tmp_path) as folder, temporary_folder(tmp_path) as other:
        assert sorted(tmp_path.iterdir()) == sorted([foreign, folder, other])
        killed = shutil.copytree(folder, tmp_path / ".embeddings.killed.tmp")  # its lock file isn't locked
        with temporary_folder(tmp_path) as third:
            assert not killed.exists()
            assert sorted(tmp_path.iterdir()) == sorted([foreign, folder, other, third])
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_store_describes_its_vectors(tmp_path: Path) -> None:
    written(tmp_path, unit_vectors(12, DIM))
    assert read_json(tmp_path / METADATA_FILE) == {
        **{"model": "model", "precision": "fp32", "corpus": "corpus"},
        **{"documents": 12, "dimension": DIM, "shard_rows": 10, "vector_dtype": "float32"},
    }
