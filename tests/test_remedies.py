"""Damaged files and files of another kind: the message names what is wrong, and a remedy that helps."""

import gzip
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import evaluate
import inference
import predict
import recall
import train_batch_neg
from common.errors import InputError
from common.lines import LineDecoder
from data import read_vocabulary
from deploy.python import predict as deployed
from helpers import all_pairs, train_options

Main = Callable[[Sequence[str]], int]
LINES = ["\t".join(pair) for pair in all_pairs()[:20]]
CLEAN = "".join(line + "\n" for line in LINES)
WHOLE = CLEAN.encode()


def zipped(text: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", text)
    return file.getvalue()


def damaged(line: bytes) -> bytes:
    """The clean file with another third line."""
    lines = WHOLE.splitlines(keepends=True)
    return b"".join([*lines[:2], line + b"\n", *lines[3:]])


GOOD, ICONV = "leave them out with --skip_bad_lines", "iconv"
# Bytes of a file -> what its message holds, and what it mustn't hold; the first three are named in the issue.
FILES: dict[str, tuple[bytes, str, str]] = {
    "one damaged line": (
        damaged(b"\xe6\xb0\xb4\xe7\xa8\tabc"),
        f"{GOOD}.*:3: isn't UTF-8 at byte 4: a cut character",
        ICONV,
    ),
    "CESU-8": (damaged(b"a\xed\xa0\xbd\xed\xb8\x80\tb"), ":3: isn't UTF-8 at byte 2: a character in CESU-8", ICONV),
    "a cut character": (damaged("水稻".encode()[:-1] + b"\ttitle"), ":3: .* at byte 4: a cut character", ICONV),
    "GB18030": (CLEAN.encode("gb18030"), "the file isn't UTF-8; convert it: iconv -f GB18030 -t UTF-8", GOOD),
    "one line in GB18030": (damaged("水稻\t产量".encode("gb18030")), f"{GOOD}.*:3: isn't UTF-8 at byte 3", ICONV),
    "Latin-1": ("élève\tétude\n".encode("latin-1") * 20, "find out its encoding, and convert it with iconv", "GB18030"),
    "the start of a character is missing": (damaged("水稻".encode()[1:] + b"\tb"), "at byte 1: a cut character", ICONV),
    "half of a surrogate pair": (damaged(b"a\xed\xa0\xbd\tb"), "at byte 2: half of a surrogate pair", ICONV),
    "a byte that UTF-8 lacks": (damaged(b"a\xffb\tc"), "at byte 2: byte 0xff, which UTF-8 doesn't have", ICONV),
    "a NUL in one line": (damaged(b"a\0b\tc"), f"{GOOD}.*:3: holds a NUL character", ICONV),
    "UTF-16": (CLEAN.encode("utf-16"), "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8", GOOD),
    "UTF-16 without a BOM": (CLEAN.encode("utf-16-le"), "seems to be UTF-16; convert it: iconv -f UTF-16", GOOD),
    "gzip": (gzip.compress(WHOLE), "is compressed with gzip; unpack it: gunzip", ICONV),
    "an Excel workbook": (zipped(WHOLE), "is a zip archive or an Excel workbook; save its table as text", ICONV),
    "an old Excel workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(900), "is an Excel or Word document", ICONV),
    "Parquet": (b"PAR1\x15\x04" + bytes(300), "is a Parquet file; write its texts as lines", ICONV),
}


@pytest.fixture(scope="module")
def commands(
    checkpoint: Path, exported: Path, model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Main, list[str]]]:
    """Script -> its main, and its options up to the file."""
    out = tmp_path_factory.mktemp("out")
    search = ["--params_path", str(checkpoint), "--device", "cpu"]
    pairs = str(recall_data / "dev.csv")
    return {
        "train": (train_batch_neg.main, [*train_options(model_folder, recall_data, out / "save"), "--train_set_file"]),
        "recall": (recall.main, [*search, "--similar_text_pair_file", pairs, "--corpus_file"]),
        "evaluate": (evaluate.main, ["--recall_result_file", "x", "--similar_text_pair_file"]),
        "predict": (predict.main, [*search, "--text_pair_file"]),
        "inference": (inference.main, [*search, "--text_file"]),
        "deployed": (deployed.main, ["--model_dir", str(exported), "--text_file"]),
    }


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gets_a_remedy_that_helps(
    commands: dict[str, tuple[Main, list[str]]], tmp_path: Path, name: str
) -> None:
    content, expected, forbidden = FILES[name]
    path = tmp_path / "file.csv"
    for script, (main, options) in commands.items():
        of_texts = script in ("recall", "inference", "deployed")
        path.write_bytes(content.replace(b"\t", b" ") if of_texts and not content.startswith(b"\x1f") else content)
        with pytest.raises(InputError) as error:
            main([*options, str(path)])
        message = str(error.value)
        assert message.startswith(f"{path}: "), script
        assert re.search(expected, message, re.DOTALL), f"{script}: {message}"
        assert forbidden not in message, f"{script}: {message}"


def test_skipping_damaged_lines_keeps_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data import read_text_pairs

    path = tmp_path / "file.csv"
    path.write_bytes(FILES["CESU-8"][0])
    assert len(read_text_pairs(path, skip_bad_lines=True)) == len(LINES) - 1
    assert "left out 1 bad line(s) of 20" in capsys.readouterr().err


def test_the_encoding_is_judged_by_lines_that_prove_one() -> None:
    """ASCII lines are the same in both."""
    decoder = LineDecoder()
    for raw in [b"plain\n"] * 50 + ["水稻\n".encode("gb18030")] * 2 + ["产量\n".encode()]:
        try:
            decoder.decode(raw)
        except ValueError:
            continue
    assert decoder.remedy() == "the file isn't UTF-8; convert it: iconv -f GB18030 -t UTF-8"


# ---------------------------------------------------------------------------------------------------------------------
# Files of a model


def copy_of(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    (folder / "manifest.json").unlink()
    return folder


BOM = b"\xef\xbb\xbf"
HARMLESS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {  # file -> a change that editors make
    "vocab.txt with a BOM": ("vocab.txt", lambda content: BOM + content),
    "vocab.txt with an empty last line": ("vocab.txt", lambda content: content + b"\n"),
    "vocab.txt with several empty last lines": ("vocab.txt", lambda content: content + b"\r\n\r\n\n"),
    "vocab.txt with CRLF and a BOM": ("vocab.txt", lambda content: BOM + content.replace(b"\n", b"\r\n")),
    "vocab.txt without a last line end": ("vocab.txt", bytes.rstrip),
    "vocab.txt with frequencies": ("vocab.txt", lambda content: content.replace(b"\n", b"\t12\n")),
    "config.json with a BOM": ("config.json", lambda content: BOM + content),
    "semantic_index.json with a BOM": ("semantic_index.json", lambda content: BOM + content),
    "tokenizer_config.json with a BOM": (
        "tokenizer_config.json",
        lambda content: BOM + content.replace(b"\n", b"\r\n"),
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_editors_do_to_a_model_s_files_changes_nothing(checkpoint: Path, tmp_path: Path, name: str) -> None:
    from modeling.checkpoint import load_checkpoint

    file, change = HARMLESS[name]
    folder = copy_of(checkpoint, tmp_path / "model")
    content = (folder / file).read_bytes()
    assert change(content) != content
    (folder / file).write_bytes(change(content))
    assert load_checkpoint(folder).fingerprint == load_checkpoint(checkpoint).fingerprint


@pytest.mark.parametrize("name", [name for name in HARMLESS if not name.startswith("semantic")])
def test_a_training_from_scratch_takes_such_files(
    checkpoint: Path, recall_data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, change = HARMLESS[name]
    folder = copy_of(checkpoint, tmp_path / "model")
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    assert train_batch_neg.main(train_options(folder, recall_data, tmp_path / "save", "--max_steps", "1")) == 0
    assert "wrote" in capsys.readouterr().out


BROKEN: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a token with spaces": (
        "vocab.txt",
        lambda content: content.replace(b"[PAD]", b"[PAD] "),
        "has '\\[PAD\\] ' in line 1",
    ),
    "a token in lower case": (
        "vocab.txt",
        lambda content: content.replace(b"[UNK]", b"[unk]"),
        "has '\\[unk\\]' in line 5",
    ),
    "another encoding": ("vocab.txt", lambda content: content.decode().encode("gb18030"), "isn't UTF-8; convert it"),
    "a comma too many": ("config.json", lambda content: content.replace(b"\n}", b",\n}"), "at line [0-9]+, column"),
    "UTF-16": ("config.json", lambda content: content.decode().encode("utf-16"), "isn't UTF-8; convert it"),
    "a list": ("config.json", lambda content: b"[" + content + b"]", "isn't a JSON object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_a_model_is_named_with_the_place(
    checkpoint: Path, recall_data: Path, tmp_path: Path, name: str
) -> None:
    file, change, expected = BROKEN[name]
    folder = copy_of(checkpoint, tmp_path / "model")
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    for main, options in (
        (recall.main, ["--params_path", str(folder), "--device", "cpu", "--query", "水稻"]),
        (train_batch_neg.main, train_options(folder, recall_data, tmp_path / "save")),
    ):
        if main is recall.main:
            options += ["--corpus_file", str(recall_data / "corpus.csv")]
        with pytest.raises(InputError, match=f"{folder / file}: .*{expected}"):
            main(options)


def test_an_empty_line_within_a_vocabulary_keeps_the_ids_of_the_others(checkpoint: Path, tmp_path: Path) -> None:
    tokens = read_vocabulary(checkpoint / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("\n".join([*tokens[:7], "", *tokens[7:]]) + "\n\n", encoding="utf-8")
    assert read_vocabulary(tmp_path / "vocab.txt") == [*tokens[:7], "", *tokens[7:]]
    assert json.loads((checkpoint / "config.json").read_text())["vocab_size"] == len(tokens)
