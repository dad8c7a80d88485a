"""A contrastive batch of 1024 in micro-batches of 32: peak memory and time beside ordinary accumulation of 32s.

python tests/benchmarks/micro_batch.py [--json] [--batch 1024] [--micro 32]

A random model of the shape of CLIP ViT-B/32, float32, AdamW, one step after one that makes the optimizer's state; each
in a process of its own. The batch's uint8 pixels are taken off the peak.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from typing import Any

SIDE, LENGTH, WORDS = 224, 24, 49408


def step(batch: int, micro: int | None, accumulate: int) -> dict[str, float]:
    """Seconds of a step, and this process' peak memory in GB without the pixels."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from vlkit.config import TrainRetrievalConfig
    from vlkit.data.batches import Batch
    from vlkit.data.images import PixelSpec
    from vlkit.data.labels import Labels
    from vlkit.models import adapters
    from vlkit.models.towers import Towers
    from vlkit.training.contrast import Contrast
    from vlkit.training.loop import adamw, steps

    torch.manual_seed(0)
    towers = Towers(CLIPModel(CLIPConfig()), None, PixelSpec(SIDE), "random")
    adapters.adapt(towers, TrainRetrievalConfig(), seed=0)
    adapters.train_mode(towers)
    ids = [{str(n)} for n in range(batch)]
    texts = torch.randint(1, WORDS - 2, (batch, LENGTH))
    texts[:, -1] = WORDS - 1

    def batches():
        while True:
            pixels = torch.randint(0, 255, (batch, 3, SIDE, SIDE), dtype=torch.uint8)
            names = [str(n) for n in range(batch)]
            yield Batch(pixels, texts, batch, torch.arange(batch), Labels.of(ids, ids, "multi-positive"), names)

    optimizer = adamw(adapters.trainable(towers), lr=1e-5, weight_decay=0.01)
    taken = []
    for size in (min(batch, 2 * (micro or batch)), batch):
        contrast = Contrast(towers, "softmax", micro)
        stream = batches() if size == batch else map(lambda b, n=size: _cut(b, n), batches())
        began = time.perf_counter()
        next(steps(stream, contrast, len, optimizer, total=1, accumulate=accumulate))
        taken.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if platform.system() == "Darwin" else 2**20)
    return {"seconds": taken[-1], "gigabytes": peak - batch * accumulate * 3 * SIDE * SIDE / 2**30}


def _cut(batch: Any, size: int) -> Any:
    """The first pairs of a batch: a small step that makes the optimizer's state."""
    import dataclasses

    from vlkit.data.labels import Labels

    ids = [{str(n)} for n in range(size)]
    labels = Labels.of(ids, ids, "multi-positive")
    parts = {name: getattr(batch, name)[:size] for name in ("images", "captions", "text_index", "pair_ids")}
    return dataclasses.replace(batch, **parts, texts=size, labels=labels)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(step(*json.loads(options.one))))
        return
    found: dict[str, Any] = {"machine": platform.platform()}
    ways = {"accumulation": (options.micro, None, 2), "micro-batches": (options.batch, options.micro, 1)}
    for name, way in ways.items():
        program = [sys.executable, __file__, "--one", json.dumps(way)]
        found[name] = json.loads(subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout)
        found[name]["images_per_second"] = way[0] * way[2] / found[name]["seconds"]
    found["memory_ratio"] = found["micro-batches"]["gigabytes"] / found["accumulation"]["gigabytes"]
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['machine']}, Python {platform.python_version()}, ViT-B/32's shape")
    for name in ways:
        each = found[name]
        print(f"{name:14s} {each['gigabytes']:.2f} GB, {each['images_per_second']:.1f} images/s")
    print(f"a batch of {options.batch} in {options.micro}s: {found['memory_ratio']:.3f} x the memory")


if __name__ == "__main__":
    main()
