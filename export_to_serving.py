"""Converts an exported model into what Paddle Serving loads: the folders serving_server and serving_client."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 leaves it out

from common.cli import ArgumentParser, add_switch, run
from common.errors import InputError
from common.files import atomic_folder, is_within, resolve_interrupted_replace, scratch_folder
from common.manifest import MANIFEST_FILE, check_manifest, check_replaceable, write_manifest
from common.paddle_setup import set_up_paddle
from encoding.exported_files import EXPORT_AGAIN, GRAPH_NAME, GRAPH_SUFFIXES, INPUT_NAMES, WEIGHTS_SUFFIX
from serving.protos import GeneralModelConfig

SERVER_CONFIG = "serving_server_conf"  # of the files; Serving's loaders look for these names
CLIENT_CONFIG = "serving_client_conf"
CONFIGS = (SERVER_CONFIG, CLIENT_CONFIG)
CONFIG_SUFFIXES = (".prototxt", ".stream.prototxt")  # text and binary
MODEL_FILES = [GRAPH_NAME + suffix for suffix in (*GRAPH_SUFFIXES, WEIGHTS_SUFFIX)]  # in the server's folder
SERVING_TIME_FILE = "fluid_time_file"  # C++ Serving writes it into the server's folder
INT64, FLOAT32 = 0, 1  # of feed_type and fetch_type: `var_type_conversion` of paddle_serving_client 0.9.0


def serving_config(output_name: str, embedding_size: int, feed_aliases: Sequence[str], fetch_alias: str) -> Any:
    """The names and types of a graph's inputs and output, as Serving's GeneralModelConfig message."""
    config = GeneralModelConfig()
    for name, alias in zip(INPUT_NAMES, feed_aliases, strict=True):
        config.feed_var.add(name=name, alias_name=alias, is_lod_tensor=False, feed_type=INT64)
    output = config.fetch_var.add(name=output_name, alias_name=fetch_alias, is_lod_tensor=False, fetch_type=FLOAT32)
    output.shape.append(embedding_size)
    return config


def write_serving_config(folder: Path, name: str, config: Any) -> None:
    """Writes a GeneralModelConfig as text and as bytes into an existing folder."""
    text, binary = (folder / (name + suffix) for suffix in CONFIG_SUFFIXES)
    text.write_text(text_format.MessageToString(config), encoding="utf-8")
    binary.write_bytes(config.SerializeToString())


def find_model(folder: Path, model_filename: str, params_filename: str) -> tuple[Path, Path]:
    """The files of graph and weights; if Paddle 2's name for the graph is given, Paddle 3's is accepted too.

    Raises InputError if they are missing or don't have the same name without the suffix.
    """
    if not folder.is_dir():
        raise InputError(f"--dirname {folder}: no such folder; export the model with export_model.py")
    named = folder / model_filename
    others = [named.with_suffix(suffix) for suffix in GRAPH_SUFFIXES]
    graph = next((file for file in (named, *others) if file.is_file()), None)
    if graph is None or graph.suffix not in GRAPH_SUFFIXES:
        raise InputError(f"--model_filename {model_filename}: {folder} has no such graph; {EXPORT_AGAIN}")
    weights = folder / params_filename
    if weights != graph.with_suffix(WEIGHTS_SUFFIX):
        options = f"--model_filename {model_filename}, --params_filename {params_filename}"
        raise InputError(f"{options}: give a graph and its weights: same name, with the suffix {WEIGHTS_SUFFIX}")
    if not weights.is_file():
        raise InputError(f"--params_filename {params_filename}: {folder} has no such file; {EXPORT_AGAIN}")
    return graph, weights


def convert(
    source: Path, graph: Path, weights: Path, server: Path, feed_aliases: Sequence[str], fetch_alias: str | None
) -> Any:
    """Fills the new folder `server`, runs its graph once, and returns the GeneralModelConfig. Raises InputError.

    In addition to what the original converter writes, it copies the exported folder's other files, because
    web_service.py needs them for tokenizing.
    """
    check_manifest(source, remedy=EXPORT_AGAIN)
    shutil.copyfile(graph, server / (GRAPH_NAME + graph.suffix))
    shutil.copyfile(weights, server / (GRAPH_NAME + WEIGHTS_SUFFIX))
    if (source / MANIFEST_FILE).is_file():
        for file in source.iterdir():
            if file.is_file() and file not in (graph, weights) and file.name not in (*MODEL_FILES, MANIFEST_FILE):
                shutil.copyfile(file, server / file.name)
    set_up_paddle()
    from encoding.engines import copy_calibrated
    from encoding.static_graph import StaticEncoder

    encoder = StaticEncoder(server)
    tokens = np.ones((1, 3), dtype=np.int64)
    embedding_size = encoder.embed(tokens, np.zeros_like(tokens)).shape[1]
    config = serving_config(encoder.output_name, embedding_size, feed_aliases, fetch_alias or encoder.output_name)
    write_serving_config(server, SERVER_CONFIG, config)
    if (source / MANIFEST_FILE).is_file():
        copy_calibrated(source, server)
        write_manifest(server)
    return config


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--dirname", required=True, help="folder that export_model.py wrote")
    graph = "graph in it; if there is no .pdmodel, the .json of Paddle 3 is used"
    add("--model_filename", default=f"{GRAPH_NAME}.pdmodel", help=graph)
    add("--params_filename", default=f"{GRAPH_NAME}{WEIGHTS_SUFFIX}", help="weights in it")
    add("--server_path", default="./serving_server", help="folder to write for the server")
    add("--client_path", default="./serving_client", help="folder to write for clients")
    add("--feed_alias_names", help="names of the inputs for clients, separated by a comma")
    add("--fetch_alias_names", help="name of the output for clients")
    add_switch(parser, "--show_proto", False, "only print the description of inputs and output for Serving")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints which graph was used and what was written."""
    args = build_parser().parse_args(argv)
    source, server, client = resolve_interrupted_replace(args.dirname), Path(args.server_path), Path(args.client_path)
    feed_aliases = args.feed_alias_names.split(",") if args.feed_alias_names else list(INPUT_NAMES)
    if len(feed_aliases) != len(INPUT_NAMES) or len({*feed_aliases, ""}) != len(INPUT_NAMES) + 1:
        raise InputError(f"--feed_alias_names {args.feed_alias_names}: give {len(INPUT_NAMES)} names, as in a,b")
    if args.fetch_alias_names and "," in args.fetch_alias_names:
        raise InputError(f"--fetch_alias_names {args.fetch_alias_names}: give one name, there is one output")
    if any(is_within(*pair) for pair in permutations((source, server, client), 2)):  # or one would be lost
        raise InputError("--dirname, --server_path and --client_path: give three folders, none of them inside another")
    graph, weights = find_model(source, args.model_filename, args.params_filename)
    if not args.show_proto:
        server_files, client_files = ([name + end for end in CONFIG_SUFFIXES] for name in CONFIGS)
        others = [*server_files, *MODEL_FILES, SERVING_TIME_FILE]
        check_replaceable(server, "--server_path", mark=server_files[0], others=others)
        check_replaceable(client, "--client_path", mark=client_files[0], others=client_files)
    if graph.name != args.model_filename:
        print(f"used {graph.name}: Paddle 3 writes it instead of {args.model_filename}")

    if args.show_proto:
        with scratch_folder() as folder:
            config = convert(source, graph, weights, folder, feed_aliases, args.fetch_alias_names)
            print(str(config).rstrip())
        return 0
    with atomic_folder(client) as client_folder, atomic_folder(server) as server_folder:
        config = convert(source, graph, weights, server_folder, feed_aliases, args.fetch_alias_names)
        write_serving_config(client_folder, CLIENT_CONFIG, config)
    print(f"wrote {server} and {client}")
    return 0


if __name__ == "__main__":
    run(main)
