#!/bin/sh
# Evaluates the recall result: sh scripts/evaluate.sh [OPTIONS...]
set -eu
. "$(dirname -- "$0")/common.sh"

"$python" -u evaluate.py \
    --similar_text_pair "recall/dev.csv" \
    --recall_result_file "./recall_result_dir/recall_result.txt" \
    --recall_num 50 \
    "$@"
