#!/usr/bin/env bash
# A smoke run for CI: sample data, a tiny model, 5 steps on 32 pairs, no network and no GPU. Seconds, not minutes.
# It shows that the installation works from raw folder to results; the numbers mean nothing.
set -euo pipefail
export HF_HUB_OFFLINE=1

vlkit sample recipes raw/
vlkit prep --domain recipes --source raw/ --out data/recipes
vlkit train-retrieval --data data/recipes --model tiny-siglip --name smoke --limit 32 --steps 5
vlkit eval --run runs/smoke --limit 32 --json > smoke.json
vlkit train-fusion --vision runs/smoke --llm tiny-qwen --teach-steps 5 --steps 5 --limit 32 --name smoke-captions
vlkit caption --run runs/smoke-captions raw/images --limit 2
python3 -c 'import json; print("text -> image recall@1:", json.load(open("smoke.json"))["metrics"]["text_to_image"]["recall@1"])'
