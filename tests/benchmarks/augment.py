"""augment: pictures a second on one process and on all cores, runs alternating; and OpenCV beside Pillow, by operation.

python tests/benchmarks/augment.py [--json] [--runs 3] [--pictures 800]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vlkit.config_data import OPERATIONS, PictureSettings
from vlkit.data.image_ops import Variation
from vlkit.data.processes import cores
from vlkit.data.render import Job, render


def photo(number: int) -> Image.Image:
    """640 x 480 with forms and grain."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    grain = random.integers(-12, 12, (480, 640, 1))
    pixels = np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC)).astype(int) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def written(folder: Path, count: int, runs: int) -> dict[str, Any]:
    """Decoded, varied and written as PNG: pictures a second."""
    jobs = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        photo(number).save(path, quality=88)
        jobs.append(Job(path, str(number), 0))
    rates: dict[int, list[float]] = {1: [], cores(): []}
    for run in range(runs):
        for workers in rates:
            out = folder / f"out-{run}-{workers}"
            out.mkdir()
            began = time.perf_counter()
            for _ in render(jobs, Variation.of(PictureSettings()), out, workers=workers):
                pass
            rates[workers].append(count / (time.perf_counter() - began))
    one, all_cores = (statistics.median(rates[workers]) for workers in (1, cores()))
    return {"one process": one, "all cores": all_cores, "ratio": all_cores / one}


def operations(repeats: int = 20) -> dict[str, dict[str, float]]:
    """Milliseconds for one picture of 640 x 480: vlkit's operation, and Pillow's."""
    picture = photo(0)
    pixels = np.asarray(picture)
    pillows: dict[str, Callable[[float], Any]] = {
        "flip_horizontal": lambda amount: ImageOps.mirror(picture),
        "flip_vertical": lambda amount: ImageOps.flip(picture),
        "turn": lambda amount: picture.transpose(Image.Transpose.ROTATE_90),
        "rotate": lambda amount: picture.rotate(amount, Image.Resampling.BICUBIC, fillcolor=(99, 99, 99)),
        "crop": lambda amount: picture.resize(picture.size, Image.Resampling.BICUBIC, box=(9, 9, 521, 393)),
        "brightness": lambda amount: ImageEnhance.Brightness(picture).enhance(amount),
        "contrast": lambda amount: ImageEnhance.Contrast(picture).enhance(amount),
        "saturation": lambda amount: ImageEnhance.Color(picture).enhance(amount),
        "blur": lambda amount: picture.filter(ImageFilter.GaussianBlur(amount)),
    }
    found = {}
    for name, pillow in pillows.items():
        variation = Variation.of(PictureSettings(**{**dict.fromkeys(OPERATIONS, 0.0), name: 1.0}))
        amount = variation.chosen(0, "a")[name]
        mine, its = (
            min(_seconds(work) for _ in range(repeats)) * 1000
            for work in (lambda v=variation: v.apply(pixels, 0, "a"), lambda p=pillow, a=amount: p(a))
        )
        found[name] = {"vlkit": mine, "pillow": its, "ratio": its / mine}
    return found


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=800)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count(), "operations": operations()}
    with tempfile.TemporaryDirectory() as folder:
        found["written"] = written(Path(folder), options.pictures, options.runs)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['machine']}, {found['cores']} cores, Python {platform.python_version()}")
    rates = found["written"]
    told = f"{rates['all cores']:.0f} a second on all cores, {rates['one process']:.0f} on one: {rates['ratio']:.2f} x"
    print(f"{options.pictures} JPEG pictures of 640 x 480 decoded, varied, written as PNG: {told}")
    for name, each in found["operations"].items():
        print(f"  {name:16s} {each['vlkit']:6.2f} ms, Pillow {each['pillow']:6.2f} ms: {each['ratio']:.1f} x")


if __name__ == "__main__":
    main()
