"""Folders in the form of Hugging Face's transformers: what their configs say, and PyTorch's names of the weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import read_json
from data import BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE

NEED_ENCODER = "need an encoder such as ERNIE or BERT"  # the remedy for others
SUPPORTED = ("bert", "ernie", "roberta")  # types whose layers are BERT's; PyTorch's weights are taken for these
NEED_SUPPORTED = "need BERT, ERNIE, or RoBERTa with BERT's vocabulary"
OTHER_KINDS = {  # what a model is, by a pattern of its type
    "a decoder": r"gpt.*|llama.*|qwen.*|mistral.*|mixtral|gemma.*|phi.*|baichuan|chatglm.*|glm.*|internlm.*|deepseek.*"
    r"|opt|bloom|falcon|yuan|mamba.*|jamba|minicpm.*",
    "an encoder with a decoder": r"u?m?t5|m?bart|pegasus|marian|blenderbot.*",
    "an encoder with a SentencePiece vocabulary": r"xlm.*|camembert|xlnet|deberta-v2",
}
# Fields whose other values change the vectors in a way that PaddleNLP doesn't have: name -> admitted values.
FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
}
# An entry that this project adds to a backbone's config: PaddleNLP's ERNIE ignores layer_norm_eps, PyTorch's doesn't.
FOLLOWS_EPSILON = "follows_layer_norm_eps"
LARGEST_EPSILON = 1e-3  # that Paddle's layer_norm takes
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
TASK_EMBEDDINGS = "embeddings.task_type_embeddings.weight"  # of ERNIE 3, the only one beyond BERT's
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # constants that older versions saved
OLD_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # from TensorFlow
PYTORCH_NAME = re.compile(r"(^|\.)encoder\.layer\.[0-9]+\.attention\.self\.query\.weight$")
PYTORCH_LAYER_NORM = re.compile(r"(^|\.)(LayerNorm|full_layer_layer_norm)\.")


def check_config(folder: Path, content: Mapping[str, Any]) -> None:
    """Raises InputError if the config of a model folder describes something other than an encoder that can be used.

    content: that of config.json. A checkpoint of this project, which has been loaded before, is left alone.
    """
    if (folder / MODEL_CONFIG_FILE).is_file():
        return
    model_type = str(content.get("model_type"))
    for kind, pattern in OTHER_KINDS.items():
        if re.fullmatch(pattern, model_type):
            raise InputError(f"{folder}: is {kind} ({model_type}); {NEED_ENCODER}")
    if model_type not in (*SUPPORTED, "None"):  # without one, PaddleNLP guesses it from the architecture
        return
    for name, admitted in FIXED_FIELDS.items():
        if content.get(name) not in admitted:
            problem = f"has {name} {content[name]!r}, which this project doesn't have"
            raise InputError(f"{folder / BACKBONE_CONFIG_FILE}: {problem}; {NEED_SUPPORTED}")
    code = content.get("auto_map")
    if isinstance(code, dict) and "AutoModel" in code:
        problem = f"its model is code of its own ({code['AutoModel']}), which isn't run"
        raise InputError(f"{folder / BACKBONE_CONFIG_FILE}: {problem}; {NEED_SUPPORTED}")


def check_layers(source: str, config: Any) -> None:
    """Raises InputError if Paddle's layers lack the activation or the epsilon in the config of one of SUPPORTED."""
    from paddle.nn import functional

    if config.model_type not in SUPPORTED:
        return
    if not hasattr(functional, str(config.hidden_act)):
        remedy = "need a model with gelu, relu, silu or another one of Paddle's"
        raise InputError(f"{source}: {BACKBONE_CONFIG_FILE} has hidden_act {config.hidden_act!r}; {remedy}")
    follows = config.model_type != "ernie" or getattr(config, FOLLOWS_EPSILON, False)
    epsilon = config.layer_norm_eps
    if follows and not (isinstance(epsilon, int | float) and 0 <= epsilon <= LARGEST_EPSILON):
        remedy = f"need a model with a number from 0 to {LARGEST_EPSILON}, as Paddle's layers do"
        raise InputError(f"{source}: {BACKBONE_CONFIG_FILE} has layer_norm_eps {epsilon!r}; {remedy}")


def has_pytorch_names(weights: Mapping[str, np.ndarray], model_type: str) -> bool:
    """Whether a file's weights are named, and its matrices turned, as in PyTorch. The whole file decides it."""
    return model_type in SUPPORTED and any(map(PYTORCH_NAME.search, weights))


def is_other_pytorch_model(weights: Mapping[str, np.ndarray], model_type: str) -> bool:
    """Whether weights that don't fit look like PyTorch's of a type that isn't supported."""
    return model_type not in SUPPORTED and any(map(PYTORCH_LAYER_NORM.search, weights))


def from_pytorch(weights: Mapping[str, np.ndarray], file: Path, config: Any) -> dict[str, np.ndarray]:
    """The weights of an encoder in PyTorch's form with our names (`ptm.…`), linear layers transposed.

    config: PaddleNLP's, to which is added what PyTorch's models follow. The weights of a head keep their names. Raises
    InputError if there isn't just one encoder, or if it is a cross-encoder, quantized, or has another number of layers.
    """
    _check_not_cross_encoder(file, weights)
    encoders = [name for name in weights if name.endswith(WORD_EMBEDDINGS)]
    if len(encoders) != 1:
        raise InputError(f"{file}: holds {len(encoders)} encoders, not one; {NEED_SUPPORTED}")
    prefix = encoders[0].removesuffix(WORD_EMBEDDINGS)
    table = _paddle_names(config)
    named: dict[str, np.ndarray] = {}
    layers = set()
    for name, array in weights.items():
        plain = name.removeprefix(prefix)
        for old, new in OLD_ENDINGS.items():
            plain = plain.removesuffix(old) + new if plain.endswith(old) else plain
        if match := re.match(r"encoder\.layer\.([0-9]+)\.", plain):
            layers.add(int(match[1]))
        if plain in BUFFERS:
            continue
        if plain not in table or not name.startswith(prefix):
            named[name] = array
            continue
        if array.dtype.kind != "f" and array.dtype != np.uint16:
            problem = f"{name} holds {array.dtype}, as in a quantized model"
            raise InputError(f"{file}: {problem}; give the model in float32, float16 or bfloat16")
        target, transposed = table[plain]
        named[f"ptm.{target}"] = array.T if transposed else array
    if layers != set(range(config.num_hidden_layers)):
        problem = f"has {len(layers)} layers, but num_hidden_layers is {config.num_hidden_layers}"
        raise InputError(f"{file}: {problem} in {BACKBONE_CONFIG_FILE}; give the config of these weights")
    if config.model_type == "ernie":
        setattr(config, FOLLOWS_EPSILON, True)
    return named


def to_pytorch(weights: Mapping[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """The reverse of `from_pytorch` for the weights of the encoder (`ptm.…`): PyTorch's names, matrices transposed.

    Raises InputError if the encoder isn't one of SUPPORTED.
    """
    if config.model_type not in SUPPORTED:
        raise InputError(f"{config.model_type}: can't be written in PyTorch's form; {NEED_SUPPORTED}")
    named = {}
    for source, (target, transposed) in _paddle_names(config).items():
        if (array := weights.get(f"ptm.{target}")) is not None:
            named[source] = np.ascontiguousarray(array.T if transposed else array)
    return named


def _check_not_cross_encoder(file: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Raises InputError for a classifier of text pairs, which the config beside the weights tells."""
    config_file = file.parent / BACKBONE_CONFIG_FILE
    architectures = read_json(config_file).get("architectures") if config_file.is_file() else None
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    classifier = next((name for name in names if name.endswith("ForSequenceClassification")), None)
    if classifier and any(re.fullmatch(r"classifier\.(\w+\.)?weight", name) for name in weights):
        problem = f"is a cross-encoder ({classifier}), which scores pairs of texts and gives no vectors"
        raise InputError(f"{file.parent}: {problem}; give the model that it was trained from, or an embedding model")


def _paddle_names(config: Any) -> dict[str, tuple[str, bool]]:
    """PyTorch's name -> PaddleNLP's, and whether the matrix is transposed. The layers of all SUPPORTED are BERT's."""
    from paddlenlp.transformers import BertModel

    layers = SimpleNamespace(architectures=["BertModel"], num_hidden_layers=config.num_hidden_layers)
    mappings = BertModel._get_name_mappings(layers)
    names = {mapping.source_name: (mapping.target_name, mapping.action == "transpose") for mapping in mappings}
    return {**names, TASK_EMBEDDINGS: (TASK_EMBEDDINGS, False)}
