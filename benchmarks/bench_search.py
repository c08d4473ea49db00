"""Building and searching an HNSW index: ours beside bare hnswlib and faiss, and Milvus on demand, at equal recall.

Exact search with each type of vectors, and faiss's HNSW over 8 bits, show what less room costs.

The last line is a JSON object with the ratios of the worst size: build and query rate over bare hnswlib's, and the
share of exact search's hits that recall.py finds at its default setting.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ann_util import ExactIndex
from benchmarks.harness import BENCHMARKS_PYTHON, check_benchmarks_python, describe_machine, run_process
from benchmarks.measure_search import ENGINES, FAISS_ENGINES, MILVUS, TUNED_ON
from common.cli import ArgumentParser, number_in_range, run
from common.errors import InputError
from common.vector_dtypes import to_float32

FOLDER = Path(__file__).parent
DIM, CLUSTERS, SPREAD = 256, 2000, 0.7  # of made vectors, which lie around centres as texts around topics
COPY_SPREAD = 0.3  # of the perturbed copies that extend given vectors to more rows
QUERIES, TOP = 1000, 50
FULL_ROWS, QUICK_ROWS = [100_000, 1_000_000], [10_000]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of norm 1, float32."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def perturbed(vectors: np.ndarray, spread: float, random: np.random.Generator) -> np.ndarray:
    """Unit vectors near the given ones: the noise has `spread` times their norm."""
    noise = random.standard_normal(vectors.shape, dtype=np.float32) / np.sqrt(vectors.shape[1])
    return unit(vectors + spread * noise)


def made_vectors(rows: int, random: np.random.Generator) -> np.ndarray:
    """Unit vectors around random centres, float32 [rows, DIM]."""
    centres = unit(random.standard_normal((CLUSTERS, DIM), dtype=np.float32))
    return perturbed(centres[random.integers(CLUSTERS, size=rows)], SPREAD, random)


def stretched(vectors: np.ndarray, rows: int, random: np.random.Generator) -> np.ndarray:
    """The first `rows` vectors, or all of them and perturbed copies of random ones."""
    if rows <= len(vectors):
        return vectors[:rows]
    copies = vectors[random.integers(len(vectors), size=rows - len(vectors))]
    return np.concatenate([vectors, perturbed(copies, COPY_SPREAD, random)])


def read_vectors(path: str) -> np.ndarray:
    """Vectors of a .npy file, or of all in a folder such as recall.py's --embedding_dir. Raises InputError."""
    files = sorted(Path(path).glob("*.npy")) if Path(path).is_dir() else [Path(path)]
    try:
        return np.concatenate([to_float32(np.load(file, allow_pickle=False)) for file in files])
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no vectors that can be read ({error})") from None


def read_queries(path: str) -> np.ndarray:
    """The first QUERIES vectors of a .npy file, enough to tune the default ef on some and judge it by others."""
    queries = read_vectors(path)[:QUERIES]
    if len(queries) <= TUNED_ON:
        raise InputError(f"--queries {path}: {len(queries)} vectors; give more than the {TUNED_ON} that ef is tuned on")
    return queries


def measure_size(
    vectors: np.ndarray, queries: np.ndarray, rounds: int, target_recall: float, milvus: str | None
) -> dict[str, Any]:
    """Figures of every engine for one size; their processes take turns. milvus: where it is, if it takes part."""
    index = ExactIndex(vectors.shape[1])
    index.add(vectors)
    _, exact = index.search(queries, TOP)
    engines = [*ENGINES, MILVUS] if milvus else ENGINES
    measured: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as name:
        inputs = {"vectors": vectors, "queries": queries, "exact": exact}
        for argument, array in inputs.items():
            np.save(Path(name) / f"{argument}.npy", array)
        files = [part for argument in inputs for part in (f"--{argument}", Path(name) / f"{argument}.npy")]
        for number in range(1, rounds + 1):
            for engine in engines:
                python = BENCHMARKS_PYTHON if engine in FAISS_ENGINES else sys.executable
                command = [python, FOLDER / "measure_search.py", "--engine", engine, *files]
                command += ["--target_recall", str(target_recall)]
                command += ["--milvus", milvus] if milvus and engine == MILVUS else []
                measured[engine].append(run_process(command, Path(name) / "report.json", dict))
                print(f"{len(vectors)} vectors, round {number} of {rounds}: {engine}", file=sys.stderr, flush=True)
    default_recall = round(min(one["default_recall"] for one in measured["ours"]), 4)
    return {**summary(measured, len(vectors), len(queries)), "default_recall": default_recall}


def summary(measured: Mapping[str, Sequence[Mapping[str, Any]]], rows: int, queries: int) -> dict[str, Any]:
    """Medians over the rounds, as vectors and queries a second; the largest memory that was added to the vectors."""
    return {
        engine: {
            "vectors_per_second": round(rows / statistics.median(one["build_seconds"] for one in rounds), 1),
            "queries_per_second": round(
                queries / statistics.median(seconds for one in rounds for seconds in one["search_seconds"]), 1
            ),
            "added_mib": round(max(one["added_bytes"] for one in rounds) / 2**20),
            "ef": [one["ef"] for one in rounds],
            "recall_vs_exact": [round(one["recall_vs_exact"], 4) for one in rounds],
        }
        for engine, rounds in measured.items()
    }


def worst_ratios(sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The ratios of the JSON object, of the size where they are lowest."""

    def ratio(rate: str) -> float:
        return round(min(size["ours"][rate] / size["hnswlib"][rate] for size in sizes.values()), 3)

    return {
        "build_vs_hnswlib": ratio("vectors_per_second"),
        "query_vs_hnswlib": ratio("queries_per_second"),
        "recall_vs_exact": min(size["default_recall"] for size in sizes.values()),
    }


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", help="unit vectors: a .npy file, or a folder of them (default: made)")
    parser.add_argument("--queries", help="unit vectors, a .npy file (default: made, or perturbed vectors)")
    parser.add_argument("--rows", type=number_in_range(1000), nargs="+", help=f"index sizes (default: {FULL_ROWS})")
    parser.add_argument(
        "--target_recall",
        type=number_in_range(0.0, float, 1.0),
        default=0.99,
        help="share of exact search's hits that every engine has to find",
    )
    parser.add_argument("--rounds", type=number_in_range(1), default=3, help="processes of each engine and size")
    milvus_help = (
        "also measure Milvus: the address of a server, or a folder for an embedded one, whose name ends in .db"
    )
    parser.add_argument("--milvus", metavar="URI", help=milvus_help)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} vectors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, and the JSON object."""
    args = build_parser().parse_args(argv)
    check_benchmarks_python()
    machine = describe_machine()
    given = read_vectors(args.vectors) if args.vectors else None
    sizes = {}
    for rows in args.rows or (QUICK_ROWS if args.quick else FULL_ROWS):
        random = np.random.default_rng(0)
        vectors = made_vectors(rows + QUERIES, random) if given is None else stretched(given, rows, random)
        if args.queries:
            queries = read_queries(args.queries)
        elif given is None:
            queries, vectors = vectors[rows:], vectors[:rows]
        else:
            queries = perturbed(vectors[random.integers(rows, size=QUERIES)], COPY_SPREAD, random)
        sizes[str(rows)] = measure_size(vectors, queries, args.rounds, args.target_recall, args.milvus)
        for engine, figures in sizes[str(rows)].items():
            if isinstance(figures, dict):
                print(f"{rows:>9} {engine:13} {json.dumps(figures)}")
    print(json.dumps({**worst_ratios(sizes), "sizes": sizes, "machine": machine}))
    return 0


if __name__ == "__main__":
    run(main)
