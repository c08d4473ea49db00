"""Reading files of `torch.save` as NumPy arrays, without PyTorch and without running code from them."""

import io
import math
import mmap
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

ZIP_START = b"PK\x03\x04"  # PyTorch 1.6 and later write a zip file
LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # before: pickles, of which the first is this number
LEGACY_PROTOCOL = 1001  # the second
LOCAL_HEADER = 30  # bytes of a zip entry's header, before its name and extra field
LARGEST_DIMENSIONS = 8
BFLOAT16 = "<u2"  # NumPy has no bfloat16: uint16, as in Paddle's files
STORAGE_TYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    """Numbers that several tensors may be views of."""

    key: str
    dtype: str
    length: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _refuse(problem: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(problem)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _rebuild_tensor(storage: object, offset: Any, shape: Any, strides: Any, *_: object) -> _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2; what follows the strides is about gradients."""
    numbers = [offset, *shape, *strides]
    if type(storage) is not _Storage or len(shape) != len(strides) or len(shape) > LARGEST_DIMENSIONS:
        raise _refuse("a tensor isn't a view of a storage")
    if not all(map(_is_size, numbers)):
        raise _refuse("a tensor's offset, shape or strides are no sizes")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: object, *_: object) -> object:
    """Stands for torch._utils._rebuild_parameter: a parameter is its tensor."""
    return tensor


def _ordered_dict() -> OrderedDict:
    """Stands for collections.OrderedDict, which is pickled as an empty one whose items follow."""
    return OrderedDict()


def _opcodes(*names: str) -> dict[int, Any]:
    """The implementations of pickle's opcodes by their bytes."""
    return {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in names}


class _TensorUnpickler(pickle._Unpickler):
    """Loads only what a dict of tensors needs: its classes, functions and opcodes.

    It is the implementation in Python, for the reason given at `weight_files._WeightsUnpickler`. Keys are texts alone:
    the hash of a deeply nested tuple never ends, or ends the process.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    ADMITTED: ClassVar = {
        ("collections", "OrderedDict"): _ordered_dict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        **{("torch", name): _StorageType(dtype) for name, dtype in STORAGE_TYPES.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise _refuse(f"it wants to load {module}.{name}, which tensors don't need")
        return self.ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or type(pid[0]) is not str or pid[0] != "storage":
            raise _refuse("it refers to something other than a storage")
        _, storage_type, key, _, count, *view = pid
        if type(storage_type) is not _StorageType or type(key) is not str or not re.fullmatch("[0-9]{1,20}", key):
            raise _refuse("it refers to a storage of another kind")
        if not _is_size(count) or view not in ([], [None]):
            raise _refuse(f"storage {key} has no size, or is a part of another one")
        return _Storage(key, storage_type.dtype, count)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise _refuse("it sets items of something other than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise _refuse("a name in it is no text")
            target[key] = value

    def _load_build(self) -> None:
        """Drops the attributes of an object: state dicts have `_metadata`, versions of PyTorch's layers."""
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise _refuse("it sets attributes of something other than a dict")

    dispatch: ClassVar[dict[int, Any]] = {
        **_opcodes("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
        **_opcodes("LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "EMPTY_DICT"),
        **_opcodes("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "REDUCE"),
        **_opcodes("GLOBAL", "STACK_GLOBAL", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE", "BINPERSID"),
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.BUILD[0]: _load_build,
    }

    def load(self) -> Any:
        """The object; raises pickle.UnpicklingError also where an opcode isn't admitted."""
        try:
            return super().load()
        except KeyError as error:  # of `dispatch` or of the table of objects
            raise _refuse(f"it has the operation {error}, which tensors don't need") from None


def read_torch_file(file: BinaryIO) -> Any:
    """The content of a file that torch.save has written: name -> array, if it is a state dict.

    The arrays are read-only views of the file. Raises what a damaged file makes of it, and pickle.UnpicklingError if it
    needs more than tensors.
    """
    memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    content, storages = _read_zip(file, memory) if memory[:4] == ZIP_START else _read_legacy(file, memory)
    if not isinstance(content, dict):
        return content
    return {name: _view(value, storages) if type(value) is _Tensor else value for name, value in content.items()}


def _read_zip(file: BinaryIO, memory: memoryview) -> tuple[Any, dict[str, memoryview]]:
    """The pickled object and the bytes of the storages by key. Nothing is unpacked: PyTorch doesn't compress."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if re.fullmatch("[^/]+/data.pkl", name)]
    if len(pickles) != 1:
        raise _refuse(f"the zip file has {len(pickles)} data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if (order := f"{folder}byteorder") in entries and bytes(_entry(memory, entries[order])) != b"little":
        raise _refuse("its numbers are big-endian")
    content = _TensorUnpickler(io.BytesIO(_entry(memory, entries[pickles[0]])), encoding="latin1").load()
    data = re.compile(re.escape(folder) + "data/([0-9]+)")
    found = {match[1]: entry for name, entry in entries.items() if (match := data.fullmatch(name))}
    return content, {key: _entry(memory, entry) for key, entry in found.items()}


def _entry(memory: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of an entry that is neither compressed nor encrypted."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise _refuse(f"{entry.filename} in the zip file is compressed, which torch.save never does")
    header = memory[entry.header_offset : entry.header_offset + LOCAL_HEADER]
    if header[:4] != ZIP_START:
        raise _refuse(f"{entry.filename} isn't in the zip file")
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + LOCAL_HEADER + names
    if start + entry.file_size > len(memory):
        raise _refuse(f"{entry.filename} ends behind the zip file")
    return memory[start : start + entry.file_size]


def _read_legacy(file: BinaryIO, memory: memoryview) -> tuple[Any, dict[str, memoryview]]:
    """As `_read_zip`. The file is five pickles, of which the last lists the keys, and then the storages."""
    _, protocol, system, content, keys = (_TensorUnpickler(file, encoding="latin1").load() for _ in range(5))
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _refuse("it has another protocol, or its numbers are big-endian")
    sizes = _element_sizes(content)
    storages: dict[str, memoryview] = {}
    position = file.tell()
    for key in keys:
        if type(key) is not str or key not in sizes:
            raise _refuse("it lists a storage that no tensor needs")
        count, position = int.from_bytes(memory[position : position + 8], "little"), position + 8
        end = position + count * sizes[key]
        if end > len(memory):
            raise _refuse(f"storage {key} ends behind the file")
        storages[key], position = memory[position:end], end
    return content, storages


def _element_sizes(content: Any) -> dict[str, int]:
    """Bytes of a number in each storage that a tensor of the dict needs, by key."""
    if not isinstance(content, dict):
        return {}
    tensors = [value for value in content.values() if type(value) is _Tensor]
    return {tensor.storage.key: np.dtype(tensor.storage.dtype).itemsize for tensor in tensors}


def _view(tensor: _Tensor, storages: dict[str, memoryview]) -> np.ndarray:
    """The tensor as an array in its storage's memory."""
    key, dtype, count = tensor.storage
    if key not in storages:
        raise _refuse(f"storage {key} is missing")
    if len(storages[key]) != count * np.dtype(dtype).itemsize:
        raise _refuse(f"storage {key} has {len(storages[key])} bytes, not {count} numbers of {dtype}")
    size = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if size and (size > count or last >= count):
        raise _refuse(f"a tensor of shape {list(tensor.shape)} reaches behind storage {key}")
    if not size:
        return np.empty(tensor.shape, dtype)
    numbers = np.frombuffer(storages[key], dtype)[tensor.offset :]
    steps = [stride * numbers.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers, tensor.shape, steps, writeable=False)
