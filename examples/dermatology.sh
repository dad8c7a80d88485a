#!/usr/bin/env bash
# Skin conditions: labels.csv with pictures, conditions and descriptions, or class folders; from the raw folder to numbers.
#
# Usage: [NAME=run] examples/dermatology.sh RAW [further flags of train-retrieval]
# For a try without a network:
#   vlkit sample dermatology raw-dermatology && examples/dermatology.sh raw-dermatology --model tiny-siglip --precision fp32 --steps 20
set -euo pipefail
raw=${1:?give the raw folder}
shift
here=$(dirname "$0")
name=${NAME:-dermatology}

# Clean pairs, split so that no picture, and none that looks like it, is on both sides.
vlkit prep --domain dermatology --source "$raw" --out data/dermatology

# Steps, memory, disk and what is kept of frozen parts, before the first weight is touched; then the run. Interrupted and
# started again, it goes on where it stopped.
vlkit train-retrieval --config "$here/dermatology.yaml" --data data/dermatology --name "$name" "$@" --dry-run
vlkit train-retrieval --config "$here/dermatology.yaml" --data data/dermatology --name "$name" "$@"

# Tuned beside untouched on rows that neither has seen; runs/<name>/ holds every number, and the model.
vlkit eval --run "runs/$name" --shift low-light,blur

# The same as one page with pictures: runs/<name>/report.html.
vlkit report --run "runs/$name"
