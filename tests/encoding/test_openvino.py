"""OpenVINO beside Paddle's engines: the same vectors in fp32, int8 that is calibrated and compared, and the choice."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import export_model
from common.device import check_precision
from common.errors import InputError
from common.options import STATIC_FROM_TEXTS
from encoding import engines, openvino_graph
from encoding.encoder import load_encoder
from encoding.engines import FIDELITY_FILE, OPENVINO_FOLDER, SPEEDS_FILE
from encoding.exported_model import load_exported
from encoding.text_encoder import Encoder, TextSample
from helpers import ROOT, run_script
from retrieval.corpus import read_corpus

openvino = pytest.mark.openvino


@pytest.fixture(scope="module")
def documents(recall_data: Path) -> list[str]:
    return list(read_corpus(recall_data / "corpus.csv"))


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint in which graphs can be kept."""
    return shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns(OPENVINO_FOLDER, "static"))


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an int8 graph; not to be changed."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("calibrated") / "model")
    load_int8(folder, TextSample(documents, documents[:20]))
    return folder


def load_int8(folder: Path, sample: TextSample | None = None, **options: object) -> Encoder:
    return load_encoder(folder, precision="int8", batch_size=8, sample=sample, **options)


def kept(folder: Path) -> dict[str, int]:
    """The files of OpenVINO's graphs, and when they were written."""
    root = folder / OPENVINO_FOLDER
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@openvino
def test_fp32_is_the_same_and_the_graph_is_kept(folder: Path, documents: list[str]) -> None:
    expected = load_encoder(folder, engine="dygraph", batch_size=8).encode(documents)
    encoder = load_encoder(folder, engine="openvino", batch_size=8)
    np.testing.assert_allclose(encoder.encode(documents), expected, atol=1e-5)
    files = kept(folder)
    assert len(files) == 3  # the graph, its weights, the manifest
    load_encoder(folder, engine="openvino")
    assert kept(folder) == files


@openvino
def test_a_vector_stays_as_it_is_when_the_next_one_is_computed(calibrated: Path, documents: list[str]) -> None:
    embed, tokenizer = load_encoder(calibrated, engine="openvino")[:2]
    first = embed(*tokenizer(documents[:4]))
    copy = first.copy()
    embed(*tokenizer(documents[4:8]))
    np.testing.assert_array_equal(first, copy)


@openvino
def test_int8_is_near_fp32_and_calibrated_once(calibrated: Path, documents: list[str]) -> None:
    """A later load needs no texts."""
    exact = load_encoder(calibrated, engine="dygraph", batch_size=8).encode(documents)
    files = kept(calibrated)
    encoder = load_int8(calibrated, min_overlap=0.8)
    assert kept(calibrated) == files and any(FIDELITY_FILE in name for name in files)
    cosines = (encoder.encode(documents) * exact).sum(axis=1)
    assert 0.9 < cosines.min() < 1 - 1e-5  # near, but not computed in fp32
    assert encoder.precision == "int8" and encoder.fidelity is not None
    assert 0.9 < encoder.fidelity.lowest_cosine < 1 - 1e-5
    assert 0.8 <= encoder.fidelity.recall_vs_fp32 <= 1


@openvino
def test_layers_after_the_pooling_stay_in_float32(exported: Path) -> None:
    """With mean pooling, that is the linear reduction."""
    graph = openvino_graph._read_graph(exported)
    products = [node.get_friendly_name() for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
    assert openvino_graph._products_after_pooling(graph) == products[-1:]


@openvino
def test_too_low_an_overlap_is_refused_and_not_kept(folder: Path, documents: list[str]) -> None:
    """So that the next run calibrates anew; here, no overlap would be enough."""
    message = r"--precision int8: on a sample it finds .* of fp32's top 10, less than --min_overlap 1\.1; calibrate"
    with pytest.raises(InputError, match=message):
        load_int8(folder, TextSample(documents), min_overlap=1.1)
    assert kept(folder) == {}
    with pytest.raises(InputError, match="it isn't calibrated yet"):
        load_int8(folder)


@openvino
def test_a_calibration_by_other_texts_is_one_of_its_own(folder: Path, documents: list[str]) -> None:
    load_int8(folder, calibration_texts=documents[:60])
    assert len(list((folder / OPENVINO_FOLDER).iterdir())) == 1
    files = kept(folder)
    load_int8(folder, calibration_texts=documents[:60])
    assert kept(folder) == files
    load_int8(folder, calibration_texts=documents[60:120])
    assert len(list((folder / OPENVINO_FOLDER).iterdir())) == 2


@openvino
@pytest.mark.parametrize("count", [0, 49])
def test_too_few_texts_to_calibrate_on_are_refused(folder: Path, documents: list[str], count: int) -> None:
    with pytest.raises(InputError, match=rf"and {count} texts in hand are too few for that; give --calibration_file"):
        load_int8(folder, TextSample(documents[:count]))


@openvino
def test_an_export_takes_the_calibration_along(calibrated: Path, documents: list[str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert export_model.main(["--params_path", str(calibrated), "--output_path", str(output)]) == 0
    encoder = load_exported(output, precision="int8", min_overlap=0.8)
    np.testing.assert_allclose(encoder.encode(documents), load_int8(calibrated).encode(documents), atol=1e-5)
    fp32 = load_exported(output, engine="openvino")
    np.testing.assert_allclose(fp32.encode(documents), load_exported(output).encode(documents), atol=1e-5)


@openvino
def test_a_graph_that_cannot_be_kept_is_made_for_this_run(
    folder: Path, documents: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / OPENVINO_FOLDER).write_text("in the way")
    encoder = load_int8(folder, TextSample(documents))
    assert encoder.fidelity and encoder.encode(documents[:3]).shape == (3, encoder.embedding_size)
    assert "compiling it for this run alone" in capsys.readouterr().err


@openvino
@pytest.mark.process
def test_a_signal_after_graphs_are_freed_is_handled(calibrated: Path, tmp_path: Path) -> None:
    """OpenVINO replaces the stack of signal handlers."""
    program = tmp_path / "program.py"
    program.write_text(
        "import signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from common.paddle_setup import set_up_paddle\n"
        "set_up_paddle()\n"
        "from common.signals import terminate\n"
        "from encoding.encoder import load_encoder\n"
        f"encoders = [load_encoder({str(calibrated)!r}, engine='openvino') for _ in range(2)]\n"
        "while encoders:\n"
        "    encoders.pop(0)\n"
        "signal.signal(signal.SIGTERM, terminate)\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "except KeyboardInterrupt:\n"
        "    print('handled')\n",
        encoding="utf-8",
    )
    done = run_script(program)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The choice


@openvino
def test_engine_auto_measures_once(folder: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few texts in fp32 aren't worth it."""
    measured: list[str] = []
    speeds = {"StaticEncoder": 2.0}

    def speed(embed: object, vocabulary_size: int) -> float:
        measured.append(type(embed.__self__).__name__)
        return speeds[measured[-1]]

    monkeypatch.setattr(engines, "_texts_per_second", speed)
    load_encoder(folder, text_count=STATIC_FROM_TEXTS - 1)
    assert measured == []
    for speeds["OpenVinoEncoder"], name in ((3.0, "OpenVinoEncoder"), (1.0, "StaticEncoder")):
        for _ in range(2):
            encoder = load_encoder(folder, text_count=STATIC_FROM_TEXTS)
            assert type(encoder.embed.__self__).__name__ == name
        assert measured == ["StaticEncoder", "OpenVinoEncoder"]
        measured.clear()
        (folder / OPENVINO_FOLDER / SPEEDS_FILE).write_text("{}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "openvino"}, r"--engine openvino: OpenVINO isn't installed; .* sh scripts/setup\.sh --openvino$"),
        ({"precision": "int8"}, r"--precision int8: OpenVINO isn't installed; .* sh scripts/setup\.sh --openvino$"),
    ],
)
def test_without_the_extra_its_command_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=message):
        load_encoder(checkpoint, **options)
    with pytest.raises(InputError, match=message):
        load_exported(checkpoint, **options)


def test_without_the_extra_auto_is_static(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    encoder = load_encoder(folder, text_count=STATIC_FROM_TEXTS)
    assert type(encoder.embed.__self__).__name__ == "StaticEncoder"
    assert not (folder / OPENVINO_FOLDER).exists()


@pytest.mark.parametrize("engine", ["dygraph", "static"])
def test_int8_with_another_engine_is_refused(checkpoint: Path, engine: str) -> None:
    with pytest.raises(InputError, match=f"only the engine openvino has it; leave out --engine {engine}"):
        load_encoder(checkpoint, precision="int8", engine=engine)


def test_int8_on_a_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="--precision int8: only a CPU computes in it"):
        check_precision("int8", "gpu")
