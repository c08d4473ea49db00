#!/bin/sh
# Recalls from the corpus on GPU 3, or on the CPU: sh scripts/run_build_index.sh [gpu|cpu] [OPTIONS...]
set -eu
. "$(dirname -- "$0")/common.sh"

root_dir="checkpoints/inbatch"
on_gpus "3" recall.py \
    --recall_result_dir "recall_result_dir" \
    --recall_result_file "recall_result.txt" \
    --params_path "${root_dir}/model_40/model_state.pdparams" \
    --hnsw_m 100 \
    --hnsw_ef 100 \
    --batch_size 64 \
    --recall_num 50 \
    --similar_text_pair "recall/dev.csv" \
    --corpus_file "recall/corpus.csv" \
    "$@"
