#!/usr/bin/env bash
# The figures of a GPU, in under nine minutes and without a network: tests/benchmarks/results/gpu-<card>-<date>.txt
#   PYTHON=...   a Python with vlkit's dependencies and a torch that sees the card (default: .venv's, else python3)
# Arguments go to gpu.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

card_seen_by() {
  timeout 60 "$1" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2> /dev/null
}

candidates=(.venv/bin/python python3)
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
card=
for python in "${candidates[@]}"; do
  card=$(card_seen_by "$python") || true
  if [ -n "$card" ]; then break; fi
done
if [ -z "$card" ]; then
  echo "gpu.sh: no CUDA device: none that the torch of ${candidates[*]} sees; PYTHON=... names another Python" >&2
  exit 2
fi

results=tests/benchmarks/results
mkdir -p "$results"
name=$(tr -cs '[:alnum:]\n' '-' <<< "$card" | tr '[:upper:]' '[:lower:]')
file="$results/gpu-${name%-}-$(date +%F).txt"
# gpu.py keeps to its own 400 seconds; a step cannot be broken off, so this is the last word.
code=0
part="$file.part"
timeout --signal=TERM --kill-after=10 450 "$python" tests/benchmarks/gpu.py "$@" | tee "$part" || code=$?
# A table that did not come to its end does not take the place of one that did.
if [ "$code" = 0 ]; then mv "$part" "$file"; else file=$part; fi
echo "written to $file" >&2
exit "$code"
