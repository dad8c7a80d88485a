#!/usr/bin/env bash
# Persian dishes: a folder a dish, with pictures and one JSON; from the raw folder to numbers.
#
# Usage: [NAME=run] examples/persian-food.sh RAW [further flags of train-retrieval]
# For a try without a network:
#   vlkit sample persian-food raw-persian-food && examples/persian-food.sh raw-persian-food --model tiny-clip --text-model tiny-xlmr --steps 20
set -euo pipefail
raw=${1:?give the raw folder}
shift
here=$(dirname "$0")
name=${NAME:-persian-food}

# Clean pairs, split so that no picture, and none that looks like it, is on both sides.
vlkit prep --domain persian-food --source "$raw" --out data/persian-food

# Steps, memory, disk and what is kept of frozen parts, before the first weight is touched; then the run. Interrupted and
# started again, it goes on where it stopped.
vlkit train-retrieval --config "$here/persian-food.yaml" --data data/persian-food --name "$name" "$@" --dry-run
vlkit train-retrieval --config "$here/persian-food.yaml" --data data/persian-food --name "$name" "$@"

# Tuned beside untouched on rows that neither has seen; runs/<name>/ holds every number, and the model.
vlkit eval --run "runs/$name"

# The same as one page with pictures: runs/<name>/report.html.
vlkit report --run "runs/$name"
