#!/bin/sh
# Builds the C++ server if need be and starts it on port 9393, for the model in serving_server:
# sh deploy/C++/start_server.sh [OPTIONS...]
# The options are those of python -m paddle_serving_server.serve, where the last of an option given twice wins.
set -eu

cd "$(dirname -- "$0")/../.."
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
server=${SERVING_BIN:-$(sh "deploy/C++/build.sh" --python "$python")}
# Paddle Serving passes on neither the server's exit code nor, without a GPU, --use_trt.
"$server" -check "$@" || exit
# exec: with no shell between them, the server ends when Paddle Serving does.
export SERVING_BIN="exec $server"
exec "$python" -W ignore -m paddle_serving_server.serve --model serving_server --port 9393 --thread 5 --ir_optim "$@"
