"""Encoding texts with an exported model: `load_exported` chooses the engine. Imports no PaddleNLP."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from common.device import check_precision
from common.errors import InputError
from common.files import read_json, scratch_folder
from common.options import OPENVINO, STATIC, STATIC_FROM_TEXTS
from data import BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE, Embed
from encoding.engines import Calibration, CompiledFrom, check_engine, fastest_engine, load_int8, load_openvino
from encoding.exported_files import check_exported, exported_tokenizer, read_card
from encoding.static_graph import StaticEncoder, check_tensorrt, convert_to_tensorrt
from encoding.text_encoder import Encoder, TextSample


def load_exported(
    model_dir: str | Path,
    *,
    device: str = "cpu",
    engine: str = "",
    precision: str = "fp32",
    threads: int | None = None,
    onednn: bool = True,
    tensorrt_batch_size: int | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 32,
    text_count: int = 0,
    sample: TextSample | None = None,
    calibration_texts: Sequence[str] | None = None,
    min_overlap: float = 0.0,
) -> Encoder:
    """The encoder of an exported folder. device, precision, threads, onednn: as for StaticEncoder.

    engine: "" is openvino for int8, else static. "auto" is that, too, but on a CPU from STATIC_FROM_TEXTS texts on the
    faster of static and, if installed, openvino. tensorrt_batch_size: runs the graph in TensorRT, on at most this many
    texts at a time, all padded to max_seq_length. max_seq_length: replaces the exported one, which is logged. The other
    arguments are those of `encoder.load_encoder`. Raises InputError, also if a file differs from the manifest.
    """
    check_engine(engine or "auto", precision, device, calibration_texts)
    uses_openvino = engine == OPENVINO or precision == "int8"
    if uses_openvino and not onednn:
        raise InputError(f"--engine {OPENVINO}: computes with oneDNN; leave out --enable_mkldnn False")
    folder = check_exported(model_dir, max_seq_length)
    tokenizer = exported_tokenizer(folder, max_seq_length)
    load = partial(StaticEncoder, folder, device=device, threads=threads, onednn=onednn)

    def encoder_of(embed: Embed, computes_in: str = precision) -> Encoder:
        return Encoder(embed, tokenizer, _embedding_size(folder), batch_size, precision=computes_in)

    if tensorrt_batch_size:
        tokenizer.pad_to_max_seq_len = True
        return encoder_of(_load_tensorrt(folder, tokenizer.max_seq_length, device, precision, tensorrt_batch_size))
    measures = engine == "auto" and device == "cpu" and onednn and text_count >= STATIC_FROM_TEXTS
    if not uses_openvino and not measures:
        return encoder_of(load(precision=precision).embed)
    model = CompiledFrom(folder, read_card(folder).fingerprint, lambda: nullcontext(folder), threads)
    if precision == "int8":
        calibration = Calibration(calibration_texts, sample or TextSample(), min_overlap)
        return load_int8(model, encoder_of(load().embed, "fp32"), calibration)
    loaders: dict[str, Callable[[], Embed]] = {
        STATIC: lambda: load(precision=precision).embed,
        OPENVINO: lambda: load_openvino(model, precision).embed,
    }
    if engine == OPENVINO:
        return encoder_of(loaders[OPENVINO]())
    return encoder_of(fastest_engine(model, precision, tokenizer.vocabulary_size, loaders))


def _embedding_size(folder: Path) -> int:
    """The length of a vector: that of the linear reduction or, without one, the backbone's hidden size."""
    reduced = read_json(folder / MODEL_CONFIG_FILE).get("output_emb_size")
    return reduced or read_json(folder / BACKBONE_CONFIG_FILE)["hidden_size"]


def _load_tensorrt(folder: Path, length: int, device: str, precision: str, batch_size: int) -> Embed:
    check_tensorrt(device)
    check_precision(precision, device)
    with scratch_folder() as target:
        convert_to_tensorrt(folder, target, precision=precision, batch_size=batch_size, length=length)
        return StaticEncoder(target, device=device, precision=precision).embed
