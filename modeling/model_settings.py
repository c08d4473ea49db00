"""The settings of a model: those that a checkpoint holds, those that the user gives, and the defaults."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from base_model import ModelConfig
from common.errors import InputError
from common.files import read_json
from common.logs import log
from common.options import DEFAULT_DROPOUT, DEFAULT_EMBEDDING_SIZE, DEFAULT_MODEL, DEFAULT_POOLING, POOLINGS
from data import BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE, VOCABULARY_FILE, TextTokenizer
from modeling.backbone import Backbone, find_backbone, load_tokenizer
from modeling.checkpoint_files import check_checkpoint
from modeling.model_cache import cached_folder
from modeling.sentence_transformers_folder import is_sentence_transformers_folder, read_sentence_transformers_folder
from modeling.tokenizer_files import has_tokenizer
from modeling.weight_files import read_weights

DEFAULT_TRAIN_LENGTH = 512  # of train_batch_neg.py; less for a shorter position table
PREFIXES = ("query_prefix", "document_prefix")
NOT_OF_THE_MODEL = ("_name_or_path", "paddlenlp_version")  # of a backbone's config: don't change the vectors


class ModelSettings(NamedTuple):
    """The values of the options of training that describe the model; the defaults are those of a new model."""

    output_emb_size: int = DEFAULT_EMBEDDING_SIZE
    pooling: str = DEFAULT_POOLING
    dropout: float = DEFAULT_DROPOUT
    max_seq_length: int | None = None  # None: DEFAULT_TRAIN_LENGTH, or the size of the position table if that is less
    query_prefix: str = ""
    document_prefix: str = ""


class HeldSettings(NamedTuple):
    """What the checkpoint holds that a training starts from."""

    source: Path | None = None  # its folder, or its weights file if that is all there is; None: there is no checkpoint
    values: Mapping[str, Any] = {}  # some or all fields of ModelSettings

    def resolve(self, given: Mapping[str, Any]) -> ModelSettings:
        """The settings of a training. given: values by name; None means not given, and other names are ignored."""
        chosen = {name: given[name] for name in ModelSettings._fields if given.get(name) is not None}
        return ModelSettings()._replace(**{**self.values, **chosen})

    def report(self, given: Mapping[str, Any], resolved: ModelSettings, backbone: str | None) -> None:
        """Logs what is taken from the checkpoint, given values that differ, and what is assumed since it lacks it.

        given: values by name, without None; backbone: the name or folder that is given for it, if any.
        """
        if self.source is None:
            return
        untold = {name: value for name, value in self.values.items() if name not in given and value != ""}
        if taken := ", ".join(described(name, value) for name, value in untold.items()):
            log(f"{self.source}: going on with its settings: {taken}")
        for name, value in given.items():
            report_difference(name, value, self.source, self.values.get(name, value))
        known = {*self.values, *given}
        assumed = {name: value for name, value in resolved._asdict().items() if name not in known and value != ""}
        report_assumed(self.source, assumed, backbone)


def described(name: str, value: Any) -> str:
    """A setting in a message; prefixes are quoted, since spaces at their ends count."""
    return f"{name} {value!r}" if name.endswith("_prefix") else f"{name} {value}"


def report_difference(name: str, value: Any, source: Path, held: Any) -> None:
    """Logs an option whose value isn't the one that a checkpoint holds."""
    if value != held:
        value_held = described(name, held).removeprefix(f"{name} ")
        log(f"--{described(name, value)}: {source} was trained with {value_held}")


def report_assumed(source: Path, settings: Mapping[str, Any], backbone: str | None) -> None:
    """Logs what is assumed for each file that a checkpoint lacks.

    settings: those that semantic_index.json would tell; backbone: the given name or folder, None if none is given.
    """
    folder = source if source.is_dir() else source.parent
    default = None if backbone else DEFAULT_MODEL
    if is_sentence_transformers_folder(folder):
        settings = {}
    told_by = {
        BACKBONE_CONFIG_FILE: {"backbone": default},
        VOCABULARY_FILE: {"vocabulary": default},
        MODEL_CONFIG_FILE: settings,
    }
    assumed = {
        file: [f"{name} {value}" for name, value in values.items() if value is not None]
        for file, values in told_by.items()
        if not (has_tokenizer(folder) if file == VOCABULARY_FILE else (folder / file).is_file())
    }
    if files := [file for file, values in assumed.items() if values]:
        log(f"{source}: has no {', '.join(files)}; assuming {', '.join(chain.from_iterable(assumed.values()))}")


def report_scratch_folder(
    folder: Path, checkpoint: Path | None, backbone: Backbone, tokenizer: TextTokenizer, settings: ModelSettings
) -> None:
    """Logs what the folder of `--from_scratch` holds and a training doesn't use.

    checkpoint: the folder that the weights come from, if they aren't random; backbone: that of `folder`; tokenizer,
    settings: the training's.
    """
    option = f"--from_scratch {folder}"
    if (folder / MODEL_CONFIG_FILE).is_file():
        held, ours = asdict(read_model_config(folder)), settings._asdict()
        changed = [name for name in ours if held[name] != ours[name]]
        if values := ", ".join(f"{described(name, ours[name])}, not {held[name]}" for name in changed):
            log(f"{option}: its {MODEL_CONFIG_FILE} isn't used: {values}")
    if checkpoint and (checkpoint / BACKBONE_CONFIG_FILE).is_file():
        config, other = backbone.config.to_dict(), find_backbone(checkpoint).config.to_dict()
        names = [name for name in {**config, **other} if name not in NOT_OF_THE_MODEL]
        changed = [name for name in names if config.get(name) != other.get(name)]
        if values := ", ".join(f"{name} {config.get(name)}, not {other.get(name)}" for name in changed):
            log(f"{option}: its {BACKBONE_CONFIG_FILE} takes the place of that of {checkpoint}: {values}")
    if not (checkpoint and has_tokenizer(checkpoint) and has_tokenizer(folder)):
        return
    other = load_tokenizer(folder, tokenizer.max_seq_length, is_pytorch=not tokenizer.splits_symbols)
    if other.settings != tokenizer.settings:
        log(f"{option}: its tokenizer isn't used, {checkpoint} has its own")


def report_backbone_dropout(dropout: float | None, backbone: Backbone) -> None:
    """Logs the backbone's rate if another is given for the vector."""
    rate = getattr(backbone.config, "hidden_dropout_prob", dropout)
    if dropout not in (None, rate):
        log(f"--dropout {dropout}: of the vector; the backbone's stays {rate} (hidden_dropout_prob in its config.json)")


def held_settings(init_from_ckpt: str | None, from_scratch: str | None, model_name_or_path: str | None) -> HeldSettings:
    """The settings that the checkpoint of `init_from_ckpt`, or the one in the folder `model_name_or_path`, holds.

    One of the original scripts holds only the length of its vectors, in the weights. Raises InputError.
    """
    if init_from_ckpt:
        file = check_checkpoint(init_from_ckpt)
        if has_model_config(file.parent):
            return HeldSettings(file.parent, _held_values(file.parent))
        size = reduced_size(read_weights(file))
        return HeldSettings(file, {"output_emb_size": size} if size else {})
    folder = cached_folder(model_name_or_path or DEFAULT_MODEL)
    if not from_scratch and folder and has_model_config(folder):
        return HeldSettings(folder, _held_values(folder))
    return HeldSettings()


def _held_values(folder: Path) -> dict[str, Any]:
    """The settings in a folder with a model config; sentence-transformers' may not tell the length."""
    values = asdict(read_model_config(folder))
    if not (folder / MODEL_CONFIG_FILE).is_file() and not read_sentence_transformers_folder(folder).max_seq_length:
        del values["max_seq_length"]
    return values


def has_model_config(folder: Path) -> bool:
    """Whether a folder tells the settings of a model: a checkpoint, or one in the form of sentence-transformers."""
    return (folder / MODEL_CONFIG_FILE).is_file() or is_sentence_transformers_folder(folder)


def read_model_config(folder: Path) -> ModelConfig:
    """The settings in a folder with a model config, see `has_model_config`. Raises InputError."""
    file = folder / MODEL_CONFIG_FILE
    if not file.is_file():
        told = read_sentence_transformers_folder(folder)
        length = told.max_seq_length or DEFAULT_TRAIN_LENGTH
        return ModelConfig(told.output_emb_size, told.pooling, 0.0, length, told.query_prefix, told.document_prefix)
    content = read_json(file)
    prefixes = {name: content.get(name, "") for name in PREFIXES}
    try:
        size, length = int(content["output_emb_size"]), int(content["max_seq_length"])
        config = ModelConfig(size, str(content["pooling"]), float(content["dropout"]), length, **prefixes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: isn't a model config (see {error})") from None
    are_texts = all(isinstance(prefix, str) for prefix in prefixes.values())
    if config.pooling not in POOLINGS or size < 0 or length < 3 or not 0 <= config.dropout < 1 or not are_texts:
        raise InputError(f"{file}: has a value out of range")
    return config


def reduced_size(weights: Mapping[str, np.ndarray]) -> int:
    """The length of the vectors that a linear reduction among the weights gives; 0 if there is none."""
    reduction = weights.get("emb_reduce_linear.weight")
    return int(reduction.shape[-1]) if reduction is not None and reduction.ndim else 0
