#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most eight minutes: see benchmarks/gpu.py.
#
#     benchmarks/gpu.sh OUTPUT_FOLDER
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python "$root/benchmarks/gpu.py" "$@"
