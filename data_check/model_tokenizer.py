"""The tokenizer of a model, without the model."""

from pathlib import Path

from data import BACKBONE_CONFIG_FILE, MODEL_CONFIG_FILE, TextTokenizer, check_max_seq_length
from modeling.backbone import find_backbone, load_tokenizer
from modeling.checkpoint_files import PADDLE_WEIGHTS, weights_in
from modeling.hub import model_folder
from modeling.model_settings import DEFAULT_TRAIN_LENGTH, has_model_config, read_model_config


def load_model_tokenizer(params_path: str, max_seq_length: int | None = None) -> TextTokenizer:
    """The tokenizer, with the prefixes, of a checkpoint or of a model to start from.

    params_path: a folder with or without weights, a weights file, or a name; max_seq_length: replaces the model's, or
    DEFAULT_TRAIN_LENGTH or a shorter position table. Raises InputError, also if it exceeds the position table.
    """
    path = Path(params_path)
    folder = path.parent if path.is_file() else model_folder(params_path)
    config = read_model_config(folder) if has_model_config(folder) else None
    weights = weights_in(folder)
    is_own = (folder / MODEL_CONFIG_FILE).is_file() or weights is None or weights.name == PADDLE_WEIGHTS
    length = max_seq_length or (config.max_seq_length if config else DEFAULT_TRAIN_LENGTH)
    if (folder / BACKBONE_CONFIG_FILE).is_file():  # the original scripts save none
        backbone = find_backbone(folder).config.to_dict()
        length = min(length, check_max_seq_length(max_seq_length, backbone, params_path))
    tokenizer = load_tokenizer(folder, length, is_pytorch=not is_own)
    if config:
        tokenizer.prefixes = config.prefixes
    return tokenizer
