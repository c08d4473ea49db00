import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import ErnieConfig, ErnieTokenizer

from batch_negative.batches import BatchSchedule, PairBatcher
from batch_negative.model import SemanticIndexBatchNeg
from benchmarks import bench_train, harness, reference, train_ours
from common.device import set_seed
from common.errors import InputError
from data import TextPair
from helpers import all_pairs, write_pairs
from modeling.checkpoint import create_model

PAIRS = [TextPair(*pair) for pair in all_pairs()]


def test_the_reference_computes_what_ours_does(still_model_folder: Path) -> None:
    """Tokens, loss and gradients, on a batch without duplicates."""
    set_seed(1)
    model, tokenizer = create_model(
        SemanticIndexBatchNeg, from_scratch=str(still_model_folder), output_emb_size=16, dropout=0.0, max_seq_length=24
    )
    plain = reference.ReferenceModel(ErnieConfig.from_pretrained(str(still_model_folder)), 16)
    missing, unexpected = plain.set_state_dict(model.state_dict())
    assert not missing and not unexpected
    plain.eval()  # its dropout of the vector is fixed
    plain_tokenizer = ErnieTokenizer.from_pretrained(str(still_model_folder))
    columns = [[pair.query for pair in PAIRS[:12]], [pair.title for pair in PAIRS[:12]]]
    tokens = [reference.tokenize(plain_tokenizer, column, 24) for column in columns]
    for column, (input_ids, token_type_ids) in zip(columns, tokens, strict=True):
        np.testing.assert_array_equal(input_ids.numpy(), tokenizer(column)[0])
        assert token_type_ids.shape == input_ids.shape
    loss = plain(*tokens, 0.2, 30.0)
    loss.backward()
    ours_loss = model(PairBatcher(tokenizer, PAIRS)([np.arange(12)]), 0.2, 30.0)
    ours_loss.backward()
    assert float(loss) == pytest.approx(float(ours_loss), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None, name
        else:
            np.testing.assert_allclose(parameter.grad.numpy(), gradients[name].numpy(), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("trainer", [train_ours, reference])
def test_a_trainer_reports_every_step(trainer: ModuleType, folder: Path, tmp_path: Path) -> None:
    train_set_file = write_pairs(tmp_path / "train.csv", all_pairs())
    report = tmp_path / "report.json"
    options = ["--model", str(folder), "--train_set_file", str(train_set_file), "--batch_size", "16", "--steps", "12"]
    assert trainer.main([*options, "--learning_rate", "2e-3", "--report", str(report)]) == 0
    training = harness.Training(**json.loads(report.read_text()))
    assert len(training.step_seconds) == len(training.losses) == 12
    assert training.losses[-1] < training.losses[0]
    assert training.peak_bytes > 1 << 26
    assert training.versions["paddlepaddle"] == paddle.__version__


def test_all_trainers_take_the_same_batches() -> None:
    """The reference in file order, and two ranks that share each batch, have the batches of one rank."""
    one, two = (
        [
            np.concatenate(step.batches[0])
            for step in BatchSchedule(len(PAIRS), 16 // ranks, seed=0, epochs=1, world_size=ranks).steps(0)
        ]
        for ranks in (1, 2)
    )
    assert [sorted(rows) for rows in one] == [sorted(rows) for rows in two]
    assert harness.in_training_order(PAIRS, 16, 0) == [PAIRS[row] for row in np.concatenate(one)]


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
