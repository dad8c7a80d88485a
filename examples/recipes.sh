#!/usr/bin/env bash
# Recipes: recipes.jsonl and its pictures; from the raw folder to numbers.
#
# Usage: [NAME=run] examples/recipes.sh RAW [further flags of train-retrieval]
# For a try without a network:
#   vlkit sample recipes raw-recipes && examples/recipes.sh raw-recipes --model tiny-clip --steps 20
set -euo pipefail
raw=${1:?give the raw folder}
shift
here=$(dirname "$0")
name=${NAME:-recipes}

# Clean pairs, split so that no picture, and none that looks like it, is on both sides.
vlkit prep --domain recipes --source "$raw" --out data/recipes

# Steps, memory, disk and what is kept of frozen parts, before the first weight is touched; then the run. Interrupted and
# started again, it goes on where it stopped.
vlkit train-retrieval --config "$here/recipes.yaml" --data data/recipes --name "$name" "$@" --dry-run
vlkit train-retrieval --config "$here/recipes.yaml" --data data/recipes --name "$name" "$@"

# Tuned beside untouched on rows that neither has seen; runs/<name>/ holds every number, and the model.
vlkit eval --run "runs/$name"

# The same as one page with pictures: runs/<name>/report.html.
vlkit report --run "runs/$name"
