"""The options that several scripts share. Imports no Paddle, so that --help answers at once."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from common.cli import number_in_range, positive_int, proportion
from common.texts import ROLES
from common.vector_dtypes import FLOAT32, VECTOR_DTYPES

DEFAULT_MODEL = "ernie-1.0"
DEFAULT_EMBEDDING_SIZE = 256
POOLINGS = ("cls", "first_token", "mean")  # see base_model.ModelConfig
DEFAULT_POOLING = "cls"
DEFAULT_DROPOUT = 0.1
STATIC, OPENVINO = "static", "openvino"
ENGINES = ("auto", "dygraph", STATIC, OPENVINO)
EXPORT_ENGINES = ("auto", STATIC, OPENVINO)  # of exported models
STATIC_FROM_TEXTS = 2000  # compiling takes seconds, which pay off from about this many texts on
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
MIN_OVERLAP = 0.98  # share of fp32's top 10; what bf16 had on the literature data (docs/results.md)


def pick(args: argparse.Namespace, function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """Keyword arguments for a function or class: the options in `args` that are named like a parameter, and `given`."""
    names = [name for name in inspect.signature(function).parameters if name in args and name not in given]
    return {**{name: getattr(args, name) for name in names}, **given}


def call(function: Callable[..., Any], args: argparse.Namespace, **given: Any) -> Any:
    """Calls a function or class with the arguments that `pick` finds."""
    return function(**pick(args, function, **given))


def add_encoder_args(
    parser: argparse.ArgumentParser,
    device: str | None,
    params_path: str | None = None,
    *,
    required: bool = True,
    labels: bool = False,
) -> None:
    """Adds the options of scripts that encode texts with a checkpoint.

    device, params_path: defaults of these options; required: see `add_checkpoint_args`; labels: see `add_reading_args`.
    """
    add_checkpoint_args(parser, params_path, required=required)
    add_reading_args(parser, labels=labels)
    add_encoding_args(parser)
    engine_help = (
        "dygraph, the static graph of Paddle Inference, or OpenVINO; a graph is compiled once and kept in the "
        f"checkpoint's folder. auto: on a CPU from {STATIC_FROM_TEXTS} texts on, or with another precision than fp32, "
        "the faster of static and openvino, if that is installed"
    )
    parser.add_argument("--engine", choices=ENGINES, default="auto", help=engine_help)
    add_precision_args(parser)
    add_device_arg(parser, device)


def add_checkpoint_args(
    parser: argparse.ArgumentParser, params_path: str | None = None, *, required: bool = True
) -> None:
    """Adds the options of scripts that use a trained model. required: whether `--params_path` is, without a default."""
    path_help = "checkpoint: its folder, or the weights file in it"
    parser.add_argument("--params_path", required=required and params_path is None, default=params_path, help=path_help)
    size_help = "length of a vector (default: the checkpoint's; another value is an error)"
    parser.add_argument("--output_emb_size", type=number_in_range(0), help=size_help)
    backbone_help = "backbone of a checkpoint without a config.json, such as those of the original scripts"
    parser.add_argument("--model_name_or_path", help=f"{backbone_help} (default: {DEFAULT_MODEL})")


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options of training that describe the model."""
    add = parser.add_argument_group("model").add_argument
    backbone_help = (
        "pretrained encoder: a folder in the form of PaddleNLP, Hugging Face or sentence-transformers, a name of "
        "PaddleNLP, or owner/name[@revision] on the Hugging Face hub"
    )
    add("--model_name_or_path", help=f"{backbone_help} (default: {DEFAULT_MODEL})")
    scratch_help = "start from random weights; FOLDER has a config.json and a vocab.txt"
    add("--from_scratch", metavar="FOLDER", help=scratch_help)
    add("--init_from_ckpt", help="start from the weights and settings of this checkpoint (folder or weights file)")
    size_help = "length of a vector; 0 keeps the backbone's hidden size, without a linear reduction"
    add("--output_emb_size", type=number_in_range(0), help=f"{size_help} {default_help(DEFAULT_EMBEDDING_SIZE)}")
    pooling_help = (
        "cls: the pooled output; first_token: the last layer's first token, without the pooler, as BGE and most models "
        "of the Hugging Face hub mean CLS; mean: the mean over tokens, which learns faster from scratch"
    )
    add("--pooling", choices=POOLINGS, help=f"{pooling_help} {default_help(DEFAULT_POOLING)}")
    dropout_help = "dropout of the vector; the backbone's own is in its config.json"
    add("--dropout", type=proportion, help=f"{dropout_help} {default_help(DEFAULT_DROPOUT)}")
    prefix_default = "(default: that of --init_from_ckpt or of the model's folder, else none)"
    add("--query_prefix", help=f"text before every query, such as BGE's instruction {prefix_default}")
    add("--document_prefix", help=f"text before every title and document, such as E5's 'passage: ' {prefix_default}")


def add_role_arg(parser: argparse.ArgumentParser) -> None:
    """Adds `--role`."""
    role_help = "what the texts are, for a model with a prefix for that role (default: neither, no prefix)"
    parser.add_argument("--role", choices=ROLES, help=role_help)


def default_help(value: Any) -> str:
    """The end of the help of a setting that `--init_from_ckpt` may hold. value: the default of a new model."""
    return f"(default: that of --init_from_ckpt, else {value})"


def add_encoding_args(
    parser: argparse._ActionsContainer,
    batch_size: int = 32,
    *,
    batch: str = "texts of max_seq_length tokens; more if they are shorter",
    length: str = "the checkpoint's",
) -> None:
    """Adds the options of every script that turns texts into vectors.

    batch: what `--batch_size` counts; length: the default of `--max_seq_length`, both for the help.
    """
    parser.add_argument("--batch_size", type=positive_int, default=batch_size, help=f"in a batch: {batch}")
    length_help = f"tokens of a text, with [CLS] and [SEP]; longer texts are cut (default: {length})"
    parser.add_argument("--max_seq_length", type=number_in_range(3), help=length_help)


def add_precision_args(parser: argparse.ArgumentParser) -> None:
    """Adds `--precision` and what int8 needs."""
    add = parser.add_argument
    precision_help = "precision of the computation, int8 on a CPU with OpenVINO alone"
    add("--precision", choices=PRECISIONS, default="fp32", help=precision_help)
    calibration_help = (
        "int8: calibrate on texts of this file, one per line (default: on a sample of the texts in hand, once; the "
        "calibrated graph is kept beside the model)"
    )
    add("--calibration_file", metavar="FILE", help=calibration_help)
    overlap_help = "int8: go on only if it finds this share of fp32's top 10 on a sample"
    add("--min_overlap", type=proportion, default=MIN_OVERLAP, help=f"{overlap_help} (default: {MIN_OVERLAP})")


def add_vector_dtype_arg(parser: argparse._ActionsContainer, what: str) -> None:
    """Adds `--vector_dtype`. what: the files whose vectors have this type, for the help."""
    dtype_help = f"{what}: float16 takes half the room of float32, int8 a quarter"
    parser.add_argument("--vector_dtype", choices=VECTOR_DTYPES, default=FLOAT32, help=dtype_help)


def add_device_arg(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Adds `--device`; a default of None means a GPU if there is one."""
    device_help = "where to compute" if default else "where to compute (default: gpu if there is one, else cpu)"
    parser.add_argument("--device", choices=["cpu", "gpu"], default=default, help=device_help)


def add_reading_args(parser: argparse.ArgumentParser, *, labels: bool = False) -> None:
    """Adds the options of every script that reads texts; labels: also that of scripts that learn from pairs."""
    add = parser.add_argument
    add("--skip_bad_lines", action="store_true", help="leave bad lines out and report how many")
    unchecked_help = "take columns as they are, also if they look like labels, ids, a header or quoted fields"
    add("--no_column_check", dest="check_columns", action="store_false", help=unchecked_help)
    if labels:
        add_label_arg(parser)


def add_label_arg(parser: argparse._ActionsContainer) -> None:
    """Adds `--label_column`."""
    labels_help = "files of pairs have query<TAB>title<TAB>label: keep the lines with label 1, leave out those with 0"
    parser.add_argument("--label_column", action="store_true", help=labels_help)


def add_evaluation_file_args(
    parser: argparse._ActionsContainer, *, train: bool = False, required: bool = False
) -> None:
    """Adds the options of the files that an evaluation reads and writes; train: with the defaults of training."""
    add_pair_file_arg(parser, "./recall/dev.csv" if train else None, required)
    corpus_file = "./recall/corpus.csv" if train else None
    parser.add_argument("--corpus_file", required=required, default=corpus_file, help="documents, one per line")
    parser.add_argument("--recall_result_dir", default="recall_result_dir", help="folder of the recall result")
    result_file = "recall_result_init.txt" if train else "recall_result.txt"
    parser.add_argument("--recall_result_file", default=result_file, help="file name of the recall result")


def add_pair_file_arg(parser: argparse._ActionsContainer, default: str | None = None, required: bool = False) -> None:
    """Adds the option of the evaluation pairs, under both names that the original uses."""
    names = ("--similar_text_pair_file", "--similar_text_pair")
    pairs_help = "pairs whose queries are searched and whose titles are the right answers"
    parser.add_argument(*names, required=required, default=default, help=pairs_help)
