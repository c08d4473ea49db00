"""Time and memory of encoding and indexing corpora of growing size, with the tiny ERNIE of the example.

The last line is a JSON object; `peak_mb_per_million` is the memory that encoding the largest corpus takes in addition
to the model, scaled to a million documents; `index_memory_ratio` is the memory that indexing takes, divided by the size
of the index.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ann_util import ANN_CHOICES
from benchmarks.harness import describe_machine, run_checked, run_process
from common.cli import ArgumentParser, number_in_range, run
from common.options import add_vector_dtype_arg

FULL_DOCUMENTS, QUICK_DOCUMENTS = [10_000, 100_000, 300_000, 1_000_000], [10_000, 20_000]
VOCABULARY_DOCUMENTS = 6000  # from which the tiny ERNIE's vocabulary is built
MB = 1e6


def make_inputs(folder: Path, documents: int) -> tuple[Path, Path]:
    """A corpus of the example's documents, and a checkpoint of its tiny ERNIE after one step of training."""

    def script(*arguments: str | Path) -> None:
        run_checked([sys.executable, *arguments])

    script("examples/make_dataset.py", "--output_dir", folder, "--documents", str(documents))
    corpus, train_file = folder / "recall" / "corpus.csv", folder / "recall" / "train.csv"
    texts = ["--train_set_file", train_file, "--corpus_file", first_lines(corpus, VOCABULARY_DOCUMENTS)]
    script("examples/make_tiny_ernie.py", *texts, "--output_dir", folder / "ernie")
    options = ["--from_scratch", folder / "ernie", "--train_set_file", train_file, "--save_dir", folder / "checkpoints"]
    script("train_batch_neg.py", *options, "--max_steps", "1", "--max_seq_length", "64", "--pooling", "mean")
    return corpus, folder / "checkpoints" / "model_1"


def first_lines(corpus: Path, count: int) -> Path:
    """A file with the first documents."""
    part = corpus.with_name(f"corpus_{count}.csv")
    with open(corpus, encoding="utf-8") as lines, open(part, "w", encoding="utf-8") as file:
        file.writelines(line for line, _ in zip(lines, range(count), strict=False))
    return part


def measure_size(corpus: Path, checkpoint: Path, documents: int, ann: str, vector_dtype: str) -> dict[str, Any]:
    """Seconds and megabytes of both stages."""
    with tempfile.TemporaryDirectory(dir=corpus.parent) as name:
        options = ["--params_path", checkpoint, "--corpus_file", first_lines(corpus, documents)]
        options += ["--embedding_dir", f"{name}/vectors", "--index_dir", f"{name}/index"]
        options += ["--ann", ann, "--vector_dtype", vector_dtype]
        command = [sys.executable, Path(__file__).parent / "measure_scale.py", *options]
        encode, index = (
            run_process([*command, "--stage", stage], Path(name) / "report.json", dict) for stage in ("encode", "index")
        )
    return {
        "encode_seconds": round(encode["seconds"], 1),
        "documents_per_second": round(documents / encode["seconds"], 1),
        "encode_mb": round(encode["bytes"] / MB, 1),
        "vectors_file_mb": round(encode["vector_bytes"] / MB, 1),
        "index_seconds": round(index["seconds"], 1),
        "index_mb": round(index["bytes"] / MB, 1),
        "index_file_mb": round(index["index_bytes"] / MB, 1),
    }


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--documents", type=number_in_range(1), nargs="+", help=f"corpus sizes (default: {FULL_DOCUMENTS})"
    )
    parser.add_argument("--ann", choices=ANN_CHOICES, default=ANN_CHOICES[0], help="kind of index")
    add_vector_dtype_arg(parser, "type of the vectors on disk and, with --ann exact, in the index")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_DOCUMENTS} documents")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each size, and the JSON object."""
    args = build_parser().parse_args(argv)
    machine = describe_machine()
    sizes = sorted(args.documents or (QUICK_DOCUMENTS if args.quick else FULL_DOCUMENTS))
    measured = {}
    with tempfile.TemporaryDirectory() as name:
        corpus, checkpoint = make_inputs(Path(name), max(sizes[-1], VOCABULARY_DOCUMENTS))
        for documents in sizes:
            measured[str(documents)] = measure_size(corpus, checkpoint, documents, args.ann, args.vector_dtype)
            print(f"{documents:>9} {json.dumps(measured[str(documents)])}", flush=True)
    largest = measured[str(sizes[-1])]
    result = {
        "peak_mb_per_million": round(largest["encode_mb"] * 1_000_000 / sizes[-1], 1),
        "index_memory_ratio": round(largest["index_mb"] / largest["index_file_mb"], 3),
    }
    print(json.dumps({**result, "sizes": measured, "machine": machine}))
    return 0


if __name__ == "__main__":
    run(main)
