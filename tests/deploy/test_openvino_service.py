"""int8 with OpenVINO for an exported model: in the service, with real clients, and in predict.py."""

import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.service_clients import http_client, rpc_client, running_service
from common.errors import InputError
from data import read_texts
from encoding.exported_model import load_exported

pytestmark = pytest.mark.openvino
TEXTS = ["水稻的产量", "论小麦品质研究小麦,品质", "水", "高血压"]
TOLERANCE = 1e-5  # of a component


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """An exported model beside which graphs can be kept."""
    return shutil.copytree(exported, tmp_path / "output")


def differ(vectors: np.ndarray, others: np.ndarray) -> bool:
    return float((vectors * others).sum(axis=1).min()) < 1 - TOLERANCE


@pytest.mark.server
def test_a_service_answers_in_int8(folder: Path, recall_data: Path) -> None:
    """Without texts to calibrate on it doesn't start."""
    int8 = ["--threads", "1", "--precision", "int8", "--min_overlap", "0.8"]
    with pytest.raises(InputError, match="it isn't calibrated yet"), running_service(folder, *int8):
        pass
    texts = recall_data / "corpus.csv"
    with (
        running_service(folder, *int8, "--calibration_file", str(texts)) as service,
        rpc_client(service) as rpc,
        http_client(service) as http,
    ):
        vectors = [client(TEXTS) for client in (rpc, http)]
    assert any("int8: on a sample its vectors have cosines of" in line for line in service.log)
    kept = load_exported(folder, precision="int8", calibration_texts=read_texts(texts))
    for each in vectors:
        assert differ(each, load_exported(folder).encode(TEXTS))
        np.testing.assert_allclose(each, kept.encode(TEXTS), atol=TOLERANCE)


def test_predict_calibrates_on_its_texts(
    folder: Path, recall_data: Path, deploy_predict: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder.parent / "vectors.npy"
    options = ["--model_dir", folder, "--precision", "int8", "--min_overlap", "0.8"]
    options += ["--text_file", recall_data / "corpus.csv", "--output", output]
    assert deploy_predict.main(list(map(str, options))) == 0
    assert "int8: on a sample its vectors have cosines of" in capsys.readouterr().err
    texts = (recall_data / "corpus.csv").read_text(encoding="utf-8").splitlines()
    assert differ(np.load(output), load_exported(folder).encode(texts))
