"""Trains the same dual tower with sentence-transformers, to compare speed and quality.

It runs in .venv-benchmarks. This loop tokenizes all texts once, with our tokenizer; sentence-transformers' own trainer
was no faster (docs/benchmarks.md).
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from batch_negative.batches import TokenizedTexts, epoch_batches
from benchmarks.harness import (
    EMBEDDING_SIZE,
    MAX_SEQ_LENGTH,
    SCALE,
    Training,
    add_trainer_args,
    timed_steps,
    used,
    write_report,
)
from common.cli import ArgumentParser, number_in_range, run
from common.files import read_json
from common.logs import progress_bar
from data import PAD, UNK, Embed, TextTokenizer, encode_texts, positives_by_query, read_text_pairs
from modeling.tokenizer_files import read_tokenizer
from retrieval.corpus import read_corpus

ERNIE_TO_BERT = (  # sizes and rates with the same names in both configs
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "pad_token_id",
)
Features = dict[str, torch.Tensor]


def bert_config(folder: str | Path) -> BertConfig:
    """A config with the sizes in the folder's config.json."""
    sizes = read_json(Path(folder) / "config.json")
    return BertConfig(**{name: sizes[name] for name in ERNIE_TO_BERT if name in sizes})


def as_sentence_transformer(bert: BertModel, head: Sequence[torch.nn.Module]) -> SentenceTransformer:
    """The model, followed by the modules that turn its last layer into a vector."""
    # The model gets ids; Transformer only requires that there is a tokenizer.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece(unk_token=UNK)), pad_token=PAD)
    with tempfile.TemporaryDirectory() as temporary:
        bert.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        transformer = Transformer(temporary, max_seq_length=MAX_SEQ_LENGTH)
    return SentenceTransformer(modules=[transformer, *head], device="cpu")


def pretrained_model(folder: str, max_seq_length: int) -> SentenceTransformer:
    """The model of a folder in the form of sentence-transformers."""
    model = SentenceTransformer(folder, device="cpu")
    model.max_seq_length = max_seq_length
    return model


def create_model(folder: str) -> SentenceTransformer:
    """A BERT of the folder's sizes with random weights, the mean over tokens, and a linear layer without activation."""
    config = bert_config(folder)
    dense = Dense(config.hidden_size, EMBEDDING_SIZE, activation_function=None)
    return as_sentence_transformer(BertModel(config), [Pooling(config.hidden_size, "mean"), dense])


def features_of(tokenizer: TextTokenizer, ids: Sequence[Sequence[int]]) -> Features:
    """The model's input, padded to the longest text."""
    input_ids, token_type_ids = map(torch.from_numpy, tokenizer.pad(ids))
    attention_mask = (input_ids != tokenizer.pad_id).long()
    return {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": attention_mask}


def make_step(model: SentenceTransformer, learning_rate: float, steps: int) -> Callable[[list[Features]], float]:
    """A training step on the features of queries and titles, which returns the loss."""
    loss_function = MultipleNegativesRankingLoss(model, scale=SCALE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    model.train()

    def step(columns: list[Features]) -> float:
        loss = loss_function(columns, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def batches(
    tokenizer: TextTokenizer, columns: Sequence[Sequence[str]], batch_size: int, seed: int
) -> Iterator[list[Features]]:
    """The same batches in the same order as ours, without end; columns are padded separately."""
    tokens = [TokenizedTexts(tokenizer, column) for column in columns]
    for epoch in count(1):
        for (rows,) in epoch_batches(len(tokens[0]), batch_size, seed=seed, epoch=epoch):
            yield [features_of(tokenizer, [texts[row] for row in rows]) for texts in tokens]


def embed_with(model: SentenceTransformer, tokenizer: TextTokenizer) -> Embed:
    """What `data.encode_texts` calls: unit vectors, float32 [B, D], of int64 [B, L] token ids."""

    @torch.inference_mode()
    def embed(input_ids: np.ndarray, _: np.ndarray) -> np.ndarray:
        features = features_of(tokenizer, input_ids)
        return torch.nn.functional.normalize(model(features)["sentence_embedding"]).numpy()

    model.eval()
    return embed


def write_vectors(model: SentenceTransformer, tokenizer: TextTokenizer, texts: Sequence[str], path: Path) -> None:
    """Unit vectors of the texts, float32 [N, D], in their order."""
    with progress_bar(len(texts), str(path), "text") as progress:
        np.save(path, encode_texts(embed_with(model, tokenizer), texts, tokenizer, 64, progress=progress))


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_trainer_args(parser)
    parser.add_argument("--pretrained", action="store_true", help="start from the weights of --model's folder")
    length_help = "tokens of a text; longer ones are cut"
    parser.add_argument("--max_seq_length", type=number_in_range(3), default=MAX_SEQ_LENGTH, help=length_help)
    parser.add_argument("--save", help="folder for the trained model")
    parser.add_argument("--corpus_file", help="documents, one per line, to encode after training")
    parser.add_argument("--similar_text_pair_file", help="pairs whose distinct queries to encode after training")
    parser.add_argument(
        "--output", type=Path, default=Path("vectors"), help="folder for corpus.npy and queries.npy, in file order"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, reports and encodes."""
    args = build_parser().parse_args(argv)
    torch.manual_seed(args.seed)
    pairs = read_text_pairs(args.train_set_file)
    tokenizer = read_tokenizer(args.model, args.max_seq_length, is_pytorch=args.pretrained)
    model = pretrained_model(args.model, args.max_seq_length) if args.pretrained else create_model(args.model)
    step = make_step(model, args.learning_rate, args.steps)
    columns = [[pair.query for pair in pairs], [pair.title for pair in pairs]]
    training_batches = batches(tokenizer, columns, args.batch_size, args.seed)
    seconds, losses = timed_steps(step, islice(training_batches, args.steps))
    if args.report:
        write_report(args.report, Training(seconds, losses, *used(["sentence-transformers", "torch"])))
    print(f"{len(losses)} steps, last loss {losses[-1]:.4f}")
    if args.save:
        model.save(args.save)
    if args.corpus_file or args.similar_text_pair_file:
        args.output.mkdir(parents=True, exist_ok=True)
    if args.corpus_file:
        write_vectors(model, tokenizer, read_corpus(args.corpus_file), args.output / "corpus.npy")
    if args.similar_text_pair_file:
        queries = list(positives_by_query(read_text_pairs(args.similar_text_pair_file)))
        write_vectors(model, tokenizer, queries, args.output / "queries.npy")
    return 0


if __name__ == "__main__":
    run(main)
