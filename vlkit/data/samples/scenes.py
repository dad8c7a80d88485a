"""The sample scenes in COCO's layout: images/<split>/ and annotations/captions_<split>.json, five captions an image.

A scene has one coloured shape at one of five places on a textured ground. The captions say colour, shape and place in
varied words; size, rotation, ground, light and clutter vary.
"""

from __future__ import annotations

import json
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
    half_moon,
    item_rng,
    photograph,
    save_jpeg,
    shade,
    star,
    superellipse,
    transform,
)

_SPLITS = {"train2017": 4000, "val2017": 300}
_COLOURS = {
    "red": (210, 40, 40),
    "green": (50, 160, 60),
    "blue": (50, 80, 210),
    "yellow": (240, 220, 60),
    "purple": (140, 60, 170),
    "orange": (240, 140, 40),
    "white": (246, 246, 246),
    "black": (26, 26, 30),
}
_SHAPES = {
    "circle": superellipse(),
    "square": superellipse(power=12),
    "star": 1.2 * star(),
    "diamond": 1.15 * superellipse(power=1),
    "half moon": 1.1 * half_moon(),
    "bar": 1.3 * superellipse(power=10, aspect=0.3),
}
_PLACES = {
    "on the left": (-15, 0),
    "on the right": (15, 0),
    "at the top": (0, -15),
    "at the bottom": (0, 15),
    "in the middle": (0, 0),
}
_CAPTIONS = (
    "a {colour} {shape} {place}",
    "a picture of a {colour} {shape} {place}",
    "{place} there is a {colour} {shape}",
    "a {colour} {shape} lies {place} of the picture",
    "one {shape}, {colour}, {place}",
    "a {shape} that is {colour} {place}",
)


def write_scenes(out: Path, seed: int) -> dict[str, int]:
    """Write both splits. No image is in both; combinations are shared, as words are in COCO."""
    scenes = list(product(_COLOURS, _SHAPES, _PLACES))
    (out / "annotations").mkdir()
    image_id, caption_id, caption_count = 0, 0, 0
    for s, (split, count) in enumerate(_SPLITS.items()):
        (out / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for k in range(count):
            rng = item_rng(seed, 8, s, k)
            colour, shape, position = scenes[int(rng.integers(len(scenes)))]
            image_id += int(rng.integers(1, 600))
            name = f"{image_id:012d}.jpg"
            save_jpeg(_draw_scene(colour, shape, position, rng), out / "images" / split / name)
            images.append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE})
            for template in rng.permutation(len(_CAPTIONS))[:5]:
                caption_id += 1
                text = _CAPTIONS[template].format(colour=colour, shape=shape, place=position)
                annotations.append({"id": caption_id, "image_id": image_id, "caption": text[0].upper() + text[1:]})
        caption_count += len(annotations)
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        (out / "annotations" / f"captions_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return {"pictures": sum(_SPLITS.values()), "captions": caption_count}


def _draw_scene(colour: str, shape: str, position: str, rng: Generator) -> Array:
    """Draw a scene: pixels [H, W, 3]."""
    side = SIDE * ZOOM
    ground = rng.uniform(95.0, 175.0, 3)
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in ground))
    draw = ImageDraw.Draw(canvas)
    for _ in range(2):
        draw_clutter(draw, rng)
    centre = SIDE / 2 + np.array(_PLACES[position], float) + rng.uniform(-2.5, 2.5, 2)
    size, angle = rng.uniform(10.0, 14.0), rng.uniform(-0.35, 0.35)
    paint = np.array(_COLOURS[colour], float) + rng.uniform(-12.0, 12.0, 3)
    fill_polygon(draw, transform(_SHAPES[shape], centre + 1.0, size, angle), shade(ground, 0.6))
    fill_polygon(draw, transform(_SHAPES[shape], centre, size, angle), paint)
    fill_polygon(draw, transform(_SHAPES[shape], centre - 0.8, size * 0.7, angle), shade(np.clip(paint, 0, 255), 1.12))
    return photograph(canvas, rng)
