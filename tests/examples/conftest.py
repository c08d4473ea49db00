from pathlib import Path

import pytest

from examples import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a dataset that make_dataset.py wrote."""
    folder = tmp_path_factory.mktemp("dataset")
    options = ["--documents", "3000", "--train_pairs", "1500", "--dev_pairs", "100", "--test_pairs", "400"]
    assert make_dataset.main(["--output_dir", str(folder), *options]) == 0
    return folder / "recall"
