"""Runs the benchmarks one after another and appends what they measure to the record, one JSON line per run.

A line has the version, the commit, the machine, and under `benchmarks` the figures of each one: the numbers with a
decimal point at the top level of the JSON object that it ends with (its settings are integers). null stands for a
benchmark that failed. An interrupted run goes on when it is started again. --tables makes the tables of
docs/benchmarks.md and docs/benchmarks_cn.md from the record.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ROOT, describe_machine
from common import __version__
from common.cli import ArgumentParser, run
from common.errors import InputError
from common.files import atomic_write, open_for_reading, prepare_file, read_json, remove_folder, write_json

FOLDER = Path(__file__).resolve().parent
RECORD = FOLDER / "record.jsonl"
START, END = "<!-- made by benchmarks/run_all.py --tables -->", "<!-- end of what it made -->"
FINETUNE = "finetune"  # there is no generated data for it


class Benchmark(NamedTuple):
    """One of the benchmarks."""

    command: tuple[str, ...]  # a script of this folder, and its options
    main_figure: str  # which the tables show
    sections: tuple[str, str]  # links from the English and the Chinese table to what describes the figure


BENCHMARKS = {
    "train": Benchmark(("bench_train.py",), "ratio_vs_sentence_transformers", ("#training", "#训练")),
    "encode": Benchmark(("bench_encode.py",), "fp32_vs_onnxruntime", ("#encoding", "#编码")),
    "grad_cache": Benchmark(("bench_grad_cache.py",), "peak_memory_ratio", ("#gradient-cache", "#梯度缓存")),
    "search": Benchmark(("bench_search.py",), "query_vs_hnswlib", ("#search", "#检索")),
    "scale": Benchmark(("bench_scale.py",), "index_memory_ratio", ("#growing-corpora", "#不断增大的召回库")),
    "serving": Benchmark(("bench_serving.py",), "http_vs_direct", ("#serving", "#部署")),
    "serving_search": Benchmark(
        ("bench_serving.py", "--search"), "search_vs_encode_only", ("#search-over-http", "#通过-http-检索")
    ),
    FINETUNE: Benchmark(
        ("bench_finetune.py",),
        "recall@10_defaults_minus_peer",
        (
            "results.md#english-from-a-pretrained-model-60-steps-of-64-pairs",
            "results_cn.md#英文从预训练模型热启60-步每步-64-个-pair",
        ),
    ),
}


class Words(NamedTuple):
    """The words of a table in one language."""

    version: str
    machine: str
    sizes: str
    full: str  # sizes
    with_changes: str
    load: str
    failed: str
    no_lines: str


ENGLISH = Words("version", "machine", "sizes", "full", "with changes", "load", "failed", "No run is recorded yet.")
CHINESE = Words("版本", "机器", "规模", "完整", "有改动", "负载", "失败", "还没有运行记录。")
PAGES = {ROOT / "docs" / "benchmarks.md": ENGLISH, ROOT / "docs" / "benchmarks_cn.md": CHINESE}

# ---------------------------------------------------------------------------------------------------------------------
# The record


def read_record(path: Path) -> list[dict[str, Any]]:
    """The runs of a record, none if the file is missing. Raises InputError."""
    if not path.exists():
        return []
    runs = []
    with open_for_reading(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                runs.append(json.loads(line))
                cells(runs[-1], ENGLISH)  # fails unless the line has what the tables show
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(
                    f"{path}: line {number} isn't the JSON object of a run; restore or remove it"
                ) from None
    return runs


def append_run(path: Path, finished: Mapping[str, Any]) -> None:
    """Adds a line, unless a run that was killed right afterwards has done so. Raises InputError."""
    runs = read_record(path)
    if finished not in runs:
        with atomic_write(path) as file:
            file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in [*runs, finished])


def git_output(*arguments: str) -> str | None:
    """What git says about this project, None if it has no repository or there is no git."""
    git = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    try:
        return subprocess.run([*git, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_code(record: Path) -> dict[str, Any]:
    """The version, the commit, and whether files differ from it, other than the record and the pages."""
    commit = git_output("rev-parse", "--short=10", "HEAD")
    written = [path.relative_to(ROOT) for path in (record.resolve(), *PAGES) if path.is_relative_to(ROOT)]
    # The names of an unfinished run's files begin with the record's.
    changes = git_output("status", "--porcelain", "--", ".", *(f":(exclude){path}*" for path in written))
    return {"version": __version__, "commit": commit and commit.strip(), "has_changes": changes != ""}


# ---------------------------------------------------------------------------------------------------------------------
# A run


def unfinished_file(record: Path) -> Path:
    """Where the line of a run grows until it is complete."""
    return record.with_name(f"{record.name}.unfinished")


def start_or_resume(path: Path, started: dict[str, Any]) -> dict[str, Any]:
    """The unfinished run of a file, or else the given one, written there. Raises InputError if they don't match."""
    if not path.exists():
        remove_folder(finetune_folder(path))
        write_json(path, started)
        return started
    unfinished = read_json(path)
    kept = comparable(unfinished)
    for name, value in comparable(started).items():
        if kept.get(name) != value:
            remedy = "finish that one with the same code and options, or remove the file"
            raise InputError(f"{path}: is of another run ({name}: {kept.get(name)}, not {value}); {remedy}")
    return unfinished


def comparable(unfinished: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same when a run goes on: all but the date, the load and the figures."""
    machine = {**unfinished["machine"], "load_average": None}
    return {**unfinished, "date": None, "machine": machine, "benchmarks": list(unfinished["benchmarks"])}


def run_benchmark(command: Sequence[str | Path], main_figure: str) -> dict[str, float]:
    """The figures of a benchmark, whose output is shown. Raises RuntimeError if it fails.

    It has a process group of its own: an interrupted run ends it with all that it has started.
    """
    line = ""
    words = [sys.executable, "-u", *map(str, command)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, start_new_session=True, encoding="utf-8", errors="replace"
    ) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")
    try:
        result = json.loads(line)
        figures = {name: value for name, value in result.items() if isinstance(value, float)}
    except (ValueError, AttributeError):
        raise RuntimeError("its last line isn't a JSON object") from None
    if main_figure not in figures:
        raise RuntimeError(f"its JSON object has no {main_figure}")
    return figures


def run_missing(unfinished: dict[str, Any], path: Path, data: Path | None) -> None:
    """Runs the benchmarks that have no figures yet, and writes the file after each."""
    options = ["--quick"] if unfinished["quick"] else []
    for name, figures in unfinished["benchmarks"].items():
        if figures is not None:
            continue
        print(f"running {name}", file=sys.stderr, flush=True)
        benchmark = BENCHMARKS[name]
        inputs = ["--data", data, "--output", finetune_folder(path)] if name == FINETUNE else []
        command = [FOLDER / benchmark.command[0], *benchmark.command[1:], *options, *inputs]
        try:
            unfinished["benchmarks"][name] = run_benchmark(command, benchmark.main_figure)
        except RuntimeError as error:
            print(f"error: {name} failed ({error})", file=sys.stderr)
        write_json(path, unfinished)


def finetune_folder(unfinished: Path) -> Path:
    """Where bench_finetune.py keeps what is done."""
    return unfinished.with_name(f"{unfinished.name}_{FINETUNE}")


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def cells(each: Mapping[str, Any], words: Words) -> list[str]:
    """A run's row: version, machine, sizes, and the main figure of each benchmark."""
    machine, measured = each["machine"], each["benchmarks"]
    commit = [f"`{each['commit']}`" + f" {words.with_changes}" * each["has_changes"]] if each["commit"] else []
    about = [f"{machine['cores']} × {machine['cpu']}", *machine["flags"][-1:], f"{machine['memory_gib']} GiB"]
    row = [
        ", ".join([each["version"], *commit, each["date"]]),
        ", ".join([*about, f"{words.load} {machine['load_average']}"]),
        "`--quick`" if each["quick"] else words.full,
    ]
    for name, benchmark in BENCHMARKS.items():
        figures = measured.get(name, {})  # nothing if it wasn't run
        row.append(words.failed if figures is None else str(figures.get(benchmark.main_figure, "–")))
    return row


def table(runs: Sequence[Mapping[str, Any]], language: int, words: Words) -> str:
    """The table of a page, the latest run first. language: 0 for English, 1 for Chinese."""
    if not runs:
        return words.no_lines
    links = [f"[`{benchmark.main_figure}`]({benchmark.sections[language]})" for benchmark in BENCHMARKS.values()]
    head = [words.version, words.machine, words.sizes, *links]
    head_line, *rows = (f"| {' | '.join(row)} |" for row in (head, *(cells(each, words) for each in reversed(runs))))
    return "\n".join([head_line, "|" + "---|" * len(head), *rows])


def with_table(page: Path, made: str) -> str:
    """The text of a page with a new table. Raises InputError if the page doesn't say where."""
    text = page.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise InputError(f"{page}: the lines {START} and {END} are missing; put them where the table belongs")
    return f"{before}{start}\n\n{made}\n\n{end}{after}"


def pages_with_tables(record: Path) -> dict[Path, str]:
    """The texts of both pages with the tables of a record. Raises InputError."""
    runs = read_record(record)
    return {
        page: with_table(page, table(runs, language, words)) for language, (page, words) in enumerate(PAGES.items())
    }


# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="small sizes, in minutes")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"some of {names}")
    data_help = f"folder with train.csv, test.csv and corpus.csv for {FINETUNE}, which is left out without it"
    parser.add_argument("--data", type=Path, help=data_help)
    parser.add_argument("--record", type=Path, default=RECORD, help="file to append to, or to make the tables of")
    parser.add_argument("--tables", action="store_true", help="run nothing; make the tables of docs/ from the record")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing and appends a line, or makes the tables. Exit code 1 if a benchmark failed."""
    args = build_parser().parse_args(argv)
    if args.tables:
        for page, text in pages_with_tables(args.record).items():
            with atomic_write(page) as file:
                file.write(text)
        return 0
    if args.only and FINETUNE in args.only and args.data is None:
        raise InputError(f"--only {FINETUNE}: needs --data")
    read_record(args.record)  # an error in it would otherwise show up only at the end
    prepare_file(args.record)
    chosen = args.only or [name for name in BENCHMARKS if name != FINETUNE or args.data]
    started = {
        **describe_code(args.record),
        "date": date.today().isoformat(),
        "quick": args.quick,
        "machine": describe_machine(),
        "benchmarks": {name: None for name in BENCHMARKS if name in chosen},
    }
    path = unfinished_file(args.record)
    unfinished = start_or_resume(path, started)
    run_missing(unfinished, path, args.data and args.data.absolute())
    append_run(args.record, unfinished)
    path.unlink()
    remove_folder(finetune_folder(path))
    print(f"appended a line to {args.record}", file=sys.stderr)
    return int(None in unfinished["benchmarks"].values())


if __name__ == "__main__":
    run(main)
