"""Serves a model's vectors over gRPC and HTTP with Paddle Serving's Pipeline mode, and searches an index with them.

It runs until SIGTERM or Ctrl-C; SIGHUP takes a new index into service.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser, run
from common.cpu import cpu_count
from common.errors import InputError
from common.signals import Stopped, StopSignals
from encoding.exported_files import exported_tokenizer, find_exported, read_card
from modeling.checkpoint_files import lowercases
from serving.api_keys import read_api_keys
from serving.encoder_process import EncoderOptions, EncoderProcess
from serving.limits import Limits, raise_open_files, service_log
from serving.settings import add_settings_args, check_access, check_ports, milvus_place, read_settings

if TYPE_CHECKING:
    from serving.search import ServedIndex

CONFIG_FILE = Path(__file__).with_name("config_nlp.yml")
WAKE_SECONDS = 0.5
STOP_SECONDS = 25.0  # for requests in progress; Kubernetes kills after 30, Docker Compose after 10


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG_FILE, help="file with all other settings")
    add_settings_args(parser)
    return parser


def open_index(settings: Mapping[str, Any], model: Path) -> "ServedIndex | None":
    """The index of the settings, if any, for an exported model; SIGHUP reloads it. Raises InputError."""
    from retrieval.milvus_index import MAX_K
    from serving.milvus_search import MilvusSearch
    from serving.search import SearchIndex

    place = milvus_place(settings)
    if not (place or settings["index_dir"]):
        return None
    card, length = read_card(model), settings["max_seq_length"]
    if length not in (0, card.max_seq_length):
        problem = f"the index has the vectors of texts that are cut to {card.max_seq_length} tokens"
        raise InputError(f"--max_seq_length {length}: {problem}; leave the option out")
    index: ServedIndex
    if place:
        if settings["max_top_k"] > MAX_K:
            raise InputError(f"--max_top_k {settings['max_top_k']}: Milvus finds up to {MAX_K} documents; give fewer")
        index = MilvusSearch(place, card.fingerprint, settings["precision"], writable=settings["writable"])
    else:
        options = {"writable": settings["writable"], "lowercase": lowercases(model)}
        index = SearchIndex(settings["index_dir"], card.fingerprint, settings["precision"], **options)
    signal.signal(signal.SIGHUP, lambda *_: index.reload_in_background())
    return index


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the addresses when it is ready. Returns 1 if a stop left requests unanswered."""
    args = vars(build_parser().parse_args(argv))
    settings = read_settings(args, os.environ, args["config"])
    check_ports(settings)
    check_access(settings)
    keys = read_api_keys(settings["api_key_file"]) if settings["api_key_file"] else None
    model = find_exported(settings["model_dir"])
    # Imported here, so that a missing Paddle Serving is reported in one line.
    from serving.adapter import PipelineService, ServiceOptions
    from serving.http_gateway import OTHER_CONNECTIONS, HttpGateway
    from serving.http_routes import PREDICTION_PATH

    raise_open_files(settings["max_requests"] + OTHER_CONNECTIONS)  # the HTTP port's, which are more than gRPC's
    host = settings["host"]
    limits = Limits(*(settings[f"max_{name}"] for name in Limits._fields))
    encoder_options = EncoderOptions(*(settings[name] for name in EncoderOptions._fields))._replace(
        model_dir=str(Path(settings["model_dir"]).absolute()),
        threads=settings["threads"] or max(1, cpu_count() // settings["workers"]),
        max_seq_length=settings["max_seq_length"] or None,
    )
    index = open_index(settings, model)
    tokenizer = exported_tokenizer(model, settings["max_seq_length"] or None)
    # Outside of StopSignals: a signal may end the process while the models are loaded.
    encoders = [EncoderProcess(encoder_options) for _ in range(settings["workers"])]
    with StopSignals() as signals:
        delay, requests = settings["max_queue_delay_ms"] / 1000, settings["max_requests"]
        options = ServiceOptions(settings["batch_size"], delay, requests, limits, keys)
        service = PipelineService(encoders, options, tokenizer, index)
        rpc_port = service.listen(host, settings["rpc_port"])
        gateway = HttpGateway(
            service, host, settings["http_port"], requests, settings["idle_timeout_s"], settings["cors"]
        )
        try:
            name = f"[{host}]" if ":" in host else host
            if index is not None:
                service_log(f"search: http://{name}:{gateway.server_port}/, {index}")
            service_log(
                f"ready: gRPC on {name}:{rpc_port}, HTTP on http://{name}:{gateway.server_port}{PREDICTION_PATH}"
            )
            with signals.raised():
                while True:  # the handler of a signal that another thread got runs when this one wakes
                    time.sleep(WAKE_SECONDS)
        except Stopped:
            service_log("stopping: answering the requests in progress")
        finished = service.stop(STOP_SECONDS)
        gateway.stop()
        if not finished:
            service_log(f"error: some requests weren't answered within {STOP_SECONDS:g} s")
        # Their threads would keep the process alive, and a second signal would end it with an error.
        os._exit(0 if finished else 1)


if __name__ == "__main__":
    run(main)
