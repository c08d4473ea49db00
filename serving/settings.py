"""The settings of the service: from an option, else the environment, else config_nlp.yml.

The names that settings had in version 1 still work; if both names are given in one place, the new one counts.
"""

import argparse
import errno
import ipaddress
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from common.cli import number_in_range, positive_int, proportion
from common.errors import InputError
from common.files import open_for_reading
from common.logs import log
from common.options import EXPORT_ENGINES, MIN_OVERLAP, PRECISIONS
from retrieval.milvus_collection import DEFAULT_COLLECTION
from retrieval.milvus_place import MILVUS, MilvusOptions, MilvusPlace, find_place
from retrieval.milvus_server import TOKEN_VARIABLE
from serving.limits import MAX_TOP_K

ENVIRONMENT_PREFIX = "SERVING_"
OTHER_VARIABLES = {"SERVING_BIN"}  # Paddle Serving's
# Longer than the idle connections of proxies and clients live by default: nginx and AWS 60 s, Go 90 s, OkHttp 300 s,
# Google's load balancers 600 s, whose documentation advises 620 s.
IDLE_TIMEOUT_S = 620


class Setting(NamedTuple):
    """One service setting: its YAML key, parser and help text."""

    key: str  # in config_nlp.yml, with dots
    parse: Callable[[str], Any]
    help: str
    old_names: tuple[str, ...] = ()  # other names of the option and of the environment variable, from version 1
    old_keys: tuple[str, ...] = ()  # other keys in config_nlp.yml
    default: Any = None  # where config_nlp.yml lacks the key, as that of an earlier version does
    bare: Any = None  # the value of the option without one


OPERATOR = "op.ernie"
LOCAL = f"{OPERATOR}.local_service_conf"
PORT, THREADS = number_in_range(0, below=65_536), number_in_range(0, below=1025)
BATCH_SIZE = number_in_range(1, below=65_537)
PATHS = (
    "model_dir",
    "index_dir",
    "api_key_file",
    "calibration_file",
    "milvus_token_file",
    "milvus_ca_file",
)  # in config_nlp.yml relative to it
LENGTH = number_in_range(3, or_zero=True)  # [CLS], a token and [SEP]


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(choices)}")
        return text

    return parse


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


def _origin(text: str) -> str:
    if text not in ("", "*") and not re.fullmatch(r"https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text} isn't an origin such as https://example.com, nor *")
    return text


SETTINGS = {
    "model_dir": Setting(f"{LOCAL}.model_config", str, "folder of export_to_serving.py or export_model.py"),
    "index_dir": Setting("index_dir", str, "folder of recall.py --index_dir to search; none: no search", default=""),
    "milvus_uri": Setting(
        "milvus_uri", str, "address of a Milvus server to search in place of a folder, http or https", default=""
    ),
    "milvus_collection": Setting(
        "milvus_collection", str, f"alias of the collection to search; none: {DEFAULT_COLLECTION}", default=""
    ),
    "milvus_database": Setting("milvus_database", str, "database; none: Milvus's own", default=""),
    "milvus_token_file": Setting(
        "milvus_token_file", str, f"file with user:password or a token of Milvus; none: ${TOKEN_VARIABLE}", default=""
    ),
    "milvus_ca_file": Setting(
        "milvus_ca_file",
        str,
        "PEM file of the authority that signed the certificate of an https address; none: the usual ones",
        default="",
    ),
    "writable": Setting(
        "writable", _switch, "add and delete documents of the index for callers with a key", default=False, bare=True
    ),
    "host": Setting("host", lambda text: text.strip("[]"), "address to listen on; 0.0.0.0 for all"),
    "rpc_port": Setting("rpc_port", PORT, "gRPC port; 0: any free one"),
    "http_port": Setting("http_port", PORT, "HTTP port; 0: any free one"),
    "api_key_file": Setting(
        "api_key_file",
        str,
        "file of keys, one per line, of which callers have to send one; none: anyone may call",
        default="",
    ),
    "cors": Setting("cors", _origin, "origin whose web pages may call, or *; none: no other page may", default=""),
    "device": Setting(f"{LOCAL}.device", _choice("cpu", "gpu"), "cpu or gpu"),
    "precision": Setting(f"{LOCAL}.precision", _choice(*PRECISIONS), "fp32, bf16, fp16 or int8 to compute in"),
    "engine": Setting(
        f"{LOCAL}.engine",
        _choice("", *EXPORT_ENGINES),
        "static, openvino, or auto for the faster one; none: static, and openvino for int8",
        default="",
    ),
    "calibration_file": Setting(
        f"{LOCAL}.calibration_file",
        str,
        "file of texts, one per line, to calibrate int8 on; none: the exported model's calibration",
        default="",
    ),
    "min_overlap": Setting(
        f"{LOCAL}.min_overlap", proportion, "share of fp32's top 10 that int8 has to find", default=MIN_OVERLAP
    ),
    "workers": Setting(f"{OPERATOR}.concurrency", positive_int, "encoders; each is a process with the whole model"),
    "threads": Setting(f"{LOCAL}.thread_num", THREADS, "CPU threads of an encoder; 0: an equal share of all cores"),
    "max_seq_length": Setting(
        f"{LOCAL}.max_seq_length", LENGTH, "tokens that texts are cut to; 0: the exported model's"
    ),
    "batch_size": Setting(f"{OPERATOR}.batch_size", BATCH_SIZE, "texts that are encoded together"),
    "max_queue_delay_ms": Setting(
        f"{OPERATOR}.auto_batching_timeout",
        number_in_range(0, below=60_001),
        "milliseconds that a batch waits for expected requests",
        old_names=("batch_wait_ms",),
    ),
    "idle_timeout_s": Setting(
        "idle_timeout_s",
        number_in_range(1, below=86_401),
        "seconds after which an idle HTTP connection is closed; more than a proxy's in front of the service",
        default=IDLE_TIMEOUT_S,
    ),
    "max_requests": Setting("worker_num", positive_int, "concurrent requests, over gRPC and over HTTP each"),
    "max_queued_texts": Setting(
        "limits.queued_texts",
        positive_int,
        "texts of all requests that aren't answered yet",
        old_names=("max_waiting_texts",),
        old_keys=("limits.waiting_texts",),
    ),
    "max_texts": Setting("limits.texts", positive_int, "texts per request"),
    "max_characters": Setting("limits.characters", positive_int, "characters per text"),
    "max_top_k": Setting("limits.top_k", positive_int, "hits per query", default=MAX_TOP_K),
    "max_bytes": Setting("limits.bytes", number_in_range(1, below=2**31), "bytes per request"),  # as gRPC counts them
}


def add_settings_args(parser: argparse.ArgumentParser) -> None:
    """An option for each setting; `--help` shows no old names."""
    for name, setting in SETTINGS.items():
        help_text = f"{setting.help} (else ${_variable(name)}, else {setting.key} in the config)"
        bare: dict[str, Any] = {"nargs": "?", "const": setting.bare} if setting.bare is not None else {}
        parser.add_argument(f"--{name}", type=setting.parse, help=help_text, **bare)
        for old_name in setting.old_names:
            parser.add_argument(f"--{old_name}", type=setting.parse, help=argparse.SUPPRESS)


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def read_settings(options: Mapping[str, Any], environ: Mapping[str, str], config_file: Path) -> dict[str, Any]:
    """The value of every setting; logs what is no setting. Raises InputError that names what to change."""
    config = _read_yaml(config_file)
    if ignored := _ignored(environ, config):
        log(f"note: {', '.join(ignored)}: no setting of this service, ignored (web_service.py --help lists them)")
    settings = {}
    for name, setting in SETTINGS.items():
        given = [option for option in (name, *setting.old_names) if options.get(option) is not None]
        _report_replaced([f"--{option}" for option in given])
        settings[name] = options[given[0]] if given else _read_setting(name, setting, environ, config, config_file)
    if settings["max_texts"] > settings["max_queued_texts"]:
        raise InputError("--max_queued_texts: is less than --max_texts; raise it")
    return settings


def _report_replaced(names: Sequence[str]) -> None:
    """Logs the names after the first one, which takes their place."""
    for name in names[1:]:
        log(f"{name}: isn't used, {names[0]} takes its place")


def _read_setting(name: str, setting: Setting, environ: Mapping[str, str], config: Any, config_file: Path) -> Any:
    """A setting's value in the environment, else in the config."""
    variables = [_variable(option) for option in (name, *setting.old_names) if environ.get(_variable(option))]
    keys = [key for key in (setting.key, *setting.old_keys) if _look_up(config, key) is not None]
    _report_replaced(variables)
    if variables:
        source, given = variables[0], environ[variables[0]]
    else:
        _report_replaced(keys)
        key = keys[0] if keys else setting.key
        source, given = f"{config_file}: {key}", _look_up(config, key) if keys else setting.default
    is_switch = isinstance(given, bool) and setting.bare is not None
    if given is None or (isinstance(given, (dict, list, bool)) and not is_switch):
        raise InputError(f"{source}: give {setting.help}")
    try:
        value = setting.parse(str(given))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{source}: {error}") from None
    except ValueError:
        raise InputError(f"{source}: {given} isn't a number; give {setting.help}") from None
    return str(config_file.parent / value) if name in PATHS and value and not variables else value


def _ignored(environ: Mapping[str, str], config: Any) -> list[str]:
    """The SERVING_ variables and the keys of a config that are no settings, such as misspelled ones."""
    variables = {_variable(option) for name, setting in SETTINGS.items() for option in (name, *setting.old_names)}
    keys = {key for setting in SETTINGS.values() for key in (setting.key, *setting.old_keys)}
    given = {name for name in environ if name.startswith(ENVIRONMENT_PREFIX)} - OTHER_VARIABLES
    return [*sorted(given - variables), *(key for key in _dotted_keys(config) if key not in keys)]


def _dotted_keys(config: Any, depth: int = 5) -> Iterator[str]:
    """The dotted keys of the values in nested dicts; depth: of the dicts, since YAML's may contain themselves."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict) and depth:
            yield from (f"{key}.{inner}" for inner in _dotted_keys(value, depth - 1))
        else:
            yield str(key)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a service that listens on a host."""
    try:
        return all(ipaddress.ip_address(info[4][0]).is_loopback for info in socket.getaddrinfo(host, None))
    except OSError:  # check_ports reports it
        return False


def milvus_place(settings: Mapping[str, Any]) -> MilvusPlace | None:
    """Where in Milvus the index is, as `milvus_uri` or a file in `index_dir` says; None for an index of another kind.

    Raises InputError.
    """
    if settings["milvus_uri"] and settings["index_dir"]:
        raise InputError("--milvus_uri: is searched in place of --index_dir; leave one of the two out")
    options = MilvusOptions()
    given = {name: settings[name] or default for name, default in options._asdict().items() if name in SETTINGS}
    options = options._replace(**given)
    return find_place(options, MILVUS if options.milvus_uri else "", settings["index_dir"] or None, "--milvus_uri")


def check_access(settings: Mapping[str, Any]) -> None:
    """Raises InputError if other machines could search without a key; logs a line if they can ask for vectors."""
    host, has_index = settings["host"], settings["index_dir"] or settings["milvus_uri"]
    if settings["writable"] and not (has_index and settings["api_key_file"]):
        index = "--index_dir or --milvus_uri"
        raise InputError(
            f"--writable: give {'--api_key_file, so that not everyone may change it' if has_index else index}"
        )
    if settings["api_key_file"] or is_loopback(host):
        return
    if has_index:
        problem = "other machines could search the documents of the index without a key"
        raise InputError(f"--host {host}: {problem}; give --api_key_file, or listen on 127.0.0.1")
    log(f"note: --host {host}: other machines may call without a key; --api_key_file makes them send one")


def check_ports(settings: Mapping[str, Any]) -> None:
    """Raises InputError if a port can't be opened, before a model is loaded."""
    for name in ("rpc_port", "http_port"):
        host, port = settings["host"], settings[name]
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except (OSError, TypeError) as error:  # the latter for a name that isn't IDNA's
                reason = f"can't listen on {host}:{port} ({getattr(error, 'strerror', None) or error})"
                if isinstance(error, (socket.gaierror, TypeError)) or error.errno == errno.EADDRNOTAVAIL:
                    raise InputError(f"--host {host}: {reason}; give an address of this machine") from None
                raise InputError(f"--{name} {port}: {reason}; name another") from None


def _read_yaml(path: Path) -> Any:
    with open_for_reading(path) as file:
        try:
            return yaml.safe_load(file)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date's 13th month, not UTF-8
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise InputError(f"{path}{line}: isn't YAML; compare it with the config_nlp.yml of this project") from None


def _look_up(config: Any, dotted_key: str) -> Any:
    for key in dotted_key.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config
