"""Exact ranks in blocks beside the full score matrix, sorted: seconds, memory above the resting process, same numbers.

python tests/benchmarks/ranking.py [--json] [--texts 25000] [--images 5000] [--width 512] [--runs 3]

Each way has a process of its own, and they take turns. `every` looks at all right items, too, for average precision.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("vlkit", "vlkit, every right item", "matrix, sorted", "matrix, top 10")


def once(way: str, texts: int, images: int, width: int) -> dict[str, float]:
    """Text to image, in this process: seconds, GB above rest, recall@10."""
    import torch

    from vlkit.evaluation.ranking import metric_values, rank

    torch.manual_seed(0)
    gallery = torch.nn.functional.normalize(torch.randn(images, width), dim=1)
    right = torch.arange(texts) % images
    queries = torch.nn.functional.normalize(gallery[right] + 0.3 * torch.randn(texts, width), dim=1)
    own, groups = [str(int(image)) for image in right], [str(image) for image in range(images)]
    some = min(texts, 64)
    rank(queries[:some], gallery[:64], own[:some], groups[:64])
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew from what is held now.
    rest = peak()
    started = time.perf_counter()
    if way.startswith("vlkit"):
        ranks = rank(queries, gallery, own, groups, every="every" in way)
        found = float(metric_values(ranks)["recall@10"].mean())
    else:
        scores = queries @ gallery.T
        if way == "matrix, sorted":
            place = (scores.argsort(dim=1, descending=True) == right[:, None]).nonzero()[:, 1]
            found = float((place < 10).float().mean())
        else:
            found = float((scores.topk(10).indices == right[:, None]).any(1).float().mean())
    return {"seconds": time.perf_counter() - started, "gb": peak() - rest, "recall@10": found}


def peak() -> float:
    """GB of 2^30 bytes that this process has held at most (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--texts", type=int, default=25000)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--once", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.texts, options.images, options.width)
    if options.once:
        print(json.dumps(once(options.once, *sizes)))
        return
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    same = [f"--{name}={size}" for name, size in zip(("texts", "images", "width"), sizes, strict=True)]
    for _ in range(options.runs):
        for way in WAYS:
            program = [sys.executable, __file__, "--once", way, *same]
            done = subprocess.run(program, check=True, capture_output=True, text=True, env=os.environ)
            taken[way].append(json.loads(done.stdout))
    rows = {}
    ours = {key: statistics.median(run[key] for run in taken["vlkit"]) for key in ("seconds", "gb", "recall@10")}
    for way, runs in taken.items():
        row = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "gb", "recall@10")}
        row["spread"] = [min(run["seconds"] for run in runs), max(run["seconds"] for run in runs)]
        row |= {"time_ratio": row["seconds"] / ours["seconds"], "memory_ratio": row["gb"] / ours["gb"]}
        rows[way] = row
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    if options.json:
        print(json.dumps({"machine": machine, "sizes": sizes, "rows": rows}, indent=2))
        return
    print(f"{sizes[0]} texts x {sizes[1]} pictures, width {sizes[2]}; {machine}; median of {options.runs}")
    print(f"{'':26} {'seconds':>8} {'spread':>15} {'GB':>6} {'recall@10':>10} {'time':>7} {'memory':>7}")
    for way, row in rows.items():
        spread = f"{row['spread'][0]:.2f}-{row['spread'][1]:.2f}"
        ratios = f"{row['time_ratio']:>6.1f}x {row['memory_ratio']:>6.1f}x"
        print(f"{way:26} {row['seconds']:8.2f} {spread:>15} {row['gb']:6.3f} {row['recall@10']:10.4f} {ratios}")


if __name__ == "__main__":
    main()
