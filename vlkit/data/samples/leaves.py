"""The sample leaves, in class folders: `<Crop>___<Disease>/NNNN.jpg`, lesions whose form depends on the disease.

Position, size, rotation, light and ground vary; the classes' sizes are uneven on purpose.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from vlkit.data.samples.drawing import (
    SIDE,
    ZOOM,
    Array,
    draw_clutter,
    fill_polygon,
    item_rng,
    photograph,
    save_jpeg,
    shade,
    star,
    superellipse,
    transform,
)

# Class folder -> (leaf, lesion, number of images).
_CLASSES = {
    "Apple___Apple_scab": ("apple", "speck", 40),
    "Apple___healthy": ("apple", "none", 44),
    "Corn___Common_rust": ("corn", "streak", 36),
    "Grape___Black_rot": ("grape", "hole", 12),
    "Squash___Powdery_mildew": ("squash", "cloud", 30),
    "Tomato___Early_blight": ("tomato", "target", 48),
    "Tomato___Late_blight": ("tomato", "blotch", 40),
    "Tomato___healthy": ("tomato", "none", 44),
}


_LEAVES = {
    "apple": superellipse(power=1.7, aspect=0.62),
    "corn": 1.2 * superellipse(power=1.8, aspect=0.3),
    "grape": superellipse(waves=5, depth=0.16),
    "squash": superellipse(power=2.4, aspect=0.9, waves=3, depth=0.05),
    "tomato": superellipse(power=1.6, aspect=0.7, waves=14, depth=0.07),
}
_LESIONS = {  # number of lesions on a leaf: at least, less than
    "none": (0, 1),
    "speck": (18, 30),
    "streak": (10, 18),
    "hole": (5, 9),
    "cloud": (3, 6),
    "target": (3, 6),
    "blotch": (2, 5),
}


def write_leaves(out: Path, seed: int) -> dict[str, int]:
    """Write one folder of leaf images per class."""
    image_count = 0
    for c, (name, (leaf, lesion, size)) in enumerate(_CLASSES.items()):
        (out / name).mkdir()
        for k in range(size):
            pixels = _draw_leaf(leaf, lesion, item_rng(seed, 3, c, k))
            save_jpeg(pixels, out / name / f"{k + 1:04d}.jpg")
        image_count += size
    return {"classes": len(_CLASSES), "pictures": image_count}


def _draw_leaf(leaf: str, lesion: str, rng: Generator) -> Array:
    """Draw a leaf on a random ground: pixels [H, W, 3]."""
    ground = rng.uniform(70.0, 220.0, 3)
    side = SIDE * ZOOM
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in ground))
    draw = ImageDraw.Draw(canvas)
    draw_clutter(draw, rng)
    centre = SIDE / 2 + rng.uniform(-4.0, 4.0, 2)
    size, angle = rng.uniform(24.0, 30.0), rng.uniform(0.0, 2.0 * np.pi)
    green = np.array([85.0, 145.0, 60.0]) + rng.uniform(-25.0, 25.0, 3)
    outline = _LEAVES[leaf]
    fill_polygon(draw, transform(outline, centre + 1.2, size, angle), shade(ground, 0.55))
    fill_polygon(draw, transform(outline, centre, size, angle), shade(green, 0.8))
    fill_polygon(draw, transform(outline, centre, size * 0.94, angle), green)
    aspect = float(np.abs(outline[:, 1]).max())
    vein = shade(green, 1.4)
    midrib = np.array([[1.2, 0.0], [-0.9, 0.02], [-0.9, -0.02]])
    fill_polygon(draw, transform(midrib, centre, size, angle), vein)
    for along, way in product((-0.4, 0.0, 0.4), (-1.0, 1.0)):
        rib = np.array([[along, -0.015], [along, 0.015], [along - 0.25, way * 0.6 * aspect]])
        fill_polygon(draw, transform(rib, centre, size, angle), vein)
    _draw_lesions(draw, lesion, aspect, (centre, size, angle), ground, rng)
    return photograph(canvas, rng)


def _draw_lesions(
    draw: ImageDraw.ImageDraw,
    lesion: str,
    aspect: float,
    frame: tuple[Array, float, float],
    ground: Array,
    rng: Generator,
) -> None:
    """Draw lesions of one form inside the ellipse of the given aspect; `frame` is (centre, size, angle) of the leaf.

    `ground` is the colour seen through holes in the leaf.
    """
    centre, size, angle = frame
    brown = np.array([120.0, 75.0, 40.0]) + rng.uniform(-25.0, 25.0, 3)
    for _ in range(int(rng.integers(*_LESIONS[lesion]))):
        reach = 0.72 * np.sqrt(rng.uniform())
        t = rng.uniform(0.0, 2.0 * np.pi)
        spot = np.array([[reach * np.cos(t), reach * aspect * np.sin(t)]])
        position = transform(spot, centre, size, angle)[0]
        if lesion == "speck":
            fill_polygon(draw, transform(star(), position, rng.uniform(0.7, 1.3), t), shade(brown, 0.6))
        elif lesion == "streak":
            fill_polygon(draw, transform(superellipse(aspect=0.25), position, rng.uniform(2.2, 3.5), angle), brown)
        elif lesion == "hole":
            fill_polygon(draw, transform(superellipse(), position, 2.8, t), shade(brown, 0.5))
            fill_polygon(draw, transform(superellipse(), position, 1.9, t), ground)
        elif lesion == "cloud":
            for offset in rng.normal(0.0, 2.0, (6, 2)):
                white = np.full(3, rng.uniform(205.0, 240.0))
                fill_polygon(draw, transform(superellipse(), position + offset, rng.uniform(1.0, 2.4), t), white)
        elif lesion == "target":
            radius = rng.uniform(3.2, 5.0)
            for share, gain in ((1.0, 1.5), (0.8, 0.6), (0.58, 1.3), (0.36, 0.6), (0.16, 1.3)):
                fill_polygon(draw, transform(superellipse(), position, radius * share, t), shade(brown, gain))
        else:
            rot = shade(brown, 0.6)
            for offset in rng.normal(0.0, 1.6, (4, 2)):
                patch = superellipse(waves=int(rng.integers(2, 5)), depth=0.2)
                fill_polygon(draw, transform(patch, position + offset, rng.uniform(2.0, 4.0), t), rot)
