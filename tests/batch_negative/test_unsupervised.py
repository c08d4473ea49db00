"""SimCSE: a text is its own title under another dropout mask, in the loop of all trainings."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import train_batch_neg
from batch_negative.batches import PairBatcher, PlannedStep, epoch_batches
from batch_negative.gradient_cache import cached_backward, direct_backward
from batch_negative.model import SemanticIndexBatchNeg
from batch_negative.trainer import Trainer
from common.device import set_seed
from common.errors import InputError
from common.texts import DOCUMENT, QUERY
from data import TextPair, TextTokenizer
from examples.vocabulary import build_vocabulary
from helpers import all_pairs, assert_close, assert_same_bits, run_script, small_tokenizer, train_options, write_pairs
from modeling.checkpoint import create_model
from modeling.cpu_training_layers import speed_up_training
from modeling.weight_files import read_weights

TEXTS = [title for _, title in all_pairs()[:10]]
TEXTS += [TEXTS[0], TEXTS[4]]  # duplicates are no negatives of each other
PAIRS = [TextPair(text, text) for text in TEXTS]
MARGIN, SCALE, SEED = 0.1, 20.0, 5


def small_model(folder: Path) -> tuple[SemanticIndexBatchNeg, TextTokenizer]:
    """With the same random weights in each call, and dropout."""
    set_seed(SEED)
    options = {"pooling": "mean", "output_emb_size": 16, "max_seq_length": 24}
    return create_model(SemanticIndexBatchNeg, from_scratch=str(folder), **options)


def twin_loss(model: SemanticIndexBatchNeg, tokenizer: TextTokenizer, rank_rows: list[np.ndarray]) -> paddle.Tensor:
    """The loss of the first step, one text and one logit after the other, if chunks hold one text."""
    queries, titles = [], []
    for rank, rows in enumerate(rank_rows):
        texts = [TEXTS[row] for row in rows] * 2
        lengths = [len(ids) for ids in tokenizer.tokenize(texts)]
        vectors: dict[int, paddle.Tensor] = {}
        for chunk, place in enumerate(sorted(range(len(texts)), key=lambda place: -lengths[place])):
            paddle.seed(int(np.random.SeedSequence([SEED, rank, 1, 0, chunk]).generate_state(1)[0]))
            vectors[place] = model.get_pooled_embedding(*map(paddle.to_tensor, tokenizer([texts[place]])))[0]
        queries += [vectors[place] for place in range(len(rows))]
        titles += [vectors[len(rows) + place] for place in range(len(rows))]
    texts = [TEXTS[row] for rows in rank_rows for row in rows]
    losses = []
    for i, query in enumerate(queries):
        assert float((query - titles[i]).abs().max()) > 1e-3  # both encodings have another dropout
        logits = [SCALE * ((query * titles[i]).sum() - MARGIN)]
        logits += [SCALE * (query * titles[j]).sum() for j in range(len(texts)) if texts[j] != texts[i]]
        losses.append(paddle.logsumexp(paddle.stack(logits), axis=0) - logits[0])
    return paddle.stack(losses).mean()


@pytest.mark.parametrize("backward", [direct_backward, cached_backward])
def test_a_step_is_that_of_an_obvious_twin(model_folder: Path, backward: object) -> None:
    """In value and gradient, with dropout on: the gradient cache repeats it in its second pass."""
    model, tokenizer = small_model(model_folder)
    rows = np.arange(len(TEXTS))
    twin = twin_loss(model, tokenizer, [rows])
    twin.backward()
    expected = {name: value.grad.numpy() for name, value in model.named_parameters() if value.grad is not None}
    model.clear_gradients()

    found: dict[str, np.ndarray] = {}

    def keep_gradients() -> None:
        named = model.named_parameters()
        found.update((name, value.grad.numpy()) for name, value in named if value.grad is not None)

    optimizer = SimpleNamespace(get_lr=lambda: 0.0, step=keep_gradients, clear_grad=model.clear_gradients)
    batcher = PairBatcher(tokenizer, PAIRS, unsupervised=True, chunk_texts=1)
    options = {"rank": 0, "seed": SEED, "margin": MARGIN, "scale": SCALE, "backward": backward}
    trainer = Trainer(model, batcher, optimizer, SimpleNamespace(step=lambda: None), **options)
    step = trainer.step(PlannedStep(1, 1, [[rows]]))
    assert step.loss == pytest.approx(float(twin), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value, expected[name], name)


@pytest.mark.parametrize("chunk_texts", [None, 3])
def test_a_batch_is_that_of_pairs_whose_texts_are_held_once(
    monkeypatch: pytest.MonkeyPatch, chunk_texts: int | None
) -> None:
    tokenizer, rows = TextTokenizer(build_vocabulary(TEXTS), 24), [np.array([3, 0, 10]), np.array([1, 5])]
    plain = PairBatcher(tokenizer, PAIRS, chunk_texts=chunk_texts)
    tokenized: list[str] = []
    tokenize = tokenizer.tokenize
    monkeypatch.setattr(tokenizer, "tokenize", lambda texts: tokenized.extend(texts) or tokenize(texts))
    batcher = PairBatcher(tokenizer, PAIRS, unsupervised=True, chunk_texts=chunk_texts)
    assert tokenized == TEXTS
    np.testing.assert_array_equal(batcher.lengths, plain.lengths)
    batch, twin = batcher(rows, rank=1), plain(rows, rank=1)
    for ours, theirs in zip(batch.chunks, twin.chunks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(batch.row_of_text, twin.row_of_text)
    np.testing.assert_array_equal(batch.mask, twin.mask)
    assert batch.mask.tolist() == [[TEXTS[i] == TEXTS[j] for j in (3, 0, 10, 1, 5)] for i in (3, 0, 10, 1, 5)]
    assert batch.sizes == twin.sizes == [(3, 0), (2, 0)]


def test_both_sides_take_the_document_prefix() -> None:
    tokenizer = small_tokenizer(40)
    expected = PairBatcher(tokenizer, [TextPair("文" + text, "文" + text) for text in TEXTS])([np.arange(4)])
    tokenizer.prefixes = {QUERY: "问", DOCUMENT: "文"}
    batch = PairBatcher(tokenizer, PAIRS, unsupervised=True)([np.arange(4)])
    for ours, theirs in zip(batch.chunks, expected.chunks, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose train.csv has one text a line."""
    folder = tmp_path_factory.mktemp("texts")
    write_pairs(folder / "train.csv", [(text,) for text in TEXTS])
    return folder


def options_of(model_folder: Path, texts: Path, save_dir: Path, *options: str) -> list[str]:
    loss = ("--margin", str(MARGIN), "--scale", str(SCALE), "--seed", str(SEED), "--batch_size", "6")
    return train_options(model_folder, texts, save_dir, "--unsupervised", *loss, *options)


def test_a_resumed_training_gives_the_same_bits(
    model_folder: Path, recall_data: Path, texts: Path, tmp_path: Path
) -> None:
    """From a checkpoint within an epoch, with the gradient cache; as a training on pairs it isn't resumed."""
    common = ["--max_steps", "6", "--save_steps", "3", "--grad_cache_chunk", "5", "--group_by_length"]
    assert train_batch_neg.main(options_of(model_folder, texts, tmp_path / "whole", *common)) == 0
    shutil.copytree(tmp_path / "whole" / "model_3", tmp_path / "parts" / "model_3")
    options = options_of(model_folder, texts, tmp_path / "parts", *common, "--resume_from", "latest")
    assert train_batch_neg.main(options) == 0
    assert_same_bits(tmp_path / "whole" / "model_6", tmp_path / "parts" / "model_6")
    on_pairs = [option for option in options if option != "--unsupervised"]
    with pytest.raises(InputError, match="was trained with unsupervised True, not False"):
        train_batch_neg.main([*on_pairs, "--train_set_file", str(recall_data / "train.csv")])


def test_without_any_dropout_it_is_refused(still_model_folder: Path, texts: Path, tmp_path: Path) -> None:
    options = options_of(still_model_folder, texts, tmp_path, "--max_steps", "1")
    with pytest.raises(InputError, match=r"^--unsupervised: there is no dropout, .*; give --dropout 0\.1$"):
        train_batch_neg.main([*options, "--dropout", "0"])
    assert not list(tmp_path.glob("model_*"))
    assert train_batch_neg.main(options) == 0  # the vector's dropout is enough


@pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's, beside the one line
def test_nan_loss_names_the_lines(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    (second,) = [rows for (rows,) in epoch_batches(len(TEXTS), 6, seed=SEED, epoch=1)[1:]]
    lines = ", ".join(str(row + 1) for row in sorted(second))
    with pytest.raises(InputError, match=f"the loss of step 2 is nan; the batch has lines {lines} of "):
        train_batch_neg.main(options_of(model_folder, texts, tmp_path, "--learning_rate", "1e30"))


def test_a_file_of_pairs_is_refused(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="most have 2 columns: keep text alone"):
        train_batch_neg.main(options_of(model_folder, recall_data, tmp_path))


@pytest.mark.process
def test_two_ranks_train_as_an_obvious_twin(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """The loss and, by AdamW's first moments, the gradient of a step over both ranks' texts."""
    options = options_of(model_folder, texts, tmp_path / "two", "--max_steps", "1", "--log_steps", "1")
    options += ["--grad_cache_chunk", "1", "--max_grad_norm", "0"]
    done = run_script("train_batch_neg.py", *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    model, tokenizer = small_model(model_folder)
    speed_up_training(model)
    (rank_rows,) = epoch_batches(len(TEXTS), 6, seed=SEED, epoch=1, world_size=2)
    twin = twin_loss(model, tokenizer, rank_rows)
    twin.backward()
    log = (tmp_path / "log" / "workerlog.0").read_text()
    assert float(re.search("loss: ([^,]+)", log)[1]) == pytest.approx(float(twin), abs=1e-3)
    moments = read_weights(tmp_path / "two" / "model_1" / "training_optimizer.safetensors")
    for name, value in model.named_parameters():
        if value.grad is not None:
            assert_close(10 * moments[f"{name}.moment1_0"], value.grad.numpy(), name)  # beta1 is 0.9
