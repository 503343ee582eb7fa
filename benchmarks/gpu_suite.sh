#!/bin/sh
# Checks and measures the CUDA path in three parts, without a network:
#
#   python -m benchmarks.gpu_prepare gpu_kit --tokenizer path/to/llama-2     # before, with a network
#   sh benchmarks/gpu_suite.sh correct 300
#   sh benchmarks/gpu_suite.sh fast 540
#   sh benchmarks/gpu_suite.sh whole 540
#
# The number is the seconds that the part may take. Steps that matter most come first. Each has a
# time limit of its own, and one that fails does not stop the others. Each result is a line of
# $OUT/results.jsonl as soon as it is known, and all output is in $OUT/PART.log. Started again, a
# part skips the steps that succeeded. It exits with status 1 unless all have.
#
# KIT is the folder of gpu_prepare. CACHE_ROOT gets the random weights of the large model, 13 GB:
# loading them is quickest from memory, as under /dev/shm. SMALL=true DEVICE=cpu tries every step
# with SmolLM2 on a CPU.
set -u
cd "$(dirname "$0")/.." || exit 2
part=${1:-}
seconds=${2:-540}
case $part in correct | fast | whole) ;; *)
    echo "usage: gpu_suite.sh correct|fast|whole [SECONDS]" >&2
    exit 2
    ;;
esac
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-false}
KIT=${KIT:-gpu_kit}
OUT=${OUT:-experiments/gpu_suite}
CACHE_ROOT=${CACHE_ROOT:-$OUT/cache}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
results=$OUT/results.jsonl
deadline=$(($(date +%s) + seconds))
failed=0
export PYTHONUNBUFFERED=1 TEST_DEVICE="$DEVICE" HF_HUB_OFFLINE=1
export PYTORCH_ALLOC_CONF=expandable_segments:True # as the scripts set it

where="--data_root $KIT/data --cache_root $CACHE_ROOT --device $DEVICE"
models="--models llama-2-7b --tokenizer $KIT/tokenizer"
base="--llm_base_model $CACHE_ROOT/llama-2-7b-random --llm_base_tokenizer $KIT/tokenizer"
sizes="--batch_size 16 --steps 3"
scoring="--users 1 --title_tokens 10 --batch_sizes 16 64 --dequantize"
rounds="--batch_size 16 --rounds 1"
retriever="--max_steps 300 --val_iterations 150"
ranker="--max_steps 30 --lora_val_iterations 30 --val_users 64"
augmentation="--max_steps 5 --lora_val_iterations 5"
datasets=${DATASETS:-games ml-100k}
if [ "$SMALL" = true ]; then
    datasets=ml-100k
    models="--models smollm2-135m"
    base="--llm_base_model smollm2-135m"
    sizes="--batch_size 2 --steps 1"
    scoring="--users 1 --title_tokens 2 --batch_sizes 2"
    rounds="--batch_size 2 --rounds 1"
    retriever="--max_steps 60 --val_iterations 30"
    ranker="--max_steps 3 --lora_val_iterations 3 --val_users 2 --train_batch_size 2 --llm_max_history 3"
    augmentation="--max_steps 1 --train_batch_size 1 --local_examples 0 --max_new_tokens 2 --llm_max_text_len 64"
fi

# step NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, unless it has succeeded before
step() {
    name=$1 limit=$2
    shift 2
    if grep -qs "^{\"part\": \"$part\", \"step\": \"$name\", \"status\": 0," "$results"; then
        echo "$name: already done"
        return
    fi
    [ "$SMALL" = true ] && limit=$((limit * 10)) # a CPU may be slow
    start=$(date +%s)
    left=$((deadline - start))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 1 ]; then
        echo "$name: no time left"
        failed=1
        return
    fi
    echo "$name: $*"
    timeout -k 5 "$limit" "$@" > "$OUT/step.out" 2> "$OUT/step.err"
    status=$?
    # The last line of a benchmark is its result. One that was stopped left the rows it had.
    result=$(tail -n 1 "$OUT/step.out" | grep '^{.*}$')
    if [ -z "$result" ]; then
        result="{\"rows\": [$(tr '\r' '\n' < "$OUT/step.err" | grep '^{.*}$' | paste -s -d , -)]}"
    fi
    printf '{"part": "%s", "step": "%s", "status": %d, "seconds": %d, "result": %s}\n' \
        "$part" "$name" "$status" $(($(date +%s) - start)) "$result" >> "$results"
    {
        echo "== $name: $*"
        cat "$OUT/step.out" "$OUT/step.err"
        echo "== $name: status $status"
    } | tr '\r' '\n' >> "$OUT/$part.log"
    if [ "$status" -ne 0 ]; then
        echo "$name: failed with status $status, see $OUT/$part.log" >&2
        failed=1
    fi
}

# The script of a step that sends SIGTERM as soon as the file $0 exists, and expects status 143.
terminated='rm -f "$0"; "$@" & pid=$!
until [ -e "$0" ] || ! kill -0 $pid; do sleep 0.2; done
kill -TERM $pid; wait $pid; test $? -eq 143'

if ! "$PYTHON" -c "import bitsandbytes" 2> "$OUT/step.err" && [ -d "$KIT/wheels" ]; then
    [ -d "$OUT/site" ] || "$PYTHON" -m pip install -q --no-index --no-deps --no-compile \
        --target "$OUT/site" "$KIT"/wheels/*.whl
    export PYTHONPATH="$OUT/site${PYTHONPATH:+:$PYTHONPATH}"
fi

if [ "$part" != correct ] && [ "$SMALL" != true ]; then
    echo "random weights in $CACHE_ROOT, unless they are there"
    timeout 200 "$PYTHON" -c "import sys, torch; from benchmarks.language_models import prepare; \
prepare('llama-2-7b', torch.device(sys.argv[1]), *sys.argv[2:])" \
        "$DEVICE" "$CACHE_ROOT" "$KIT/tokenizer"
fi

# shellcheck disable=SC2086  # the variables hold several words
case $part in
correct)
    step machine 60 "$PYTHON" -m benchmarks.gpu_machine --device "$DEVICE"
    step tests 400 "$PYTHON" -m pytest tests/test_gpu.py -v -p no:cacheprovider --tb short
    ;;
fast)
    step letters 330 "$PYTHON" -m benchmarks.ranker_variants $where $models $sizes \
        --datasets $datasets --profile
    step published 240 "$PYTHON" -m benchmarks.ranker_train $where $models $rounds \
        --datasets ml-100k
    step scoring 180 "$PYTHON" -m benchmarks.ranker_inference --cache_root "$CACHE_ROOT" \
        --device "$DEVICE" $models $scoring --figure "$OUT/ranker_inference.png"
    step titles 150 "$PYTHON" -m benchmarks.ranker_variants $where $models $sizes \
        --datasets ml-100k --verbalizers titles
    ;;
whole)
    step retriever 90 "$PYTHON" train_retriever.py --dataset_code ml-100k $where $retriever \
        --export_root "$OUT/retriever" --overwrite
    rank="$PYTHON train_ranker.py --llm_retrieved_path $OUT/retriever $where $base $ranker"
    rank="$rank --llm_load_in_4bit true --export_root $OUT/ranker"
    step terminated 240 sh -c "$terminated" "$OUT/ranker/checkpoint.safetensors" \
        $rank --save_seconds 1 --overwrite
    step resumed 300 $rank --resume
    step augmentation 200 "$PYTHON" augment_data.py --dataset_code custom $where $base \
        --interactions "$KIT/data/small/interactions.csv" --items "$KIT/data/small/items.csv" \
        --min_uc 3 --min_sc 1 --llm_load_in_4bit true $augmentation \
        --export_root "$OUT/augmented" --overwrite
    ;;
esac
rm -f "$OUT/step.out" "$OUT/step.err"
exit $failed
