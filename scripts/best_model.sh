#!/bin/sh
# From raw pairs to the best model: sh scripts/best_model.sh [gpu|cpu] [--data DIR] [--output DIR] [--no_pretraining]
#        [OPTIONS...]
#
#   --data DIR         folder with train.csv, dev.csv and corpus.csv, and perhaps train_unsupervised.csv (default: recall)
#   --output DIR       folder of all that it writes (default: best_model)
#   --no_pretraining   leaves the pre-training out
#   OPTIONS            of every training, such as --from_scratch, --model_name_or_path, --batch_size, --epochs
#
# It checks the data, pre-trains on all texts, trains on the pairs, mines hard negatives with that model, trains on with
# them, and compares both models on test.csv, or on dev.csv if there is none. With --from_scratch, the first training on
# the pairs has BM25's hits as hard negatives, and learns its scores of them. Run it again after an interruption or a
# change: an interrupted training goes on, and a stage whose options and input files are as before isn't repeated.
set -eu
. "$(dirname -- "$0")/common.sh"

data=recall
output=best_model
pretraining=1
left=$#
while [ "$left" -gt 0 ]; do # the other options stay, in their order
    case $1 in
    --data) data=${2:?--data: give a folder} && shift 2 && left=$((left - 2)) ;;
    --output) output=${2:?--output: give a folder} && shift 2 && left=$((left - 2)) ;;
    --no_pretraining) pretraining='' && shift && left=$((left - 1)) ;;
    *) set -- "$@" "$1" && shift && left=$((left - 1)) ;;
    esac
done
from_scratch=
case " $* " in *" --from_scratch"[\ =]*) from_scratch=1 ;; esac
mkdir -p "$output/stages"

# stage NAME WRITTEN INPUT... -- COMMAND...: runs the command, unless it has ended before with the same words and inputs.
# What a run with others has written is removed first. An input needn't be there.
stage() {
    name=$1
    written=$2
    shift 2
    key=
    while [ "$1" != -- ]; do
        [ ! -e "$1" ] || key="$key $1 $(cksum <"$1")"
        shift
    done
    shift
    key="$key $*"
    printf '\n== %s\n' "$name"
    if [ "$(cat "$output/stages/$name.done" 2>/dev/null)" = "$key" ] && [ -e "$written" ]; then
        echo "unchanged since it ended: $written"
        return
    fi
    if [ "$(cat "$output/stages/$name.begun" 2>/dev/null)" != "$key" ]; then
        rm -rf "$written"
        printf '%s\n' "$key" >"$output/stages/$name.begun"
    fi
    "$@"
    printf '%s\n' "$key" >"$output/stages/$name.done"
}

train() { # SAVE_DIR TRAIN_SET_FILE OPTIONS...
    save_dir=$1
    train_set_file=$2
    shift 2
    on_gpus "0,1,2,3" train_batch_neg.py --train_set_file "$train_set_file" --save_dir "$save_dir" --resume_from latest \
        --evaluate --similar_text_pair "$data/dev.csv" --corpus_file "$data/corpus.csv" \
        --recall_result_dir "$save_dir" --recall_result_file recall_result.txt "$@"
}

check() {
    [ ! -e "$data/test.csv" ] || set -- --test "$data/test.csv"
    "$python" -u tools/check_data.py --train_set_file "$data/train.csv" --dev "$data/dev.csv" \
        --corpus_file "$data/corpus.csv" --report "$output/data.html" "$@"
}

pretrain() { # OPTIONS...
    [ ! -e "$data/train_unsupervised.csv" ] || set -- --text_file "$data/train_unsupervised.csv" "$@"
    on_gpus "0,1,2,3" tools/pretrain.py --text_file "$data/corpus.csv" --text_file "$data/train.csv" \
        --save_dir "$output/pretrained" --resume_from latest "$@"
}

mine_words() {
    "$python" -u tools/mine_hard_negatives.py --device "$device" --lexical bm25 --negatives 7 --random_share 1 \
        --max_relative_score 1 --write_scores --train_set_file "$data/train.csv" --corpus_file "$data/corpus.csv" \
        --output "$output/words/train.csv"
}

last_checkpoint() { # SAVE_DIR
    for folder in "$1"/model_[0-9]*; do echo "${folder##*_} $folder"; done | sort -n | tail -n 1 | cut -d ' ' -f 2-
}

mine() {
    on_gpus "0,1,2,3" tools/mine_hard_negatives.py --params_path "$trained" --train_set_file "$data/train.csv" \
        --corpus_file "$data/corpus.csv" --index_dir "$output/mined/index" --output "$output/mined/train.csv"
}

recall() { # CHECKPOINT RESULT OPTIONS...
    checkpoint=$1
    result=$2
    shift 2
    "$python" -u recall.py --device "$device" --params_path "$checkpoint" --similar_text_pair "$judged" --recall_num 50 \
        --recall_result_dir "$output" --recall_result_file "$result" "$@"
}

compare() {
    rm -rf "$output/index"
    recall "$trained" trained.txt --index_dir "$output/mined/index"
    recall "$again" trained_again.txt --index_dir "$output/index" --corpus_file "$data/corpus.csv"
    "$python" -u evaluate.py --similar_text_pair "$judged" --recall_num 50 --corpus_file "$data/corpus.csv" \
        --recall_result_file "$output/trained_again.txt" --compare "$output/trained.txt" --report "$output/report.html"
}

judged=$data/test.csv
[ -e "$judged" ] || judged=$data/dev.csv
trained=$output/trained/model_best
again=$output/trained_again/model_best

stage check "$output/data.html" "$data/train.csv" "$data/dev.csv" "$data/test.csv" "$data/corpus.csv" -- check
pretrained=
if [ -n "$pretraining" ]; then
    stage pretrain "$output/pretrained" "$data/train.csv" "$data/train_unsupervised.csv" "$data/corpus.csv" -- pretrain "$@"
    pretrained=$(last_checkpoint "$output/pretrained")
fi
pairs=$data/train.csv
if [ -n "$from_scratch" ]; then
    stage mine_words "$output/words" "$data/train.csv" "$data/corpus.csv" -- mine_words
    pairs=$output/words/train.csv
fi
stage train "$output/trained" "$pairs" "$data/dev.csv" "$data/corpus.csv" ${pretrained:+"$pretrained/manifest.json"} -- \
    train "$output/trained" "$pairs" ${from_scratch:+--teacher_scores --teacher_scale 0.3} "$@" \
    ${pretrained:+--init_from_ckpt "$pretrained"}
stage mine "$output/mined" "$data/train.csv" "$data/corpus.csv" "$trained/manifest.json" -- mine
stage train_again "$output/trained_again" "$output/mined/train.csv" "$data/dev.csv" "$data/corpus.csv" \
    "$trained/manifest.json" -- train "$output/trained_again" "$output/mined/train.csv" "$@" --init_from_ckpt "$trained"
stage compare "$output/report.html" "$judged" "$data/corpus.csv" "$trained/manifest.json" "$again/manifest.json" -- compare

printf '\n== written\n'
echo "  $output/data.html                  what the check found in the data"
echo "  $output/report.html                both models on $judged"
echo "  $trained         the model of the first training"
echo "  $again   trained on with its hard negatives; $output/index is its index"
