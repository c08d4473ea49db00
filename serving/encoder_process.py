"""An encoder in a process of its own, because Paddle Inference holds Python's lock while it runs.

`python -m serving.encoder_process FD JSON` is that process.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from common.environment import remove_temporary_home
from common.errors import InputError
from common.logs import log
from common.options import STATIC_FROM_TEXTS

ROOT = Path(__file__).resolve().parents[1]
STOP_SECONDS = 5.0


class EncoderOptions(NamedTuple):
    """The options of `load_exported`, and the file of its calibration texts."""

    model_dir: str
    device: str
    precision: str
    threads: int | None
    max_seq_length: int | None
    batch_size: int
    engine: str = ""
    calibration_file: str = ""
    min_overlap: float = 0.0


class EncoderStopped(Exception):
    """The process ended, or reported an error, instead of encoding."""


class EncoderProcess:
    """Starts the process and waits until it has encoded something. Raises InputError if the model can't be used.

    The process ends with `close`, and when this process ends in any way. Only one thread may use it at a time.
    """

    def __init__(self, options: EncoderOptions) -> None:
        self._options = options
        self.broken = False  # whether the last start failed
        self._start()

    def _start(self) -> None:
        try:
            self._connection, child = Pipe()
            python_path = os.environ.get("PYTHONPATH")
            with child:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(child.fileno()), json.dumps(self._options)],
                    pass_fds=[child.fileno()],
                    # -m puts the working folder first, and one with a data.py or a folder common would take our place.
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [python_path])])},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the service alone
                )
        except OSError as error:
            self.broken = True
            remedy = "raise the limit on memory, processes or open files"
            raise InputError(
                f"{self._options.model_dir}: no process to load it can be started ({error.strerror}); {remedy}"
            ) from None
        try:
            message = self._receive()
        except EncoderStopped:
            message = f"{self._options.model_dir}: the process that loads it ended; is there memory enough?"
        self.broken = message is not None
        if message:
            self.close()
            raise InputError(message)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors, float32 [N, D]; a process that has died is restarted once. Raises EncoderStopped."""
        try:
            vectors = self._ask(texts)
        except EncoderStopped:
            try:
                self._start()
            except InputError as error:
                raise EncoderStopped(f"can't be started again: {error}") from None
            vectors = self._ask(texts)
        if isinstance(vectors, str):
            raise EncoderStopped(vectors)
        return vectors

    def _ask(self, texts: Sequence[str]) -> Any:
        with contextlib.suppress(OSError):  # _receive reports how it ended
            self._connection.send(list(texts))
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError, MemoryError):  # after a MemoryError a part is unread
            self._connection.close()
            self._process.wait()
            raise EncoderStopped(f"ended with exit code {self._process.returncode}") from None

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(connection: Connection, options: EncoderOptions) -> None:
    """Answers lists of texts with their vectors until the other end is closed; a string as an answer is an error."""
    from common.paddle_setup import set_up_paddle

    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        set_up_paddle()
        from common.device import choose_device
        from data import read_texts
        from encoding.exported_model import load_exported

        given = {name: value for name, value in options._asdict().items() if name != "calibration_file"}
        texts = read_texts(options.calibration_file) if options.calibration_file else None
        device = choose_device(options.device)
        many = STATIC_FROM_TEXTS  # so that the engine "auto" measures
        encoder = load_exported(**{**given, "device": device}, text_count=many, calibration_texts=texts)
        if encoder.fidelity:
            log(f"{encoder.precision}: {encoder.fidelity}")
        encoder.encode(["warm up"] * options.batch_size)
    except InputError as error:
        connection.send(str(error))
        return
    except Exception as error:  # such as the OSErrors in which Paddle reports CUDA's errors
        connection.send(f"{options.model_dir}: {type(error).__name__}: {error}")
        return
    connection.send(None)
    while True:
        texts = connection.recv()
        try:
            vectors = encoder.encode(texts)
        except Exception as error:
            connection.send(f"{type(error).__name__} in encoding {len(texts)} texts")
            if options.device == "gpu":  # after a CUDA error this process may not be able to use it any more
                return
        else:
            connection.send(vectors)


def main(argv: Sequence[str]) -> NoReturn:
    """Runs until the service closes the connection or ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to every process; the service ends this one
    with Connection(int(argv[0])) as connection, contextlib.suppress(EOFError, OSError):  # the service is gone
        serve(connection, EncoderOptions(*json.loads(argv[1])))
    remove_temporary_home()
    os._exit(0)  # skips the second that Paddle needs to shut down


if __name__ == "__main__":
    main(sys.argv[1:])
