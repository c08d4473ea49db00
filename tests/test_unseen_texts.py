"""What a model can't see of its texts is said: those that are cut, that its vocabulary lacks, that are invisible."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import export_model
import inference
import predict
import recall
import train_batch_neg
from common.errors import InputError
from common.files import write_json
from data import TextTokenizer, read_text_pairs, read_texts, write_vocabulary
from deploy.python import predict as deployed
from encoding.token_statistics import SAMPLE, report_tokens, token_statistics
from examples.vocabulary import build_vocabulary
from helpers import CONFIG, all_pairs, evaluation_options, train_options, write_pairs
from retrieval.corpus import read_corpus

PAIRS = all_pairs()[:40]
ENGLISH = [(f"soil of field {row}", f"on the soil of field {row} of the farm") for row in range(40)]
CHINESE_TITLES = [title for _, title in PAIRS]
INVISIBLE = ["\u200b", "\u2060", "\u00ad", "\u200b\u200d", "\x01\x02", "\ufe0f", "\u3000\u200b ", "\ufffd"]
REFUSED = "are \\[UNK\\], as in .*: the model can't tell them apart; use a model whose vocabulary fits the language"


def english_model_folder(folder: Path) -> Path:
    """A model folder whose vocabulary has no Chinese characters."""
    vocabulary = build_vocabulary(text for pair in ENGLISH for text in pair)
    write_vocabulary(folder / "vocab.txt", vocabulary)
    write_json(folder / "config.json", {**CONFIG, "vocab_size": len(vocabulary)})
    return folder


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of such a model, and in `exported` what is exported from it."""
    folder = tmp_path_factory.mktemp("english")
    english_model_folder(folder / "model")
    write_pairs(folder / "train.csv", ENGLISH)
    assert train_batch_neg.main(train_options(folder / "model", folder, folder / "save", "--max_steps", "1")) == 0
    checkpoint = folder / "save" / "model_1"
    assert export_model.main(["--params_path", str(checkpoint), "--output_path", str(folder / "exported")]) == 0
    return folder


def search(checkpoint: Path, pairs: Path, corpus: Path, *options: str) -> list[str]:
    """Options of recall.py."""
    files = ["--similar_text_pair_file", str(pairs), "--corpus_file", str(corpus)]
    out = ["--recall_result_dir", str(pairs.parent / "out"), "--ann", "exact", "--device", "cpu"]
    return ["--params_path", str(checkpoint), *files, *out, *options]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Chinese pairs, documents, and both in a folder for training."""
    pairs = write_pairs(tmp_path / "train.csv", PAIRS)
    return pairs, write_pairs(tmp_path / "corpus.csv", [(title,) for title in CHINESE_TITLES]), tmp_path


def test_every_script_refuses_texts_of_another_language(english: Path, files: tuple[Path, Path, Path]) -> None:
    pairs, corpus, folder = files
    checkpoint, exported, model = english / "save" / "model_1", english / "exported", english / "model"
    english_pairs = write_pairs(folder / "english.csv", ENGLISH)
    commands: list[tuple[Callable[[Sequence[str]], int], list[str]]] = [
        (train_batch_neg.main, train_options(model, folder, folder / "save")),
        (
            recall.main,
            search(checkpoint, pairs, write_pairs(folder / "e.csv", ENGLISH[:0] + [(t,) for _, t in ENGLISH])),
        ),
        (recall.main, search(checkpoint, english_pairs, corpus)),
        (predict.main, ["--params_path", str(checkpoint), "--device", "cpu", "--text_pair_file", str(pairs)]),
        (inference.main, ["--params_path", str(checkpoint), "--text_file", str(corpus)]),
        (deployed.main, ["--model_dir", str(exported), "--text_file", str(corpus)]),
        (deployed.main, ["--model_dir", str(exported), "--text_pair_file", str(pairs)]),
    ]
    for main, options in commands:
        with pytest.raises(InputError, match=REFUSED):
            main(options)
    assert not (folder / "save" / "model_1").exists()
    assert not list((folder / "out").glob("*.txt"))


def test_the_evaluation_s_documents_are_looked_at_before_training(
    english: Path, files: tuple[Path, Path, Path]
) -> None:
    _, _, folder = files
    write_pairs(folder / "dev.csv", ENGLISH)
    options = train_options(english / "model", folder, folder / "save", "--train_set_file", str(folder / "dev.csv"))
    with pytest.raises(InputError, match=f"tokens of documents of {folder / 'corpus.csv'} {REFUSED}"):
        train_batch_neg.main([*options, *evaluation_options(folder, folder / "out")])


def test_texts_that_are_cut_are_told_for_queries_and_documents_apart(
    checkpoint: Path, exported: Path, model_folder: Path, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture
) -> None:
    pairs, corpus, folder = files
    line = "are cut to 8 tokens; --max_seq_length 20 covers 99 % of them\n"
    options = train_options(model_folder, folder, folder / "save", "--max_seq_length", "8", "--max_steps", "1")
    assert train_batch_neg.main(options) == 0
    error = capsys.readouterr().err
    assert f"40 of 40 titles of {pairs} {line}" in error
    assert f"queries of {pairs} are cut" in error
    assert recall.main(search(checkpoint, pairs, corpus, "--max_seq_length", "8")) == 0
    error = capsys.readouterr().err
    assert f"40 of 40 documents of {corpus} {line}" in error
    assert "40 queries are cut to 8 tokens; --max_seq_length 10 covers" in error
    assert recall.main(search(checkpoint, pairs, corpus)) == 0
    assert "cut" not in capsys.readouterr().err
    given = ["--params_path", str(checkpoint), "--device", "cpu", "--max_seq_length", "8"]
    assert predict.main([*given, "--text_pair_file", str(pairs)]) == 0
    assert f"40 of 40 titles {line}" in capsys.readouterr().err
    assert inference.main([*given, "--text_file", str(corpus)]) == 0
    assert f"40 of 40 texts {line}" in capsys.readouterr().err
    assert deployed.main(["--model_dir", str(exported), "--max_seq_length", "8", "--text_file", str(corpus)]) == 0
    assert f"40 of 40 texts {line}" in capsys.readouterr().err


LONG = "水稻" * 40
TOKENIZER_TEXTS = {  # texts -> what is said of them, at most 16 tokens
    "nothing": (["水稻产量"] * 30, ""),
    "some cut": (
        [*["水稻产量"] * 900, *[LONG] * 100],
        "10 % of the texts are cut to 16 tokens; --max_seq_length 82 covers",
    ),
    "few cut": ([*["水稻产量"] * 990, *[LONG] * 10], ""),
    "the longest aren't covered": ([*["水稻产量" * 5] * 1990, *[LONG] * 10], "--max_seq_length 22 covers 99 % of them"),
    "few texts": (["水稻产量", LONG], "1 of 2 texts are cut to 16 tokens; --max_seq_length 82 covers"),
    "exactly as long": (["稻" * 14], ""),
    "one more": (["稻" * 15], "1 of 1 texts are cut to 16 tokens; --max_seq_length 17 covers"),
    "some unknown": (
        ["水稻产量水稻产量水稻产龘"] * 30,
        "8 % of the tokens of texts are [UNK], as in '水稻产量水稻产量水稻产龘'",
    ),
    "rare unknown": ([*["水稻产量"] * 99, "水龘产量"], ""),
    "a word that is too long": (["水稻 " + "x" * 101] * 30, "33 % of the tokens of texts are [UNK]"),
    "few texts that are unknown": (["龘靐"] * 9, "100 % of the tokens of texts are [UNK], as in '龘靐'; use a model"),
    "mixed with punctuation": (["，龘，靐，水"] * 20, "50 % of the tokens of texts are [UNK]"),
}


def tokenizer(config: dict[str, bool] | None = None) -> TextTokenizer:
    return TextTokenizer(build_vocabulary(["水稻产量，, soil x"]), 16, config)


@pytest.mark.parametrize("name", TOKENIZER_TEXTS)
def test_what_is_said_of_texts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts, expected = TOKENIZER_TEXTS[name]
    if name == "mixed with punctuation":
        texts = ["，龘，靐，水，稻，产"] * 20  # a third is unknown, so it isn't refused
        expected = "of the tokens of texts are [UNK]"
    report_tokens(tokenizer(), {"texts": texts, "no texts": []})
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == bool(expected)


@pytest.mark.parametrize(
    "texts", [["龘靐"] * 10, ["，龘，靐"] * 20, [*["龘靐"] * 19, "水稻"], ["龘" + str(row) for row in range(5000)]]
)
def test_texts_that_the_model_can_t_tell_apart_are_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match=REFUSED):
        report_tokens(tokenizer(), {"texts": texts})


def test_a_cased_tokenizer_with_an_uncased_vocabulary_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["Soil soil"] * 20
    report_tokens(tokenizer(), {"texts": texts})
    assert capsys.readouterr().err == ""
    report_tokens(tokenizer({"do_lower_case": False}), {"texts": texts})
    assert " % of the tokens of texts are [UNK]" in capsys.readouterr().err


def test_a_sample_has_the_shares_of_all_texts_and_counts_as_the_tokens_do() -> None:
    texts = ["稻" * (row % 30) + "龘" for row in range(SAMPLE * 2 + 7)]
    tokens = tokenizer()
    statistics = token_statistics(tokens, texts)
    assert statistics == token_statistics(tokens, texts)
    assert statistics.texts == SAMPLE
    assert statistics.cut / statistics.texts == pytest.approx(
        sum(len(text) > 14 for text in texts) / len(texts), abs=0.02
    )
    every = token_statistics(tokens, texts[:30])
    assert every.texts == 30
    assert every.unknown == pytest.approx(30 / sum(map(len, texts[:30])))
    assert tokens.max_seq_length == 16
    assert max(map(len, tokens.tokenize(texts))) == 16  # counting doesn't turn truncation off


# ---------------------------------------------------------------------------------------------------------------------
# Invisible texts


@pytest.mark.parametrize("text", INVISIBLE)
def test_a_line_of_which_nothing_is_visible_is_empty(tmp_path: Path, text: str) -> None:
    pairs = write_pairs(
        tmp_path / "pairs.csv", [("水稻", "产量"), (text, "标题"), ("查询", text), ("查询", "标题", text)]
    )
    with pytest.raises(InputError, match=f"{pairs}:2: the query is empty\n{pairs}:3: the title is empty"):
        read_text_pairs(pairs)
    assert read_text_pairs(pairs, skip_bad_lines=True)[-1].hard_negatives == ()
    texts = write_pairs(tmp_path / "texts.csv", [("水稻",), (text,), ("产量",)])
    for read in (read_texts, read_corpus):
        with pytest.raises(InputError, match=f"{texts}:2: the line is empty"):
            read(texts)
        assert list(read(texts, skip_bad_lines=True)) == ["水稻", "产量"]


@pytest.mark.parametrize("text", ["\u200b", "\u2060", "\u00ad\u00ad", "\x01", " \u200d "])
def test_an_option_s_text_of_which_nothing_is_visible_is_refused(
    checkpoint: Path, exported: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, options in (
        (recall.main, ["--params_path", str(checkpoint), "--query", text]),
        (inference.main, ["--params_path", str(checkpoint), "--text", text]),
        (deployed.main, ["--model_dir", str(exported), "--text", text]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(options)
        assert ended.value.code == 2
        assert "the text is empty" in capsys.readouterr().err


def test_a_typed_query_of_which_nothing_is_visible_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\u200b\n水稻\n".encode()), encoding="utf-8"))
    assert list(recall.typed_queries(sys.stdin)) == ["水稻"]
    assert "not a query: the line is empty" in capsys.readouterr().err
