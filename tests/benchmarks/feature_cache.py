"""Epochs on cached features of what is frozen, beside the same epochs without a cache, and open_clip --lock-image.

python tests/benchmarks/feature_cache.py [--rows 256] [--precision fp32 bf16] [--runs 3] [--size tiny] [--ways ...]

A model of the shape of CLIP ViT-B/32 in a folder, JPEG files of 640x480, captions of 12 words, batches of 32. Three
ways: both towers frozen (projections and scale trained); vision frozen, the text tower trained on 38 captions, where
open_clip locks its image tower and trains by its own loop; the lower 10 of 12 vision layers and the text tower frozen.
With a cache, without and open_clip have a process each, and are asked in turn for an epoch (with both frozen and
cached, for ten). The epoch that fills the cache, on disk, is told apart: it is the first thing that the cached way is
asked for. `limit`: images a second if the useful multiplications of the way ran at this machine's rate and nothing else
took time. vlkit keeps few decoded pictures in memory, so after the first epoch neither of its ways decodes, while
open_clip does, in a process beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import ours
import peers
import photos

BATCH = 32
CACHED, UNCACHED, PEER = "cache", "no cache", "open_clip --lock-image"


@dataclass(frozen=True)
class Way:
    """What is frozen.

    Attributes:
        settings: of TrainRetrievalConfig.
        classes: how many captions there are; None: as many as pictures.
        at_least: times as fast as without cache, and as open_clip.
        epochs: of a turn of the cached way.
    """

    settings: dict[str, Any]
    classes: int | None
    at_least: dict[str, float]
    epochs: int = 1


WAYS = {
    "both frozen": Way({"tune": "head"}, None, {UNCACHED: 120.0}, 10),
    "vision frozen": Way({"tune": "text"}, photos.CLASSES, {UNCACHED: 3.5, PEER: 20.0}),
    "lower ten": Way({"tune": "last", "unfreeze_layers": 2, "towers": "image"}, None, {UNCACHED: 2.5}),
}


def work_in(folder: Path, way: str, precision: str) -> peers.Work:
    """What all of a way do: the same batches, epoch after epoch."""
    import numpy as np

    files = sorted((folder / "photos").glob("*.jpg"))
    texts = photos.captions(len(files), WAYS[way].classes)
    # Captions of classes stand in turn: without this no batch would have one twice.
    mixed = np.random.default_rng(2).permutation(len(files)).tolist()
    order = [mixed[start : start + BATCH] for start in range(0, len(files), BATCH)]
    return peers.Work(folder / "model", files, texts, order * 100, precision)


def prepare(name: str, options: argparse.Namespace) -> Callable[[], measuring.Numbers]:
    """One process: `name` is how, `options.ways` what is frozen."""
    way, folder = options.ways[0], Path(options.folder)
    work = work_in(folder, way, options.precision[0])
    batches, epochs = len(work.files) // BATCH, WAYS[way].epochs if name == CACHED else 1
    if name == PEER:
        trained, filled = peers.open_clip_trainer(work, lock_image=True)[1], dict[str, float]()
    else:
        settings = dict(WAYS[way].settings)
        if options.size == "tiny" and "unfreeze_layers" in settings:
            settings["unfreeze_layers"] = 1
        model, dataset, config = ours.opened(work, **settings)
        trained, filled = ours.trainer(model, dataset, config, work.order), {}

    def run() -> measuring.Numbers:
        if name == CACHED and not filled:
            filled.update(fill(folder / f"cache-{way}-{work.precision}".replace(" ", "-"), model, dataset, config))
        measuring.forget_peak()
        taken = trained(batches * epochs + 1)
        rate = BATCH * len(taken) / sum(taken)
        return {"images_per_second": rate, "peak_gb": measuring.peak_gb(), **filled}

    return run


def fill(folder: Path, model: Any, dataset: Any, config: Any) -> measuring.Numbers:
    """Keep what the frozen parts make of the dataset; from then on it reads that."""
    import dataclasses

    from vlkit.models import tuning
    from vlkit.training.setup import fill_cache

    began = time.perf_counter()
    fill_cache.fill_cache(dataclasses.replace(config, cache=str(folder)), model, dataset, None)
    seconds = time.perf_counter() - began
    tuning.train_mode(model)
    return {"filling_seconds": seconds, "disk_gb": sum(p.stat().st_size for p in folder.rglob("rows.bin")) / 2**30}


def flops(way: str, work: peers.Work) -> dict[str, float]:
    """Useful multiplications a picture, with a cache and without: forward 1, backward 2 where something is trained."""
    texts = [work.texts[row] for rows in work.order[: len(work.texts) // BATCH] for row in rows]
    parts = photos.useful_flops(work.model, texts, BATCH)
    image, words, upper = parts["patches"] + parts["image"], parts["text"], parts["upper"]
    cached, without = {
        "both frozen": (0.0, image + words),
        "vision frozen": (3 * words, image + 3 * words),
        "lower ten": (3 * upper, image + 2 * upper + words),
    }[way]
    heads = 3 * parts["heads"]
    return {CACHED: cached + heads, UNCACHED: without + heads, PEER: without + heads}


def measured(folder: Path, way: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """One table's rows, and what the cache cost."""
    names = [CACHED, UNCACHED, *([PEER] if PEER in WAYS[way].at_least and options.peers else [])]
    told = ["--folder", str(folder), "--precision", precision, "--ways", way, "--size", options.size]
    measuring.matmul_rate(precision)  # Once more afterwards: the limit is the best of both.
    found = measuring.in_turns(__file__, names, options.runs, told, warm_up=False)
    rows = measuring.compared(found, CACHED)
    rate, least = measuring.matmul_rate(precision), flops(way, work_in(folder, way, precision))
    for name, row in rows.items():
        row["limit"] = rate / least[name]
        row["at_least"] = WAYS[way].at_least.get(name) if options.size != "tiny" else None
    cost = {key: found[CACHED][0][key] for key in ("filling_seconds", "disk_gb")}
    epoch = options.rows / rows[UNCACHED]["images_per_second"]
    return {"rows": rows, **cost, "filling_epochs": cost["filling_seconds"] / epoch}


def shown(found: dict[str, Any]) -> str:
    """One table."""

    head = ["", "images/s", "spread", "the cache is", "limit", "of it", "peak GB"]
    lines, bars = [], []
    for name, row in found["rows"].items():
        limit = [f"{row['limit']:.1f}", f"{row['images_per_second'] / row['limit']:.0%}"]
        lines.append([name, *measuring.rate_cells(row), *limit, f"{row['peak_gb']:.2f}"])
        if wanted := row["at_least"]:
            share = wanted * row["images_per_second"] / found["rows"][CACHED]["limit"]
            more = f"{wanted:g} x would be {share:.0%} of the cache's limit"
            bars.append(measuring.verdict(name, row["reference_is"], wanted, more=more))
    filling = f"filled in {found['filling_seconds']:.1f} s, {found['filling_epochs']:.1f} epochs without a cache"
    return "\n".join([measuring.table(head, lines), f"{filling}; {found['disk_gb']:.4f} GB on disk", *bars])


def arguments() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = measuring.parser(__doc__, rounds=3)
    parser.add_argument("--rows", type=int, default=256, help=f"pictures, a multiple of {BATCH}")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--size", choices=photos.SIZES, default=photos.SIZES[0])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure and print."""
    parser = arguments()
    options = parser.parse_args()
    if measuring.as_child(prepare, options):
        return
    if options.rows % BATCH or options.rows < BATCH:
        parser.error(f"--rows {options.rows}: a multiple of {BATCH} is wanted")
    options.peers, left_out = ([], []) if options.without_peers else peers.installed(["open_clip"])
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    tables = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos.write_photos(folder / "photos", options.rows)
        texts = {text for way in WAYS for text in photos.captions(options.rows, WAYS[way].classes)}
        photos.write_model(folder / "model", options.size, sorted(texts))
        for way in options.ways:
            for precision in options.precision:
                tables[f"{way}, {precision}"] = measured(folder, way, precision, options)
    if options.json:
        print(json.dumps({"machine": measuring.machine(), "size": options.size, **tables}, indent=2))
        return
    print(measuring.header(("torch", "transformers", "open_clip_torch")))
    print(f"{options.size}, {options.rows} pictures, batches of {BATCH}; epochs after the first, {options.runs} turns")
    for title, found in tables.items():
        print(f"\n{title}\n{shown(found)}")


if __name__ == "__main__":
    main()
