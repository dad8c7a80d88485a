"""A large contrastive batch in small memory, beside sentence-transformers' cached loss: images a second, peak GB.

python tests/benchmarks/micro_batch.py [--size tiny ViT-B/32] [--precision bf16 fp32] [--runs 3] [--without-peers]

Two sizes: a tiny model with 1024 pairs in micro-batches of 32, and the shape of CLIP ViT-B/32 with 128 in 32; one
model in one folder, the same JPEG files and captions, everything trained. `accumulation` is vlkit's ordinary
accumulation of the same pieces, the measure of memory. Every way has a process of its own and is asked in turn for a
few steps; the first of every turn is left out, for a Trainer begins anew there. Peak GB: all that the training process
held at most, libraries, weights and optimizer included; processes that load data are not counted. CPU s: of a step,
theirs counted. `of the limit`: of what the useful multiplications, those of the second pass counted, would take at the
rate that this machine multiplies large matrices.

Then, without rounding to 16 bits: how far the gradient in micro-batches is from that of the whole batch at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exactness
import measuring
import ours
import peers
import photos

OURS, ACCUMULATION, PEER = "vlkit", "vlkit, accumulation", "sentence-transformers"
BATCH, MICRO = {"tiny": 1024, "ViT-B/32": 128}, 32
# Pictures that a tiny model looks at are small: it is not the decoder that is measured.
PICTURE = {"tiny": (160, 120), "ViT-B/32": (640, 480)}
# Processes that load pictures: one more takes cores from a large model, and a tiny one would wait for its pictures.
WORKERS = {"tiny": 1, "ViT-B/32": 0}
# Steps of a turn, which has to be longer than what a loader has ready.
STEPS = {"tiny": 5, "ViT-B/32": 2}
# In bf16: how many times the peer's speed; the most of its memory, and of accumulation's.
WANTED = 2.0, 1.0, 1.1


def work_in(folder: Path, batch: int, precision: str, workers: int) -> peers.Work:
    """What all ways do."""
    files = sorted((folder / "photos").glob("*.jpg"))
    texts = json.loads((folder / "texts.json").read_text())
    order = [range(start, start + batch) for start in range(0, len(files) - batch + 1, batch)]
    return peers.Work(folder / "model", files, texts, order * 100, precision, workers=workers)


def trainer_of(way: str, work: peers.Work, micro: int) -> peers.Trained:
    """One way's loop."""
    if way == PEER:
        return peers.sentence_transformers_trainer(work, "cached", micro)[1]
    batch = len(work.order[0])
    pieces = {"grad_accum": batch // micro} if way == ACCUMULATION else {"micro_batch": micro}
    return ours.trainer(*ours.opened(work, **pieces), work.order, work.workers)


def prepare(way: str, options: argparse.Namespace) -> Callable[[], measuring.Numbers]:
    """One way, which trains a few steps whenever it is asked."""
    work = work_in(Path(options.folder), options.batch, options.precision[0], options.workers)
    trained = trainer_of(way, work, options.micro)

    def run() -> measuring.Numbers:
        measuring.forget_peak()
        began = sum(os.times()[:4])
        taken = trained(options.steps + 1)
        cpu = (sum(os.times()[:4]) - began) / (options.steps + 1)
        rate = options.batch * len(taken) / sum(taken)
        return {"images_per_second": rate, "peak_gb": measuring.peak_gb(), "cpu_seconds": cpu}

    return run


def write_inputs(folder: Path, size: str, batch: int, options: argparse.Namespace) -> None:
    """Pictures, captions and a model; no picture comes twice."""
    count = batch * (options.steps + 1) * options.runs
    photos.write_photos(folder / "photos", count, *PICTURE[size])
    texts = photos.captions(count)
    (folder / "texts.json").write_text(json.dumps(texts))
    photos.write_model(folder / "model", size, texts)


def measured(folder: Path, batch: int, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """One table's rows."""
    told = ["--folder", str(folder), "--precision", precision, "--batch", str(batch), "--micro", str(options.micro)]
    told += ["--steps", str(options.steps), "--workers", str(options.workers)]
    measuring.matmul_rate(precision)  # Once more afterwards: the limit is the best of both.
    found = measuring.in_turns(__file__, [OURS, ACCUMULATION, *options.peers], options.runs, told, warm_up=False)
    rows = measuring.compared(found, OURS)
    work, rate = work_in(folder, batch, precision, options.workers), measuring.matmul_rate(precision)
    for way, row in rows.items():
        # What is contrasted with the whole batch is embedded twice; what is accumulated, within its piece alone, once.
        flops = photos.training_flops(work.model, work.texts, batch, 1 if way == ACCUMULATION else 2)
        row["of_the_limit"] = row["images_per_second"] * flops / rate
        row["cpu_seconds"] = measuring.middle(found[way], "cpu_seconds")
        row["vlkits_memory_is"] = rows[OURS]["peak_gb"] / row["peak_gb"]
    return rows


def verdicts(rows: dict[str, Any]) -> list[str]:
    """Whether the bars of bf16 are met."""
    speed, memory, most = WANTED
    lines = [measuring.verdict("memory of accumulation", rows[ACCUMULATION]["vlkits_memory_is"], most, most=True)]
    if PEER in rows:
        row = rows[PEER]
        more = f"{speed:g} x would be {speed * row['of_the_limit']:.0%} of the limit"
        lines.append(measuring.verdict(f"memory of {PEER}", row["vlkits_memory_is"], memory, most=True))
        lines.append(measuring.verdict(f"speed of {PEER}", row["reference_is"], speed, more=more))
    return lines


def shown(title: str, rows: dict[str, Any]) -> str:
    """One table; the bars are those of bf16 and of the batches that are asked for without a word."""
    head = ["", "images/s", "spread", "vlkit is", "of the limit", "CPU s", "peak GB", "vlkit's is"]
    lines = []
    for way, row in rows.items():
        memory = [f"{row['peak_gb']:.2f}", f"{row['vlkits_memory_is']:.2f} x"]
        rate = [*measuring.rate_cells(row), f"{row['of_the_limit']:.0%}"]
        lines.append([way, *rate, f"{row['cpu_seconds']:.1f}", *memory])
    usual = [f"{size}, {batch} in micro-batches of {MICRO}, bf16" for size, batch in BATCH.items()]
    bars = verdicts(rows) if title in usual else []
    return "\n".join([title, measuring.table(head, lines), *bars])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All the tables: rows by "size, batch in micro, precision", and the gradients'."""
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for size in options.size:
            folder, batch = Path(name) / size.replace("/", "-"), options.batch or BATCH[size]
            how = argparse.Namespace(**vars(options))
            how.steps = options.steps or STEPS[size]
            write_inputs(folder, size, batch, how)
            how.workers = WORKERS[size] if options.workers is None else options.workers
            for precision in options.precision:
                title = f"{size}, {batch} in micro-batches of {options.micro}, {precision}"
                tables[title] = measured(folder, batch, precision, how)
        tables["gradients"] = exactness.measured(Path(name) / "gradients", options.micro, options.without_peers)
    return tables


def arguments() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = measuring.parser(__doc__, rounds=3)
    parser.add_argument("--size", nargs="+", choices=list(BATCH), default=list(BATCH))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["bf16"])
    parser.add_argument("--batch", type=int, help="of either size; 1024 and 128 unless told")
    parser.add_argument("--micro", type=int, default=MICRO)
    parser.add_argument("--steps", type=int, help="of a turn, after one that is left out; tiny 5, else 2")
    parser.add_argument("--workers", type=int, help="processes that load the data of each; tiny 1, else 0")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure and print."""
    options = arguments().parse_args()
    if measuring.as_child(prepare, options):
        return
    options.peers, left_out = ([], []) if options.without_peers else peers.installed([PEER])
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    tables = measure(options)
    if options.json:
        print(json.dumps({"machine": measuring.machine(), **tables}, indent=2))
        return
    print(measuring.header(("torch", "transformers", "sentence-transformers", "open_clip_torch")))
    print(f"medians of {options.runs} turns, the highest peak")
    gradients = tables.pop("gradients")
    for title, rows in tables.items():
        print(f"\n{shown(title, rows)}")
    print(f"\n{exactness.shown(gradients)}")


if __name__ == "__main__":
    main()
