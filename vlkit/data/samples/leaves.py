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
    fill,
    generator_of,
    lit,
    place,
    rounded,
    save,
    shaded,
    star,
)

# Class folder -> (leaf, lesion, number of pictures).
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
    "apple": rounded(power=1.7, aspect=0.62),
    "corn": 1.2 * rounded(power=1.8, aspect=0.3),
    "grape": rounded(waves=5, depth=0.16),
    "squash": rounded(power=2.4, aspect=0.9, waves=3, depth=0.05),
    "tomato": rounded(power=1.6, aspect=0.7, waves=14, depth=0.07),
}
_LESIONS = {  # number of lesions on a leaf: at least, below
    "none": (0, 1),
    "speck": (18, 30),
    "streak": (10, 18),
    "hole": (5, 9),
    "cloud": (3, 6),
    "target": (3, 6),
    "blotch": (2, 5),
}


def write_leaves(out: Path, seed: int) -> dict[str, int]:
    """Write one folder of leaf pictures per class."""
    n_pictures = 0
    for c, (name, (leaf, lesion, size)) in enumerate(_CLASSES.items()):
        (out / name).mkdir()
        for k in range(size):
            pixels = _draw_leaf(leaf, lesion, generator_of(seed, 3, c, k))
            save(pixels, out / name / f"{k + 1:04d}.jpg")
        n_pictures += size
    return {"classes": len(_CLASSES), "pictures": n_pictures}


def _draw_leaf(leaf: str, lesion: str, rng: Generator) -> Array:
    """One picture of a leaf, pixels [H, W, 3], on a random ground."""
    ground = rng.uniform(70.0, 220.0, 3)
    side = SIDE * ZOOM
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in ground))
    draw = ImageDraw.Draw(canvas)
    draw_clutter(draw, rng)
    centre = SIDE / 2 + rng.uniform(-4.0, 4.0, 2)
    size, turn = rng.uniform(24.0, 30.0), rng.uniform(0.0, 2.0 * np.pi)
    green = np.array([85.0, 145.0, 60.0]) + rng.uniform(-25.0, 25.0, 3)
    outline = _LEAVES[leaf]
    fill(draw, place(outline, centre + 1.2, size, turn), shaded(ground, 0.55))
    fill(draw, place(outline, centre, size, turn), shaded(green, 0.8))
    fill(draw, place(outline, centre, size * 0.94, turn), green)
    aspect = float(np.abs(outline[:, 1]).max())
    vein = shaded(green, 1.4)
    midrib = np.array([[1.2, 0.0], [-0.9, 0.02], [-0.9, -0.02]])
    fill(draw, place(midrib, centre, size, turn), vein)
    for along, way in product((-0.4, 0.0, 0.4), (-1.0, 1.0)):
        rib = np.array([[along, -0.015], [along, 0.015], [along - 0.25, way * 0.6 * aspect]])
        fill(draw, place(rib, centre, size, turn), vein)
    _draw_lesions(draw, lesion, aspect, (centre, size, turn), ground, rng)
    return lit(canvas, rng)


def _draw_lesions(
    draw: ImageDraw.ImageDraw,
    lesion: str,
    aspect: float,
    frame: tuple[Array, float, float],
    ground: Array,
    rng: Generator,
) -> None:
    """Draw lesions of one form inside the ellipse of the given aspect; `frame` places the leaf.

    `ground` is the colour seen through holes in the leaf.
    """
    centre, size, turn = frame
    brown = np.array([120.0, 75.0, 40.0]) + rng.uniform(-25.0, 25.0, 3)
    for _ in range(int(rng.integers(*_LESIONS[lesion]))):
        reach = 0.72 * np.sqrt(rng.uniform())
        t = rng.uniform(0.0, 2.0 * np.pi)
        spot = np.array([[reach * np.cos(t), reach * aspect * np.sin(t)]])
        at = place(spot, centre, size, turn)[0]
        if lesion == "speck":
            fill(draw, place(star(), at, rng.uniform(0.7, 1.3), t), shaded(brown, 0.6))
        elif lesion == "streak":
            fill(draw, place(rounded(aspect=0.25), at, rng.uniform(2.2, 3.5), turn), brown)
        elif lesion == "hole":
            fill(draw, place(rounded(), at, 2.8, t), shaded(brown, 0.5))
            fill(draw, place(rounded(), at, 1.9, t), ground)
        elif lesion == "cloud":
            for offset in rng.normal(0.0, 2.0, (6, 2)):
                white = np.full(3, rng.uniform(205.0, 240.0))
                fill(draw, place(rounded(), at + offset, rng.uniform(1.0, 2.4), t), white)
        elif lesion == "target":
            radius = rng.uniform(3.2, 5.0)
            for share, gain in ((1.0, 1.5), (0.8, 0.6), (0.58, 1.3), (0.36, 0.6), (0.16, 1.3)):
                fill(draw, place(rounded(), at, radius * share, t), shaded(brown, gain))
        else:
            rot = shaded(brown, 0.6)
            for offset in rng.normal(0.0, 1.6, (4, 2)):
                patch = rounded(waves=int(rng.integers(2, 5)), depth=0.2)
                fill(draw, place(patch, at + offset, rng.uniform(2.0, 4.0), t), rot)
