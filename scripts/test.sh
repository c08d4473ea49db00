#!/bin/sh
# Sets up .venv if need be, then lints and runs all tests. Arguments go to pytest: sh scripts/test.sh -k recall
#
# The tests of the C++ server need Debian or Ubuntu packages. Root gets them; where they can't be had, those tests are
# left out, and this says so.
set -eu

cd "$(dirname -- "$0")/.."
sh scripts/setup.sh --tests
if ! sh deploy/C++/build.sh --fuzz --install-packages; then
    echo "test: the tests of the C++ server are left out: install these packages to run them" >&2
    set -- -m "not cpp" "$@"
fi
python=.venv/bin/python

"$python" -m ruff check --quiet .
"$python" -m ruff format --check --quiet .
find . -name '*.sh' -not -path './.venv*' -exec sh -c 'for script; do sh -n "$script" || exit 1; done' sh {} +
exec "$python" -m pytest "$@"
