#!/bin/sh
# Trains on GPUs 0 to 3, or in one process on the CPU: sh scripts/train_batch_neg.sh [gpu|cpu] [OPTIONS...]
set -eu
. "$(dirname -- "$0")/common.sh"

root_path=inbatch
on_gpus "0,1,2,3" train_batch_neg.py \
    --save_dir "./checkpoints/${root_path}" \
    --batch_size 64 \
    --learning_rate 5E-5 \
    --epochs 3 \
    --save_steps 10 \
    --max_seq_length 64 \
    --margin 0.2 \
    --train_set_file recall/train.csv \
    --evaluate \
    --recall_result_dir "recall_result_dir" \
    --recall_result_file "recall_result.txt" \
    --hnsw_m 100 \
    --hnsw_ef 100 \
    --recall_num 50 \
    --similar_text_pair "recall/dev.csv" \
    --corpus_file "recall/corpus.csv" \
    "$@"
