#!/usr/bin/env bash
# All that needs a GPU, in one call of under 9 minutes: the tests marked gpu, then the micro-benchmarks.
# Usage: kernels/measure.sh FOLDER. Writes gpu-tests.txt, and a table and JSON of bench and of bench_network, there; needs
# no installation of cutdiff.
set -euo pipefail
out=$(realpath -m "${1:?usage: kernels/measure.sh FOLDER}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA or ROCm device here"'
status=0
timeout 230 python3 -m pytest -m gpu tests/test_kernels.py tests/test_fused.py tests/test_fp8.py tests/test_compiled.py 2>&1 | tee "$out/gpu-tests.txt" || status=1
timeout 240 python3 -m cutdiff_kernels.bench --json "$out/bench.json" 2>&1 | tee "$out/bench.txt" || status=1
timeout 60 python3 -m cutdiff_kernels.bench_network --json "$out/bench_network.json" 2>&1 | tee "$out/bench_network.txt" || status=1
exit "$status"
