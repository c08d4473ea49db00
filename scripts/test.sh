#!/bin/sh
# Sets up .venv and what building the C++ server needs if need be, then lints and runs all tests. Arguments go to pytest:
# sh scripts/test.sh -k recall
set -eu

cd "$(dirname -- "$0")/.."
sh scripts/setup.sh --tests
sh deploy/C++/build.sh --fuzz --install-packages
python=.venv/bin/python

"$python" -m ruff check --quiet .
"$python" -m ruff format --check --quiet .
find . -name '*.sh' -not -path './.venv*' -exec sh -c 'for script; do sh -n "$script" || exit 1; done' sh {} +
exec "$python" -m pytest "$@"
