"""Speed of Pipeline Serving and of the C++ server beside one process that calls Paddle Inference directly.

Direct: batches of --batch_size texts in file order are tokenized, padded and encoded one after another. Served: as many
clients as a batch has texts each send one text and wait for its vector. Requests are built before the timed part and
answers are compared with the right vectors after it, so that the service is timed rather than Python's protobuf and
JSON. The C++ server's clients send token ids, those of Pipeline Serving send texts.
The ways take turns. The last line is a JSON object; a ratio is served texts/s divided by direct texts/s, and
cpp_vs_pipeline compares the faster way of each.

--search measures search over HTTP instead, see search_over_http.py.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy" / "C++"))

from common.cli import ArgumentParser, number_in_range, run
from common.cpu import cpu_count
from common.errors import InputError
from common.paddle_setup import set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

from base_model import SemanticIndexBase
from batch_negative.batches import batched
from benchmarks.harness import (
    BASE_ERNIE,
    LOWEST_COSINES,
    MAX_SEQ_LENGTH,
    MEDIUM_ERNIE,
    add_input_args,
    benchmark_inputs,
    describe_machine,
)
from benchmarks.load_generator import (
    Measured,
    Served,
    Way,
    check_vector,
    measure_batches,
    measure_service,
    print_table,
    speeds,
    summary,
    take_turns,
)
from benchmarks.search_over_http import DEFAULT_DOCUMENTS, make_index, measure_search
from benchmarks.service_clients import CLIENTS, CPP_CLIENTS, read_metrics, running_cpp_service, running_service
from common.device import set_seed
from data import encode_texts
from encoding.exported_model import load_exported
from encoding.text_encoder import Encoder, TextSample
from export_model import main as export
from export_to_serving import main as export_to_serving
from modeling.checkpoint import create_model, save_checkpoint
from retrieval.saved_index import has_index
from serving.http_routes import DEFAULT_TOP_K

DIRECT = "direct"


def measure_ways(
    served: Served, model: Encoder, serving_bin: Path | None, folder: Path, rounds: int, seconds: float
) -> tuple[dict[str, list[Measured]], dict[str, float]]:
    """(what each way did, ratios): direct, and all clients of the services.

    serving_bin: of the C++ server, which is left out if it is None; folder: for its model.
    """
    texts, clients = served.texts, served.clients
    check = partial(check_vector, texts, served.vectors, precision=model.precision)
    with ExitStack() as stack:
        service = stack.enter_context(running_service(served.model_dir, *served.options))
        ways = {
            way: Way(partial(client, service), check, partial(read_metrics, service)) for way, client in CLIENTS.items()
        }
        if serving_bin:
            folders = [f"--{name}_path={folder}/serving_{name}" for name in ("server", "client")]
            export_to_serving(["--dirname", str(served.model_dir), *folders])
            cpp_service = stack.enter_context(
                running_cpp_service(serving_bin.absolute(), folder / "serving_server", model.tokenizer)
            )
            ways |= {way: Way(partial(client, cpp_service), check, None) for way, client in CPP_CLIENTS.items()}

        def encode(batch: Sequence[str]) -> None:
            model.embed(*model.tokenizer(batch))

        batches = batched(cycle(texts), clients)
        turns = {way: partial(measure_service, ways[way], texts, clients, seconds) for way in ways}
        measured = take_turns({DIRECT: partial(measure_batches, encode, batches, seconds), **turns}, rounds)
    return measured, ratios(speeds(measured))


def ratios(speed: Mapping[str, float]) -> dict[str, float]:
    """Of the texts/s of each way to those of direct; with the C++ server, also of the faster way of each service."""
    compared = {f"{way}_vs_{DIRECT}": round(speed[way] / speed[DIRECT], 3) for way in speed if way != DIRECT}
    if speed.keys() >= CPP_CLIENTS.keys():
        cpp, pipeline = (max(speed[way] for way in ways) for ways in (CPP_CLIENTS, CLIENTS))
        compared |= {"cpp_vs_direct": round(cpp / speed[DIRECT], 3), "cpp_vs_pipeline": round(cpp / pipeline, 3)}
    return compared


def exported_model(model: Path, folder: Path) -> Path:
    """Random weights for a config.json and a vocab.txt, exported."""
    set_seed(0)  # an index that is kept is of the same model in the next run
    created, tokenizer = create_model(SemanticIndexBase, from_scratch=str(model), max_seq_length=MAX_SEQ_LENGTH)
    save_checkpoint(folder / "checkpoint", created, tokenizer)
    export(["--params_path", str(folder / "checkpoint"), "--output_path", str(folder / "output")])
    return folder / "output"


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_input_args(parser)
    parser.add_argument("--model_dir", type=Path, help="exported model to serve (default: base ERNIE, random weights)")
    parser.add_argument("--serving_bin", type=Path, help="also the C++ server: what deploy/C++/build.sh prints")
    parser.add_argument("--batch_size", type=number_in_range(1), default=32, help="texts per batch, and clients")
    parser.add_argument("--threads", type=number_in_range(1), default=cpu_count(), help="CPU threads that encode")
    parser.add_argument(
        "--precision", choices=["fp32", *LOWEST_COSINES], default="fp32", help="int8 is calibrated on the titles"
    )
    parser.add_argument("--texts", type=number_in_range(1), default=512, help="titles to encode, again and again")
    parser.add_argument("--seconds", type=number_in_range(0.1, float), default=20.0, help="of each way in each round")
    parser.add_argument("--rounds", type=number_in_range(1), default=3, help="turns of each way")
    parser.add_argument("--quick", action="store_true", help="a small model (4 layers of 256), 2 rounds of 8 s")
    search = parser.add_argument_group("search")
    search.add_argument("--search", action="store_true", help="search over HTTP beside encoding, and beside hnswlib")
    search.add_argument("--index_dir", type=Path, help="saved index; made if it is missing (default: made, not kept)")
    search.add_argument(
        "--search_documents",
        type=number_in_range(DEFAULT_TOP_K),
        help=f"documents of the index (default: those of a saved one, {DEFAULT_DOCUMENTS} of one that is made)",
    )
    search.add_argument(
        "--hnsw_m", type=number_in_range(2), default=16, help="links per vector of an index that is made"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, and the JSON object."""
    args = build_parser().parse_args(argv)
    if args.search and args.serving_bin:
        raise InputError("--search: the C++ server doesn't search; leave --serving_bin out")
    if args.precision != "fp32" and (args.search or args.serving_bin):
        raise InputError(f"--precision {args.precision}: only Pipeline Serving is measured in it; leave it out")
    rounds, seconds, sizes = (2, 8.0, MEDIUM_ERNIE) if args.quick else (args.rounds, args.seconds, BASE_ERNIE)
    machine = describe_machine()
    with benchmark_inputs(args.train_set_file, args.model, sizes) as inputs:
        texts = [pair.title for pair in inputs.pairs[: args.texts]]
        if len(texts) < args.batch_size:
            raise InputError(f"--batch_size {args.batch_size}: is more than the {len(texts)} texts")
        model_dir = args.model_dir or exported_model(inputs.model, inputs.folder)
        model = load_exported(model_dir, threads=args.threads, precision=args.precision, sample=TextSample(texts))
        vectors = encode_texts(model.embed, texts, model.tokenizer, args.batch_size)
        options = ["--batch_size", str(args.batch_size), "--threads", str(args.threads)]
        options += ["--precision", args.precision, "--min_overlap", "0"]
        served = Served(model_dir, options, texts, vectors, args.batch_size)
        if args.search:
            index_dir = args.index_dir or inputs.folder / "index"
            if not has_index(index_dir):
                make_index(index_dir, model_dir, texts, args.search_documents or DEFAULT_DOCUMENTS, args.hnsw_m)
            measured, compared = measure_search(served, index_dir, args.search_documents, rounds, seconds)
        else:
            measured, compared = measure_ways(served, model, args.serving_bin, inputs.folder, rounds, seconds)
    figures = summary(measured)
    print_table(figures)
    about = {"precision": args.precision, "batch_size": args.batch_size, "threads": args.threads, "machine": machine}
    print(json.dumps({**compared, **figures, **about}))
    return 0


if __name__ == "__main__":
    run(main)
