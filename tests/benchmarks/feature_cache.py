"""Epochs on cached features of what is frozen, against the same epochs without a cache.

python tests/benchmarks/feature_cache.py [--json] [--rows 256] [--precision fp32] [--runs 3] [--size tiny]

A random model of the shape of CLIP ViT-B/32, 224 px JPEG files, captions of 12 words, batches of 32, the product's own
datasets, loss and loop. Three ways: both towers frozen (projections and scale trained); vision frozen, the text
tower trained on 38 class captions; the lower 10 of 12 vision layers and the text tower frozen. With and without cache
take turns; the first epoch, which fills the cache, is told apart. `bound` is what the saved multiplications allow.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = 12
CLASSES = 38


def data_in(folder: Path, rows: int, side: int, classes: int | None) -> Any:
    """A pairs table over new JPEG files; captions of classes, or one a picture."""
    import numpy as np
    import pandas as pd
    from PIL import Image

    from vlkit.data.pairs import read_pairs

    rng = np.random.default_rng(0)
    words = [first + second for first in "bdfgklmn" for second in ("ar", "el", "in", "os", "um", "ay")]
    names = [" ".join(rng.choice(words, WORDS)) for _ in range(classes or rows)]
    table = []
    for number in range(rows):
        path = folder / f"{number}.jpg"
        if not path.exists():
            small = rng.integers(0, 255, (24, 32, 3)).astype(np.uint8)
            Image.fromarray(small).resize((side * 20 // 7, side * 15 // 7)).save(path, quality=88)
        text = names[number % len(names)]
        group = text if classes else str(number)
        table.append({"image": str(path), "image_id": f"{number:020x}", "text": text, "image_group": group})
    frame = pd.DataFrame(table).assign(split="train", match=1, origin="original", class_name=None)
    frame["text_group"], frame["unit"] = frame["image_group"], frame["image_id"]
    frame["text_id"] = [hashlib.sha256(text.encode()).hexdigest()[:20] for text in frame["text"]]
    frame["pair_id"] = [f"{number:020x}" for number in range(rows)]
    path = folder / f"pairs-{classes}.parquet"
    frame.to_parquet(path)
    return read_pairs(path)


def towers_of(size: str, texts: list[str]) -> Any:
    """A random CLIP with a tokenizer of its own."""
    from transformers import CLIPConfig, CLIPModel

    from vlkit.data.images import PixelSpec
    from vlkit.models import tiny
    from vlkit.models.towers import Towers

    config = tiny.config_of("tiny-clip") if size == "tiny" else CLIPConfig()
    tokenizer = tiny._byte_pair_tokenizer(texts)
    config.text_config.eos_token_id, config.text_config.vocab_size = tokenizer.eos_token_id, max(len(tokenizer), 49408)
    side = config.vision_config.image_size
    return Towers(CLIPModel(config), tokenizer, PixelSpec(side, fit="crop", resize=side), "random")


def saved(towers: Any, way: str, texts_per_picture: float) -> float:
    """What the frozen multiplications are to those that stay: forward 1, backward 2 where something is trained."""

    def layer(config: Any, tokens: int) -> float:
        width = config.hidden_size
        return 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 4 * tokens**2 * width

    vision, text = towers.model.config.vision_config, towers.model.config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    embed = 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size
    image = layer(vision, patches + 1) * vision.num_hidden_layers + embed
    words = layer(text, WORDS + 2) * text.num_hidden_layers * texts_per_picture
    heads = 6 * (vision.hidden_size + text.hidden_size) * towers.width
    upper = 2 * layer(vision, patches + 1)
    with_cache = {"both frozen": heads, "vision frozen": 3 * words + heads, "lower ten": 3 * upper + heads}[way]
    without = {"both frozen": image + words, "vision frozen": image + 3 * words, "lower ten": image + 2 * upper + words}
    return (without[way] + heads) / with_cache


WAYS = {
    "both frozen": ({"tune": "head"}, None, 120.0),
    "vision frozen": ({"tune": "text"}, CLASSES, 3.5),
    "lower ten": ({"tune": "last", "unfreeze_layers": 2, "towers": "image"}, None, 2.5),
}


def measured(way: str, folder: Path, rows: int, precision: str, runs: int, size: str) -> dict[str, Any]:
    """Seconds of an epoch with and without cache, in turns."""
    import torch

    from vlkit.config import TrainRetrievalConfig
    from vlkit.data.batches import BatchOrder, stream
    from vlkit.models import adapters
    from vlkit.training import caching
    from vlkit.training.contrast import Contrast
    from vlkit.training.loop import adamw, new_scaler, steps
    from vlkit.training.planning import Rows, dataset_of

    settings, classes, wanted = WAYS[way]
    pairs = data_in(folder, rows, 224 if size != "tiny" else 64, classes)
    config = TrainRetrievalConfig(
        data=str(folder), precision=precision, batch_size=32, steps=10**6, loss="softmax", **settings
    )
    torch.manual_seed(0)
    towers = towers_of(size, sorted(set(pairs.frame["text"])))
    if size == "tiny":
        config = dataclasses.replace(config, unfreeze_layers=1)
    adapters.adapt(towers, config, seed=0)
    table = Rows(pairs, pairs, pairs.of("val"))
    seconds: dict[str, list[float]] = {"off": [], "cached": []}
    sources = {}
    for name in seconds:
        sources[name] = dataset_of(table, towers, config)
    began = time.perf_counter()
    cached_in = dataclasses.replace(config, cache=str(folder / f"cache-{way.replace(' ', '-')}"))
    caching.cached(cached_in, towers, sources["cached"], None)
    filling = time.perf_counter() - began
    adapters.train_mode(towers)
    per_epoch = BatchOrder.over(sources["off"], config.batch_size, 0).per_epoch
    trainers = {}
    for name, dataset in sources.items():
        named = adapters.trainable(towers)
        optimizer = adamw(named, lr=1e-5, weight_decay=0.01)
        order = BatchOrder.over(dataset, config.batch_size, 0)
        trainers[name] = steps(
            stream(dataset, order, workers=0),
            Contrast(towers, "softmax"),
            len,
            optimizer,
            total=10**6,
            precision=precision,
            scaler=new_scaler(towers.device, precision),
        )
        next(trainers[name])
    for _ in range(runs):
        for name, trainer in trainers.items():
            epochs = 10 if name == "cached" and way == "both frozen" else 1
            began = time.perf_counter()
            for _ in range(per_epoch * epochs):
                next(trainer)
            seconds[name].append((time.perf_counter() - began) / epochs)
    ratios = sorted(off / on for off, on in zip(seconds["off"], seconds["cached"], strict=True))
    disk = sum(path.stat().st_size for path in Path(cached_in.cache).rglob("rows.bin"))
    return {
        "off": statistics.median(seconds["off"]),
        "cached": statistics.median(seconds["cached"]),
        "ratio": statistics.median(ratios),
        "spread": [ratios[0], ratios[-1]],
        "bound": saved(towers, way, 1.0 if classes is None else min(32, classes) * 0.68 / 32),
        "filling": filling,
        "disk_gb": disk / 2**30,
        "at_least": wanted,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["bf16", "fp32"])
    parser.add_argument("--size", default="ViT-B/32", choices=["ViT-B/32", "tiny"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vlkit import console

    console.silence()
    found: dict[str, Any] = {"machine": platform.platform(), "precision": options.precision, "rows": options.rows}
    with tempfile.TemporaryDirectory() as folder:
        for way in options.ways:
            found[way] = measured(way, Path(folder), options.rows, options.precision, options.runs, options.size)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    import torch

    print(f"{found['machine']}, {os.cpu_count()} cores, torch {torch.__version__}, {options.size}, {options.precision}")
    print(f"{options.rows} pictures, batches of 32; seconds an epoch after the first, medians of {options.runs}\n")
    head = f"{'':14s} {'no cache':>9s} {'cache':>9s} {'ratio':>7s} {'spread':>15s} {'bound':>7s}"
    print(f"{head} {'filling':>8s} {'disk':>8s}")
    for way in options.ways:
        each = found[way]
        spread = f"{each['spread'][0]:.1f} to {each['spread'][1]:.1f}"
        print(
            f"{way:14s} {each['off']:9.2f} {each['cached']:9.3f} {each['ratio']:7.1f} {spread:>15s} "
            f"{each['bound']:7.1f} {each['filling']:7.1f}s {each['disk_gb']:5.3f} GB"
        )


if __name__ == "__main__":
    main()
