"""Speed of encoding on a CPU: ours beside the loop of the original scripts, ONNX Runtime, OpenVINO and PyTorch.

Each encodes the same texts with the same weights, in fresh processes that take turns. The last line is a JSON object;
a ratio above 1 means that ours is faster. If the vectors differ, there are no ratios.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.harness import (
    BASE_ERNIE,
    BENCHMARKS_PYTHON,
    LOWEST_COSINES,
    MEDIUM_ERNIE,
    PASSIVE,
    SLEEPING,
    SPINNING,
    CorpusInputs,
    Encoding,
    benchmark_corpus,
    check_benchmarks_python,
    describe_machine,
    interleaved,
    run_checked,
    sample_of,
)
from common.cli import ArgumentParser, number_in_range, run
from common.cpu import has_bf16
from common.errors import InputError
from common.files import atomic_write

FOLDER = Path(__file__).parent
REFERENCE, OURS, DYGRAPH, TWO_RANKS = "reference", "ours", "ours, --engine dygraph", "ours, two ranks"
ONNX_RUNTIME, OPENVINO, OURS_BF16, OPENVINO_BF16 = "ONNX Runtime", "OpenVINO", "ours, bf16", "OpenVINO, bf16"
OURS_INT8, OPENVINO_INT8 = "ours, int8", "OpenVINO, int8"
RATIOS = {  # name -> the row that should be faster, and the other
    "bf16_vs_reference": (OURS_BF16, REFERENCE),
    "bf16_vs_openvino_bf16": (OURS_BF16, OPENVINO_BF16),
    "fp32_vs_onnxruntime": (OURS, ONNX_RUNTIME),
    "two_ranks_vs_one_process": (TWO_RANKS, OURS),
    "int8_vs_bf16": (OURS_INT8, OURS_BF16),
    "int8_vs_fp32": (OURS_INT8, OURS),
    "int8_vs_openvino_int8": (OURS_INT8, OPENVINO_INT8),
}
LARGEST_DIFFERENCE = 1e-4  # of a unit vector's components from ours in fp32
ROW_PRECISIONS = {OURS_BF16: "bf16", OPENVINO_BF16: "bf16", OURS_INT8: "int8", OPENVINO_INT8: "int8"}  # else fp32
# The others are warmed up with all texts, since they prepare each shape of a batch when they first see it. A pass of
# the reference takes long.
REFERENCE_OPTIONS = ("--warm_up", "32", "--passes", "1")


# With ERNIE's 0.02, random weights give all texts nearly the same vector (cosines of 0.98 and more), and a comparison
# in bf16 couldn't fail. With this the cosines are 0.82 to 0.97.
SPREAD = {"initializer_range": 0.1}


class Sizes(NamedTuple):
    """The sizes of one run."""

    model: dict[str, int]
    texts: int
    passes: int  # of each process
    rounds: int


FULL = Sizes(BASE_ERNIE | SPREAD, 512, 1, 3)
QUICK = Sizes(MEDIUM_ERNIE | SPREAD, 512, 2, 1)


def has_openvino() -> bool:
    """Whether `setup.sh --openvino` has installed what int8 needs."""
    return find_spec("openvino") is not None and find_spec("nncf") is not None


def make_encoder(inputs: CorpusInputs, calibration_file: Path | None) -> tuple[Path, Path]:
    """The folders of a checkpoint of random weights, and of its export; both also in int8 with a calibration file."""
    checkpoint, exported = inputs.folder / "checkpoint", inputs.folder / "exported"
    options = ["--model", inputs.model, "--checkpoint", checkpoint, "--exported", exported]
    options += ["--calibration_file", calibration_file] if calibration_file else []
    run_checked([sys.executable, FOLDER / "make_encoder.py", *options])
    return checkpoint, exported


def encoder_commands(
    inputs: CorpusInputs, sizes: Sizes, batch_size: int, with_bf16: bool, with_int8: bool
) -> dict[str, list[str | Path]]:
    """The command of each encoder, for the same texts."""
    corpus_file = inputs.folder / "texts.csv"
    with atomic_write(corpus_file) as file:
        file.writelines(f"{text}\n" for text in sample_of(inputs.corpus, sizes.texts))
    checkpoint, exported = make_encoder(inputs, corpus_file if with_int8 else None)
    common = ["--corpus_file", corpus_file, "--batch_size", str(batch_size)]
    warm = [*common, "--warm_up", str(sizes.texts), "--passes", str(sizes.passes)]
    launch = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", inputs.folder / "log"]
    ours = [FOLDER / "encode_ours.py", "--model", checkpoint, *warm]
    peer = [BENCHMARKS_PYTHON, FOLDER / "encode_peers.py", *warm]
    pytorch = [*peer, "--model", checkpoint, "--peer", "sentence-transformers"]
    commands = {
        REFERENCE: [sys.executable, FOLDER / "encode_reference.py", "--model", checkpoint, *common, *REFERENCE_OPTIONS],
        DYGRAPH: [sys.executable, *ours, "--engine", "dygraph"],
        OURS: [sys.executable, *ours],
        ONNX_RUNTIME: [*peer, "--model", exported, "--peer", "onnxruntime"],
        TWO_RANKS: [sys.executable, *launch, *ours],
        OPENVINO: [*peer, "--model", exported, "--peer", "openvino"],
        SPINNING: pytorch,
        SLEEPING: [*PASSIVE, *pytorch],
    }
    if with_bf16:
        commands[OURS_BF16] = [*commands[OURS], "--precision", "bf16"]
        commands[OPENVINO_BF16] = [*commands[OPENVINO], "--precision", "bf16"]
    if with_int8:
        commands[OURS_INT8] = [*commands[OURS], "--precision", "int8"]
        commands[OPENVINO_INT8] = [*commands[OPENVINO], "--precision", "int8"]
    return commands


def largest_differences(encodings: Mapping[str, Sequence[Encoding]]) -> dict[str, float]:
    """How far the vectors of each row are from ours in fp32. Raises InputError if they aren't the same."""
    expected = np.array(encodings[OURS][0].vectors)
    differences = {}
    for name, rounds in encodings.items():
        vectors = np.array([encoding.vectors for encoding in rounds])
        differences[name] = float(np.abs(vectors - expected).max())
        cosine = float((vectors * expected).sum(axis=-1).min())
        lowest = LOWEST_COSINES.get(ROW_PRECISIONS.get(name, "fp32"))
        is_same = cosine >= lowest if lowest else differences[name] <= LARGEST_DIFFERENCE
        if not is_same:  # NaN too
            distance = f"{differences[name]:.2g} (cosines down to {cosine:.4f})"
            raise InputError(f"{name}: its vectors differ from ours by {distance}, so its speed can't be compared")
    return differences


def summary(encodings: Mapping[str, Sequence[Encoding]], sizes: Sizes) -> dict[str, object]:
    """The ratios, None if a row is missing, and the figures behind them. Raises InputError."""
    differences = largest_differences(encodings)
    passes = {name: [encoding.pass_seconds for encoding in rounds] for name, rounds in encodings.items()}
    seconds = {name: statistics.median(chain.from_iterable(rounds)) for name, rounds in passes.items()}
    return {
        **{
            name: round(seconds[other] / seconds[ours], 3) if {ours, other} <= seconds.keys() else None
            for name, (ours, other) in RATIOS.items()
        },
        "texts_per_second": {name: round(sizes.texts / value, 2) for name, value in seconds.items()},
        "seconds_of_passes": {
            name: [[round(value, 3) for value in one] for one in rounds] for name, rounds in passes.items()
        },
        "largest_difference": {name: float(f"{value:.2g}") for name, value in differences.items()},
        "peak_mib": {
            name: round(max(encoding.peak_bytes for encoding in rounds) / 2**20) for name, rounds in encodings.items()
        },
        "sizes": sizes._asdict(),
        "versions": {k: v for rounds in encodings.values() for k, v in rounds[0].versions.items()},
    }


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus_file", help="texts, one per line (default: made by examples)")
    parser.add_argument(
        "--model", help="folder with a config.json and a vocab.txt (default: a vocabulary made of the texts)"
    )
    parser.add_argument("--batch_size", type=number_in_range(1), default=32, help="texts of full length per batch")
    parser.add_argument(
        "--texts", type=number_in_range(2), help=f"texts, spread over the corpus (default: {FULL.texts})"
    )
    parser.add_argument("--passes", type=number_in_range(1), help=f"timed passes of a process (default: {FULL.passes})")
    parser.add_argument("--rounds", type=number_in_range(1), help=f"processes of each encoder (default: {FULL.rounds})")
    parser.add_argument("--quick", action="store_true", help="a small model, one round of two passes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, and the JSON object."""
    args = build_parser().parse_args(argv)
    check_benchmarks_python()
    chosen = {name: value for name in ("texts", "passes", "rounds") if (value := getattr(args, name))}
    sizes = (QUICK if args.quick else FULL)._replace(**chosen)
    machine = describe_machine()
    with benchmark_corpus(args.corpus_file, args.model, sizes.model) as inputs:
        if len(inputs.corpus) < sizes.texts:
            raise InputError(f"{args.corpus_file}: has {len(inputs.corpus)} texts, fewer than --texts {sizes.texts}")
        commands = encoder_commands(inputs, sizes, args.batch_size, has_bf16(), has_openvino())
        encodings = interleaved(commands, sizes.rounds, inputs.folder, Encoding)
    result = summary(encodings, sizes)
    print(f"{'':48}{'texts/s':>10}{'peak MiB':>10}{'difference':>12}")
    for name in encodings:
        figures = [result[column][name] for column in ("texts_per_second", "peak_mib", "largest_difference")]
        print(f"{name:48}{figures[0]:>10.1f}{figures[1]:>10}{figures[2]:>12.1g}")
    print(json.dumps({**result, "batch_size": args.batch_size, "machine": machine}))
    return 0


if __name__ == "__main__":
    run(main)
