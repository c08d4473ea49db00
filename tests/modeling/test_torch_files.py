"""Files of torch.save: what is read, and what is refused. The files are those of data/hugging_face, or made here."""

import os
import pickle
import random
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import InputError
from helpers import ROOT, Calls, weights_refusal
from modeling.weight_files import read_weights

DATA = ROOT / "tests" / "data" / "hugging_face"
FORMATS = ("tensors.bin", "tensors_legacy.bin")
MARKER = "marker"  # the file that each call would leave in the current folder


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def plain(value: Any) -> bytes:
    """The opcodes of numbers and tuples."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(plain, value)) + b"t"
    return text(value) if isinstance(value, str) else pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(key: bytes = text("0"), kind: bytes = named("torch", "FloatStorage"), count: Any = 4) -> bytes:
    return b"(" + text("storage") + kind + key + text("cpu") + plain(count) + b"tQ"


def tensor(
    of: bytes = storage(), offset: Any = 0, shape: Any = (2, 2), strides: Any = (2, 1), *, more: bytes = b""
) -> bytes:
    arguments = of + plain(offset) + plain(shape) + plain(strides) + b"\x89" + more
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def state(value: bytes, name: bytes = text("linear.weight")) -> bytes:
    return b"\x80\x02}" + name + value + b"s."


def write_zip(
    path: Path, raw: bytes, storages: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", raw)
        for key, numbers in ({"0": np.arange(4, dtype="<f4").tobytes()} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", numbers)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Files that are read


@pytest.mark.parametrize("name", FORMATS)
def test_views_of_all_types_are_read_in_both_formats(name: str) -> None:
    """Transposed, cut, with steps, with other numbers than float32; bfloat16 as uint16."""
    found, expected = read_weights(DATA / name), read_weights(DATA / "tensors.safetensors")
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    assert found["bfloat16"].dtype == np.uint16
    np.testing.assert_array_equal(found["transposed"], found["matrix"].T)


def test_the_files_made_here_are_read_where_nothing_is_wrong(tmp_path: Path) -> None:
    """So the refusals below are of what each of them changes."""
    found = read_weights(write_zip(tmp_path / "pytorch_model.bin", state(tensor())))
    np.testing.assert_array_equal(found["linear.weight"], [[0, 1], [2, 3]])


def test_attributes_of_a_state_dict_are_dropped(tmp_path: Path) -> None:
    """torch.save keeps `_metadata`, the versions of the layers."""
    attributes = b"}" + text("_metadata") + b"}" + text("") + b"}" + text("version") + b"K\x01sssb"
    raw = b"\x80\x02" + named("collections", "OrderedDict") + b")R" + text("w") + tensor() + b"s" + attributes + b"."
    assert list(read_weights(write_zip(tmp_path / "pytorch_model.bin", raw))) == ["w"]


# ---------------------------------------------------------------------------------------------------------------------
# Files that ask for code to be run

CALLS: dict[str, bytes] = {
    "os.system": named("posix", "system") + plain((f"touch {MARKER}",)) + b"R",
    "builtins.eval": named("builtins", "eval") + plain((f"open('{MARKER}', 'w')",)) + b"R",
    "__builtin__.exec": named("__builtin__", "exec") + plain((f"open('{MARKER}', 'w')",)) + b"R",
    "getattr chain": named("builtins", "getattr") + b"(" + named("os", "path") + text("os") + b"tR",
    "subprocess": named("subprocess", "Popen") + plain((("touch", MARKER),)) + b"R",
    "runpy": named("runpy", "run_path") + plain((MARKER,)) + b"R",
    "torch.load": named("torch", "load") + plain((MARKER,)) + b"R",
    "torch.serialization": named("torch.serialization", "load") + plain((MARKER,)) + b"R",
    "torch.jit": named("torch.jit", "load") + plain((MARKER,)) + b"R",
    "torch.hub": named("torch.hub", "load") + plain((MARKER, MARKER)) + b"R",
    "torch.storage": named("torch.storage", "_load_from_bytes") + b"(U\x01xtR",
    "a name with dots": b"\x8c\x05torch\x8c\x13FloatStorage.__new__\x93",
    "a module's member": named("torch._utils", "importlib.import_module") + plain(("os",)) + b"R",
    "a script's class": named("__torch__.Model", "Model") + b")R",
    "INST": b"(S'touch marker'\niposix\nsystem\n",
    "OBJ": b"(" + named("posix", "system") + b"S'touch marker'\no",
    "NEWOBJ": named("collections", "OrderedDict") + b")\x81",
    "a registered extension": b"\x82\x01",
    "attributes of a function": named("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("__code__") + b"K\x01s\x86b",
    "attributes of a dict": b"}}" + text("x") + b"K\x01sb",
    "a call of a type": named("torch", "FloatStorage") + b")R",
    "a call in a tensor's hooks": tensor(more=named("posix", "system") + plain((f"touch {MARKER}",)) + b"R"),
    "a call in a persistent id": b"(" + named("posix", "system") + plain((f"touch {MARKER}",)) + b"RtQ",
    "a call as a name": b"0}" + named("posix", "system") + plain((f"touch {MARKER}",)) + b"RK\x01s",
    "a pickle of bytes": b"C\x01x",
}


@pytest.mark.parametrize("case", CALLS)
def test_what_tensors_do_not_need_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_zip(tmp_path / "pytorch_model.bin", state(CALLS[case]))
    assert "can't be trusted" in weights_refusal(path)
    assert os.listdir(tmp_path) == [path.name]


def test_plain_unpickling_would_have_made_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(state(CALLS["os.system"]))
    assert os.listdir(tmp_path) == [MARKER]


@pytest.mark.parametrize("place", range(5))
def test_each_pickle_of_the_format_before_1_6_is_refused_if_it_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.chdir(tmp_path)
    good = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])
    pickles = [pickle.dumps(value, 2) for value in good]
    pickles[place] = pickle.dumps(Calls(os.system, f"touch {MARKER}"), 2)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"".join(pickles))
    assert "system" in weights_refusal(path)
    assert os.listdir(tmp_path) == [path.name]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that reach beyond their storage, and storages that aren't there

DEEP = b")" + b"\x85" * 200_000  # a tuple nested deeper than a hash or print can go

TENSORS: dict[str, tuple[bytes, str]] = {
    "a huge shape": (tensor(shape=(2**40, 2**40)), "reaches behind"),
    "a huge expanded shape": (tensor(shape=(2**40, 2), strides=(0, 1)), "reaches behind"),
    "a huge empty shape": (tensor(shape=(0, 2**62), strides=(1, 1)), ""),
    "an integer of many digits": (tensor(shape=(2**400, 1)), "no sizes"),
    "a negative stride": (tensor(strides=(-2, 1)), "no sizes"),
    "a negative offset": (tensor(offset=-1), "no sizes"),
    "a negative shape": (tensor(shape=(-2, 2)), "no sizes"),
    "an offset beyond": (tensor(offset=1), "reaches behind"),
    "a stride beyond": (tensor(strides=(3, 1)), "reaches behind"),
    "a shape of floats": (tensor(shape=(2.0, 2)), "no sizes"),
    "a shape of flags": (tensor(shape=(True, 2)), "no sizes"),
    "a shape of text": (tensor(shape="22"), "no sizes"),
    "fewer strides": (tensor(strides=(1,)), "a view"),
    "nine dimensions": (tensor(shape=(1,) * 9, strides=(1,) * 9), "a view"),
    "no storage": (tensor(plain("0")), "a view"),
    "another storage": (tensor(storage(text("7"))), "storage 7 is missing"),
    "a path": (tensor(storage(text("../../etc/passwd"))), "another kind"),
    "a key of another script": (tensor(storage(text("٣"))), "another kind"),
    "a key that is no text": (tensor(storage(plain(0))), "another kind"),
    "a longer storage": (tensor(storage(count=2**40)), "has 16 bytes"),
    "a negative storage": (tensor(storage(count=-4)), "no size"),
    "other numbers": (tensor(storage(kind=named("torch", "DoubleStorage"))), "has 16 bytes"),
    "unknown numbers": (tensor(storage(kind=named("torch", "ComplexFloatStorage"))), "ComplexFloatStorage"),
    "a type by name": (tensor(storage(kind=text("FloatStorage"))), "another kind"),
    "another persistent id": (tensor(plain(("module", "0", "1", "2", 3)) + b"Q"), "other than a storage"),
    "a short persistent id": (tensor(plain(("storage",)) + b"Q"), "other than a storage"),
    "no tuple as an id": (tensor(text("storage") + b"Q"), "other than a storage"),
    "a deep persistent id": (tensor(DEEP + b"Q"), "other than a storage"),
    "a dict in itself": (b"}q\x05" + text("a") + b"h\x05s", "is no array"),
    "a deep tuple": (DEEP, "is no array"),
    "a list of tensors": (b"]" + tensor() + b"a", "is no array"),
    "a tensor in a pair": (text("a") + tensor() + b"\x86", "is no array"),
    "the object that isn't there": (b"h\x09", "Memo"),
    "items of a tensor": (tensor() + text("a") + b"K\x01s", "other than a dict"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_its_storage_does_not_hold_is_refused(tmp_path: Path, case: str) -> None:
    raw, said = TENSORS[case]
    assert said in weights_refusal(write_zip(tmp_path / "pytorch_model.bin", state(raw)))


@pytest.mark.parametrize("key", [DEEP, plain(1), plain(("a", 1)), tensor()], ids=["deep", "number", "tuple", "tensor"])
@pytest.mark.parametrize("end", [b"s.", b"u."])
def test_a_name_that_is_no_text_is_refused_before_it_is_hashed(tmp_path: Path, key: bytes, end: bytes) -> None:
    raw = b"\x80\x02}" + (b"(" if end == b"u." else b"") + key + tensor() + end
    assert "is no text" in weights_refusal(write_zip(tmp_path / "pytorch_model.bin", raw))


def test_refusing_sizes_takes_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for raw in (tensor(shape=(2**32,), strides=(0,)), tensor(storage(count=2**33), shape=(2**33,), strides=(1,))):
        weights_refusal(write_zip(tmp_path / "pytorch_model.bin", state(raw)))
    weights_refusal(write_zip(tmp_path / "pytorch_model.bin", b"\x80\x02}r\xff\xff\xff\x0f."))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile files


def test_a_compressed_entry_is_refused_and_not_unpacked(tmp_path: Path) -> None:
    """100 MB of zeros in 100 KB."""
    bomb = {"0": bytes(100_000_000)}
    raw = state(tensor(storage(count=25_000_000), shape=(25_000_000,), strides=(1,)))
    path = write_zip(tmp_path / "pytorch_model.bin", raw, bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    assert "is compressed" in weights_refusal(path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "0 data.pkl"),
        (["data.pkl"], "0 data.pkl"),
        (["a/b/data.pkl"], "0 data.pkl"),
        (["a/data.pkl", "b/data.pkl"], "2 data.pkl"),
        (["a/data.pkl", "b/data/0"], "storage 0 is missing"),
        (["a/data.pkl", "a/../a/data/0"], "storage 0 is missing"),
        (["a/data.pkl", "a/data/0", "a/byteorder"], "big-endian"),
    ],
)
def test_a_zip_file_of_other_entries_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    contents = {"data.pkl": state(tensor()), "0": bytes(16), "byteorder": b"big"}
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ["other", *names]:
            archive.writestr(name, contents.get(Path(name).name, b""))
    assert said in weights_refusal(path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_file_is_refused(tmp_path: Path, name: str) -> None:
    raw, path = (DATA / name).read_bytes(), tmp_path / "pytorch_model.bin"
    for length in range(0, len(raw) - 1, 7):
        path.write_bytes(raw[:length])
        weights_refusal(path)


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bytes_give_arrays_or_an_input_error(tmp_path: Path, name: str) -> None:
    rng, clean, path = random.Random(3), (DATA / name).read_bytes(), tmp_path / "pytorch_model.bin"
    outcomes = set()
    for _ in range(300):
        raw = bytearray(clean)
        for place in rng.choices(range(len(raw)), k=3):
            raw[place] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            weights = read_weights(path)
        except InputError:
            outcomes.add("refused")
        else:
            assert all(type(key) is str and array.copy().shape == array.shape for key, array in weights.items())
            outcomes.add("read")
    assert outcomes == {"read", "refused"}


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors", "model_state.pdparams"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert "git lfs pull" in weights_refusal(tmp_path / name)


def test_other_content_than_a_dict_is_refused(tmp_path: Path) -> None:
    assert "not named arrays" in weights_refusal(
        write_zip(tmp_path / "pytorch_model.bin", b"\x80\x02" + tensor() + b".")
    )
    assert "it is empty" in weights_refusal(write_zip(tmp_path / "pytorch_model.bin", b"\x80\x02}."))
