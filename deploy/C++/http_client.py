"""Gets the vectors of texts from the C++ server over HTTP."""

from collections.abc import Sequence

from clients import build_parser, http_inference, make_request, tokenize
from common.cli import run


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the shapes of the token ids, and the whole answer."""
    args = build_parser(__doc__).parse_args(argv)
    tokens = tokenize(args.texts, args.model_dir, args.max_seq_length, args.role)
    for array in tokens:
        print(array.shape)
    print(http_inference(args.endpoint, make_request(tokens), args.timeout))
    return 0


if __name__ == "__main__":
    run(main)
