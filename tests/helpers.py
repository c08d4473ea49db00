"""What several test files share: tiny data and models, ways to run a script, and comparisons."""

import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from common.errors import InputError
from common.files import write_json
from common.paddle_setup import set_up_paddle
from data import TextTokenizer, write_vocabulary
from examples.vocabulary import build_vocabulary
from modeling.weight_files import read_weights

if TYPE_CHECKING:
    from modeling.checkpoint import LoadedModel

ROOT = Path(__file__).resolve().parents[1]
V1 = ROOT / "tests" / "data" / "v1.0.0"  # what version 1.0.0 wrote
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
# Scripts, symbols, accents, control characters and word lengths that a tokenizer treats differently.
VARIED_TEXTS = [
    "基于深度学习的医学图像分割方法综述",
    "Support Vector Machines in 2019: a survey of 1,234 papers",
    "水温25℃≥20×3±0.5→①№™用于β-葡聚糖",
    "naïve café Ångström Ünïcödé ŁÓDŹ señor Þórr",
    "ΑΛΦΆΒΗΤΟΣ ΟΔΥΣΣΕΎΣ άλφα Привет ЁЖ Straße İstanbul",
    "ＡＢＣ１２３，全角！（形式）～ｘ",
    "表情😀👩‍👩‍👧‍👦🇨🇳 ok👍🏽",
    "e\u0301a\u0308 n\u0303o 한국어 ᄒ\u1161\u11ab カタカナ ﾊﾟ ひらがな゙",
    "控制\u0001字\u0085符\u007f和\x0b换\x0c页 \ufffd end",
    "零\u200b宽\u200d字\ufeff符\u2060 a\u200bb soft\u00adhyphen",
    "x" * 100 + " " + "x" * 101 + " " + "é" * 101 + " " + "antidisestablishmentarianism" * 4,
    "前" + "y" * 90 + "后" + "y" * 90,
    "a+b=c a_b <a|b> $5 `x` ^2 ~ [a] {b} \\ / # @ % & * ' \"",
    "H₂O x² µm ª º ½ Ⅳ ㎡ ㈱ 〇 〇〇 々 ŋ Ø Ʊ ǅ ﬁ",
    "  \u00a0\u3000\u2003 前后空格 \u2028 ",
    "𠀀𪜀 豈 扩展汉字 ☆★ ♂♀ ※ … —— ‘’“” «» €£¥",
    "",
    "\u200b",
]
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


def _has_gpu() -> bool:
    """Whether `--device gpu` can be used here."""
    set_up_paddle()  # before Paddle is imported
    from common.device import choose_device

    return choose_device(None) == "gpu"


has_gpu = _has_gpu()


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


def new_model(folder: Path, model_class: type | None = None, **options: Any) -> "LoadedModel":
    """A model of a model folder, with the same random weights in each call; options: of `create_model`.

    model_class: SemanticIndexBase by default.
    """
    from base_model import SemanticIndexBase  # only after conftest has set Paddle up
    from common.device import set_seed
    from modeling.checkpoint import create_model

    set_seed(1)
    return create_model(
        model_class or SemanticIndexBase, from_scratch=str(folder), **{"output_emb_size": 16, **options}
    )


def small_tokenizer(max_seq_length: int = 16, config: dict[str, Any] | None = None) -> TextTokenizer:
    """Knows every character of VARIED_TEXTS."""
    return TextTokenizer(build_vocabulary(VARIED_TEXTS), max_seq_length, config)


def random_texts(count: int, seed: int = 3) -> list[str]:
    """Texts of 1 to 49 characters that `small_tokenizer` knows."""
    rng = random.Random(seed)
    characters = sorted(set(VARIED_TEXTS[0]))
    return ["".join(rng.choices(characters, k=rng.randrange(1, 50))) for _ in range(count)]


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


def evaluation_options(recall_data: Path, result_dir: Path, *options: str) -> list[str]:
    """Options of `train_batch_neg.py` that evaluate on dev.csv; later ones win."""
    return [
        *("--evaluate", "--similar_text_pair_file", str(recall_data / "dev.csv"), "--ann", "exact"),
        *("--corpus_file", str(recall_data / "corpus.csv"), "--recall_result_dir", str(result_dir), *options),
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


def run_without_paddle(script: str | Path, *options: str | Path) -> tuple[int, str, str]:
    """Runs a script in a process of its own, which must not import Paddle; gives exit code, stdout and stderr."""
    done = run_script("-X", "importtime", script, *options)
    lines = done.stderr.splitlines(keepends=True)
    imports = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    assert "numpy" in imports  # that imports are seen
    assert not {"paddle", "paddlenlp", "visualdl"}.intersection(name.partition(".")[0] for name in imports)
    return done.returncode, done.stdout, "".join(line for line in lines if not line.startswith("import time:"))


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """This process can't write files of more bytes within it, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def unit_vectors(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Random ones, float32 [count, dim]."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def flip_a_bit(file: Path, numbers: random.Random) -> None:
    """In a random byte."""
    content = bytearray(file.read_bytes())
    content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
    file.write_bytes(content)


def assert_close(value: np.ndarray, expected: np.ndarray, name: str) -> None:
    """To 1e-5 of its largest element, where that is above 1: float32 has seven digits."""
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()), err_msg=name)


def assert_same_bits(first: Path, second: Path) -> None:
    """Weights, optimizer and progress of two checkpoints."""
    for name in ("model_state.pdparams", "training_optimizer.safetensors"):
        ours, theirs = read_weights(first / name), read_weights(second / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    assert (first / "training_state.json").read_text() == (second / "training_state.json").read_text()


def assert_same_weights(first: Path, second: Path, tolerance: float = 0.0) -> None:
    ours, theirs = (read_weights(folder / "model_state.pdparams") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=tolerance, err_msg=name)


def poisoned(checkpoint: Path, folder: Path) -> Path:
    """The weights of a checkpoint in another folder; a text with [UNK] overflows in them."""
    import paddle  # only after conftest has set it up

    shutil.copytree(checkpoint, folder)
    (folder / "manifest.json").unlink()
    weights = read_weights(folder / "model_state.pdparams")
    unknown = (folder / "vocab.txt").read_text().splitlines().index("[UNK]")
    weights["ptm.embeddings.word_embeddings.weight"][unknown] = np.finfo(np.float32).max
    paddle.save(weights, str(folder / "model_state.pdparams"))
    return folder / "model_state.pdparams"


def weights_refusal(path: Path) -> str:
    """The one line that refuses a weights file; fails if the file is read."""
    with pytest.raises(InputError) as error:
        read_weights(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.function, self.arguments


def children(process: int) -> list[int]:
    """Numbers of a process's own processes."""
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for file in files for number in file.read_text().split()]


def about_texts_alone(stderr: str) -> bool:
    """Whether all lines say that texts are cut or unknown, as those of the document are to a tiny model."""
    return all(" are cut to " in line or " are [UNK]" in line for line in stderr.splitlines())


def refuses(done: Completed, *words: str) -> bool:
    """Whether a script ended with exit code 2 and one line on stderr that holds all `words`."""
    return done.returncode == 2 and done.stderr.count("\n") == 1 and all(word in done.stderr for word in words)


def latest_folder(save_dir: Path) -> Path | None:
    """The newest checkpoint that a training can be resumed from, if any."""
    from batch_negative.resume import latest_checkpoint  # only after conftest has set Paddle up

    latest = latest_checkpoint(save_dir)
    return latest and latest[0]


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether the file of a link exists and, after `#`, the heading."""
    name, _, anchor = link.partition("#")
    file = page.parent / name if name else page
    return file.exists() and (not anchor or anchor in anchors(file))


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
