import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from base_model import SemanticIndexBase
from benchmarks import bench_encode, encode_ours, encode_peers, encode_reference, harness, make_encoder
from common.device import set_seed
from common.errors import InputError
from modeling.checkpoint import create_model
from modeling.weight_files import read_weights


@pytest.fixture(scope="module")
def encoder_folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    made = tmp_path_factory.mktemp("encoder")
    checkpoint, exported = made / "checkpoint", made / "exported"
    options = ["--model", str(folder), "--checkpoint", str(checkpoint), "--exported", str(exported)]
    assert make_encoder.main(options) == 0
    return checkpoint, exported


@pytest.mark.onnx
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
        encodings[name] = [harness.Encoding(**json.loads(report.read_text()))]
        assert len(encodings[name][0].pass_seconds) == 2
        assert len(encodings[name][0].vectors) == harness.SAMPLE
    differences = bench_encode.largest_differences(encodings)
    assert max(differences.values()) < 1e-5
    model, tokenizer = create_model(SemanticIndexBase, init_from_ckpt=checkpoint)
    texts = harness.sample_of(corpus_file.read_text(encoding="utf-8").splitlines(), harness.SAMPLE)
    expected = model.embed(*tokenizer(texts))
    np.testing.assert_allclose(encodings[bench_encode.OURS][0].vectors, expected, rtol=0, atol=1e-5)


@pytest.mark.onnx
def test_weights_get_the_names_that_bert_has(encoder_folders: tuple[Path, Path]) -> None:
    ernie = read_weights(encoder_folders[0] / "model_state.pdparams")
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


SECONDS = {  # of a pass, by row
    bench_encode.REFERENCE: 40.0,
    bench_encode.DYGRAPH: 4.0,
    bench_encode.OURS: 2.0,
    bench_encode.ONNX_RUNTIME: 3.0,
    bench_encode.TWO_RANKS: 2.5,
    bench_encode.OPENVINO: 2.0,
    harness.SPINNING: 5.0,
    harness.SLEEPING: 4.5,
    bench_encode.OURS_BF16: 1.0,
    bench_encode.OPENVINO_BF16: 1.5,
    bench_encode.OURS_INT8: 0.5,
    bench_encode.OPENVINO_INT8: 0.4,
}


def encodings_of(names: Sequence[str], **vectors: list[list[float]]) -> dict[str, list[harness.Encoding]]:
    """Two processes of each row, the first one slower; all have the same vectors, except those given."""
    unit = [[1.0, 0.0], [0.6, 0.8]]
    return {
        name: [
            harness.Encoding([SECONDS[name] + 1, SECONDS[name]], unit, 1 << 20, {"a": "1"}),
            harness.Encoding([SECONDS[name]], vectors.get(name, unit), 3 << 20, {"a": "1"}),
        ]
        for name in names
    }


@pytest.mark.parametrize(
    ("has_all", "ratios"),
    [(True, [40.0, 1.5, 1.5, 0.8, 2.0, 4.0, 0.8]), (False, [None, None, 1.5, 0.8, None, None, None])],
    ids=["bf16 and int8", "neither"],
)
def test_the_encoding_benchmark(
    has_all: bool,
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
    ) -> dict[str, list[harness.Encoding]]:
        assert (rounds, kind) == (2, harness.Encoding)
        processes.extend(list(map(str, command)) for command in commands.values())
        used = {command[command.index("--corpus_file") + 1] for command in processes}
        texts.extend(Path(used.pop()).read_text(encoding="utf-8").splitlines())
        assert not used
        return encodings_of(list(commands))

    monkeypatch.setattr(bench_encode, "interleaved", interleaved)
    monkeypatch.setattr(bench_encode, "has_bf16", lambda: has_all)
    monkeypatch.setattr(bench_encode, "has_openvino", lambda: has_all)
    monkeypatch.setattr(bench_encode, "check_benchmarks_python", lambda: None)
    options = ["--model", str(folder), "--corpus_file", str(corpus_file), "--texts", "20", "--rounds", "2"]
    monkeypatch.setattr(bench_encode, "make_encoder", lambda inputs, _: (inputs.folder / "c", inputs.folder / "e"))
    assert bench_encode.main(options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ["bf16_vs_reference", "bf16_vs_openvino_bf16", "fp32_vs_onnxruntime", "two_ranks_vs_one_process"]
    names += ["int8_vs_bf16", "int8_vs_fp32", "int8_vs_openvino_int8"]
    assert [result[name] for name in names] == ratios
    assert result["texts_per_second"]["ours"] == 10
    assert result["seconds_of_passes"]["ours"] == [[3, 2], [2]]
    assert result["peak_mib"]["ours"] == 3
    assert result["machine"]["cores"] >= 1
    assert result["versions"] == {"a": "1"}
    assert len(processes) == (12 if has_all else 8)
    assert sum("bf16" in command for command in processes) == (2 if has_all else 0)
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
    with pytest.raises(InputError, match=f"{name}: its vectors differ from ours"):
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
    with harness.benchmark_corpus(None, None, bench_encode.QUICK.model) as inputs:
        model, tokenizer = create_model(SemanticIndexBase, from_scratch=str(inputs.model))
        vectors = model.embed(*tokenizer(harness.sample_of(inputs.corpus, harness.SAMPLE)))
    cosines = (vectors @ vectors.T)[~np.eye(harness.SAMPLE, dtype=bool)]
    assert cosines.max() < harness.LOWEST_COSINES["bf16"]
