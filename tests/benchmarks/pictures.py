"""JPEG files to normalised 224 tensors, on all cores: vlkit's three ways beside transformers' image processors.

    transformers, Pillow        CLIPImageProcessor as it is without torchvision, in a torch DataLoader
    transformers, torchvision   as AutoImageProcessor opens it where torchvision is installed, in a torch DataLoader
    vlkit exact                 the product's store of pixels and its loader; normalised as Towers do
    vlkit fast                  the default
    vlkit reduced               large JPEGs decoded at a part of their size

Every loader has a process a core, runs without end, and is asked for batches in turns; what it had ready before its
turn is not counted. Beside pictures a second stands what a picture takes of a core, in all processes together: that
says the same on a quiet machine, and less wrong things on a busy one. Differences are to what the first way makes, in
255ths.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring
import photos
import torch
from peers import missing  # It makes torchvision importable, before transformers is.
from torch.utils.data import DataLoader, Dataset

SIDE = 224
SIZES = ("640x480", "1920x1440")
PILLOW, TORCHVISION = "transformers, Pillow", "transformers, torchvision"
OURS = ("vlkit exact", "vlkit fast", "vlkit reduced")
# Of a size: how many times the peer "fast" should be, and "reduced".
WANTED = {"640x480": (1.6, None), "1920x1440": (3.0, 5.0)}
# Parts of a picture's size that the decoder is timed at, nothing else done.
PARTS = (1, 2, 4, 8)
AHEAD = 2  # batches a process has ready: torch's default


class Processed(Dataset[torch.Tensor]):
    """Pictures as an image processor of transformers makes them: float32 [3, 224, 224]."""

    def __init__(self, paths: Sequence[Path], processor: Any) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self.paths[number]) as picture:
            return self.processor(picture, return_tensors="pt")["pixel_values"][0]


class Endless:
    """Numbers of pictures, a batch at a time, round and round."""

    def __init__(self, count: int, batch: int) -> None:
        self.count, self.batch = count, batch

    def __iter__(self) -> Iterator[list[int]]:
        numbers = itertools.cycle(range(self.count))
        while True:
            yield list(itertools.islice(numbers, self.batch))


def loaded(way: str, paths: Sequence[Path], batch: int) -> Iterator[torch.Tensor]:
    """float32 [batch, 3, 224, 224] without end."""
    workers = os.cpu_count() or 1
    if way in OURS:
        from vlkit.data.loading.stores import PIXEL_CACHE_BYTES, ErrorAsItem, PixelStore, reraise_errors
        from vlkit.models.dual_encoder import DualEncoder

        # So many that none is kept decoded.
        many = list(paths) * (PIXEL_CACHE_BYTES // (3 * SIDE**2 * len(paths)) + 1)
        store = PixelStore(many, _spec(way))
        assert not store.in_memory
        order: Any = Endless(len(many), batch)
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (store.spec.mean, store.spec.std))
        eye: Any = SimpleNamespace(device=torch.device("cpu"), mean=mean, std=std)
        loader: Any = DataLoader(ErrorAsItem(store), sampler=order, batch_size=None, num_workers=workers)
        return (DualEncoder.normalize_pixels(eye, pixels) for pixels in reraise_errors(loader))
    from transformers import CLIPImageProcessor, CLIPImageProcessorPil

    processor = CLIPImageProcessorPil() if way == PILLOW else CLIPImageProcessor()
    order = Endless(len(paths), batch)
    return iter(DataLoader(Processed(paths, processor), batch_sampler=order, num_workers=workers))


def _spec(way: str) -> Any:
    from vlkit.data.images.spec import PixelSpec
    from vlkit.models.preprocessing import CLIP_MEAN, CLIP_STD

    decode: Any = way.removeprefix("vlkit ")
    return PixelSpec(SIDE, fit="crop", resize=SIDE, mean=CLIP_MEAN, std=CLIP_STD, decode=decode)


def differences(way: str, paths: Sequence[Path]) -> measuring.Numbers:
    """Largest and mean square difference to what transformers makes in Pillow, in 255ths."""
    from transformers import CLIPImageProcessorPil

    theirs, ours = Processed(paths, CLIPImageProcessorPil()), loaded(way, paths, 1)
    scale = 255 * torch.tensor(_spec(OURS[0]).std).view(3, 1, 1)
    largest = total = 0.0
    for number in range(len(paths)):
        apart = ((next(ours)[0] - theirs[number]) * scale).round()
        largest = max(largest, float(apart.abs().max()))
        total += float(apart.square().mean())
    return {"largest": largest, "mean_square": total / len(paths)}


def prepare(way: str, options: argparse.Namespace) -> Callable[[], measuring.Numbers]:
    """A way's work: so many batches out of its loader, once those are gone that were ready."""
    # The cores are the loaders'. Threads of this process would spin beside them, waiting for a model that never comes.
    torch.set_num_threads(1)
    paths = sorted(Path(options.folder).iterdir())
    apart = differences(way, paths)
    batches = loaded(way, paths, options.batch)
    count, ready = -(-options.pictures // options.batch), AHEAD * (os.cpu_count() or 1)

    def work() -> measuring.Numbers:
        for _ in range(ready + 1):
            next(batches)
        began, used = time.perf_counter(), core_seconds()
        for _ in range(count):
            next(batches)
        seconds, used = time.perf_counter() - began, core_seconds() - used
        # The loader goes on until as much is ready again; that must not fall into the next way's turn.
        time.sleep(1.5 * ready * seconds / count)
        made = count * options.batch
        return {"pictures_per_second": made / seconds, "core_ms": 1000 * used / made, **apart}

    return work


def core_seconds() -> float:
    """Of this process and the loader's, so far (Linux)."""
    places = [Path("/proc") / str(process) / "stat" for process in [os.getpid(), *_loading()]]
    # After the name, which is in brackets: fields 3 and on; 14 and 15 are of the user and of the system.
    fields = [place.read_text().rpartition(")")[2].split() for place in places]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def _loading() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def decoding_ms(paths: Sequence[Path], decode: Callable[[Path, Any], Any], part: int = 1) -> float:
    """Milliseconds of a core that a picture takes to be read from its file and decoded, at a part of its size."""
    from PIL import Image

    taken = []
    for path in [*paths, *paths]:
        began = time.process_time()
        with Image.open(path) as picture:
            if part > 1:
                picture.draft(None, (picture.width // part, picture.height // part))
            assert decode(path, picture) is not None
        taken.append(time.process_time() - began)
    return 1000 * statistics.median(taken[len(paths) :])


def reduced_part(path: Path) -> int:
    """The part of its size that "reduced" has this picture decoded at."""
    from PIL import Image

    from vlkit.data.images.decode import REDUCED_MARGIN, _draft

    with Image.open(path) as picture:
        whole = picture.width
        _draft(picture, REDUCED_MARGIN * SIDE)
        return round(whole / picture.width)


def measured(folder: Path, ways: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """One table's rows, and the least that reading the files takes."""
    from vlkit.data.images import jpeg

    told = ["--folder", str(folder), "--batch", str(options.batch), "--pictures", str(options.pictures)]
    found = measuring.in_turns(__file__, ways, options.runs, told)
    key = "pictures_per_second"
    best = max((way for way in ways if way not in OURS), key=lambda way: measuring.middle(found[way], key))
    rows = {}
    for way, runs in found.items():
        mean_square = runs[0]["mean_square"]
        rows[way] = {
            key: measuring.middle(runs, key),
            "spread": measuring.spread(runs, key),
            "of_pillow": measuring.ratio(runs, found[PILLOW], key),
            "of_best": measuring.ratio(runs, found[best], key),
            "core_ms": measuring.middle(runs, "core_ms"),
            "core_of_pillow": measuring.ratio(found[PILLOW], runs, "core_ms"),
            "core_of_best": measuring.ratio(found[best], runs, "core_ms"),
            "largest": runs[0]["largest"],
            "psnr": 10 * math.log10(255**2 / mean_square) if mean_square else None,
        }
    paths = sorted(folder.iterdir())
    decoding = {part: decoding_ms(paths, jpeg.decode_jpeg, part) for part in PARTS}
    pillows = decoding_ms(paths, lambda _, picture: picture.load())
    floors = {"decoding_ms": decoding, "pillows_decoding_ms": pillows, "reduced_part": reduced_part(paths[0])}
    return {"rows": rows, **floors}


def shown(size: str, found: dict[str, Any]) -> str:
    """One table."""
    head = ["", "pictures/s", "spread", "Pillow's", "best peer's", "core ms", "Pillow's", "best peer's"]
    head += ["largest", "PSNR"]
    lines = []
    for way, row in found["rows"].items():
        low, high = row["spread"]
        ratios = [f"{row[name]:.2f} x" for name in ("of_pillow", "of_best", "core_of_pillow", "core_of_best")]
        psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        cells = [f"{row['pictures_per_second']:.0f}", f"{low:.0f}-{high:.0f}", *ratios[:2]]
        cells += [f"{row['core_ms']:.2f}", *ratios[2:], f"{row['largest']:.0f}", psnr]
        lines.append([way, *cells])
    fast, reduced = WANTED[size]
    of = {way: found["rows"][way]["core_of_pillow"] for way in OURS}
    bars = [measuring.verdict("fast, of Pillow's core time", of["vlkit fast"], fast)]
    if reduced:
        pillow, decoding = found["rows"][PILLOW]["core_ms"], found["decoding_ms"]
        least, part = min(PARTS, key=lambda part: decoding[part]), found["reduced_part"]
        more = f"its decoder alone, at 1/{part}, would be {pillow / decoding[part]:.1f} x"
        more += f"; at 1/{least} {pillow / decoding[least]:.1f} x"
        bars.append(measuring.verdict("reduced, of Pillow's core time", of["vlkit reduced"], reduced, more=more))
    floors = [f"{ms:.2f} at 1/{part} of the size" for part, ms in found["decoding_ms"].items()]
    told = f"vlkit's decoder alone takes of a core, in ms: {', '.join(floors)}"
    told += f"; reduced takes 1/{found['reduced_part']}; Pillow's {found['pillows_decoding_ms']:.2f} at 1/1"
    return "\n".join([size, measuring.table(head, lines), told, *bars])


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__, rounds=7)
    parser.add_argument("--pictures", type=int, default=128, help="pictures that are counted a turn")
    parser.add_argument("--files", type=int, default=32, help="different ones")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if measuring.as_child(prepare, options):
        return
    peers = [PILLOW]
    if (gone := missing("torchvision")) and not options.without_peers:
        print(f"{TORCHVISION} is left out: {', '.join(gone)} not installed", file=sys.stderr)
    elif not gone:
        peers += [TORCHVISION] * (not options.without_peers)
    tables = {}
    with tempfile.TemporaryDirectory() as name:
        for size in options.sizes:
            width, height = map(int, size.split("x"))
            photos.write_photos(Path(name) / size, options.files, width, height)
            tables[size] = measured(Path(name) / size, [*peers, *OURS], options)
    if options.json:
        print(json.dumps({"machine": measuring.machine(), **tables}, indent=2))
        return
    print(measuring.header(("torch", "transformers", "torchvision", "pillow", "simplejpeg")))
    print(f"JPEG to normalised {SIDE} tensors in batches of {options.batch}; medians of {options.runs} turns")
    for size, rows in tables.items():
        print(f"\n{shown(size, rows)}")


if __name__ == "__main__":
    main()
