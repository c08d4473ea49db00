"""The engines that run a compiled graph, what they keep beside the model, and which of them is the fastest."""

import contextlib
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from common.cpu import cpu_name, cpu_threads
from common.device import check_precision
from common.distributed import barrier, broadcast_object, init_ranks
from common.errors import InputError
from common.files import atomic_folder, read_json, remove_folder, scratch_folder, write_json
from common.logs import log
from common.manifest import MANIFEST_FILE, check_manifest, write_manifest
from common.options import OPENVINO, STATIC
from data import Embed, TokenIds
from encoding.openvino_graph import INSTALL_OPENVINO, OpenVinoEncoder, convert_to_openvino, has_openvino, quantize
from encoding.text_encoder import SAMPLE_TOP, Encoder, Fidelity, TextSample, compare_with_fp32
from encoding.token_statistics import sample_rows

OPENVINO_FOLDER = "openvino"  # in a model's folder: holds graphs, by OPENVINO_VERSION, fingerprint and calibration
OPENVINO_VERSION = 1  # raise it when graphs compute differently; graphs of other versions are ignored
FIDELITY_FILE = "fidelity.json"  # in the folder of a calibrated graph
SPEEDS_FILE = "speeds.json"  # in OPENVINO_FOLDER: what `fastest_engine` has measured
CALIBRATION_TEXTS = 300  # NNCF's default
FEWEST_CALIBRATION_TEXTS = 50
TIMED_TEXTS, TIMED_LENGTH, TIMED_BATCHES = 32, 36, 3  # 36: the mean of titles with keywords, in tokens

Loaded = TypeVar("Loaded", bound="_GraphEncoder")


class _GraphEncoder(Protocol):
    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray: ...


class CompiledFrom(NamedTuple):
    """The model that graphs are compiled from and kept beside."""

    folder: Path  # of the checkpoint or the exported model
    fingerprint: str  # see `modeling.checkpoint.model_fingerprint`
    exported: Callable[[], AbstractContextManager[Path]]  # gives a folder with the graph of `export_static`
    threads: int | None = None  # CPU threads; None: see `cpu_threads`


class Calibration(NamedTuple):
    """What a precision is calibrated on, and how close to fp32 it has to be."""

    texts: Sequence[str] | None = None  # of --calibration_file
    sample: TextSample = TextSample()  # texts in hand; used for calibrating, too, if `texts` is None
    min_overlap: float = 0.0  # of `Fidelity.recall_vs_fp32`


# ---------------------------------------------------------------------------------------------------------------------
# Graphs that are kept


def load_kept(folder: Path, write: Callable[[Path], None], load: Callable[[Path], Loaded]) -> Loaded:
    """Loads the graph in a folder, which rank 0 writes if it isn't kept yet; all ranks must call this together.

    write: writes the graph into an existing folder. If the folder can't be written, each rank uses a temporary one.
    """
    rank, _ = init_ranks()
    encoder = None if rank else _load_unchanged(folder, load) or _write(folder, write, load)
    barrier()
    encoder = encoder or _load_unchanged(folder, load)
    if encoder:
        return encoder
    with scratch_folder() as temporary:
        write(temporary)
        return load(temporary)


def _write(folder: Path, write: Callable[[Path], None], load: Callable[[Path], Loaded]) -> Loaded | None:
    """Writes the graph into the folder and loads it; None if it can't be written or loaded."""
    log(f"compiling the model into {folder}")
    try:
        with atomic_folder(folder) as temporary:
            write(temporary)
            encoder = load(temporary)  # Paddle reports no error for a file that is cut short on a full disk
            write_manifest(temporary)
    except InputError as error:
        log(f"{error}; compiling it for this run alone")
        return None
    return encoder


def _load_unchanged(folder: Path, load: Callable[[Path], Loaded]) -> Loaded | None:
    """Loads a graph that is kept; None if it is missing, changed, or can't be loaded."""
    if not _is_kept(folder):
        return None
    try:
        check_manifest(folder)
        return load(folder)
    except InputError:
        return None


def _is_kept(folder: Path) -> bool:
    return os.path.isfile(folder / MANIFEST_FILE)  # Path.is_file fails in another user's folder


# ---------------------------------------------------------------------------------------------------------------------
# OpenVINO


def load_openvino(model: CompiledFrom, precision: str) -> OpenVinoEncoder:
    """The model in OpenVINO, in fp32 or bf16; all ranks must call this together. Raises InputError."""

    def write(folder: Path) -> None:
        with model.exported() as exported:
            convert_to_openvino(exported, folder)

    load = partial(OpenVinoEncoder, precision=precision, threads=model.threads)
    return load_kept(_graph_folder(model), write, load)


def load_int8(model: CompiledFrom, encoder: Encoder, calibration: Calibration) -> Encoder:
    """The encoder with the model in int8; all ranks must call this together.

    encoder: in fp32. Without texts of its own, the calibration is made once, on the sample, and kept. Raises InputError
    if there are too few texts to calibrate on, or the vectors are too far from those of fp32; then it isn't kept.
    """
    texts = None if calibration.texts is None else _sample_of(calibration.texts, CALIBRATION_TEXTS)
    key = "" if texts is None else "-" + hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]
    folder = _graph_folder(model, f"-int8{key}")
    sample = calibration.sample if texts is None else TextSample(texts, roles=calibration.sample.roles)
    if not _is_kept(folder):
        _check_enough(sample)

    def write(target: Path) -> None:
        with model.exported() as exported:
            quantize(exported, target, _calibration_batches(encoder, sample))

    load = partial(OpenVinoEncoder, precision="int8", threads=model.threads)
    embed = load_kept(folder, write, load).embed
    encoder = encoder._replace(embed=embed, embed_fp32=encoder.embed, precision="int8")
    compared = calibration.sample if calibration.sample.documents else sample
    fidelity = _read_fidelity(folder) or _measure_fidelity(folder, encoder, compared)
    _check_overlap(folder, fidelity, calibration.min_overlap)
    return encoder._replace(fidelity=fidelity)


def copy_calibrated(source: Path, target: Path, fingerprint: str = "*") -> None:
    """Copies the int8 graphs that are kept beside a model to another folder. fingerprint: of the model; "*": any."""
    for folder in (source / OPENVINO_FOLDER).glob(f"{OPENVINO_VERSION}-{fingerprint[:16]}-int8*"):
        if _is_kept(folder):
            shutil.copytree(folder, target / OPENVINO_FOLDER / folder.name)


def _graph_folder(model: CompiledFrom, suffix: str = "") -> Path:
    return model.folder / OPENVINO_FOLDER / f"{OPENVINO_VERSION}-{model.fingerprint[:16]}{suffix}"


def _sample_of(texts: Sequence[str], count: int) -> list[str]:
    """A random sample, the same in each call."""
    return [texts[row] for row in sample_rows(len(texts), count).tolist()]


def _check_enough(sample: TextSample) -> None:
    """Raises InputError if there are too few texts to calibrate on."""
    count = len(sample.documents) + len(sample.queries)
    if count < FEWEST_CALIBRATION_TEXTS:
        problem = f"it isn't calibrated yet, and {count} texts in hand are too few for that"
        remedy = (
            f"give --calibration_file with {FEWEST_CALIBRATION_TEXTS} or more texts like those that you will encode"
        )
        raise InputError(f"--precision int8: {problem}; {remedy}")


def _calibration_batches(encoder: Encoder, sample: TextSample) -> list[TokenIds]:
    """The token ids of CALIBRATION_TEXTS of the sample, a text each, so that there is no padding."""
    queries = _sample_of(sample.queries, min(len(sample.queries), CALIBRATION_TEXTS // 3))
    documents = _sample_of(sample.documents, CALIBRATION_TEXTS - len(queries))
    log(f"int8: calibrating on {len(documents) + len(queries)} texts")
    tokenizer = encoder.tokenizer
    prefixed = [
        text
        for texts, role in zip((documents, queries), sample.roles, strict=True)
        for text in tokenizer.prefixed(texts, role)
    ]
    return [tokenizer([text]) for text in prefixed]


def _read_fidelity(folder: Path) -> Fidelity | None:
    """What was measured when the graph was calibrated; None if it isn't kept."""
    try:
        return Fidelity(**read_json(folder / FIDELITY_FILE))
    except (InputError, TypeError):
        return None


def _measure_fidelity(folder: Path, encoder: Encoder, sample: TextSample) -> Fidelity:
    """Compares the encoder with fp32 on rank 0, and keeps the result beside the graph if that is kept."""
    _check_enough(sample)
    rank, _ = init_ranks()
    fidelity = broadcast_object(None if rank else compare_with_fp32(encoder, sample))
    if not rank and _is_kept(folder):
        with contextlib.suppress(InputError):
            write_json(folder / FIDELITY_FILE, fidelity._asdict())
    return fidelity


def _check_overlap(folder: Path, fidelity: Fidelity, min_overlap: float) -> None:
    """Raises InputError if too few of fp32's hits are found, and removes the graph, to calibrate anew."""
    if fidelity.recall_vs_fp32 >= min_overlap:
        return
    barrier()  # until all ranks have read the file
    if not init_ranks()[0]:
        with contextlib.suppress(OSError):
            remove_folder(folder)
    found = f"on a sample it finds {100 * fidelity.recall_vs_fp32:.2f} % of fp32's top {SAMPLE_TOP}"
    tries = "calibrate on other texts (--calibration_file), take bf16 or fp32, or lower --min_overlap"
    raise InputError(f"--precision int8: {found}, less than --min_overlap {min_overlap:g}; {tries}")


# ---------------------------------------------------------------------------------------------------------------------
# The choice of an engine


def check_engine(engine: str, precision: str, device: str, calibration_texts: Sequence[str] | None) -> None:
    """Raises InputError if the device or the engine lacks the precision, or OpenVINO is needed and missing.

    Logs calibration texts that have no effect.
    """
    if calibration_texts is not None and precision != "int8":
        log(f"--calibration_file: has no effect with --precision {precision}")
    check_precision(precision, device)
    if engine == OPENVINO and device != "cpu":
        raise InputError(f"--engine {OPENVINO}: computes on a CPU; use --device cpu, or another engine")
    if engine == OPENVINO and precision == "fp16":
        raise InputError(f"--engine {OPENVINO}: has no fp16 on a CPU; use fp32, bf16 or int8")
    if precision == "int8" and engine not in ("auto", OPENVINO):
        raise InputError(f"--precision int8: only the engine {OPENVINO} has it; leave out --engine {engine}")
    needing = "--precision int8" if precision == "int8" else f"--engine {OPENVINO}" if engine == OPENVINO else None
    if needing and not has_openvino():
        raise InputError(f"{needing}: OpenVINO isn't installed; {INSTALL_OPENVINO}")


def fastest_engine(
    model: CompiledFrom, precision: str, vocabulary_size: int, loaders: Mapping[str, Callable[[], Embed]]
) -> Embed:
    """`embed` of the fastest engine on this machine, static without OpenVINO; all ranks must call this together.

    loaders: engine -> loads it. Each is timed on batches of random tokens, once for a machine, a model and a precision.
    """
    if not has_openvino():
        return loaders[STATIC]()
    file = model.folder / OPENVINO_FOLDER / SPEEDS_FILE
    machine = f"{cpu_name()}, {model.threads or cpu_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("paddlepaddle", "openvino"))
    key = f"{machine}, {versions}, {precision}, {model.fingerprint[:16]}"
    rank, _ = init_ranks()
    speeds = broadcast_object(None if rank else _read_speeds(file, key, loaders))
    if not speeds:
        embeds = {name: load() for name, load in loaders.items()}
        speeds = broadcast_object({name: _texts_per_second(embed, vocabulary_size) for name, embed in embeds.items()})
        fastest = max(speeds, key=lambda name: speeds[name])
        described = ", ".join(f"{name} {speed:.1f} texts/s" for name, speed in speeds.items())
        log(f"--engine auto: measured {described} in {precision}; {fastest} from now on")
        if not rank:
            _keep_speeds(file, key, speeds)
        return embeds[fastest]
    return loaders[max(speeds, key=lambda name: speeds[name])]()


def _read_speeds(file: Path, key: str, names: Mapping[str, object]) -> dict[str, float] | None:
    """The kept measurement; None if there is none."""
    try:
        speeds: Any = read_json(file).get(key)
    except InputError:
        return None
    is_complete = isinstance(speeds, dict) and speeds.keys() == names.keys()
    return speeds if is_complete and all(type(speed) is float for speed in speeds.values()) else None


def _keep_speeds(file: Path, key: str, speeds: Mapping[str, float]) -> None:
    """Adds a measurement to the file, unless that can't be written."""
    try:
        kept = read_json(file)
    except InputError:
        kept = {}
    with contextlib.suppress(InputError):
        write_json(file, {**kept, key: speeds})


def _texts_per_second(embed: Embed, vocabulary_size: int) -> float:
    input_ids = np.random.default_rng(0).integers(vocabulary_size, size=(TIMED_TEXTS, TIMED_LENGTH))
    seconds = []
    for _ in range(1 + TIMED_BATCHES):
        start = time.perf_counter()
        embed(input_ids, np.zeros_like(input_ids))
        seconds.append(time.perf_counter() - start)
    return TIMED_TEXTS / statistics.median(seconds[1:])  # the first prepares the kernels of the shape
