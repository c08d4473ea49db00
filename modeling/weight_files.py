"""Reading weight files as NumPy arrays without running code from them, and writing them. Imports no Paddle."""

import collections
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from common.errors import InputError
from common.files import read_json
from modeling.torch_files import BFLOAT16, LEGACY_START, ZIP_START, read_torch_file

# An entry that paddle.save adds to every state dict: structured names -> Paddle's internal names.
STRUCTURE_KEY = "StructuredToParameterName@@"
INDEX_SUFFIX = ".index.json"  # of a file that names the shard of each array
GIT_LFS_START = b"version https://git-lfs"  # of a file that stands for a large one in a Git repository


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
    """Parameter name -> array, from a `.pdparams`, `.safetensors` or `.bin` file, or from the index of its shards.

    bfloat16 is read as uint16, the upper half of a float32. Raises InputError if the file is missing or damaged, holds
    no arrays or anything else, or asks to run code.
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    try:
        with open(path, "rb") as file:
            content = _read_content(path, file)
    except InputError:
        raise
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


def _read_content(path: Path, file: BinaryIO) -> Any:
    """What the file holds, which may be anything. Raises any exception."""
    start = file.read(len(GIT_LFS_START))
    file.seek(0)
    if start == GIT_LFS_START:
        raise InputError(f"{path}: is a pointer of Git LFS, not the weights; get them with git lfs pull")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if start.startswith((ZIP_START, LEGACY_START)):
        return read_torch_file(file)
    return _WeightsUnpickler(file, encoding="latin1").load()


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """As `read_weights`; the package itself has no bfloat16 for NumPy. Raises any exception."""
    with safe_open(path, framework="np") as file:  # checks the whole header
        in_bfloat16 = [name for name in file.keys() if file.get_slice(name).get_dtype() == "BF16"]  # noqa: SIM118
        if not in_bfloat16:
            return file.get_tensors()
        others = [name for name in file.keys() if name not in in_bfloat16]  # noqa: SIM118
        arrays = {name: file.get_tensor(name) for name in others}
    with open(path, "rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
    for name in in_bfloat16:
        start, end = header[name]["data_offsets"]
        numbers = np.fromfile(path, BFLOAT16, (end - start) // 2, offset=8 + size + start)
        arrays[name] = numbers.reshape(header[name]["shape"])
    return arrays


def _read_shards(path: Path) -> dict[str, np.ndarray]:
    """The arrays that an index names, from the files beside it. Raises InputError, also if one is missing."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(_is_file_name(file) for file in files.values()):
        raise InputError(
            f"{path}: isn't an index of shards: its weight_map doesn't give a file beside it for each name"
        )
    shards = sorted(set(files.values()))
    if missing := [name for name in shards if not (path.parent / name).is_file()]:
        problem = f"{len(missing)} of its {len(shards)} shards are missing, such as {missing[0]}"
        raise InputError(f"{path}: {problem}; get them into {path.parent}")
    weights: dict[str, np.ndarray] = {}
    for shard in shards:
        held = read_weights(path.parent / shard)
        for name in (name for name, file in files.items() if file == shard):
            if name not in held:
                raise InputError(f"{path}: names {name!r}, which {shard} lacks; get the index and its shards again")
            weights[name] = held[name]
    return weights


def _is_file_name(value: object) -> bool:
    """Whether it names a weights file in the same folder, and no other index."""
    return isinstance(value, str) and Path(value).name == value and not value.endswith(INDEX_SUFFIX)


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes parameter name -> array to a `.safetensors` file. Raises OSError if it can't be written."""
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in weights.items()}))


def _array(path: Path, name: str, value: Any) -> np.ndarray:
    """The array of an entry, which may be an (internal name, array). Raises InputError if it isn't one of numbers."""
    array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise InputError(f"{path}: isn't a weights file ({name!r} is no array)")
    return array
