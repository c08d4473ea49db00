#!/bin/sh
# Runs the whole pipeline on a small generated dataset, offline and on the CPU: bash scripts/quickstart.sh [--full]
# Writes only to quickstart/. --full: also scripts/best_model.sh, which takes about ten minutes.
set -eu
full=
case ${1-} in
--full) full=1 ;;
?*) echo "error: $1: no such option; --full is the only one" >&2 && exit 2 ;;
esac
cd "$(dirname -- "$0")/.."
sh scripts/setup.sh
python=.venv/bin/python
data=quickstart/recall
work=quickstart
ann=hnswlib
"$python" -c 'import hnswlib' 2>/dev/null || ann=exact

say() { printf '\n== %s\n' "$*"; }

train() { # SAVE_DIR OPTIONS...: from random weights, with the same seed each time
    save_dir=$1
    shift
    "$python" train_batch_neg.py --device cpu --from_scratch "$work/tiny_ernie" --train_set_file "$data/train.csv" \
        --save_dir "$save_dir" --pooling mean --max_seq_length 64 --batch_size 64 --log_steps 20 "$@"
}

recall() { # NAME CHECKPOINT OPTIONS...: hits of the test queries
    name=$1
    params_path=$2
    shift 2
    "$python" recall.py --device cpu --params_path "$params_path" --similar_text_pair "$data/test.csv" \
        --corpus_file "$data/corpus.csv" --recall_result_dir "$work/results" --recall_result_file "$name.txt" \
        --recall_num 50 --batch_size 64 --ann "$ann" "$@"
}

evaluate() { # NAME: metrics of its hits
    "$python" evaluate.py --similar_text_pair "$data/test.csv" --recall_result_file "$work/results/$1.txt" \
        --recall_num 50 >"$work/results/$1.metrics"
    awk -F= -v name="$1" '/^recall/ { line = line sprintf("%9.1f", $2) } END { printf "%-18s%s\n", name, line }' \
        "$work/results/$1.metrics"
}

say "data: $data (generated, in the layout of the document)"
"$python" examples/make_dataset.py --output_dir "$work"
"$python" examples/make_tiny_ernie.py --train_set_file "$data/train.csv" --corpus_file "$data/corpus.csv" \
    --output_dir "$work/tiny_ernie"

say "baselines: BM25, and the model before training"
"$python" examples/bm25.py --similar_text_pair "$data/test.csv" --corpus_file "$data/corpus.csv" \
    --recall_result_dir "$work/results" --recall_result_file bm25.txt --recall_num 50
train "$work/untrained" --max_steps 1 --learning_rate 0
recall before_training "$work/untrained/model_1"

say "training"
train "$work/checkpoints" --epochs 2 --learning_rate 1e-3 --warmup_proportion 0.1 --margin 0 --scale 20
checkpoint=$(ls -d "$work"/checkpoints/model_* | sort -t_ -k2 -n | tail -n 1)
rm -rf "$work/index" # of an earlier run
recall after_training "$checkpoint" --index_dir "$work/index"

say "similarity of pairs (predict.py)"
head -n 3 "$data/test.csv" >"$work/pairs.csv"
"$python" predict.py --device cpu --params_path "$checkpoint" --text_pair_file "$work/pairs.csv" >"$work/results/cosines.txt"
paste "$work/results/cosines.txt" "$work/pairs.csv"

say "a vector (inference.py)"
"$python" inference.py --device cpu --params_path "$checkpoint" >"$work/results/vector.txt"
head -n 3 "$work/results/vector.txt"

say "export (export_model.py)"
"$python" export_model.py --params_path "$checkpoint" --output_path "$work/output"

say "top hits of a query (recall.py)"
head -n 5 "$work/results/after_training.txt"

say "evaluation on $(wc -l <"$data/test.csv" | tr -d ' ') test pairs (evaluate.py), in percent"
printf '%-18s%9s%9s%9s%9s%9s\n' '' Recall@1 @5 @10 @20 @50
for name in bm25 before_training after_training; do evaluate "$name"; done

if [ -n "$full" ]; then
    say "all steps on the way to the best model (scripts/best_model.sh)"
    sh scripts/best_model.sh cpu --data "$data" --output "$work/best_model" --from_scratch "$work/tiny_ernie" --pooling mean \
        --max_seq_length 64 --batch_size 64 --epochs 2 --learning_rate 1e-3 --warmup_proportion 0.1 --margin 0 --scale 20
fi

say "written"
echo "  $data/                 train.csv, dev.csv, test.csv, corpus.csv"
echo "  $checkpoint/    the trained model, for recall.py, predict.py and inference.py"
echo "  $work/results/          hits and metrics"
echo "  $work/index/            the index of the corpus"
echo "  $work/output/           the exported model"
echo "search it, in two terminals, after sh scripts/setup.sh --serving:"
echo "  $python deploy/python/web_service.py --model_dir $work/output --index_dir $work/index"
echo "  then open http://127.0.0.1:18082/?q=压力性损伤, or: curl -s 'http://127.0.0.1:18082/search?q=压力性损伤&top_k=3'"
echo "next: put your own files of the same form into recall/ and follow README.md (README_cn.md)"
