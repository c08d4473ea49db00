#!/bin/sh
# Builds the C++ server if necessary and starts it on port 9393, for the model in serving_server:
# sh deploy/C++/start_server.sh [OPTIONS...]
# The options are those of python -m paddle_serving_server.serve; the last one wins if one is given twice.
set -eu

cd "$(dirname -- "$0")/../.."
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
# Paddle Serving runs this in a shell: quotes for a path with spaces, and exec so that the server replaces the shell.
if [ -z "${SERVING_BIN:-}" ]; then
    server=$(sh "deploy/C++/build.sh" --python "$python")
    SERVING_BIN="'$(printf '%s' "$server" | sed "s/'/'\\\\''/g")'"
fi
# A GPU build opens CUDA's libraries by name; its wheels have them in folders that only Python knows.
folders='import glob, sysconfig; print(":".join(glob.glob(glob.escape(sysconfig.get_path("purelib")) + "/nvidia/*/lib")))'
nvidia=$("$python" -c "$folders")
[ -z "$nvidia" ] || export LD_LIBRARY_PATH="$nvidia${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export SERVING_BIN="exec ${SERVING_BIN#exec }"
set -- --model serving_server --port 9393 --thread 5 --ir_optim "$@"
# Checked first, because Paddle Serving takes several seconds to start the server and reports wrong values as tracebacks.
sh -c "$SERVING_BIN -check \"\$@\"" sh "$@" || exit
exec "$python" -W ignore -m paddle_serving_server.serve "$@"
