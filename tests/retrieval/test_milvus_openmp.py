"""Embedded Milvus beside OpenVINO and Paddle, in a process of its own: the order in which they are loaded matters."""

from pathlib import Path

import pytest

from helpers import ROOT, run_script

SEARCH = """
import os, sys
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "2"
sys.path[:0] = [".", "tests"]
from common.paddle_setup import set_up_paddle
set_up_paddle()
import numpy as np
from encoding.encoder import load_encoder
checkpoint, folder = sys.argv[1:]
load_encoder(checkpoint, engine="openvino").encode(["水稻"] * 100)
from ann_util import IndexOptions
from helpers import unit_vectors
from retrieval.milvus_collection import CollectionInfo
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_server import MilvusServer
vectors, queries = unit_vectors(3000, 64), unit_vectors(256, 64, seed=1)
info = CollectionInfo("m", "c", "fp32", True, 64, ef=1000)
index = MilvusIndex.create(MilvusServer(str(Path(folder, "milvus.db"))), "one", info, IndexOptions(), len(vectors))
documents = [f"text {row}" for row in range(len(vectors))]
index.add(vectors, documents)
index.finish(documents)
found = [index.find(queries, 50)[1] for _ in range(6)]
print("queries that differ:", [int((each != found[0]).any(axis=1).sum()) for each in found[1:]])
"""


@pytest.mark.process
@pytest.mark.milvus
@pytest.mark.openvino
def test_a_search_finds_the_same_after_openvino_has_computed(checkpoint: Path, tmp_path: Path) -> None:
    """With two OpenMP libraries in one search, its threads wrote into each other's results."""
    done = run_script("-c", SEARCH, checkpoint, tmp_path, cwd=ROOT)
    assert "queries that differ: [0, 0, 0, 0, 0]" in done.stdout, done.stdout + done.stderr
