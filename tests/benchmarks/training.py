"""Training throughput beside open_clip, transformers' Trainer and sentence-transformers: images a second.

python tests/benchmarks/training.py [--precision fp32 bf16] [--captions own classes] [--steps 2] [--runs 3]

One model of the shape of CLIP ViT-B/32 in one folder, the same JPEG files of 640x480, captions of twelve words (one a
picture, or 38 in all), batches of 32, everything trained. Every way has a process of its own, which loads its pictures,
none of them twice, unless `--workers` do it for all ways (a forked process doubles what the other writes to: four ways
then need more than 24 GB). It is asked in turn for a few steps; the first one is left out, for a Trainer begins anew
there. `of the limit`: of what the useful multiplications (no padding, no text twice) would take at the rate that this
machine multiplies large matrices.

Learning must not pay for speed: in the last table each way's own loop has trained a tiny model on the sample recipes
for equally many steps, in the first precision, and is measured on recipes that nobody saw (`learning.py` does it, and
says more).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learning
import measuring
import ours
import peers
import photos

OURS = learning.OURS
# Ways that pad every text to 77 tokens.
PADDED = ("open_clip", "transformers")
# Captions, precision -> at least so many times the best peer, and the best of those that pad.
WANTED = {
    ("own", "bf16"): {"the best": 1.5, "those that pad to 77": 2.4},
    ("own", "fp32"): {"the best": 1.1, "those that pad to 77": 1.6},
    ("classes", "bf16"): {"those that pad to 77": 3.0},
    ("classes", "fp32"): {"those that pad to 77": 1.9},
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
        trained = ours.trainer(model, dataset, config, work.order, work.workers)
    else:
        trained = peers.TRAINERS[way](work)[1]

    def run() -> measuring.Numbers:
        measuring.forget_peak()
        taken = trained(options.steps + 1)
        rate = options.batch * len(taken) / sum(taken)
        return {"images_per_second": rate, "peak_gb": measuring.peak_gb()}

    return run


def limit(work: peers.Work) -> float:
    """Images a second that this machine's matrix products would allow, nothing else counted."""
    return measuring.matmul_rate(work.precision) / photos.training_flops(work.model, work.texts, len(work.order[0]))


def measured(folder: Path, kind: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """One table's rows."""
    here, left_out = ([], []) if options.without_peers else peers.installed()
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    told = ["--folder", str(folder), "--precision", precision, "--kind", kind, "--steps", str(options.steps)]
    told += ["--batch", str(options.batch), "--workers", str(options.workers)]
    measuring.matmul_rate(precision)  # Once more afterwards: the limit is the best of both.
    found = measuring.in_turns(__file__, [OURS, *here], options.runs, told, warm_up=False)
    most = limit(work_in(folder, argparse.Namespace(**{**vars(options), "precision": [precision], "kind": kind})))
    rows = measuring.compared(found, OURS)
    for row in rows.values():
        row["of_the_limit"] = row["images_per_second"] / most
    return {"limit": most, "rows": rows}


def learned(precision: str, options: argparse.Namespace) -> argparse.Namespace:
    """How recall is measured after equal steps at tiny size."""
    told = ["--steps", str(options.recall_steps), "--seeds", str(options.seeds), "--precision", precision]
    told += ["--without-peers"] * options.without_peers
    return learning.arguments().parse_args(told)


def verdicts(kind: str, precision: str, found: dict[str, Any]) -> list[str]:
    """Whether vlkit is as many times as fast as was wanted, and where in the limit that would be."""
    rows = {way: row for way, row in found["rows"].items() if way != OURS}
    lines = []
    for of, wanted in WANTED[kind, precision].items():
        some = [row for way, row in rows.items() if of == "the best" or way in PADDED]
        if some:
            fastest = min(some, key=lambda row: row["reference_is"])
            share = wanted * fastest["of_the_limit"]
            more = f"{wanted:g} x would be {share:.0%} of the limit"
            lines.append(measuring.verdict(of, fastest["reference_is"], wanted, more=more))
    return lines


def shown(kind: str, precision: str, found: dict[str, Any], size: str) -> str:
    """One table; the bars are those of the larger model."""
    head = ["", "images/s", "spread", "vlkit is", "of the limit", "peak GB"]
    rows = []
    for way, row in found["rows"].items():
        name = f"{way} (77 tokens)" if way in PADDED else way
        rows.append([name, *measuring.rate_cells(row), f"{row['of_the_limit']:.0%}", f"{row['peak_gb']:.1f}"])
    data = "a caption a picture" if kind == "own" else f"{photos.CLASSES} captions"
    bars = verdicts(kind, precision, found) if size != "tiny" else []
    told = f"{data}, {precision}; the limit is {found['limit']:.1f} images/s"
    return "\n".join([told, measuring.table(head, rows), *bars])


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__, rounds=3)
    parser.add_argument("--size", choices=photos.SIZES, default=photos.SIZES[0])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--captions", nargs="+", choices=["own", "classes"], default=["own", "classes"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="of a turn, after one that is left out")
    parser.add_argument("--recall-steps", type=int, default=300, help="before recall is measured; 0: it is not")
    parser.add_argument("--seeds", type=int, default=3, help="whose mean recall is")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the data of each")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if measuring.as_child(prepare, options):
        return
    count = options.batch * (options.steps + 1) * options.runs
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
    how = learned(options.precision[0], options)
    recall = learning.measured(how, ways=[OURS, learning.EYE]) if how.steps else {}
    if options.json:
        found = {f"{kind}, {precision}": rows for (kind, precision), rows in tables.items()} | {"recall@1": recall}
        print(json.dumps({"machine": measuring.machine(), "size": options.size, **found}, indent=2, default=float))
        return
    packages = ("torch", "transformers", "open_clip_torch", "sentence-transformers")
    print(measuring.header(packages))
    print(f"{options.size}, everything trained, batches of {options.batch}; medians of {options.runs} turns")
    for (kind, precision), found in tables.items():
        print(f"\n{shown(kind, precision, found, options.size)}")
    if recall:
        print(f"\n{learning.shown(recall, how)}")


if __name__ == "__main__":
    main()
