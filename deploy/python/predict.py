"""Vectors of texts and similarities of pairs from an exported model, through Paddle Inference or OpenVINO."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser, add_switch, positive_int, run, text_argument
from common.errors import InputError
from common.files import prepare_file, write_json
from common.logs import log
from common.options import (
    EXPORT_ENGINES,
    STATIC_FROM_TEXTS,
    add_device_arg,
    add_encoding_args,
    add_precision_args,
    add_reading_args,
    add_role_arg,
    call,
    pick,
)
from common.paddle_setup import set_up_paddle
from common.texts import DOCUMENT, QUERY
from data import SAMPLE_TEXTS, TextPair, pair_lines, read_texts, write_vectors
from encoding.exported_files import find_exported

if TYPE_CHECKING:
    from encoding.text_encoder import Encoder, TextSample

SAMPLE_PAIRS = (
    TextPair("中西方语言与文化的差异", "中西方文化差异以及语言体现中西方文化,差异,语言体现"),
    TextPair("中西方语言与文化的差异", "飞桨致力于让深度学习技术的创新与应用更简单"),
)
WARM_UP_BATCHES = 5
BENCHMARK_BATCHES, BENCHMARK_SECONDS = 20, 5.0  # a benchmark runs until both are reached
PERCENTILES = (50, 90, 95, 99)
BENCHMARK_FILE = "benchmark.json"


def measure(model: "Encoder", texts: Sequence[str], batch_size: int) -> dict[str, float]:
    """Latency of batches in ms, with tokenizing, and throughput; the texts are repeated to fill a batch."""
    endless = cycle(texts)
    seconds: list[float] = []
    for _ in range(WARM_UP_BATCHES):
        model.embed(*model.tokenizer(list(islice(endless, batch_size))))
    while len(seconds) < BENCHMARK_BATCHES or sum(seconds) < BENCHMARK_SECONDS:
        batch = list(islice(endless, batch_size))
        start = time.perf_counter()
        model.embed(*model.tokenizer(batch))
        seconds.append(time.perf_counter() - start)
    latencies = {f"p{percent}_ms": 1000 * float(np.percentile(seconds, percent)) for percent in PERCENTILES}
    return {"batch_size": batch_size, **latencies, "texts_per_s": len(seconds) * batch_size / sum(seconds)}


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model_dir", default="./output", help="folder that export_model.py wrote")
    text = "a text to turn into a vector; may be given several times"
    parser.add_argument("--text", action="append", type=text_argument, help=text)
    parser.add_argument("--text_file", help="a file of texts to encode, one per line")
    parser.add_argument("--text_pair_file", help="a file of pairs to compare, query<TAB>title a line")
    parser.add_argument("--output", help="write the vectors, float32 [N, D] in the texts' order, to this .npy file")
    add_role_arg(parser)
    add_reading_args(parser)
    add_encoding_args(parser, batch_size=15, length="the exported model's")
    add_device_arg(parser, default=None)
    add_precision_args(parser)
    engine_help = (
        "static: Paddle Inference; auto: the faster of static and openvino, if that is installed, on a CPU from "
        f"{STATIC_FROM_TEXTS} texts on (default: static, and openvino for int8)"
    )
    parser.add_argument("--engine", choices=EXPORT_ENGINES, default="", help=engine_help)
    parser.add_argument("--cpu_threads", type=positive_int, help="threads on the CPU (default: all cores)")
    add_switch(parser, "--enable_mkldnn", True, "compute with oneDNN on the CPU")
    add_switch(parser, "--use_tensorrt", False, "compute with TensorRT on the GPU")
    add_switch(parser, "--benchmark", False, "measure latency and throughput on the texts instead of printing vectors")
    parser.add_argument("--save_log_path", help=f"with --benchmark: folder for its figures, {BENCHMARK_FILE}")
    return parser


def read_inputs(
    text: list[str] | None,
    text_file: str | None,
    text_pair_file: str | None,
    skip_bad_lines: bool = False,
    check_columns: bool = True,
) -> tuple[list[str], list[TextPair | None]]:
    """The texts and the pairs, None for a bad line; the document's samples if there are neither. Raises InputError."""
    texts, reading = text or [], {"skip_bad_lines": skip_bad_lines, "check_columns": check_columns}
    if text_file:
        texts = texts + read_texts(text_file, **reading)
    lines = pair_lines(text_pair_file, **reading, third_column=False) if text_pair_file else ()
    pairs = [line.row for line in lines]
    return (texts, pairs) if texts or pairs else (SAMPLE_TEXTS[:1], [*SAMPLE_PAIRS])


def report_unused_options(
    device: str, cpu_threads: int | None, enable_mkldnn: bool, save_log_path: str | None, benchmark: bool
) -> None:
    """Logs the options that have no effect on this device, or without another option."""
    if save_log_path and not benchmark:
        log(f"--save_log_path {save_log_path}: does nothing without --benchmark")
    if device == "gpu" and (cpu_threads or not enable_mkldnn):
        log("--device gpu: --cpu_threads and --enable_mkldnn have no effect on it")


def sample_of(texts: Sequence[str], pairs: Sequence[TextPair], role: str | None) -> "TextSample":
    """The texts in hand, for calibrating. role: of the texts."""
    from encoding.text_encoder import TextSample

    queries = [pair.query for pair in pairs]
    return TextSample(texts, queries, (role, QUERY)) if texts else TextSample([pair.title for pair in pairs], queries)


def print_results(
    model: "Encoder", texts: Sequence[str], pairs: Sequence[TextPair | None], role: str | None, output: str | None
) -> None:
    """Prints the shape of the texts' vectors, and prints them or writes them to `output`; then the pairs' cosines."""
    from encoding.token_statistics import report_tokens

    queries, titles = [pair.query for pair in pairs if pair], [pair.title for pair in pairs if pair]
    for name, column, its_role in (("texts", texts, role), ("queries", queries, QUERY), ("titles", titles, DOCUMENT)):
        report_tokens(model.tokenizer, {name: column}, its_role)
    if texts:
        vectors = model.encode(texts, "texts", role)
        print(vectors.shape)
        if output:
            write_vectors(output, vectors)
            print(f"wrote {output}")
        else:
            print(vectors)
    if pairs:
        query_vectors = model.encode(queries, "queries", QUERY)
        title_vectors = model.encode(titles, "titles", DOCUMENT)
        cosines = iter((query_vectors * title_vectors).sum(axis=1).tolist())
        print([math.nan if pair is None else next(cosines) for pair in pairs])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints shape and vectors, then the list of similarities, in the document's form; or the benchmark's figures."""
    args = build_parser().parse_args(argv)
    texts, pairs = call(read_inputs, args)
    if args.output and (args.benchmark or not texts):
        why = "with --benchmark" if args.benchmark else "without --text or --text_file"
        raise InputError(f"--output {args.output}: {why} there are no vectors to write; leave it out")
    good_pairs = [pair for pair in pairs if pair is not None]
    calibration_texts = call(read_texts, args, path=args.calibration_file) if args.calibration_file else None

    find_exported(args.model_dir)
    log_file = Path(args.save_log_path) / BENCHMARK_FILE if args.benchmark and args.save_log_path else None
    for file in (log_file, args.output):
        if file:
            prepare_file(file)

    set_up_paddle()
    from common.device import choose_device
    from encoding.exported_model import load_exported

    given: dict[str, Any] = {
        "device": choose_device(args.device),
        "threads": args.cpu_threads,
        "onednn": args.enable_mkldnn,
    }
    given |= {"sample": sample_of(texts, good_pairs, args.role), "calibration_texts": calibration_texts}
    given["text_count"] = len(texts) + 2 * len(good_pairs)
    call(report_unused_options, args, device=given["device"])
    tensorrt_batch_size = args.batch_size if args.use_tensorrt else None
    model = load_exported(**pick(args, load_exported, tensorrt_batch_size=tensorrt_batch_size, **given))
    if model.fidelity:
        log(f"{model.precision}: {model.fidelity}")
    if args.benchmark:
        figures = measure(model, texts or [text for pair in good_pairs for text in pair[:2]], args.batch_size)
        print("\n".join(f"{name}={round(value, 2)}" for name, value in figures.items()))
        if log_file:
            write_json(log_file, figures)
        return 0
    print_results(model, texts, pairs, args.role, args.output)
    return 0


if __name__ == "__main__":
    run(main)
