"""The benchmarks, less their figures: what they compare is the same, and what they print can be read."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import all_pairs, make_model_folder, write_pairs
from paddlenlp.transformers import ErnieConfig, ErnieTokenizer

from base_model import set_seed
from batch_negative.model import SemanticIndexBatchNeg
from batch_negative.trainer import Plan
from benchmarks import bench_grad_cache, bench_train, common, ours, reference
from checkpoint import create_model
from data import UNK, PairCollator, TextCollator, TextPair, read_text_pairs, read_vocabulary
from runtime import InputError, run

PAIRS = [TextPair(*pair) for pair in all_pairs()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for texts of common.MAX_SEQ_LENGTH."""
    return make_model_folder(tmp_path_factory.mktemp("ernie"), max_position_embeddings=common.MAX_SEQ_LENGTH)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Takes the place of trainers' processes, and is the list of their commands."""
    commands: list[Sequence[str]] = []

    def run_process(command: Sequence[str | Path], report: Path, kind: type) -> common.Training:
        assert kind is common.Training
        commands.append(list(map(str, command)))
        steps = int(commands[-1][commands[-1].index("--steps") + 1])
        slowness = 1 + next(
            place for place, name in enumerate(["ours.py", "sentence", "reference"]) if name in " ".join(commands[-1])
        )
        return common.Training([9.0] + [float(slowness)] * (steps - 1), [0.5] * steps, 1 << 20, {"paddle": "3"})

    monkeypatch.setattr(common, "run_process", run_process)
    monkeypatch.setattr(bench_grad_cache, "run_process", run_process)
    monkeypatch.setattr(common, "BENCHMARKS_PYTHON", Path(sys.executable))
    return commands


def test_the_reference_computes_what_ours_does(still_model_folder: Path) -> None:
    """Tokens, loss and gradients, on a batch without duplicates."""
    set_seed(1)
    model, collator = create_model(
        SemanticIndexBatchNeg, from_scratch=str(still_model_folder), output_emb_size=16, dropout=0.0, max_seq_length=24
    )
    plain = reference.ReferenceModel(ErnieConfig.from_pretrained(str(still_model_folder)), 16)
    missing, unexpected = plain.set_state_dict(model.state_dict())
    assert not missing and not unexpected
    plain.eval()  # its dropout of the vector is fixed
    tokenizer = ErnieTokenizer.from_pretrained(str(still_model_folder))
    columns = [[pair.query for pair in PAIRS[:12]], [pair.title for pair in PAIRS[:12]]]
    tokens = [reference.tokenize(tokenizer, column, 24) for column in columns]
    for column, (input_ids, token_type_ids) in zip(columns, tokens, strict=True):
        np.testing.assert_array_equal(input_ids.numpy(), collator(column)[0])
        assert token_type_ids.shape == input_ids.shape
    loss = plain(*tokens, 0.2, 30.0)
    loss.backward()
    ours_loss = model(PairCollator(collator, PAIRS)([np.arange(12)]), 0.2, 30.0)
    ours_loss.backward()
    assert float(loss) == pytest.approx(float(ours_loss), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None, name
        else:
            np.testing.assert_allclose(parameter.grad.numpy(), gradients[name].numpy(), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("trainer", [ours, reference])
def test_a_trainer_reports_every_step(trainer: object, folder: Path, tmp_path: Path) -> None:
    train_set_file = write_pairs(tmp_path / "train.csv", all_pairs())
    report = tmp_path / "report.json"
    options = ["--model", str(folder), "--train_set_file", str(train_set_file), "--batch_size", "16", "--steps", "12"]
    assert trainer.main([*options, "--learning_rate", "2e-3", "--report", str(report)]) == 0
    training = common.Training(**json.loads(report.read_text()))
    assert len(training.step_seconds) == len(training.losses) == 12
    assert training.losses[-1] < training.losses[0]
    assert training.peak_bytes > 1 << 26
    assert training.versions["paddlepaddle"] == paddle.__version__


def test_all_trainers_take_the_same_batches() -> None:
    """File order for the reference, and two ranks of half the batch, are the batches of one rank."""
    one, two = (
        [
            np.concatenate(step.batches[0])
            for step in Plan(len(PAIRS), 16 // ranks, seed=0, epochs=1, world_size=ranks).steps(0)
        ]
        for ranks in (1, 2)
    )
    np.testing.assert_array_equal(np.concatenate(one), np.concatenate(two))
    assert common.in_training_order(PAIRS, 16, 0) == [PAIRS[row] for row in np.concatenate(one)]


def test_the_training_benchmark(
    folder: Path, tmp_path: Path, trained: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    train_set_file = write_pairs(tmp_path / "train.csv", all_pairs())
    inputs = ["--model", str(folder), "--train_set_file", str(train_set_file)]
    assert bench_train.main([*inputs, "--batch_size", "32", "--steps", "3", "--warm_up", "1", "--rounds", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratio_vs_reference"] == 3
    assert result["ratio_vs_sentence_transformers"] == result["two_ranks_ratio_vs_sentence_transformers"] == 2
    assert result["pairs_per_second"]["ours"] == 32
    assert result["machine"]["cores"] >= 1
    assert len(trained) == 2 * 5
    assert [command[command.index("--batch_size") + 1] for command in trained[:5]] == [*["32"] * 4, "16"]
    assert trained[:5] == trained[5:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "2", "--warm_up", "2"], "--steps 2: must be more than --warm_up 2"),
        (["--batch_size", "63"], "--batch_size 63: must be even"),
        (["--steps", "9"], "has 168 pairs, 9 steps of 64 pairs need 576"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, folder: Path, tmp_path: Path, trained: list[Sequence[str]]
) -> None:
    train_set_file = write_pairs(tmp_path / "train.csv", all_pairs())
    with pytest.raises(InputError, match=message):
        bench_train.main(["--model", str(folder), "--train_set_file", str(train_set_file), *options])
    assert not trained


def test_without_the_peers_environment_one_line_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "BENCHMARKS_PYTHON", tmp_path / ".venv-benchmarks" / "bin" / "python")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: bench_train.main(["--quick"]))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sh scripts/setup.sh --benchmarks" in line


def test_the_benchmark_of_the_gradient_cache(
    folder: Path, trained: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_grad_cache.main(["--quick", "--model", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["peak_memory_ratio"] == 1
    assert result["time_per_pair_ratio"] == 0.5  # steps of twice the pairs in the same time
    assert [("--grad_cache_chunk" in command) for command in trained] == [False, True, False, True, True, True]


def test_its_texts_are_different_and_fill_the_length(folder: Path) -> None:
    pairs = bench_grad_cache.full_length(PAIRS, 400)
    assert len({text for pair in pairs for text in pair[:2]}) == 800
    collator = TextCollator.load(folder, common.MAX_SEQ_LENGTH)
    assert collator([text for pair in pairs for text in pair[:2]])[0].min() != collator.pad_id


def test_inputs_that_are_not_given_are_made(tmp_path: Path) -> None:
    with common.benchmark_inputs(None, None, common.MEDIUM_ERNIE) as inputs:
        model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(inputs.model))
        assert (model.ptm.config.num_hidden_layers, model.ptm.config.hidden_size) == (4, 256)
        assert inputs.pairs[0] == read_text_pairs(inputs.folder / "recall" / "train.csv")[0]
        tokens = TextCollator.load(inputs.model, 64).tokenize([pair.title for pair in inputs.pairs[:100]])
        unknown = read_vocabulary(inputs.model / "vocab.txt").index(UNK)
        assert not any(unknown in ids for ids in tokens)


def test_a_trainers_failure_is_passed_on(tmp_path: Path) -> None:
    refuses = "import sys; print('error: no such file', file=sys.stderr); sys.exit(2)"
    with pytest.raises(InputError, match="no such file"):
        common.run_process([sys.executable, "-c", refuses], tmp_path / "report.json", common.Training)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        common.run_process([sys.executable, "-c", "1 / 0"], tmp_path / "report.json", common.Training)
