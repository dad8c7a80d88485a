#!/usr/bin/env bash
# Crop diseases: class folders, or one CSV; from the raw folder to numbers.
#
# Usage: [NAME=run] examples/agriculture.sh RAW [further flags of train-retrieval]
# For a try without a network:
#   vlkit sample agriculture raw-agriculture && examples/agriculture.sh raw-agriculture --model tiny-siglip --unfreeze-layers 1 --steps 20
set -euo pipefail
raw=${1:?give the raw folder}
shift
here=$(dirname "$0")
name=${NAME:-agriculture}

# Clean pairs, split so that no picture, and none that looks like it, is on both sides.
vlkit prep --domain agriculture --source "$raw" --out data/agriculture

# Steps, memory, disk and what is kept of frozen parts, before the first weight is touched; then the run. Interrupted and
# started again, it goes on where it stopped.
vlkit train-retrieval --config "$here/agriculture.yaml" --data data/agriculture --name "$name" "$@" --dry-run
vlkit train-retrieval --config "$here/agriculture.yaml" --data data/agriculture --name "$name" "$@"

# Tuned beside untouched on rows that neither has seen; runs/<name>/ holds every number, and the model.
vlkit eval --run "runs/$name" --shift low-light,blur

# The same as one page with pictures: runs/<name>/report.html.
vlkit report --run "runs/$name"
