#!/usr/bin/env bash
# The whole sampler on a GPU, in one call of under 9 minutes: 2048², bfloat16, five rounds, SDXL's sizes. So that it fits,
# the loops without a compiler run at 10 steps beside ours, and the compiled one at 50 beside ours compiled. In calls of
# their own, ours in 8 bits beside ours, both compiled (`fp8`); and ours with fused layers, without a compiler and with
# one, with cuDNN's attention, and recorded as CUDA graphs (`fused`).
# Usage: cutdiff/bench/measure.sh FOLDER [fp8|fused]. Writes a table and JSON for each run there: loops and compiled, or
# fp8, or fused and fused-compiled; needs diffusers, but no installation of cutdiff. A run that is cut short leaves its
# rounds in the JSON.
set -euo pipefail
usage="usage: cutdiff/bench/measure.sh FOLDER [fp8|fused]"
out=$(realpath -m "${1:?$usage}")
runs=${2:-all}
[[ $runs == all || $runs == fp8 || $runs == fused ]] || { echo "$usage" >&2; exit 2; }
cd "$(dirname "$0")/../.."
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA or ROCm device here"'
status=0
bench() { # NAME SECONDS ARGUMENT…
    timeout "$2" python3 -m cutdiff.bench --device cuda --json "$out/$1.json" "${@:3}" | tee "$out/$1.txt" || status=1
}
if [[ $runs == fp8 ]]; then
    bench fp8 500 --steps 50 --only --also fp8 --compile
elif [[ $runs == fused ]]; then
    bench fused 180 --steps 10 --only --also fused cudnn
    bench fused-compiled 345 --steps 10 --only --also fused cudnn graphs --compile
else
    bench loops 180 --steps 10 --only a b c
    bench compiled 345 --steps 50 --only d --compile
fi
exit "$status"
