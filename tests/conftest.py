"""Tiny models and files that the tests make themselves, the ways to run a script, and how gradients are compared."""

import contextlib
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from common.files import write_json
from common.paddle_setup import set_up_paddle

from examples.vocabulary import build_vocabulary
from data import write_vocabulary

set_up_paddle()

ROOT = Path(__file__).resolve().parents[1]
Completed = subprocess.CompletedProcess[str]
# Paddle's gloo fails this assertion now and then while ranks connect, before a script of ours has done anything.
GLOO_ABORT = "uv__finish_close: Assertion"
OBJECTS = [
    "水稻",
    "玉米",
    "小麦",
    "大豆",
    "棉花",
    "苹果",
    "土壤",
    "水库",
    "桥梁",
    "隧道",
    "糖尿病",
    "高血压",
    "图书馆",
    "钢材",
]
ASPECTS = ["产量", "品质", "现状", "影响因素", "检测方法", "评价", "管理", "对策", "应用", "优化", "模型", "机理"]
CONFIG = {
    "architectures": ["ErnieModel"],
    "model_type": "ernie",
    "hidden_act": "relu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}


@pytest.fixture(autouse=True)
def _all_threads() -> Iterator[None]:
    """Gives the next test all threads again: a predictor's number of them is its whole process's."""
    yield
    from paddle.base import core

    core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def all_pairs() -> list[tuple[str, str]]:
    """168 pairs of distinct queries and titles, shuffled."""
    pairs = [
        (f"{thing}的{aspect}", f"论{thing}{aspect}研究{thing},{aspect}") for thing in OBJECTS for aspect in ASPECTS
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def write_pairs(path: Path, pairs: list[tuple[str, ...]]) -> Path:
    """Writes tab-separated lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def make_model_folder(folder: Path, **config: object) -> Path:
    """A folder for `--from_scratch`: CONFIG with changes, and a vocabulary that covers `all_pairs`."""
    vocabulary = build_vocabulary(text for pair in all_pairs() for text in pair)
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder / "vocab.txt", vocabulary)
    write_json(folder / "config.json", {**CONFIG, "vocab_size": len(vocabulary), **config})
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ERNIE without weights."""
    return make_model_folder(tmp_path_factory.mktemp("ernie"))


@pytest.fixture(scope="session")
def still_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ERNIE without weights and without dropout."""
    folder = tmp_path_factory.mktemp("still_ernie")
    return make_model_folder(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="session")
def recall_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv, dev.csv and corpus.csv."""
    folder = tmp_path_factory.mktemp("data") / "recall"
    pairs = all_pairs()
    write_pairs(folder / "train.csv", pairs[:128])
    write_pairs(folder / "dev.csv", pairs[128:])
    write_pairs(folder / "corpus.csv", [(title,) for _, title in pairs])
    return folder


@pytest.fixture(scope="session")
def checkpoint(model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that a short training wrote."""
    import train_batch_neg

    save_dir = tmp_path_factory.mktemp("checkpoints")
    train_batch_neg.main(train_options(model_folder, recall_data, save_dir, "--max_steps", "4"))
    return save_dir / "model_4"


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What export_model.py makes of the checkpoint."""
    import export_model

    folder = tmp_path_factory.mktemp("exported") / "output"
    assert export_model.main(["--params_path", str(checkpoint), "--output_path", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def cpp_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ server, built with AddressSanitizer; it needs `cpp_environment`."""
    folder = tmp_path_factory.mktemp("build") / "build"
    options = ["--sanitize", "--build-dir", folder, "--python", sys.executable]
    done = subprocess.run(
        ["sh", ROOT / "deploy" / "C++" / "build.sh", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}/serving\n"
    return folder / "serving"


def cpp_environment(**variables: str) -> dict[str, str]:
    """Under AddressSanitizer dlopen doesn't see the wheel's RUNPATH."""
    import paddle

    libraries = Path(paddle.__file__).parent / "libs"
    return {**os.environ, "LD_LIBRARY_PATH": str(libraries), "ASAN_OPTIONS": "detect_leaks=1", **variables}


def train_options(model_folder: Path, recall_data: Path, save_dir: Path, *options: str) -> list[str]:
    """Options of a small training from scratch; later ones win."""
    return [
        *("--from_scratch", str(model_folder), "--train_set_file", str(recall_data / "train.csv")),
        *("--save_dir", str(save_dir), "--max_seq_length", "24", "--pooling", "mean", "--output_emb_size", "16"),
        *("--batch_size", "16", "--learning_rate", "2e-3", *options),
    ]


def run_script(*arguments: str | Path, ranks: int = 1, log_dir: Path | None = None, cwd: Path = ROOT) -> Completed:
    """Runs `python ARGUMENTS`, or the same on several ranks under paddle.distributed.launch, which logs to log_dir."""
    launch = ["-m", "paddle.distributed.launch", "--nproc_per_node", ranks, "--log_dir", log_dir] if ranks > 1 else []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *map(str, launch), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=600,
            check=False,
        )
        if GLOO_ABORT not in done.stdout + done.stderr:
            break
    return done


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """This process can't write files of more bytes within it, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_close(value: np.ndarray, expected: np.ndarray, name: str) -> None:
    """To 1e-5 of its largest element, where that is above 1: float32 has seven digits."""
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()), err_msg=name)
