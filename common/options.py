"""The options that several scripts share. Imports no Paddle, so that --help answers at once."""

import argparse
from collections.abc import Iterable
from typing import Any

from common.cli import number_in_range

DEFAULT_MODEL = "ernie-1.0"
DEFAULT_EMBEDDING_SIZE = 256
ENGINES = ("auto", "dygraph", "static")
STATIC_FROM_TEXTS = 2000  # compiling takes seconds, which pay off from about this many texts on
PRECISIONS = ("fp32", "bf16", "fp16")


# Names of options, for `pick`: the keyword arguments of `modeling.checkpoint.create_model`, ...
MODEL_OPTIONS = (
    "model_name_or_path",
    "from_scratch",
    "init_from_ckpt",
    "output_emb_size",
    "pooling",
    "dropout",
    "max_seq_length",
)
OPTIMIZER_OPTIONS = (
    "learning_rate",
    "warmup_proportion",
    "weight_decay",
    "max_grad_norm",
)  # ... of `make_optimizer`, ...
# ... of `modeling.checkpoint.load_checkpoint`, and of `encoding.encoder.load_encoder`.
CHECKPOINT_OPTIONS = ("model_name_or_path", "output_emb_size", "max_seq_length")
ENCODER_OPTIONS = (*CHECKPOINT_OPTIONS, "batch_size", "engine", "precision")


def pick(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Some of the arguments as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def add_checkpoint_args(parser: argparse.ArgumentParser, params_path: str | None = None) -> None:
    """Options of the scripts that use a trained model; without a default, `--params_path` is required."""
    parser.add_argument(
        "--params_path",
        required=params_path is None,
        default=params_path,
        help="checkpoint: its folder, or the .pdparams file in it",
    )
    parser.add_argument(
        "--output_emb_size",
        type=number_in_range(0),
        help="length of a vector; read from the checkpoint, another value is an error",
    )
    parser.add_argument(
        "--model_name_or_path",
        default=DEFAULT_MODEL,
        help="backbone of a checkpoint without a config.json, such as those of the original scripts",
    )


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Options of training that describe the model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name_or_path",
        default=DEFAULT_MODEL,
        help="pretrained PaddleNLP encoder: a name, or a folder with config, vocabulary and weights",
    )
    group.add_argument(
        "--from_scratch", metavar="FOLDER", help="start from random weights; FOLDER has a config.json and a vocab.txt"
    )
    group.add_argument("--init_from_ckpt", help="start from the weights of this checkpoint (folder or .pdparams)")
    group.add_argument(
        "--output_emb_size",
        type=number_in_range(0),
        default=DEFAULT_EMBEDDING_SIZE,
        help="length of a vector; 0 keeps the backbone's hidden size, without a linear reduction",
    )
    group.add_argument(
        "--pooling",
        choices=["cls", "mean"],
        default="cls",
        help="cls: the pooled output; mean: the mean over tokens, which learns faster from scratch",
    )
    group.add_argument("--dropout", type=number_in_range(0.0, float, 1.0), default=0.1, help="dropout of the vector")


def add_encoding_args(
    parser: argparse.ArgumentParser,
    batch_size: int = 32,
    *,
    batch: str = "texts of max_seq_length tokens; more if they are shorter",
    length: str = "the checkpoint's",
) -> None:
    """Options of every script that turns texts into vectors.

    batch: what `--batch_size` counts; length: the default of `--max_seq_length`, both for the help.
    """
    parser.add_argument("--batch_size", type=number_in_range(1), default=batch_size, help=f"in a batch: {batch}")
    parser.add_argument(
        "--max_seq_length",
        type=number_in_range(3),
        help=f"tokens of a text, with [CLS] and [SEP]; longer texts are cut (default: {length})",
    )


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """Options of every script that encodes with a trained model."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="dygraph, or the static graph of Paddle Inference, compiled once and kept in the checkpoint's folder; "
        f"auto: static on a CPU from {STATIC_FROM_TEXTS} texts on",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="of the computation; vectors are stored as float32"
    )


def add_device_arg(parser: argparse.ArgumentParser, default: str | None) -> None:
    """`--device`; a default of None means a GPU if there is one."""
    help_text = "where to compute" if default else "where to compute (default: gpu if there is one, else cpu)"
    parser.add_argument("--device", choices=["cpu", "gpu"], default=default, help=help_text)


def add_skip_bad_lines_arg(parser: argparse.ArgumentParser) -> None:
    """The switch for files with lines that can't be used."""
    parser.add_argument("--skip_bad_lines", action="store_true", help="leave bad lines out and report how many")


def add_evaluation_file_args(parser: argparse.ArgumentParser, *, train: bool = False, required: bool = False) -> None:
    """The files that an evaluation reads, and the recall result that it writes; training has defaults for them."""
    parser.add_argument(
        "--similar_text_pair_file",
        "--similar_text_pair",
        required=required,
        default="./recall/dev.csv" if train else None,
        help="pairs whose queries are searched and whose titles are the right answers",
    )
    parser.add_argument(
        "--corpus_file",
        required=required,
        default="./recall/corpus.csv" if train else None,
        help="documents to search, one a line",
    )
    parser.add_argument("--recall_result_dir", default="recall_result_dir", help="folder of the recall result")
    parser.add_argument(
        "--recall_result_file",
        default="recall_result_init.txt" if train else "recall_result.txt",
        help="file name of the recall result",
    )
