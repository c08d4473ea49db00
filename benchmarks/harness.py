"""What the benchmarks share: options, inputs, fresh processes, the machine. Imports no Paddle."""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from batch_negative.batches import epoch_batches
from common.cli import number_in_range
from common.cpu import cpu_count, cpu_flags, read_cpuinfo
from common.errors import InputError
from common.files import atomic_write, read_json, write_json
from data import TextPair, read_text_pairs
from examples import make_dataset
from examples.make_tiny_ernie import TINY_ERNIE_CONFIG, write_model_folder
from examples.vocabulary import build_vocabulary
from retrieval.corpus import Corpus, read_corpus

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS_PYTHON = ROOT / ".venv-benchmarks" / "bin" / "python"
EMBEDDING_SIZE = 256
MAX_SEQ_LENGTH = 64
SCALE, MARGIN = 30.0, 0.2  # defaults of train_batch_neg.py
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile")
MEDIUM_ERNIE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 4}
BASE_ERNIE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 513,
}
# PyTorch's threads spin while they wait for each other, which is faster on a quiet machine; on a busy one sleeping is.
# Both are measured, and the faster one is the peer.
SPINNING, SLEEPING = "sentence-transformers", "sentence-transformers, OMP_WAIT_POLICY=PASSIVE"
PASSIVE = ("env", "OMP_WAIT_POLICY=PASSIVE")  # before a command
SAMPLE = 16  # texts whose vectors are compared
# Between a text's vectors in a precision and in fp32; random weights are harder to quantize than trained ones.
LOWEST_COSINES = {"bf16": 0.99, "int8": 0.95}

Result = TypeVar("Result")
Report = TypeVar("Report", bound=NamedTuple)


class Training(NamedTuple):
    """What a trainer's process reports."""

    step_seconds: list[float]
    losses: list[float]
    peak_bytes: int  # largest resident memory of the process
    versions: dict[str, str]


class Encoding(NamedTuple):
    """What an encoder's process reports."""

    pass_seconds: list[float]  # of each pass over all texts
    vectors: list[list[float]]  # of SAMPLE of the texts
    peak_bytes: int
    versions: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# In a trainer's or an encoder's process


def add_trainer_args(parser: argparse.ArgumentParser) -> None:
    """Options that every trainer takes."""
    parser.add_argument("--model", required=True, help="folder with a config.json and a vocab.txt")
    parser.add_argument("--train_set_file", required=True, help="pairs: query<TAB>title a line")
    parser.add_argument("--steps", type=number_in_range(1), required=True, help="training steps")
    parser.add_argument("--batch_size", type=number_in_range(1), default=64, help="pairs a step, on each process")
    parser.add_argument("--learning_rate", type=number_in_range(0.0, float), default=5e-4, help="highest learning rate")
    parser.add_argument("--seed", type=number_in_range(0), default=0, help="seed of the weights, dropout and shuffle")
    parser.add_argument("--report", help="JSON file to write seconds and loss of each step to")


def add_encoder_args(parser: argparse.ArgumentParser) -> None:
    """Options that every encoder takes."""
    parser.add_argument("--model", required=True, help="checkpoint's folder, or the folder that it was exported to")
    parser.add_argument("--corpus_file", required=True, help="texts, one per line")
    parser.add_argument("--batch_size", type=number_in_range(1), default=32, help="texts of full length a batch")
    parser.add_argument("--warm_up", type=number_in_range(1), required=True, help="texts to encode first, untimed")
    parser.add_argument("--passes", type=number_in_range(1), default=1, help="how often all texts are encoded")
    parser.add_argument("--report", required=True, help="JSON file to write the seconds of each pass to")


def timed_steps(step: Callable[[Any], Result], inputs: Iterable[Any]) -> tuple[list[float], list[Result]]:
    """(seconds, results) of the steps; making a step's input counts as part of it."""
    seconds, results = [], []
    start = time.perf_counter()
    for step_input in inputs:
        results.append(step(step_input))
        end = time.perf_counter()
        seconds.append(end - start)
        start = end
    return seconds, results


def measure_encoding(
    encode: Callable[[Sequence[str]], np.ndarray],
    corpus_file: str,
    packages: Sequence[str],
    *,
    warm_up: int,
    passes: int,
) -> Encoding:
    """Encodes the first `warm_up` texts, then all of them `passes` times. encode: gives vectors [N, D] in order."""
    texts = list(read_corpus(corpus_file))
    encode(texts[:warm_up])
    seconds, vectors = timed_steps(encode, [texts] * passes)
    return Encoding(seconds, sample_of(vectors[-1], SAMPLE).tolist(), *used(packages))


def sample_of(rows: Result, count: int) -> Result:
    """`count` rows of an array or sequence, spread evenly; all rows if there are fewer."""
    return rows[:: max(1, len(rows) // count)][:count]


def peak_memory() -> int:
    """Largest resident memory that this program has had, in bytes; getrusage counts that of the starting one, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024


def used(packages: Sequence[str]) -> tuple[int, dict[str, str]]:
    """`peak_memory`, and the versions of the packages."""
    return peak_memory(), {package: version(package) for package in packages}


def write_report(path: str, report: Training | Encoding) -> None:
    """Writes what `run_process` reads."""
    write_json(Path(path), report._asdict())


# ---------------------------------------------------------------------------------------------------------------------
# In a benchmark's process


def add_input_args(parser: argparse.ArgumentParser) -> None:
    """Where the pairs and the model come from."""
    parser.add_argument("--train_set_file", help="pairs: query<TAB>title a line (default: made by examples)")
    parser.add_argument(
        "--model", help="folder with a config.json and a vocab.txt (default: a vocabulary made of the pairs)"
    )


class Inputs(NamedTuple):
    """What all trainers are given."""

    pairs: list[TextPair]
    model: Path
    folder: Path  # for other files that a benchmark writes


@contextmanager
def benchmark_inputs(train_set_file: str | None, model: str | None, sizes: Mapping[str, int]) -> Iterator[Inputs]:
    """Pairs and a model folder, made in a temporary folder if they aren't given.

    sizes: replace those of the example's model. Raises InputError.
    """
    with tempfile.TemporaryDirectory() as name:
        pairs = read_text_pairs(_made_file(name, "train.csv") if train_set_file is None else train_set_file)
        texts = chain.from_iterable((pair.query, pair.title) for pair in pairs)
        yield Inputs(pairs, _given_or_made_model(model, name, texts, sizes), Path(name))


class CorpusInputs(NamedTuple):
    """What all encoders are given."""

    corpus: Corpus
    model: Path
    folder: Path  # for other files that a benchmark writes


@contextmanager
def benchmark_corpus(corpus_file: str | None, model: str | None, sizes: Mapping[str, int]) -> Iterator[CorpusInputs]:
    """A corpus and a model folder, made as `benchmark_inputs` makes them. Raises InputError."""
    with tempfile.TemporaryDirectory() as name:
        corpus = read_corpus(_made_file(name, "corpus.csv") if corpus_file is None else corpus_file)
        yield CorpusInputs(corpus, _given_or_made_model(model, name, corpus, sizes), Path(name))


def _made_file(folder: str, name: str) -> Path:
    """A file of the example's dataset."""
    make_dataset.main(["--output_dir", folder])
    return Path(folder) / "recall" / name


def _given_or_made_model(model: str | None, folder: str, texts: Iterable[str], sizes: Mapping[str, int]) -> Path:
    if model is not None:
        return Path(model)
    made = Path(folder) / "model"
    write_model_folder(made, {**read_json(TINY_ERNIE_CONFIG), **sizes}, build_vocabulary(texts))
    return made


def write_pairs(path: Path, pairs: Sequence[TextPair]) -> Path:
    """Writes queries and titles, a pair a line."""
    with atomic_write(path) as file:
        file.writelines(f"{pair.query}\t{pair.title}\n" for pair in pairs)
    return path


def in_training_order(pairs: Sequence[TextPair], batch_size: int, seed: int) -> list[TextPair]:
    """The pairs in the order of our first epoch, for a trainer that reads them in file order."""
    batches = epoch_batches(len(pairs), batch_size, seed=seed, epoch=1)
    return [pairs[row] for ranks in batches for rows in ranks for row in rows]


def check_benchmarks_python() -> None:
    """Raises InputError if the environment of the peers is missing."""
    if not BENCHMARKS_PYTHON.exists():
        raise InputError(f"{BENCHMARKS_PYTHON.parents[1]}: no such environment; run sh scripts/setup.sh --benchmarks")


def run_checked(command: Sequence[str | Path]) -> None:
    """Runs a fresh process. Raises InputError if it does, and RuntimeError if it fails otherwise."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode == 2 and lines:
        raise InputError(lines[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError("\n".join([f"{' '.join(map(str, command))} failed:", *lines[-30:]]))


def run_process(command: Sequence[str | Path], report: Path, kind: type[Report]) -> Report:
    """What a fresh process reports. Raises as `run_checked`."""
    run_checked([*command, "--report", report])
    return kind(**json.loads(report.read_text(encoding="utf-8")))


def interleaved(
    commands: Mapping[str, Sequence[str | Path]], rounds: int, folder: Path, kind: type[Report]
) -> dict[str, list[Report]]:
    """Runs every command once per round, so that a slow minute of the machine affects all of them."""
    reports: dict[str, list[Report]] = {name: [] for name in commands}
    for number in range(1, rounds + 1):
        for name, command in commands.items():
            reports[name].append(run_process(command, folder / "report.json", kind))
            print(f"round {number} of {rounds}: {name}", file=sys.stderr, flush=True)
    return reports


def median_step_seconds(trainings: Sequence[Training], warm_up: int) -> float:
    """The median over processes of the mean time of a step, which leaves out each one's first `warm_up` steps."""
    return statistics.median(statistics.mean(training.step_seconds[warm_up:]) for training in trainings)


def describe_machine() -> dict[str, Any]:
    """Prints and returns what speed depends on: processor, cores, vector instructions, memory, load."""
    cpuinfo = read_cpuinfo()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in cpuinfo.splitlines())}
    flags = cpu_flags(cpuinfo)
    load = os.getloadavg()[0]
    described = {
        "cpu": fields.get("model name", platform.machine()),
        "cores": cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(load, 2),
        "python": platform.python_version(),
    }
    print(json.dumps(described))
    if load > described["cores"] / 4:
        print("note: other programs are using this machine, so times and rates here are unreliable")
    return described
