#!/bin/sh
# Predicts the similarity of text pairs on GPU 3, or on the CPU: sh scripts/predict.sh [gpu|cpu] [OPTIONS...]
set -eu
. "$(dirname -- "$0")/common.sh"

root_dir="checkpoints/inbatch"
on_gpus "3" predict.py \
    --params_path "${root_dir}/model_40/model_state.pdparams" \
    --output_emb_size 256 \
    --batch_size 128 \
    --max_seq_length 64 \
    --text_pair_file "recall/test.csv" \
    "$@"
