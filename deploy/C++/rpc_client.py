"""Gets the vectors of texts from the C++ server over baidu_std, brpc's protocol."""

import time
from collections.abc import Sequence

from clients import build_parser, make_request, outputs, rpc_inference, tokenize
from runtime import run


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the seconds that it took, and the vectors."""
    args = build_parser(__doc__).parse_args(argv)
    request = make_request(tokenize(args), as_bytes=True)
    start = time.time()
    response = rpc_inference(args.endpoint, request, args.timeout)
    print(f"time to cost :{time.time() - start} seconds")
    print(outputs(response))
    return 0


if __name__ == "__main__":
    run(main)
