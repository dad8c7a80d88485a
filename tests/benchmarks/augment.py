"""augment: pictures a second on one process and on all cores, runs alternating; and OpenCV beside Pillow, by operation.

python tests/benchmarks/augment.py [--json] [--runs 3] [--pictures 800]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vlkit.config.data import IMAGE_OPERATIONS, ImageAugmentSettings
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.augment.render import RenderJob, render_images
from vlkit.data.parallel import usable_cores


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
        jobs.append(RenderJob(path, str(number), 0))
    rates: dict[int, list[float]] = {1: [], usable_cores(): []}
    # The first round warms up.
    for run in range(runs + 1):
        for workers in rates:
            out = folder / f"out-{run}-{workers}"
            out.mkdir()
            began = time.perf_counter()
            for _ in render_images(jobs, ImageAugmenter.from_settings(ImageAugmentSettings()), out, workers=workers):
                pass
            rates[workers] += [count / (time.perf_counter() - began)] if run else []
    one, every = rates[1], rates[usable_cores()]
    return {
        "one process": statistics.median(one),
        "all cores": statistics.median(every),
        "ratio": statistics.median(b / a for a, b in zip(one, every, strict=True)),
        "spread": {"one process": (min(one), max(one)), "all cores": (min(every), max(every))},
    }


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
        variation = ImageAugmenter.from_settings(
            ImageAugmentSettings(**{**dict.fromkeys(IMAGE_OPERATIONS, 0.0), name: 1.0})
        )
        amount = variation.chosen_operations(0, "a")[name]
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


def shown(found: dict[str, Any]) -> str:
    """Both tables."""
    rates = found["written"]
    lines = []
    for name in ("one process", "all cores"):
        low, high = rates["spread"][name]
        times = "1.00 x" if name == "one process" else f"{rates['ratio']:.2f} x"
        lines.append([name, f"{rates[name]:.0f}", f"{low:.0f}-{high:.0f}", times])
    each = [
        [name, f"{row['vlkit']:.2f}", f"{row['pillow']:.2f}", f"{row['ratio']:.1f} x"]
        for name, row in found["operations"].items()
    ]
    written = measuring.table(["decoded, varied, written as PNG", "pictures/s", "spread", "one process"], lines)
    return f"{written}\n\n{measuring.table(['one picture, ms', 'vlkit', 'Pillow', 'ratio'], each)}"


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__, rounds=3, peers=False)
    parser.add_argument("--pictures", type=int, default=800)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": measuring.machine(), "operations": operations()}
    with tempfile.TemporaryDirectory() as folder:
        found["written"] = written(Path(folder), options.pictures, options.runs)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(measuring.header(("opencv-python-headless", "pillow")))
    print(f"{options.pictures} JPEG pictures of 640 x 480; medians of {options.runs} rounds; an operation: least of 20")
    print(shown(found))


if __name__ == "__main__":
    main()
