#!/usr/bin/env bash
# Runs all that needs a GPU, in one call of under 9 minutes: the tests marked gpu, then the micro-benchmarks around the
# network. A call with `network` runs those of the kernels inside of it.
# Usage: kernels/measure.sh FOLDER [network]. Writes gpu-tests.txt, bench.txt and bench.json there, or bench_network.txt
# and .json; needs no installation of cutdiff.
set -euo pipefail
usage="usage: kernels/measure.sh FOLDER [network]"
out=$(realpath -m "${1:?$usage}")
runs=${2:-around}
[[ $runs =~ ^(around|network)$ ]] || { echo "$usage" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA or ROCm device here"'
status=0
bench() { # MODULE SECONDS
    timeout "$2" python3 -m "cutdiff_kernels.$1" --json "$out/$1.json" 2>&1 | tee "$out/$1.txt" || status=1
}
if [[ $runs == network ]]; then
    bench bench_network 300
else
    tests=(tests/test_kernels.py tests/test_fused.py tests/test_fp8.py tests/test_compiled.py)
    timeout 280 python3 -m pytest -m gpu "${tests[@]}" 2>&1 | tee "$out/gpu-tests.txt" || status=1
    bench bench 240
fi
exit "$status"
