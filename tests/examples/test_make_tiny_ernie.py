from pathlib import Path

from common.files import read_json
from data import read_vocabulary
from examples import make_tiny_ernie


def test_the_tiny_ernie_s_config_is_complete() -> None:
    config = read_json(make_tiny_ernie.TINY_ERNIE_CONFIG)
    assert config["model_type"] == "ernie"
    assert config["hidden_size"] % config["num_attention_heads"] == 0


def test_the_folder_has_a_config_with_the_vocabulary_s_size(dataset: Path, tmp_path: Path) -> None:
    files = ["--train_set_file", str(dataset / "train.csv"), "--corpus_file", str(dataset / "corpus.csv")]
    assert make_tiny_ernie.main([*files, "--vocab_size", "5000", "--output_dir", str(tmp_path / "ernie")]) == 0
    vocabulary = read_vocabulary(tmp_path / "ernie" / "vocab.txt")
    config = read_json(tmp_path / "ernie" / "config.json")
    assert config == {**read_json(make_tiny_ernie.TINY_ERNIE_CONFIG), "vocab_size": len(vocabulary)}
