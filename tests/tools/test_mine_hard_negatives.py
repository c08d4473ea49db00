"""Mining hard negatives with the script, against a slow, obvious twin."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.texts import text_key
from data import TextPair, read_text_pairs
from encoding.encoder import Encoder, load_encoder
from helpers import ROOT, run_script, run_without_paddle, write_pairs
from mining import blocks, miner
from retrieval.corpus import read_corpus
from retrieval.lexical_index import LexicalIndex
from retrieval.near_duplicates import jaccard, terms_of
from tools import mine_hard_negatives

Lines = list[list[str]]
WORDS = ["--params_path", "", "--lexical", "bm25"]
OTHER_PAIRS = [("水稻的产量", "论水稻品质研究水稻,品质"), ("水稻的品质", "论水稻品质研究水稻,品质")]


@pytest.fixture(scope="module")
def train_set(recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs, of which some share a query or a title; the texts differ in ways that don't count."""
    pairs = [(pair.query, pair.title) for pair in read_text_pairs(recall_data / "train.csv")[:36]]
    repeated = [(pairs[3][0] + "\u200b", pairs[5][1]), (pairs[7][0], pairs[3][1] + " ")]
    return write_pairs(tmp_path_factory.mktemp("mining") / "train.csv", [*pairs, *OTHER_PAIRS, *repeated])


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return load_encoder(checkpoint)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 16)


@pytest.fixture
def arguments(checkpoint: Path, recall_data: Path, train_set: Path, tmp_path: Path) -> list[str]:
    """A call that searches exactly and writes hard.csv."""
    files = ["--train_set_file", str(train_set), "--corpus_file", str(recall_data / "corpus.csv")]
    model = ["--params_path", str(checkpoint), "--device", "cpu"]
    return [*model, *files, "--output", str(tmp_path / "hard.csv"), "--ann", "exact", "--negatives", "3"]


def lines_of(path: Path) -> Lines:
    """The columns of each line."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def twin(
    encoder: Encoder,
    pairs: Sequence[TextPair],
    documents: Sequence[str],
    teacher: Encoder | None = None,
    *,
    negatives: int = 3,
    from_rank: int = 1,
    to_rank: int = 100,
    share: float = 0.95,
) -> Lines:
    """All cosines, sorted; then one rule after the other."""
    vectors = [
        [judge.encode(texts) for texts in ([pair.query for pair in pairs], [pair.title for pair in pairs], documents)]
        for judge in (encoder, teacher or encoder)
    ]
    (queries, _, found), (judged_queries, judged_titles, judged) = vectors
    document_keys, document_terms = [text_key(text) for text in documents], [terms_of(text) for text in documents]
    lines = []
    for number, pair in enumerate(pairs):
        ranked = np.argsort(-found @ queries[number])[from_rank - 1 : to_rank].tolist()
        scores, limit = judged @ judged_queries[number], share * (judged_titles[number] @ judged_queries[number])
        texts = [pair.query, *(each.title for each in pairs if text_key(each.query) == text_key(pair.query))]
        keys, terms = {text_key(text) for text in texts}, [terms_of(text) for text in texts]
        kept = [
            documents[row]
            for row in ranked
            if document_keys[row] not in keys
            and scores[row] <= limit
            and all(jaccard(document_terms[row], each) < 0.8 for each in terms)
        ]
        lines.append([pair.query, pair.title, *kept[:negatives]])
    return lines


def inputs(arguments: list[str]) -> tuple[list[TextPair], list[str]]:
    """The pairs and the documents of a call."""
    files = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return read_text_pairs(files["--train_set_file"]), list(read_corpus(files["--corpus_file"]))


# ---------------------------------------------------------------------------------------------------------------------
# What is mined


@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_mining_equals_its_twin(
    encoder: Encoder, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], ann: str
) -> None:
    pairs, documents = inputs(arguments)
    rules = ["--from_rank", "3", "--to_rank", "8", "--max_relative_score", "0.93"]
    assert mine_hard_negatives.main([*arguments, *rules, "--ann", ann]) == 0
    expected = twin(encoder, pairs, documents, from_rank=3, to_rank=8, share=0.93)
    assert lines_of(tmp_path / "hard.csv") == expected
    counts = [len(line) - 2 for line in expected]
    complete, without = counts.count(3), counts.count(0)
    fewer = len(pairs) - complete - without
    assert complete and fewer and without  # else the test says little
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"{sum(counts)} hard negatives of 40 pairs: all for {complete}, fewer for {fewer}, none for {without}"
    )
    assert out[1] == "left out 80 hits of a rank before --from_rank"
    assert out[-1] == f"wrote {tmp_path / 'hard.csv'}"
    assert [path.name for path in tmp_path.iterdir()] == ["hard.csv"]


def test_mining_by_words_equals_its_twin(arguments: list[str], tmp_path: Path) -> None:
    """With an index of each title beside the documents, and the scores of title and hard negatives."""
    pairs, documents = inputs(arguments)
    by_words = [*arguments[2:], "--lexical", "bm25", "--max_relative_score", "0.8", "--to_rank", "12", "--write_scores"]
    assert mine_hard_negatives.main(by_words) == 0
    index = LexicalIndex.build(documents, len(documents))
    expected, complete = [], 0
    for pair in pairs:
        titles = [other.title for other in pairs if text_key(other.query) == text_key(pair.query)]
        near = [terms_of(text) for text in (pair.query, *titles)]
        (ids,), (scores,) = index.search([pair.query], 12)
        title_score = np.float32(index.score(pair.query, pair.title))
        kept = [
            (documents[row], score)
            for row, score in zip(ids, scores, strict=True)
            if row >= 0
            and score <= 0.8 * title_score
            and all(jaccard(terms_of(documents[row]), terms) < 0.8 for terms in near)
        ][:3]
        texts = [pair.query, pair.title, *(text for text, _ in kept)]
        expected.append([*texts, f"{title_score:.6f}", *(f"{score:.6f}" for _, score in kept)])
        complete += len(kept) == 3
    assert lines_of(tmp_path / "hard.csv") == expected
    assert 0 < complete < len(pairs)  # else the test says little
    scored = read_text_pairs(tmp_path / "hard.csv", teacher_scores=True)
    assert [len(pair.teacher_scores) for pair in scored] == [1 + len(pair.hard_negatives) for pair in scored]


def test_a_query_without_hits_gets_no_negatives(arguments: list[str], tmp_path: Path) -> None:
    """Nor does one with fewer hits get documents that share no word with it; another model judges the others."""
    pairs = write_pairs(tmp_path / "pairs.csv", [("水稻", "水稻品质"), ("桥梁", "隧道")])
    corpus = write_pairs(tmp_path / "texts.csv", [("水稻产量",), ("玉米品质",)])
    files = [
        "--train_set_file",
        str(pairs),
        "--corpus_file",
        str(corpus),
        "--max_relative_score",
        "10",
        "--write_scores",
    ]
    teacher = ["--teacher_params_path", arguments[1]]
    for judge in ([], teacher):
        assert mine_hard_negatives.main([*arguments[2:], *files, "--lexical", "bm25", "--write_scores", *judge]) == 0
        first, second = lines_of(tmp_path / "hard.csv")
        assert first[:3] == ["水稻", "水稻品质", "水稻产量"] and len(first) == 5
        assert second[:2] == ["桥梁", "隧道"] and len(second) == 3
    encoder = load_encoder(arguments[1])
    query, *texts = encoder.encode(first[:3])
    np.testing.assert_allclose([float(score) for score in first[3:]], [text @ query for text in texts], atol=1e-5)


def test_a_saved_index_needs_no_corpus(arguments: list[str], tmp_path: Path) -> None:
    folders = ["--index_dir", str(tmp_path / "index"), "--embedding_dir", str(tmp_path / "vectors")]
    assert mine_hard_negatives.main([*arguments, *folders]) == 0
    mined = (tmp_path / "hard.csv").read_bytes()
    without_corpus = [each for each in arguments if each != "--corpus_file" and not each.endswith("corpus.csv")]
    again = [*without_corpus, *folders[:2], "--output", str(tmp_path / "again.csv")]
    assert mine_hard_negatives.main(again) == 0
    assert (tmp_path / "again.csv").read_bytes() == mined
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "hard.csv", "index", "vectors"]


def test_pairs_in_both_directions(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text is no negative of its title, unless the option says so."""
    texts = ["水稻产量", "玉米品质", "土壤模型", "桥梁评价", "水库管理", "隧道机理"]
    pairs = [(texts[row], texts[row + 1]) for row in range(0, 6, 2)]
    both = write_pairs(tmp_path / "both.csv", [*pairs, (texts[1], texts[0]), (texts[3], texts[5])])
    corpus = write_pairs(tmp_path / "texts.csv", [(text,) for text in texts])
    files = ["--train_set_file", str(both), "--corpus_file", str(corpus), "--negatives", "6", "--max_relative_score"]
    assert mine_hard_negatives.main([*arguments, *files, "10"]) == 0
    assert "40 % of the pairs are given in both directions" in capsys.readouterr().err
    by_query = {line[0]: set(line[2:]) for line in lines_of(tmp_path / "hard.csv")}
    assert by_query[texts[3]] == set(texts) - {texts[3], texts[5], texts[2]}
    assert mine_hard_negatives.main([*arguments, *files, "10", "--symmetric_pairs", "False"]) == 0
    by_query = {line[0]: set(line[2:]) for line in lines_of(tmp_path / "hard.csv")}
    assert by_query[texts[3]] == set(texts) - {texts[3], texts[5]}


def test_random_negatives_do_not_depend_on_the_blocks(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for block_pairs, seed in ((16, "1"), (40, "1"), (40, "2")):
        monkeypatch.setattr(blocks, "BLOCK_PAIRS", block_pairs)
        assert mine_hard_negatives.main([*arguments, "--random_share", "0.7", "--seed", seed]) == 0
        found.append(lines_of(tmp_path / "hard.csv"))
    assert found[0] == found[1] != found[2]


# ---------------------------------------------------------------------------------------------------------------------
# Teachers


def test_another_model_decides_on_the_scores(
    encoder: Encoder, arguments: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    """With its own length of texts, and vectors of the same documents."""
    from modeling.checkpoint import load_checkpoint, save_checkpoint

    model, tokenizer, *_ = load_checkpoint(checkpoint, max_seq_length=6)
    save_checkpoint(tmp_path / "teacher", model, tokenizer)
    assert mine_hard_negatives.main([*arguments, "--teacher_params_path", str(tmp_path / "teacher")]) == 0
    expected = twin(encoder, *inputs(arguments), load_encoder(tmp_path / "teacher"))
    assert lines_of(tmp_path / "hard.csv") == expected != twin(encoder, *inputs(arguments))


def test_scores_of_a_file_decide(
    encoder: Encoder, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoder's own scores lead to the same negatives; hits without a score are left out."""
    pairs, documents = inputs(arguments)
    queries = list(dict.fromkeys(pair.query for pair in pairs))
    cosines = encoder.encode(queries) @ encoder.encode(documents).T
    scores = [
        (query, document, f"{float(score)!r}")
        for query, row in zip(queries, cosines, strict=True)
        for document, score in zip(documents, row, strict=True)
    ]
    options = ["--teacher_score_file", str(write_pairs(tmp_path / "scores.tsv", scores))]
    assert mine_hard_negatives.main([*arguments, *options]) == 0
    expected = twin(encoder, pairs, documents)
    assert lines_of(tmp_path / "hard.csv") == expected
    assert "without a score" not in capsys.readouterr().out
    gone = next(line[2] for line in expected if len(line) > 2)
    write_pairs(tmp_path / "scores.tsv", [line for line in scores if line[1] != gone])
    assert mine_hard_negatives.main([*arguments, *options]) == 0
    assert gone not in {text for line in lines_of(tmp_path / "hard.csv") for text in line[2:]}
    assert "hits without a score of the teacher" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions and bad input


def test_an_interrupted_run_goes_on(
    arguments: list[str],
    tmp_path: Path,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the finished blocks and vectors of the first one, and only with the same options."""
    assert mine_hard_negatives.main([*arguments, "--output", str(tmp_path / "whole.csv")]) == 0
    work, mined = tmp_path / "hard.csv.mining", []
    mine = miner.Miner.__call__

    def stop_in_the_last(self: miner.Miner, rows: range) -> miner.Mined:
        mined.append(rows.start)
        if len(mined) == 3:
            raise KeyboardInterrupt
        return mine(self, rows)

    monkeypatch.setattr(miner.Miner, "__call__", stop_in_the_last)
    with pytest.raises(KeyboardInterrupt):
        mine_hard_negatives.main(arguments)
    assert not (tmp_path / "hard.csv").exists()
    kept = ["block_000000.json", "block_000001.json", "index", "mining.json", "vectors"]
    assert sorted(path.name for path in work.iterdir()) == kept
    with pytest.raises(InputError, match=r"hard.csv.mining: an interrupted run of mining had another negatives"):
        mine_hard_negatives.main([*arguments, "--negatives", "2"])
    encoded.clear()
    assert mine_hard_negatives.main(arguments) == 0
    assert mined == [0, 16, 32, 32]
    assert "hard.csv.mining: goes on; 2 of 3 blocks are done\n" in capsys.readouterr().err
    assert not encoded
    assert (tmp_path / "hard.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not work.exists()


def test_a_block_that_is_not_as_it_was_written_is_refused(tmp_path: Path) -> None:
    done = blocks.PairBlocks(tmp_path / "work", 20, {}, "mining")
    mined = miner.Mined([["a"], [], ["b", "c"]], [[0.9, 0.5], [0.9], [0.9, 0.5, 0.4]], Counter(x=2))
    done.compute_missing(done.rows, lambda _: mined._asdict())
    with pytest.raises(InputError, match=r"block_000001\.json: isn't as it was written; remove it and run again"):
        miner.read_mined(done, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--negatives", "9", "--to_rank", "5"], "--negatives 9: --from_rank 1 to --to_rank 5 has fewer hits"),
        (["--random_share", "2"], "--random_share 2.0: is a share; give 0 to 1"),
        (["--output", "{train}"], "would replace a file that is read; give another one"),
        (["--index_dir", "{folder}/index", "--output", "{folder}/index/hard.csv"], "which is replaced as a whole"),
        (["--teacher_params_path", "a", "--teacher_score_file", "b"], "only one of them can decide; give one"),
        (["--teacher_params_path", "{folder}/missing"], "missing: no such checkpoint"),
        (["--teacher_score_file", "{folder}/missing"], "missing: no such file"),
        (["--corpus_file", "", "--index_dir", "{folder}/none"], "--corpus_file is needed: there is no saved index"),
        (["--lexical", "bm25"], "--params_path, --lexical: give one of them"),
        (["--params_path", ""], "--params_path, --lexical: give one of them"),
        (
            ["--params_path", "", "--lexical", "bm25", "--corpus_file", ""],
            "--corpus_file is needed with --lexical bm25",
        ),
        (
            ["--params_path", "", "--lexical", "bm25", "--index_dir", "i"],
            "--index_dir i: --lexical bm25 makes no vectors",
        ),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], train_set: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = [each.format(train=train_set, folder=tmp_path) for each in options]
    with pytest.raises(InputError, match=message):
        mine_hard_negatives.main([*arguments, *given])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.process
def test_two_ranks_share_the_blocks_and_write_the_same(arguments: list[str], tmp_path: Path) -> None:
    """Rank 1 leaves a barrier late, when rank 0 may have finished."""
    program = tmp_path / "mine.py"
    program.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from common.cli import run\nfrom common.paddle_setup import set_up_paddle\nset_up_paddle()\n"
        "from mining import blocks\nfrom tools import mine_hard_negatives\nblocks.BLOCK_PAIRS = 16\n"
        "write = blocks.write_json\n"
        "def report(file, content):\n"
        "    write(file, content)\n"
        "    print('rank', os.environ['PADDLE_TRAINER_ID'], file.name)\n"
        "blocks.write_json = report\n"
        "barrier = blocks.barrier\n"
        "def late_barrier():\n"
        "    barrier()\n"
        "    time.sleep(0.3 * int(os.environ['PADDLE_TRAINER_ID']))\n"
        "blocks.barrier = late_barrier\n"
        "run(mine_hard_negatives.main)\n",
        encoding="utf-8",
    )
    options = [*arguments, "--teacher_params_path", arguments[1], "--random_share", "0.5"]
    assert mine_hard_negatives.main([*options, "--output", str(tmp_path / "alone.csv")]) == 0
    done = run_script(program, *options, ranks=2, log_dir=tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "hard.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
    reports = [(tmp_path / "log" / f"workerlog.{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert "rank 0 block_000000.json" in reports[0]
    assert "rank 0 block_000002.json" in reports[0] and "rank 1 block_000001.json" in reports[1]
    assert not (tmp_path / "hard.csv.mining").exists()


@pytest.mark.process
def test_help_is_shown_without_paddle() -> None:
    code, out, err = run_without_paddle("tools/mine_hard_negatives.py", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: mine_hard_negatives.py [-h]")
