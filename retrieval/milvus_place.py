"""Where a corpus is in Milvus: the options of --ann milvus, and the file that keeps them. Imports no Paddle."""

import argparse
from pathlib import Path
from typing import NamedTuple

from common.cli import number_in_range
from common.errors import InputError
from common.files import make_folder, read_json, write_json
from common.logs import log
from retrieval.corpus import Corpus
from retrieval.milvus_bulk import BulkFolder
from retrieval.milvus_collection import DEFAULT_COLLECTION, INDEX_TYPES, alias_target
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_server import TOKEN_VARIABLE, MilvusServer, check_address, connect

MILVUS = "milvus"
PLACE_FILE = "milvus.json"  # in --index_dir: where the collection is, and whose vectors it has
EMBEDDED_FOLDER = "milvus.db"  # in --index_dir: the embedded Milvus


class MilvusOptions(NamedTuple):
    """Values of the options of `add_milvus_args`, which have the same names."""

    milvus_uri: str | None = None
    milvus_collection: str | None = None
    milvus_database: str = ""
    milvus_token_file: str = ""
    milvus_ca_file: str = ""
    milvus_index_type: str = INDEX_TYPES[0]
    milvus_shards: int = 1
    milvus_rebuild: bool = False
    milvus_bulk_dir: str | None = None
    milvus_bulk_path: str | None = None

    def bulk_folder(self) -> BulkFolder | None:
        """The folder of files to import, if there is to be one."""
        if self.milvus_bulk_dir is None:
            return None
        path = Path(self.milvus_bulk_dir)
        return BulkFolder(path, str(path.absolute()) if self.milvus_bulk_path is None else self.milvus_bulk_path)


class MilvusPlace(NamedTuple):
    """Where a corpus is, or will be."""

    server: MilvusServer
    collection: str  # an alias
    file: Path | None = None  # PLACE_FILE; an embedded Milvus has one

    def __str__(self) -> str:
        return f"{self.collection} at {self.server.uri}"

    def has_collection(self) -> bool:
        """Whether there is a complete collection. Raises InputError."""
        if self.server.is_embedded and self.file:  # of several processes, one alone can open it
            return self.file.is_file()
        return alias_target(self.server, connect(self.server), self.collection) is not None

    def open(self) -> MilvusIndex:
        """The complete collection. Raises InputError if there is none, or if it isn't the one that the file names."""
        index = MilvusIndex.open(self.server, self.collection)
        kept = read_json(self.file) if self.file and self.file.is_file() else {}
        for name in ("model", "corpus"):
            if kept.get(name, getattr(index.info, name)) != getattr(index.info, name):
                problem = f"{self} now has vectors of another {name}"
                raise InputError(f"{self.file}: {problem}; remove the file to use them, or give --milvus_collection")
        return index

    def check(self, index: MilvusIndex, model: str, corpus: Corpus | None = None, precision: str | None = None) -> None:
        """Raises InputError if the collection has vectors of another model or corpus; logs another precision.

        model: the encoder's fingerprint; precision: the encoder's.
        """
        if index.info.model != model:
            remedy = "give its model, another --milvus_collection, or build it anew with recall.py --milvus_rebuild"
            raise InputError(f"{self}: its vectors come from another model or --max_seq_length; {remedy}")
        if corpus is not None and corpus.sha256 != index.info.corpus:
            remedy = "leave --corpus_file out, give another --milvus_collection, or --milvus_rebuild"
            raise InputError(f"{self}: was built from another corpus, or the corpus file has changed since; {remedy}")
        if precision and index.info.precision != precision:
            log(f"--precision {precision}: the vectors of {self} were computed in {index.info.precision}")

    def save(self, index: MilvusIndex) -> None:
        """Writes the file, if there is to be one."""
        if self.file:
            uri = Path(self.server.uri).name if self.server.is_embedded else self.server.uri
            make_folder(self.file.parent)
            content = {"uri": uri, "database": self.server.database, "collection": self.collection}
            write_json(self.file, {**content, "model": index.info.model, "corpus": index.info.corpus})


def add_milvus_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options of --ann milvus."""
    defaults = MilvusOptions()
    add = parser.add_argument_group("--ann milvus").add_argument
    uri_help = f"address of a server, http or https (default: an embedded Milvus, {EMBEDDED_FOLDER} in --index_dir)"
    add("--milvus_uri", metavar="URI", help=uri_help)
    add(
        "--milvus_collection", metavar="NAME", help=f"alias of the collection to search (default: {DEFAULT_COLLECTION})"
    )
    add("--milvus_database", metavar="NAME", default=defaults.milvus_database, help="database (default: Milvus's own)")
    token_help = f"file with user:password or a token (default: ${TOKEN_VARIABLE})"
    add("--milvus_token_file", metavar="FILE", default=defaults.milvus_token_file, help=token_help)
    ca_help = "PEM file of the authority that signed the certificate of an https address"
    add("--milvus_ca_file", metavar="FILE", default=defaults.milvus_ca_file, help=ca_help)
    add("--milvus_index_type", choices=INDEX_TYPES, default=defaults.milvus_index_type, help="of a new collection")
    add("--milvus_shards", type=number_in_range(1, below=65), default=1, help="of a new collection; each takes writes")
    rebuild_help = "build a new collection though there is one, and then search it under the same name"
    add("--milvus_rebuild", action="store_true", help=rebuild_help)
    bulk_help = "write the documents of a new collection into files in this folder, which the server then imports"
    add("--milvus_bulk_dir", metavar="DIR", help=bulk_help)
    path_help = "what the server calls --milvus_bulk_dir: a folder on its disk or in its bucket (default: the same)"
    add("--milvus_bulk_path", metavar="PATH", help=path_help)


def find_place(
    options: MilvusOptions, ann: str, index_dir: str | None, switch: str = f"--ann {MILVUS}"
) -> MilvusPlace | None:
    """Where the corpus is in Milvus: as the options say, or the file in index_dir; None for another engine.

    switch: the option that asks for Milvus, for messages. Raises InputError.
    """
    file = Path(index_dir, PLACE_FILE) if index_dir else None
    is_saved = file is not None and file.is_file()
    if ann != MILVUS and not is_saved:
        given = [name for name, value in MilvusOptions()._asdict().items() if getattr(options, name) != value]
        if given:
            raise InputError(f"--{given[0]}: has an effect with {switch} alone; add that, or leave the option out")
        return None
    kept = read_json(file) if file and is_saved else {}
    uri = options.milvus_uri or kept.get("uri")
    if uri and "://" in uri:
        check_address(uri)
    elif options.milvus_uri:
        raise InputError(f"--milvus_uri {uri}: isn't an http or https address; --index_dir alone embeds Milvus there")
    elif not index_dir:
        raise InputError("--ann milvus: give --milvus_uri, or an --index_dir for an embedded Milvus")
    else:
        uri = str(Path(index_dir, EMBEDDED_FOLDER))
    if options.milvus_bulk_dir and "://" not in uri:
        raise InputError("--milvus_bulk_dir: an embedded Milvus can't import files; leave it out, or give --milvus_uri")
    if options.milvus_bulk_path and not options.milvus_bulk_dir:
        raise InputError("--milvus_bulk_path: says where --milvus_bulk_dir is on the server; give that, too")
    database = options.milvus_database or str(kept.get("database") or "")
    server = MilvusServer(uri, database, options.milvus_ca_file, options.milvus_token_file)
    name = options.milvus_collection or str(kept.get("collection") or DEFAULT_COLLECTION)
    return MilvusPlace(server, name, file)
