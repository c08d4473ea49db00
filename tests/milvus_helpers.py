"""A real Milvus server of its own: the `milvus` wheel, with embedded etcd and message queue."""

import lzma
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

PASSWORD = "root:Milvus"  # of every new server
START_SECONDS = 120
COORDINATORS = ("rootCoord", "proxy", "queryCoord", "queryNode", "indexNode", "dataCoord", "dataNode")


class Milvus(NamedTuple):
    """A running server."""

    uri: str
    process: subprocess.Popen[bytes]
    token_file: Path

    def kill(self) -> None:
        """Ends it at once, as a loss of power would."""
        self.process.kill()
        self.process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def unpack_server(folder: Path) -> Path:
    """The server's program in a folder, where it is unpacked once."""
    packed = Path(str(find_spec("milvus").origin)).parent / "data" / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for file in packed.glob("*.lzma"):
        target = folder / file.stem
        if not target.exists():
            with lzma.open(file) as source, open(target, "wb") as output:
                shutil.copyfileobj(source, output)
            target.chmod(0o755)
    return folder / "milvus"


@contextmanager
def running_milvus(
    program: Path,
    folder: Path,
    authorization: bool = False,
    port: int = 0,
    session_seconds: int = 60,
    settings: Mapping[str, object] | None = None,
) -> Iterator[Milvus]:
    """Starts a server on free ports with its data in a folder, in which an earlier one may have left some.

    Its ports are open on all interfaces: its config can't change that. authorization: whether it wants PASSWORD. port:
    that of an earlier server; 0: any free one. session_seconds: how long it lives without the CPU, and
    how long the next one in the folder waits after it was killed. settings: others of Milvus's own.
    """
    from milvus import MilvusServerConfig

    folder.mkdir(parents=True, exist_ok=True)
    client_port, peer_port, metrics_port = free_ports(3)
    (folder / "etcd.yml").write_text(ETCD.format(folder=folder, client_port=client_port, peer_port=peer_port))
    config = MilvusServerConfig(data_dir=str(folder))
    ports = [name for name in config.configurable_items if name.endswith("_port") and name != "etcd_port"]
    config.update(**dict(zip(ports, free_ports(len(ports)), strict=True)), etcd_port=client_port)
    config.extra_configs |= {f"{part}.ip": "127.0.0.1" for part in COORDINATORS}
    config.extra_configs |= {"etcd.endpoints": f"127.0.0.1:{client_port}", "common.gracefulStopTimeout": 1}
    config.extra_configs |= {"common.session.ttl": session_seconds, **(settings or {})}
    config.set("authorization_enabled", authorization)
    config.resolve()
    if port:  # connections of an earlier server may still keep others from binding it
        config.set("proxy_port", port)
        config.write_config()
    environment = {**os.environ, "DEPLOY_MODE": "STANDALONE", "METRICS_PORT": str(metrics_port)}
    environment |= {"LD_LIBRARY_PATH": str(program.parent), "ETCD_CONFIG_PATH": str(folder / "etcd.yml")}
    environment["MILVUS_RUN_DIR"] = str(folder / "run")
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen([program, "run", "standalone"], cwd=folder, env=environment, stdout=log, stderr=log)
    token_file = folder / "token"
    token_file.write_text(PASSWORD + "\n")
    try:
        _wait_until_healthy(process, metrics_port, folder)
        yield Milvus(f"http://127.0.0.1:{config.get('proxy_port')}", process, token_file)
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with suppress(OSError), open_url(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            if b"OK" in answer.read():
                return
        time.sleep(0.2)
    raise AssertionError(f"Milvus didn't start: {(folder / 'server.log').read_text(errors='replace')[-2000:]}")


ETCD = """
name: default
data-dir: {folder}/etcd
listen-client-urls: http://127.0.0.1:{client_port}
advertise-client-urls: http://127.0.0.1:{client_port}
listen-peer-urls: http://127.0.0.1:{peer_port}
initial-advertise-peer-urls: http://127.0.0.1:{peer_port}
initial-cluster: default=http://127.0.0.1:{peer_port}
logger: zap
log-level: error
log-outputs: [{folder}/etcd.log]
"""
