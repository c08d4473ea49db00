"""Training: what it writes, that it learns, what its options do, and that several ranks train as one process does."""

import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

import recall
import train_batch_neg
from batch_negative.batches import PairBatcher, batched, epoch_batches
from batch_negative.distillation import Distillation
from batch_negative.model import SemanticIndexBatchNeg
from batch_negative.resume import read_training_state
from batch_negative.trainer import make_optimizer
from common import __version__
from common.device import set_seed
from common.errors import InputError
from common.files import read_json
from common.manifest import write_manifest
from data import positives_by_query, read_hits, read_text_pairs
from helpers import (
    Calls,
    all_pairs,
    assert_same_weights,
    evaluation_options,
    make_model_folder,
    run_script,
    train_options,
    write_pairs,
)
from modeling.checkpoint import create_model
from modeling.cpu_training_layers import speed_up_training
from modeling.weight_files import read_weights
from retrieval.metrics import evaluate


def recall_at_1(checkpoint: Path, recall_data: Path, folder: Path) -> float:
    options = ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    options += ["--recall_result_dir", str(folder), "--params_path", str(checkpoint), "--device", "cpu"]
    recall.main(options)
    positives = positives_by_query(read_text_pairs(recall_data / "dev.csv"))
    return evaluate(positives, read_hits(folder / "recall_result.txt"), 10).recall[1]


def test_it_writes_what_the_document_says(
    model_folder: Path,
    recall_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "1", "--save_steps", "3", "--log_steps", "4", "--evaluate", "--recall_num", "20"]
    options += ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    options += ["--recall_result_dir", "recall_result_dir", "--recall_result_file", "recall_result.txt"]
    assert train_batch_neg.main(train_options(model_folder, recall_data, tmp_path / "checkpoints", *options)) == 0

    written = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert written == {"model_3", "model_6", "model_8", "model_best", "visualdl"}  # 128 pairs, 16 a step
    names = {"model_state.pdparams", "config.json", "semantic_index.json", "manifest.json"}
    names |= {"vocab.txt", "tokenizer_config.json"}
    training = {"training_state.json", "training_optimizer.safetensors"}
    for folder, evaluations in (("model_3", set()), ("model_8", {"training_evaluations.json"})):
        files = {file.name for file in (tmp_path / "checkpoints" / folder).iterdir()}
        assert files == names | training | evaluations
        assert read_json(tmp_path / "checkpoints" / folder / "semantic_index.json")["version"] == __version__
    best = tmp_path / "checkpoints" / "model_best"
    assert {file.name for file in best.iterdir()} == names | {"train_result.txt"}
    assert (best / "train_result.txt").read_text().startswith("epoch=1, global_step: 8, recall: ")
    assert len(list((tmp_path / "checkpoints" / "visualdl").iterdir())) == 1
    assert len((tmp_path / "recall_result_dir" / "recall_result.txt").read_text().splitlines()) == 40 * 20
    report = (tmp_path / "recall_result_dir" / "evaluate_result.txt").read_text()
    assert report.startswith("global step 8, epoch 1\trecall@1=")
    out = capsys.readouterr().out
    assert out.count("global step ") == 2
    for part in (
        "global step 4/8",
        "epoch: 1",
        "loss: ",
        "lr: ",
        "step/s",
        "pairs/s",
        "left: ",
        "recall@20=",
        "wrote ",
    ):
        assert part in out


def test_it_learns(model_folder: Path, recall_data: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = train_options(model_folder, recall_data, tmp_path, "--max_steps", "60", "--pooling", "mean")
    train_batch_neg.main(options)
    before = recall_at_1(checkpoint, recall_data, tmp_path / "before")
    assert recall_at_1(tmp_path / "model_60", recall_data, tmp_path / "after") > before


def test_the_seed_decides_everything(model_folder: Path, recall_data: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("same", "1000"), ("other", "1")):
        options = train_options(model_folder, recall_data, tmp_path / name, "--max_steps", "4", "--seed", seed)
        train_batch_neg.main(options)
    assert_same_weights(tmp_path / "same" / "model_4", checkpoint)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "other" / "model_4", checkpoint)


def test_false_negative_masking_can_be_turned_off(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_pairs(tmp_path / "train.csv", [all_pairs()[0]] * 8)  # every other title is a positive: nothing to learn
    losses = []
    for switch in ([], ["--no_false_negative_mask"], ["--no_mask_duplicates"]):  # the last is version 1's name
        options = ["--max_steps", "1", "--batch_size", "8", "--log_steps", "1", "--dropout", "0", *switch]
        assert train_batch_neg.main(train_options(model_folder, tmp_path, tmp_path / "out", *options)) == 0
        losses.append(float(re.search("loss: ([^,]+)", capsys.readouterr().out)[1]))
    assert losses[0] == 0
    assert losses[1] > 1
    assert losses[2] == losses[1]


@pytest.mark.parametrize(
    "changed",
    [
        ("--margin", "0.1"),
        ("--scale", "20"),
        ("--max_grad_norm", "0.01"),
        ("--warmup_proportion", "0.5"),
        ("--weight_decay", "0.1"),
        ("--dropout", "0.5"),
        ("--gradient_accumulation_steps", "2"),
        ("--group_by_length",),
        ("--no_false_negative_mask",),
        ("--distillation_weight", "0.5"),
        ("--teacher_scale", "10"),
    ],
)
def test_an_option_reaches_the_training(model_folder: Path, tmp_path: Path, changed: tuple[str, ...]) -> None:
    pairs = [(query * (1 + row % 3), title) for row, (query, title) in enumerate(all_pairs()[:40])]
    pairs += [(query, pairs[row - 1][1]) for row, (query, _) in enumerate(pairs)]
    form = []
    if "distillation" in changed[0] or "teacher" in changed[0]:
        form = ["--teacher_scores"]
        pairs = [(*pair, pairs[row - 1][1], "0.6", str(row / 80)) for row, pair in enumerate(pairs)]
    write_pairs(tmp_path / "train.csv", pairs)
    for name, options in (("plain", ()), ("changed", changed)):
        common = ["--max_steps", "4", *form, *options]
        train_batch_neg.main(train_options(model_folder, tmp_path, tmp_path / name, *common))
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "plain" / "model_4", tmp_path / "changed" / "model_4", 1e-6)
    saved = read_training_state(tmp_path / "changed" / "model_4").progress["run_config"]
    name = changed[0].removeprefix("--")
    assert saved[name] == getattr(train_batch_neg.build_parser().parse_args(changed), name)  # resuming compares it


def test_the_gradient_cache_keeps_the_activations_of_one_chunk(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--grad_cache_chunk and --use_gradient_cache: every chunk is encoded without gradients first."""
    calls: list[tuple[int, bool]] = []
    encode_chunk = SemanticIndexBatchNeg.encode_chunk

    def spy(model: SemanticIndexBatchNeg, tokens: tuple) -> paddle.Tensor:
        calls.append((len(tokens[0]), paddle.is_grad_enabled()))
        return encode_chunk(model, tokens)

    monkeypatch.setattr(SemanticIndexBatchNeg, "encode_chunk", spy)
    for options in (["--grad_cache_chunk", "8"], ["--use_gradient_cache", "--chunk_numbers", "2"]):
        calls.clear()
        train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, "--max_steps", "1", *options))
        assert calls == [(8, False)] * 4 + [(8, True)] * 4  # 16 queries and 16 titles


def test_recomputation_is_turned_on(
    model_folder: Path, recall_data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bool] = set()
    encode_chunk = SemanticIndexBatchNeg.encode_chunk

    def spy(model: SemanticIndexBatchNeg, tokens: tuple) -> paddle.Tensor:
        seen.add(any(getattr(layer, "enable_recompute", False) for layer in model.sublayers()))
        return encode_chunk(model, tokens)

    monkeypatch.setattr(SemanticIndexBatchNeg, "encode_chunk", spy)
    for switch, is_on in ([], False), (["--use_recompute"], True):
        train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, "--max_steps", "1", *switch))
        assert seen == {is_on}
        seen.clear()


def test_a_training_clears_away_what_a_killed_one_left(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    (tmp_path / ".model_3.0123abcd.tmp").mkdir()
    (tmp_path / ".model_4.replaced").mkdir()
    (tmp_path / "model_5").mkdir()
    (tmp_path / "model_5" / ".training_evaluations.json.0123abcd.tmp").touch()
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, "--max_steps", "1"))
    assert {path.name for path in tmp_path.iterdir()} == {"model_1", "model_4", "model_5", "visualdl"}
    assert not list((tmp_path / "model_5").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(("options", "warned"), [([], True), (["--keep_checkpoints", "2"], False)])
def test_a_disk_too_small_for_all_checkpoints_is_told(
    model_folder: Path,
    recall_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    options: list[str],
    warned: bool,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)  # a checkpoint has 0.3 MB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    options = ["--max_steps", "5", "--save_steps", "1", *options]
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path / "new", *options))
    assert ("5 checkpoints of 0.0 GB won't fit" in capsys.readouterr().err) == warned


def test_a_batch_larger_than_the_data(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--batch_size 129 .* has 128 pairs; use at most --batch_size 128"):
        train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, "--batch_size", "129"))
    assert not list(tmp_path.iterdir())


def test_a_batch_without_negatives(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    options = ["--batch_size", "1", "--max_steps", "1"]
    with pytest.raises(InputError, match=r"--batch_size 1: leaves no other title as a negative; use 2 or more"):
        train_batch_neg.main(train_options(model_folder, recall_data, tmp_path / "new", *options))
    options += ["--train_set_file", str(write_pairs(tmp_path / "hard.csv", [("问", "答", "错"), ("题", "解")]))]
    assert train_batch_neg.main(train_options(model_folder, recall_data, tmp_path / "new", *options)) == 0


@pytest.mark.parametrize("option", ["--save_dir", "--recall_result_dir", "--recall_result_file", "--evaluate_result"])
def test_a_place_that_cannot_be_written_is_found_before_any_model_loads(
    recall_data: Path, tmp_path: Path, option: str
) -> None:
    place = tmp_path / "place"
    place.mkdir() if option in ("--recall_result_file", "--evaluate_result") else place.touch()
    options = evaluation_options(recall_data, tmp_path / "results", option, str(place))
    (tmp_path / "no model").mkdir()
    with pytest.raises(InputError, match=f"^{place}: can't be written"):
        train_batch_neg.main(train_options(tmp_path / "no model", recall_data, tmp_path / "new", *options))


def test_bad_data_is_found_before_any_model_loads(tmp_path: Path) -> None:
    bad = write_pairs(tmp_path / "train.csv", [("one column",)])
    (tmp_path / "no model").mkdir()
    with pytest.raises(InputError, match=r"train\.csv:1: 1 column"):
        train_batch_neg.main(["--train_set_file", str(bad), "--from_scratch", str(tmp_path / "no model")])


def test_an_unknown_metric_is_refused(recall_data: Path, tmp_path: Path) -> None:
    options = evaluation_options(recall_data, tmp_path / "results", "--best_metric", "recall@100")
    with pytest.raises(InputError, match=r"--best_metric recall@100: .* recall@1, recall@5, .* ndcg@50"):
        train_batch_neg.main(["--train_set_file", str(recall_data / "train.csv"), *options])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--best_metric", "recall@1"), "does nothing without --evaluate"),
        (("--eval_steps", "1"), "does nothing without --evaluate"),
        (("--early_stop_patience", "1"), "does nothing without --evaluate"),
        (("--chunk_numbers", "2"), "does nothing without --use_gradient_cache"),
        (("--amp_dtype", "bfloat16"), "does nothing without --use_amp"),
        (("--amp_loss_scale", "4"), "does nothing without --use_amp"),
        (("--model_name_or_path", "ernie-3.0-base-zh"), "--from_scratch takes its place"),
        (("--use_gradient_cache", "--grad_cache_chunk", "2"), "--grad_cache_chunk takes its place"),
        (("--symmetric_pairs", "--no_false_negative_mask"), "--no_false_negative_mask takes its place"),
        (("--distillation_weight", "2"), "does nothing without --teacher_scores"),
        (("--teacher_scale", "1"), "does nothing without --teacher_scores"),
        (("--label_column", "--unsupervised"), "can't be used with --unsupervised, whose file has one text a line"),
        (("--symmetric_pairs", "False", "--unsupervised"), "can't be used with --unsupervised, .*"),
        (("--teacher_scores", "--unsupervised"), "can't be used with --unsupervised, .*"),
        (("--label_column", "--teacher_scores"), "can't be used with --teacher_scores, .*"),
    ],
)
def test_an_option_without_effect_is_refused(
    model_folder: Path, recall_data: Path, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(InputError, match=f"^{options[0]}: {reason}; "):
        train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, "--max_steps", "1", *options))
    assert not list(tmp_path.iterdir())


def test_mixed_precision_needs_a_gpu(recall_data: Path) -> None:
    with pytest.raises(InputError, match=r"--use_amp: .*--device gpu"):
        train_batch_neg.main(["--train_set_file", str(recall_data / "train.csv"), "--use_amp"])


@pytest.mark.parametrize("option", ["--init_from_ckpt", "--resume_from"])
def test_weights_that_ask_for_a_call_are_refused(
    checkpoint: Path, model_folder: Path, recall_data: Path, tmp_path: Path, option: str
) -> None:
    """In a checkpoint of a stranger, whose manifest is in order."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model_4"))
    marker = tmp_path / "marker"
    (folder / "model_state.pdparams").write_bytes(pickle.dumps({"weight": Calls(os.mkdir, str(marker))}))
    write_manifest(folder)
    options = train_options(model_folder, recall_data, tmp_path / "out", "--max_steps", "4", option, str(folder))
    with pytest.raises(InputError, match=r"model_state.pdparams: .*it wants to load posix.mkdir, .*don't need"):
        train_batch_neg.main(options)
    assert not marker.exists()
    pickle.loads((folder / "model_state.pdparams").read_bytes())
    assert marker.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 pairs: with two ranks of 4, the last step of an epoch has one pair, so that a rank has none.

    Every third has a hard negative and every third two, and three queries share a title, so that ranks mask each
    other's. In scored/ the file has scores of a teacher.
    """
    folder = tmp_path_factory.mktemp("odd")
    texts = all_pairs()
    negatives = [tuple(title for _, title in texts[row + 20 : row + 20 + row % 3]) for row in range(14)]
    rows = [(*pair, *titles) for pair, titles in zip(texts, negatives, strict=False)]
    rows += [(query, texts[0][1]) for query, _ in (texts[0], texts[5], texts[6])]
    write_pairs(folder / "train.csv", rows)
    scored = [
        (*texts, *(str((row + place) % 7 / 7) for place in range(len(texts) - 1))) for row, texts in enumerate(rows)
    ]
    write_pairs(folder / "scored" / "train.csv", scored)
    return folder


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "cross_device"),
    [
        ((), True),
        (("--no_cross_device_negatives",), False),
        (("--grad_cache_chunk", "3"), True),
        (("--grad_cache_chunk", "3", "--gradient_accumulation_steps", "2", "--teacher_scores"), True),
    ],
)
def test_two_ranks_train_as_one_process(
    odd_data: Path, tmp_path: Path, options: tuple[str, ...], cross_device: bool
) -> None:
    """The one process has the whole batch or, without negatives across ranks, averages the losses of its halves."""
    # Not ReLU, which turns a rounding difference at 0 into another gradient.
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = make_model_folder(tmp_path / "model", hidden_act="gelu", **dropout)
    common = ["--epochs", "2", "--batch_size", "4", "--dropout", "0", "--weight_decay", "1", "--seed", "7"]
    rate = 5e-4
    common += ["--learning_rate", str(rate)]
    is_distilled = "--teacher_scores" in options
    data = odd_data / "scored" if is_distilled else odd_data
    script_options = train_options(folder, data, tmp_path / "two", *common, *options)
    done = run_script("train_batch_neg.py", *script_options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    line = f"on each of 2 process(es); a query has {7 if cross_device else 3} other titles as negatives"
    assert line in done.stdout + done.stderr

    pairs = read_text_pairs(data / "train.csv", teacher_scores=is_distilled)
    distillation = Distillation(1.0, None) if is_distilled else None
    set_seed(7)
    model, tokenizer = create_model(
        SemanticIndexBatchNeg,
        from_scratch=str(folder),
        pooling="mean",
        dropout=0.0,
        output_emb_size=16,
        max_seq_length=24,
    )
    speed_up_training(model)
    collate = PairBatcher(tokenizer, pairs)
    accumulation = 2 if "--gradient_accumulation_steps" in options else 1
    steps = 2 * -(-3 // accumulation)
    rounding = {name: np.zeros(value.shape, dtype=bool) for name, value in model.state_dict().items()}
    optimizer, scheduler = make_optimizer(
        model, learning_rate=rate, total_steps=steps, warmup_proportion=0.0, weight_decay=1.0, max_grad_norm=5.0
    )
    for epoch in (1, 2):
        for batches in batched(epoch_batches(len(pairs), 4, seed=7, epoch=epoch, world_size=2), accumulation):
            if cross_device:
                parts = [np.concatenate(halves) for halves in batches]
            else:
                parts = [half for halves in batches for half in halves if len(half)]
            count = sum(map(len, parts))
            losses = [model(collate([part]), 0.2, 30.0, distillation) for part in parts]
            sum(loss * (len(part) / count) for loss, part in zip(losses, parts, strict=True)).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sizes = np.abs(parameter.grad.numpy())
                    rounding[name] |= (sizes > 0) & (sizes < 1e-6)
            optimizer.step()
            optimizer.clear_grad()
            scheduler.step()
    one = read_weights(tmp_path / "two" / f"model_{steps}" / "model_state.pdparams")
    # Rounding makes gradients differ by some 1e-8. Of one that is next to nothing, against a usual 1e-3, AdamW
    # makes a step of the rate's size, whose sign and size rounding decides.
    assert np.mean(np.concatenate([small.ravel() for small in rounding.values()])) < 0.05
    for name, value in model.state_dict().items():
        ours, theirs = (np.where(rounding[name], 0, weights) for weights in (one[name], value.numpy()))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.process
def test_two_ranks_log_the_loss_of_one_process(
    still_model_folder: Path, recall_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    common = ["--max_steps", "2", "--log_steps", "1", "--dropout", "0", "--max_grad_norm", "1000"]
    options = train_options(still_model_folder, recall_data, tmp_path / "two", *common, "--batch_size", "8")
    done = run_script("train_batch_neg.py", *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    train_batch_neg.main(
        train_options(still_model_folder, recall_data, tmp_path / "one", *common, "--batch_size", "16")
    )
    logs = (tmp_path / "log" / "workerlog.0").read_text(), capsys.readouterr().out
    two, one = ([float(loss) for loss in re.findall("loss: ([^,]+)", log)] for log in logs)
    assert len(one) == 2
    assert two == pytest.approx(one, abs=1e-3)
    optimizers = [
        read_weights(tmp_path / name / "model_2" / "training_optimizer.safetensors") for name in ("two", "one")
    ]
    for name, moment in optimizers[1].items():  # AdamW's step hides a factor of the gradient, its moments don't
        np.testing.assert_allclose(
            optimizers[0][name], moment, rtol=0, atol=1e-9 + 2e-2 * np.abs(moment).max(), err_msg=name
        )
