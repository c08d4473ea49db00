#!/bin/sh
# Exports the trained model for serving: sh scripts/export_model.sh [OPTIONS...]
set -eu
. "$(dirname -- "$0")/common.sh"

"$python" -u export_model.py \
    --params_path "checkpoints/inbatch/model_40/model_state.pdparams" \
    --output_path "./output" \
    "$@"
