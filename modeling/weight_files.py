"""Reading weight files as NumPy arrays without running code from them, and writing them. Imports no Paddle."""

import collections
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import load_file, save

from common.errors import InputError

# paddle.save adds this entry, which maps structured names to internal ones, to every state dict.
STRUCTURE_KEY = "StructuredToParameterName@@"


def _latin1_encode(text: str, encoding: str) -> bytes:
    """Pickles of protocol 2 call this to rebuild bytes; `_codecs.encode` itself would accept any codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


RECONSTRUCT = vars(np.core.multiarray)["_reconstruct"]  # makes an array before its content is read


class _WeightsUnpickler(pickle._Unpickler):
    """Admits only the names that arrays in a dict need.

    It is Python's own implementation: the one in C fills the memory if a damaged or hostile file uses a large index
    into the table of objects read so far. Both read an array in one piece.
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

    Raises InputError if the file is missing, damaged, holds anything but arrays, or asks to run code.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            safe = path.suffix == ".safetensors"
            content = load_file(path) if safe else _WeightsUnpickler(file, encoding="latin1").load()
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
    weights = {}
    for name, value in content.items():
        if name != STRUCTURE_KEY:
            array = _array(value)
            if array is None:
                raise InputError(f"{path}: isn't a weights file ({name!r} is no array)")
            weights[name] = array
    if not weights:
        raise InputError(f"{path}: isn't a weights file (it is empty)")
    return weights


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes parameter name -> array. Raises OSError if it can't be written."""
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in weights.items()}))


def _array(value: Any) -> np.ndarray | None:
    if isinstance(value, tuple) and len(value) == 2:
        value = value[1]
    return value if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else None
