"""Encoding with ONNX Runtime, OpenVINO or PyTorch, set up for speed; bench_encode.py runs it in .venv-benchmarks.

Texts are tokenized, sorted by length and put into batches as ours are; all cores compute.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.harness import MAX_SEQ_LENGTH, add_encoder_args, measure_encoding, write_report
from common.cli import ArgumentParser, run
from common.cpu import cpu_count
from common.errors import InputError
from data import Embed, TextTokenizer, encode_texts
from modeling.checkpoint_files import find_weights
from modeling.weight_files import read_weights

# A process imports the packages of one peer only; the tests' environment has OpenVINO and PyTorch neither.
LAYER_NAMES = {  # of an encoder layer: ERNIE's in PaddleNLP -> BERT's in transformers
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # int8: of what isn't quantized


def onnx_file(folder: Path) -> Path:
    """The ONNX graph of an exported model. Raises InputError if there is none."""
    for file in folder.glob("*.onnx"):
        return file
    raise InputError(f"{folder}: has no ONNX graph; export the model with export_model.py --format onnx")


def int8_file(folder: Path) -> Path:
    """The graph that NNCF quantized, of an exported model. Raises InputError if there is none."""
    for file in folder.glob("openvino/*-int8/*.xml"):
        return file
    raise InputError(f"{folder}: has no graph in int8; export a model that recall.py --precision int8 has calibrated")


def onnxruntime_embed(folder: Path, _: TextTokenizer, __: str) -> Embed:
    """Of an exported model, in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    options.log_severity_level = 3  # errors; a warning would come for each constant that the graph doesn't use
    session = onnxruntime.InferenceSession(str(onnx_file(folder)), options, providers=["CPUExecutionProvider"])

    def embed(input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        return session.run(None, {"input_ids": input_ids, "token_type_ids": token_type_ids})[0]

    return embed


def openvino_embed(folder: Path, _: TextTokenizer, precision: str) -> Embed:
    """Of an exported model. Raises InputError if OpenVINO takes another precision."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time on all cores
        "INFERENCE_NUM_THREADS": cpu_count(),
        "INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[precision],
    }
    file = int8_file(folder) if precision == "int8" else onnx_file(folder)
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if taken != OPENVINO_PRECISIONS[precision]:
        raise InputError(f"OpenVINO computes in {taken} on this machine, not in {precision}")
    request = compiled.create_infer_request()

    def embed(input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        results = request.infer({"input_ids": input_ids, "token_type_ids": token_type_ids}, share_inputs=True)
        return results[compiled.output(0)]

    return embed


def sentence_transformers_embed(folder: Path, tokenizer: TextTokenizer, _: str) -> Embed:
    """Of a checkpoint with cls pooling, in float32."""
    import torch
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertModel

    from benchmarks.sentence_transformers_train import as_sentence_transformer, bert_config, embed_with

    torch.set_num_threads(cpu_count())
    weights = {name: torch.from_numpy(array) for name, array in torch_weights(folder).items()}

    def dense(prefix: str, activation: torch.nn.Module | None) -> Dense:
        out_features, in_features = weights[prefix + ".weight"].shape
        layer = Dense(in_features, out_features, activation_function=activation)
        layer.linear.load_state_dict({name: weights[f"{prefix}.{name}"] for name in ("weight", "bias")})
        return layer

    bert = BertModel(bert_config(folder), add_pooling_layer=False)
    bert.load_state_dict({name: weights[name] for name in bert.state_dict() if name in weights})
    pooler = [Pooling(bert.config.hidden_size, "cls"), dense("pooler.dense", torch.nn.Tanh())]
    return embed_with(as_sentence_transformer(bert, [*pooler, dense("emb_reduce_linear", None)]), tokenizer)


def torch_weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a checkpoint with BERT's names; PyTorch's linear layers hold the transposed matrices."""
    weights = {}
    for name, array in read_weights(find_weights(folder)).items():
        name = name.removeprefix("ptm.").replace("embeddings.layer_norm", "embeddings.LayerNorm")
        if name.startswith("encoder.layers."):
            _, _, number, part = name.split(".", 3)
            part, kind = part.rsplit(".", 1)
            name = f"encoder.layer.{number}.{LAYER_NAMES[part]}.{kind}"
        is_linear = array.ndim == 2 and "embeddings" not in name
        weights[name] = np.ascontiguousarray(array.T) if is_linear else array
    return weights


class Peer(NamedTuple):
    """What encodes, and the packages that it needs."""

    embed: Callable[[Path, TextTokenizer, str], Embed]  # (model's folder, tokenizer, precision)
    packages: tuple[str, ...]


PEERS = {
    "onnxruntime": Peer(onnxruntime_embed, ("onnxruntime",)),
    "openvino": Peer(openvino_embed, ("openvino",)),
    "sentence-transformers": Peer(sentence_transformers_embed, ("sentence-transformers", "torch")),
}


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_encoder_args(parser)
    parser.add_argument("--peer", choices=PEERS, required=True, help="what encodes")
    parser.add_argument("--precision", choices=OPENVINO_PRECISIONS, default="fp32", help="bf16: only OpenVINO")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Encodes and reports."""
    args = build_parser().parse_args(argv)
    folder = Path(args.model)
    tokenizer = TextTokenizer.load(folder, MAX_SEQ_LENGTH)
    peer = PEERS[args.peer]
    embed = peer.embed(folder, tokenizer, args.precision)

    def encode(texts: Sequence[str]) -> np.ndarray:
        return encode_texts(embed, texts, tokenizer, args.batch_size)

    write_report(
        args.report, measure_encoding(encode, args.corpus_file, peer.packages, warm_up=args.warm_up, passes=args.passes)
    )
    return 0


if __name__ == "__main__":
    run(main)
