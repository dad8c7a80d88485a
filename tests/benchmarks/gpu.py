"""What training, embedding and ranking come to on a GPU: images a second, share of its peak, memory; and some checks.

python tests/benchmarks/gpu.py [--device cuda] [--size base] [--seconds 400] [--row-seconds 12] [--json]

CLIP ViT-B/32 (texts of 20 tokens) and SigLIP B/16 (of 64) with random weights, 224 px, in 16 bits, through vlkit's own
towers, contrast, loop and optimizer. Pixels are uint8 on the host; in the rows `from files` they are JPEG files of
640x480, decoded by the loader's processes. `of peak`: of the card's dense 16-bit peak, by the data sheet, or by its
measured rate where it is not known; the multiplications are the model's, nothing counted twice. Needs no network. Rows
for which no time is left say so. `--device cpu --size tiny --row-seconds 0.1` goes through the same rows anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import measuring

if TYPE_CHECKING:
    from gpu_rows import Bench, Row

STARTED = time.perf_counter()


def table(rows: Sequence[Row]) -> str:
    """As people read it."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = []
    for row in rows:
        speed = [cell(row.images_per_second, ",.1f"), cell(row.ms, ",.1f"), cell(row.tflops, ",.4g")]
        lines.append([row.name, *speed, cell(row.of_peak, ".1%"), cell(row.peak_gb, ".2f"), row.note])
    return measuring.table(["", "images/s", "ms/step", "TFLOP/s", "of peak", "peak GB", ""], lines)


def bench_of(options: argparse.Namespace) -> Bench:
    """The device, its yardsticks, and the precision that it is best at; a CPU takes that of a GPU."""
    import cards
    import torch
    from gpu_rows import Bench

    from vlkit import console
    from vlkit.models.device import best_precision

    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device here; --device cpu --size tiny tries the rows", file=sys.stderr)
        raise SystemExit(2)
    console.silence()
    device = cards.Device(torch.device(options.device))
    precision = best_precision(device.torch, 0) if device.is_cuda else "bf16"
    measured = device.product_rate(precision, min(3.0, options.row_seconds))
    peak = (cards.peak_of(device.name) if device.is_cuda else None) or measured
    until = STARTED + options.seconds
    return Bench(device, precision, options.size, until, options.row_seconds, peak, measured)


def heading(bench: Bench) -> str:
    """What was measured, and by what."""
    import torch

    told = f"{bench.device.name}, {bench.precision}"
    if bench.device.is_cuda:
        known = torch.cuda.get_device_properties(bench.device.torch)
        memory, capability = known.total_memory / 2**30, f"{known.major}.{known.minor}"
        told += f"; {memory:.0f} GB, compute capability {capability}, CUDA {torch.version.cuda}"
    source = "data sheet" if bench.peak != bench.measured else "not known: the measured rate"
    rates = f"peak {bench.peak / 1e12:.4g} TFLOP/s ({source}), large matrices {bench.measured / 1e12:.4g} TFLOP/s"
    return f"{measuring.header(('torch', 'transformers', 'bitsandbytes'))}\n{told}\n{rates}"


def arguments() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["base", "tiny"], default="base")
    parser.add_argument("--seconds", type=float, default=400, help="for everything; rows that no longer fit say so")
    parser.add_argument("--row-seconds", type=float, default=12, help="that a row is measured at most")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def main() -> int:
    """Check, measure and print; 1 where a check or a row has failed."""
    options = arguments().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # What a time limit sends: what was measured until then is printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    import gpu_checks
    import gpu_rows

    bench = bench_of(options)
    checks: list[tuple[bool | None, str]] = []
    try:
        gpu_checks.run(bench.device, bench.precision, checks)
    except KeyboardInterrupt:
        bench.until = 0.0
    gpu_rows.run(bench, gpu_rows.jobs(options.size))
    if options.json:
        rows = [asdict(row) for row in bench.rows]
        print(json.dumps({"heading": heading(bench), "checks": [line for _, line in checks], "rows": rows}, indent=2))
    else:
        print("\n".join([heading(bench), "", *(line for _, line in checks), "", table(bench.rows)]))
    return int(any(passed is False for passed, _ in checks) or any(row.failed for row in bench.rows))


if __name__ == "__main__":
    raise SystemExit(main())
