#!/bin/sh
# Vectors and similarities through Paddle Inference: sh deploy/python/deploy.sh [OPTIONS...]
set -eu

cd "$(dirname -- "$0")/../.."
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
exec "$python" -u deploy/python/predict.py --model_dir=./output "$@"
