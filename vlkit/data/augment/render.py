"""Varied pictures, written on all cores: each a pure function of (seed, epoch, sample)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.parallel import usable_cores, map_in_order

if TYPE_CHECKING:
    from PIL import Image

CHUNK = 16
# Fewer pictures than this are drawn sooner by one process than a second one starts.
WORTH_PROCESSES = 200
# Of Pillow's writers; png, which is not among them, and webp keep every pixel: what is written is what training sees.
OPTIONS: dict[str, dict[str, Any]] = {
    "webp": {"lossless": True, "method": 0, "quality": 0},
    "jpeg": {"quality": 95},
}


class RenderJob(NamedTuple):
    """A picture to vary: where it lies, its image id, and the epoch whose picture it becomes."""

    source: Path
    image_id: str
    epoch: int


class WrittenImage(NamedTuple):
    """A picture that was written.

    Attributes:
        name: of the file.
        image_id: hash of its bytes, 20 hex digits.
        width, height: in pixels.
    """

    name: str
    image_id: str
    width: int
    height: int


def render_images(
    jobs: Sequence[RenderJob], variation: ImageAugmenter, folder: Path, *, form: str = "png", workers: int | None = None
) -> Iterator[tuple[RenderJob, WrittenImage]]:
    """Write the pictures into `folder`, named by their content; in the order of the jobs.

    Raises:
        DataError: a picture is gone or does not decode any more; names it.
    """
    if workers is None:
        workers = usable_cores() if len(jobs) >= WORTH_PROCESSES else 1
    chunks = [(jobs[start : start + CHUNK], variation, folder, form) for start in range(0, len(jobs), CHUNK)]
    for (done, *_), written in zip(chunks, map_in_order(_render, chunks, workers=min(workers, len(chunks))), strict=True):
        yield from zip(done, written, strict=True)


def encode_image(job: RenderJob, variation: ImageAugmenter, form: str) -> tuple[bytes, tuple[int, int]]:
    """The varied picture as a file's bytes, and its size in pixels."""
    picture = variation.load_image(job.source, job.epoch, job.image_id)
    if form == "png":
        return _png(picture), picture.size
    file = io.BytesIO()
    picture.save(file, form.upper(), **OPTIONS[form])
    return file.getvalue(), picture.size


def _png(picture: Image.Image) -> bytes:
    """By OpenCV, whose run-length strategy is faster than Pillow's fastest, and smaller on noisy pictures."""
    import cv2

    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    done, content = cv2.imencode(".png", cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR), options)
    assert done, "a PNG of any pixels can be made"
    return content.tobytes()


def _render(chunk: tuple[Sequence[RenderJob], ImageAugmenter, Path, str]) -> list[WrittenImage]:
    jobs, variation, folder, form = chunk
    written = []
    for job in jobs:
        content, (width, height) = encode_image(job, variation, form)
        digits = hashlib.sha256(content).hexdigest()[:20]
        name = f"{digits}.{form.replace('jpeg', 'jpg')}"
        (folder / name).write_bytes(content)
        written.append(WrittenImage(name, digits, width, height))
    return written
