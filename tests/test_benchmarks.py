"""The benchmarks, less their figures: what they compare is the same, and what they print can be read."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import ErnieConfig, ErnieTokenizer

from base_model import SemanticIndexBase
from batch_negative.batches import BatchSchedule, PairBatcher
from batch_negative.model import SemanticIndexBatchNeg
from benchmarks import (
    bench_encode,
    bench_grad_cache,
    bench_scale,
    bench_search,
    bench_serving,
    bench_train,
    common,
    encode_ours,
    encode_peers,
    encode_reference,
    make_encoder,
    ours,
    reference,
    search,
)
from common.cli import run
from common.device import set_seed
from common.errors import InputError
from data import UNK, TextPair, TextTokenizer, read_text_pairs, read_vocabulary
from helpers import all_pairs, make_model_folder, write_pairs
from modeling.checkpoint import create_model
from modeling.weight_files import read_weights

PAIRS = [TextPair(*pair) for pair in all_pairs()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for texts of common.MAX_SEQ_LENGTH."""
    return make_model_folder(tmp_path_factory.mktemp("ernie"), max_position_embeddings=common.MAX_SEQ_LENGTH)


@pytest.fixture(scope="module")
def encoder_folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    made = tmp_path_factory.mktemp("encoder")
    checkpoint, exported = made / "checkpoint", made / "exported"
    options = ["--model", str(folder), "--checkpoint", str(checkpoint), "--exported", str(exported)]
    assert make_encoder.main(options) == 0
    return checkpoint, exported


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """50 texts."""
    return write_pairs(tmp_path / "corpus.csv", [(title,) for _, title in all_pairs()[:50]])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Takes the place of trainers' processes, and is the list of their commands."""
    commands: list[Sequence[str]] = []

    def run_process(command: Sequence[str | Path], report: Path, kind: type) -> common.Training:
        assert kind is common.Training
        commands.append(list(map(str, command)))
        steps = int(commands[-1][commands[-1].index("--steps") + 1])
        slowness = 1 + next(
            place
            for place, name in enumerate(["train_ours.py", "sentence", "reference"])
            if name in " ".join(commands[-1])
        )
        return common.Training([9.0] + [float(slowness)] * (steps - 1), [0.5] * steps, 1 << 20, {"paddle": "3"})

    monkeypatch.setattr(common, "run_process", run_process)
    monkeypatch.setattr(bench_grad_cache, "run_process", run_process)
    monkeypatch.setattr(common, "BENCHMARKS_PYTHON", Path(sys.executable))
    return commands


def test_the_reference_computes_what_ours_does(still_model_folder: Path) -> None:
    """Tokens, loss and gradients, on a batch without duplicates."""
    set_seed(1)
    model, tokenizer = create_model(
        SemanticIndexBatchNeg, from_scratch=str(still_model_folder), output_emb_size=16, dropout=0.0, max_seq_length=24
    )
    plain = reference.ReferenceModel(ErnieConfig.from_pretrained(str(still_model_folder)), 16)
    missing, unexpected = plain.set_state_dict(model.state_dict())
    assert not missing and not unexpected
    plain.eval()  # its dropout of the vector is fixed
    tokenizer = ErnieTokenizer.from_pretrained(str(still_model_folder))
    columns = [[pair.query for pair in PAIRS[:12]], [pair.title for pair in PAIRS[:12]]]
    tokens = [reference.tokenize(tokenizer, column, 24) for column in columns]
    for column, (input_ids, token_type_ids) in zip(columns, tokens, strict=True):
        np.testing.assert_array_equal(input_ids.numpy(), tokenizer(column)[0])
        assert token_type_ids.shape == input_ids.shape
    loss = plain(*tokens, 0.2, 30.0)
    loss.backward()
    ours_loss = model(PairBatcher(tokenizer, PAIRS)([np.arange(12)]), 0.2, 30.0)
    ours_loss.backward()
    assert float(loss) == pytest.approx(float(ours_loss), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None, name
        else:
            np.testing.assert_allclose(parameter.grad.numpy(), gradients[name].numpy(), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("trainer", [ours, reference])
def test_a_trainer_reports_every_step(trainer: object, folder: Path, tmp_path: Path) -> None:
    train_set_file = write_pairs(tmp_path / "train.csv", all_pairs())
    report = tmp_path / "report.json"
    options = ["--model", str(folder), "--train_set_file", str(train_set_file), "--batch_size", "16", "--steps", "12"]
    assert trainer.main([*options, "--learning_rate", "2e-3", "--report", str(report)]) == 0
    training = common.Training(**json.loads(report.read_text()))
    assert len(training.step_seconds) == len(training.losses) == 12
    assert training.losses[-1] < training.losses[0]
    assert training.peak_bytes > 1 << 26
    assert training.versions["paddlepaddle"] == paddle.__version__


def test_all_trainers_take_the_same_batches() -> None:
    """File order for the reference, and two ranks that share a batch out, have the batches of one rank."""
    one, two = (
        [
            np.concatenate(step.batches[0])
            for step in BatchSchedule(len(PAIRS), 16 // ranks, seed=0, epochs=1, world_size=ranks).steps(0)
        ]
        for ranks in (1, 2)
    )
    assert [sorted(rows) for rows in one] == [sorted(rows) for rows in two]
    assert common.in_training_order(PAIRS, 16, 0) == [PAIRS[row] for row in np.concatenate(one)]


def test_the_training_benchmark(
    folder: Path, tmp_path: Path, trained: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    train_set_file = write_pairs(tmp_path / "train.csv", all_pairs())
    inputs = ["--model", str(folder), "--train_set_file", str(train_set_file)]
    assert bench_train.main([*inputs, "--batch_size", "32", "--steps", "3", "--warm_up", "1", "--rounds", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratio_vs_reference"] == 3
    assert result["ratio_vs_sentence_transformers"] == result["two_ranks_ratio_vs_sentence_transformers"] == 2
    assert result["pairs_per_second"]["ours"] == 32
    assert result["machine"]["cores"] >= 1
    assert len(trained) == 2 * 5
    assert [command[command.index("--batch_size") + 1] for command in trained[:5]] == [*["32"] * 4, "16"]
    assert trained[:5] == trained[5:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "2", "--warm_up", "2"], "--steps 2: must be more than --warm_up 2"),
        (["--batch_size", "63"], "--batch_size 63: must be even"),
        (["--steps", "9"], "has 168 pairs, 9 steps of 64 pairs need 576"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, folder: Path, tmp_path: Path, trained: list[Sequence[str]]
) -> None:
    train_set_file = write_pairs(tmp_path / "train.csv", all_pairs())
    with pytest.raises(InputError, match=message):
        bench_train.main(["--model", str(folder), "--train_set_file", str(train_set_file), *options])
    assert not trained


@pytest.mark.parametrize("benchmark", [bench_train, bench_encode])
def test_without_the_peers_environment_one_line_says_how_to_make_it(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "BENCHMARKS_PYTHON", tmp_path / ".venv-benchmarks" / "bin" / "python")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: benchmark.main(["--quick"]))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sh scripts/setup.sh --benchmarks" in line


def test_the_benchmark_of_the_gradient_cache(
    folder: Path, trained: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_grad_cache.main(["--quick", "--model", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["peak_memory_ratio"] == 1
    assert result["time_per_pair_ratio"] == 0.5  # steps of twice the pairs in the same time
    assert [("--grad_cache_chunk" in command) for command in trained] == [False, True, False, True, True, True]


def test_its_texts_are_different_and_fill_the_length(folder: Path) -> None:
    pairs = bench_grad_cache.full_length(PAIRS, 400)
    assert len({text for pair in pairs for text in pair[:2]}) == 800
    tokenizer = TextTokenizer.load(folder, common.MAX_SEQ_LENGTH)
    assert tokenizer([text for pair in pairs for text in pair[:2]])[0].min() != tokenizer.pad_id


def test_inputs_that_are_not_given_are_made(tmp_path: Path) -> None:
    with common.benchmark_inputs(None, None, common.MEDIUM_ERNIE) as inputs:
        model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(inputs.model))
        assert (model.ptm.config.num_hidden_layers, model.ptm.config.hidden_size) == (4, 256)
        assert inputs.pairs[0] == read_text_pairs(inputs.folder / "recall" / "train.csv")[0]
        tokens = TextTokenizer.load(inputs.model, 64).tokenize([pair.title for pair in inputs.pairs[:100]])
        unknown = read_vocabulary(inputs.model / "vocab.txt").index(UNK)
        assert not any(unknown in ids for ids in tokens)


def test_a_trainers_failure_is_passed_on(tmp_path: Path) -> None:
    refuses = "import sys; print('error: no such file', file=sys.stderr); sys.exit(2)"
    with pytest.raises(InputError, match="no such file"):
        common.run_process([sys.executable, "-c", refuses], tmp_path / "report.json", common.Training)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        common.run_process([sys.executable, "-c", "1 / 0"], tmp_path / "report.json", common.Training)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def test_all_encoders_give_the_same_vectors(
    encoder_folders: tuple[Path, Path], corpus_file: Path, tmp_path: Path
) -> None:
    """Those that .venv can run: OpenVINO and sentence-transformers are compared whenever the benchmark runs."""
    checkpoint, exported = map(str, encoder_folders)
    report = tmp_path / "report.json"
    encodings = {}
    for name, script, options in (
        (bench_encode.OURS, encode_ours, ["--model", checkpoint]),
        (bench_encode.DYGRAPH, encode_ours, ["--model", checkpoint, "--engine", "dygraph"]),
        (bench_encode.REFERENCE, encode_reference, ["--model", checkpoint]),
        (bench_encode.ONNX_RUNTIME, encode_peers, ["--model", exported, "--peer", "onnxruntime"]),
    ):
        common_options = ["--corpus_file", str(corpus_file), "--batch_size", "4", "--warm_up", "3", "--passes", "2"]
        assert script.main([*common_options, *options, "--report", str(report)]) == 0
        encodings[name] = [common.Encoding(**json.loads(report.read_text()))]
        assert len(encodings[name][0].pass_seconds) == 2
        assert len(encodings[name][0].vectors) == common.SAMPLE
    differences = bench_encode.largest_differences(encodings)
    assert max(differences.values()) < 1e-5
    model, tokenizer = create_model(SemanticIndexBase, init_from_ckpt=checkpoint)
    texts = common.sample_of(corpus_file.read_text(encoding="utf-8").splitlines(), common.SAMPLE)
    expected = model.embed(*tokenizer(texts))
    np.testing.assert_allclose(encodings[bench_encode.OURS][0].vectors, expected, rtol=0, atol=1e-5)


def test_weights_get_the_names_that_bert_has(encoder_folders: tuple[Path, Path]) -> None:
    ernie = read_weights(encoder_folders[0] / "model.safetensors")
    weights = encode_peers.torch_weights(encoder_folders[0])
    assert len(weights) == len(ernie)
    for bert_name, name in {
        "encoder.layer.1.attention.self.query": "encoder.layers.1.self_attn.q_proj",
        "encoder.layer.1.attention.self.key": "encoder.layers.1.self_attn.k_proj",
        "encoder.layer.1.attention.self.value": "encoder.layers.1.self_attn.v_proj",
        "encoder.layer.1.attention.output.dense": "encoder.layers.1.self_attn.out_proj",
        "encoder.layer.1.intermediate.dense": "encoder.layers.1.linear1",
        "encoder.layer.1.output.dense": "encoder.layers.1.linear2",
        "pooler.dense": "pooler.dense",
    }.items():
        np.testing.assert_array_equal(weights[f"{bert_name}.weight"], ernie[f"ptm.{name}.weight"].T)
        np.testing.assert_array_equal(weights[f"{bert_name}.bias"], ernie[f"ptm.{name}.bias"])
    for bert_name, name in {
        "embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight": "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight": "embeddings.token_type_embeddings.weight",
        "embeddings.LayerNorm.weight": "embeddings.layer_norm.weight",
        "encoder.layer.0.attention.output.LayerNorm.bias": "encoder.layers.0.norm1.bias",
        "encoder.layer.0.output.LayerNorm.weight": "encoder.layers.0.norm2.weight",
    }.items():
        np.testing.assert_array_equal(weights[bert_name], ernie[f"ptm.{name}"])
    np.testing.assert_array_equal(weights["emb_reduce_linear.weight"], ernie["emb_reduce_linear.weight"].T)


def test_the_peers_need_a_graph(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no ONNX graph"):
        encode_peers.onnx_file(tmp_path)


def test_warming_up_is_not_timed(corpus_file: Path) -> None:
    encoded: list[int] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        encoded.append(len(texts))
        return np.arange(float(len(texts)))[:, None]

    encoding = common.measure_encoding(encode, str(corpus_file), ["paddlepaddle"], warm_up=7, passes=3)
    assert encoded == [7, 50, 50, 50]
    assert len(encoding.pass_seconds) == 3
    assert encoding.vectors == [[3.0 * row] for row in range(common.SAMPLE)]
    assert encoding.versions == {"paddlepaddle": paddle.__version__}


SECONDS = {  # of a pass, by row
    bench_encode.REFERENCE: 40.0,
    bench_encode.DYGRAPH: 4.0,
    bench_encode.OURS: 2.0,
    bench_encode.ONNX_RUNTIME: 3.0,
    bench_encode.TWO_RANKS: 2.5,
    bench_encode.OPENVINO: 2.0,
    common.SPINNING: 5.0,
    common.SLEEPING: 4.5,
    bench_encode.OURS_BF16: 1.0,
    bench_encode.OPENVINO_BF16: 1.5,
}


def encodings_of(names: Sequence[str], **vectors: list[list[float]]) -> dict[str, list[common.Encoding]]:
    """Two processes of each row, the first of them slower; all have the same vectors but those that are given."""
    unit = [[1.0, 0.0], [0.6, 0.8]]
    return {
        name: [
            common.Encoding([SECONDS[name] + 1, SECONDS[name]], unit, 1 << 20, {"a": "1"}),
            common.Encoding([SECONDS[name]], vectors.get(name, unit), 3 << 20, {"a": "1"}),
        ]
        for name in names
    }


@pytest.mark.parametrize(
    ("with_bf16", "ratios"), [(True, [40.0, 1.5, 1.5, 0.8]), (False, [None, None, 1.5, 0.8])], ids=["bf16", "no bf16"]
)
def test_the_encoding_benchmark(
    with_bf16: bool,
    ratios: list[float | None],
    folder: Path,
    corpus_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    processes: list[list[str]] = []
    texts: list[str] = []

    def interleaved(
        commands: dict[str, Sequence[str | Path]], rounds: int, _: Path, kind: type
    ) -> dict[str, list[common.Encoding]]:
        assert (rounds, kind) == (2, common.Encoding)
        processes.extend(list(map(str, command)) for command in commands.values())
        used = {command[command.index("--corpus_file") + 1] for command in processes}
        texts.extend(Path(used.pop()).read_text(encoding="utf-8").splitlines())
        assert not used
        return encodings_of(list(commands))

    monkeypatch.setattr(bench_encode, "interleaved", interleaved)
    monkeypatch.setattr(bench_encode, "has_bf16", lambda: with_bf16)
    monkeypatch.setattr(bench_encode, "check_benchmarks_python", lambda: None)
    options = ["--model", str(folder), "--corpus_file", str(corpus_file), "--texts", "20", "--rounds", "2"]
    monkeypatch.setattr(bench_encode, "make_encoder", lambda inputs: (inputs.folder / "c", inputs.folder / "e"))
    assert bench_encode.main(options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ["bf16_vs_reference", "bf16_vs_openvino_bf16", "fp32_vs_onnxruntime", "two_ranks_vs_one_process"]
    assert [result[name] for name in names] == ratios
    assert result["texts_per_second"]["ours"] == 10
    assert result["seconds_of_passes"]["ours"] == [[3, 2], [2]]
    assert result["peak_mib"]["ours"] == 3
    assert result["machine"]["cores"] >= 1
    assert result["versions"] == {"a": "1"}
    assert len(processes) == (10 if with_bf16 else 8)
    assert sum("bf16" in command for command in processes) == (2 if with_bf16 else 0)
    assert len(texts) == 20 and set(texts) <= set(corpus_file.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        (bench_encode.OPENVINO, [[1.0, 0.0], [0.6002, 0.8]]),
        (bench_encode.OPENVINO, [[1.0, 0.0], [0.6, float("nan")]]),
        (bench_encode.OURS_BF16, [[1.0, 0.0], [0.8, 0.6]]),
    ],
)
def test_other_vectors_get_no_ratio(name: str, vectors: list[list[float]]) -> None:
    with pytest.raises(InputError, match=f"{name}: its vectors are off from ours"):
        bench_encode.summary(encodings_of(list(SECONDS), **{name: vectors}), bench_encode.QUICK)


def test_bf16_may_be_off_by_more() -> None:
    encodings = encodings_of(list(SECONDS), **{bench_encode.OURS_BF16: [[1.0, 0.0], [0.61, 0.79]]})
    assert bench_encode.summary(encodings, bench_encode.QUICK)["largest_difference"]["ours, bf16"] == 0.01


def test_a_corpus_that_is_too_small(folder: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_encode, "check_benchmarks_python", lambda: None)
    with pytest.raises(InputError, match="has 50 texts, fewer than --texts 51"):
        bench_encode.main(["--model", str(folder), "--corpus_file", str(corpus_file), "--texts", "51"])


def test_the_made_texts_have_vectors_that_a_comparison_tells_apart() -> None:
    set_seed(0)
    with common.benchmark_corpus(None, None, bench_encode.QUICK.model) as inputs:
        model, tokenizer = create_model(SemanticIndexBase, from_scratch=str(inputs.model))
        vectors = model.embed(*tokenizer(common.sample_of(inputs.corpus, common.SAMPLE)))
    cosines = (vectors @ vectors.T)[~np.eye(common.SAMPLE, dtype=bool)]
    assert cosines.max() < bench_encode.LOWEST_BF16_COSINE


def test_vectors_of_the_search_benchmark(tmp_path: Path) -> None:
    """Unit vectors, of which copies lie near what they copy; a folder of files reads as one."""
    random = np.random.default_rng(1)
    made = bench_search.made_vectors(300, random)
    more = bench_search.stretched(made, 500, random)
    np.testing.assert_array_equal(more[:300], made)
    np.testing.assert_array_equal(bench_search.stretched(made, 200, random), made[:200])
    np.testing.assert_allclose(np.linalg.norm(more, axis=1), 1, atol=1e-5)
    nearest = (more[300:] @ made.T).max(axis=1)
    assert 0.9 < nearest.mean() < 0.99
    for number, part in enumerate(np.array_split(more, 3)):
        np.save(tmp_path / f"{number}.npy", part)
    np.testing.assert_array_equal(bench_search.read_vectors(str(tmp_path)), more)
    with pytest.raises(InputError, match="no vectors that can be read"):
        bench_search.read_vectors(str(tmp_path / "missing.npy"))
    np.testing.assert_array_equal(bench_search.read_queries(str(tmp_path)), more)
    with pytest.raises(InputError, match=r"--queries .*0\.npy: 167 vectors; give more than the 200"):
        bench_search.read_queries(str(tmp_path / "0.npy"))


def test_engines_of_the_search_benchmark_reach_the_share(tmp_path: Path) -> None:
    """Ours and bare hnswlib; faiss lives in the peers' environment."""
    vectors = bench_search.made_vectors(1000, np.random.default_rng(2))
    queries = vectors[: search.TUNED_ON + 50]
    exact = -np.sort(-(queries @ vectors.T), axis=1)[:, :20]
    for name, array in (("vectors", vectors), ("queries", queries), ("exact", exact)):
        np.save(tmp_path / f"{name}.npy", array)
    files = [part for name in ("vectors", "queries", "exact") for part in (f"--{name}", str(tmp_path / f"{name}.npy"))]
    for engine in ("ours", "hnswlib"):
        assert search.main(["--engine", engine, *files, "--report", str(tmp_path / "report.json")]) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["share"] >= 0.99 and report["ef"] >= 20
        assert report["build_seconds"] > 0 and len(report["search_seconds"]) == search.REPEATS
        assert ("default_share" in report) == (engine == "ours")
        assert report.get("default_share", 1) > 0.98


def test_ratios_of_the_search_benchmark_are_the_worst(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Rates are medians over processes; the last line is a JSON object."""
    seconds = {"ours": 2.0, "hnswlib": 1.0, "faiss": 4.0}

    def run_process(command: Sequence[str | Path], report: Path, kind: type) -> dict:
        engine = command[command.index("--engine") + 1]
        rows = len(np.load(command[command.index("--vectors") + 1]))
        build = seconds[engine] if rows == 1000 else 1.0
        report = {"build_seconds": build, "ef": 60, "share": 0.99, "search_seconds": [1.0, seconds[engine], 9.0]}
        return report | {"default_share": rows / 2000} if engine == "ours" else report

    monkeypatch.setattr(bench_search, "run_process", run_process)
    monkeypatch.setattr(bench_search, "check_benchmarks_python", lambda: None)
    assert bench_search.main(["--rows", "1000", "1500", "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["build_vs_hnswlib"], result["query_vs_hnswlib"]) == (0.5, 0.5)
    assert result["recall_vs_exact"] == 0.5
    assert result["sizes"]["1000"]["faiss"]["queries_per_second"] == 250


def test_the_scale_benchmark_measures_both_stages(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Really, on two small corpora."""
    assert bench_scale.main(["--documents", "60", "20"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["sizes"]) == ["20", "60"]
    largest = result["sizes"]["60"]
    assert result["peak_mb_per_million"] == pytest.approx(largest["encode_mb"] * 1e6 / 60, abs=0.1)
    assert largest["index_file_mb"] > 60 * 256 * 4 / 1e6 - 0.1


def test_serving_benchmark_prints_what_can_be_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A tiny model and moments: the ratios are those of the speeds, and every text was answered."""
    pairs = write_pairs(tmp_path / "train.csv", all_pairs())
    sizes = ["--batch_size", "4", "--texts", "8", "--seconds", "0.3", "--rounds", "1", "--threads", "1"]
    bench_serving.main(["--train_set_file", str(pairs), "--model", str(folder), *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    speed = result["texts_per_second"]
    for way in ("rpc", "http"):
        assert result[f"{way}_vs_direct"] == pytest.approx(speed[way] / speed["direct"], abs=0.01)
        assert result["calls"][way] >= 4 and 0 < result["encoding_share"][way] < 1
        assert list(result["latency_ms"][way]) == ["p50", "p90", "p95", "p99"]
