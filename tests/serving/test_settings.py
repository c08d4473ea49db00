import json
from pathlib import Path

import pytest

from common.cli import ArgumentParser
from common.errors import InputError
from helpers import ROOT
from retrieval.milvus_place import PLACE_FILE
from retrieval.milvus_server import MilvusServer
from serving.settings import (
    SETTINGS,
    add_settings_args,
    check_access,
    check_ports,
    is_loopback,
    milvus_place,
    read_settings,
)

CONFIG = ROOT / "deploy" / "python" / "config_nlp.yml"


def test_settings_come_from_options_then_the_environment_then_the_file() -> None:
    settings = read_settings({"rpc_port": 1}, {"SERVING_RPC_PORT": "2", "SERVING_HTTP_PORT": "3"}, CONFIG)
    assert (settings["rpc_port"], settings["http_port"], settings["host"]) == (1, 3, "127.0.0.1")
    assert Path(settings["model_dir"]).resolve() == ROOT / "serving_server"
    assert read_settings({}, {"SERVING_HOST": "[::1]"}, CONFIG)["host"] == "::1"
    assert read_settings({}, {"SERVING_MODEL_DIR": "here"}, CONFIG)["model_dir"] == "here"
    assert [read_settings({}, {"SERVING_MAX_SEQ_LENGTH": n}, CONFIG)["max_seq_length"] for n in "03"] == [0, 3]


OLD_NAMES = [("max_queue_delay_ms", "batch_wait_ms"), ("max_queued_texts", "max_waiting_texts")]


@pytest.mark.parametrize(("name", "old_name"), OLD_NAMES)
def test_names_of_version_1_still_work(name: str, old_name: str) -> None:
    """As options and as variables; if both names are given, the new one counts."""
    parser = ArgumentParser()
    add_settings_args(parser)
    variable, old_variable = f"SERVING_{name.upper()}", f"SERVING_{old_name.upper()}"
    for words, environment, expected in [
        ([f"--{old_name}", "501"], {}, 501),
        ([f"--{name}", "502", f"--{old_name}", "501"], {}, 502),
        ([], {old_variable: "503"}, 503),
        ([], {old_variable: "503", variable: "504"}, 504),
        ([f"--{old_name}", "501"], {variable: "504"}, 501),
    ]:
        assert read_settings(vars(parser.parse_args(words)), environment, CONFIG)[name] == expected
    assert f"--{name}" in parser.format_help() and old_name not in parser.format_help()


def test_a_config_file_of_version_1_still_works(tmp_path: Path) -> None:
    old = tmp_path / "config.yml"
    old.write_text(CONFIG.read_text().replace("queued_texts: 1024", "waiting_texts: 600"))
    assert read_settings({}, {}, old)["max_queued_texts"] == 600
    assert read_settings({}, {"SERVING_MAX_QUEUED_TEXTS": "700"}, old)["max_queued_texts"] == 700
    old.write_text(CONFIG.read_text().replace("queued_texts: 1024", "waiting_texts: 600\n  queued_texts: 800"))
    assert read_settings({}, {}, old)["max_queued_texts"] == 800
    old.write_text(CONFIG.read_text().replace("queued_texts: 1024", "waiting_texts: 0"))
    with pytest.raises(InputError, match=r"config\.yml: limits\.waiting_texts: 0 is out of range"):
        read_settings({}, {}, old)


@pytest.mark.parametrize(
    ("options", "environment", "change", "seconds"),
    [
        ({}, {}, ("", ""), 620),
        ({}, {}, ("idle_timeout_s: 620\n", ""), 620),  # a file of version 2.0.0
        ({}, {}, ("idle_timeout_s: 620", "idle_timeout_s: 75"), 75),
        ({}, {"SERVING_IDLE_TIMEOUT_S": "76"}, ("idle_timeout_s: 620", "idle_timeout_s: 75"), 76),
        ({}, {"SERVING_IDLE_TIMEOUT_S": ""}, ("", ""), 620),
        ({"idle_timeout_s": 77}, {"SERVING_IDLE_TIMEOUT_S": "76"}, ("", ""), 77),
        ({}, {"SERVING_IDLE_TIMEOUT_S": "0"}, ("", ""), "SERVING_IDLE_TIMEOUT_S: 0 is out of range"),
        ({}, {"SERVING_IDLE_TIMEOUT_S": "60s"}, ("", ""), "SERVING_IDLE_TIMEOUT_S: 60s isn't a number"),
        ({}, {}, ("idle_timeout_s: 620", "idle_timeout_s: 100000"), r"config\.yml: idle_timeout_s: 100000 is out of"),
    ],
)
def test_how_long_idle_connections_stay_open(
    tmp_path: Path, options: dict[str, int], environment: dict[str, str], change: tuple[str, str], seconds: int | str
) -> None:
    """By default longer than behind any common proxy, also with a config file that doesn't have the setting."""
    config = tmp_path / "config.yml"
    config.write_text(CONFIG.read_text().replace(*change))
    if isinstance(seconds, int):
        assert read_settings(options, environment, config)["idle_timeout_s"] == seconds
    else:
        with pytest.raises(InputError, match=seconds):
            read_settings(options, environment, config)


@pytest.mark.parametrize(
    ("environment", "change", "ignored"),
    [
        ({"SERVING_RPCPORT": "1"}, ("", ""), "SERVING_RPCPORT"),
        ({"SERVING_TEXTS": "1", "SERVING_BIN": "x"}, ("", ""), "SERVING_TEXTS"),
        ({}, ("rpc_port: ", "rpcport: 1\nrpc_port: "), "rpcport"),
        ({}, ("  texts: 256", "  texts: 256\n  text: 2"), "limits.text"),
        ({"SERVING_X": "1"}, ("    concurrency: 1", "    concurrency: 1\n    retry: 1"), "SERVING_X, op.ernie.retry"),
        ({"serving_x": "1", "SERVING_RPC_PORT": "1", "SERVING_BATCH_WAIT_MS": "1"}, ("", ""), ""),
        ({}, ("queued_texts: 1024", "waiting_texts: 1024"), ""),  # of version 1
    ],
)
def test_what_is_no_setting_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    change: tuple[str, str],
    ignored: str,
) -> None:
    """Variables and keys that are misspelled, or Paddle Serving's."""
    config = tmp_path / "config.yml"
    config.write_text(CONFIG.read_text().replace(*change))
    read_settings({}, environment, config)
    line = f"note: {ignored}: no setting of this service, ignored (web_service.py --help lists them)\n"
    assert capsys.readouterr().err == (line if ignored else "")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SERVING_RPC_PORT": "x"}, "SERVING_RPC_PORT"),
        ({"SERVING_HTTP_PORT": "70000"}, "SERVING_HTTP_PORT"),
        ({"SERVING_DEVICE": "tpu"}, "SERVING_DEVICE: tpu is none of cpu, gpu"),
        ({"SERVING_MAX_QUEUED_TEXTS": "1"}, "--max_queued_texts"),
        ({"SERVING_MAX_BYTES": str(2**31)}, "SERVING_MAX_BYTES: 2147483648 is out of range"),
        ({"SERVING_MAX_QUEUE_DELAY_MS": str(10**13)}, "SERVING_MAX_QUEUE_DELAY_MS: 10000000000000 is out of range"),
        ({"SERVING_BATCH_WAIT_MS": str(10**13)}, "SERVING_BATCH_WAIT_MS: 10000000000000 is out of range"),
        ({"SERVING_THREADS": str(2**31)}, "SERVING_THREADS: 2147483648 is out of range"),
        ({"SERVING_MAX_TOP_K": "0"}, "SERVING_MAX_TOP_K: 0 is out of range"),
        ({"SERVING_CORS": "page.example"}, "SERVING_CORS: page.example isn't an origin such as https://example.com"),
        ({"SERVING_CORS": "https://page.example/"}, "SERVING_CORS: https://page.example/ isn't an origin"),
        ({"SERVING_MAX_SEQ_LENGTH": "2"}, "SERVING_MAX_SEQ_LENGTH: 2 is out of range: give 3 or more"),
    ],
)
def test_a_bad_variable_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_settings({}, environment, CONFIG)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [\nb: c", "line 2: isn't YAML"),
        ("a: 2026-13-45", "isn't YAML"),
        ("[" * 3000, "isn't YAML"),
        ("", "op.ernie.local_service_conf.model_config"),
        (CONFIG.read_text().replace("rpc_port: 8080", "rpc_port: yes"), "rpc_port"),
        (CONFIG.read_text().replace("batch_size: 32", "batch_size: 0"), "op.ernie.batch_size"),
        (CONFIG.read_text().replace("max_seq_length: 0", "max_seq_length: 1"), "max_seq_length: 1 is out of range"),
    ],
    ids=["line", "date", "depth", "empty", "type", "range", "length"],
)
def test_a_bad_line_of_the_config_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    changed = tmp_path / "config.yml"
    changed.write_text(text)
    with pytest.raises(InputError, match=message):
        read_settings({}, {}, changed)


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "a..é"])
def test_a_host_that_is_not_this_machine_is_named(host: str) -> None:
    with pytest.raises(InputError, match=f"^--host {host}: can't listen .*; give an address of this machine$"):
        check_ports({"host": host, "rpc_port": 0, "http_port": 0})


@pytest.mark.parametrize("name", ["index_dir", "api_key_file"])
def test_paths_in_the_config_file_are_relative_to_it(tmp_path: Path, name: str) -> None:
    """An empty one, and none as in a file of an earlier version, is no path."""
    config = tmp_path / "config.yml"
    for line, path in [(f"{name}: here", str(tmp_path / "here")), (f"{name}:", ""), (f"{name}: ''", ""), ("", "")]:
        config.write_text(CONFIG.read_text().replace(f"\n{name}:\n", f"\n{line}\n"))
        assert read_settings({}, {}, config)[name] == path
    assert read_settings({name: "here"}, {}, config)[name] == "here"


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
@pytest.mark.parametrize("index_dir", ["", "index"])
@pytest.mark.parametrize("api_key_file", ["", "keys"])
def test_other_machines_search_with_a_key_alone(
    capsys: pytest.CaptureFixture[str], host: str, is_local: bool, index_dir: str, api_key_file: str
) -> None:
    """Vectors they may have without one, as in earlier versions; a line says so."""
    settings = {"host": host, "index_dir": index_dir, "api_key_file": api_key_file, "writable": False, "milvus_uri": ""}
    assert is_loopback(host) == is_local
    if index_dir and not is_local and not api_key_file:
        with pytest.raises(InputError, match=f"^--host {host}: .* give --api_key_file"):
            check_access(settings)
    else:
        check_access(settings)
    is_noted = not (index_dir or is_local or api_key_file)
    assert capsys.readouterr().err.startswith("note: --host") == is_noted


@pytest.mark.parametrize("place", ["index_dir", "milvus_uri"])
@pytest.mark.parametrize(
    ("index", "api_key_file", "missing"),
    [("", "keys", "--index_dir or --milvus_uri"), ("index", "", "--api_key_file"), ("index", "keys", None)],
)
def test_writing_needs_an_index_and_keys(place: str, index: str, api_key_file: str, missing: str | None) -> None:
    settings = {"host": "127.0.0.1", "index_dir": "", "milvus_uri": "", "api_key_file": api_key_file, "writable": True}
    settings[place] = index
    if missing:
        with pytest.raises(InputError, match=f"^--writable: give {missing}"):
            check_access(settings)
    else:
        check_access(settings)


MILVUS = {name: "" for name in SETTINGS if name.startswith("milvus_")}


def test_an_index_in_milvus(tmp_path: Path) -> None:
    """At an address, or where the file says that recall.py --ann milvus left in a folder."""
    uri = "http://milvus:19530"
    options = {"milvus_uri": uri, "milvus_collection": "texts", "milvus_token_file": "token"}
    place = milvus_place(read_settings(options, {}, CONFIG))
    assert place is not None and str(place) == f"texts at {uri}" and place.server.token_file == "token"
    (tmp_path / PLACE_FILE).write_text(json.dumps({"uri": uri, "database": "db", "collection": "kept"}))
    place = milvus_place(read_settings({"index_dir": str(tmp_path)}, {"SERVING_MILVUS_CA_FILE": "ca"}, CONFIG))
    assert place is not None and str(place) == f"kept at {uri}" and place.server == MilvusServer(uri, "db", "ca")
    assert milvus_place(read_settings({"index_dir": str(tmp_path / "other")}, {}, CONFIG)) is None
    changed = tmp_path / "config.yml"
    changed.write_text(CONFIG.read_text().replace("milvus_token_file:", "milvus_token_file: token"))
    assert read_settings({}, {}, changed)["milvus_token_file"] == str(tmp_path / "token")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"milvus_uri": "http://milvus:19530", "index_dir": "index"}, "leave one of the two out"),
        ({"milvus_collection": "texts", "index_dir": "index"}, "--milvus_collection: has an effect with --milvus_uri"),
        ({"milvus_token_file": "token"}, "--milvus_token_file: has an effect with --milvus_uri alone"),
        ({"milvus_uri": "milvus:19530"}, "isn't an http or https address"),
        ({"milvus_uri": "tcp://milvus:19530"}, "give an http or https address"),
        ({"milvus_uri": "http://root:secret@milvus:19530"}, "holds a password, which logs would show"),
    ],
)
def test_a_wrong_place_in_milvus_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        milvus_place({"index_dir": "", **MILVUS, **settings})
    assert "secret" not in str(error.value)
