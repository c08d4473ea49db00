#!/bin/sh
# Converts an exported model for Paddle Serving: sh scripts/export_to_serving.sh [OPTIONS...]
set -eu
. "$(dirname -- "$0")/common.sh"

"$python" export_to_serving.py \
    --dirname "output" \
    --model_filename "inference.get_pooled_embedding.pdmodel" \
    --params_filename "inference.get_pooled_embedding.pdiparams" \
    --server_path "./serving_server" \
    --client_path "./serving_client" \
    --fetch_alias_names "output_embedding" \
    "$@"
