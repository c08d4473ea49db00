"""What a corpus in Milvus is: the fields of its collection, the ids of its documents, whose vectors they are.

Imports no Paddle.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ann_util import IndexOptions
from common.errors import InputError
from common.texts import text_key
from retrieval.milvus_server import CollectionMissing, MilvusServer, milvus_errors

DEFAULT_COLLECTION = "semantic_index"
INDEX_TYPES = ("HNSW", "IVF_SQ8", "HNSW_SQ", "DISKANN", "IVF_FLAT", "FLAT", "AUTOINDEX")
EMBEDDED_TYPES = {"HNSW", "IVF_SQ8", "HNSW_SQ", "IVF_FLAT", "FLAT", "AUTOINDEX"}
WIDTH_NAMES = {"HNSW": "ef", "HNSW_SQ": "ef", "DISKANN": "search_list", "IVF_SQ8": "nprobe", "IVF_FLAT": "nprobe"}
PROPERTY = "semantic_index"  # of a collection: a `CollectionInfo` in JSON
ID, TEXT, VECTOR = "id", "text", "vector"  # fields
MAX_TEXT_BYTES = 65_535  # of a VarChar
MAX_LISTS = 65_536  # of an IVF index


@dataclass(frozen=True)
class CollectionInfo:
    """What a collection holds, and how it is searched."""

    model: str  # `Encoder.fingerprint` of its vectors
    corpus: str  # `Corpus.sha256` of the corpus that it was built from
    precision: str  # of the encoder
    lowercase: bool  # see `document_id`
    dimension: int
    index_type: str = "HNSW"  # one of INDEX_TYPES
    ef: int = 100  # candidates while searching: HNSW's ef, IVF's nprobe, DISKANN's search_list
    target_recall: float = 0.0  # see `VectorIndex`

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits of a hash of all that is the same in an interrupted build and in its continuation."""
        same = self.model, self.corpus, self.precision, self.dimension, self.index_type
        return hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]


def document_id(document: str, lowercase: bool = True) -> int:
    """The id of a document in Milvus: 63 bits of the BLAKE2b hash of its `text_key`, the same for every writer."""
    digest = hashlib.blake2b(text_key(document, lowercase).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def alias_target(server: MilvusServer, client: Any, alias: str) -> str | None:
    """The name of the collection that an alias names; None if there is no such alias. Raises InputError."""
    try:
        with milvus_errors(server, alias):
            found = client.describe_alias(alias, timeout=server.call_seconds)
    except CollectionMissing:
        return None
    return str(found["collection_name"])


def build_parameters(index_type: str, options: IndexOptions, rows: int) -> dict[str, int | str]:
    """The parameters of Milvus's index. IVF: 4 sqrt(rows) lists, as Milvus's documentation advises."""
    if index_type.startswith("HNSW"):
        graph: dict[str, int | str] = {"M": options.hnsw_m, "efConstruction": options.hnsw_ef}
        return {**graph, "sq_type": "SQ8"} if index_type == "HNSW_SQ" else graph
    if index_type.startswith("IVF"):
        return {"nlist": min(MAX_LISTS, max(1, round(4 * math.sqrt(rows))))}
    return {}


def check_sizes(texts: Sequence[str], first_row: int) -> None:
    """Raises InputError for a document that is too long for Milvus. first_row: the number of the first text."""
    for row, text in enumerate(texts, first_row):
        if len(text) * 4 > MAX_TEXT_BYTES and len(text.encode()) > MAX_TEXT_BYTES:
            problem = f"document {row} (counted from 0) has {len(text.encode())} bytes"
            raise InputError(f"{problem}, and Milvus takes up to {MAX_TEXT_BYTES}; shorten it")
