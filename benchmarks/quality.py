"""What the benchmarks of quality share: judging a model, keeping what is done, means over the seeds, the table."""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, run_checked
from common.errors import InputError
from common.files import atomic_folder, read_json, write_json
from data import positives_by_query, read_hits, read_text_pairs
from retrieval.metrics import evaluate, metrics

RECALL_NUM = 50
SHOWN = ("recall@1", "recall@5", "recall@10", "recall@20", "recall@50")

Metrics = dict[str, float]
Results = Mapping[str, Sequence[Mapping[str, float]]]  # by method, of its seeds


def judge(model: Path, data: Path, max_seq_length: int, folder: Path) -> Metrics:
    """The metrics of the test queries, in percent, by exact search in the corpus. folder: for the recall result."""
    files = ["--similar_text_pair", data / "test.csv", "--corpus_file", data / "corpus.csv"]
    options = ["--max_seq_length", str(max_seq_length), "--recall_num", str(RECALL_NUM), "--ann", "exact"]
    command = [sys.executable, ROOT / "recall.py", "--device", "cpu", "--params_path", model]
    run_checked([*command, *files, *options, "--recall_result_dir", folder])
    positives = positives_by_query(read_text_pairs(data / "test.csv"))
    evaluation = evaluate(positives, read_hits(folder / "recall_result.txt"), RECALL_NUM)
    return {name: round(100 * value, 3) for name, value in metrics(evaluation).items()}


def settings_of(task: Any) -> dict[str, Any]:
    """The fields of a NamedTuple as JSON has them; paths are strings."""
    return json.loads(json.dumps(task._asdict(), default=str))


def kept(output: Path, method: str, seed: int, task: Mapping[str, Any], compute: Callable[[], Metrics]) -> Metrics:
    """What `output` has of this method and seed already, or what `compute` gives, which is then kept there.

    Raises InputError if what is kept there is of another task.
    """
    done = output / method.replace(", ", "_").replace(" ", "_") / str(seed)
    if (done / "metrics.json").is_file():
        found = read_json(done / "metrics.json")
        if found["task"] != task:
            raise InputError(f"{done}: is of another task; give another --output")
        return found["metrics"]
    print(f"{method}, seed {seed}", file=sys.stderr, flush=True)
    result = compute()
    done.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(done) as folder:
        write_json(folder / "metrics.json", {"task": task, "metrics": result})
    return result


def means_of(results: Results) -> dict[str, Metrics]:
    """The means over the seeds."""
    return {
        method: {name: round(statistics.fmean(each[name] for each in rows), 2) for name in rows[0]}
        for method, rows in results.items()
    }


def recall_of_seeds(results: Results) -> dict[str, list[float]]:
    """Recall@10 of each seed."""
    return {method: [row["recall@10"] for row in rows] for method, rows in results.items()}


def print_table(means: Mapping[str, Mapping[str, float]], shown: Sequence[str] = SHOWN) -> None:
    """A line for each method."""
    print(f"{'':24}" + "".join(f"{name:>12}" for name in shown))
    for method, values in means.items():
        print(f"{method:24}" + "".join(f"{values[name]:>12.2f}" for name in shown))
