#!/bin/sh
# Builds the C++ server if need be and starts it on port 9393, for the model in serving_server:
# sh deploy/C++/start_server.sh [OPTIONS...]
# The options are those of python -m paddle_serving_server.serve, where the last of an option given twice wins.
set -eu

cd "$(dirname -- "$0")/../.."
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
# Paddle Serving gives a shell this command, which ends as the server: exec, and quotes for a path with spaces.
if [ -z "${SERVING_BIN:-}" ]; then
    server=$(sh "deploy/C++/build.sh" --python "$python")
    SERVING_BIN="'$(printf '%s' "$server" | sed "s/'/'\\\\''/g")'"
fi
# A GPU build opens CUDA's libraries by name, which its wheels have in folders of their own; Python alone would know them.
folders='import glob, sysconfig; print(":".join(glob.glob(glob.escape(sysconfig.get_path("purelib")) + "/nvidia/*/lib")))'
nvidia=$("$python" -c "$folders")
[ -z "$nvidia" ] || export LD_LIBRARY_PATH="$nvidia${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export SERVING_BIN="exec ${SERVING_BIN#exec }"
set -- --model serving_server --port 9393 --thread 5 --ir_optim "$@"
# It starts the server only after several seconds of its own, and answers wrong values with tracebacks.
sh -c "$SERVING_BIN -check \"\$@\"" sh "$@" || exit
exec "$python" -W ignore -m paddle_serving_server.serve "$@"
