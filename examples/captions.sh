#!/usr/bin/env bash
# COCO's captions, taught to a frozen Qwen2.5: ./captions.sh [further flags of train-fusion]
# On a T4: ./captions.sh --precision fp16. A try on 500 pictures: LIMIT=500 ./captions.sh --steps 50
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

vlkit download-coco --root data --split train2017,val2017 ${LIMIT:+--limit "$LIMIT"}
vlkit train-fusion --config "$here/captions.yaml" --name captions "$@"
vlkit eval --run runs/captions --limit 1000 --clip-model openai/clip-vit-base-patch32
vlkit report --run runs/captions
vlkit caption --run runs/captions data/coco/images/val2017 --limit 8
