"""Bad input to every script: one clear line, exit code 2, no traceback, nothing half-written."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import paddle
import pytest

import evaluate
import export_model
import inference
import predict
import recall
import train_batch_neg
from common.cli import run
from common.errors import InputError
from encoding.encoder import Encoder
from helpers import run_script, train_options, write_pairs

SCRIPTS = {module.__name__: module for module in (train_batch_neg, recall, evaluate, predict, inference, export_model)}


@pytest.fixture
def call(
    tmp_path: Path, model_folder: Path, recall_data: Path, checkpoint: Path
) -> Callable[..., tuple[ModuleType, list[str]]]:
    """call(script, **changed options): a good call of a script with some options changed."""
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
        "inference": {
            "params_path": str(checkpoint),
            "text_file": corpus,
            "output": vectors,
        },
        "export_model": {"params_path": str(checkpoint), "output_path": str(tmp_path / "out")},
    }

    def options(script: str, **changed: str) -> tuple[ModuleType, list[str]]:
        named = [word for name, value in {**good[script], **changed}.items() for word in (f"--{name}", value)]
        if script == "train_batch_neg":
            named = train_options(model_folder, recall_data, tmp_path / "out", "--evaluate", *named)
        return SCRIPTS[script], named

    return options


def assert_refused(script: tuple[ModuleType, list[str]], tmp_path: Path, capsys, *parts: str) -> None:
    """The call ends as the rules want, and its message has the parts."""
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
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))


BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "NUL": ("问\t答\0\n".encode(), ":1: holds a NUL character"),
    "GB18030": ("人口\t经济\n".encode("gb18030"), ":1: isn't UTF-8 at byte 1"),
    "10 MB line": ("问\t".encode() + b"a" * 10_000_000, ":1: longer than 1,048,576 bytes"),
    "four columns": ("一\t二\t三\t四\n".encode(), ":1: 4 column"),
    "empty text": (b"\t\n", ":1: "),
}
FILE_OPTIONS = [
    ("train_batch_neg", "train_set_file"),
    ("train_batch_neg", "similar_text_pair_file"),
    ("train_batch_neg", "corpus_file"),
    ("recall", "similar_text_pair_file"),
    ("recall", "corpus_file"),
    ("evaluate", "similar_text_pair_file"),
    ("evaluate", "recall_result_file"),
    ("predict", "text_pair_file"),
    ("inference", "text_file"),
]


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize(("script", "option"), FILE_OPTIONS)
def test_bad_files(script: str, option: str, kind: str, call, tmp_path: Path, capsys) -> None:
    content, message = BAD_FILES[kind]
    bad = tmp_path / "bad.csv"
    bad.write_bytes(content)
    assert_refused(call(script, **{option: str(bad)}), tmp_path, capsys, str(bad), message)


@pytest.mark.parametrize(("script", "option"), FILE_OPTIONS)
def test_files_that_are_none(script: str, option: str, call, tmp_path: Path, capsys) -> None:
    missing = str(tmp_path / "missing.csv")
    assert_refused(call(script, **{option: missing}), tmp_path, capsys, f"{missing}: no such file")
    assert_refused(call(script, **{option: str(tmp_path)}), tmp_path, capsys, f"{tmp_path}: is a folder")


@pytest.mark.parametrize("script", ["recall", "predict", "inference", "export_model"])
@pytest.mark.parametrize("kind", ["missing", "text file", "empty folder", "another architecture"])
def test_checkpoints_that_are_none(script: str, kind: str, call, tmp_path: Path, capsys) -> None:
    path = tmp_path / "model"
    if kind == "text file":
        path.write_text("no weights")
    if kind in ("empty folder", "another architecture"):
        path.mkdir()
    if kind == "another architecture":
        paddle.save({"conv.weight": paddle.zeros([3, 3])}, str(path / "model_state.pdparams"))
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
        ("export_model", "format", "tensorflow"),
    ],
)
def test_values_out_of_range(script: str, option: str, value: str, call, tmp_path: Path, capsys) -> None:
    assert_refused(call(script, **{option: value}), tmp_path, capsys, f"--{option}")


@pytest.mark.parametrize("script", ["train_batch_neg", "recall", "predict", "inference"])
def test_no_gpu(script: str, call, tmp_path: Path, capsys) -> None:
    assert_refused(call(script, device="gpu"), tmp_path, capsys, "--device gpu", "use --device cpu")


@pytest.mark.parametrize("script", ["recall", "train_batch_neg"])
def test_an_index_smaller_than_the_corpus(script: str, call, tmp_path: Path, capsys) -> None:
    assert_refused(call(script, hnsw_max_elements="9"), tmp_path, capsys, "--hnsw_max_elements 9")


def test_vectors_that_cannot_be_written_are_not_computed(call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "in_a_file"):
        module, options = call("inference", output=str(place))
        with pytest.raises(InputError, match="can't be written"):
            module.main(options)


def test_a_corpus_of_one_line_and_texts_longer_than_the_maximum(call, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("水稻" * 5000 + "\n", encoding="utf-8")
    pairs = write_pairs(tmp_path / "pairs.csv", [("水稻" * 3000, "水稻" * 5000)])
    module, options = call("recall", corpus_file=str(corpus), similar_text_pair_file=str(pairs), recall_num="50")
    assert module.main(options) == 0
    lines = (tmp_path / "out" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1


def test_positives_that_the_corpus_lacks_are_reported(call, tmp_path: Path, capsys) -> None:
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("水稻\n玉米\n", encoding="utf-8")
    module, options = call("recall", corpus_file=str(corpus))
    assert module.main(options) == 0
    assert "lacks 40 titles of the pairs" in capsys.readouterr().err


def test_skipped_lines_are_counted(call, tmp_path: Path, capsys) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("一\t二\n坏\n三\t四\n", encoding="utf-8")
    module, options = call("predict", text_pair_file=str(pairs))
    assert module.main([*options, "--skip_bad_lines"]) == 0
    out, err = capsys.readouterr()
    assert [line == "nan" for line in out.splitlines()] == [False, True, False]
    assert f"{pairs}: left out 1 bad line(s) of 3" in err


def test_a_script_really_ends_that_way(tmp_path: Path) -> None:
    """The same in a process of its own: the guard at the top, `run` at the bottom, and no warnings of third parties."""
    missing = tmp_path / "missing.csv"
    done = run_script("recall.py", "--params_path", "x", "--corpus_file", "x", "--similar_text_pair", missing)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {missing}: no such file\n")


def test_evaluate_imports_no_paddle(recall_data: Path) -> None:
    program = "import sys, evaluate; sys.exit(any(name.split('.')[0].startswith('paddle') for name in sys.modules))"
    assert run_script("-c", program).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main(["--help"])
    assert ended.value.code == 0
    assert "(default: None)" not in capsys.readouterr().out
    for action in SCRIPTS[script].build_parser()._actions:
        assert action.help
