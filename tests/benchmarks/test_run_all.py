import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench_finetune, run_all
from common import __version__
from common.errors import InputError
from common.files import read_json
from helpers import ROOT, leads_somewhere

CODE = {"version": __version__, "commit": "0123456789", "has_changes": False}
MACHINE = {"cpu": "EPYC", "cores": 2, "flags": ["avx2", "avx512_bf16"], "memory_gib": 23.5, "load_average": 0.1}
RUN = {
    "version": "2.0.0",
    "commit": "0123456789",
    "has_changes": False,
    "date": "2026-11-29",
    "quick": True,
    "machine": MACHINE,
    "benchmarks": {"train": {"ratio_vs_reference": 6.37, "ratio_vs_sentence_transformers": 1.38}, "encode": None},
}
DETAILS = {"batch_size": 32, "missing": None, "texts_per_second": {"ours": 1.5}, "machine": {}}
DRIVER = """
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from benchmarks import run_all
from common.cli import run

run_all.FOLDER = Path({folder!r})
run_all.describe_code = lambda record: {code!r}
run(run_all.main)
"""


class StandIns:
    """Tiny scripts in place of the benchmarks, which log their command lines and print their main figures."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        folder.mkdir()
        for script in {benchmark.command[0] for benchmark in run_all.BENCHMARKS.values()}:
            self.write(script, f"print('a table')\nprint({json.dumps(self.printed(script))!r})\n")

    def write(self, script: str, ending: str) -> None:
        """Makes or changes one; `ending` is what it does after logging."""
        logging = f"import sys\nopen({str(self.log)!r}, 'a').write(' '.join([{script!r}, *sys.argv[1:]]) + '\\n')\n"
        (self.folder / script).write_text(logging + ending, encoding="utf-8")

    @staticmethod
    def figures(script: str) -> dict[str, float]:
        """The figures that one prints."""
        return {each.main_figure: 1.25 for each in run_all.BENCHMARKS.values() if each.command[0] == script}

    def printed(self, script: str) -> dict[str, object]:
        """All that is in the JSON object of one."""
        return {**self.figures(script), **DETAILS}

    def commands(self) -> list[str]:
        """The command lines of those that were started."""
        return self.log.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """Replaces the benchmarks, and what is known of the code."""
    monkeypatch.setattr(run_all, "FOLDER", tmp_path / "benchmarks")
    monkeypatch.setattr(run_all, "describe_code", lambda record: CODE)
    return StandIns(tmp_path / "benchmarks")


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record that isn't there yet."""
    return tmp_path / "records" / "record.jsonl"


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the pages."""
    words = list(run_all.PAGES.values())
    pages = [tmp_path / "page.md", tmp_path / "page_cn.md"]
    for page in pages:
        page.write_text(f"before\n\n{run_all.START}\n\nold\n\n{run_all.END}\n\nafter\n", encoding="utf-8")
    monkeypatch.setattr(run_all, "PAGES", dict(zip(pages, words, strict=True)))
    return pages


def lines(record: Path) -> list[dict]:
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def test_every_benchmark_is_run() -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}
    scripts.remove("bench_recipe.py")  # compares ways to train on a user's data, for hours
    assert {benchmark.command[0] for benchmark in run_all.BENCHMARKS.values()} == scripts


@pytest.mark.process
def test_a_run_appends_a_line(stand_ins: StandIns, record: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(["--quick", "--record", str(record)]) == 0
    (line,) = lines(record)
    names = [name for name in run_all.BENCHMARKS if name != run_all.FINETUNE]
    assert {name: line[name] for name in CODE} == CODE
    assert line["quick"] is True
    assert line["machine"]["cores"] >= 1
    expected = {name: stand_ins.figures(run_all.BENCHMARKS[name].command[0]) for name in names}
    assert line["benchmarks"] == expected
    assert stand_ins.commands() == [" ".join((*run_all.BENCHMARKS[name].command, "--quick")) for name in names]
    assert capfd.readouterr().out.count("a table\n") == len(names)
    assert run_all.main(["--only", "search", "train", "--record", str(record)]) == 0
    assert lines(record)[0] == line
    assert list(lines(record)[1]["benchmarks"]) == ["train", "search"]
    assert stand_ins.commands()[len(names) :] == ["bench_train.py", "bench_search.py"]
    assert [path.name for path in record.parent.iterdir()] == [record.name]


@pytest.mark.process
def test_the_quality_of_fine_tuning_needs_data(
    stand_ins: StandIns, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--only finetune: needs --data"):
        run_all.main(["--only", "finetune", "--record", str(record)])
    output = run_all.finetune_folder(run_all.unfinished_file(record))
    (output / "of_a_run_that_was_given_up").mkdir(parents=True)
    whole = (stand_ins.folder / "bench_finetune.py").read_text(encoding="utf-8")
    stand_ins.write("bench_finetune.py", f"import os\nassert not os.path.exists({str(output)!r})\n{whole}")
    monkeypatch.chdir(tmp_path)
    assert run_all.main(["--only", "finetune", "--data", "recall", "--record", str(record)]) == 0
    command = stand_ins.commands()[0]
    options = bench_finetune.build_parser().parse_args([*command.split()[1:], "--model", "model"])
    assert (options.data, options.output) == (tmp_path / "recall", output)


@pytest.mark.process
@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("sys.exit('error: no such environment')\n", "exit code 1"),
        ("print('a table')\n", "its last line isn't a JSON object"),
        ("print('[1.5]')\n", "its last line isn't a JSON object"),
        ("print('{\"ratio\": 1.5}')\n", "its JSON object has no fp32_vs_onnxruntime"),
    ],
)
def test_others_run_after_one_that_fails(
    stand_ins: StandIns, record: Path, capfd: pytest.CaptureFixture[str], ending: str, message: str
) -> None:
    stand_ins.write("bench_encode.py", ending)
    assert run_all.main(["--only", "train", "encode", "scale", "--record", str(record)]) == 1
    figures = lines(record)[0]["benchmarks"]
    assert figures["encode"] is None
    assert figures["train"] and figures["scale"]
    assert f"error: encode failed ({message})" in capfd.readouterr().err


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(stand_ins: StandIns, record: Path, tmp_path: Path, number: int) -> None:
    """Its benchmark in hand is ended with it, and what was done isn't repeated."""
    whole = (stand_ins.folder / "bench_encode.py").read_text(encoding="utf-8")
    stand_ins.write("bench_encode.py", "import os, time\nprint('pid', os.getpid())\ntime.sleep(300)\n")
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), folder=str(stand_ins.folder), code=CODE), encoding="utf-8")
    command = [sys.executable, driver, "--only", "train", "encode", "scale", "--record", record]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
        process.send_signal(number)
        assert process.communicate()[1].endswith("interrupted\n")
    assert process.returncode == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not record.exists()
    (stand_ins.folder / "bench_encode.py").write_text(whole, encoding="utf-8")
    subprocess.run(command, check=True, capture_output=True)
    assert stand_ins.commands() == ["bench_train.py", "bench_encode.py", "bench_encode.py", "bench_scale.py"]
    (line,) = lines(record)
    assert list(line["benchmarks"]) == ["train", "encode", "scale"]
    assert None not in line["benchmarks"].values()


@pytest.mark.parametrize(
    ("name", "value"), [("commit", "abcdef"), ("quick", False), ("benchmarks", {}), ("machine", {"cpu": "Xeon"})]
)
def test_an_unfinished_run_of_something_else_is_not_continued(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "record.jsonl.unfinished"
    assert run_all.start_or_resume(path, RUN) == RUN
    later = {**RUN, "date": "2026-11-30", "machine": {**MACHINE, "load_average": 0.2}}
    later["benchmarks"] = dict.fromkeys(RUN["benchmarks"])
    assert run_all.start_or_resume(path, later) == RUN
    with pytest.raises(InputError, match=rf"unfinished: is of another run \({name}: .*or remove the file"):
        run_all.start_or_resume(path, {**RUN, name: value})
    assert read_json(path) == RUN


def test_a_line_is_appended_once(record: Path) -> None:
    """Also if the run was killed after it had been, and before its unfinished file was removed."""
    for each in (RUN, RUN, {**RUN, "quick": False}):
        run_all.append_run(record, each)
    assert lines(record) == [RUN, {**RUN, "quick": False}]


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "", "[]", '{"version": "2.0.0"}'])
def test_a_record_that_can_not_be_read(record: Path, line: str) -> None:
    run_all.append_run(record, RUN)
    with open(record, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=r"record\.jsonl: line 2 isn't the JSON object of a run"):
        run_all.main(["--record", str(record)])


def test_the_tables_show_the_record(pages: list[Path], record: Path) -> None:
    machine = {**MACHINE, "cpu": "Xeon", "flags": []}
    run_all.append_run(record, RUN)
    run_all.append_run(
        record,
        {**RUN, "has_changes": True, "quick": False, "machine": machine, "benchmarks": {"scale": {"other": 1.5}}},
    )
    assert run_all.main(["--tables", "--record", str(record)]) == 0
    english, chinese = (page.read_text(encoding="utf-8").splitlines() for page in pages)
    about = "| 2.0.0, `0123456789`, 2026-11-29 | 2 × EPYC, avx512_bf16, 23.5 GiB"
    nothing = " – |" * (len(run_all.BENCHMARKS) - 2)
    assert english[:3] + english[-3:] == ["before", "", run_all.START, run_all.END, "", "after"]
    head, _, full, quick = (line for line in english if line.startswith("|"))
    assert head.startswith("| version | machine | sizes | [`ratio_vs_sentence_transformers`](#training) | [`fp32_vs_")
    assert quick == f"{about}, load 0.1 | `--quick` | 1.38 | failed |{nothing}"
    before_figures = "| 2.0.0, `0123456789` with changes, 2026-11-29 | 2 × Xeon, 23.5 GiB, load 0.1 | full |"
    assert full == f"{before_figures} – | – |{nothing}"
    head, _, _, quick = (line for line in chinese if line.startswith("|"))
    assert head.startswith("| 版本 | 机器 | 规模 | [`ratio_vs_sentence_transformers`](#训练) |")
    assert quick == f"{about}, 负载 0.1 | `--quick` | 1.38 | 失败 |{nothing}"
    record.unlink()
    assert run_all.main(["--tables", "--record", str(record)]) == 0
    assert f"{run_all.START}\n\nNo run is recorded yet.\n\n{run_all.END}\n" in pages[0].read_text(encoding="utf-8")
    pages[1].write_text("without a place for it", encoding="utf-8")
    with pytest.raises(InputError, match=r"page_cn\.md: the lines .* are missing"):
        run_all.main(["--tables", "--record", str(record)])


def test_the_pages_hold_what_the_record_gives() -> None:
    for page, text in run_all.pages_with_tables(run_all.RECORD).items():
        assert page.read_text(encoding="utf-8") == text, "run python benchmarks/run_all.py --tables"


@pytest.mark.parametrize("language", [0, 1])
def test_the_pages_describe_the_figures_of_the_tables(language: int) -> None:
    page = list(run_all.PAGES)[language]
    text = page.read_text(encoding="utf-8")
    outside = text.partition(run_all.START)[0] + text.partition(run_all.END)[2]
    for benchmark in run_all.BENCHMARKS.values():
        assert f"`{benchmark.main_figure}`" in outside
        assert leads_somewhere(page, benchmark.sections[language])


@pytest.mark.process
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_line_tells_whether_the_code_is_that_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    page, record = tmp_path / "docs" / "benchmarks.md", tmp_path / "record.jsonl"
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all, "PAGES", {page: run_all.ENGLISH})
    assert run_all.describe_code(record) == {"version": __version__, "commit": None, "has_changes": True}

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "code.py").touch()
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    for path in (page, record, run_all.unfinished_file(record)):
        path.touch()
    described = run_all.describe_code(record)
    assert not described["has_changes"]
    assert git("rev-parse", "HEAD").startswith(described["commit"])
    (tmp_path / "new.py").touch()
    assert run_all.describe_code(record)["has_changes"]
