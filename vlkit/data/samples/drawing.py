"""Shapes, light and noise of the sample images.

Points are float arrays [n, 2] of (x, y). Shapes are drawn around the origin with a radius near 1 and placed on a canvas
whose unit is one pixel of the finished image. Colours are float arrays [3], RGB in 0..255; angles are in radians.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float64]

SIDE = 64  # width and height of an image in pixels
ZOOM = 2  # canvas pixels per image pixel; shrinking the canvas smooths the edges
JPEG_QUALITY = 90


def item_rng(*key: int) -> Generator:
    """Return the random generator of one item, seeded from (seed, item numbers)."""
    return Generator(PCG64(key))


def save_jpeg(pixels: Array, path: Path) -> None:
    """Write pixels [H, W, 3] in 0..255 as a JPEG."""
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.save(path, "JPEG", quality=JPEG_QUALITY)


def superellipse(power: float = 2.0, aspect: float = 1.0, waves: int = 0, depth: float = 0.0) -> Array:
    """Return a closed outline [48, 2]: a superellipse (2 = ellipse, 6 = rounded square) with a wavy rim.

    `aspect` is height over width; `depth` the height of the waves as a share of the radius.
    """
    t = np.linspace(0.0, 2.0 * np.pi, 48, endpoint=False)
    x, y = np.cos(t), np.sin(t)
    radius = (np.abs(x) ** power + np.abs(y) ** power) ** (-1.0 / power)
    radius = radius * (1.0 + depth * np.cos(waves * t))
    return np.stack([radius * x, aspect * radius * y], axis=1)


def half_moon() -> Array:
    """Return the outline [24, 2] of a half disc, centred on its middle."""
    t = np.linspace(0.0, np.pi, 24)
    return np.stack([1.1 * np.cos(t), 1.1 * np.sin(t) - 0.45], axis=1)


def star() -> Array:
    """Return the outline [10, 2] of a five-pointed star."""
    t = np.arange(10) * np.pi / 5.0
    radius = np.where(np.arange(10) % 2 == 0, 1.25, 0.55)
    return np.stack([radius * np.cos(t), radius * np.sin(t)], axis=1)


def transform(points: Array, centre: Array, scale: float, angle: float) -> Array:
    """Rotate by `angle` (radians), scale, and move the origin to `centre`."""
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(points @ np.array([[c, s], [-s, c]]) * scale + centre)


def fill_polygon(draw: ImageDraw.ImageDraw, points: Array, colour: Array) -> None:
    """Fill a polygon given in image pixels."""
    red, green, blue = (int(v) for v in np.clip(colour, 0, 255))
    draw.polygon([(x, y) for x, y in (points * ZOOM).tolist()], fill=(red, green, blue))


def shade(colour: Array, gain: float) -> Array:
    """Return a darker (gain < 1) or lighter (gain > 1: towards white) colour."""
    return colour * gain if gain <= 1 else 255.0 - (255.0 - colour) / gain


def photograph(canvas: Image.Image, rng: Generator) -> Array:
    """Shrink the canvas to image size; add uneven light, a colour cast and noise: [H, W, 3]."""
    pixels = np.asarray(canvas.reduce(ZOOM), dtype=np.float64)
    across = np.linspace(-1.0, 1.0, SIDE)
    slope = rng.uniform(-0.12, 0.12, 2)
    light = rng.uniform(0.84, 1.08) + slope[0] * across[:, None] + slope[1] * across[None, :]
    pixels = pixels * light[:, :, None] * rng.uniform(0.96, 1.04, 3)
    return np.asarray(pixels + rng.normal(0.0, 4.0, pixels.shape))


def draw_clutter(draw: ImageDraw.ImageDraw, rng: Generator) -> None:
    """Draw coloured blobs and crumbs, which no text names."""
    for _ in range(int(rng.integers(1, 5))):
        blob = superellipse(waves=int(rng.integers(2, 5)), depth=rng.uniform(0.0, 0.25))
        spot = transform(blob, rng.uniform(0.0, SIDE, 2), rng.uniform(2.0, 5.0), rng.uniform(0, 6))
        fill_polygon(draw, spot, rng.uniform(30.0, 250.0, 3))
    for _ in range(int(rng.integers(0, 12))):
        crumb = transform(superellipse(), rng.uniform(0.0, SIDE, 2), 0.7, 0.0)
        fill_polygon(draw, crumb, rng.uniform(90.0, 200.0, 3))
