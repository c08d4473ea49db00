"""Trains the dual encoder on pairs of similar texts, with the other titles of a batch as negatives."""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 leaves it out

from ann_util import IndexOptions, add_index_args, check_index_args
from batch_negative.batches import BatchSchedule, PairBatcher, check_batch_size
from batch_negative.reports import describe_end, report_plan, report_stop, report_texts, warn_of_small_disk
from common import options
from common.cli import ArgumentParser, add_switch, non_negative_float, number_in_range, positive_int, proportion, run
from common.errors import InputError
from common.files import clear_leftovers, make_folder, sha256
from common.logs import is_main_process, log, process_count
from common.paddle_setup import set_up_paddle
from common.signals import StopSignals
from data import TextPair, positives_by_query, read_text_pairs
from modeling.checkpoint_files import check_checkpoint, find_checkpoint_folder, find_weights, lowercases, step_folders
from retrieval.corpus import read_corpus
from retrieval.metrics import metric_names, report_missing_positives

if TYPE_CHECKING:
    from batch_negative.distillation import Distillation
    from batch_negative.evaluator import Evaluator
    from batch_negative.model import SemanticIndexBatchNeg
    from modeling.checkpoint import LoadedModel

STOP_SECONDS = 25.0  # how long the other ranks wait for rank 0 to save after a signal: the launcher kills all after 30
# fmt: off
RESUME_CRITICAL_OPTIONS = (  # must be unchanged to resume bit for bit
    "batch_size", "gradient_accumulation_steps", "epochs", "max_steps", "learning_rate", "warmup_proportion",
    "weight_decay", "max_grad_norm", "margin", "scale", "no_false_negative_mask", "symmetric_pairs", "label_column",
    "no_cross_device_negatives", "grad_cache_chunk", "use_gradient_cache", "chunk_numbers", "group_by_length",
    "use_amp", "amp_dtype", "output_emb_size", "pooling", "dropout", "max_seq_length", "query_prefix",
    "document_prefix", "seed", "skip_bad_lines", "unsupervised", "teacher_scores",
    "distillation_weight", "teacher_scale",
)
# fmt: on
STARTING_OPTIONS = ("model_name_or_path", "from_scratch", "init_from_ckpt")  # the initial weights; unchanged as well
NEEDED_OPTIONS = {  # an option -> the option without which it has no effect
    "eval_steps": "evaluate",
    "best_metric": "evaluate",
    "early_stop_patience": "evaluate",
    "chunk_numbers": "use_gradient_cache",
    "amp_dtype": "use_amp",
    "amp_loss_scale": "use_amp",
    "distillation_weight": "teacher_scores",
    "teacher_scale": "teacher_scores",
}
EVALUATION_OPTIONS = ("similar_text_pair_file", "corpus_file", "recall_result_dir", "recall_result_file", "recall_num")
REPLACED_OPTIONS = {  # an option -> the one that takes its place
    "model_name_or_path": "from_scratch",
    "use_gradient_cache": "grad_cache_chunk",
    "symmetric_pairs": "no_false_negative_mask",
}
EXCLUDED_OPTIONS = {  # an option -> the options that can't be given beside it, and why
    "unsupervised": (("label_column", "symmetric_pairs", "teacher_scores"), "whose file has one text a line"),
    "teacher_scores": (("label_column",), "whose file has scores in the place of a label"),
}


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    file_help = "pairs, one per line: query<TAB>title[<TAB>hard negative]..."
    parser.add_argument("--train_set_file", default="./recall/train.csv", help=file_help)
    options.add_reading_args(parser, labels=True)
    unsupervised_help = (
        "SimCSE: the training file has one text a line, which is its own title under another dropout mask; "
        "queries and titles take --document_prefix"
    )
    parser.add_argument("--unsupervised", action="store_true", help=unsupervised_help)
    parser.add_argument("--save_dir", default="./checkpoints", help="folder for checkpoints and VisualDL's logs")
    options.add_device_arg(parser, default="cpu")
    options.add_model_args(parser)
    add_step_args(parser)
    add_loss_args(parser)
    add_resource_args(parser)
    add_saving_args(parser)
    add_evaluation_args(parser)
    return parser


def add_step_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options of batches, schedule and optimizer."""
    group = parser.add_argument_group("steps")
    length = "that of --init_from_ckpt, else 512, or the size of the position table"
    options.add_encoding_args(group, batch="pairs, on each process", length=length)
    add = group.add_argument
    add("--epochs", type=positive_int, default=10, help="times that each pair is seen")
    add("--max_steps", type=positive_int, help="number of steps; replaces --epochs")
    accumulation_help = "batches per step; unlike a larger --batch_size this adds no negatives"
    add("--gradient_accumulation_steps", type=positive_int, default=1, help=accumulation_help)
    add("--learning_rate", type=non_negative_float, default=5e-5, help="highest learning rate")
    add("--warmup_proportion", type=proportion, default=0.0, help="share of the steps in which the learning rate rises")
    add("--weight_decay", type=non_negative_float, default=0.0, help="AdamW's weight decay")
    add("--max_grad_norm", type=non_negative_float, default=5.0, help="norm to clip gradients to; 0: no clipping")
    grouping_help = "make batches of pairs of similar length: less padding, slightly less random"
    add("--group_by_length", action="store_true", help=grouping_help)
    seed_help = "seed of the initial weights, of dropout and of the order of the pairs"
    add("--seed", type=number_in_range(0, below=2**32), default=1000, help=seed_help)


def add_loss_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the loss."""
    group = parser.add_argument_group("loss")
    add = group.add_argument
    add("--margin", type=non_negative_float, default=0.2, help="subtracted from the positive's cosine")
    add("--scale", type=non_negative_float, default=30.0, help="factor of the cosines")
    unmasked_help = "use a title as a negative even if the training file pairs it with the query"
    add("--no_false_negative_mask", "--no_mask_duplicates", action="store_true", help=unmasked_help)
    local_help = "score each query only against the titles of its own process"
    symmetric_help = (
        "pairs hold in both directions: a query is no negative of its title either "
        "(default: if the file gives pairs in both directions)"
    )
    add_switch(group, "--symmetric_pairs", None, symmetric_help)
    add("--no_cross_device_negatives", action="store_true", help=local_help)
    teacher_help = (
        "distillation: after its texts a line of the training file has a teacher's score for the title and for each "
        "hard negative (tools/score_pairs.py writes them)"
    )
    add("--teacher_scores", action="store_true", help=teacher_help)
    weight_help = "factor of the distillation loss, which is added to that of the in-batch negatives"
    add("--distillation_weight", type=non_negative_float, default=1.0, help=weight_help)
    teacher_scale_help = (
        "factor of the teacher's scores: 1 for the logits of a cross-encoder (default: --scale, for cosines)"
    )
    add("--teacher_scale", type=non_negative_float, help=teacher_scale_help)


def add_resource_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options that trade time, memory and precision."""
    add = parser.add_argument_group("memory and precision").add_argument
    cache_help = "gradient cache: encode this many texts at a time, each twice; memory hardly grows with --batch_size"
    add("--grad_cache_chunk", type=positive_int, help=cache_help)
    chunks_help = "gradient cache that encodes --batch_size / --chunk_numbers texts at a time"
    add("--use_gradient_cache", action="store_true", help=chunks_help)
    add("--chunk_numbers", type=positive_int, default=50, help="see --use_gradient_cache")
    add("--use_amp", action="store_true", help="mixed precision, on a GPU")
    add("--amp_dtype", choices=["float16", "bfloat16"], default="float16", help="type of the matrix products")
    loss_scale_help = "initial loss scale for float16"
    add("--amp_loss_scale", type=number_in_range(1.0, float), default=32768.0, help=loss_scale_help)
    add("--use_recompute", action="store_true", help="compute activations again in the backward pass to save memory")


def add_saving_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options of logs, checkpoints and resuming."""
    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--log_steps", type=positive_int, default=10, help="steps between log lines")
    add("--save_steps", type=positive_int, default=10000, help="steps between checkpoints")
    add("--keep_checkpoints", type=positive_int, help="number of the newest checkpoints to keep (default: all)")
    resume_help = "resume exactly from a checkpoint; latest: from this run's newest usable one in --save_dir, if any"
    add("--resume_from", metavar="DIR|latest", help=resume_help)


def add_evaluation_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the evaluation during training."""
    group = parser.add_argument_group("evaluation")
    options.add_evaluation_file_args(group, train=True)
    add_index_args(group)
    add = group.add_argument
    add("--evaluate", action="store_true", help="evaluate after each epoch and at the end, and keep model_best")
    add("--eval_steps", type=positive_int, help="evaluate after this many steps instead of after each epoch")
    metric_help = "metric that selects model_best (default: recall@5, or recall@1 if --recall_num is less than 5)"
    add("--best_metric", help=metric_help)
    add("--early_stop_patience", type=positive_int, help="stop after this many evaluations without improvement")
    add("--evaluate_result", default="evaluate_result.txt", help="file name of the metrics, in --recall_result_dir")
    add("--recall_num", type=positive_int, default=50, help="documents recalled per query")


def report_unused_options(given: Mapping[str, Any]) -> None:
    """Logs options without effect that older commands may have. given: those whose values differ from the defaults."""
    if "evaluate" not in given and (unused := [f"--{name}" for name in EVALUATION_OPTIONS if name in given]):
        log(f"{', '.join(unused)}: nothing is evaluated without --evaluate")
    if "epochs" in given and "max_steps" in given:
        log(f"--epochs {given['epochs']}: --max_steps {given['max_steps']} takes its place")
    if "amp_loss_scale" in given and given.get("amp_dtype") == "bfloat16":
        log("--amp_loss_scale: has no effect with --amp_dtype bfloat16, which needs none")


def check_options(given: Mapping[str, Any], device: str) -> None:
    """Raises InputError for options without effect, for those that exclude each other, and as `check_starts` does.

    given: the options whose values differ from the defaults.
    """
    report_unused_options(given)
    for name, needed in NEEDED_OPTIONS.items():
        if name in given and needed not in given:
            raise InputError(f"--{name}: does nothing without --{needed}; add that, or leave it out")
    for name, other in REPLACED_OPTIONS.items():
        if name in given and other in given:
            raise InputError(f"--{name}: --{other} takes its place; leave one of them out")
    for name, (others, reason) in EXCLUDED_OPTIONS.items():
        for other in others:
            if name in given and other in given:
                raise InputError(f"--{other}: can't be used with --{name}, {reason}; leave one of them out")
    check_starts(given, device)


def check_starts(given: Mapping[str, Any], device: str) -> None:
    """Raises InputError for a device, and for folders to start or resume from, that can't be used."""
    if "use_amp" in given and device == "cpu":
        raise InputError("--use_amp: Paddle trains in float32 on a CPU; leave it out, or use --device gpu")
    if "init_from_ckpt" in given:
        check_checkpoint(given["init_from_ckpt"])
    if "from_scratch" in given and not Path(given["from_scratch"]).is_dir():
        raise InputError(f"--from_scratch {given['from_scratch']}: no such folder")
    if given.get("resume_from", "latest") != "latest":
        find_checkpoint_folder(given["resume_from"])


def read_training_pairs(
    train_set_file: str,
    batch_size: int,
    *,
    cross_device: bool,
    skip_bad_lines: bool,
    check_columns: bool,
    label_column: bool,
    teacher_scores: bool,
    unsupervised: bool,
) -> list[TextPair]:
    """The pairs of the training file. Raises InputError for a file or a batch size that can't be used."""
    pairs = read_text_pairs(
        train_set_file,
        skip_bad_lines=skip_bad_lines,
        check_columns=check_columns,
        label_column=label_column,
        teacher_scores=teacher_scores,
        unsupervised=unsupervised,
    )
    check_batch_size(batch_size, process_count(), pairs, train_set_file, cross_device=cross_device)
    if teacher_scores and not any(pair.hard_negatives for pair in pairs):
        problem = "no line has a hard negative, so there is nothing that the teacher could score higher or lower"
        raise InputError(f"{train_set_file}: {problem}; add hard negatives, or leave out --teacher_scores")
    return pairs


def read_evaluation(
    similar_text_pair_file: str,
    corpus_file: str,
    best_metric: str | None,
    recall_num: int,
    index_options: IndexOptions,
    *,
    skip_bad_lines: bool,
    check_columns: bool,
    label_column: bool,
    init_from_ckpt: str | None,
    from_scratch: str | None,
    model_name_or_path: str,
) -> dict[str, Any]:
    """Reads what an Evaluator needs, as its arguments. Raises InputError for files and options that can't be used."""
    checkpoint = init_from_ckpt and find_weights(init_from_ckpt).parent
    lowercase = lowercases(checkpoint, from_scratch, model_name_or_path)
    names = metric_names(recall_num)
    if best_metric and best_metric not in names:
        raise InputError(f"--best_metric {best_metric}: with --recall_num {recall_num} give one of {', '.join(names)}")
    best_metric = best_metric or ("recall@5" if "recall@5" in names else "recall@1")
    reading = {"skip_bad_lines": skip_bad_lines, "check_columns": check_columns}
    positives = positives_by_query(read_text_pairs(similar_text_pair_file, **reading, label_column=label_column))
    corpus = read_corpus(corpus_file, **reading, lowercase=lowercase)
    check_index_args(index_options, len(corpus))
    report_missing_positives(corpus, positives)
    return {"corpus": corpus, "positives": positives, "index_options": index_options, "best_metric": best_metric}


def fetch_model(args: Mapping[str, Any]) -> None:
    """Downloads the model that a new training starts from, if it is given by name. Raises InputError."""
    from modeling.hub import model_folder

    resumes = args["resume_from"] and (args["resume_from"] != "latest" or step_folders(Path(args["save_dir"])))
    if not (resumes or args["from_scratch"] or args["init_from_ckpt"]):
        model_folder(args["model_name_or_path"] or options.DEFAULT_MODEL, weights=True)


def describe_run(args: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """The run's configuration, saved with checkpoints to find those of the same run. args: all of this script's.

    The model's settings are those that apply, given or not; they may be in the folder of a model that is given by
    name, so it is downloaded first. Raises InputError for a checkpoint that can't be read.
    """
    from modeling.model_settings import held_settings

    fetch_model(args)
    settings = held_settings(**{name: args[name] for name in STARTING_OPTIONS}).resolve(args)
    args = {**args, **settings._asdict(), "model_name_or_path": args["model_name_or_path"] or options.DEFAULT_MODEL}
    run_config = {name: args[name] for name in RESUME_CRITICAL_OPTIONS}
    run_config |= {name: args[name] and os.path.normpath(args[name]) for name in STARTING_OPTIONS}
    training_file = args["train_set_file"]
    return {**run_config, "number of processes": world_size, "SHA-256 of the training file": sha256(training_file)}


def prepare_folders(save_dir: Path, evaluator: "Evaluator | None") -> None:
    """Rank 0 creates the output folders and removes what killed runs left; the others wait. Raises InputError."""
    from common.distributed import barrier

    if is_main_process():
        make_folder(save_dir)
        if evaluator:
            evaluator.prepare_files()
        clear_leftovers(save_dir)
        for checkpoint in step_folders(save_dir):  # training_evaluations.json is written into finished checkpoints
            clear_leftovers(checkpoint)
    barrier()


def prepare_model(model: "SemanticIndexBatchNeg", device: str, use_recompute: bool, unsupervised: bool) -> None:
    """On a CPU, replaces layers by faster ones and trains without padding; turns on recomputation if asked for.

    Raises InputError if the model has no dropout, which an unsupervised training needs.
    """
    from modeling.cpu_training_layers import speed_up_training
    from modeling.packed_texts import pack_texts

    names = "hidden_dropout_prob", "attention_probs_dropout_prob"
    dropout = model.config.dropout or any(getattr(model.ptm.config, name, 0.0) for name in names)
    if unsupervised and not dropout:
        problem = "there is no dropout, so both encodings of a text are the same and nothing is learned"
        raise InputError(f"--unsupervised: {problem}; give --dropout 0.1")
    if device == "cpu":
        speed_up_training(model)
        if not use_recompute:  # which runs layers again when the texts of their row aren't known any more
            model.packing = pack_texts(model)
    if use_recompute:
        model.ptm.recompute_enable()
        if not any(getattr(layer, "enable_recompute", False) for layer in model.ptm.sublayers()):
            log(f"--use_recompute: does nothing, PaddleNLP's {type(model.ptm).__name__} doesn't support it")


def make_batcher(
    loaded: "LoadedModel",
    pairs: Sequence[TextPair],
    train_set_file: str,
    no_false_negative_mask: bool,
    symmetric_pairs: bool | None,
    unsupervised: bool,
    chunk_texts: int | None,
) -> PairBatcher:
    """Tokenizes the pairs; logs that they are taken as symmetric, if the file and not an option says so."""
    batcher = PairBatcher(
        loaded.tokenizer,
        pairs,
        mask_false_negatives=not no_false_negative_mask,
        symmetric_pairs=symmetric_pairs,
        unsupervised=unsupervised,
        chunk_texts=chunk_texts,
        chunk_count=loaded.model.chunks_per_batch,
    )
    if batcher.mask and batcher.mask.symmetric and symmetric_pairs is None:
        share = f"{100 * batcher.mask.reversed_share:.0f} % of the pairs are given in both directions"
        remedy = "--symmetric_pairs False takes only titles as similar to queries"
        log(f"{train_set_file}: {share}, so all are taken as similar in both; {remedy}")
    return batcher


def make_distillation(
    teacher_scores: bool, distillation_weight: float, teacher_scale: float | None
) -> "Distillation | None":
    """The loss of the teacher's scores; None if the training file has none."""
    from batch_negative.distillation import Distillation

    return Distillation(distillation_weight, teacher_scale) if teacher_scores else None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the training, and returns 0, or 128 + the signal that stopped it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_options({name: value for name, value in vars(args).items() if value != parser.get_default(name)}, args.device)
    save_dir = Path(args.save_dir)
    cross_device = not args.no_cross_device_negatives
    pairs = options.call(read_training_pairs, args, cross_device=cross_device)
    index_options = options.call(IndexOptions, args)
    evaluation = options.call(read_evaluation, args, index_options=index_options) if args.evaluate else None

    set_up_paddle()
    from batch_negative.evaluator import Evaluator
    from batch_negative.gradient_cache import cached_backward, direct_backward
    from batch_negative.loop import TrainingLoop
    from batch_negative.resume import start_or_resume
    from batch_negative.trainer import Trainer, make_optimizer
    from batch_negative.training_log import TrainingLog
    from common.device import set_device
    from common.distributed import init_ranks, wait_for_rank_0
    from modeling.checkpoint import create_model

    set_device(args.device)
    rank, world_size = init_ranks()
    evaluator = options.call(Evaluator, args, embedding_parent=save_dir, **evaluation) if evaluation else None
    run_config = describe_run(vars(args), world_size)
    prepare_folders(save_dir, evaluator)
    model_options = options.pick(args, create_model)
    start = start_or_resume(args.resume_from, save_dir, run_config, evaluator, args.seed, model_options)
    model, completed = start.loaded.model, start.step
    prepare_model(model, args.device, args.use_recompute, args.unsupervised)
    texts_of_chunk = math.ceil(args.batch_size / args.chunk_numbers)
    chunk_texts = texts_of_chunk if args.use_gradient_cache else args.grad_cache_chunk
    report_texts(start.loaded.tokenizer, pairs, args.train_set_file, evaluation, unsupervised=args.unsupervised)
    batcher = options.call(make_batcher, args, loaded=start.loaded, pairs=pairs, chunk_texts=chunk_texts)
    lengths = batcher.lengths if args.group_by_length else None
    schedule = options.call(BatchSchedule, args, pair_count=len(pairs), world_size=world_size, lengths=lengths)
    steps = schedule.total_steps
    optimizer, scheduler = options.call(make_optimizer, args, model=model, total_steps=steps)
    backward = cached_backward if chunk_texts else direct_backward
    trainer_options = options.pick(args, Trainer, rank=rank, cross_device=cross_device, backward=backward)
    trainer_options["distillation"] = options.call(make_distillation, args)
    trainer = Trainer(model, batcher, optimizer, scheduler, **trainer_options)
    if start.state:
        trainer.restore(start.state)
    plan = {"batch_size": args.batch_size, "world_size": world_size, "cross_device": cross_device}
    report_plan(schedule, batcher, completed, pairs, **plan)
    warn_of_small_disk(save_dir, model, steps - completed, args.save_steps, args.keep_checkpoints)
    training_log = TrainingLog(save_dir / "visualdl", args.log_steps, steps, completed) if is_main_process() else None
    loop_options = options.pick(args, TrainingLoop, save_dir=save_dir, run_config=run_config)
    loop = TrainingLoop(start.loaded, trainer, schedule, evaluator, training_log, **loop_options)
    with StopSignals() as signals:
        last_step = loop.run(completed, signals, is_saved=start.is_in(save_dir))
        if loop.is_stopped:
            wait_for_rank_0(STOP_SECONDS)
            return report_stop(signals.received, last_step, loop.written, start.checkpoint)
    if is_main_process():
        print(describe_end(loop.written, start.checkpoint, loop.has_evaluated))
    return 0


if __name__ == "__main__":
    run(main)
