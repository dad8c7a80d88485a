"""The sample skin: `labels.csv` and images/, conditions whose lesions differ in form, colour and arrangement.

As in real collections the classes are uneven (two of them under thirty), one image in ten shows two conditions, one in
three has a description, and a patient has several images.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from vlkit.data.samples.drawing import (
    SIDE,
    ZOOM,
    Array,
    fill_polygon,
    item_rng,
    photograph,
    save_jpeg,
    shade,
    star,
    superellipse,
    transform,
)

# Condition -> (number of images, its description).
_CONDITIONS = {
    "psoriasis": (90, "sharply bordered plaques with silvery scales"),
    "melanoma": (70, "a dark irregular patch of several shades"),
    "urticaria": (64, "pale raised weals on reddened skin"),
    "acne": (56, "many small inflamed papules"),
    "tinea corporis": (48, "a ring with a red scaly edge and a clear centre"),
    "vitiligo": (22, "milky white patches without pigment"),
    "herpes zoster": (12, "a band of grouped blisters"),
}
_SKINS = ((244, 214, 190), (224, 184, 150), (190, 140, 104), (140, 96, 66), (96, 64, 46))
_SITES = ("forearm", "trunk", "leg", "face", "scalp")


def write_skin(out: Path, seed: int) -> dict[str, int]:
    """Write labels.csv (image, condition, description, patient, site) and images/."""
    (out / "images").mkdir()
    names = list(_CONDITIONS)
    rows = []
    for c, (condition, (count, words)) in enumerate(_CONDITIONS.items()):
        for k in range(count):
            rng = item_rng(seed, 4, c, k)
            conditions = [condition]
            if rng.uniform() < 0.1:
                conditions.append(names[int(rng.integers(len(names)))])
            site = _SITES[int(rng.integers(len(_SITES)))]
            name = f"images/{c}{k:04d}.jpg"
            save_jpeg(_draw_skin(dict.fromkeys(conditions), rng), out / name)
            description = f"Photograph of the {site}: {words}, seen in a patient of {int(rng.integers(18, 90))}."
            rows.append(
                (
                    name,
                    "|".join(dict.fromkeys(conditions)),
                    description if rng.uniform() < 0.34 else "",
                    f"p{c}{k // 2:03d}",
                    site,
                )
            )
    with (out / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "condition", "description", "patient", "site"))
        writer.writerows(rows)
    return {"conditions": len(_CONDITIONS), "pictures": len(rows)}


def _draw_skin(conditions: dict[str, None], rng: Generator) -> Array:
    """Draw skin with the lesions of its conditions: pixels [H, W, 3]."""
    skin = np.array(_SKINS[int(rng.integers(len(_SKINS)))]) + rng.uniform(-10.0, 10.0, 3)
    side = SIDE * ZOOM
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in np.clip(skin, 0, 255)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(10, 24))):
        hair = transform(
            superellipse(aspect=0.03), rng.uniform(0.0, SIDE, 2), rng.uniform(3.0, 7.0), rng.uniform(0.0, 6.0)
        )
        fill_polygon(draw, hair, shade(skin, 0.55))
    for condition in conditions:
        _draw_lesions(draw, condition, skin, rng)
    return photograph(canvas, rng)


def _draw_lesions(draw: ImageDraw.ImageDraw, condition: str, skin: Array, rng: Generator) -> None:
    centre = rng.uniform(20.0, SIDE - 20.0, 2)
    red = skin * np.array([0.98, 0.55, 0.5])

    def blob(position: Array, radius: float, colour: Array, depth: float = 0.15) -> None:
        outline = superellipse(waves=int(rng.integers(3, 7)), depth=depth)
        fill_polygon(draw, transform(outline, position, radius, rng.uniform(0.0, 6.0)), colour)

    def near_centre(spread: float) -> Array:
        return centre + rng.normal(0.0, spread, 2)

    if condition == "psoriasis":
        for _ in range(int(rng.integers(2, 5))):
            position, radius = near_centre(12.0), rng.uniform(5.0, 9.0)
            blob(position, radius, red)
            for _ in range(9):
                fill_polygon(
                    draw, transform(star(), position + rng.normal(0.0, radius / 3, 2), 1.3, 0.0), np.full(3, 232.0)
                )
    elif condition == "melanoma":
        for gain in (0.5, 0.35, 0.2):
            blob(
                near_centre(2.5),
                rng.uniform(5.0, 9.0) * (0.6 + gain),
                np.array([150.0, 90.0, 70.0]) * gain * 1.6,
                0.3,
            )
    elif condition == "urticaria":
        for _ in range(int(rng.integers(4, 8))):
            position, radius = near_centre(14.0), rng.uniform(3.0, 6.0)
            blob(position, radius * 1.5, red)
            blob(position, radius, shade(skin, 1.5))
    elif condition == "acne":
        for _ in range(int(rng.integers(16, 30))):
            position = near_centre(15.0)
            blob(position, rng.uniform(1.0, 1.9), red)
            blob(position, 0.5, np.array([250.0, 240.0, 190.0]))
    elif condition == "tinea corporis":
        radius = rng.uniform(9.0, 14.0)
        blob(centre, radius, red, 0.06)
        blob(centre, radius * 0.72, skin, 0.06)
    elif condition == "vitiligo":
        for _ in range(int(rng.integers(2, 5))):
            blob(near_centre(12.0), rng.uniform(5.0, 10.0), np.full(3, 248.0), 0.25)
    else:
        towards = rng.uniform(0.0, 2.0 * np.pi)
        for step in np.linspace(-22.0, 22.0, 12):
            position = centre + step * np.array([np.cos(towards), np.sin(towards)]) + rng.normal(0.0, 2.0, 2)
            blob(position, 2.6, red)
            blob(position, 1.5, np.array([250.0, 235.0, 160.0]))
