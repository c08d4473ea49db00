"""Exports a trained model for serving: a folder with the static graph and everything that running it needs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 leaves it out

from common.cli import ArgumentParser, number_in_range, run
from common.files import atomic_folder
from common.manifest import check_replaceable
from common.options import add_checkpoint_args, pick
from common.paddle_setup import set_up_paddle
from encoding.exported_files import GRAPH_NAME, MODEL_CARD_FILE
from modeling.checkpoint_files import check_checkpoint
from modeling.sentence_transformers_folder import MODULE_FOLDERS

SENTENCE_TRANSFORMERS = "sentence-transformers"


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_checkpoint_args(parser)
    add = parser.add_argument
    add("--output_path", default="./output", help="folder to write; an earlier export there is replaced")
    tokens_help = "tokens to which serving cuts longer texts (default: the checkpoint's)"
    add("--max_seq_length", type=number_in_range(3), help=tokens_help)
    formats_help = (
        "paddle: Paddle's static graph; onnx: also the graph in ONNX; safetensors: also model.safetensors; "
        f"{SENTENCE_TRANSFORMERS}: instead, a folder that SentenceTransformer loads"
    )
    formats = ["paddle", "onnx", "safetensors", SENTENCE_TRANSFORMERS]
    add("--format", choices=formats, default="paddle", help=formats_help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder, and prints how much each exported graph differs from the model."""
    args = build_parser().parse_args(argv)
    check_checkpoint(args.params_path)
    output = Path(args.output_path)
    check_replaceable(output, "--output_path", MODEL_CARD_FILE, others=MODULE_FOLDERS)

    set_up_paddle()
    from common.device import set_device
    from encoding.export import export_model
    from encoding.onnx_graph import onnx_packages
    from modeling.checkpoint import load_checkpoint

    if args.format == "onnx":
        onnx_packages()
    set_device("cpu")
    loaded = load_checkpoint(**pick(args, load_checkpoint))
    if args.format == SENTENCE_TRANSFORMERS:
        from encoding.sentence_transformers_export import export_sentence_transformers

        with atomic_folder(output) as folder:
            difference = export_sentence_transformers(loaded, folder)
        print(f"largest difference between the model and the folder read again: {difference:.2g}")
        print(f"wrote {output}")
        return 0
    with atomic_folder(output) as folder:
        differences = export_model(loaded, folder, args.format)
    for name, difference in differences.items():
        print(f"largest difference between the model and the {name} graph: {difference:.2g}")
    print(f"wrote {output / GRAPH_NAME}.*")
    return 0


if __name__ == "__main__":
    run(main)
