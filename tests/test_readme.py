"""Runs what the READMEs and the user's document say, with nothing but device options changed."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from base_model import SemanticIndexBase
from helpers import ROOT, all_pairs, make_model_folder, write_pairs
from modeling.checkpoint import create_model, save_checkpoint

READMES = (ROOT / "README.md", ROOT / "README_cn.md")
# They need the network or a GPU, set up what these tests run in, or are run by tests of their own.
NOT_RUN = {
    "sh scripts/setup.sh --gpu cu126",
    "sh scripts/download_data.sh",
    "bash scripts/quickstart.sh\nbash scripts/test.sh",
    ". .venv/bin/activate",
    "sh scripts/setup.sh --serving",
}
# They need the service of "python web_service.py", or are it.
SERVICE = re.compile(r"web_service\.py|python rpc_client\.py|curl")
CPP_SERVING = "deploy/C++"  # tests/test_cpp_serving.py runs these
TWO_MACHINES = "--nnodes 2"  # tests/test_faults.py runs two launchers on this machine


def sh_blocks(readme: Path) -> list[str]:
    """The commands of the ```sh blocks."""
    return [block.strip() for block in re.findall(r"```sh\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)]


def on_the_cpu(command: str, ranks: int = 1) -> str:
    """Changes the device options alone."""
    command = re.sub(r'--gpus "[0-9,]+"', f"--nproc_per_node {ranks}", command)
    command = command.replace("--device gpu", "--device cpu")
    return re.sub(r"^(python inference\.py.*)$", r"\1 --device cpu", command, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project without its environment, with data in recall/ and a tiny folder called ernie-1.0, as one may have."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, folder)
    for name in ("batch_negative", "deploy", "scripts", "serving"):
        shutil.copytree(ROOT / name, folder / name)
    pairs = all_pairs()
    write_pairs(folder / "recall" / "train.csv", pairs * 6)  # 1,008 pairs: 16 steps of 64 an epoch, 48 in all
    write_pairs(folder / "recall" / "dev.csv", pairs[:20])
    write_pairs(folder / "recall" / "test.csv", pairs[20:24])
    write_pairs(folder / "recall" / "corpus.csv", [(title,) for _, title in pairs])
    ernie = make_model_folder(folder / "ernie-1.0", max_position_embeddings=64)
    model, tokenizer = create_model(SemanticIndexBase, from_scratch=str(ernie))
    paddle.save(model.ptm.state_dict(), str(ernie / "model_state.pdparams"))
    save_checkpoint(folder / "simcse" / "model_20000", model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def trained(checkout: Path) -> Path:
    """The checkout after `sh scripts/train_batch_neg.sh cpu` as the README has it, but for all three epochs."""
    done = run("sh scripts/train_batch_neg.sh cpu", checkout)
    assert done.returncode == 0, done.stderr
    return checkout


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a block of commands with the tests' Python as `python`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-euc", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )


def export_once(trained: Path) -> None:
    """Makes output/, unless another test did."""
    if not (trained / "output").is_dir():
        run("sh scripts/export_model.sh", trained)


def test_both_readmes_have_the_same_commands() -> None:
    first, second = map(sh_blocks, READMES)
    assert first == second
    assert set(first) >= NOT_RUN


def test_the_readmes_name_files_that_exist() -> None:
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        names = re.findall(r"`([\w/]+\.(?:py|sh|md))`", text) + re.findall(r"\]\(([\w/]+\.md)\)", text)
        assert len(names) > 10
        assert [name for name in names if not (ROOT / name).exists()] == []
        assert "@" not in re.sub(r"@\d+|@K", "", text)  # no placeholder is left


def test_training_commands(trained: Path) -> None:
    """The document's training from the pretrained model and from an unsupervised one, on two processes."""
    assert (trained / "checkpoints" / "inbatch" / "model_40" / "model_state.pdparams").is_file()
    assert (trained / "checkpoints" / "inbatch" / "model_best" / "train_result.txt").is_file()
    commands = [block for block in sh_blocks(READMES[0]) if "--epochs 3" in block]
    assert len(commands) == 2
    for command, save_dir in zip(commands, ("inbatch", "simcse_inbatch_negative"), strict=True):
        shutil.rmtree(trained / "checkpoints" / save_dir, ignore_errors=True)
        done = run(on_the_cpu(command, ranks=2), trained)
        assert done.returncode == 0, done.stdout + done.stderr
        steps = {folder.name for folder in (trained / "checkpoints" / save_dir).iterdir()}
        assert {"model_10", "model_20", "model_24"} <= steps
    # What follows needs model_40, which the document's data gives and 24 steps of two processes don't.
    shutil.copytree(trained / "checkpoints" / "inbatch" / "model_24", trained / "checkpoints" / "inbatch" / "model_40")


@pytest.mark.parametrize(
    "block",
    [
        block
        for block in sh_blocks(READMES[0])
        if block not in NOT_RUN
        and "--epochs 3" not in block
        and TWO_MACHINES not in block
        and not SERVICE.search(block)
        and CPP_SERVING not in block
    ],
    ids=lambda block: re.search(r"\w+\.(?:py|sh)", block).group(),
)
def test_other_commands(trained: Path, block: str) -> None:
    if "evaluate.py" in block:
        run("sh scripts/run_build_index.sh cpu", trained)
    shutil.rmtree(trained / "recall_log", ignore_errors=True)
    if "--model_dir" in block or "export_to_serving.py" in block:
        export_once(trained)
    done = run(on_the_cpu(block), trained)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--index_dir" in block:
        hits = [line for line in done.stdout.splitlines() if re.match(r" +\d+  -?\d\.\d{4}  ", line)]
        assert len(hits) == 20  # of --query and --interactive
        assert "of 169 documents" in done.stdout
    if "recall.py" in block:
        lines = (trained / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 20 * 50
        assert all(len(line.split("\t")) == 3 for line in lines)
        assert (trained / "recall_log" / "workerlog.0").is_file() == ("--log_dir" in block)
    if "--resume_from" in block:
        assert (trained / "checkpoints" / "large_batch" / "model_2" / "manifest.json").is_file()  # 1,008 pairs
        again = run(on_the_cpu(block), trained)
        assert again.returncode == 0 and "going on from checkpoints/large_batch/model_2" in again.stderr
    if "evaluate.py" in block:
        names = [line.split("=")[0] for line in done.stdout.splitlines()]
        assert names == ["recall@1", "recall@5", "recall@10", "recall@20", "recall@50", "mrr@50", "ndcg@50"]
    if "export_to_serving.py" in block:
        assert done.stdout.splitlines()[-1] == "wrote serving_server and serving_client"
    if "export_model.py" in block:
        assert done.stdout.endswith("wrote output/inference.get_pooled_embedding.*\n")
        assert (trained / "output" / "inference.get_pooled_embedding.onnx").is_file() == ("onnx" in block)
    if block == "python deploy/python/predict.py --model_dir=./output":
        assert re.fullmatch(r"\(1, 256\)\n\[\[[^\]]*\]\]\n\[[^,\]]*, [^,\]]*\]\n", done.stdout)
    elif "deploy/python/predict.py" in block:
        assert "(2, 256)" in done.stdout and "(168, 256)" in done.stdout and "texts_per_s=" in done.stdout
        assert (trained / "deployed_vectors.npy").is_file()
    elif "predict.py" in block:
        cosines = [line for line in done.stdout.splitlines() if re.fullmatch(r"-?\d\.\d+(e-\d+)?", line)]
        assert len(cosines) == 4
    if "inference.py" in block:
        assert done.stdout.startswith("[1, 256]\n[[")
        assert "[2, 256]" in done.stdout and "[168, 256]" in done.stdout
        assert (trained / "corpus_vectors.npy").is_file()


def test_serving_commands(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is started and asked as the README does it, on ports that are free."""
    export_once(trained)
    run("sh scripts/export_to_serving.sh", trained)
    server, *others = [block for block in sh_blocks(READMES[0]) if SERVICE.search(block)]
    ports = {"rpc": free_port(), "http": free_port()}
    for way, port in ports.items():
        monkeypatch.setenv(f"SERVING_{way.upper()}_PORT", str(port))
    with subprocess.Popen(
        ["sh", "-euc", f"{server.replace('python ', f'exec {sys.executable} ')}"],
        cwd=trained,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr.readline().startswith("ready: ")
            client, curl, health = (run(block.replace("18082", str(ports["http"])), trained) for block in others)
        finally:
            process.terminate()
            process.communicate()  # reads to the end: its last lines need somebody to write them to
    assert process.returncode == 0
    assert client.returncode == 0 and "['output_embedding']\n(2, 256)\n[[" in client.stdout
    answer = json.loads(curl.stdout)
    assert answer["err_no"] == 0 and np.array(json.loads(answer["value"][0])).shape == (2, 256)
    assert health.stdout.startswith('{"status": "ok"}') and 'requests_total{way="rpc"} 1' in health.stdout


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def test_the_documents_inference_needs_no_options(trained: Path) -> None:
    done = run("python inference.py", trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[1, 256]\n[[")
    assert done.stderr == ""  # third parties' warnings don't reach the user


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
def test_scripts_work_from_any_folder(trained: Path, tmp_path: Path, command: str) -> None:
    if "deploy" in command or "serving" in command:
        export_once(trained)
    done = run(f"sh {trained}/{command}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["train_batch_neg.sh", "run_build_index.sh", "predict.sh"])
def test_scripts_take_the_gpu_by_default(checkout: Path, script: str) -> None:
    done = run(f"sh scripts/{script}", checkout)
    assert done.returncode == 2
    assert done.stderr.endswith(f"use the CPU: sh scripts/{script} cpu, or set up with sh scripts/setup.sh --gpu\n")
