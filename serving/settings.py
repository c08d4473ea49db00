"""The settings of a service: from options, else the environment, else config_nlp.yml."""

import argparse
import errno
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from files import open_for_reading
from runtime import InputError, at_least

ENVIRONMENT_PREFIX = "SERVING_"


class Setting(NamedTuple):
    """One of them."""

    place: str  # in config_nlp.yml, with dots
    parse: Callable[[str], Any]
    help: str


OPERATOR = "op.ernie"
LOCAL = f"{OPERATOR}.local_service_conf"


PORT = at_least(0, below=65536)


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(choices)}")
        return text

    return parse


SETTINGS = {
    "model_dir": Setting(f"{LOCAL}.model_config", str, "folder of export_to_serving.py or export_model.py"),
    "host": Setting("host", str, "address to listen on; 0.0.0.0 for all"),
    "rpc_port": Setting("rpc_port", PORT, "gRPC port; 0 takes any that is free"),
    "http_port": Setting("http_port", PORT, "HTTP port; 0 takes any that is free"),
    "device": Setting(f"{LOCAL}.device", _choice("cpu", "gpu"), "cpu or gpu"),
    "precision": Setting(f"{LOCAL}.precision", _choice("fp32", "bf16", "fp16"), "fp32, bf16 or fp16 to compute in"),
    "workers": Setting(f"{OPERATOR}.concurrency", at_least(1), "encoders, each a process with the whole model"),
    "threads": Setting(
        f"{LOCAL}.thread_num", at_least(0, below=1025), "CPU threads of an encoder; 0 shares out all cores"
    ),
    "max_seq_length": Setting(
        f"{LOCAL}.max_seq_length",
        at_least(3, or_zero=True),  # [CLS], a token and [SEP]
        "tokens that texts are cut to; 0 takes the exported model's",
    ),
    "batch_size": Setting(f"{OPERATOR}.batch_size", at_least(1, below=65_537), "texts that are encoded together"),
    "batch_wait_ms": Setting(
        f"{OPERATOR}.auto_batching_timeout",
        at_least(0, below=60_001),
        "milliseconds that a batch waits for requests it expects",
    ),
    "max_requests": Setting("worker_num", at_least(1), "requests at a time, over gRPC and over HTTP each"),
    "max_waiting_texts": Setting("limits.waiting_texts", at_least(1), "texts of all requests that aren't answered yet"),
    "max_texts": Setting("limits.texts", at_least(1), "texts of a request"),
    "max_characters": Setting("limits.characters", at_least(1), "characters of a text"),
    "max_bytes": Setting("limits.bytes", at_least(1, below=2**31), "bytes of a request"),  # as gRPC counts them
}


def add_settings_args(parser: argparse.ArgumentParser) -> None:
    """An option for each setting."""
    for name, setting in SETTINGS.items():
        environment = f"{setting.help} (else ${ENVIRONMENT_PREFIX}{name.upper()}, else {setting.place} in the config)"
        parser.add_argument(f"--{name}", type=setting.parse, help=environment)


def read_settings(options: Mapping[str, Any], environ: Mapping[str, str], config_file: Path) -> dict[str, Any]:
    """The value of every setting. Raises InputError that names the option, variable or line to change."""
    config = _read_yaml(config_file)
    settings = {}
    for name, setting in SETTINGS.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        value = options.get(name)
        if value is None:
            where, given = (variable, environ[variable]) if environ.get(variable) else (None, None)
            if where is None:
                where, given = f"{config_file}: {setting.place}", _look_up(config, setting.place)
            if given is None or isinstance(given, (dict, list, bool)):
                raise InputError(f"{where}: give {setting.help}")
            try:
                value = setting.parse(str(given))
            except argparse.ArgumentTypeError as error:
                raise InputError(f"{where}: {error}") from None
            except ValueError:
                raise InputError(f"{where}: {given} isn't a number; give {setting.help}") from None
            if name == "model_dir" and where != variable:
                value = str(config_file.parent / value)
        settings[name] = value
    if settings["max_texts"] > settings["max_waiting_texts"]:
        raise InputError("--max_waiting_texts: is less than --max_texts; raise it")
    return settings


def check_ports(settings: Mapping[str, Any]) -> None:
    """Raises InputError if it can't listen on a port: loading the model first would only delay that."""
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


def _look_up(config: Any, place: str) -> Any:
    for key in place.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config
