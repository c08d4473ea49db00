#!/bin/sh
# Predicts the similarity of text pairs on GPU 3, or on the CPU: sh scripts/predict.sh [gpu|cpu] [OPTIONS...]
set -eu
. "$(dirname -- "$0")/common.sh"

root_dir="checkpoints/inbatch"
on_gpus "3" predict.py \
    --params_path "${root_dir}/model_40/model_state.pdparams" \
    --batch_size 128 \
    --text_pair_file "recall/test.csv" \
    "$@"
