"""Files whose columns aren't what the scripts take them for: every script that reads such a file names it."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import evaluate
import inference
import predict
import recall
import train_batch_neg
from common.columns import is_header
from common.errors import InputError
from data import TextPair, read_text_pairs, read_texts
from deploy.python import predict as deployed
from examples import make_tiny_ernie
from helpers import all_pairs, train_options, write_pairs
from retrieval.corpus import read_corpus

Main = Callable[[Sequence[str]], int]
PAIRS = all_pairs()[:40]
TITLES = [title for _, title in PAIRS]


def csv_text(rows: Sequence[Sequence[str]], **options: int) -> str:
    """The rows as Python's csv module, Excel and pandas write them with tabs."""
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n", **options).writerows(rows)
    return file.getvalue()


def lines(rows: Sequence[Sequence[object]]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def excel(rows: Sequence[Sequence[str]]) -> str:
    """Tab-delimited text of Excel: fields with a comma, a quote or a line break are quoted."""
    special = set(',"\n')
    quoted = [
        ['"' + field.replace('"', '""') + '"' if special & set(field) else field for field in row] for row in rows
    ]
    return lines(quoted)


INDEXED = [(row, *pair) for row, pair in enumerate(PAIRS)]
BROKEN = [*PAIRS[:5], (PAIRS[5][0], "标题的前一半\n后一半"), *PAIRS[6:]]
# A file of pairs -> words of the message, for all scripts that read pairs; the first seven are named in the issue.
WRONG_PAIRS = {
    "labels as in LCQMC": (lines([(*pair, row % 2) for row, pair in enumerate(PAIRS)]), "--label_column"),
    "pandas' index": (lines(INDEXED), "counts the lines.*cut -f2-"),
    "a header": (lines([("query", "title"), *PAIRS]), "line 1 is a header.*sed -i 1d"),
    "Excel's quotes": (excel(PAIRS), "in quotes, as in a CSV file"),
    "doubled quotes": (csv_text([*PAIRS[:9], ("查询", '论"双引号"研究')]), "in quotes, as in a CSV file"),
    "a cell with a line break": (excel(BROKEN), "a field in quotes goes over lines 6 to 7"),
    "a quote left open": (lines([*PAIRS[:7], ("查询", '"标题')]), "line 8 has a quote that isn't closed"),
    "scores as in STS-B": (lines([(*pair, row / 10) for row, pair in enumerate(PAIRS)]), "hard negative, is a number"),
    "labels after a hard negative": (
        lines([(*pair, TITLES[row - 1], row % 2) for row, pair in enumerate(PAIRS)]),
        "column 4, a hard negative, is a number .*--teacher_scores.*cut -f1-3",
    ),
    "scores of a teacher": (
        lines([(*pair, TITLES[row - 1], 0.9, row / 40) for row, pair in enumerate(PAIRS)]),
        "column 4, a hard negative, is a number .*--teacher_scores.*cut -f1-3",
    ),
    "labels as words": (lines([(*pair, ["相似", "不相似"][row % 2]) for row, pair in enumerate(PAIRS)]), "is a label"),
    "labels and a header": (lines([("text_a", "text_b", "label"), *((*pair, 1) for pair in PAIRS)]), "--label_column"),
    "an index from 1": (lines([(row + 1, *pair) for row, pair in enumerate(PAIRS[:3])]), "counts the lines"),
    "pandas' header": (lines([("", "查询", "标题"), *INDEXED]), "line 1 is a header"),
    "sampled ids": (
        lines([(row * 37 % 101, *pair) for row, pair in enumerate(PAIRS)]),
        "the query .* is a number or an id",
    ),
    "ids as in BEIR": (lines([(f"PLAIN-{row * 7}", *pair) for row, pair in enumerate(PAIRS)]), "is a number or an id"),
    "hashes": (lines([(f"{row * 0x9E3779B97F4A7C15 % 2**64:016x}", *pair) for row, pair in enumerate(PAIRS)]), "an id"),
    "clicks for titles": (lines([(query, len(title)) for query, title in PAIRS]), "the title .* is a number"),
    "all fields quoted": (csv_text(PAIRS, quoting=csv.QUOTE_ALL), "in quotes"),
    "only an index and a text": (lines([(row, title) for row, title in enumerate(TITLES)]), "counts the lines"),
    "commas": (lines([(f"{query},{title}",) for query, title in PAIRS]), "most lines have commas instead"),
    "columns of QQP": (
        lines([(row, row + 1, row + 2, *pair, 1) for row, pair in enumerate(PAIRS)]),
        "counts the lines.*cut -f2-",
    ),
    "JSON lines": (lines([(f'{{"query": "{query}", "title": "{title}"}}',) for query, title in PAIRS]), "JSON"),
    "old Macs' line ends": ("\r".join("\t".join(pair) for pair in PAIRS[:2]), "a carriage return alone"),
}
# The same for corpora and files of texts.
WRONG_TEXTS = {
    "a header": (lines([("title",), *((title,) for title in TITLES)]), "line 1 is a header"),
    "pandas' index": (lines(list(enumerate(TITLES))), "most have 2 columns: keep .* cut -f2"),
    "a CSV file's header": (
        lines([("id,text",), *((f"{row},{title}",) for row, title in enumerate(TITLES))]),
        "a header",
    ),
    "Excel's quotes": (excel([(title,) for title in TITLES]), "in quotes"),
    "a cell with a line break": (excel([(title,) for _, title in BROKEN]), "goes over lines 6 to 7"),
    "ids": (lines([(f"doc_{row * 3}",) for row in range(40)]), "is a number or an id"),
    "numbers": (lines([(row * row,) for row in range(40)]), "is a number or an id"),
    "JSON lines": (lines([(f'{{"id": {row}, "text": "{title}"}}',) for row, title in enumerate(TITLES)]), "JSON"),
    "pairs": (lines(PAIRS), "most have 2 columns"),
}
# Nothing is found in these.
RIGHT_PAIRS = {
    "a rare number": lines([*PAIRS, ("10086", "中国移动客服"), ("查询", "2019"), ("3", "4")]),
    "a rare numeric hard negative": lines([*PAIRS, ("查询", "标题", "2019")]),
    "few pairs of numbers": lines([("10086", "移动"), ("10010", "联通")]),
    "texts in quotes": lines([*PAIRS, ("论“引号”", '"引号"的用法'), ("引号", '说"引号"的用法'), ("双", '他说"好"')]),
    "a quote of a book": lines(
        [*PAIRS, ("诗", '"春眠不觉晓'), ("诗二", '处处闻啼鸟"'), ("说", '他说"好"的'), ("又", '"好"吗')]
    ),
    "inches": lines([*PAIRS, ('27" monitor', '27" 显示器'), ('5" pipe', "管")]),
    "hard negatives": lines([(*pair, TITLES[row - 1]) for row, pair in enumerate(PAIRS)]),
    "several hard negatives": lines(
        [(*pair, *TITLES[:row], *(["2019"] if row == 5 else [])) for row, pair in enumerate(PAIRS)]
    ),
    "commas in titles": lines(PAIRS),
    "numbered titles": lines([(f"查询{row}", f"标题{row}") for row in range(40)]),
    "a name of a column in the middle": lines([*PAIRS, ("query", "title")]),
}


def written(folder: Path, text: str) -> Path:
    path = folder / "file.csv"
    path.write_bytes(text.encode())
    return path


@pytest.fixture(scope="module")
def commands(
    checkpoint: Path, exported: Path, model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Main, list[str]]]:
    """Script and option -> its main, and its options up to the file."""
    out = tmp_path_factory.mktemp("out")
    train = [*train_options(model_folder, recall_data, out / "save", "--evaluate"), "--recall_result_dir", str(out)]
    search = ["--params_path", str(checkpoint), "--device", "cpu", "--recall_result_dir", str(out)]
    pairs, corpus = (str(recall_data / name) for name in ("dev.csv", "corpus.csv"))
    result = str(written(out, "查询\t标题\t0.5\n"))
    tiny = ["--output_dir", str(out / "tiny")]
    return {
        "train --train_set_file": (train_batch_neg.main, [*train, "--train_set_file"]),
        "train --similar_text_pair_file": (train_batch_neg.main, [*train, "--similar_text_pair_file"]),
        "recall --similar_text_pair_file": (
            recall.main,
            [*search, "--corpus_file", corpus, "--similar_text_pair_file"],
        ),
        "evaluate": (evaluate.main, ["--recall_result_file", result, "--similar_text_pair_file"]),
        "make_tiny_ernie --train_set_file": (
            make_tiny_ernie.main,
            [*tiny, "--corpus_file", corpus, "--train_set_file"],
        ),
        "predict": (predict.main, [*search[:4], "--text_pair_file"]),
        "deployed --text_pair_file": (deployed.main, ["--model_dir", str(exported), "--text_pair_file"]),
        "train --corpus_file": (train_batch_neg.main, [*train, "--similar_text_pair_file", pairs, "--corpus_file"]),
        "recall --corpus_file": (recall.main, [*search, "--similar_text_pair_file", pairs, "--corpus_file"]),
        "recall --add_corpus": (recall.main, [*search, "--corpus_file", corpus, "--index_dir", "x", "--add_corpus"]),
        "make_tiny_ernie --corpus_file": (make_tiny_ernie.main, [*tiny, "--train_set_file", pairs, "--corpus_file"]),
        "inference": (inference.main, ["--params_path", str(checkpoint), "--text_file"]),
        "deployed --text_file": (deployed.main, ["--model_dir", str(exported), "--text_file"]),
    }


def refusal(command: tuple[Main, list[str]], path: Path) -> str:
    """The message with which a script refuses a file."""
    main, options = command
    with pytest.raises(InputError) as error:
        main([*options, str(path)])
    return str(error.value)


LEARNING = [  # scripts and options of pairs whose third column is a hard negative
    "train --train_set_file",
    "train --similar_text_pair_file",
    "recall --similar_text_pair_file",
    "evaluate",
    "make_tiny_ernie --train_set_file",
]
COMPARING = ["predict", "deployed --text_pair_file"]  # of pairs of which the first two columns are used
READING = [
    "train --corpus_file",
    "recall --corpus_file",
    "recall --add_corpus",
    "make_tiny_ernie --corpus_file",
    "inference",
    "deployed --text_file",
]


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_a_wrong_file_of_pairs_is_refused_by_name(
    commands: dict[str, tuple[Main, list[str]]], tmp_path: Path, name: str
) -> None:
    text, expected = WRONG_PAIRS[name]
    path = written(tmp_path, text)
    is_third_column = "--label_column" in expected or "hard negative" in expected or "is a label" in expected
    for script in LEARNING if is_third_column else [*LEARNING, *COMPARING]:
        message = refusal(commands[script], path)
        assert message.startswith(f"{path}: "), script
        assert re.search(expected, message), f"{script}: {message}"


@pytest.mark.parametrize("name", WRONG_TEXTS)
def test_a_wrong_file_of_texts_is_refused_by_name(
    commands: dict[str, tuple[Main, list[str]]], tmp_path: Path, name: str
) -> None:
    text, expected = WRONG_TEXTS[name]
    path = written(tmp_path, text)
    for script in READING:
        message = refusal(commands[script], path)
        assert message.startswith(f"{path}: "), script
        assert re.search(expected, message), f"{script}: {message}"


@pytest.mark.parametrize("name", RIGHT_PAIRS)
def test_nothing_is_found_in_good_pairs(tmp_path: Path, name: str) -> None:
    rows = [tuple(line.split("\t")) for line in RIGHT_PAIRS[name].splitlines()]
    pairs = read_text_pairs(written(tmp_path, RIGHT_PAIRS[name]))
    assert [(pair.query, pair.title, *pair.hard_negatives) for pair in pairs] == rows
    titles = "".join(row[1] + "\n" for row in rows)
    assert read_texts(written(tmp_path, titles)) == titles.splitlines() == list(read_corpus(tmp_path / "file.csv"))


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_the_check_can_be_turned_off(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, WRONG_PAIRS[name][0])
    rows = [line.split("\t") for line in path.read_bytes().decode().split("\n")]
    expected = [row for row in rows if len(row) >= 2]
    if name == "pandas' header":
        expected = expected[1:]  # its first column is empty
    assert len(read_text_pairs(path, skip_bad_lines=True, check_columns=False) if expected else []) == len(expected)


def test_a_message_is_one_line_with_a_way_out(tmp_path: Path, commands: dict[str, tuple[Main, list[str]]]) -> None:
    message = refusal(commands["evaluate"], written(tmp_path, WRONG_PAIRS["labels as in LCQMC"][0]))
    assert "\n" not in message
    assert message.endswith("; if it is meant so, add --no_column_check")
    main, options = commands["evaluate"]
    assert main([*options, str(tmp_path / "file.csv"), "--no_column_check"]) == 0


def test_labels_choose_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["1", "0", "1.0", "0.0", " 1 "]
    path = written(tmp_path, lines([(*pair, label) for pair, label in zip(PAIRS, labels, strict=False)]))
    assert read_text_pairs(path, label_column=True) == [TextPair(*PAIRS[row]) for row in (0, 2, 4)]
    assert capsys.readouterr().err == f"{path}: took 3 pairs with label 1, left out 2 with label 0\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [("a\tb", "2 column"), ("a\tb\t2", "neither 0 nor 1"), ("a\tb\tyes", "neither"), ("a\t\t1", "title is empty")],
)
def test_a_line_without_a_label_is_bad(tmp_path: Path, row: str, reason: str) -> None:
    path = written(tmp_path, f"查询\t标题\t1\n{row}\n")
    with pytest.raises(InputError, match=f"{path}:2: .*{reason}"):
        read_text_pairs(path, label_column=True)
    assert len(read_text_pairs(path, label_column=True, skip_bad_lines=True)) == 1
    with pytest.raises(InputError, match="leave out --label_column if the file has no labels"):
        read_text_pairs(write_pairs(tmp_path / "dev.csv", PAIRS), label_column=True)


def test_labels_of_0_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no line has label 1"):
        read_text_pairs(written(tmp_path, "a\tb\t0\nc\td\t0\n"), label_column=True)


def test_training_on_labels_equals_training_on_the_chosen_pairs(
    model_folder: Path, recall_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the evaluation: with its labels left out."""
    losses = []
    for folder, labelled in ((tmp_path / "plain", False), (tmp_path / "labelled", True)):
        for name in ("train.csv", "dev.csv"):
            rows = [tuple(line.split("\t")) for line in (recall_data / name).read_text(encoding="utf-8").splitlines()]
            chosen = [(*row, str(int(number % 3 > 0))) if labelled else row for number, row in enumerate(rows)]
            write_pairs(folder / name, [row for number, row in enumerate(chosen) if labelled or number % 3])
        (folder / "corpus.csv").write_bytes((recall_data / "corpus.csv").read_bytes())
        options = train_options(
            model_folder, folder, folder / "save", "--max_steps", "3", "--log_steps", "1", "--evaluate"
        )
        options += ["--similar_text_pair_file", str(folder / "dev.csv"), "--corpus_file", str(folder / "corpus.csv")]
        options += ["--recall_result_dir", str(folder), "--ann", "exact", *(["--label_column"] if labelled else [])]
        assert train_batch_neg.main(options) == 0
        losses.append(re.findall(r"loss: [0-9.]+|(?:recall|mrr|ndcg)@\d+=[0-9.]+", capsys.readouterr().out))
    assert losses[0] == losses[1]
    assert len(losses[0]) > 6


@pytest.mark.parametrize("script", COMPARING)
def test_labels_and_scores_don_t_change_what_pairs_are_compared(
    commands: dict[str, tuple[Main, list[str]]], tmp_path: Path, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for rows in (PAIRS, [(*pair, row % 2) for row, pair in enumerate(PAIRS)]):
        main, options = commands[script]
        assert main([*options, str(written(tmp_path, lines(rows)))]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].count("0.") >= len(PAIRS)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["query", "title"], True),
        (["Text_A", "Text_B", "label"], True),
        (["sentence1", "sentence2"], True),
        (["", "Unnamed: 0", "text"], True),
        (["问题", "答案"], True),
        (["id,text"], True),
        (["title"], True),
        (["文档1"], False),
        (["query", "水稻"], False),
        (["标题党现象研究", "标题,党"], False),
        ([""], False),
    ],
)
def test_headers(fields: list[str], expected: bool) -> None:
    assert is_header(fields) == expected
