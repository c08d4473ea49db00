#!/bin/sh
# Sets up .venv if need be, then lints and runs the tests: sh scripts/test.sh [--fast] [PYTEST OPTIONS...]
#
#   --fast   only tests that start no process and no service; it builds nothing, and installs neither what the C++ server
#            needs nor the extras of setup.sh
#
# All other arguments go to pytest: sh scripts/test.sh -k recall
#
# The tests of the C++ server and of the pages need Debian or Ubuntu packages. As root this installs them; otherwise
# it leaves those tests out and says so.
set -eu

cd "$(dirname -- "$0")/.."
python=.venv/bin/python
serving_tests='serving deploy/test_web_service.py benchmarks/test_bench_serving.py test_export_to_serving.py test_vector_consistency.py'
fast=
for argument; do
    shift
    if [ "$argument" = --fast ]; then fast=1; else set -- "$@" "$argument"; fi
done

if [ -n "$fast" ]; then
    sh scripts/setup.sh --fast-tests
    marks='not process and not server and not browser and not cpp'
    left_out='tests of processes, of services, of pages, of the C++ server'
    if [ ! -e .venv/setup/onnx ]; then
        marks="$marks and not onnx"
        left_out="$left_out, of ONNX"
    fi
    if [ ! -e .venv/setup/milvus ]; then
        marks="$marks and not milvus"
        left_out="$left_out, of Milvus"
    fi
    if [ ! -e .venv/setup/openvino ]; then
        marks="$marks and not openvino"
        left_out="$left_out, of OpenVINO"
    fi
    if [ ! -e .venv/setup/serving ]; then
        for path in $serving_tests; do set -- "--ignore=tests/$path" "$@"; done
        left_out="$left_out, of Paddle Serving"
    fi
    echo "test: left out: $left_out; sh scripts/test.sh runs them" >&2
    set -- -m "$marks" "$@"
    export SEMANTIC_INDEX_FAST_TESTS=1
else
    sh scripts/setup.sh --tests
    marks=
    if ! sh deploy/C++/build.sh --fuzz --install-packages; then
        echo "test: left out: the tests of the C++ server; install these packages to run them" >&2
        marks='not cpp'
    fi
    if ! command -v chromedriver >/dev/null; then
        echo "test: left out: the tests of pages in a browser; they need Chromium" >&2
        marks="${marks:+$marks and }not browser"
    fi
    [ -z "$marks" ] || set -- -m "$marks" "$@"
fi

"$python" -m ruff check --quiet .
"$python" -m ruff format --check --quiet .
"$python" -m mypy --no-error-summary
find . -name '*.sh' -not -path './.venv*' -exec sh -c 'for script; do sh -n "$script" || exit 1; done' sh {} +
# A file at a time to each process: fixtures of a file are made once. Four processes take about 4 GB. tests/conftest.py
# sorts the files.
exec "$python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
