"""One stage of recall.py over a corpus, with its time and memory: encoding to disk, or indexing from it."""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ann_util import ANN_CHOICES, HNSW_FILE, VECTORS_FILE, IndexOptions, build_index
from benchmarks.harness import peak_memory
from common.cli import ArgumentParser, run
from common.files import write_json
from common.options import add_vector_dtype_arg
from common.paddle_setup import set_up_paddle
from retrieval.corpus import read_corpus
from retrieval.documents import Documents
from retrieval.saved_index import LocalDocumentIndex, save_index

if __name__ == "__main__":
    set_up_paddle()

from common.device import set_device
from encoding.encoder import load_encoder
from retrieval.pipeline import encode_corpus


def resident_bytes() -> int:
    """Memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=["encode", "index"], required=True, help="what to measure")
    parser.add_argument("--params_path", required=True, help="checkpoint")
    parser.add_argument("--corpus_file", required=True, help="documents, one per line")
    parser.add_argument("--embedding_dir", required=True, help="folder of the vectors, which `encode` fills")
    parser.add_argument("--index_dir", required=True, help="folder of the index, which `index` writes")
    parser.add_argument("--ann", choices=ANN_CHOICES, default=ANN_CHOICES[0], help="kind of index")
    add_vector_dtype_arg(parser, "type of the vectors on disk and, with --ann exact, in the index")
    parser.add_argument("--report", required=True, help="JSON file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and reports."""
    args = build_parser().parse_args(argv)
    set_device("cpu")
    encoder = load_encoder(args.params_path, batch_size=32, text_count=0, engine="static")
    encoder.encode(["a long text, so that the computation takes its memory now" * 40] * 32)
    with_model = resident_bytes()
    start = time.perf_counter()
    corpus = read_corpus(args.corpus_file)
    embeddings = encode_corpus(encoder, corpus, Path(args.embedding_dir), args.vector_dtype)
    if args.stage == "index":
        with_model = resident_bytes()
        start = time.perf_counter()
        index = build_index(IndexOptions(args.ann, vector_dtype=args.vector_dtype), embeddings)
        save_index(args.index_dir, LocalDocumentIndex(index, Documents(corpus), encoder.fingerprint, corpus.sha256))
    seconds = time.perf_counter() - start
    files = [path for path in Path(args.index_dir).glob("*") if path.name in (HNSW_FILE, VECTORS_FILE)]
    sizes = {
        "vector_bytes": sum(path.stat().st_size for path in Path(args.embedding_dir).glob("*.npy")),
        "index_bytes": sum(path.stat().st_size for path in files),
    }
    write_json(Path(args.report), {"seconds": seconds, "bytes": max(0, peak_memory() - with_model), **sizes})
    return 0


if __name__ == "__main__":
    run(main)
