"""The rows of the GPU's table: what is measured, on how much, and what a row came to."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import cards
import gpu_checks
import photos
import torch
from transformers import CLIPConfig, SiglipConfig

from vlkit.data.images.spec import PixelSpec
from vlkit.data.loading.epoch_sampler import BatchIndices, batch_stream
from vlkit.data.loading.stores import PIXEL_CACHE_BYTES, PixelStore, loader_workers
from vlkit.evaluation.retrieval.ranking import rank_both
from vlkit.models.cache.feature_cache import FrozenImages
from vlkit.models.device import Precision
from vlkit.models.encode import encode_images, encode_text_inputs
from vlkit.models.stages import PartialForward

# Of the time left, divided by the rows left, the share that a row is measured; the rest is for its beginning.
SHARE = 0.5
# A row is not begun with fewer seconds left.
LEAST = 5.0


@dataclass(frozen=True)
class Size:
    """How much is done: pictures and texts of a step, a file row and a ranking."""

    batch: int
    larger: Sequence[int]
    many: int
    files: int
    ranked: tuple[int, int]


SIZES = {
    "base": Size(256, (1024, 512, 256, 128), 4096, 256, (25_000, 5_000)),
    "tiny": Size(8, (16, 8), 16, 8, (500, 100)),
}
TOKENS = {"clip": 20, "siglip": 64}
NAMES = {
    "base": {"clip": "CLIP ViT-B/32", "siglip": "SigLIP B/16"},
    "tiny": {"clip": "tiny CLIP", "siglip": "tiny SigLIP"},
}


@dataclass
class Row:
    """A line of the table. What could not be measured is None; a note says why."""

    name: str
    images_per_second: float | None = None
    ms: float | None = None
    tflops: float | None = None
    of_peak: float | None = None
    peak_gb: float | None = None
    note: str = ""
    failed: bool = False


@dataclass
class Bench:
    """Where and how it is measured.

    Attributes:
        until: no row is begun when `time.perf_counter()` is near it.
        most: seconds that a row is measured at most, what comes before not counted.
        peak: FLOP/s that a share is taken of.
        measured: FLOP/s of products of large matrices.
    """

    device: cards.Device
    precision: Precision
    size: str
    until: float
    most: float
    peak: float
    measured: float
    rows: list[Row] = field(default_factory=list)

    @property
    def amounts(self) -> Size:
        """How much is done."""
        return SIZES[self.size]

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.perf_counter()

    def config(self, kind: str) -> Any:
        """A model's shape."""
        if self.size == "tiny":
            return gpu_checks.tiny(kind)
        return CLIPConfig() if kind == "clip" else SiglipConfig()

    def timed(self, step: Callable[[], int], seconds: float, before: int = 2) -> dict[str, float]:
        """Steps, which say how many pictures they were, for about so many seconds.

        Args:
            before: steps that are not counted; fewer where they take longer than that.
        """
        began = time.perf_counter()
        for number in range(before):
            if number and time.perf_counter() - began > seconds:
                break
            step()
            self.device.wait()
        items = count = 0
        began = time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds or not count:
            items, count = items + step(), count + 1
            self.device.wait()
        return {"images_per_second": items / taken, "ms": 1000 * taken / count, "peak_gb": self.device.peak_gb()}


Measure = Callable[[Bench, float], dict[str, Any]]


def training(kind: str, batch: int | None = None, micro: int | None = None, tune: str = "full") -> Measure:
    """Steps on the same pairs; of a frozen vision tower what it makes of pictures is kept.

    Args:
        batch: None: that of the size.
    """

    def measure(bench: Bench, seconds: float) -> dict[str, Any]:
        config, size = bench.config(kind), batch or bench.amounts.batch
        encoder = gpu_checks.towers_of(config, bench.device.torch, tune)
        images: Any
        images, captions = gpu_checks.pairs_of(config, size, TOKENS[kind])
        work = cards.Work.of(config, TOKENS[kind])
        flops = work.training
        if tune == "text":
            frozen, flops = FrozenImages.from_encoder(encoder, bench.precision), 3 * work.text
            kept = [frozen(some).float().cpu() for some in images.split(64)]
            images = PartialForward(torch.cat(kept), frozen.depth)
        batches = cycle([gpu_checks.batch_of(images, captions)])
        trainer = gpu_checks.trainer_of(encoder, batches, bench.precision, micro=micro)
        return {"flops": flops, **bench.timed(lambda: next(trainer).items, seconds)}

    return measure


def largest(kind: str) -> Measure:
    """Training in the largest batch that fits, of those that are tried."""

    def measure(bench: Bench, seconds: float) -> dict[str, Any]:
        for batch in bench.amounts.larger:
            emptied()
            bench.device.forget_peak()
            with suppress(torch.OutOfMemoryError):
                return {"note": f"batch {batch}", **training(kind, batch)(bench, seconds)}
        return {"note": f"not even a batch of {bench.amounts.larger[-1]} fits"}

    return measure


def many(kind: str) -> Measure:
    """Training in a large batch by micro-batches."""

    def measure(bench: Bench, seconds: float) -> dict[str, Any]:
        amounts = bench.amounts
        found = training(kind, amounts.many, amounts.batch)(bench, seconds)
        return {"note": f"{amounts.many} in {amounts.batch}", **found}

    return measure


def embedding(kind: str, what: str) -> Measure:
    """Pictures, or texts, without gradients, eight batches a step."""

    def measure(bench: Bench, seconds: float) -> dict[str, Any]:
        config, size = bench.config(kind), bench.amounts.batch
        encoder = gpu_checks.towers_of(config, bench.device.torch).eval()
        pixels, ids = gpu_checks.pairs_of(config, 8 * size, TOKENS[kind])
        work = cards.Work.of(config, TOKENS[kind])
        pictured = what == "pictures"
        encode, held = (encode_images, Held(pixels)) if pictured else (encode_text_inputs, Held(ids))
        how = {"batch_size": size, "precision": bench.precision}
        found = bench.timed(lambda: len(encode(encoder, held, **how)), seconds)
        return {"flops": work.picture + work.patches if pictured else work.text, **found}

    return measure


@dataclass(frozen=True)
class Held:
    """Pictures or texts in memory, asked for in their order."""

    values: Any
    in_memory = True

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, positions: Sequence[int]) -> Any:
        return self.values[positions[0] : positions[-1] + 1]


@dataclass(frozen=True)
class Filed:
    """Batches of pictures in files, and of texts that are tokens already."""

    images: Any
    texts: Any
    augmenter = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, drawn: Any) -> Any:
        return gpu_checks.batch_of(self.images[drawn.rows], self.texts[: len(drawn.rows)])


def from_files(kind: str, *, trained: bool) -> Measure:
    """JPEG files by the loader's processes: alone, to see what they give, or with training behind them."""

    def measure(bench: Bench, seconds: float) -> dict[str, Any]:
        config, size = bench.config(kind), bench.amounts.batch
        side = config.vision_config.image_size
        with tempfile.TemporaryDirectory() as folder:
            files = photos.write_photos(Path(folder), bench.amounts.files)
            # As many as are no longer kept in memory: each is decoded whenever it comes.
            paths = files * (PIXEL_CACHE_BYTES // (3 * side**2) // len(files) + 1)
            store = PixelStore(paths, PixelSpec(side, fit="crop", resize=side))
            rows = [range(start, start + size) for start in range(0, len(paths) - size + 1, size)]
            order: Any = cycle([BatchIndices(0, list(some), [0] * size) for some in rows])
            source = Filed(store, gpu_checks.pairs_of(config, size, TOKENS[kind])[1])
            batches, workers = batch_stream(source, order), loader_workers(store)
            # Batches that lie ready when the clock starts would flatter the loader.
            note, before = f"{workers} processes", 2 * workers + 1
            if not trained:
                return {"note": note, **bench.timed(lambda: len(next(batches)), seconds, before)}
            encoder = gpu_checks.towers_of(config, bench.device.torch)
            trainer = gpu_checks.trainer_of(encoder, batches, bench.precision)
            found = bench.timed(lambda: next(trainer).items, seconds, before)
            return {"note": note, "flops": cards.Work.of(config, TOKENS[kind]).training, **found}

    return measure


def ranking(*, dense: bool) -> Measure:
    """Both directions of a large evaluation: exact ranks, or the first ten of the full score matrix."""

    def measure(bench: Bench, seconds: float) -> dict[str, Any]:
        count, gallery = bench.amounts.ranked
        with bench.device.torch:
            pictures = torch.nn.functional.normalize(torch.randn(gallery, 512), dim=1)
            right = torch.arange(count) % gallery
            texts = torch.nn.functional.normalize(pictures[right] + 0.3 * torch.randn(count, 512), dim=1)
        groups = [str(number) for number in range(gallery)]
        own = [groups[number] for number in right.tolist()]

        def step() -> int:
            if dense:
                scores = texts @ pictures.T
                for each in (scores, scores.T):
                    each.topk(10, dim=1).indices.cpu()
            else:
                rank_both(texts, pictures, own, groups)
            return 0

        found = bench.timed(step, seconds)
        return {**found, "images_per_second": None, "note": f"{count} texts, {gallery} pictures"}

    return measure


def jobs(size: str) -> dict[str, Measure]:
    """Every row, in the order of their worth."""
    found: dict[str, Measure] = {}
    for kind, name in NAMES[size].items():
        found[f"{name}, everything trained, batch {SIZES[size].batch}"] = training(kind)
        found[f"{name}, everything trained, largest batch"] = largest(kind)
        found[f"{name}, everything trained, micro-batches"] = many(kind)
        found[f"{name}, vision frozen and kept"] = training(kind, tune="text")
        found[f"{name}, pictures embedded"] = embedding(kind, "pictures")
        found[f"{name}, texts embedded (texts/s)"] = embedding(kind, "texts")
    name = NAMES[size]["clip"]
    found[f"{name}, from files, loader alone"] = from_files("clip", trained=False)
    found[f"{name}, from files, everything trained"] = from_files("clip", trained=True)
    found["ranking, exact, both directions"] = ranking(dense=False)
    found["ranking, dense scores and topk"] = ranking(dense=True)
    return found


def emptied() -> None:
    """Nothing that a row has left stays on a card."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def run(bench: Bench, wanted: dict[str, Measure]) -> None:
    """Measure row by row; one that breaks says how, and the others go on."""
    for number, (name, measure) in enumerate(wanted.items()):
        row = Row(name)
        bench.rows.append(row)
        if bench.left < LEAST:
            row.note = "skipped: no time left"
            continue
        emptied()
        bench.device.forget_peak()
        try:
            _fill(row, measure(bench, min(bench.most, SHARE * bench.left / (len(wanted) - number))), bench.peak)
        except KeyboardInterrupt:
            row.note, bench.until = "stopped: no time left", 0.0
        except torch.OutOfMemoryError:
            row.note = "does not fit into memory"
        except Exception as error:
            traceback.print_exc()
            row.note, row.failed = gpu_checks.said(error), True
        print(f"{name}: {row.note or f'{row.ms:.1f} ms'}", file=sys.stderr)


def _fill(row: Row, found: dict[str, Any], peak: float) -> None:
    flops = found.pop("flops", None)
    for name, value in found.items():
        setattr(row, name, value)
    if flops is not None and row.images_per_second is not None:
        row.tflops = flops * row.images_per_second / 1e12
        row.of_peak = flops * row.images_per_second / peak
