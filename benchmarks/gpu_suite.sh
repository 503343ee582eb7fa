#!/bin/sh
# Measures what docs/results/not-measured.md lists for a GPU. It can be interrupted and started
# again: finished steps are skipped and an unfinished training resumes. Results are under $OUT.
#
#   DATA_ROOT=data RETRIEVERS=experiments TOKENIZER=path/to/llama-2 sh benchmarks/gpu_suite.sh
#
# RETRIEVERS holds runs of train_retriever.py as lru/<data set>; missing ones are trained first.
# TOKENIZER is the folder of Llama 2's tokenizer, whose model gets random weights; without it, the
# rows of the 7B model are left out. DEVICE=cpu SMALL=true tries all steps without a GPU, on one
# data set unless DATASETS names others.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-false}
DATA_ROOT=${DATA_ROOT:-data}
CACHE_ROOT=${CACHE_ROOT:-data/cache}
OUT=${OUT:-experiments/gpu_suite}
RETRIEVERS=${RETRIEVERS:-$OUT/experiments}
TOKENIZER=${TOKENIZER:-}
mkdir -p "$OUT"

models=smollm2-135m
large=
if [ -n "$TOKENIZER" ]; then
    models="smollm2-135m llama-2-7b"
    large="--tokenizer $TOKENIZER"
fi
where="--data_root $DATA_ROOT --cache_root $CACHE_ROOT --device $DEVICE"
datasets="ml-100k beauty games"
train="--batch_size 16 --rounds 10"
users="--users 5"
prompts="--prompts 200"
retriever="--preset tuned"
ranker="--lora_val_iterations 1000"
scale="--steps 10"
augmentation="--test_batch_size 64"
if [ "$SMALL" = true ]; then
    datasets=ml-100k
    train="--batch_size 2 --rounds 1"
    users="--users 1 --title_tokens 2"
    prompts="--prompts 2"
    retriever="--max_steps 200 --val_iterations 100"
    ranker="--max_steps 2 --lora_val_iterations 2 --train_batch_size 2 --llm_max_history 3"
    scale="--steps 1 --largest 1000"
    augmentation="--max_steps 2 --train_batch_size 2 --max_new_tokens 4 --llm_max_text_len 64"
fi
DATASETS=${DATASETS:-$datasets}

# step NAME COMMAND...: run a benchmark once and keep its last line of output as NAME.json
step() {
    name=$1
    shift
    if [ -e "$OUT/$name.json" ]; then
        echo "$name: already done"
        return
    fi
    echo "$name: $*"
    "$@" > "$OUT/$name.out"
    tail -n 1 "$OUT/$name.out" > "$OUT/$name.tmp"
    mv "$OUT/$name.tmp" "$OUT/$name.json"
}

# run FOLDER COMMAND...: finish the run in FOLDER, unless its metrics exist
run() {
    folder=$1
    shift
    for metrics in overall_metrics test_metrics augmentation; do
        if [ -e "$folder/$metrics.json" ]; then
            echo "$folder: already done"
            return
        fi
    done
    echo "$folder: $*"
    "$@" --export_root "$folder" --resume
}

# shellcheck disable=SC2086  # the variables hold several words
{
    step ranker_train $PYTHON -m benchmarks.ranker_train $where --models $models $large \
        --datasets $DATASETS $train
    step ranker_inference $PYTHON -m benchmarks.ranker_inference $where --models $models $large \
        $users --figure "$OUT/ranker_inference.png"
    for code in $DATASETS; do
        step "ranker_exactness-$code" $PYTHON -m benchmarks.ranker_exactness $where \
            --dataset_code "$code" $prompts
    done
    step scale $PYTHON -m benchmarks.scale --device "$DEVICE" $scale
    for code in $DATASETS; do
        run "$RETRIEVERS/lru/$code" $PYTHON train_retriever.py --dataset_code "$code" $where \
            $retriever
    done
    for code in $DATASETS; do
        rank="$PYTHON train_ranker.py --llm_retrieved_path $RETRIEVERS/lru/$code $where \
            --llm_base_model smollm2-135m --llm_load_in_4bit false $ranker"
        run "$OUT/smollm2-135m/$code" $rank
        run "$OUT/smollm2-135m-mixed/$code" $rank --train_candidates mixed
        run "$OUT/smollm2-135m-letters/$code" $rank --train_candidates mixed \
            --response_loss letters
    done
    augment="$PYTHON augment_data.py --dataset_code ml-100k $where --llm_base_model smollm2-135m \
        --llm_load_in_4bit false $augmentation"
    texts=$OUT/llm4idrec
    judge="--retriever_path $RETRIEVERS/lru/ml-100k"
    run "$texts/free" $augment
    run "$texts/constrained" $augment --reuse "$texts/free" --constrained
    run "$texts/free-judged" $augment --reuse "$texts/free" $judge
    run "$texts/constrained-judged" $augment --reuse "$texts/constrained" --constrained \
        $judge
    for model in lru sas; do
        train_on="$PYTHON train_retriever.py --dataset_code ml-100k --model_code $model $where \
            $retriever"
        run "$OUT/$model-none" $train_on
        for kind in free constrained free-judged constrained-judged; do
            run "$OUT/$model-$kind" $train_on --augmented "$texts/$kind"
            $PYTHON report.py --compare "$OUT/$model-none" "$OUT/$model-$kind"
        done
    done
    $PYTHON report.py --experiment_root "$OUT"
    for code in $DATASETS; do
        for kind in smollm2-135m smollm2-135m-mixed smollm2-135m-letters; do
            $PYTHON report.py --compare "$RETRIEVERS/lru/$code" "$OUT/$kind/$code"
        done
    done
}
