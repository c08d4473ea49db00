"""Exports a trained model for serving: a folder with the static graph and all that running it needs."""

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import Embed, TextCollator, TokenIds
from files import atomic_folder, check_replaceable, sha256, write_json, write_manifest
from runtime import ArgumentParser, InputError, at_least, run, set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

import paddle
import paddlenlp

from base_model import add_checkpoint_args, set_device
from checkpoint import LoadedModel, load_checkpoint, weights_file, write_model_files
from encoder import model_fingerprint
from onnx_graph import OnnxEncoder, export_onnx, onnx_packages
from static_graph import GRAPH_NAME, INPUT_NAMES, StaticEncoder, export_static

MODEL_CARD_FILE = "model_card.json"
LARGEST_DIFFERENCE = 1e-5  # of a unit vector's components, between the model and its exported graph
CHECKED_BATCH_SIZES = (1, 2, 7)


def export_model(loaded: LoadedModel, checkpoint: Path, folder: Path, onnx: bool = False) -> dict[str, float]:
    """Writes what `static_graph.load_exported` reads into an existing folder, and with `onnx` the graph in ONNX too.

    checkpoint: the weights file that the model came from. Gives each format's largest difference from the model.
    Raises InputError if it is too large.
    """
    model, collator = loaded
    export_static(model, folder)
    encoder = StaticEncoder(folder)
    encoders: dict[str, Embed] = {"paddle": encoder.embed}
    if onnx:
        export_onnx(folder)
        encoders["onnx"] = OnnxEncoder(folder).embed
    differences = {name: largest_difference(model.embed, embed, collator) for name, embed in encoders.items()}
    for name, difference in differences.items():
        if not difference <= LARGEST_DIFFERENCE:  # NaN too
            raise InputError(f"{folder}: the {name} graph is off by {difference:.2g}, more than {LARGEST_DIFFERENCE:g}")
    write_model_files(folder, model, collator)
    card = {
        "fingerprint": model_fingerprint(model, collator),
        "checkpoint": {"file": f"{checkpoint.parent.name}/{checkpoint.name}", "sha256": sha256(checkpoint)},
        "versions": versions(onnx),
        "inputs": dict.fromkeys(INPUT_NAMES, "int64 [batch, length]"),
        "outputs": {encoder.output_name: "float32 [batch, embedding_size], unit vectors"},
        "embedding_size": model.embedding_size,
        "max_seq_length": collator.max_seq_length,
        "largest_difference": differences,
    }
    write_json(folder / MODEL_CARD_FILE, card)
    write_manifest(folder)
    return differences


def versions(onnx: bool) -> dict[str, str]:
    """Of Python and of the packages that made the graphs."""
    modules = (paddle, paddlenlp, *(onnx_packages() if onnx else ()))
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def largest_difference(first: Embed, second: Embed, collator: TextCollator) -> float:
    """Between the components of two encoders' vectors, over batches of several sizes and lengths."""
    lengths = sorted({3, collator.max_seq_length // 2 + 1, collator.max_seq_length})
    batches = [random_tokens(collator, size, length) for size in CHECKED_BATCH_SIZES for length in lengths]
    return float(np.max([np.abs(first(*tokens) - second(*tokens)).max() for tokens in batches]))


def random_tokens(collator: TextCollator, batch_size: int, length: int) -> TokenIds:
    """A batch padded to `length` tokens, as TextCollator gives it, of random tokens; the same for the same sizes."""
    random = np.random.default_rng([batch_size, length])
    real = [token for token in range(collator.vocabulary_size) if token != collator.pad_id]
    input_ids = random.choice(real, (batch_size, length))
    for row in range(1, batch_size):
        input_ids[row, random.integers(1, length + 1) :] = collator.pad_id
    return input_ids, np.zeros_like(input_ids)


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_checkpoint_args(parser)
    parser.add_argument(
        "--output_path", default="./output", help="folder to write; an earlier export there is replaced"
    )
    parser.add_argument(
        "--max_seq_length", type=at_least(3), help="tokens that serving cuts texts to (default: the checkpoint's)"
    )
    parser.add_argument(
        "--format", choices=["paddle", "onnx"], default="paddle", help="onnx: the graph in ONNX too, beside Paddle's"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints how far the exported graph is from the model, and the names of the files."""
    args = build_parser().parse_args(argv)
    output = Path(args.output_path)
    check_replaceable(output, "--output_path", MODEL_CARD_FILE)
    onnx = args.format == "onnx"
    if onnx:
        onnx_packages()
    set_device("cpu")
    loaded = load_checkpoint(
        args.params_path,
        model_name_or_path=args.model_name_or_path,
        output_emb_size=args.output_emb_size,
        max_seq_length=args.max_seq_length,
    )
    with atomic_folder(output) as folder:
        differences = export_model(loaded, weights_file(args.params_path), folder, onnx)
    for name, difference in differences.items():
        print(f"largest difference between the model and the {name} graph: {difference:.2g}")
    print(f"wrote {output / GRAPH_NAME}.*")
    return 0


if __name__ == "__main__":
    run(main)
