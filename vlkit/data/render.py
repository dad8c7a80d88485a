"""Varied pictures, written on all cores: each a pure function of (seed, epoch, sample)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlkit.data.image_ops import Variation
from vlkit.data.processes import cores, in_order

CHUNK = 16
# Fewer pictures than this are drawn sooner by one process than a second one starts.
WORTH_PROCESSES = 200
# png and webp keep every pixel: what is written is what training sees.
OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "webp": {"lossless": True, "method": 0, "quality": 0},
    "jpeg": {"quality": 95},
}


class Job(NamedTuple):
    """A picture to vary: where it lies, its image id, and the epoch whose picture it becomes."""

    source: Path
    image_id: str
    epoch: int


class Rendered(NamedTuple):
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


def render(
    jobs: Sequence[Job], variation: Variation, folder: Path, *, form: str = "png", workers: int | None = None
) -> Iterator[tuple[Job, Rendered]]:
    """Write the pictures into `folder`, named by their content; in the order of the jobs.

    Raises:
        DataError: a picture is gone or does not decode any more; names it.
    """
    if workers is None:
        workers = cores() if len(jobs) >= WORTH_PROCESSES else 1
    chunks = [(jobs[start : start + CHUNK], variation, folder, form) for start in range(0, len(jobs), CHUNK)]
    for (done, *_), written in zip(chunks, in_order(_render, chunks, workers=min(workers, len(chunks))), strict=True):
        yield from zip(done, written, strict=True)


def encoded(job: Job, variation: Variation, form: str) -> tuple[bytes, tuple[int, int]]:
    """The varied picture as a file's bytes, and its size in pixels."""
    picture, file = variation.picture(job.source, job.epoch, job.image_id), io.BytesIO()
    picture.save(file, form.upper(), **OPTIONS[form])
    return file.getvalue(), picture.size


def _render(chunk: tuple[Sequence[Job], Variation, Path, str]) -> list[Rendered]:
    jobs, variation, folder, form = chunk
    written = []
    for job in jobs:
        content, (width, height) = encoded(job, variation, form)
        digits = hashlib.sha256(content).hexdigest()[:20]
        name = f"{digits}.{form.replace('jpeg', 'jpg')}"
        (folder / name).write_bytes(content)
        written.append(Rendered(name, digits, width, height))
    return written
