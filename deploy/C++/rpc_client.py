"""Gets the vectors of texts from the C++ server over baidu_std, brpc's protocol."""

import time
from collections.abc import Sequence

from clients import build_parser, make_request, outputs, rpc_inference, tokenize
from common.cli import run


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the time in seconds, and the vectors."""
    args = build_parser(__doc__).parse_args(argv)
    request = make_request(tokenize(args.texts, args.model_dir, args.max_seq_length, args.role), as_bytes=True)
    start = time.perf_counter()
    response = rpc_inference(args.endpoint, request, args.timeout)
    print(f"time to cost :{time.perf_counter() - start} seconds")
    print(outputs(response))
    return 0


if __name__ == "__main__":
    run(main)
