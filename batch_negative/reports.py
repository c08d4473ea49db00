"""What a training says before it begins and when it ends. Imports no Paddle."""

import math
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batch_negative.batches import BatchSchedule, PairBatcher
from common.logs import log
from common.texts import DOCUMENT, QUERY
from data import TextPair, TextTokenizer
from encoding.token_statistics import report_tokens
from retrieval.corpus import Corpus

if TYPE_CHECKING:
    from base_model import SemanticIndexBase

MANY_MASKED = 0.1  # of the other titles of a batch; in files of distinct queries it is less than 1 %


def report_texts(
    tokenizer: TextTokenizer,
    pairs: Sequence[TextPair],
    train_set_file: str,
    evaluation: Mapping[str, Any] | None,
    *,
    unsupervised: bool = False,
) -> None:
    """Logs how many of the texts are cut or unknown, if they are many. Raises InputError if almost all are unknown.

    unsupervised: each text is its own title.
    """
    queries: dict[str, Sequence[str]] = {}
    if not unsupervised:
        queries[f"queries of {train_set_file}"] = [pair.query for pair in pairs]
    documents: dict[str, Sequence[str]] = {
        f"{'texts' if unsupervised else 'titles'} of {train_set_file}": [pair.title for pair in pairs],
        f"hard negatives of {train_set_file}": [text for pair in pairs for text in pair.hard_negatives],
    }
    if evaluation:
        corpus: Corpus = evaluation["corpus"]
        queries["queries of the evaluation"] = list(evaluation["positives"])
        documents[f"documents of {corpus.path}"] = corpus
    report_tokens(tokenizer, queries, QUERY)
    report_tokens(tokenizer, documents, DOCUMENT)


def report_plan(
    schedule: BatchSchedule,
    batcher: PairBatcher,
    completed: int,
    pairs: Sequence[TextPair],
    *,
    batch_size: int,
    world_size: int,
    cross_device: bool,
) -> None:
    """Logs the steps that are left, their batches, and if many titles are masked; nothing if no step is left."""
    if completed == schedule.total_steps:
        return
    steps = f"steps {completed + 1} to {schedule.total_steps} of {batch_size} pairs on each of {world_size} process(es)"
    titles = batch_size * (world_size if cross_device else 1)
    first_batch = next(schedule.steps(completed)).batches[0]
    masked = batcher.masked_share(np.concatenate(first_batch if cross_device else first_batch[:1]))
    note = f", of which {100 * masked:.0f} % are masked" if masked >= MANY_MASKED else ""
    hard_negatives = sum(len(pair.hard_negatives) for pair in pairs)
    data = f"{len(pairs)} pairs" + (f" with {hard_negatives} hard negatives" if hard_negatives else "")
    log(f"training on {data}: {steps}; a query has {titles - 1} other titles as negatives{note}")


def warn_of_small_disk(
    save_dir: Path, model: "SemanticIndexBase", steps: int, save_steps: int, keep_checkpoints: int | None
) -> None:
    """Logs a warning if the checkpoints of the next `steps` won't fit on the disk."""
    size = 3 * sum(4 * parameter.size for parameter in model.parameters())  # float32: weights, AdamW's two moments
    count = math.ceil(steps / save_steps)
    count = min(count, keep_checkpoints or count)
    folder = next(path for path in (save_dir.absolute(), *save_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if count * size > free:
        problem = f"{count} checkpoints of {size / 1e9:.1f} GB won't fit into the {free / 1e9:.0f} GB that are free"
        log(f"{save_dir}: {problem}; save less often (--save_steps) or keep fewer (--keep_checkpoints)")


def report_stop(received: int | None, step: int, written: Path | None, resumed: Path | None) -> int:
    """Logs how to continue after a signal, and returns the exit code; received: None if another rank got the signal."""
    number = signal.Signals(received or signal.SIGTERM)
    # Nothing was written if the signal came while the checkpoint that was resumed from was evaluated.
    wrote = f": wrote {written}" if written else ""
    remedy = f"go on with --resume_from {'latest' if written else resumed}"
    log(f"stopped by {number.name} after step {step}{wrote}; {remedy}")
    return 128 + number


def describe_end(written: Path | None, resumed: Path | None, has_evaluated: bool) -> str:
    """What a run that wasn't stopped has done. written: its last checkpoint; resumed: the one that it began with."""
    if written:
        return f"wrote {written}"
    missing = "only its evaluation was missing" if has_evaluated else "nothing to do"
    return f"{resumed}: training is complete, {missing}"
