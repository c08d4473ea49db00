"""Exporting a model as a folder that sentence-transformers and text-embeddings-inference load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from paddle import nn

from base_model import SemanticIndexBase
from common.files import atomic_write, write_json
from data import BACKBONE_CONFIG_FILE, SPLIT_SYMBOLS, TOKENIZER_CONFIG_FILE, TextTokenizer
from encoding.export import check_difference, largest_difference, write_card
from encoding.hub_card import hub_card
from modeling.checkpoint import LoadedCheckpoint, load_checkpoint
from modeling.checkpoint_files import SAFETENSORS_FILE
from modeling.hugging_face import to_pytorch
from modeling.sentence_transformers_folder import (
    IDENTITY,
    LENGTH_FILE,
    MODULE_CONFIG_FILE,
    MODULES_FILE,
    NORMALIZE_FOLDER,
    POOLER_FOLDER,
    POOLING_FOLDER,
    POOLINGS,
    PROMPTS_FILE,
    REDUCTION_FOLDER,
    TANH,
)
from modeling.tokenizer_files import SPECIAL_TOKENS, TOKENIZER_FILE
from modeling.weight_files import write_safetensors

ARCHITECTURES = {"bert": "BertModel", "ernie": "ErnieModel", "roberta": "RobertaModel"}
CONFIG_FIELDS = (  # that PaddleNLP and transformers have in common
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "vocab_size",
    "pad_token_id",
    "initializer_range",
    "use_task_id",
    "task_type_vocab_size",
)
MODULE_TYPES = "sentence_transformers.models."
README_FILE = "README.md"


def export_sentence_transformers(loaded: LoadedCheckpoint, folder: Path) -> float:
    """Writes encoder, pooling, pooler, linear reduction and normalization as modules into an existing folder.

    Returns the largest difference of the vectors that the folder gives when it is read again from the model's. Raises
    InputError if that exceeds LARGEST_DIFFERENCE, or if the backbone isn't BERT, ERNIE or RoBERTa.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    write_safetensors(folder / SAFETENSORS_FILE, to_pytorch(weights, model.ptm.config))
    write_json(folder / BACKBONE_CONFIG_FILE, transformers_config(model))
    write_tokenizer(folder, tokenizer)
    write_modules(folder, model, weights)
    write_json(folder / LENGTH_FILE, {"max_seq_length": tokenizer.max_seq_length, "do_lower_case": False})
    prompts = {"prompts": model.config.prefixes, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / PROMPTS_FILE, prompts)
    again = load_checkpoint(folder)
    difference = largest_difference(model.embed, again.model.embed, tokenizer)
    check_difference(folder, "model", difference)
    with atomic_write(folder / README_FILE) as file:
        file.write(hub_card(loaded))
    write_card(loaded, folder, {"sentence-transformers": difference})
    return difference


def transformers_config(model: SemanticIndexBase) -> dict[str, Any]:
    """The backbone's config.json for transformers."""
    config = model.ptm.config
    epsilon = next(layer._epsilon for layer in model.ptm.sublayers() if isinstance(layer, nn.LayerNorm))
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in CONFIG_FIELDS if hasattr(config, name)},
        "layer_norm_eps": epsilon,  # PaddleNLP's ERNIE doesn't take it from its config
        "position_embedding_type": "absolute",
    }


def write_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    """Writes tokenizer.json, by which transformers splits texts exactly as `tokenizer` does, and what goes with it."""
    tokenizer.save(folder)  # vocab.txt, for other libraries
    with atomic_write(folder / TOKENIZER_FILE) as file:
        file.write(tokenizer.to_json())
    known = tokenizer.settings["vocabulary"]
    config = {
        # Not BertTokenizer, whose splitting at symbols may differ.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "do_lower_case": tokenizer.lowercases,
        SPLIT_SYMBOLS: tokenizer.splits_symbols,
        "model_max_length": tokenizer.max_seq_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **{name: token for name, token in SPECIAL_TOKENS.items() if token in known},
    }
    write_json(folder / TOKENIZER_CONFIG_FILE, config)


def write_modules(folder: Path, model: SemanticIndexBase, weights: dict[str, np.ndarray]) -> None:
    """Writes modules.json, and the configs and weights of the modules after the encoder."""
    size = model.ptm.config.hidden_size
    pooling = {ours: theirs for theirs, ours in POOLINGS.items()}.get(model.config.pooling, "cls")
    modules = [("", "Transformer"), (POOLING_FOLDER, "Pooling")]
    switches = {f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(folder / POOLING_FOLDER / MODULE_CONFIG_FILE, {"word_embedding_dimension": size, **switches})
    if model.config.pooling == "cls":
        modules.append((POOLER_FOLDER, "Dense"))
        write_dense(folder / POOLER_FOLDER, weights, "ptm.pooler.dense", TANH)
    if model.config.output_emb_size:
        modules.append((REDUCTION_FOLDER, "Dense"))
        write_dense(folder / REDUCTION_FOLDER, weights, "emb_reduce_linear", IDENTITY)
    modules.append((NORMALIZE_FOLDER, "Normalize"))
    (folder / NORMALIZE_FOLDER).mkdir()
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": MODULE_TYPES + kind}
        for number, (path, kind) in enumerate(modules)
    ]
    with atomic_write(folder / MODULES_FILE) as file:
        json.dump(listed, file, indent=2)


def write_dense(folder: Path, weights: dict[str, np.ndarray], name: str, activation: str) -> None:
    """Writes a Dense module of our layer `name`, whose weight is [in, out]."""
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    sizes = dict(zip(("in_features", "out_features"), weight.shape, strict=True))
    write_json(folder / MODULE_CONFIG_FILE, {**sizes, "bias": True, "activation_function": activation})
    write_safetensors(folder / SAFETENSORS_FILE, {"linear.weight": weight.T, "linear.bias": bias})
