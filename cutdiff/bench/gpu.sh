#!/usr/bin/env bash
# Measure all that needs a GPU in one call, the most worthwhile first: `cutdiff/bench/gpu.sh OUT [SECONDS]` takes 420
# seconds, and `gpu.sh OUT --second` measures in 180 what then remains. OUT is a new folder. With --small everything is
# rehearsed with small shapes, on a CPU too. See cutdiff/bench/README.md.
# It needs no installation of cutdiff.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 -m cutdiff.bench.gpu "$@"
