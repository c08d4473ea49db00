"""Exporting a model: its static graph and all that is needed to run it, checked against the model."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from common import __version__
from common.errors import InputError
from common.files import sha256, write_json
from common.manifest import write_manifest
from data import Embed, TextTokenizer, TokenIds
from encoding.engines import copy_calibrated
from encoding.exported_files import INPUT_NAMES, MODEL_CARD_FILE
from encoding.onnx_graph import OnnxEncoder, export_onnx, onnx_packages
from encoding.static_graph import StaticEncoder, export_static
from modeling.checkpoint import LoadedCheckpoint, write_model_files
from modeling.checkpoint_files import SAFETENSORS_FILE
from modeling.weight_files import write_safetensors

LARGEST_DIFFERENCE = 1e-5  # between a component of the model's and of the exported graph's unit vector
CHECKED_BATCH_SIZES = (1, 2, 7)


def export_model(loaded: LoadedCheckpoint, folder: Path, form: str = "paddle") -> dict[str, float]:
    """Writes what `exported_model.load_exported` reads into an existing folder.

    form: "onnx" also writes the graph in ONNX, "safetensors" the weights in that format. Returns the largest difference
    of each graph, "paddle" and "onnx", from the model. Raises InputError if one exceeds LARGEST_DIFFERENCE.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    export_static(model, folder)
    encoder = StaticEncoder(folder)
    embeds: dict[str, Embed] = {"paddle": encoder.embed}
    if form == "onnx":
        export_onnx(folder)
        embeds["onnx"] = OnnxEncoder(folder).embed
    differences = {name: largest_difference(model.embed, embed, tokenizer) for name, embed in embeds.items()}
    for name, difference in differences.items():
        check_difference(folder, f"{name} graph", difference)
    write_model_files(folder, model, tokenizer)
    if form == "safetensors":
        write_safetensors(folder / SAFETENSORS_FILE, {name: w.numpy() for name, w in model.state_dict().items()})
    copy_calibrated(loaded.weights.parent, folder, loaded.fingerprint)
    interface = {
        "inputs": dict.fromkeys(INPUT_NAMES, "int64 [batch, length]"),
        "outputs": {encoder.output_name: "float32 [batch, embedding_size], unit vectors"},
    }
    write_card(loaded, folder, differences, onnx_packages() if form == "onnx" else (), **interface)
    return differences


def write_card(
    loaded: LoadedCheckpoint, folder: Path, differences: dict[str, float], packages: Sequence[Any] = (), **more: Any
) -> None:
    """Writes the model card and the manifest. packages: imported ones; more: further entries of the card."""
    versions = {"paddlenlp": version("paddlenlp"), **{each.__name__: each.__version__ for each in (paddle, *packages)}}
    checkpoint = loaded.weights
    card = {
        "fingerprint": loaded.fingerprint,
        "checkpoint": {"file": f"{checkpoint.parent.name}/{checkpoint.name}", "sha256": sha256(checkpoint)},
        "versions": {"semantic_index": __version__, "python": platform.python_version(), **versions},
        **more,
        "embedding_size": loaded.model.embedding_size,
        "max_seq_length": loaded.tokenizer.max_seq_length,
        "largest_difference": differences,
    }
    write_json(folder / MODEL_CARD_FILE, card)
    write_manifest(folder)


def check_difference(folder: Path, what: str, difference: float) -> None:
    """Raises InputError if an export's vectors differ from the model's by more than rounding."""
    if not difference <= LARGEST_DIFFERENCE:  # NaN too
        raise InputError(f"{folder}: the {what} is off by {difference:.2g}, more than {LARGEST_DIFFERENCE:g}")


def largest_difference(first: Embed, second: Embed, tokenizer: TextTokenizer) -> float:
    """The largest difference in any component of two encoders' vectors, on random batches of several shapes."""
    lengths = sorted({3, tokenizer.max_seq_length // 2 + 1, tokenizer.max_seq_length})
    batches = [random_tokens(tokenizer, size, length) for size in CHECKED_BATCH_SIZES for length in lengths]
    return float(np.max([np.abs(first(*tokens) - second(*tokens)).max() for tokens in batches]))


def random_tokens(tokenizer: TextTokenizer, batch_size: int, length: int) -> TokenIds:
    """Random token ids as TextTokenizer returns them, [batch_size, length]; the same for the same sizes."""
    random = np.random.default_rng([batch_size, length])
    real_ids = [token for token in range(tokenizer.vocabulary_size) if token != tokenizer.pad_id]
    input_ids = random.choice(real_ids, (batch_size, length))
    for row in range(1, batch_size):  # the first text has the full length
        input_ids[row, random.integers(1, length + 1) :] = tokenizer.pad_id
    return input_ids, np.zeros_like(input_ids)
