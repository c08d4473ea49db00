"""Runs the commands and snippets of the READMEs and of docs/, with only the device options changed."""

import ast
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
import pytest

from base_model import SemanticIndexBase
from helpers import ROOT, about_texts_alone, all_pairs, leads_somewhere, make_model_folder, write_pairs
from milvus_helpers import Milvus
from modeling.checkpoint import create_model, save_checkpoint

Completed = subprocess.CompletedProcess[str]
PACKAGES = ("common", "modeling", "encoding", "retrieval", "mining", "reporting")
PACKAGES += ("batch_negative", "serving", "data_check")
PAGES = (ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith("_cn")))
README_LINES = 200
NOT_RUN = {
    "bash scripts/quickstart.sh\nbash scripts/test.sh": "test_quickstart.py runs the first, the second runs this test",
    ". .venv/bin/activate": "the tests run in an environment already",
    "sh scripts/setup.sh --gpu cu126": "needs the network and a GPU",
    "sh scripts/setup.sh --serving": "the tests' environment has Paddle Serving",
    "sh scripts/download_data.sh": "needs the network",
    "sh scripts/train_batch_neg.sh cpu": "the fixture `trained` runs it",
}
SERVICE = re.compile(r"web_service\.py|python rpc_client\.py|curl")  # test_serving_commands and test_search_commands
CPP_SERVER = "deploy/C++"  # the tests of the C++ server run these
TWO_MACHINES = "--nnodes 2"  # a test of training runs two launchers on one machine
ON_GPUS = "--epochs 3"  # test_training_commands
LARGE_CORPUS = "--index_dir"  # test_large_corpus, test_words_beside_vectors
MILVUS = "--ann milvus"  # test_milvus_commands
SEARCH_PAGE = ROOT / "docs" / "search.md"  # test_search_commands runs all of it
DOCUMENT_COMMANDS = (  # of the document that this project implements; all are in docs/
    "python -u -m paddle.distributed.launch --gpus",
    "sh scripts/train_batch_neg.sh",
    "sh scripts/run_build_index.sh",
    "python -u evaluate.py",
    "sh scripts/evaluate.sh",
    "python inference.py",
    "sh scripts/predict.sh",
    "python export_model.py --params_path checkpoints/inbatch/model_40/model_state.pdparams --output_path=./output",
    "sh scripts/export_model.sh",
    "python deploy/python/predict.py --model_dir=./output",
    "sh deploy/python/deploy.sh",
    "python export_to_serving.py",
    "sh scripts/export_to_serving.sh",
    "python web_service.py",
    "python rpc_client.py",
    "python -m paddle_serving_server.serve --model serving_server --port 9393",
    "sh deploy/C++/start_server.sh",
    "python deploy/C++/rpc_client.py",
    "python deploy/C++/http_client.py",
    "--init_from_ckpt simcse/model_20000/model_state.pdparams",
)
OTHER_PROGRAMS_OPTIONS = {  # of Paddle's launcher, VisualDL, Paddle Serving and Docker
    *("gpus", "nproc_per_node", "nnodes", "master", "log_dir", "logdir"),
    *("gpu_id", "runtime_thread_num"),
    *("read", "tmpfs", "cpus"),  # the first is --read-only
}
MESSAGE = re.compile(r"^\|[^`|]*`([^`]+)`[^|]*\|", re.MULTILINE)  # the first cell of a row of a table
FOREIGN_MESSAGE = re.compile(r"\w+Error: ")  # from Paddle's launcher


def chinese(page: Path) -> Path:
    """The page in Chinese."""
    return page.with_stem(page.stem + "_cn")


def read(page: Path) -> str:
    """The text of a page."""
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)
    return [block.strip() for name, block in fences if name == language]


SH_BLOCKS = list(dict.fromkeys(block for page in PAGES for block in code_blocks(page, "sh")))
SNIPPETS = [(page.stem, block) for page in PAGES if page != SEARCH_PAGE for block in code_blocks(page, "python")]
SERVING_BLOCKS = [block for block in SH_BLOCKS if block not in code_blocks(SEARCH_PAGE, "sh")]
OTHER_BLOCKS = [
    block
    for block in SH_BLOCKS
    if block not in NOT_RUN
    and not any(mark in block for mark in (CPP_SERVER, TWO_MACHINES, ON_GPUS, LARGE_CORPUS, MILVUS))
    and not SERVICE.search(block)
]


def on_the_cpu(command: str, ranks: int = 1) -> str:
    """Changes only the device options."""
    command = re.sub(r'--gpus "[0-9,]+"', f"--nproc_per_node {ranks}", command)
    command = command.replace("--device gpu", "--device cpu")
    return re.sub(r"^(python inference\.py.*)$", r"\1 --device cpu", command, flags=re.MULTILINE)


def run(command: str, folder: Path) -> Completed:
    """Runs a block of commands with the tests' Python as `python`."""
    return execute(["sh", "-euc", command], folder)


def execute(command: list[str], folder: Path) -> Completed:
    """Runs a program in a folder, with no other code than the folder's in its path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )


def succeed(command: str, folder: Path) -> Completed:
    """`run`, and the command must succeed."""
    done = run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project without its environment, with data in recall/ and tiny models in ernie-1.0 and bge-small-zh-v1.5."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, folder)
    for name in (*PACKAGES, "deploy", "scripts", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("build", "__pycache__"))
    pairs = all_pairs()
    write_pairs(folder / "recall" / "train.csv", pairs * 6)  # 1,008 pairs: 16 steps of 64 an epoch, 48 in all
    write_pairs(folder / "recall" / "train_unsupervised.csv", [(title,) for _, title in pairs])
    write_hard_negatives(folder)
    write_pairs(folder / "recall" / "dev.csv", pairs[:20])
    write_pairs(folder / "recall" / "test.csv", pairs[20:24])
    write_pairs(folder / "recall" / "corpus.csv", [(title,) for _, title in pairs])
    ernie = make_model_folder(folder / "ernie-1.0", max_position_embeddings=64)
    model, tokenizer = create_model(SemanticIndexBase, from_scratch=str(ernie))
    paddle.save(model.ptm.state_dict(), str(ernie / "model_state.pdparams"))
    shutil.copytree(ernie, folder / "bge-small-zh-v1.5")
    save_checkpoint(folder / "simcse" / "model_20000", model, tokenizer)
    return folder


def write_hard_negatives(folder: Path) -> None:
    pairs = all_pairs()
    write_pairs(folder / "recall" / "train_hard.csv", [(*pair, pairs[row - 1][1]) for row, pair in enumerate(pairs)])


@pytest.fixture(scope="module")
def trained(checkout: Path) -> Path:
    """The checkout after training."""
    succeed("sh scripts/train_batch_neg.sh cpu", checkout)
    return checkout


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """The checkout after the export."""
    succeed("sh scripts/export_model.sh", trained)
    return trained


@pytest.fixture(scope="module")
def large_corpus(trained: Path) -> Completed:
    """The commands that save an index, search it and add to it."""
    return succeed(next(block for block in SH_BLOCKS if LARGE_CORPUS in block and MILVUS not in block), trained)


# ---------------------------------------------------------------------------------------------------------------------
# The pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_both_languages_say_the_same(page: Path) -> None:
    other = chinese(page)
    languages = ["sh", "python", ""] + ["text"] * (page.stem != "README")  # the README's layout is translated
    for language in languages:
        assert code_blocks(page, language) == code_blocks(other, language)
    for what in (r"^#+ ", r"^\|", r"^- "):  # headings, rows of tables, items of lists
        assert len(re.findall(what, read(page), re.MULTILINE)) == len(re.findall(what, read(other), re.MULTILINE)), what
    options, other_options = [set(re.findall(r"--[a-z][a-z_]+", read(path))) for path in (page, other)]
    assert options == other_options
    assert f"]({other.name})" in read(page)
    assert f"]({page.name})" in read(other)


@pytest.mark.parametrize("page", [path for page in PAGES for path in (page, chinese(page))], ids=lambda page: page.stem)
def test_pages_name_files_that_exist(page: Path) -> None:
    text = read(page)
    names = re.findall(r"`([\w/+]+\.(?:py|sh|md|yml))`", text)
    assert [name for name in names if not (ROOT / name).exists()] == []
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not leads_somewhere(page, link)] == []


@pytest.mark.parametrize("readme", ["README.md", "README_cn.md"])
def test_readmes_are_short(readme: str) -> None:
    assert len(read(ROOT / readme).splitlines()) <= README_LINES


def test_blocks_that_are_not_run_are_still_there() -> None:
    assert set(NOT_RUN) <= set(SH_BLOCKS)


def test_docs_have_the_documents_commands() -> None:
    text = "\n".join(read(page) for page in PAGES)
    assert [command for command in DOCUMENT_COMMANDS if command not in text] == []


def string_literals(path: Path) -> Iterator[str]:
    """The literal parts of a Python file's strings."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def longest_part(message: str, text: str) -> int:
    """The length of the longest part of `message` that is in `text`."""
    size = len(message)
    return max(end - start for start in range(size) for end in range(start, size + 1) if message[start:end] in text)


@pytest.fixture(scope="module")
def code_texts() -> list[str]:
    """The literal strings of the Python code, and all of the shell scripts and of the C++ code."""
    sources = [path for name in (*PACKAGES, "benchmarks", "deploy", "tools") for path in (ROOT / name).rglob("*.py")]
    texts = [literal for path in (*ROOT.glob("*.py"), *sources) for literal in string_literals(path)]
    texts += [read(path) for name in ("scripts", "deploy") for path in (ROOT / name).rglob("*.sh")]
    return texts + [re.sub(r'"\s*\n\s*"', "", read(path)) for path in (ROOT / "deploy").rglob("*.cpp")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_options_that_exist(page: Path, code_texts: list[str]) -> None:
    known = {name for text in code_texts for name in re.findall(r"--([a-z][a-z_]*)", text)} | set(code_texts)
    known |= OTHER_PROGRAMS_OPTIONS  # and settings of the service, whose options are made from their names
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)", read(page))) - known == set()


def test_troubleshooting_names_messages_of_the_code(code_texts: list[str]) -> None:
    source = "\0".join(code_texts)
    messages = [text for text in MESSAGE.findall(read(ROOT / "docs" / "troubleshooting.md")) if "`" not in text]
    messages = [re.sub(r"^--\w+ ?", "", text) for text in messages if not FOREIGN_MESSAGE.match(text)]
    assert len(messages) > 15
    assert [text for text in messages if longest_part(text, source) < max(12, 0.3 * len(text))] == []


# ---------------------------------------------------------------------------------------------------------------------
# Their commands


@pytest.mark.process
def test_training_commands(trained: Path, tmp_path: Path) -> None:
    """Training from the pretrained model and from an unsupervised one, on two processes."""
    assert (trained / "checkpoints" / "inbatch" / "model_40" / "model_state.pdparams").is_file()
    assert (trained / "checkpoints" / "inbatch" / "model_best" / "train_result.txt").is_file()
    commands = [block for block in SH_BLOCKS if ON_GPUS in block]
    assert len(commands) == 2
    left_out = shutil.ignore_patterns("checkpoints", "output", "corpus_index", "recall_result_dir")
    folder = shutil.copytree(trained, tmp_path / "two_processes", ignore=left_out)
    for command, save_dir in zip(commands, ("inbatch", "simcse_inbatch_negative"), strict=True):
        succeed(on_the_cpu(command, ranks=2), folder)
        steps = {path.name for path in (folder / "checkpoints" / save_dir).iterdir()}
        assert {"model_10", "model_20", "model_24"} <= steps


@pytest.mark.process
@pytest.mark.parametrize(
    "block", OTHER_BLOCKS, ids=lambda block: "+".join(re.findall(r"[\w]+\.(?:py|sh)", block)) or block
)
def test_other_commands(trained: Path, request: pytest.FixtureRequest, block: str) -> None:
    if "evaluate" in block:
        succeed("sh scripts/run_build_index.sh cpu", trained)
    if "--model_dir" in block or "export_to_serving.py" in block:
        request.getfixturevalue("exported")
    if "score_pairs.py" in block:  # the commands of another page mine none with a tiny model
        write_hard_negatives(trained)
    shutil.rmtree(trained / "recall_log", ignore_errors=True)
    done = succeed(on_the_cpu(block), trained)
    check_files(block, trained)
    check_output(block, done.stdout)
    if "--resume_from" in block:
        assert "model_2" in succeed(on_the_cpu(block), trained).stderr  # it goes on from its last checkpoint


WRITTEN = {  # what is in a block of commands -> files that it writes
    "pretrain.py": ["checkpoints/pretrained/model_6/manifest.json"],  # 336 pairs of 168 texts
    "best_model.sh": ["best_model/data.html", "best_model/report.html", "best_model/index/manifest.json"],
    "--resume_from": ["checkpoints/large_batch/model_2/manifest.json"],  # 1,008 pairs
    "--unsupervised": ["checkpoints/simcse/model_3/manifest.json"],  # 168 texts
    "score_pairs.py": ["checkpoints/distilled/model_3/manifest.json"],  # 168 pairs
    "--write_scores": ["checkpoints/words/model_16/manifest.json"],  # 1,008 pairs
}
VECTORS = "deployed_vectors.npy", "corpus_vectors.npy"


def check_files(block: str, folder: Path) -> None:
    """What a block of commands must have written."""
    for file in (file for mark, files in WRITTEN.items() if mark in block for file in files):
        assert (folder / file).is_file(), file
    for file in (file for file in VECTORS if file in block):
        assert np.load(folder / file).shape == (168, 256)
    if "recall.py" in block or "run_build_index" in block:
        check_recall_result(folder)
        assert (folder / "recall_log" / "workerlog.0").is_file() == ("--log_dir" in block)
    if "mine_hard_negatives.py" in block:
        output = "train_words.csv" if "--lexical" in block else "train_hard.csv"
        train, mined = (read(folder / "recall" / name).splitlines() for name in ("train.csv", output))
        assert ["\t".join(line.split("\t")[:2]) for line in mined] == train
    if "export_model.py" in block:
        assert (folder / "output" / "inference.get_pooled_embedding.onnx").is_file() == ("onnx" in block)


def check_output(block: str, stdout: str) -> None:
    """What a block of commands must have printed."""
    if "best_model.sh" in block:  # words teach only a model that starts from random weights
        assert "== train\n" in stdout and "== mine_words" not in stdout
    if "evaluate" in block:
        names = [line.split("=")[0] for line in stdout.splitlines()]
        assert names == ["recall@1", "recall@5", "recall@10", "recall@20", "recall@50", "mrr@50", "ndcg@50"]
    if "export_to_serving" in block:
        assert stdout.splitlines()[-1] == "wrote serving_server and serving_client"
    if "export_model.py" in block:
        written = "output_st" if "output_st" in block else "output/inference.get_pooled_embedding.*"
        assert stdout.endswith(f"wrote {written}\n")
    if block == "python deploy/python/predict.py --model_dir=./output":
        assert re.fullmatch(r"\(1, 256\)\n\[\[[^\]]*\]\]\n\[[^,\]]*, [^,\]]*\]\n", stdout)
    elif "deploy/python/predict.py" in block:
        assert "(2, 256)" in stdout
        assert "(168, 256)" in stdout
        assert "texts_per_s=" in stdout
    elif "predict.py" in block:
        assert len([line for line in stdout.splitlines() if re.fullmatch(r"-?\d\.\d+(e-\d+)?", line)]) == 4
    if "inference.py" in block:
        assert stdout.startswith("[1, 256]\n[[")
        assert "[2, 256]" in stdout
        assert "[168, 256]" in stdout


def check_recall_result(folder: Path) -> None:
    """50 hits for each of the 20 queries of dev.csv."""
    lines = read(folder / "recall_result_dir" / "recall_result.txt").splitlines()
    assert len(lines) == 20 * 50
    assert all(len(line.split("\t")) == 3 for line in lines)


@pytest.mark.process
def test_large_corpus(trained: Path, large_corpus: Completed) -> None:
    check_recall_result(trained)
    hits = [line for line in large_corpus.stdout.splitlines() if re.match(r" +\d+  -?\d\.\d{4}  ", line)]
    assert len(hits) == 20  # of --query and --interactive
    assert "of 169 documents" in large_corpus.stdout


@pytest.mark.process
@pytest.mark.usefixtures("large_corpus")
def test_words_beside_vectors(trained: Path) -> None:
    done = succeed(next(block for block in SH_BLOCKS if "--lexical" in block), trained)
    check_recall_result(trained)
    hits = [
        line for line in done.stdout.splitlines() if re.match(r" +\d+  \d\.\d{4}  (vector |lexical|both   )  ", line)
    ]
    assert len(hits) == 10
    assert len([line for line in done.stdout.splitlines() if line.startswith(("vector ", "lexical ", "hybrid "))]) == 12


@pytest.mark.server
@pytest.mark.milvus
def test_milvus_commands(trained: Path, milvus: Milvus) -> None:
    *blocks, by_files = [block for block in SH_BLOCKS if MILVUS in block]
    assert len(blocks) == 2
    for block in blocks:
        done = succeed(block.replace("http://milvus.internal:19530", milvus.uri), trained)
        check_recall_result(trained)
        assert "found 100.00 % of exact search's top 50" in done.stdout
        assert len([line for line in done.stdout.splitlines() if re.match(r" +\d+  -?\d\.\d{4}  ", line)]) == 10
    assert "of 169 documents" in done.stdout
    done = succeed(by_files.replace("http://milvus.internal:19530", milvus.uri), trained)
    check_recall_result(trained)
    assert "found 100.00 % of exact search's top 50" in done.stdout


@pytest.mark.server
@pytest.mark.parametrize(
    "server",
    [block for block in SERVING_BLOCKS if "web_service.py" in block],
    ids=lambda block: re.sub(r"\W+", "-", block),
)
def test_serving_commands(exported: Path, monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    """The service is started and called as the pages do it, on free ports."""
    succeed("sh scripts/export_to_serving.sh", exported)
    others = [block for block in SERVING_BLOCKS if SERVICE.search(block) and "web_service.py" not in block]
    with running(server, exported, monkeypatch) as http_port:
        client, curl, health = (run(block.replace("18082", http_port), exported) for block in others)
    assert client.returncode == 0
    assert "['output_embedding']\n(2, 256)\n[[" in client.stdout
    answer = json.loads(curl.stdout)
    assert answer["err_no"] == 0
    assert np.array(json.loads(answer["value"][0])).shape == (2, 256)
    assert health.stdout.startswith('{"status": "ok"}')
    assert 'semantic_index_requests_total{protocol="grpc"} 1' in health.stdout


@pytest.mark.server
@pytest.mark.usefixtures("large_corpus")
def test_search_commands(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's service over the index of another page, its requests, and its snippets."""
    server, *requests = code_blocks(SEARCH_PAGE, "sh")
    with running(server, exported, monkeypatch) as http_port:
        one, several = (json.loads(succeed(block.replace("18082", http_port), exported).stdout) for block in requests)
        search, openai = (
            execute([sys.executable, "-c", snippet.replace("18082", http_port)], exported)
            for snippet in code_blocks(SEARCH_PAGE, "python")
        )
    assert [len(result["hits"]) for result in one["results"]] == [3]
    assert [len(result["hits"]) for result in several["results"]] == [3, 3]
    assert one["results"][0] == several["results"][0] and one["index"] == several["index"]
    assert [line.split("  ")[1] for line in search.stdout.splitlines()] == [
        hit["document"] for hit in one["results"][0]["hits"]
    ]
    assert re.fullmatch(r"256 \d+\n", openai.stdout), openai.stderr


@contextlib.contextmanager
def running(server: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Starts a page's service in a folder, on free ports; yields the one of HTTP, and ends it with SIGTERM."""
    ports = {"RPC": free_port(), "HTTP": free_port()}
    for name, port in ports.items():
        monkeypatch.setenv(f"SERVING_{name}_PORT", str(port))
    with subprocess.Popen(
        ["sh", "-euc", server.replace("python ", f"exec {sys.executable} ")],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            lines = iter(process.stderr.readline, "")
            assert any(line.startswith("ready: ") for line in lines)
            yield str(ports["HTTP"])
        finally:
            process.terminate()
            process.communicate()  # reads to the end: its last lines need somebody to write them to
    assert process.returncode == 0


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@pytest.mark.process
@pytest.mark.usefixtures("large_corpus")
@pytest.mark.parametrize("snippet", [block for _, block in SNIPPETS], ids=[f"{page}" for page, _ in SNIPPETS])
def test_python_snippets(trained: Path, snippet: str) -> None:
    (trained / "quoted.csv").write_text('查询\t"论""引号""\n研究,引号"\n', encoding="utf-8")
    done = execute([sys.executable, "-c", snippet], trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "csv.reader" in snippet:
        assert (trained / "plain.csv").read_text(encoding="utf-8") == '查询\t论"引号" 研究,引号\n'
    for k in re.findall(r"search\(.*k=(\d+)\)\nfor row", snippet):
        assert len(done.stdout.splitlines()) == int(k)


# ---------------------------------------------------------------------------------------------------------------------
# The document's scripts


@pytest.mark.process
def test_the_documents_inference_needs_no_options(trained: Path) -> None:
    done = succeed("python inference.py", trained)
    assert done.stdout.startswith("[1, 256]\n[[")
    assert about_texts_alone(done.stderr)  # no warnings of other packages


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [
        "scripts/run_build_index.sh cpu",
        "scripts/evaluate.sh",
        "scripts/predict.sh cpu",
        "scripts/export_model.sh",
        "scripts/export_to_serving.sh",
        "deploy/python/deploy.sh",
    ],
)
@pytest.mark.usefixtures("exported")
def test_scripts_work_from_any_folder(trained: Path, tmp_path: Path, command: str) -> None:
    succeed(f"sh {trained}/{command}", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize("script", ["train_batch_neg.sh", "run_build_index.sh", "predict.sh"])
def test_scripts_use_the_gpu_by_default(checkout: Path, script: str) -> None:
    if paddle.device.cuda.device_count():
        pytest.skip("this machine has a GPU")
    done = run(f"sh scripts/{script}", checkout)
    assert done.returncode == 2
    assert done.stderr.endswith(f"use the CPU: sh scripts/{script} cpu, or set up with sh scripts/setup.sh --gpu\n")
