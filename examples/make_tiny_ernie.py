"""Makes the folder that `train_batch_neg.py --from_scratch` takes: a config, and a vocabulary built from the data."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, number_in_range, run
from common.files import read_json, write_json
from common.options import add_reading_args, call
from data import BACKBONE_CONFIG_FILE, VOCABULARY_FILE, TextPair, read_text_pairs, write_vocabulary
from examples.vocabulary import build_vocabulary
from retrieval.corpus import read_corpus

TINY_ERNIE_CONFIG = Path(__file__).parent / "tiny_ernie" / "config.json"


def texts_of(pairs: Iterable[TextPair], documents: Iterable[str]) -> Iterator[str]:
    """The texts that the model will see."""
    for pair in pairs:
        yield pair.query
        yield pair.title
    yield from documents


def write_model_folder(folder: Path, config: Mapping[str, Any], vocabulary: Sequence[str]) -> None:
    """Writes what `--from_scratch` takes. config: PaddleNLP's, in which vocab_size becomes the vocabulary's."""
    write_vocabulary(folder / VOCABULARY_FILE, vocabulary)
    write_json(folder / BACKBONE_CONFIG_FILE, {**config, "vocab_size": len(vocabulary)})


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--train_set_file", required=True, help="training pairs")
    parser.add_argument("--corpus_file", required=True, help="documents, one per line")
    parser.add_argument("--config", default=str(TINY_ERNIE_CONFIG), help="PaddleNLP config of the model")
    parser.add_argument("--vocab_size", type=number_in_range(10), default=8000, help="tokens at most")
    add_reading_args(parser, labels=True)
    parser.add_argument("--output_dir", required=True, help="folder to write config.json and vocab.txt to")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes both files and prints how many tokens there are."""
    args = build_parser().parse_args(argv)
    config = read_json(args.config)
    pairs = call(read_text_pairs, args, path=args.train_set_file)
    documents = call(read_corpus, args, path=args.corpus_file)
    vocabulary = build_vocabulary(texts_of(pairs, documents), args.vocab_size)
    write_model_folder(Path(args.output_dir), config, vocabulary)
    print(f"{args.output_dir}: a model folder with {len(vocabulary)} tokens")
    return 0


if __name__ == "__main__":
    run(main)
