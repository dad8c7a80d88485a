#!/usr/bin/env bash
# On the GPU box: SigLIP base on your own class folders, measured against the untouched model.
#
#   my-leaves/Tomato___Early_blight/001.jpg      one folder a class; its name becomes the caption
#   my-leaves/Tomato___healthy/001.jpg
#
# Usage: examples/class-folders.sh my-leaves
set -euo pipefail
source=${1:?give the folder that holds the class folders}
name=leaves-$(date +%Y%m%d)
here=$(dirname "$0")

# What would happen, before anything is written: pairs, classes, small classes, rejects.
vlkit prep --domain agriculture --source "$source" --out data/leaves --dry-run
vlkit prep --domain agriculture --source "$source" --out data/leaves

# Steps, memory and disk before the first weight is touched; then the run. Started again, it goes on where it stopped.
vlkit train-retrieval --config "$here/class-folders.yaml" --data data/leaves --name "$name" --dry-run
vlkit train-retrieval --config "$here/class-folders.yaml" --data data/leaves --name "$name"

# Tuned beside untouched, with intervals; runs/<name>/results.json holds every number.
vlkit eval --run "runs/$name"
