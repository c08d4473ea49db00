"""Prefixes: every way gives texts of a role the vectors that a model without prefixes gives to the prefixed texts."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import clients
import export_model
import export_to_serving
import inference
import predict
import recall
import train_batch_neg
from batch_negative.batches import PairBatcher
from benchmarks.service_clients import HOST, running_service
from common.errors import InputError
from common.files import read_json, write_json
from common.texts import DOCUMENT, QUERY, ROLES
from data import TextPair, read_hits
from encoding.token_statistics import token_statistics
from helpers import (
    all_pairs,
    evaluation_options,
    make_model_folder,
    new_model,
    run_script,
    small_tokenizer,
    train_options,
    write_pairs,
)
from modeling.checkpoint import load_checkpoint, model_fingerprint, save_checkpoint
from modeling.sentence_transformers_folder import read_sentence_transformers_folder
from service_helpers import as_json, post

PREFIXES = {QUERY: "管理的 模型：", DOCUMENT: "论桥梁,"}
PAIRS = all_pairs()[:24]
QUERIES, DOCUMENTS = ([pair[column] for pair in PAIRS] for column in (0, 1))
Capture = pytest.CaptureFixture[str]


def prefixed(texts: list[str], role: str | None) -> list[str]:
    return [PREFIXES.get(role or "", "") + text for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `with` and `without` prefixes of the same weights; files of PAIRS, and `prefixed_` ones."""
    folder = tmp_path_factory.mktemp("prefixes")
    ernie = make_model_folder(folder / "ernie", initializer_range=0.5)
    given = {f"{role}_prefix": prefix for role, prefix in PREFIXES.items()}
    save_checkpoint(folder / "with", *new_model(ernie, pooling="mean", **given))
    save_checkpoint(folder / "without", *new_model(ernie, pooling="mean"))
    for start, role_prefixes in (("", {}), ("prefixed_", PREFIXES)):
        query, document = (role_prefixes.get(role, "") for role in ROLES)
        write_pairs(folder / f"{start}pairs.csv", [(query + q, document + d) for q, d in PAIRS])
        write_pairs(folder / f"{start}corpus.csv", [(document + d,) for d in DOCUMENTS])
    return folder


@pytest.fixture(scope="module")
def output(folder: Path) -> Path:
    """The export of the checkpoint with prefixes."""
    options = ["--params_path", str(folder / "with"), "--output_path", str(folder / "output")]
    assert export_model.main(options) == 0
    return folder / "output"


def twin_vectors(folder: Path, texts: list[str], role: str | None) -> np.ndarray:
    """Of the model without prefixes, for texts that are prefixed here."""
    model, tokenizer, *_ = load_checkpoint(folder / "without")
    return model.embed(*tokenizer(prefixed(texts, role)))


def assert_equal_vectors(vectors: np.ndarray, folder: Path, texts: list[str], role: str | None) -> None:
    np.testing.assert_allclose(vectors, twin_vectors(folder, texts, role), rtol=0, atol=1e-5)
    if role:
        assert np.abs(vectors - twin_vectors(folder, texts, None)).max() > 0.01


@pytest.mark.parametrize("role", [*ROLES, None])
def test_a_tokenizer_puts_the_prefix_of_a_role_before_a_text(role: str | None) -> None:
    """It counts for the length, and for the statistics of cut texts alone."""
    tokenizer = small_tokenizer(12)
    tokenizer.prefixes = {QUERY: "深度学习 of: ", DOCUMENT: ""}
    texts = ["图像", "医学图像分割方法综述"]
    prefix = tokenizer.prefixes.get(role or "", "")
    assert list(tokenizer.prefixed(texts, role)) == [prefix + text for text in texts]
    length = len(small_tokenizer(100).tokenize([prefix])[0]) - 2
    assert tokenizer.prefix_length(role) == length == (7 if role == QUERY else 0)
    statistics = token_statistics(tokenizer, texts, role)
    assert statistics.cut == (1 if role == QUERY else 0)
    assert statistics.covering_length == 12 + length
    assert statistics.unknown == token_statistics(tokenizer, texts).unknown


@pytest.mark.parametrize("role", [*ROLES, None])
def test_inference_with_a_role(folder: Path, tmp_path: Path, role: str | None) -> None:
    write_pairs(tmp_path / "texts.txt", [(text,) for text in QUERIES])
    options = ["--params_path", str(folder / "with"), "--device", "cpu", "--text_file", str(tmp_path / "texts.txt")]
    given = ["--role", role] if role else []
    assert inference.main([*options, *given, "--output", str(tmp_path / "vectors.npy")]) == 0
    assert_equal_vectors(np.load(tmp_path / "vectors.npy"), folder, QUERIES, role)


def test_predict_and_recall(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Queries and titles, queries and documents, those that are added and the queries on the command line."""
    results: dict[str, tuple[str, str, dict]] = {}
    for name, start in (("with", ""), ("without", "prefixed_")):
        model = ["--params_path", str(folder / name), "--device", "cpu"]
        files = {kind: str(folder / f"{start}{kind}.csv") for kind in ("pairs", "corpus")}
        assert predict.main([*model, "--text_pair_file", files["pairs"]]) == 0
        cosines = capsys.readouterr().out
        index = ["--index_dir", str(tmp_path / name), "--ann", "exact", "--recall_result_dir", str(tmp_path / start)]
        write_pairs(tmp_path / "first.csv", [(line,) for line in Path(files["corpus"]).read_text().splitlines()[:9]])
        assert recall.main([*model, *index, "--corpus_file", str(tmp_path / "first.csv")]) == 0
        searching = ["--add_corpus", files["corpus"], "--similar_text_pair", files["pairs"], "--recall_num", "3"]
        query = QUERIES[0] if name == "with" else PREFIXES[QUERY] + QUERIES[0]
        assert recall.main([*model, *index, *searching, "--query", query]) == 0
        answer = capsys.readouterr().out.partition(" ms)\n")[2]
        results[name] = cosines, answer, read_hits(tmp_path / start / "recall_result.txt")
    with_prefixes, without = results["with"], results["without"]
    np.testing.assert_allclose(*(np.fromstring(each[0], sep="\n") for each in results.values()), rtol=0, atol=1e-5)
    assert with_prefixes[1] == without[1].replace(PREFIXES[DOCUMENT], "")
    expected = dict(zip(prefixed(QUERIES, QUERY), prefixed_lists(with_prefixes[2]), strict=True))
    assert without[2] == expected


def prefixed_lists(hits: dict[str, list[str]]) -> list[list[str]]:
    """The documents of the queries, in the order of QUERIES."""
    return [prefixed(hits[query], DOCUMENT) for query in QUERIES]


def test_an_index_of_other_prefixes_is_refused(folder: Path, tmp_path: Path) -> None:
    files = ["--corpus_file", str(folder / "corpus.csv"), "--index_dir", str(tmp_path / "index"), "--device", "cpu"]
    files += ["--recall_result_dir", str(tmp_path)]
    assert recall.main(["--params_path", str(folder / "without"), *files]) == 0
    with pytest.raises(InputError, match="its vectors come from another model"):
        recall.main(["--params_path", str(folder / "with"), *files, "--query", "水稻"])


def test_empty_prefixes_leave_the_fingerprint_of_earlier_versions(folder: Path) -> None:
    model, tokenizer, fingerprint, _ = load_checkpoint(folder / "without")
    assert tokenizer.prefixes == {QUERY: "", DOCUMENT: ""}
    tokenizer.prefixes = {}
    assert model_fingerprint(model, tokenizer) == fingerprint
    assert "prefixes" not in tokenizer.settings


def test_a_training_prefixes_queries_titles_and_hard_negatives() -> None:
    """What is a false negative doesn't change."""
    pairs = [
        TextPair("水稻", "论水稻", ("小麦", "玉米")),
        TextPair("论水稻", "水稻"),
        TextPair("桥", "论桥", ("水稻",)),
        TextPair("桥", "桥"),
    ]
    tokenizer, rows = small_tokenizer(), np.arange(4)
    plain = PairBatcher(tokenizer, pairs)
    twin_pairs = [
        TextPair(
            PREFIXES[QUERY] + pair.query,
            PREFIXES[DOCUMENT] + pair.title,
            tuple(PREFIXES[DOCUMENT] + text for text in pair.hard_negatives),
        )
        for pair in pairs
    ]
    twin = PairBatcher(tokenizer, twin_pairs)([rows])
    tokenizer.prefixes = PREFIXES
    batcher = PairBatcher(tokenizer, pairs)
    batch = batcher([rows])
    for ours, theirs in zip(batch.chunks, twin.chunks, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(batch.row_of_text, twin.row_of_text)
    np.testing.assert_array_equal(batch.mask, plain([rows]).mask)
    assert not np.array_equal(batch.mask, twin.mask)
    assert batcher.mask.reversed_share == plain.mask.reversed_share > 0


def test_a_checkpoint_keeps_its_prefixes(folder: Path, recall_data: Path, tmp_path: Path, capsys: Capture) -> None:
    """A training goes on with them unless others are given, and its evaluation is that of recall.py."""
    options = ["--max_steps", "1", "--learning_rate", "0", *evaluation_options(recall_data, tmp_path)]
    start = train_options(folder / "ernie", recall_data, tmp_path / "save", *options)
    start[:2] = ["--init_from_ckpt", str(folder / "with")]
    assert train_batch_neg.main(start) == 0
    told = ", ".join(f"{role}_prefix {PREFIXES[role]!r}" for role in ROLES)
    assert f"dropout 0.1, {told}\n" in capsys.readouterr().err
    trained = load_checkpoint(tmp_path / "save" / "model_1")
    assert trained.tokenizer.prefixes == PREFIXES
    files = ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    options = ["--params_path", str(tmp_path / "save" / "model_1"), "--device", "cpu", "--ann", "exact"]
    assert recall.main([*options, *files, "--recall_num", "50", "--recall_result_dir", str(tmp_path)]) == 0
    files = (tmp_path / name for name in ("recall_result.txt", "recall_result_init.txt"))
    cosines = [[float(line.split("\t")[2]) for line in file.read_text().splitlines()] for file in files]
    np.testing.assert_allclose(*cosines, rtol=0, atol=1e-5)
    capsys.readouterr()
    assert train_batch_neg.main([*start, "--query_prefix", "", "--save_dir", str(tmp_path / "other")]) == 0
    assert f"--query_prefix '': {folder / 'with'} was trained with {PREFIXES[QUERY]!r}\n" in capsys.readouterr().err
    other = load_checkpoint(tmp_path / "other" / "model_1")
    assert other.tokenizer.prefixes == {**PREFIXES, QUERY: ""}
    with pytest.raises(InputError, match="query_prefix"):
        train_batch_neg.main([*start, "--query_prefix", "x", "--resume_from", str(tmp_path / "other" / "model_1")])


def test_a_checkpoint_of_an_earlier_version_has_none(folder: Path, tmp_path: Path) -> None:
    config = read_json(folder / "with" / "semantic_index.json")
    model, tokenizer, *_ = load_checkpoint(folder / "without")
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    for prefix, problem in (({}, None), ({"query_prefix": 3}, "has a value out of range")):
        content = {name: value for name, value in config.items() if not name.endswith("_prefix")}
        write_json(tmp_path / "model_1" / "semantic_index.json", {**content, **prefix})
        (tmp_path / "model_1" / "manifest.json").unlink(missing_ok=True)
        if problem:
            with pytest.raises(InputError, match=problem):
                load_checkpoint(tmp_path / "model_1")
        else:
            assert load_checkpoint(tmp_path / "model_1").tokenizer.prefixes == {QUERY: "", DOCUMENT: ""}


@pytest.mark.parametrize("role", [*ROLES, None])
def test_an_export_with_a_role(
    folder: Path, output: Path, deploy_predict: ModuleType, tmp_path: Path, capsys: Capture, role: str | None
) -> None:
    """Paddle Inference's script, and the C++ server's clients."""
    write_pairs(tmp_path / "texts.txt", [(text,) for text in QUERIES])
    options = ["--model_dir", str(output), "--device", "cpu", "--output", str(tmp_path / "vectors.npy")]
    given = ["--role", role] if role else []
    files = ["--text_file", str(tmp_path / "texts.txt"), "--text_pair_file", str(folder / "pairs.csv")]
    assert deploy_predict.main([*options, *given, *files]) == 0
    assert_equal_vectors(np.load(tmp_path / "vectors.npy"), folder, QUERIES, role)
    cosines = json.loads(capsys.readouterr().out.splitlines()[-1])
    products = twin_vectors(folder, QUERIES, QUERY) * twin_vectors(folder, DOCUMENTS, DOCUMENT)
    np.testing.assert_allclose(cosines, products.sum(axis=1), rtol=0, atol=1e-5)
    model, *_ = load_checkpoint(folder / "without")
    tokens = clients.tokenize(QUERIES, str(output), None, role)
    assert_equal_vectors(model.embed(*tokens), folder, QUERIES, role)


def test_an_export_to_sentence_transformers_has_prompts(folder: Path, tmp_path: Path) -> None:
    options = ["--params_path", str(folder / "with"), "--output_path", str(tmp_path / "output")]
    assert export_model.main([*options, "--format", "sentence-transformers"]) == 0
    told = read_sentence_transformers_folder(tmp_path / "output")
    assert (told.query_prefix, told.document_prefix) == (PREFIXES[QUERY], PREFIXES[DOCUMENT])
    assert load_checkpoint(tmp_path / "output").fingerprint
    assert load_checkpoint(tmp_path / "output").tokenizer.prefixes == PREFIXES


@pytest.mark.server
def test_services_with_a_role(folder: Path, output: Path, tmp_path: Path) -> None:
    """Over HTTP and gRPC; a role that isn't one is an error."""
    paths = [f"--{name}_path={tmp_path}/serving_{name}" for name in ("server", "client")]
    assert export_to_serving.main(["--dirname", str(output), *paths]) == 0
    texts = QUERIES[:3]
    with running_service(tmp_path / "serving_server", "--threads", "1") as service:
        for role in (*ROLES, None):
            keys, values = (["role"], [role]) if role else ([], [])
            status, answer = post(service, as_json(key=[*keys, "0", "1", "2"], value=[*values, *texts]))
            assert status == 200
            assert_equal_vectors(np.array(json.loads(answer["value"][0])), folder, texts, role)
            given = ["--role", role] if role else []
            asked = [option for text in texts for option in ("--text", text)]
            done = run_script("deploy/python/rpc_client.py", "--endpoint", f"{HOST}:{service.rpc_port}", *asked, *given)
            assert done.returncode == 0, done.stderr
            shown = np.array2string(np.array(json.loads(answer["value"][0]), np.float32))
            assert shown in done.stdout
        status, answer = post(service, as_json(key=["role", "0"], value=["title", "水稻"]))
        assert (status, answer["err_msg"]) == (
            400,
            "role is none of query, document: leave it out for texts that are neither",
        )
