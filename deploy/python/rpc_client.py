"""Asks the service that web_service.py started for the vectors of texts, over gRPC."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser, run, text_argument
from common.errors import InputError
from common.options import add_role_arg
from data import SAMPLE_TEXTS


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    port = os.environ.get("SERVING_RPC_PORT") or "8080"  # as in web_service.py
    parser.add_argument("--endpoint", default=f"127.0.0.1:{port}", help="address and gRPC port of the service")
    text = "a text; may be given several times (default: the document's samples)"
    parser.add_argument("--text", action="append", type=text_argument, help=text)
    add_role_arg(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the request, the name of the output, and shape and content of the vectors, as the document shows them."""
    args = build_parser().parse_args(argv)
    # Imported here, so that a missing Paddle Serving is reported in one line.
    from serving.adapter import embed_remotely

    feed = {str(number): text for number, text in enumerate(args.text or SAMPLE_TEXTS)}
    if args.role:
        feed["role"] = args.role
    print(feed)
    answer = embed_remotely(args.endpoint, feed)
    if answer.err_no:
        raise InputError(f"{args.endpoint} answered: {answer.err_msg}")
    vectors = np.array(json.loads(answer.value[0]), dtype=np.float32)
    print(answer.key)
    print(vectors.shape)
    print(vectors)
    return 0


if __name__ == "__main__":
    run(main)
