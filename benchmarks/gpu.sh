#!/usr/bin/env bash
# All that wants a GPU, in under ten minutes of one H100 or H200: `benchmarks/gpu.sh [folder]`. Rows and logs are left in
# the folder, by default runs/gpu. A step that fails or takes too long is reported, and the next one runs.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu}
mkdir -p "$folder"
failed=()

# step NAME SECONDS COMMAND...
step() {
    local name=$1 seconds=$2 started=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tee "$folder/$name.txt"
    local status=${PIPESTATUS[0]}
    echo "== $name: status $status after $((SECONDS - started)) s"
    [ "$status" -eq 0 ] || failed+=("$name")
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv | tee "$folder/gpu.txt"
step tests 130 python -m pytest -m gpu -q -n 8
step cores 100 python -m benchmarks.normalization --models qwen2.5-0.5b --ranks 16 --tasks 1 8 --rounds 5 --skip-svd \
    --no-compile --methods soft_frobenius frobenius soft_polar spectral whitening weight_norm sinkhorn \
    --output "$folder/cores"
step large 40 python -m benchmarks.normalization --models llama-3-8b --ranks 16 --tasks 1 --rounds 5 --skip-svd \
    --no-compile --methods soft_frobenius soft_polar sinkhorn --output "$folder/large"
# The small model with 16 mixed tasks, and the shapes of Qwen2.5-0.5B: mixed, pinned, merged, LoRA and Poly; eager, as a
# CUDA graph, compiled, and compiled with CUDA graphs. What a limit cuts off is compiled, and comes last.
step small 130 python -m benchmarks.speed --only 0 --turns 3 --measures training forward --output "$folder/small"
step half-billion 190 python -m benchmarks.speed --only 11 --turns 3 --measures training forward \
    --output "$folder/half-billion"

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
