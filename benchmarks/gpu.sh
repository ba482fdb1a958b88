#!/usr/bin/env bash
# All that only a GPU can show, in ten minutes:
#
#     benchmarks/gpu.sh [FOLDER]         FOLDER: for logs and reports; gpu-results if it is not named
#
# Takes gptjax with jax[cuda13], PyTorch for CUDA, transformers, and Tiny Shakespeare (downloaded, or
# in $GPTJAX_CACHE_DIR). SMALL=1 tries the script itself, with small models, on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu-results}")
if [ -e "$out" ]; then
    echo "error: $out is there already, and its runs would not be done again; name another folder" >&2
    exit 2
fi
mkdir -p "$out"
failed=()
model=(gpt2 --dtype bfloat16 --batch-size 16 --gradient-accumulation-steps 1) tokens=256
char=(shakespeare_char --dtype bfloat16) steps=5000
if [ -n "${SMALL:-}" ]; then
    tiny=(--n-layer 2 --n-head 2 --n-embd 64 --block-size 64)
    model=(gpt2 "${tiny[@]}" --batch-size 4 --gradient-accumulation-steps 1) tokens=32
    char=(shakespeare_char "${tiny[@]}" --eval-interval 20) steps=40
fi

# run NAME SECONDS COMMAND...: the last lines of what it says, how it ended, how long it took.
run() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    local code=$?
    [ $code = 0 ] || failed+=("$name")
    echo "exit code $code after $((SECONDS - began)) of at most $limit s"
    tail -n "${LINES_SHOWN:-8}" "$out/$name.log"
}

# Training beside torch.compile with flash attention: at least 1.0x, 45% MFU.
run train 130 python -m gptjax bench train --config "${model[@]}" --seconds 30 --json "$out/train.json"

# nanoGPT's character setting to its loss of 1.4697, with its seconds.
LINES_SHOWN=3 run char 170 python train_jax.py "${char[@]}" --max-steps "$steps" \
    --run-dir "$out/char" --sample-tokens 0
grep -o '"val_loss": [0-9][0-9.]*' "$out/char/metrics.jsonl" | sort -k2 -g | head -1

# Sampling, 1, 16 and 128 side by side.
for n in 1 16 128; do
    run "sample$n" 60 python -m gptjax bench generate --config "${model[@]}" --against hf \
        --num-samples "$n" --max-new-tokens "$tokens" --seconds 8 --json "$out/sample$n.json"
done

# cuDNN's attention beside PyTorch, number by number; then its window beside XLA's attention.
run parity 45 python -m gptjax compare "$out/char" --precision bfloat16 --steps 20
banded=("${char[@]}" --attention-pattern dense banded --attention-window 100 --dropout 0
    --max-steps 20 --log-interval 1 --sample-tokens 0)
for kernel in xla cudnn; do
    LINES_SHOWN=2 run "window-$kernel" 40 python train_jax.py "${banded[@]}" --attention $kernel \
        --run-dir "$out/window-$kernel"
done

# A run that is resumed, and one that is not: bit for bit with XLA's deterministic operations.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true"
short=("${char[@]}" --eval-interval 20 --save-interval 20 --eval-batches 1 --sample-tokens 0
    --lr-decay-steps 40)
LINES_SHOWN=1 run whole 40 python train_jax.py "${short[@]}" --max-steps 40 --run-dir "$out/whole"
for steps in 20 40; do
    LINES_SHOWN=1 run "resumed-$steps" 30 python train_jax.py "${short[@]}" --max-steps $steps \
        --run-dir "$out/resumed"
done
run bitwise 20 python - "$out/whole" "$out/resumed" <<'PY'
import sys

import jax
import numpy as np

import gptjax

whole, resumed = (gptjax.load(folder, "latest").params for folder in sys.argv[1:])
same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), whole, resumed)
sys.exit(0 if all(jax.tree.leaves(same)) else f"not the same bits: {same}")
PY
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
