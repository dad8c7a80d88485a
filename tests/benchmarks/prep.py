"""prep: pictures checked on all cores beside one process, runs alternating; a second prep; and a million rows' memory.

python tests/benchmarks/prep.py [--json] [--runs 3] [--pictures 1500] [--rows 1000000]

At 0 pictures or rows that part is left out.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from PIL import Image


def vlkit(*words: object, cache: Path) -> tuple[float, float]:
    """Wall seconds, and peak memory in GB, of one command (with the processes it starts)."""
    began = time.perf_counter()
    program = [sys.executable, "-m", "vlkit", *map(str, words)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment(cache))
    assert process.stderr is not None
    talk = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(program)} failed:\n{talk.decode()}")
    return time.perf_counter() - began, _gigabytes(usage)


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(cache)}


def _gigabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (2**30 if platform.system() == "Darwin" else 2**20)


def pictures(folder: Path, count: int) -> None:
    """JPEG files of 640 x 480 with forms and grain, in ten class folders."""
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        grain = random.integers(-12, 12, (480, 640, 1))
        pixels = np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC)).astype(int) + grain
        path = folder / f"class {number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=88)


def cores(folder: Path, count: int, runs: int) -> dict[str, Any]:
    """Seconds of prep with one process and with one a core, and of a second prep that finds its cache."""
    pictures(folder / "raw", count)
    line = ("prep", "--domain", "agriculture", "--source", folder / "raw", "--out", folder / "out")
    taken: dict[str, list[float]] = {"one process": [], "all cores": [], "again, from the cache": []}
    for number in range(runs + 1):
        for name, flags in (("one process", ("--workers", 1)), ("all cores", ()), ("again, from the cache", ())):
            cache = folder / ("cache" if "again" in name else f"cache {name} {number}")
            if "again" in name and number == 0:
                vlkit(*line, cache=cache)
            taken[name].append(vlkit(*line, *flags, cache=cache)[0])
    # The first round warms the file cache. A run on no pictures at all is taken off: starting costs all the same.
    idle = statistics.median(vlkit("prep", "--help", cache=folder / "cache")[0] for _ in range(3))
    seconds = {name: statistics.median(values[1:]) for name, values in taken.items()}
    spread = {name: (min(values[1:]), max(values[1:])) for name, values in taken.items()}
    checking = _checking(folder / "raw")
    return {
        "pictures": count,
        "seconds": seconds,
        "spread": spread,
        "start": idle,
        "checking": {name: statistics.median(values) for name, values in checking.items()},
        "checking_spread": {name: (min(values), max(values)) for name, values in checking.items()},
    }


def _checking(raw: Path) -> dict[str, list[float]]:
    """The checking alone, without starting Python, reading the folder and writing: seconds of three rounds."""
    from vlkit.data.prep.source_folder import SourceFolder
    from vlkit.data.prep.verify_images import verify_images
    from vlkit.storage import Location

    source = SourceFolder(Location(raw))
    names = list(source.files)
    taken: dict[str, list[float]] = {"one process": [], "all cores": []}
    for _ in range(3):
        for name, workers in (("one process", 1), ("all cores", None)):
            began = time.perf_counter()
            verify_images(source, names, workers=workers, rehash=True)
            taken[name].append(time.perf_counter() - began)
    return taken


def rows(folder: Path, count: int) -> dict[str, Any]:
    """Seconds and peak memory of prep over a CSV of many rows, its pictures not looked at."""
    folder.mkdir()
    with (folder / "rows.csv").open("w", encoding="utf-8") as file:
        file.write("image,caption\n")
        for number in range(count):
            file.write(f"images/{number // 1000:04d}/{number:07d}.jpg,picture {number} of thing {number % 4999}\n")
    line = ("prep", "--source", folder, "--no-check-images", "--out", folder.with_name("out of rows"))
    seconds, memory = vlkit(*line, cache=folder.with_name("cache"))
    return {"rows": count, "seconds": seconds, "peak_memory_gb": memory}


def shown(found: dict[str, Any]) -> str:
    """The table of what was done to the pictures."""
    lines = []
    for what, part in (("checking", "checking"), ("the whole command", "seconds")):
        one = found[part]["one process"]
        for name, seconds in found[part].items():
            low, high = found["spread" if part == "seconds" else "checking_spread"][name]
            cells = [f"{seconds:.2f}", f"{low:.2f}-{high:.2f}", f"{one / seconds:.2f} x"]
            lines.append([f"{what}, {name}", *cells, f"{found['pictures'] / seconds:.0f}"])
    return measuring.table(["", "seconds", "spread", "one process", "pictures/s"], lines)


def main() -> None:
    """Print the tables."""
    parser = measuring.parser(__doc__, rounds=3, peers=False)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": measuring.machine()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "own cache")
        if options.pictures:
            found["cores_used"] = cores(Path(folder) / "pictures", options.pictures, options.runs)
        if options.rows:
            found["many_rows"] = rows(Path(folder) / "rows", options.rows)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(measuring.header(("pillow", "pandas")))
    if measured := found.get("cores_used"):
        print(f"{measured['pictures']} JPEG pictures of 640 x 480; medians of {options.runs} rounds, checking of 3")
        print(f"{shown(measured)}\nof which starting alone: {measured['start']:.2f} s")
    if measured := found.get("many_rows"):
        print(f"{measured['rows']} rows: {measured['seconds']:.0f} s, at most {measured['peak_memory_gb']:.2f} GB")


if __name__ == "__main__":
    main()
