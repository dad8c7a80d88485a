#!/usr/bin/env bash
# Persian dishes: a folder a dish, with pictures and one JSON; from the raw folder to answers in four lines.
#
# Usage: [NAME=run] [QUERY=words] examples/persian-food.sh RAW [further flags of train-retrieval]
# For a try without a network:
#   vlkit sample persian-food raw-persian-food && examples/persian-food.sh raw-persian-food --model tiny-clip --text-model tiny-xlmr --steps 20
set -euo pipefail
raw=${1:?give the raw folder}
shift
here=$(dirname "$0")
name=${NAME:-persian-food}
query=${QUERY:-خورش سبزی با لوبیا و لیموی عمانی}

# Clean pairs, split so that no picture, and none that looks like it, is on both sides.
vlkit prep --domain persian-food --source "$raw" --out data/persian-food

# A Persian text encoder beside CLIP's frozen vision tower. Interrupted and started again, it goes on where it stopped.
vlkit train-retrieval --config "$here/persian-food.yaml" --data data/persian-food --name "$name" "$@"

# The docstore's passages and the pictures, in an index each.
vlkit index --run "runs/$name" --out "indexes/$name"

# Words in, passages and pictures out. As a page: vlkit serve --index indexes/persian-food
vlkit search --index "indexes/$name" "$query"

# And whether it helped: tuned beside untouched on rows that neither has seen, as numbers and as one page with pictures.
vlkit eval --run "runs/$name"
vlkit report --run "runs/$name"
