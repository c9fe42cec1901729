#!/usr/bin/env bash
# Time the whole sampler on a GPU, in one call of under 9 minutes: 2048², bfloat16, five rounds, SDXL's sizes. To fit into
# that time, the loops without a compiler run 10 steps beside the plain sampler, and the compiled loop runs 50 beside the
# compiled sampler. A second argument times one variant of the sampler beside it instead (`python -m cutdiff.bench --help`
# lists the variants): compiled, and before that without a compiler where that shows something.
# Usage: cutdiff/bench/measure.sh FOLDER [fp8|graphs|fused|cudnn]. It writes a table and JSON for each run to FOLDER. It
# needs diffusers, but no installation of cutdiff. A run that is cut short leaves the rounds that it finished in the JSON.
set -euo pipefail
usage="usage: cutdiff/bench/measure.sh FOLDER [fp8|graphs|fused|cudnn]"
out=$(realpath -m "${1:?$usage}")
runs=${2:-all}
[[ $runs =~ ^(all|fp8|graphs|fused|cudnn)$ ]] || { echo "$usage" >&2; exit 2; }
cd "$(dirname "$0")/../.."
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA or ROCm device here"'
status=0
bench() { # NAME SECONDS ARGUMENT…
    timeout "$2" python3 -m cutdiff.bench --device cuda --json "$out/$1.json" "${@:3}" | tee "$out/$1.txt" || status=1
}
case $runs in
    all)
        bench loops 180 --steps 10 --only a b c
        bench compiled 345 --steps 50 --only d --compile
        ;;
    fp8 | graphs)
        bench "$runs" 525 --steps 50 --only --also "$runs" --compile
        ;;
    *)
        bench "$runs" 150 --steps 10 --only --also "$runs"
        bench "$runs-compiled" 375 --steps 10 --only --also "$runs" --compile
        ;;
esac
exit "$status"
