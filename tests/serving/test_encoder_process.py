import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest

from common import device
from common.errors import InputError
from encoding import exported_model
from encoding.text_encoder import Encoder
from helpers import children
from serving import encoder_process
from serving.encoder_process import EncoderOptions, EncoderProcess, EncoderStopped, serve


def test_an_encoder_reports_why_it_cannot_load_or_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's errors are OSErrors; after one on a GPU the process ends, since it may not be able to use CUDA again."""

    def sent(load: Callable[..., Any]) -> list[Any]:
        monkeypatch.setattr(exported_model, "load_exported", load)
        answers: list[Any] = []
        connection = SimpleNamespace(send=answers.append, recv=lambda: ["a"])
        serve(connection, EncoderOptions("model", "gpu", "fp32", None, None, 1))
        return answers

    def embed(input_ids: np.ndarray, _: np.ndarray) -> np.ndarray:
        if input_ids[0, 0] == 1:
            raise OSError("(External) CUDA error(700)")
        return np.zeros((len(input_ids), 2), np.float32)

    tokenizer = SimpleNamespace(
        max_seq_length=8, prefixed=lambda texts, _: texts, lengths=lambda ids: list(map(len, ids))
    )
    tokenizer.tokenize = lambda texts: [[int(text == "a")] for text in texts]
    tokenizer.pad = lambda ids: (np.array(ids), np.array(ids))
    monkeypatch.setattr(device, "choose_device", str)
    assert sent(MagicMock(side_effect=OSError("(External) CUDA error(803)"))) == [
        "model: OSError: (External) CUDA error(803)"
    ]
    exported = Encoder(embed, tokenizer, 2, 1)
    assert sent(lambda *_, **__: exported) == [None, "OSError in encoding 1 texts"]


@pytest.mark.process
def test_an_encoder_that_cannot_be_started_again(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays broken until a later request can start it."""
    others = children(os.getpid())
    encoder = EncoderProcess(EncoderOptions(str(exported), "cpu", "fp32", 1, None, 4))
    (process,) = {*children(os.getpid())}.difference(others)
    os.kill(process, signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(encoder_process, "Pipe", Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
        for _ in range(2):
            with pytest.raises(EncoderStopped, match=r"can't be started again: .*Too many open files.*raise the limit"):
                encoder.encode(["水稻"])
            assert encoder.broken
    assert encoder.encode(["水稻"]).shape == (1, 16) and not encoder.broken
    encoder.close()


@pytest.mark.process
def test_a_model_that_cannot_be_loaded(exported: Path, tmp_path: Path) -> None:
    """The error of the process is passed on, and the process ends."""
    folder = shutil.copytree(exported, tmp_path / "output")
    weights = folder / "inference.get_pooled_embedding.pdiparams"
    weights.write_bytes(weights.read_bytes()[:1000])
    others = children(os.getpid())
    with pytest.raises(InputError, match=rf"{weights.name}.*export_model\.py"):
        EncoderProcess(EncoderOptions(str(folder), "cpu", "fp32", 1, None, 4))
    assert children(os.getpid()) == others
