"""Runs `bash scripts/quickstart.sh` as a newcomer does, in a copy of the project with the tests' environment."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import recall
from data import positives_by_query, read_hits, read_text_pairs
from helpers import ROOT
from milvus_helpers import Milvus
from retrieval.metrics import evaluate, metrics


class Quickstart(NamedTuple):
    """What the script left, and its output."""

    folder: Path  # the copy of the project
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    left_out = shutil.ignore_patterns(".*", "tests", "quickstart", "docs", "__pycache__")
    folder = shutil.copytree(ROOT, tmp_path_factory.mktemp("quickstart") / "clone", ignore=left_out)
    (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    done = subprocess.run(
        ["bash", str(folder / "scripts" / "quickstart.sh")],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=1800,
        check=False,
    )
    return Quickstart(folder, done)


@pytest.mark.process
def test_quickstart(quickstart: Quickstart) -> None:
    folder, done = quickstart
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(bm25|before_training|after_training) +([\d. ]+)$", done.stdout, re.MULTILINE)
    recall = {name: [float(value) for value in values.split()] for name, values in rows}
    assert all(len(values) == 5 and values == sorted(values) for values in recall.values())
    assert recall["after_training"][0] > recall["before_training"][0] + 20
    assert 30 < recall["bm25"][0] < 80
    assert len(re.findall(r"^0\.\d+\t.+\t.+$", done.stdout, re.MULTILINE)) == 3  # similarities of pairs
    assert "\n[1, 256]\n[[" in done.stdout
    assert len(re.findall(r"^.+\t.+\t-?[01]\.\d+$", done.stdout, re.MULTILINE)) == 5  # top hits
    written = done.stdout.split("== written")[1]
    for name in re.findall(r"quickstart/\S+", written):
        assert (folder / name).is_dir()
    assert "Warning" not in done.stderr
    assert {path.name for path in folder.iterdir()} - {path.name for path in ROOT.iterdir()} <= {"quickstart"}


@pytest.mark.process
@pytest.mark.milvus
@pytest.mark.server
def test_every_engine_finds_the_same(quickstart: Quickstart, milvus: Milvus, tmp_path: Path) -> None:
    """Recall@K, MRR and nDCG of an approximate index are within half a point of exact search's."""
    work = quickstart.folder / "quickstart"
    checkpoint = max(work.glob("checkpoints/model_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    corpus, pairs = work / "recall" / "corpus.csv", work / "recall" / "test.csv"
    server = ["--ann", "milvus", "--milvus_uri", milvus.uri, "--milvus_token_file", str(milvus.token_file)]
    server += ["--milvus_collection", "quickstart"]
    engines = {"exact": ["--ann", "exact"], "hnswlib": ["--ann", "hnswlib"], "server": server}
    engines["embedded"] = ["--ann", "milvus", "--index_dir", str(tmp_path / "index")]
    found, positives = {}, positives_by_query(read_text_pairs(pairs))
    for name, options in engines.items():
        arguments = ["--device", "cpu", "--params_path", str(checkpoint), "--similar_text_pair", str(pairs)]
        arguments += ["--corpus_file", str(corpus), "--embedding_dir", str(tmp_path / "vectors")]
        arguments += ["--recall_result_dir", str(tmp_path), "--recall_num", "50", "--batch_size", "64"]
        assert recall.main([*arguments, *options]) == 0
        found[name] = list(metrics(evaluate(positives, read_hits(tmp_path / "recall_result.txt"), 50)).values())
    assert found["exact"][0] > 0.3
    for name, values in found.items():
        assert values == pytest.approx(found["exact"], abs=0.005), name
