"""Write augmented images on all cores: each a pure function of (seed, epoch, sample)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.parallel import map_in_order, usable_cores

if TYPE_CHECKING:
    from PIL import Image

CHUNK_SIZE = 16
# One process draws fewer images than this sooner than a second process starts.
MIN_IMAGES_FOR_WORKERS = 200
# Options of Pillow's writers. webp keeps every pixel, and so does png, which OpenCV writes: training sees these pixels.
WRITER_OPTIONS: dict[str, dict[str, Any]] = {
    "webp": {"lossless": True, "method": 0, "quality": 0},
    "jpeg": {"quality": 95},
}


class RenderJob(NamedTuple):
    """An image to augment: its path, its image id, and the epoch that it is drawn for."""

    source: Path
    image_id: str
    epoch: int


class WrittenImage(NamedTuple):
    """An image that was written.

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
    jobs: Sequence[RenderJob],
    augmenter: ImageAugmenter,
    folder: Path,
    *,
    image_format: str = "png",
    workers: int | None = None,
) -> Iterator[tuple[RenderJob, WrittenImage]]:
    """Write the images into `folder`, named by their content, and yield them in the order of the jobs.

    Raises:
        DataError: an image is gone or no longer decodes; names it.
    """
    if workers is None:
        workers = usable_cores() if len(jobs) >= MIN_IMAGES_FOR_WORKERS else 1
    chunks = [
        (jobs[start : start + CHUNK_SIZE], augmenter, folder, image_format) for start in range(0, len(jobs), CHUNK_SIZE)
    ]
    results = map_in_order(_write_chunk, chunks, workers=min(workers, len(chunks)))
    for (chunk_jobs, *_), images in zip(chunks, results, strict=True):
        yield from zip(chunk_jobs, images, strict=True)


def encode_image(job: RenderJob, augmenter: ImageAugmenter, image_format: str) -> tuple[bytes, tuple[int, int]]:
    """Return the augmented image as the bytes of a file, and its width and height."""
    image = augmenter.load_image(job.source, job.epoch, job.image_id)
    if image_format == "png":
        return _encode_png(image), image.size
    file = io.BytesIO()
    image.save(file, image_format.upper(), **WRITER_OPTIONS[image_format])
    return file.getvalue(), image.size


def _encode_png(image: Image.Image) -> bytes:
    """Encode by OpenCV, whose run-length strategy is faster than Pillow's fastest, and smaller on noisy images."""
    import cv2

    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    ok, content = cv2.imencode(".png", cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR), options)
    assert ok, "a PNG of any pixels can be made"
    return content.tobytes()


def _write_chunk(chunk: tuple[Sequence[RenderJob], ImageAugmenter, Path, str]) -> list[WrittenImage]:
    jobs, augmenter, folder, image_format = chunk
    images = []
    for job in jobs:
        content, (width, height) = encode_image(job, augmenter, image_format)
        image_id = hashlib.sha256(content).hexdigest()[:20]
        name = f"{image_id}.{image_format.replace('jpeg', 'jpg')}"
        (folder / name).write_bytes(content)
        images.append(WrittenImage(name, image_id, width, height))
    return images
