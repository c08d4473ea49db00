"""A saved index: a folder with the index, its documents, and fingerprints of model and corpus. Imports no Paddle."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from ann_util import ExactIndex, HnswIndex, VectorIndex
from common.errors import InputError
from common.files import atomic_folder, atomic_write, locked, read_json, resolve_interrupted_replace, sha256, write_json
from common.logs import log
from common.manifest import MANIFEST_FILE, check_manifest, write_manifest
from retrieval.corpus import Corpus

INDEX_FILE = "index.json"
DOCUMENTS_FILE = "documents.txt"
INDEX_CLASSES: dict[str, type[VectorIndex]] = {"hnswlib": HnswIndex, "exact": ExactIndex}
VERSION_LENGTH = 12  # hexadecimal digits
REMEDY = "remove the folder and build the index again"


@dataclass(frozen=True)
class DocumentIndex:
    """An index, and its documents in the order of their ids."""

    index: VectorIndex
    documents: Corpus
    model: str  # `Encoder.fingerprint` of its vectors
    corpus: str  # `Corpus.sha256` of the corpus that it was built from, without the documents that were added later
    precision: str | None = None  # of the encoder; None: not recorded, as in version 2.0.0


def has_index(folder: str | Path) -> bool:
    """Whether the folder exists, or its previous version if its replacement was interrupted."""
    return resolve_interrupted_replace(folder).exists()


def save_index(folder: str | Path, saved: DocumentIndex, new_documents: Iterable[str] = ()) -> DocumentIndex:
    """Writes an index to a folder, which is replaced as a whole, and returns it with the documents of that folder.

    new_documents: those added to the index after `saved.documents`. Raises InputError if the folder can't be written.
    """
    index = saved.index
    with atomic_folder(folder) as temporary:
        index.save(temporary)
        with atomic_write(temporary / DOCUMENTS_FILE) as file:
            file.writelines(document + "\n" for document in chain(saved.documents, new_documents))
        content = {
            "ann": next(ann for ann, index_class in INDEX_CLASSES.items() if type(index) is index_class),
            **index.settings,
            "model": saved.model,
            "corpus": saved.corpus,
            "precision": saved.precision,
        }
        write_json(temporary / INDEX_FILE, content)
        write_manifest(temporary)
    return replace(saved, documents=Corpus(Path(folder) / DOCUMENTS_FILE))


def index_version(folder: str | Path) -> str:
    """A name for what a saved index holds, which changes with every change of its files; "" if there is none."""
    file = resolve_interrupted_replace(folder) / MANIFEST_FILE
    try:
        return sha256(file)[:VERSION_LENGTH]  # the manifest has the hashes of all files
    except InputError:
        return ""


def _index_folder(folder: str | Path) -> Path:
    """The folder, or its previous version, see `has_index`. Raises InputError if it isn't a saved index."""
    folder = resolve_interrupted_replace(folder)
    for name in (MANIFEST_FILE, INDEX_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: isn't a saved index, it has no {name}; give another --index_dir")
    return folder


@contextlib.contextmanager
def locked_index(folder: str | Path) -> Iterator[None]:
    """Keeps other runs from changing a saved index until it is replaced. Raises InputError if one is changing it."""
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(_index_folder(folder) / MANIFEST_FILE))
        except BlockingIOError:
            raise InputError(f"{folder}: another run is changing it; run this again when it has finished") from None
        except OSError as error:
            raise InputError(f"{folder}: can't be locked against other runs ({error.strerror})") from None
        yield


def load_index(
    folder: str | Path, model: str | None = None, corpus: Corpus | None = None, precision: str | None = None
) -> DocumentIndex:
    """Reads a saved index. Raises InputError if one of its files is missing or has changed.

    model, corpus: the encoder's fingerprint and the documents; if given, an index of others raises InputError.
    precision: the encoder's; one of another precision is logged.
    """
    folder = _index_folder(folder)
    check_manifest(folder, remedy=REMEDY)
    content = read_json(folder / INDEX_FILE)
    try:
        index = INDEX_CLASSES[content["ann"]].load(folder, content)
        documents = Corpus(folder / DOCUMENTS_FILE)
        saved = DocumentIndex(index, documents, content["model"], content["corpus"], content.get("precision"))
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX_FILE}: isn't the description of an index (see {error}); {REMEDY}") from None
    if len(saved.documents) != len(index):
        raise InputError(f"{folder}: has {len(saved.documents)} documents and {len(index)} vectors; {REMEDY}")
    if model is not None and saved.model != model:
        remedy = "give the --params_path that it was built with, or another --index_dir"
        raise InputError(f"{folder}: its vectors come from another model or --max_seq_length; {remedy}")
    if precision and saved.precision and saved.precision != precision:
        log(f"--precision {precision}: the vectors of {folder} were computed in {saved.precision}")
    if corpus is not None and corpus.sha256 not in (saved.corpus, saved.documents.sha256):
        remedy = "add documents with --add_corpus, leave --corpus_file out, or give another --index_dir"
        raise InputError(f"{folder}: was built from another corpus, or the corpus file has changed since; {remedy}")
    return saved
