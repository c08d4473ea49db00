"""export_to_serving.py writes what Serving's own loaders read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from paddle_serving_server.proto.general_model_config_pb2 import GeneralModelConfig

import export_to_serving
from common.errors import InputError
from common.files import read_json
from common.manifest import write_manifest
from encoding.exported_files import GRAPH_NAME
from encoding.exported_model import load_exported
from helpers import ROOT, run_script

GRAPH = f"{GRAPH_NAME}.json"
WEIGHTS = f"{GRAPH_NAME}.pdiparams"


def convert(source: Path, target: Path, *options: str) -> int:
    paths = ["--server_path", str(target / "serving_server"), "--client_path", str(target / "serving_client")]
    return export_to_serving.main(["--dirname", str(source), *paths, *options])


def read_configs(folder: Path, name: str) -> list[GeneralModelConfig]:
    """The text and the bytes, as Serving's protobuf class reads them."""
    text = (folder / f"{name}.prototxt").read_text(encoding="utf-8")
    binary = (folder / f"{name}.stream.prototxt").read_bytes()
    return [text_format.Parse(text, GeneralModelConfig()), GeneralModelConfig.FromString(binary)]


@pytest.mark.process
def test_the_documents_command(exported: Path, tmp_path: Path) -> None:
    """As in the document, although Paddle 3 wrote .json: the original converter's files, and the vocabulary."""
    (tmp_path / "output").symlink_to(exported)
    done = run_script(
        ROOT / "export_to_serving.py",
        *("--dirname", "output"),
        *("--model_filename", "inference.get_pooled_embedding.pdmodel"),
        *("--params_filename", "inference.get_pooled_embedding.pdiparams"),
        *("--server_path", "./serving_server"),
        *("--client_path", "./serving_client"),
        *("--fetch_alias_names", "output_embedding"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"used {GRAPH}: Paddle 3 writes it instead of {GRAPH_NAME}.pdmodel\n" + (
        "wrote serving_server and serving_client\n"
    )
    server, client = tmp_path / "serving_server", tmp_path / "serving_client"
    confs = {f"serving_client_conf{suffix}" for suffix in (".prototxt", ".stream.prototxt")}
    assert {file.name for file in client.iterdir()} == confs
    expected = {GRAPH, WEIGHTS, "vocab.txt", "manifest.json", *(name.replace("client", "server") for name in confs)}
    assert expected <= {file.name for file in server.iterdir()}
    assert {file.name for file in exported.iterdir()} <= {file.name for file in server.iterdir()}
    configs = read_configs(server, "serving_server_conf") + read_configs(client, "serving_client_conf")
    for config in configs:
        assert config == configs[0]
        assert (server / "serving_server_conf.prototxt").read_text() == str(config)  # as the original writes it
    assert [
        (var.name, var.alias_name, var.is_lod_tensor, var.feed_type, list(var.shape)) for var in configs[0].feed_var
    ] == [(name, name, False, 0, []) for name in ("input_ids", "token_type_ids")]
    (output,) = configs[0].fetch_var
    assert (output.alias_name, output.is_lod_tensor, output.fetch_type, list(output.shape)) == (
        *("output_embedding", False, 1),
        [16],
    )


def test_the_converted_model_gives_the_same_vectors(exported: Path, tmp_path: Path) -> None:
    convert(exported, tmp_path)
    tokens = load_exported(exported).tokenizer(["水稻的产量", "论小麦品质研究小麦,品质"])
    vectors = [load_exported(folder).embed(*tokens) for folder in (exported, tmp_path / "serving_server")]
    np.testing.assert_array_equal(*vectors)


def test_aliases(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an alias the output keeps the graph's name; --show_proto writes nothing."""
    convert(exported, tmp_path, "--feed_alias_names", "ids,types", "--show_proto")
    config = text_format.Parse(capsys.readouterr().out.split("\n", 1)[1], GeneralModelConfig())
    assert [var.alias_name for var in config.feed_var] == ["ids", "types"]
    assert config.fetch_var[0].alias_name == config.fetch_var[0].name
    assert list(tmp_path.iterdir()) == []
    for options in (["--feed_alias_names", "ids"], ["--feed_alias_names", "a,a"], ["--fetch_alias_names", "a,b"]):
        with pytest.raises(InputError, match=options[0]):
            convert(exported, tmp_path, *options)


def test_graph_and_weights_alone(exported: Path, tmp_path: Path) -> None:
    """An export of the original has no other files; converted, C++ Serving can use it. Twice, since that is allowed."""
    source = tmp_path / "output"
    source.mkdir()
    for name in (GRAPH, WEIGHTS):
        (source / name).write_bytes((exported / name).read_bytes())
    for _ in range(2):
        assert convert(source, tmp_path) == 0
        assert not (tmp_path / "serving_server" / "manifest.json").exists()
        (tmp_path / "serving_server" / "fluid_time_file").touch()  # as C++ Serving does


def test_what_cannot_be_converted(exported: Path, tmp_path: Path) -> None:
    """A missing folder, graph or weights, changed weights."""
    source = tmp_path / "output"
    with pytest.raises(InputError, match=r"no such folder.*export_model\.py"):
        convert(source, tmp_path)
    source.mkdir()
    with pytest.raises(InputError, match="--model_filename"):
        convert(source, tmp_path)
    (source / GRAPH).write_bytes((exported / GRAPH).read_bytes())
    with pytest.raises(InputError, match="--params_filename"):
        convert(source, tmp_path)
    for file in exported.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / WEIGHTS).write_bytes(b"half")
    with pytest.raises(InputError, match=WEIGHTS):
        convert(source, tmp_path)
    assert not (tmp_path / "serving_server").exists() and not (tmp_path / "serving_client").exists()


@pytest.mark.parametrize(
    "names", [(GRAPH, "vocab.txt"), ("config.json", WEIGHTS), (GRAPH, "other.pdiparams"), ("vocab.txt", WEIGHTS)]
)
def test_files_that_are_no_graph_with_its_weights(exported: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    """Such as other files in the folder."""
    source = shutil.copytree(exported, tmp_path / "output")
    shutil.copy(exported / WEIGHTS, source / "other.pdiparams")
    with pytest.raises(InputError, match="--model_filename"):
        convert(source, tmp_path, "--model_filename", names[0], "--params_filename", names[1])
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_graph_beside_another(exported: Path, tmp_path: Path) -> None:
    """The named one is used, with its weights."""
    source = shutil.copytree(exported, tmp_path / "output")
    for name in (GRAPH, WEIGHTS):
        (source / name).rename(source / f"other{Path(name).suffix}")
        (source / name).write_bytes(b"damaged")
    write_manifest(source)
    convert(source, tmp_path, "--model_filename", "other.json", "--params_filename", "other.pdiparams")
    server = tmp_path / "serving_server"
    for name in (GRAPH, WEIGHTS):
        assert (server / name).read_bytes() == (exported / name).read_bytes()
    assert not list(server.glob("other*"))


def test_outputs_that_would_be_lost(exported: Path, tmp_path: Path) -> None:
    """Other folders with or without a manifest, and earlier conversions with a user's file or folder in them."""
    for number, lost in enumerate(("serving_client/mine", "serving_server/notes.txt", "serving_server/logs/1")):
        target = tmp_path / str(number)
        if number:
            convert(exported, target)
        (target / lost).parent.mkdir(parents=True, exist_ok=True)
        (target / lost).touch()
        folder, name = lost.split("/")[:2]
        with pytest.raises(
            InputError, match=f"--{folder[8:]}_path {target / folder}: holds {name}, which no export wrote"
        ):
            convert(exported, target)
        assert (target / lost).exists()
    other = shutil.copytree(exported, tmp_path / "other")
    with pytest.raises(InputError, match="other: holds"):
        convert(exported, tmp_path / "new", "--server_path", str(other))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("server", "client"), [("output", "c"), ("s", "s"), ("c/s", "c"), ("s", "s/c"), ("s", "output/c"), ("", "c")]
)
def test_folders_in_one_another(exported: Path, tmp_path: Path, server: str, client: str) -> None:
    """Refused before anything is written."""
    shutil.copytree(exported, tmp_path / "output")
    options = ["--server_path", str(tmp_path / server), "--client_path", str(tmp_path / client)]
    with pytest.raises(InputError, match="give three folders, none of them inside another"):
        convert(tmp_path / "output", tmp_path, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_converting_again_replaces(exported: Path, tmp_path: Path) -> None:
    for alias in ("first", "second"):
        convert(exported, tmp_path, "--fetch_alias_names", alias)
    assert read_configs(tmp_path / "serving_client", "serving_client_conf")[0].fetch_var[0].alias_name == "second"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["serving_client", "serving_server"]
    assert set(read_json(tmp_path / "serving_server" / "manifest.json")["files"]) == {
        file.name for file in (tmp_path / "serving_server").iterdir() if file.name != "manifest.json"
    }
