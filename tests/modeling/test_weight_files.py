"""Weight files: arrays that paddle.save wrote are read, and no code in a file is run."""

import collections
import io
import os
import pickle
import random
import re
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from common.errors import InputError
from helpers import Calls, weights_refusal
from modeling.weight_files import STRUCTURE_KEY, read_weights, write_safetensors

PROTOCOLS = [2, 3, 4]  # those that paddle.save takes


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "embeddings.weight": rng.normal(size=(7, 4)).astype(np.float32),
        "linear.weight": np.asfortranarray(rng.normal(size=(3, 2))),
        "half": rng.normal(size=(2, 2)).astype(np.float16),
        "ids": np.arange(5),
        "bfloat16": np.arange(5, dtype=np.uint16),
        "flags": np.array([True, False]),
        "scale": np.array(0.5, dtype=np.float32),
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert type(found[name]) is np.ndarray
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def written(folder: Path, raw: bytes, name: str = "model_state.pdparams") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Files that are read


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_state_dict_is_read(tmp_path: Path, protocol: int) -> None:
    """paddle.save pickles arrays by name, and the internal names under one more key."""
    content = {**arrays(), STRUCTURE_KEY: {"embeddings.weight": "embedding_0.w_0", "scale": "linear_0.b_0"}}
    assert STRUCTURE_KEY == "StructuredToParameterName@@"
    assert_same(read_weights(written(tmp_path, pickle.dumps(content, protocol))), arrays())
    ordered = collections.OrderedDict(content)
    assert_same(read_weights(written(tmp_path, pickle.dumps(ordered, protocol))), arrays())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_saved_as_name_and_array_are_read(tmp_path: Path, protocol: int) -> None:
    """A tensor outside of a state dict is pickled as `tuple((internal name, array))`."""
    reduced = {name: Calls(tuple, ("generated_tensor_0", array)) for name, array in arrays().items()}
    assert_same(read_weights(written(tmp_path, pickle.dumps(reduced, protocol))), arrays())
    plain = {name: ("generated_tensor_0", array) for name, array in arrays().items()}
    assert_same(read_weights(written(tmp_path, pickle.dumps(plain, protocol))), arrays())


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_files_of_numpy_1_and_2_are_read(tmp_path: Path, module: bytes) -> None:
    raw = re.sub(rb"cnumpy\._?core\.multiarray", b"c" + module, pickle.dumps(arrays(), 2))
    assert b"c" + module + b"\n_reconstruct" in raw
    assert_same(read_weights(written(tmp_path, raw)), arrays())


def test_big_endian_arrays_keep_their_values(tmp_path: Path) -> None:
    path = written(tmp_path, pickle.dumps({"w": np.array([1, 2.5], dtype=">f4")}, 4))
    np.testing.assert_array_equal(read_weights(path)["w"], [1, 2.5])


def test_safetensors_are_read(tmp_path: Path) -> None:
    """Those of the safetensors package, and ours."""
    content = {name: np.ascontiguousarray(array) for name, array in arrays().items()}
    save_file(content, tmp_path / "theirs.safetensors")
    write_safetensors(tmp_path / "ours.safetensors", arrays())
    for path in tmp_path.iterdir():
        found = read_weights(path)
        assert_same({name: found[name] for name in content}, content)
        assert len(found) == len(content)


# ---------------------------------------------------------------------------------------------------------------------
# Files that ask for code to be run

MARKER = "marker"  # the file or folder that each call would leave in the current folder

HOSTILE: dict[str, tuple[Any, str]] = {
    "os.system": (Calls(os.system, f"touch {MARKER}"), "system"),
    "os.mkdir": (Calls(os.mkdir, MARKER), "mkdir"),
    "subprocess.Popen": (Calls(subprocess.Popen, ["touch", MARKER]), "Popen"),
    "subprocess.check_call": (Calls(subprocess.check_call, ["touch", MARKER]), "check_call"),
    "eval": (Calls(eval, f"open('{MARKER}', 'w').close()"), "eval"),
    "exec": (Calls(exec, f"open('{MARKER}', 'w').close()"), "exec"),
    "open": (Calls(open, MARKER, "x"), "open"),
    "getattr": (Calls(getattr, tuple, "__subclasses__"), "getattr"),
    "import": (Calls(__import__, "antigravity"), "__import__"),
    "compile": (Calls(compile, "1", "", "eval"), "compile"),
    "nested in arguments": (Calls(tuple, (Calls(tuple, (Calls(os.mkdir, MARKER),)),)), "mkdir"),
    "object array": (np.array([Calls(os.mkdir, MARKER), 1], dtype=object), "mkdir"),
    "object array in a pair": (("name", np.array(Calls(os.mkdir, MARKER), dtype=object)), "mkdir"),
    "dict in a dict": ({"optimizer": [Calls(os.mkdir, MARKER)]}, "mkdir"),
    "numpy.load": (Calls(np.load, MARKER, None, True), "load"),
    "numpy.save": (Calls(np.save, MARKER, 0), "save"),
    "numpy.fromfile": (Calls(np.fromfile, MARKER), "fromfile"),
    "numpy.memmap": (Calls(np.memmap, MARKER, "u1", "w+", 0, (1,)), "memmap"),
    "pickle.loads": (Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, MARKER))), "loads"),
    "a class": (collections.Counter("x"), "Counter"),
    "a NumPy scalar": (np.float32(1), "scalar"),
}
# Pickled here, because the fast tests replace subprocess.Popen, and a replaced function can't be pickled.
HOSTILE_PICKLES = {
    (case, protocol): pickle.dumps({"linear.weight": 0, "evil": value}, protocol)
    for case, (value, _) in HOSTILE.items()
    for protocol in (0, *PROTOCOLS, 5)
}


@pytest.mark.parametrize("protocol", [0, *PROTOCOLS, 5])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_call_is_refused_by_name_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, HOSTILE_PICKLES[case, protocol])
    assert re.search(rf"it wants to load \S+\.{HOSTILE[case][1]},", weights_refusal(path))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("case", ["os.system", "os.mkdir", "eval", "exec", "open", "object array", "pickle.loads"])
def test_plain_unpickling_would_have_made_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Shows that the files of the test above would do harm."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE_PICKLES[case, 4])
    assert os.listdir(tmp_path) == [MARKER]


RAW_HOSTILE = {
    "INST": (b"(S'touch marker'\niposix\nsystem\n.", "posix.system"),
    "OBJ": (b"(cposix\nsystem\nS'touch marker'\no.", "posix.system"),
    "a name with dots": (b"\x80\x04\x8c\x05numpy\x8c\x0ecore.os.system\x93\x8c\x01x\x85R.", "numpy.core.os.system"),
    "a method of an admitted type": (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
    "another codec": (b"c_codecs\nencode\n(Vuryyb\nVrot13\ntR.", "rot13"),
    "a registered extension": (b"\x80\x02\x82\x01.", "1"),
    "torch's persistent id": (b"\x80\x02}X\x01\0\0\0w(X\x07\0\0\0storageX\x01\0\0\x000tQs.", "persistent"),
    "torch's rebuild": (b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n)Rs.", "_rebuild_tensor_v2"),
    "an attribute of a function": (b"c_codecs\nencode\nN}S'__code__'\nI1\ns\x86b.", "__code__"),
    "an attribute of a type": (b"\x80\x02cnumpy\nndarray\nN}X\x01\0\0\0xK\x01s\x86b.", "ndarray"),
}


@pytest.mark.parametrize("case", RAW_HOSTILE)
def test_pickles_that_no_pickler_writes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    raw, said = RAW_HOSTILE[case]
    path = written(tmp_path, raw)
    assert said in weights_refusal(path)
    assert os.listdir(tmp_path) == [path.name]
    assert_same(read_weights(written(tmp_path, pickle.dumps(arrays(), 2))), arrays())  # the reader works as before


def test_a_torch_checkpoint_is_refused(tmp_path: Path) -> None:
    class TorchPickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", "FloatStorage", "0", "cpu", 3) if isinstance(value, bytearray) else None

    buffer = io.BytesIO()
    TorchPickler(buffer, 2).dump({"weight": bytearray(3)})
    assert "persistent" in weights_refusal(written(tmp_path, buffer.getvalue()))
    zipped = written(tmp_path, b"PK\x03\x04" + bytes(100))  # how torch.save's files begin
    assert "isn't a weights file" in weights_refusal(zipped)


# ---------------------------------------------------------------------------------------------------------------------
# Files that hold something else


@pytest.mark.parametrize(
    "content", [[], np.zeros(3), "text", 1, None, ("name", np.zeros(3))], ids=lambda content: type(content).__name__
)
def test_content_other_than_a_dict_is_refused_with_its_type(tmp_path: Path, content: object) -> None:
    path = written(tmp_path, pickle.dumps(content, 4))
    assert f"it holds a {type(content).__name__}" in weights_refusal(path)


@pytest.mark.parametrize("content", [{}, {STRUCTURE_KEY: {}}])
def test_a_dict_without_arrays_is_refused(tmp_path: Path, content: dict) -> None:
    assert "it is empty" in weights_refusal(written(tmp_path, pickle.dumps(content, 4)))


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a"]),
        np.array([b"a"]),
        np.array([1, None], dtype=object),
        np.zeros(2, dtype="M8[s]"),
        np.zeros(2, dtype=[("a", "f4")]),
        np.zeros(2, dtype=np.complex64),
        [1.0],
        1.0,
        None,
        "w",
        (np.zeros(2),),
        ("a", "b"),
        ("a", np.zeros(2), 1),
        {"weight": np.zeros(2)},
    ],
    ids=str,
)
def test_a_value_other_than_an_array_of_numbers_is_refused_by_its_name(tmp_path: Path, value: object) -> None:
    path = written(tmp_path, pickle.dumps({"good": np.zeros(2), "linear.bias": value}, 4))
    assert "'linear.bias' is no array" in weights_refusal(path)


@pytest.mark.parametrize(
    "raw_name",
    [
        pickle.dumps(1, 2)[2:-1],
        pickle.dumps(10**5000, 2)[2:-1],  # more digits than Python prints
        b")" + b"\x85" * 2000,  # a tuple nested deeper than Python prints
        pickle.dumps(("a", 1), 2)[2:-1],
    ],
    ids=["int", "huge int", "deep tuple", "tuple"],
)
def test_a_name_other_than_a_string_is_refused(tmp_path: Path, raw_name: bytes) -> None:
    array = pickle.dumps(np.zeros(2), 2)[2:-1]
    weights_refusal(written(tmp_path, b"\x80\x02}" + raw_name + array + b"s."))


def safetensors(dtype: str, size: int) -> bytes:
    header = f'{{"w":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,{size}]}}}}'.encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 100,
        b"{}",
        save({"w": np.zeros(100, dtype=np.float32)})[:-1],
        save({"w": np.zeros(100, dtype=np.float32)})[:20],
        save({}),
        safetensors("F8_E4M3", 2),
        safetensors("C64", 16),
        safetensors("X9", 2),
        pickle.dumps({"w": np.zeros(2)}, 4),
    ],
    ids=["empty", "zeros", "ones", "json", "cut", "header cut", "no arrays", "F8", "C64", "unknown", "pickle"],
)
def test_a_damaged_or_unusable_safetensors_file_is_refused(tmp_path: Path, raw: bytes) -> None:
    weights_refusal(written(tmp_path, raw, "model.safetensors"))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for protocol in PROTOCOLS:
        raw = pickle.dumps({"w": np.arange(3.0), "b": np.zeros(2), STRUCTURE_KEY: {"w": "w_0"}}, protocol)
        for length in range(len(raw)):
            weights_refusal(written(tmp_path, raw[:length]))


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    rng = random.Random(11)
    for _ in range(500):
        prefix = rng.choice([b"", b"\x80\x02", b"\x80\x04}", b"\x80\x04}\x94("])
        weights_refusal(written(tmp_path, prefix + rng.randbytes(rng.randrange(200))))


def test_flipped_bytes_give_arrays_or_an_input_error(tmp_path: Path) -> None:
    rng = random.Random(12)
    clean = pickle.dumps({"linear.weight": np.arange(3.0), "bias": np.zeros(2)}, 4)
    outcomes, messages = set(), []
    for _ in range(500):
        raw = bytearray(clean)
        for place in rng.choices(range(len(raw)), k=rng.choice([1, 1, 3])):
            raw[place] = rng.randrange(256)
        try:
            weights = read_weights(written(tmp_path, bytes(raw)))
        except InputError as error:
            messages.append(str(error))
            outcomes.add("refused")
        else:
            assert all(type(name) is str and type(array) is np.ndarray for name, array in weights.items())
            outcomes.add("read")
    assert outcomes == {"read", "refused"}
    assert not any("\n" in message for message in messages)


@pytest.fixture
def forbidden_folder() -> Iterator[Path]:
    """A folder with files and a folder that this process may not read, even if root started it."""
    with tempfile.TemporaryDirectory() as name:
        folder, closed = Path(name), Path(name) / "closed"
        closed.mkdir()
        for file in ("model.safetensors", "model_state.pdparams"):
            written(folder, b"", file).chmod(0)
            written(closed, b"", file)
        folder.chmod(0o755)
        closed.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            closed.chmod(0o755)


@pytest.mark.parametrize("name", ["model.safetensors", "model_state.pdparams", "closed/model_state.pdparams"])
def test_a_file_without_permission_is_refused(forbidden_folder: Path, name: str) -> None:
    assert "ermission denied" in weights_refusal(forbidden_folder / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model_state.pdparams"])
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    assert "no such" in weights_refusal(tmp_path / name)
    (tmp_path / name).mkdir()
    weights_refusal(tmp_path / name)


def test_a_large_index_into_the_table_of_objects_takes_no_memory(tmp_path: Path) -> None:
    """An empty dict stored at index 2**28, for which pickle in C would allocate a table of 4 GB."""
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x0f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="it is empty"):
        read_weights(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB
