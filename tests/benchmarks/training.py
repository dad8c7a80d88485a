"""Training throughput beside open_clip, transformers' Trainer and sentence-transformers: images a second.

python tests/benchmarks/training.py [--precision fp32 bf16] [--captions own classes] [--steps 3] [--runs 3]

One model of the shape of CLIP ViT-B/32 in one folder, the same JPEG files of 640x480, captions of twelve words (one a
picture, or 38 in all), batches of 32, everything trained. Every way has a process of its own and is asked in turn for a
few steps; the first step of every turn is left out, for a Trainer begins anew there. `of the limit`: of what the useful
multiplications (no padding, no text twice) would take at the rate that this machine multiplies large matrices.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import ours
import peers
import photos

OURS = "vlkit"
# Ways that pad every text to 77 tokens.
PADDED = ("open_clip", "transformers")
# Captions, precision -> at least so many times the best peer, and the best of those that pad.
WANTED = {
    ("own", "bf16"): (1.5, 2.4),
    ("own", "fp32"): (1.1, 1.6),
    ("classes", "bf16"): (None, 3.0),
    ("classes", "fp32"): (None, 1.9),
}


def work_in(folder: Path, options: argparse.Namespace) -> peers.Work:
    """What all ways do."""
    texts = json.loads((folder / f"{options.kind}.json").read_text())
    files = sorted((folder / "photos").glob("*.jpg"))
    size = options.batch
    order = [range(start, start + size) for start in range(0, len(files) - size + 1, size)]
    return peers.Work(folder / "model", files, texts, order * 100, options.precision[0], workers=options.workers)


def prepare(way: str, options: argparse.Namespace) -> Callable[[], measuring.Numbers]:
    """One way, which trains a few steps whenever it is asked."""
    work = work_in(Path(options.folder), options)
    if way == OURS:
        model, dataset, config = ours.opened(work)
        trained = ours.trainer(model, dataset, config, work.order)
    else:
        trained = peers.TRAINERS[way](work)[1]

    def run() -> measuring.Numbers:
        measuring.forget_peak()
        taken = trained(options.steps + 1)
        rate = options.batch * len(taken) / sum(taken)
        return {"images_per_second": rate, "peak_gb": measuring.peak_gb()}

    return run


def limit(folder: Path, kind: str, precision: str, batch: int) -> float:
    """Images a second that this machine's matrix products would allow, nothing else counted."""
    from transformers import CLIPConfig, CLIPTokenizer

    texts = json.loads((folder / f"{kind}.json").read_text())
    tokenizer = CLIPTokenizer.from_pretrained(folder / "model")
    counts = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    distinct = sum(len(set(texts[start : start + batch])) for start in range(0, len(texts), batch)) / len(texts)
    config = CLIPConfig.from_pretrained(folder / "model")
    flops = photos.training_flops(config, sum(counts) / len(counts), distinct)
    return measuring.matmul_rate(precision) / flops


def measured(folder: Path, kind: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """One table's rows."""
    here, left_out = ([], []) if options.without_peers else peers.installed()
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    told = ["--folder", str(folder), "--precision", precision, "--kind", kind, "--steps", str(options.steps)]
    told += ["--batch", str(options.batch), "--workers", str(options.workers)]
    found = measuring.in_turns(__file__, [OURS, *here], options.runs, told)
    most = limit(folder, kind, precision, options.batch)
    rows = {}
    for way, runs in found.items():
        rate = measuring.middle(runs, "images_per_second")
        rows[way] = {
            "images_per_second": rate,
            "spread": measuring.spread(runs, "images_per_second"),
            "vlkit_is": measuring.ratio(found[OURS], runs, "images_per_second"),
            "of_the_limit": rate / most,
            "peak_gb": measuring.middle(runs, "peak_gb"),
        }
    return {"limit": most, "rows": rows}


def shown(kind: str, precision: str, found: dict[str, Any]) -> str:
    """One table."""
    head = ["", "images/s", "spread", "vlkit is", "of the limit", "peak GB"]
    rows = []
    for way, row in found["rows"].items():
        low, high = row["spread"]
        name = f"{way} (77 tokens)" if way in PADDED else way
        cells = [f"{row['images_per_second']:.2f}", f"{low:.2f}-{high:.2f}", f"{row['vlkit_is']:.2f} x"]
        rows.append([name, *cells, f"{row['of_the_limit']:.0%}", f"{row['peak_gb']:.1f}"])
    data = "a caption a picture" if kind == "own" else f"{photos.CLASSES} captions"
    best, padded = WANTED[kind, precision]
    wanted = [f"{best} x the best"] * (best is not None) + [f"{padded} x those that pad to 77"]
    told = f"{data}, {precision}; the limit is {found['limit']:.1f} images/s; wanted: {', '.join(wanted)}"
    return f"{told}\n{measuring.table(head, rows)}"


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__, rounds=3)
    parser.add_argument("--size", choices=photos.SIZES, default=photos.SIZES[0])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--captions", nargs="+", choices=["own", "classes"], default=["own", "classes"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes that load the peers' data")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if measuring.as_child(prepare, options):
        return
    count = options.batch * (options.steps + 1) * (options.runs + 1)
    tables = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos.write_photos(folder / "photos", count)
        texts = {"own": photos.captions(count), "classes": photos.captions(count, photos.CLASSES)}
        for kind, told in texts.items():
            (folder / f"{kind}.json").write_text(json.dumps(told))
        photos.write_model(folder / "model", options.size, sorted({text for told in texts.values() for text in told}))
        for kind in options.captions:
            for precision in options.precision:
                tables[kind, precision] = measured(folder, kind, precision, options)
    if options.json:
        found = {f"{kind}, {precision}": rows for (kind, precision), rows in tables.items()}
        print(json.dumps({"machine": measuring.machine(), "size": options.size, **found}, indent=2))
        return
    packages = ("torch", "transformers", "open_clip_torch", "sentence-transformers")
    print(measuring.header(packages))
    print(f"{options.size}, everything trained, batches of {options.batch}; medians of {options.runs} turns")
    for (kind, precision), found in tables.items():
        print(f"\n{shown(kind, precision, found)}")


if __name__ == "__main__":
    main()
