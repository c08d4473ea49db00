"""What all scripts have in common: they answer at once, and bad input is one clear line, with nothing half-written."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import evaluate
import export_model
import export_to_serving
import inference
import predict
import recall
import train_batch_neg
from common import __version__
from common.cli import run
from helpers import ROOT, V1, has_gpu, run_script, run_without_paddle, train_options

SCRIPTS = {
    module.__name__: module
    for module in (train_batch_neg, recall, evaluate, predict, inference, export_model, export_to_serving)
}
Call = Callable[..., tuple[ModuleType, list[str]]]

# ---------------------------------------------------------------------------------------------------------------------
# Start-up

CHECKPOINT = str(V1 / "run" / "model_4")
MISSING_INPUTS = {  # options of a call whose last one names a file or folder that is missing
    "train_batch_neg": ("--train_set_file",),
    "recall": ("--params_path", CHECKPOINT, "--query", "水稻", "--corpus_file"),
    "evaluate": ("--recall_result_file", "hits.txt", "--similar_text_pair_file"),
    "predict": ("--params_path", CHECKPOINT, "--text_pair_file"),
    "inference": ("--params_path", CHECKPOINT, "--text_file"),
    "export_model": ("--params_path",),
    "export_to_serving": ("--dirname",),
}
MISSING_CHECKPOINTS = {
    "train_batch_neg": ("--init_from_ckpt",),
    "recall": ("--corpus_file", "corpus.csv", "--query", "水稻", "--params_path"),
    "predict": ("--text_pair_file", "dev.csv", "--params_path"),
    "inference": ("--params_path",),
}


@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_shown_without_paddle(script: str) -> None:
    code, out, err = run_without_paddle(f"{script}.py", "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: {script}.py [-h]")


@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_version_is_shown_without_paddle(script: str) -> None:
    assert run_without_paddle(f"{script}.py", "--version") == (0, f"{__version__}\n", "")


@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_finds_its_modules_from_anywhere(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a link, and where Python leaves the script's folder out; modules of the working folder aren't taken."""
    (tmp_path / "common.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "link.py").symlink_to(ROOT / f"{script}.py")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    done = run_script("link.py", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_option_is_refused_without_paddle(script: str, tmp_path: Path) -> None:
    options = [*MISSING_INPUTS[script], tmp_path / "missing", "--no_such_option"]
    code, out, err = run_without_paddle(f"{script}.py", *options)
    assert (code, out) == (2, "")
    assert err == f"error: unrecognized arguments: --no_such_option (try {script}.py --help)\n"


@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_input_is_refused_without_paddle(script: str, tmp_path: Path) -> None:
    code, out, err = run_without_paddle(f"{script}.py", *MISSING_INPUTS[script], tmp_path / "missing")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert f"{tmp_path / 'missing'}: no such " in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize("script", MISSING_CHECKPOINTS)
def test_a_missing_checkpoint_is_refused_without_paddle(script: str, tmp_path: Path) -> None:
    code, out, err = run_without_paddle(f"{script}.py", *MISSING_CHECKPOINTS[script], tmp_path / "missing")
    assert (code, out, err) == (2, "", f"error: {tmp_path / 'missing'}: no such checkpoint\n")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture
def call(tmp_path: Path, model_folder: Path, recall_data: Path, checkpoint: Path) -> Call:
    """A function of a script and changed options, which gives a good call of the script with these options."""
    pairs, corpus = str(recall_data / "dev.csv"), str(recall_data / "corpus.csv")
    evaluation = {"similar_text_pair_file": pairs, "corpus_file": corpus, "recall_result_dir": str(tmp_path / "out")}
    hits = tmp_path / "hits.txt"
    hits.write_text("问\t答\t0.5\n", encoding="utf-8")
    vectors = str(tmp_path / "out" / "vectors.npy")
    good = {
        "train_batch_neg": {"max_steps": "1", **evaluation},
        "recall": {"params_path": str(checkpoint), "device": "cpu", **evaluation},
        "evaluate": {"similar_text_pair_file": pairs, "recall_result_file": str(hits)},
        "predict": {"params_path": str(checkpoint), "device": "cpu", "text_pair_file": pairs},
        "inference": {"params_path": str(checkpoint), "text_file": corpus, "output": vectors},
        "export_model": {"params_path": str(checkpoint), "output_path": str(tmp_path / "out")},
    }

    def options(script: str, **changed: str) -> tuple[ModuleType, list[str]]:
        named = [word for name, value in {**good[script], **changed}.items() for word in (f"--{name}", value)]
        if script == "train_batch_neg":
            named = train_options(model_folder, recall_data, tmp_path / "out", "--evaluate", *named)
        return SCRIPTS[script], named

    return options


def assert_refused(
    script: tuple[ModuleType, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], *parts: str
) -> None:
    """The call ends with code 2, one error and nothing written, and its message has the parts."""
    module, options = script
    with pytest.raises(SystemExit) as ended:
        run(lambda: module.main(options))
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    lines = err.splitlines()
    assert lines[-1].startswith(("error: ", str(tmp_path), "/"))  # bad lines come one by one
    assert sum(line.startswith("error: ") for line in lines) == 1
    for part in parts:
        assert part in err
    # inference.py creates the folder of its output before it imports Paddle.
    assert not (list((tmp_path / "out").glob("*")) if module is inference else (tmp_path / "out").exists())
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("train_batch_neg", "train_set_file"),
        ("train_batch_neg", "similar_text_pair_file"),
        ("train_batch_neg", "corpus_file"),
        ("recall", "similar_text_pair_file"),
        ("recall", "corpus_file"),
        ("evaluate", "similar_text_pair_file"),
        ("evaluate", "recall_result_file"),
        ("predict", "text_pair_file"),
        ("inference", "text_file"),
    ],
)
def test_a_bad_file(script: str, option: str, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of bad file is tried on the readers themselves, in test_data.py."""
    bad = tmp_path / "bad.csv"
    bad.write_bytes("人口\t经济\n".encode("gb18030"))
    message = f"{bad}:1: isn't UTF-8 at byte 1"
    assert_refused(call(script, **{option: str(bad)}), tmp_path, capsys, message)


@pytest.mark.parametrize("script", ["recall", "predict", "inference", "export_model"])
def test_a_bad_checkpoint(script: str, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of bad checkpoint is tried on the reader itself, in modeling/test_checkpoint.py."""
    path = tmp_path / "model"
    path.write_text("no weights")
    assert_refused(call(script, params_path=str(path)), tmp_path, capsys, str(path))


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [
        ("recall", "recall_num", "0"),
        ("evaluate", "recall_num", "0"),
        ("train_batch_neg", "recall_num", "-1"),
        ("train_batch_neg", "batch_size", "0"),
        ("train_batch_neg", "learning_rate", "nan"),
        ("train_batch_neg", "dropout", "1"),
        ("train_batch_neg", "seed", "99999999999"),
        ("predict", "max_seq_length", "2"),
        ("inference", "batch_size", "many"),
        ("recall", "ann", "faiss"),
        ("recall", "precision", "int4"),
        ("export_model", "format", "tensorflow"),
    ],
)
def test_values_out_of_range(
    script: str, option: str, value: str, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(call(script, **{option: value}), tmp_path, capsys, f"--{option}")


@pytest.mark.skipif(has_gpu, reason="this machine has a GPU")
@pytest.mark.parametrize("script", ["train_batch_neg", "recall", "predict", "inference"])
def test_no_gpu(script: str, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(call(script, device="gpu"), tmp_path, capsys, "--device gpu", "use --device cpu")


@pytest.mark.parametrize("script", ["recall", "train_batch_neg"])
def test_an_index_smaller_than_the_corpus(
    script: str, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(call(script, hnsw_max_elements="9"), tmp_path, capsys, "--hnsw_max_elements 9")


# ---------------------------------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_every_option(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main(["--help"])
    assert ended.value.code == 0
    assert "(default: None)" not in capsys.readouterr().out
    for action in SCRIPTS[script].build_parser()._actions:
        assert action.help
