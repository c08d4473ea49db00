"""No default, option or file silently overrides what a checkpoint, an export or an index says."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import clients
import evaluate
import export_model
import inference
import predict
import recall
import train_batch_neg
from base_model import ModelConfig
from common.errors import InputError
from common.files import read_json, write_json
from common.manifest import write_manifest
from data import Hit, write_hits
from helpers import ROOT, all_pairs, make_model_folder, train_options, write_pairs
from modeling.backbone import load_tokenizer
from modeling.checkpoint import load_checkpoint
from serving.settings import read_settings

PAIRS = all_pairs()[:128]
STEP = (
    "--max_steps",
    "1",
    "--batch_size",
    "128",
    "--learning_rate",
    "0",
)  # on all pairs, so that their order is nothing
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def start(still_model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, `held`, none of whose settings is a default, and copies of it.

    `original`: its weights and tokenizer alone, as the original scripts wrote them; `gelu`: with another activation.
    """
    folder = tmp_path_factory.mktemp("start")
    settings = ["--pooling", "mean", "--output_emb_size", "16", "--max_seq_length", "12", "--dropout", "0"]
    training = ["--max_steps", "8", "--batch_size", "32"]
    train_batch_neg.main(train_options(still_model_folder, recall_data, folder / "run", *settings, *training))
    held = shutil.copytree(folder / "run" / "model_8", folder / "held")
    (folder / "original").mkdir()
    for name in ("model_state.pdparams", "vocab.txt", "tokenizer_config.json"):
        shutil.copy(held / name, folder / "original")
    gelu = shutil.copytree(held, folder / "gelu")
    (gelu / "manifest.json").unlink()
    write_json(gelu / "config.json", {**read_json(gelu / "config.json"), "hidden_act": "gelu"})
    return folder


def loss_of(checkpoint: Path, max_seq_length: int | None = None, **changed: object) -> float:
    """The loss of PAIRS in one batch, by NumPy, with the checkpoint's settings except the changed ones."""
    model, tokenizer, *_ = load_checkpoint(checkpoint, max_seq_length=max_seq_length)
    model.config = replace(model.config, **changed)
    queries, titles = (model.embed(*tokenizer([pair[side] for pair in PAIRS])) for side in (0, 1))
    logits = 30 * (queries @ titles.T - 0.2 * np.eye(len(PAIRS)))
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diagonal(logits)))


def train(start: Path, recall_data: Path, save_dir: Path, options: str, capsys: Capture) -> tuple[float, str]:
    """Takes one step with a learning rate of 0; gives its loss and what was logged. {} in options is `start`."""
    files = ["--train_set_file", str(recall_data / "train.csv"), "--save_dir", str(save_dir)]
    capsys.readouterr()
    assert train_batch_neg.main([*files, *STEP, *options.format(start).split()]) == 0
    out, err = capsys.readouterr()
    return float(re.search(r"loss: ([0-9.]+)", out).group(1)), err


def settings_lines(text: str) -> list[str]:
    """The log lines that aren't those of every training, nor about the texts."""
    usual = ("training on", "took ", " are cut to ", " are [UNK]")
    return [line for line in text.splitlines() if not any(words in line for words in usual)]


HELD = ModelConfig(16, "mean", 0.0, 12)
INIT = "--init_from_ckpt {0}/held"
GOES_ON = "{0}/held: going on with its settings: "
TRAINING = {  # options -> the model's config, what changes the loss against the checkpoint's own, the lines
    "nothing given": (
        *(INIT, HELD, {}),
        [GOES_ON + "output_emb_size 16, pooling mean, dropout 0.0, max_seq_length 12"],
    ),
    "all given, the same": (
        f"{INIT} --pooling mean --output_emb_size 16 --dropout 0 --max_seq_length 12",
        *(HELD, {}, []),
    ),
    "another pooling": (
        *(f"{INIT} --pooling cls", replace(HELD, pooling="cls"), {"pooling": "cls"}),
        [
            GOES_ON + "output_emb_size 16, dropout 0.0, max_seq_length 12",
            "--pooling cls: {0}/held was trained with mean",
        ],
    ),
    "another length": (
        *(f"{INIT} --max_seq_length 30", replace(HELD, max_seq_length=30), {"max_seq_length": 30}),
        [
            GOES_ON + "output_emb_size 16, pooling mean, dropout 0.0",
            "--max_seq_length 30: {0}/held was trained with 12",
        ],
    ),
    "no reduction": (
        *(f"{INIT} --output_emb_size 0", replace(HELD, output_emb_size=0), {"output_emb_size": 0}),
        [GOES_ON + "pooling mean, dropout 0.0, max_seq_length 12", "--output_emb_size 0: {0}/held was trained with 16"],
    ),
    "another dropout": (
        *(f"{INIT} --dropout 0.5", replace(HELD, dropout=0.5), None),
        [
            GOES_ON + "output_emb_size 16, pooling mean, max_seq_length 12",
            "--dropout 0.5: {0}/held was trained with 0.0",
            "--dropout 0.5: of the vector; the backbone's stays 0.0 (hidden_dropout_prob in its config.json)",
        ],
    ),
    "another backbone": (
        *(f"{INIT} --model_name_or_path ernie-3.0-base-zh", HELD, {}),
        [
            "--model_name_or_path ernie-3.0-base-zh: isn't used, {0}/held has its own config.json",
            GOES_ON + "output_emb_size 16, pooling mean, dropout 0.0, max_seq_length 12",
        ],
    ),
    "another activation": (
        *(f"{INIT} --from_scratch {{0}}/gelu", HELD, {"checkpoint": "gelu"}),
        [
            GOES_ON + "output_emb_size 16, pooling mean, dropout 0.0, max_seq_length 12",
            "--from_scratch {0}/gelu: its config.json takes the place of that of {0}/held: hidden_act gelu, not relu",
        ],
    ),
    "a checkpoint as the pretrained model": (
        *("--model_name_or_path {0}/held", HELD, {}),
        [GOES_ON + "output_emb_size 16, pooling mean, dropout 0.0, max_seq_length 12"],
    ),
    "a checkpoint of the original scripts": (
        *("--init_from_ckpt {0}/original/model_state.pdparams --model_name_or_path {0}/held", None, None),
        [
            "{0}/original/model_state.pdparams: going on with its settings: output_emb_size 16",
            "{0}/original/model_state.pdparams: has no semantic_index.json; "
            "assuming pooling cls, dropout 0.1, max_seq_length 40",
        ],
    ),
    "a checkpoint of the original scripts with all settings": (
        "--init_from_ckpt {0}/original --model_name_or_path {0}/held "
        "--pooling mean --dropout 0 --max_seq_length 12 --output_emb_size 16",
        *(HELD, {}, []),
    ),
    "the files of a checkpoint with random weights": (
        *("--from_scratch {0}/held --output_emb_size 16 --dropout 0", ModelConfig(16, "cls", 0.0, 40), None),
        [
            "--from_scratch {0}/held: its semantic_index.json isn't used: "
            "pooling cls, not mean, max_seq_length 40, not 12"
        ],
    ),
}


@pytest.mark.parametrize("case", TRAINING)
def test_a_training_takes_what_a_checkpoint_says(
    case: str, start: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The loss of the first step is that of the settings that are taken, as computed by NumPy."""
    options, config, changed, lines = TRAINING[case]
    loss, logged = train(start, recall_data, tmp_path, options, capsys)
    assert settings_lines(logged) == [line.format(start) for line in lines]
    loaded = load_checkpoint(tmp_path / "model_1")
    assert loaded.model.config == (config or ModelConfig(16, "cls", 0.1, 40))
    if changed is not None:
        checkpoint = start / changed.get("checkpoint", "held")
        settings = {name: value for name, value in changed.items() if name != "checkpoint"}
        assert loss == pytest.approx(loss_of(checkpoint, **settings), abs=2e-4)
        assert (abs(loss - loss_of(start / "held")) > 1e-3) == bool(changed)


def test_another_vocabulary_than_the_checkpoints_is_named(
    start: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(start / "held", tmp_path / "scratch")
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    (folder / "vocab.txt").write_text("\n".join([*words[:5], *reversed(words[5:])]), encoding="utf-8")
    loss, logged = train(start, recall_data, tmp_path / "run", f"{INIT} --from_scratch {folder}", capsys)
    assert f"--from_scratch {folder}: its tokenizer isn't used, {start}/held has its own\n" in logged
    assert loss == pytest.approx(loss_of(start / "held"), abs=2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_a_new_training_is_described_as_in_version_2_0_0(
    still_model_folder: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """So that version 2.0.0's checkpoints are resumed with the same command."""
    files = ["--train_set_file", str(recall_data / "train.csv"), "--save_dir", str(tmp_path)]
    options = [*files, "--from_scratch", str(still_model_folder), "--batch_size", "64", "--max_steps", "2"]
    assert train_batch_neg.main([*options, "--save_steps", "1"]) == 0
    run_config = read_json(tmp_path / "model_1" / "training_state.json")["run_config"]
    expected = {"output_emb_size": 256, "pooling": "cls", "dropout": 0.1, "max_seq_length": None}
    expected |= {"model_name_or_path": "ernie-1.0", "init_from_ckpt": None}
    assert {name: run_config[name] for name in expected} == expected
    shutil.rmtree(tmp_path / "model_2")
    for more in ([], ["--max_seq_length", "40"]):  # the size of the position table, which was used
        assert train_batch_neg.main([*options, *more, "--resume_from", str(tmp_path / "model_1")]) == 0
    assert "steps 2 to 2" in capsys.readouterr().err


def test_a_run_that_started_with_version_2_0_0s_defaults_is_refused_by_name(
    start: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """It took cls and 40 tokens although the checkpoint said otherwise; with these options it goes on."""
    taken = "--pooling cls --dropout 0.1 --output_emb_size 256"
    train(start, recall_data, tmp_path, f"{INIT} {taken} --max_seq_length 40", capsys)
    folder = tmp_path / "model_1"
    state = read_json(folder / "training_state.json")
    state["run_config"]["max_seq_length"] = None
    write_json(folder / "training_state.json", state)
    write_manifest(folder)
    resume = f"{INIT} --resume_from {folder}"
    for options, message in (
        ("", "output_emb_size 256, not 16"),
        (taken, "max_seq_length 40, not 12"),
        (f"{taken} --max_seq_length 30", "max_seq_length 40, not 30"),
    ):
        with pytest.raises(InputError, match=f"^{folder}: was trained with {message}; go on with the same"):
            train(start, recall_data, tmp_path, f"{resume} {options}", capsys)
    files = ["--train_set_file", str(recall_data / "train.csv"), "--save_dir", str(tmp_path)]
    options = f"{resume} {taken} --max_seq_length 40".format(start).split()
    capsys.readouterr()
    assert train_batch_neg.main([*files, *STEP, *options]) == 0
    assert capsys.readouterr().out == f"{folder}: training is complete, nothing to do\n"


# ---------------------------------------------------------------------------------------------------------------------
# Inference


Script = Callable[[Path, Sequence[str]], object]


@pytest.fixture
def scripts(recall_data: Path, tmp_path: Path) -> dict[str, Script]:
    """Each script that loads a checkpoint, as a function of the checkpoint and further options."""
    write_pairs(tmp_path / "pairs.csv", PAIRS[:4])
    text = ["--text", PAIRS[0][1], "--output", str(tmp_path / "vector.npy"), "--device", "cpu"]
    pairs = ["--text_pair_file", str(tmp_path / "pairs.csv"), "--device", "cpu"]
    corpus = ["--corpus_file", str(recall_data / "corpus.csv"), "--ann", "exact", "--device", "cpu"]
    corpus += [
        "--query",
        "水稻",
        "--recall_result_dir",
        str(tmp_path / "recall"),
        "--index_dir",
        str(tmp_path / "index"),
    ]
    output = ["--output_path", str(tmp_path / "exported")]
    calls = {"inference": (inference, text), "predict": (predict, pairs), "recall": (recall, corpus)}
    calls["export_model"] = (export_model, output)

    def script(module: ModuleType, options: list[str]) -> Script:
        return lambda checkpoint, more: module.main(["--params_path", str(checkpoint), *options, *more])

    return {name: script(*call) for name, call in calls.items()}


INFERENCE = {  # the checkpoint and options -> the lines; {0} is `start`
    "nothing given": ("held", "", []),
    "the checkpoint's length": ("held", "--max_seq_length 12", []),
    "another length": ("held", "--max_seq_length 9", ["--max_seq_length 9: {0}/held was trained with 12"]),
    "another backbone": (
        *("held", "--model_name_or_path ernie-1.0"),
        ["--model_name_or_path ernie-1.0: isn't used, {0}/held has its own config.json"],
    ),
    "a checkpoint of the original scripts": (
        *("original", "--model_name_or_path {0}/held"),
        ["{0}/original/model_state.pdparams: has no semantic_index.json; assuming pooling cls, max_seq_length 40"],
    ),
    "a checkpoint of the original scripts and a length": (
        *("original", "--model_name_or_path {0}/held --max_seq_length 12"),
        ["{0}/original/model_state.pdparams: has no semantic_index.json; assuming pooling cls"],
    ),
}


@pytest.mark.parametrize("script", ["inference", "predict", "recall", "export_model"])
@pytest.mark.parametrize("case", INFERENCE)
def test_a_script_says_what_differs_from_the_checkpoint(
    case: str, script: str, start: Path, scripts: dict[str, Script], capsys: Capture
) -> None:
    checkpoint, options, lines = INFERENCE[case]
    assert scripts[script](start / checkpoint, options.format(start).split()) == 0
    assert settings_lines(capsys.readouterr().err) == [line.format(start) for line in lines]


def test_the_default_backbone_and_vocabulary_are_named(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """For weights alone, and although a folder of that name is used."""
    (tmp_path / "alone").mkdir()
    shutil.copy(start / "held" / "model_state.pdparams", tmp_path / "alone")
    shutil.copytree(start / "held", tmp_path / "ernie-1.0")
    monkeypatch.chdir(tmp_path)
    assert inference.main(["--params_path", "alone", "--device", "cpu"]) == 0
    assert settings_lines(capsys.readouterr().err) == [
        "ernie-1.0: using the folder of that name here, not PaddleNLP's model",
        "alone/model_state.pdparams: has no config.json, vocab.txt, semantic_index.json; "
        "assuming backbone ernie-1.0, vocabulary ernie-1.0, pooling cls, max_seq_length 40",
    ]


def test_another_length_than_the_exports_is_said(
    start: Path, deploy_predict: ModuleType, tmp_path: Path, capsys: Capture
) -> None:
    """By Paddle Inference's script, and by the C++ server's clients."""
    assert export_model.main(["--params_path", str(start / "held"), "--output_path", str(tmp_path / "output")]) == 0
    text = "论水稻产量研究水稻,产量" * 2
    for length in (None, 12, 9):
        lines = [f"--max_seq_length 9: {tmp_path / 'output'} was exported with 12"] if length == 9 else []
        options = ["--model_dir", str(tmp_path / "output"), "--text", text, "--device", "cpu"]
        capsys.readouterr()
        assert deploy_predict.main([*options, *(["--max_seq_length", str(length)] if length else [])]) == 0
        assert settings_lines(capsys.readouterr().err) == lines
        assert clients.tokenize([text], str(tmp_path / "output"), length, None)[0].shape == (1, length or 12)
        assert settings_lines(capsys.readouterr().err) == lines


# ---------------------------------------------------------------------------------------------------------------------
# Other files


@pytest.mark.parametrize(
    ("config", "cased", "line"),
    [
        (None, False, ""),
        (None, True, "has no do_lower_case, so texts become lower case, but 50% of vocab.txt has capital letters; "),
        ({"model_max_length": 512}, True, "has no do_lower_case, so "),
        ({"do_lower_case": True}, True, ""),
        ({"do_lower_case": False, "strip_accents": False}, True, ""),
        ({"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}, False, ""),
        ({"do_lower_case": True, "strip_accents": False}, False, "strip_accents False can't be followed; the tokens "),
        ({"do_lower_case": True, "tokenize_chinese_chars": False}, False, "tokenize_chinese_chars False can't be "),
    ],
)
def test_a_tokenizer_says_what_it_does_not_follow(
    tmp_path: Path, config: dict[str, object] | None, cased: bool, line: str, capsys: Capture
) -> None:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "rice", "Rice" if cased else "maize"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    if config is not None:
        write_json(tmp_path / "tokenizer_config.json", config)
    tokens = load_tokenizer(tmp_path, 8).tokenize(["Rice"])[0]
    keeps_case = config is not None and config.get("do_lower_case") is False
    assert tokens == [1, 6 if keeps_case else 5, 2]
    logged = capsys.readouterr().err
    assert logged.startswith(f"{tmp_path / 'tokenizer_config.json'}: {line}") if line else logged == ""


def test_added_tokens_that_are_not_used_are_said(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "rice"]))
    file = tmp_path / "added_tokens.json"
    for added, line in (
        ({"[PAD]": 0}, ""),
        ({"[PAD]": 0, "<query>": 6, "<title>": 7}, f"{file}: isn't used, so 2 tok"),
    ):
        write_json(file, added)
        load_tokenizer(tmp_path, 8)
        logged = capsys.readouterr().err
        assert logged.startswith(line) if line else logged == ""


def test_evaluation_says_if_fewer_documents_were_recalled(tmp_path: Path, capsys: Capture) -> None:
    pairs = write_pairs(tmp_path / "dev.csv", PAIRS[:2])
    result = tmp_path / "result.txt"
    write_hits(result, [Hit(query, title, 0.5) for query, _ in PAIRS[:2] for _, title in PAIRS[:3]])
    for recall_num, line in ((3, ""), (20, f"--recall_num 20: {result} has no more than 3 documents per query\n")):
        options = ["--similar_text_pair_file", str(pairs), "--recall_result_file", str(result)]
        assert evaluate.main([*options, "--recall_num", str(recall_num)]) == 0
        assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        (["--ann", "exact"], ""),
        (["--ann", "hnswlib"], "--ann"),
        (["--hnsw_m", "100", "--hnsw_ef", "50"], "--hnsw_m, --hnsw_ef"),  # the first one's default
        ([], ""),
    ],
)
def test_given_options_of_a_saved_index_are_named(
    start: Path, scripts: dict[str, Script], given: list[str], unused: str, tmp_path: Path, capsys: Capture
) -> None:
    """Even if they are the defaults; the saved index is an exact one."""
    scripts["recall"](start / "held", [])
    capsys.readouterr()
    options = ["--params_path", str(start / "held"), "--device", "cpu", "--query", "水稻"]
    assert recall.main([*options, "--index_dir", str(tmp_path / "index"), *given]) == 0
    assert capsys.readouterr().err.rpartition("no effect: ")[2].strip() == unused


def test_settings_that_the_service_does_not_have_are_named(tmp_path: Path, capsys: Capture) -> None:
    config = tmp_path / "config.yml"
    original = (ROOT / "deploy" / "python" / "config_nlp.yml").read_text()
    config.write_text(original + "build_dag_each_worker: false\ndag: &dag\n  is_thread_op: false\n  self: *dag\n")
    read_settings({}, {"SERVING_RPC_PORT": "1"}, ROOT / "deploy" / "python" / "config_nlp.yml")
    assert capsys.readouterr().err == ""
    read_settings({}, {"SERVING_THREAD": "2", "PORT": "3"}, config)
    line = capsys.readouterr().err
    assert line.startswith("note: SERVING_THREAD, build_dag_each_worker, dag.is_thread_op, dag.self.")
    assert line.endswith(": no setting of this service, ignored (web_service.py --help lists them)\n")


def test_a_setting_under_two_names_is_said(tmp_path: Path, capsys: Capture) -> None:
    config = tmp_path / "config.yml"
    text = (ROOT / "deploy" / "python" / "config_nlp.yml").read_text()
    config.write_text(text.replace("  queued_texts: 1024", "  queued_texts: 1024\n  waiting_texts: 600"))
    environment = {"SERVING_MAX_QUEUE_DELAY_MS": "1", "SERVING_BATCH_WAIT_MS": "2"}
    for options, expected in (
        ({}, "SERVING_BATCH_WAIT_MS: isn't used, SERVING_MAX_QUEUE_DELAY_MS takes its place"),
        ({"max_queue_delay_ms": 3, "batch_wait_ms": 4}, "--batch_wait_ms: isn't used, --max_queue_delay_ms takes its"),
    ):
        read_settings(options, environment, config)
        delay, queue = capsys.readouterr().err.splitlines()
        assert delay.startswith(expected)
        assert queue == "limits.waiting_texts: isn't used, limits.queued_texts takes its place"


@pytest.mark.parametrize(("model_type", "line"), [("ernie", ""), ("megatronbert", "--use_recompute: does nothing")])
def test_recomputation_that_a_backbone_lacks_is_said(
    tmp_path: Path, recall_data: Path, model_type: str, line: str, capsys: Capture
) -> None:
    folder = make_model_folder(tmp_path / "model", model_type=model_type)
    options = train_options(folder, recall_data, tmp_path / "run", "--max_steps", "1", "--use_recompute")
    assert train_batch_neg.main(options) == 0
    assert (line in capsys.readouterr().err) if line else ("--use_recompute" not in capsys.readouterr().err)


def test_evaluation_files_without_evaluation_are_said(
    still_model_folder: Path, recall_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = train_options(still_model_folder, recall_data, tmp_path, "--max_steps", "1")
    assert train_batch_neg.main([*options, "--similar_text_pair_file", "x.csv", "--recall_num", "9"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "--similar_text_pair_file, --recall_num: nothing is evaluated without --evaluate"
