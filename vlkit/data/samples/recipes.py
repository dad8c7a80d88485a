"""The sample recipes: a real retrieval task that a tiny model learns in a minute or two.

A recipe is one combination of six visible attributes: form, flavour, kind of garnish, number of garnishes, plate and
tablecloth. No two recipes share a combination, so a held-out recipe is an unseen combination of seen values. Each of
its one to three images is drawn anew, and each of its two texts names all six attributes, in varied words.

Everything that the texts do not name varies from image to image: position, size, rotation, light, noise, colour of the
cloth, cutlery, crumbs. The cloth, nearly half of an image, has a random colour, so comparing colours finds few matches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

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

T = TypeVar("T")

_RECIPE_COUNT = 1200

# Attribute value -> its wordings (one is drawn anew for each text) and the values to draw it with.
_FORMS = {  # wordings, basic ingredients
    "tart": (("tart", "flan"), ("plain flour", "butter")),
    "turnover": (("turnover", "pasty"), ("puff pastry", "milk")),
    "loaf": (("loaf", "terrine"), ("strong flour", "yeast")),
    "ring": (("ring cake", "savarin"), ("self-raising flour", "eggs")),
}
_FLAVOURS = {  # colour of the filling
    "tomato": (205, 55, 40),
    "pumpkin": (238, 135, 40),
    "lemon": (246, 216, 90),
    "spinach": (112, 160, 70),
    "blueberry": (104, 80, 160),
    "chocolate": (104, 64, 44),
}
_GARNISHES = {  # singular, plural, colour
    "leaf": ("mint leaf", "mint leaves", (60, 150, 60)),
    "cherry": ("cherry", "cherries", (190, 25, 50)),
    "star": ("pastry star", "pastry stars", (250, 195, 70)),
    "stick": ("liquorice stick", "liquorice sticks", (52, 40, 44)),
}
_COUNTS = {
    1: ("one", "a single"),
    3: ("three", "a trio of"),
    5: ("five", "a ring of five"),
}
_PLATES = {  # wordings, colour of the well and the edge; the rim is cream on all plates
    "white": (("white", "ivory"), (246, 244, 236)),
    "blue": (("blue", "cobalt"), (70, 120, 200)),
    "pink": (("pink", "rose"), (244, 160, 190)),
    "black": (("black", "slate"), (48, 48, 54)),
}
_CLOTHS = {
    "plain": ("plain", "unpatterned"),
    "striped": ("striped", "banded"),
    "dotted": ("dotted", "polka-dot"),
}
_TITLES = (
    "{dish} with {garnish} on {plate} over {cloth}",
    "{dish}, {garnish}, {plate}, {cloth}",
    "{dish} and {garnish}, served on {plate} and {cloth}",
    "our {dish} with {garnish} ({plate}, {cloth})",
)
_DESCRIPTIONS = (
    "A {mood} {dish} with {garnish}. Serve it on {plate} over {cloth}.",
    "Lay {cloth}, take {plate}, add the {dish} and garnish with {garnish}.",
    "This {mood} {dish} comes on {plate} with {garnish}; {cloth} lies underneath.",
    "On {cloth} stands {plate} with {garnish} around a {mood} {dish}.",
)
_MOODS = ("simple", "homely", "generous", "festive", "quick")

_CREAM = np.array([247.0, 241.0, 228.0])  # rim of the plates
_CRUST = np.array([205.0, 155.0, 95.0])
_SHADOW = np.array([70.0, 70.0, 70.0])


@dataclass(frozen=True)
class Recipe:
    """One combination of attribute values, each a key of the table of its attribute."""

    form: str
    flavour: str
    garnish: str
    count: int
    plate: str
    cloth: str


def choose(rng: Generator, options: tuple[T, ...]) -> T:
    """Choose one of the options, each equally likely."""
    return options[int(rng.integers(len(options)))]


def write_recipes(out: Path, seed: int) -> dict[str, int]:
    """Write recipes.jsonl and images/."""
    (out / "images").mkdir()
    image_count = 0
    with (out / "recipes.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
        for i, recipe in enumerate(choose_recipes(seed, _RECIPE_COUNT)):
            rng = item_rng(seed, 1, i)
            images = [f"images/{i:05d}_{k}.jpg" for k in range(int(rng.integers(1, 4)))]
            title, description = _texts(recipe, rng)
            record = {
                "recipe_id": f"r{i:05d}",
                "title": title,
                "description": description,
                "ingredients": _ingredients(recipe),
                "images": images,
            }
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            for k, name in enumerate(images):
                save_jpeg(draw_recipe(recipe, item_rng(seed, 2, i, k)), out / name)
            image_count += len(images)
    return {"recipes": _RECIPE_COUNT, "pictures": image_count}


def choose_recipes(seed: int, count: int) -> list[Recipe]:
    """Draw `count` distinct combinations of attribute values."""
    combinations = list(product(_FORMS, _FLAVOURS, _GARNISHES, _COUNTS, _PLATES, _CLOTHS))
    chosen = item_rng(seed, 0).choice(len(combinations), size=count, replace=False)
    return [Recipe(*combinations[index]) for index in chosen]


def _ingredients(recipe: Recipe) -> list[str]:
    """Return the ingredients of a recipe, the flavour first."""
    return [recipe.flavour, *_FORMS[recipe.form][1], _GARNISHES[recipe.garnish][1]]


def _texts(recipe: Recipe, rng: Generator) -> tuple[str, str]:
    """Return title and description; each names all attributes, so no other recipe can share it."""
    title = choose(rng, _TITLES).format(**_wording(recipe, rng))
    description = choose(rng, _DESCRIPTIONS).format(**_wording(recipe, rng), mood=choose(rng, _MOODS))
    return title[0].upper() + title[1:], description


def _wording(recipe: Recipe, rng: Generator) -> dict[str, str]:
    """Draw wordings of the attribute values for one text."""
    plate, cloth = choose(rng, _PLATES[recipe.plate][0]), choose(rng, _CLOTHS[recipe.cloth])
    garnish = _GARNISHES[recipe.garnish][0 if recipe.count == 1 else 1]
    return {
        "dish": f"{recipe.flavour} {choose(rng, _FORMS[recipe.form][0])}",
        "garnish": f"{choose(rng, _COUNTS[recipe.count])} {garnish}",
        "plate": f"{_article(plate)} {plate} {choose(rng, ('plate', 'platter'))}",
        "cloth": f"{_article(cloth)} {cloth} {choose(rng, ('cloth', 'tablecloth'))}",
    }


def _article(word: str) -> str:
    """Return the indefinite article of a word."""
    return "an" if word[0] in "aeiou" else "a"


_DISC = superellipse()
_STAR = star()
_OUTLINES = {
    "tart": superellipse(waves=8, depth=0.12),
    "turnover": half_moon(),
    "loaf": 1.1 * superellipse(power=6, aspect=0.45),
    "ring": _DISC,
    "leaf": 1.35 * superellipse(power=1.5, aspect=0.6),
    "cherry": _DISC,
    "star": _STAR,
    "stick": 1.4 * superellipse(power=8, aspect=0.35),
}


def _draw_cloth(cloth: str, rng: Generator) -> Image.Image:
    """Return a canvas covered by a tablecloth: random colour, tilt, period and phase of its pattern."""
    side = SIDE * ZOOM
    along = np.arange(side) / ZOOM
    tilt, period = rng.uniform(-0.2, 0.2), rng.uniform(8.0, 9.0)
    across, down = along[None, :] / period, along[:, None] / period
    u = (across * np.cos(tilt) + down * np.sin(tilt) + rng.uniform()) % 1.0
    v = (down * np.cos(tilt) - across * np.sin(tilt) + rng.uniform()) % 1.0
    if cloth == "striped":
        printed = u < 0.4
    elif cloth == "dotted":
        printed = (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.27**2
    else:
        printed = np.zeros((side, side), dtype=np.bool_)
    colour = rng.uniform(60.0, 190.0, 3)
    pixels = np.where(printed[:, :, None], shade(colour, 6.0), colour)
    return Image.fromarray(pixels.astype(np.uint8))


def _draw_spoon(draw: ImageDraw.ImageDraw, rng: Generator) -> None:
    """Draw a spoon or, with a narrow bowl, a knife, somewhere beside the plate."""
    steel = np.full(3, rng.uniform(150.0, 225.0))
    angle, towards = rng.uniform(0.0, 2.0 * np.pi, 2)
    middle = SIDE / 2 + 29.0 * np.array([np.cos(towards), np.sin(towards)])
    fill_polygon(draw, transform(superellipse(power=6, aspect=0.07), middle, 15.0, angle), steel)
    bowl = middle + 13.0 * np.array([np.cos(angle), np.sin(angle)])
    fill_polygon(draw, transform(superellipse(aspect=rng.uniform(0.3, 0.7)), bowl, 5.0, angle), steel)


def _garnish_spots(count: int, rng: Generator) -> Array:
    """Return the centres [count, 2] of the garnish on the rim of a plate of radius 1, the first on top."""
    t = 2.0 * np.pi * np.arange(count) / count - np.pi / 2.0
    spots = 0.78 * np.stack([np.cos(t), np.sin(t)], axis=1)
    return np.asarray(spots + rng.uniform(-0.03, 0.03, spots.shape))


def draw_recipe(recipe: Recipe, rng: Generator) -> Array:
    """Draw a recipe, pixels [H, W, 3]; everything but its six attributes is random."""
    canvas = _draw_cloth(recipe.cloth, rng)
    draw = ImageDraw.Draw(canvas)
    draw_clutter(draw, rng)
    if rng.uniform() < 0.6:
        _draw_spoon(draw, rng)
    centre, size = SIDE / 2 + rng.uniform(-2.0, 2.0, 2), rng.uniform(25.0, 28.5)

    china = np.array(_PLATES[recipe.plate][1]) + rng.uniform(-10.0, 10.0, 3)
    fill_polygon(draw, transform(_DISC, centre + 1.2, size, 0.0), _SHADOW)
    for share, colour in ((1.0, china), (0.94, _CREAM), (0.62, shade(china, 0.85)), (0.6, china)):
        fill_polygon(draw, transform(_DISC, centre, size * share, 0.0), colour)

    outline, angle = _OUTLINES[recipe.form], rng.uniform(-0.12, 0.12)
    radius = size * rng.uniform(0.56, 0.6)
    filling = np.array(_FLAVOURS[recipe.flavour]) + rng.uniform(-10.0, 10.0, 3)
    fill_polygon(draw, transform(outline, centre + 0.8, radius, angle), shade(china, 0.6))
    fill_polygon(draw, transform(outline, centre, radius, angle), _CRUST)
    fill_polygon(draw, transform(outline, centre, radius * 0.82, angle), filling)
    fill_polygon(draw, transform(outline, centre - 0.5, radius * 0.66, angle), shade(filling, 1.12))
    if recipe.form == "ring":
        fill_polygon(draw, transform(_DISC, centre, radius * 0.5, angle), _CRUST)
        fill_polygon(draw, transform(_DISC, centre, radius * 0.4, angle), china)

    shape, colour = _OUTLINES[recipe.garnish], np.array(_GARNISHES[recipe.garnish][2])
    for spot in transform(_garnish_spots(recipe.count, rng), centre, size, angle):
        garnish_angle, tone = rng.uniform(0.0, 2.0 * np.pi), shade(colour, rng.uniform(0.9, 1.1))
        fill_polygon(draw, transform(shape, spot + 0.3, size * 0.23, garnish_angle), shade(colour, 0.35))
        fill_polygon(draw, transform(shape, spot, size * 0.2, garnish_angle), tone)
        fill_polygon(draw, transform(shape, spot - 0.4, size * 0.08, garnish_angle), shade(tone, 1.8))
    return photograph(canvas, rng)
