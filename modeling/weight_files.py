"""Reading weight files as NumPy arrays without running code from them, and writing them. Imports no Paddle."""

import collections
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import load_file, save

from common.errors import InputError

# An entry that paddle.save adds to every state dict: structured names -> Paddle's internal names.
STRUCTURE_KEY = "StructuredToParameterName@@"


def _latin1_encode(text: str, encoding: str) -> bytes:
    """Replaces `_codecs.encode`, which pickles of protocol 2 call to rebuild bytes, but which accepts any codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


RECONSTRUCT = vars(np.core.multiarray)["_reconstruct"]  # creates an array, whose content is read later


class _WeightsUnpickler(pickle._Unpickler):
    """Loads only the classes and functions that a dict of arrays needs.

    It is the implementation in Python, because the one in C fills the memory if a damaged or hostile file has a large
    index into the table of objects read so far. It is fast enough, since both read an array in one piece.
    """

    ADMITTED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,  # written by NumPy 2
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("builtins", "tuple"): tuple,  # a tensor saved outside of a state dict: (name, array)
        ("__builtin__", "tuple"): tuple,  # its name in protocol 2
        ("_codecs", "encode"): _latin1_encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which weights don't need")
        return self.ADMITTED[module, name]


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Parameter name -> array, from a `.pdparams` or `.safetensors` file.

    Raises InputError if the file is missing or damaged, holds no arrays or anything else, or asks to run code.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            is_safetensors = path.suffix == ".safetensors"
            content = load_file(path) if is_safetensors else _WeightsUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise InputError(f"{path}: no such weights file, or it can't be read ({error.strerror or error})") from None
    except MemoryError:
        raise InputError(f"{path}: asks for more memory than there is; the file may be damaged") from None
    except Exception as error:  # a damaged file raises nearly any exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line
        raise InputError(f"{path}: isn't a weights file, is damaged, or can't be trusted ({reason})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: isn't a weights file (it holds a {type(content).__name__}, not named arrays)")
    if not all(isinstance(name, str) for name in content):
        raise InputError(f"{path}: isn't a weights file (a name in it is no text)")
    weights = {name: _array(path, name, value) for name, value in content.items() if name != STRUCTURE_KEY}
    if not weights:
        raise InputError(f"{path}: isn't a weights file (it is empty)")
    return weights


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes parameter name -> array to a `.safetensors` file. Raises OSError if it can't be written."""
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in weights.items()}))


def _array(path: Path, name: str, value: Any) -> np.ndarray:
    """The array of an entry, which may be an (internal name, array). Raises InputError if it isn't one of numbers."""
    array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise InputError(f"{path}: isn't a weights file ({name!r} is no array)")
    return array
