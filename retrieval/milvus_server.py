"""A connection to Milvus, and what its errors mean. Imports no Paddle; pymilvus is imported when it is needed."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import InputError
from common.files import make_folder, open_for_reading

if TYPE_CHECKING:
    from pymilvus import MilvusClient

TOKEN_VARIABLE = "MILVUS_TOKEN"
LACKS_TYPE = "this version lacks the index type; give another --milvus_index_type"
NO_ANSWER = "doesn't answer; see whether it runs, and whether the address and the port are right"
CERTIFICATE = ", and whether --milvus_ca_file holds the authority of its certificate"
CONNECTION_SECONDS, CALL_SECONDS = 10, 30  # with a float, pymilvus repeats a failed call for minutes
# Codes of errors: Milvus's pkg/merr of versions 2.3 to 2.6, and pymilvus's ErrorCode.
NO_CONNECTION, NO_COLLECTION, NO_DATABASE = 2, 100, 800
MISSING = ("collection not found", "can't find collection", "alias not found")
UNAVAILABLE = {NO_CONNECTION, 1, 2, 3, 4, 10}  # not ready, unavailable, memory, request limit, out of disk, rate limit


class MilvusUnavailable(InputError):
    """Milvus doesn't answer now; the same call may succeed later."""


class CollectionMissing(InputError):
    """There is no such collection or alias."""


class MilvusServer(NamedTuple):
    """Where Milvus is: an http or https address, or the folder of an embedded one, whose name ends in .db."""

    uri: str
    database: str = ""
    ca_file: str = ""  # PEM, for https with a certificate of one's own
    token_file: str = ""  # holds user:password or a token; without it the environment's MILVUS_TOKEN
    call_seconds: int = CALL_SECONDS  # after which a call has failed

    def __str__(self) -> str:
        return f"Milvus at {self.uri}"

    @property
    def is_embedded(self) -> bool:
        """Whether it is Milvus Lite in this process, which no other process can open meanwhile."""
        return "://" not in self.uri

    def token(self) -> str:
        """user:password or a token; "" if there is none. Raises InputError."""
        if not self.token_file:
            return os.environ.get(TOKEN_VARIABLE, "")
        with open_for_reading(self.token_file) as file:
            token = file.read(4096).decode("utf-8", "replace").strip()
        if not token or "\n" in token:
            raise InputError(f"{self.token_file}: isn't one line with user:password or a token")
        return token


def check_address(uri: str) -> None:
    """Raises InputError for an address that a server can't have, or that holds a password, which logs would show."""
    scheme, _, rest = uri.partition("://")
    if scheme not in ("http", "https") or not rest:
        raise InputError(f"--milvus_uri {scheme}://...: give an http or https address")
    if "@" in rest:
        remedy = f"put user:password into a file and give --milvus_token_file, or into ${TOKEN_VARIABLE}"
        raise InputError(f"--milvus_uri: holds a password, which logs would show; {remedy}")


def connect(server: MilvusServer) -> "MilvusClient":
    """A client. Raises InputError that says what to change, MilvusUnavailable if nothing answers."""
    token, certificate = server.token(), {"server_pem_path": server.ca_file} if server.ca_file else {}
    if server.ca_file:  # which pymilvus takes for a server that doesn't answer if it can't be read
        open_for_reading(server.ca_file).close()
    client_class = _import_client(server.is_embedded)
    if server.is_embedded:
        make_folder(Path(server.uri).absolute().parent)
    with milvus_errors(server):
        return client_class(server.uri, token=token, db_name=server.database, timeout=CONNECTION_SECONDS, **certificate)


def _import_client(embedded: bool) -> "type[MilvusClient]":
    remedy = "run `sh scripts/setup.sh --milvus`"
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is imported; otherwise it prints its own errors
    try:
        import pymilvus

        if embedded:
            _import_faiss()
            import milvus_lite  # noqa: F401, TID251
    except ImportError as error:
        raise InputError(f"{error.name} isn't installed: {remedy}") from None
    for name in list(logging.root.manager.loggerDict):  # they print errors with addresses and texts
        if name.partition(".")[0] in ("pymilvus", "milvus_lite"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return pymilvus.MilvusClient


def _import_faiss() -> None:
    """Imports faiss, with which Milvus Lite searches, so that it uses only its own OpenMP library.

    Once OpenVINO has a model, Paddle's OpenMP library is visible to everything that is loaded later: OpenVINO runs on
    Paddle's libtbb, which has the same name as its own, and that one opens libiomp5 for all. faiss would take the
    functions that it has from there, and the others from its own: each thread then computes all queries of a search,
    all at the same time in the same memory, and finds wrong documents.
    """
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | getattr(os, "RTLD_DEEPBIND", 0))  # looks into a library's own dependencies first
    try:
        import faiss  # noqa: F401, TID251
    finally:
        sys.setdlopenflags(flags)


@contextlib.contextmanager
def milvus_errors(server: MilvusServer, collection: str = "") -> Iterator[None]:
    """Raises an InputError of one line for an error of Milvus or of the network."""
    import grpc
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        raise _explained(server, collection, error.code, error.message) from None
    except grpc.RpcError as error:
        code = getattr(error, "code", lambda: None)()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise _refused(server) from None
        raise _no_answer(server) from None
    except (grpc.FutureTimeoutError, OSError):
        raise _no_answer(server) from None


def _explained(server: MilvusServer, collection: str, code: Any, message: str) -> InputError:
    """What an error of pymilvus means. Its message isn't shown where it might hold texts."""
    known = message.lower()
    if "auth" in known or "api key" in known:
        return _refused(server)
    if "incompatible with server" in known:
        return InputError(f"{server}: what answers there isn't Milvus 2.3 or later; look at the port")
    if code == NO_DATABASE or "database not found" in known:
        return InputError(f"{server}: has no database {server.database}; create it, or give another --milvus_database")
    if code == NO_COLLECTION or any(word in known for word in MISSING):
        return CollectionMissing(f"{server}: has no collection {collection}; build it with --corpus_file")
    if "open local milvus failed" in known:
        why = "another process has it open, or its files are damaged"
        return InputError(f"{server.uri}: can't be opened ({why}); close that process, or give another --milvus_uri")
    if "index type" in known or "index_type" in known:
        return InputError(f"{server}: {LACKS_TYPE}")
    if re.search(r"\b(m|efconstruction)\b.* range", known):
        return InputError(f"{server}: doesn't build such a graph ({_one_line(message)}); lower --hnsw_m or --hnsw_ef")
    if "quota" in known or "no space" in known or "disk full" in known:
        return MilvusUnavailable(f"{server}: its disk or its quota is full; make room, then run this again")
    if code in UNAVAILABLE or "unavailable" in known or any(word in known for word in ("retry", "deadline", "timeout")):
        return _no_answer(server)
    return InputError(f"{server}: failed with code {code} ({_one_line(message)})")


def _no_answer(server: MilvusServer) -> MilvusUnavailable:
    """Over https, a certificate that isn't trusted looks the same."""
    return MilvusUnavailable(f"{server}: {NO_ANSWER}{CERTIFICATE if server.uri.startswith('https') else ''}")


def _refused(server: MilvusServer) -> InputError:
    remedy = f"give --milvus_token_file with user:password, or ${TOKEN_VARIABLE}"
    return InputError(f"{server}: refuses the user or the password; {remedy}")


def _one_line(message: str) -> str:
    """The beginning of a message, without what follows a line break or could be a text."""
    return message.split("\n")[0].split("[")[0].strip(" :")[:200]
