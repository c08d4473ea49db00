"""The tokenizer of a model, without the model."""

from pathlib import Path

from data import MODEL_CONFIG_FILE, TextTokenizer
from modeling.backbone import load_tokenizer, model_folder
from modeling.checkpoint_files import PADDLE_WEIGHTS, weights_in
from modeling.model_settings import DEFAULT_TRAIN_LENGTH, has_model_config, read_model_config


def load_model_tokenizer(params_path: str, max_seq_length: int | None = None) -> TextTokenizer:
    """The tokenizer, with the prefixes, of a checkpoint or of a model to start from.

    params_path: a folder with or without weights, a weights file, or a name; max_seq_length: replaces the model's, or
    DEFAULT_TRAIN_LENGTH. Raises InputError.
    """
    path = Path(params_path)
    folder = path.parent if path.is_file() else model_folder(params_path)
    config = read_model_config(folder) if has_model_config(folder) else None
    weights = weights_in(folder)
    is_own = (folder / MODEL_CONFIG_FILE).is_file() or weights is None or weights.name == PADDLE_WEIGHTS
    length = max_seq_length or (config.max_seq_length if config else DEFAULT_TRAIN_LENGTH)
    tokenizer = load_tokenizer(folder, length, is_pytorch=not is_own)
    if config:
        tokenizer.prefixes = config.prefixes
    return tokenizer
