"""Training: what it writes, that it learns, and that several ranks train as one process does."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import monitor
import numpy as np
import paddle
import pytest
from paddle.amp import grad_scaler

import evaluate
import predict
import recall
import train_batch_neg
from batch_negative.batches import BatchSchedule, PairBatcher, batched, epoch_batches
from batch_negative.model import SemanticIndexBatchNeg, in_batch_negatives_loss
from batch_negative.resume import read_training_state
from batch_negative.trainer import make_optimizer
from common.device import set_seed
from common.errors import InputError
from data import TextPair, encode_texts, positives_by_query, read_hits, read_text_pairs
from helpers import all_pairs, assert_same_weights, make_model_folder, poisoned, run_script, train_options, write_pairs
from modeling.checkpoint import create_model, load_checkpoint
from modeling.checkpoint_files import step_folders
from modeling.cpu_training_layers import speed_up_training
from modeling.weight_files import read_weights
from retrieval.saved_index import load_index


def recall_at_1(checkpoint: Path, recall_data: Path, folder: Path) -> float:
    options = ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    options += ["--recall_result_dir", str(folder), "--params_path", str(checkpoint), "--device", "cpu"]
    recall.main(options)
    positives = positives_by_query(read_text_pairs(recall_data / "dev.csv"))
    return evaluate.evaluate(positives, read_hits(folder / "recall_result.txt"), 10).recall[1]


def test_it_writes_what_the_document_says(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "1", "--save_steps", "3", "--log_steps", "4", "--evaluate", "--recall_num", "20"]
    options += ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    options += ["--recall_result_dir", "recall_result_dir", "--recall_result_file", "recall_result.txt"]
    assert train_batch_neg.main(train_options(model_folder, recall_data, tmp_path / "checkpoints", *options)) == 0

    written = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert written == {"model_3", "model_6", "model_8", "model_best", "visualdl"}  # 128 pairs, 16 a step
    names = {"model_state.pdparams", "model.safetensors", "config.json", "semantic_index.json", "manifest.json"}
    names |= {"vocab.txt", "tokenizer_config.json"}
    training = {"training_state.json", "training_optimizer.safetensors"}
    for folder in ("model_3", "model_8"):
        assert {file.name for file in (tmp_path / "checkpoints" / folder).iterdir()} == names | training
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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "00:00:00"), (86_399, "23:59:59"), (299_700, "83:15:00"), (360_001, "100:00:01")]
)
def test_a_duration_may_be_of_days(seconds: float, text: str) -> None:
    assert monitor.format_duration(seconds) == text


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


def test_evaluating_does_not_change_the_training(
    model_folder: Path, recall_data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = ["--max_steps", "4", "--evaluate", "--eval_steps", "1", "--recall_result_dir", str(tmp_path / "results")]
    options += ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options))
    assert_same_weights(tmp_path / "model_4", checkpoint)
    assert len((tmp_path / "results" / "evaluate_result.txt").read_text().splitlines()) == 4


def test_it_evaluates_every_so_many_steps_and_at_the_end(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    options = ["--max_steps", "5", "--evaluate", "--eval_steps", "2", "--recall_result_dir", str(tmp_path / "results")]
    options += ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options, "--ann", "exact"))
    report = (tmp_path / "results" / "evaluate_result.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in report] == ["global step 2", "global step 4", "global step 5"]
    state = read_training_state(step_folders(tmp_path)[-1])
    assert state.progress["evaluator"]["last_step"] == 5  # going on from it evaluates nothing again


def test_model_best_is_the_best(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "recall", lambda *_, **__: None)
    monkeypatch.setattr(monitor, "as_hits", lambda *_: [])
    nothing = evaluate.evaluate({"query": {"title"}}, {}, 50)
    scored = (nothing._replace(recall={**nothing.recall, 5: score}) for score in (0.2, 0.7, 0.7, 0.5))
    monkeypatch.setattr(monitor, "evaluate", lambda *_: next(scored))
    options = ["--max_steps", "4", "--evaluate", "--eval_steps", "1", "--save_steps", "1"]
    options += ["--recall_result_dir", str(tmp_path / "results")]
    options += ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options))
    assert_same_weights(tmp_path / "model_best", tmp_path / "model_2")
    assert "global_step: 2, recall: 0.7" in (tmp_path / "model_best" / "train_result.txt").read_text()


def test_a_batch_of_chunks_is_one_batch(still_model_folder: Path) -> None:
    """The model's loss and gradients equal those of encoding every text by itself."""
    texts = all_pairs()
    pairs = [
        TextPair(query, title, texts[row + 20][1] if row % 3 else None) for row, (query, title) in enumerate(texts[:9])
    ]
    pairs.append(TextPair(pairs[0].query, pairs[4].title))  # one query with two titles
    model, tokenizer = create_model(SemanticIndexBatchNeg, from_scratch=str(still_model_folder), dropout=0.0)
    batch = PairBatcher(tokenizer, pairs)([np.arange(10)])
    assert len(batch.chunks) > 1
    loss = model(batch, 0.2, 30.0)
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    model.clear_gradients()

    def vectors(texts: list[str]) -> paddle.Tensor:
        return paddle.concat([model.get_pooled_embedding(*map(paddle.to_tensor, tokenizer([text]))) for text in texts])

    columns = [pair.title for pair in pairs] + [pair.hard_negative for pair in pairs if pair.hard_negative]
    paired = {(pair.query, pair.title) for pair in pairs}
    mask = paddle.to_tensor([[(pair.query, text) in paired for text in columns] for pair in pairs])
    queries = vectors([pair.query for pair in pairs])
    slow = in_batch_negatives_loss(queries, vectors(columns), margin=0.2, scale=30.0, mask=mask)
    slow.backward()
    assert float(loss) == pytest.approx(float(slow), abs=1e-5)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad.numpy(), atol=1e-5, err_msg=name)


def test_masking_duplicates_can_be_turned_off(model_folder: Path, tmp_path: Path, capsys) -> None:
    write_pairs(tmp_path / "train.csv", [all_pairs()[0]] * 8)  # every other title is a positive: nothing to learn
    losses = []
    for switch in ([], ["--no_false_negative_mask"]):
        options = ["--max_steps", "1", "--batch_size", "8", "--log_steps", "1", "--dropout", "0", *switch]
        assert train_batch_neg.main(train_options(model_folder, tmp_path, tmp_path / "out", *options)) == 0
        losses.append(float(re.search("loss: ([^,]+)", capsys.readouterr().out)[1]))
    assert losses[0] == 0
    assert losses[1] > 1


def test_every_pair_has_its_step_whatever_the_remainders() -> None:
    plan = BatchSchedule(41, 8, seed=0, epochs=2, accumulation=4)
    steps = list(plan.steps(0))
    assert [(step.number, step.epoch, len(step.batches)) for step in steps] == [
        (1, 1, 4),
        (2, 1, 2),
        (3, 2, 4),
        (4, 2, 2),
    ]
    assert [plan.epoch(step.number) for step in steps] == [(1, False), (1, True), (2, False), (2, True)]
    for part in (steps[:2], steps[2:]):
        rows = [row for step in part for batch in step.batches for row in batch[0]]
        assert sorted(rows) == list(range(41))


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
    ],
)
def test_an_option_reaches_the_training(model_folder: Path, tmp_path: Path, changed: tuple[str, ...]) -> None:
    pairs = [(query * (1 + row % 3), title) for row, (query, title) in enumerate(all_pairs()[:40])]
    write_pairs(tmp_path / "train.csv", [*pairs, *((query, pairs[row - 1][1]) for row, (query, _) in enumerate(pairs))])
    for name, options in (("plain", ()), ("changed", changed)):
        common = ["--max_steps", "4", *options]
        train_batch_neg.main(train_options(model_folder, tmp_path, tmp_path / name, *common))
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "plain" / "model_4", tmp_path / "changed" / "model_4", 1e-6)
    saved = read_training_state(tmp_path / "changed" / "model_4").progress["shape"]
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
    seen: list[bool] = []
    encode_chunk = SemanticIndexBatchNeg.encode_chunk

    def spy(model: SemanticIndexBatchNeg, tokens: tuple) -> paddle.Tensor:
        seen.append(any(getattr(layer, "enable_recompute", False) for layer in model.sublayers()))
        return encode_chunk(model, tokens)

    monkeypatch.setattr(SemanticIndexBatchNeg, "encode_chunk", spy)
    for switch in ([], ["--use_recompute"]):
        train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, "--max_steps", "1", *switch))
    assert set(seen[: len(seen) // 2]) == {False}
    assert set(seen[len(seen) // 2 :]) == {True}


def test_biases_and_norms_do_not_decay(model_folder: Path) -> None:
    model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(model_folder))
    before = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    optimizer, _ = make_optimizer(
        model, learning_rate=0.1, total_steps=10, warmup_proportion=0.0, weight_decay=0.5, max_grad_norm=1.0
    )
    for parameter in model.parameters():
        parameter.grad = paddle.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decays = name.endswith(".weight") and "norm" not in name
        np.testing.assert_allclose(parameter.numpy(), before[name] * (0.95 if decays else 1.0), rtol=1e-5, err_msg=name)


def test_the_rate_rises_and_falls_linearly(model_folder: Path) -> None:
    model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(model_folder))
    optimizer, scheduler = make_optimizer(
        model, learning_rate=1.0, total_steps=10, warmup_proportion=0.2, weight_decay=0.0, max_grad_norm=1.0
    )
    rates = []
    for _ in range(10):
        rates.append(optimizer.get_lr())
        scheduler.step()
    np.testing.assert_allclose(rates, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_gradients_are_clipped_unless_the_norm_is_0(model_folder: Path, norm: float) -> None:
    model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(model_folder))
    before = model.emb_reduce_linear.bias.numpy()
    optimizer, _ = make_optimizer(
        model, learning_rate=0.1, total_steps=10, warmup_proportion=0.0, weight_decay=0.0, max_grad_norm=norm
    )
    model.emb_reduce_linear.bias.grad = paddle.full_like(model.emb_reduce_linear.bias, 100.0)
    optimizer.step()
    moment = next(value for name, value in optimizer.state_dict().items() if name.endswith("moment1_0"))
    assert not np.array_equal(model.emb_reduce_linear.bias.numpy(), before)
    assert bool((moment.numpy() > 1).all()) == (norm == 0.0)


def test_a_training_clears_away_what_a_killed_one_left(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    (tmp_path / ".model_3.0123abcd.tmp").mkdir()
    (tmp_path / ".model_4.replaced").mkdir()
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, "--max_steps", "1"))
    assert {path.name for path in tmp_path.iterdir()} == {"model_1", "model_4", "visualdl"}


def test_the_rate_that_is_logged_is_the_steps_own(
    model_folder: Path, recall_data: Path, tmp_path: Path, capsys
) -> None:
    options = ["--max_steps", "4", "--log_steps", "1", "--learning_rate", "0.004"]
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options))
    assert re.findall("lr: ([^,]+)", capsys.readouterr().out) == ["0.004", "0.003", "0.002", "0.001"]


def test_loss_scaling_stays_on(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GradScaler is made to believe in a GPU; it counts the steps whose gradients are finite."""
    on_a_gpu = SimpleNamespace(is_gpu_place=lambda: True, is_xpu_place=lambda: False, is_custom_place=lambda: False)
    monkeypatch.setattr(grad_scaler, "_dygraph_tracer", lambda: SimpleNamespace(_expected_place=on_a_gpu))
    monkeypatch.setattr(train_batch_neg, "check_amp", lambda *_: None)
    options = train_options(
        model_folder, recall_data, tmp_path, "--use_amp", "--amp_loss_scale", "1024", "--save_steps"
    )
    assert train_batch_neg.main([*options, "1", "--max_steps", "2"]) == 0
    scaler = read_training_state(tmp_path / "model_2").progress["loss_scaler"]
    assert (scaler["scale"], scaler["incr_count"]) == ([1024.0], 2)
    shutil.rmtree(tmp_path / "model_2")
    assert train_batch_neg.main([*options, "1", "--max_steps", "2", "--resume_from", "latest"]) == 0
    assert read_training_state(tmp_path / "model_2").progress["loss_scaler"] == scaler


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_a_loss_that_is_no_number_stops_and_names_the_lines(
    model_folder: Path, checkpoint: Path, tmp_path: Path, capsys
) -> None:
    """[UNK] has a vector that overflows, and one line of the third step's batch an unknown character."""
    steps = epoch_batches(64, 16, seed=1000, epoch=1)
    pairs = all_pairs()[:64]
    pairs[steps[2][0][5]] = ("鑫", pairs[steps[2][0][5]][1])
    write_pairs(tmp_path / "data" / "train.csv", pairs)
    weights = poisoned(checkpoint, tmp_path / "poisoned")
    options = ["--epochs", "1", "--save_steps", "1", "--init_from_ckpt", str(weights)]
    with pytest.raises(InputError) as error:
        train_batch_neg.main(train_options(model_folder, tmp_path / "data", tmp_path / "out", *options))
    message = str(error.value)
    assert message.startswith("the loss of step 3 is nan; ") and "\n" not in message
    lines = ", ".join(str(row + 1) for row in sorted(steps[2][0]))
    assert f"the batch has lines {lines} of {tmp_path / 'data' / 'train.csv'}; " in message
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == {"model_1", "model_2", "visualdl"}
    assert load_checkpoint(tmp_path / "out" / "model_2")


@pytest.mark.parametrize(("options", "warned"), [([], True), (["--keep_checkpoints", "2"], False)])
def test_a_disk_too_small_for_all_checkpoints_is_told(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, options, warned
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)  # a checkpoint has 0.3 MB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    options = ["--max_steps", "5", "--save_steps", "1", *options]
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path / "new", *options))
    assert ("5 checkpoints of 0.0 GB won't fit" in capsys.readouterr().err) == warned


def test_lines_that_were_left_out_count_where_a_loss_is_no_number(
    model_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    steps = epoch_batches(32, 16, seed=1000, epoch=1)
    pairs = all_pairs()[:32]
    pairs[steps[0][0][5]] = ("鑫", pairs[steps[0][0][5]][1])
    write_pairs(tmp_path / "train.csv", [*pairs[:3], ("one column",), ("another",), *pairs[3:]])
    options = ["--epochs", "1", "--init_from_ckpt", str(poisoned(checkpoint, tmp_path / "poisoned"))]
    lines = ", ".join(str(row + 1 if row < 3 else row + 3) for row in sorted(steps[0][0]))
    with pytest.raises(InputError, match=f"the batch has lines {lines} of "):
        train_batch_neg.main(train_options(model_folder, tmp_path, tmp_path / "out", "--skip_bad_lines", *options))


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
    files = ["--similar_text_pair_file", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    options = train_options(tmp_path / "nowhere", recall_data, tmp_path / "new", "--evaluate", *files)
    with pytest.raises(InputError, match=f"^{place}: can't be written"):
        train_batch_neg.main([*options, "--recall_result_dir", str(tmp_path / "results"), option, str(place)])


def test_bad_data_is_found_before_any_model_loads(tmp_path: Path) -> None:
    bad = write_pairs(tmp_path / "train.csv", [("one column",)])
    with pytest.raises(InputError, match=r"train\.csv:1: 1 column"):
        train_batch_neg.main(["--train_set_file", str(bad), "--from_scratch", str(tmp_path / "nowhere")])


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 pairs: with two ranks of 4, the last step of an epoch has one pair, so that a rank has none.

    Every third has a hard negative, and three queries share a title, so that ranks mask each other's.
    """
    folder = tmp_path_factory.mktemp("odd")
    texts = all_pairs()
    rows = [(*pair, texts[row + 20][1]) if row % 3 == 0 else pair for row, pair in enumerate(texts[:14])]
    rows += [(query, texts[0][1]) for query, _ in (texts[0], texts[5], texts[6])]
    write_pairs(folder / "train.csv", rows)
    return folder


@pytest.mark.parametrize(
    ("options", "cross_device"),
    [
        ((), True),
        (("--no_cross_device_negatives",), False),
        (("--grad_cache_chunk", "3"), True),
        (("--grad_cache_chunk", "3", "--gradient_accumulation_steps", "2"), True),
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
    script_options = train_options(folder, odd_data, tmp_path / "two", *common, *options)
    done = run_script("train_batch_neg.py", *script_options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    line = f"on each of 2 process(es); a query has {7 if cross_device else 3} other titles as negatives"
    assert line in done.stdout + done.stderr

    pairs = read_text_pairs(odd_data / "train.csv")
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
            sum(model(collate([part]), 0.2, 30.0) * (len(part) / count) for part in parts).backward()
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


def test_two_ranks_recall_as_one(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    options = ["--similar_text_pair", recall_data / "dev.csv", "--corpus_file", recall_data / "corpus.csv"]
    options += ["--params_path", checkpoint, "--device", "cpu", "--ann", "exact", "--recall_result_dir"]
    done = run_script("recall.py", *options, tmp_path / "two", ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    recall.main([*map(str, options), str(tmp_path / "one")])
    ours, theirs = (
        [line.split("\t") for line in (tmp_path / name / "recall_result.txt").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    np.testing.assert_allclose([float(line[2]) for line in ours], [float(line[2]) for line in theirs], atol=1e-5)


def test_two_ranks_build_an_index_without_queries(checkpoint: Path, recall_data: Path, tmp_path: Path) -> None:
    options = ["--corpus_file", recall_data / "corpus.csv", "--params_path", checkpoint, "--device", "cpu"]
    options += ["--ann", "exact", "--index_dir", tmp_path / "index", "--recall_result_dir", tmp_path / "result"]
    done = run_script("recall.py", *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(load_index(tmp_path / "index").documents) == len(all_pairs())


def test_two_ranks_predict_as_one(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """On the CPU, though the launcher sees GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    lines = (recall_data / "dev.csv").read_text().splitlines()[:5]
    lines[2] = "one column"
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    options = ["--text_pair_file", tmp_path / "pairs.csv", "--params_path", checkpoint, "--device", "cpu"]
    options += ["--skip_bad_lines", "--batch_size", "2"]
    done = run_script("predict.py", *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "log" / "workerlog.0").read_text().splitlines()
    numbers = [line for line in log if line == "nan" or line.removeprefix("-").startswith("0.")]
    capsys.readouterr()
    predict.main([*map(str, options)])
    expected = capsys.readouterr().out.splitlines()
    assert len(expected) == 5 and expected[2] == "nan"  # line for line, in order
    np.testing.assert_allclose(np.array(numbers, float), np.array(expected, float), atol=1e-5)
    model, tokenizer = load_checkpoint(checkpoint)
    query, title = lines[3].split("\t")
    vectors = encode_texts(model.embed, [query, title], tokenizer, 1)
    assert float(expected[3]) == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-6)
