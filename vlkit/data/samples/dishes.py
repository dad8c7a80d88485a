"""The sample Persian dishes: a folder a dish with pictures and one JSON, its passage in Persian.

The pictures are those of the sample recipes; the passage names what is to be seen: kind, flavour, garnish and its
number, plate and cloth. As in real folders the JSON is an object, a list or JSON lines; it names one picture, or the
folder; pictures of ingredients lie beside those of the dish; some passages have Arabic letters for the Persian ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from vlkit.data.samples.drawing import SIDE, ZOOM, draw_clutter, generator_of, lit, save
from vlkit.data.samples.recipes import Recipe, choose_recipes, draw_recipe, pick

_N_DISHES = 240
_FORMS = {"tart": "تارت", "turnover": "سمبوسه", "loaf": "کیک قالبی", "ring": "کیک حلقه‌ای"}
_FLAVOURS = {
    "tomato": "گوجه‌فرنگی",
    "pumpkin": "کدو حلوایی",
    "lemon": "لیموترش",
    "spinach": "اسفناج",
    "blueberry": "زغال‌اخته",
    "chocolate": "شکلات",
}
_GARNISHES = {"leaf": "برگ نعنا", "cherry": "گیلاس", "star": "ستاره‌ی خمیری", "stick": "شاخه‌ی شیرین‌بیان"}
_COUNTS = {1: "یک", 3: "سه", 5: "پنج"}
_PLATES = {"white": "سفید", "blue": "آبی", "pink": "صورتی", "black": "سیاه"}
_CLOTHS = {"plain": "ساده", "striped": "راه‌راه", "dotted": "خال‌دار"}
_PASSAGES = (
    "{name} با {count} {garnish} تزیین می‌شود و آن را روی بشقاب {plate} و سفره‌ی {cloth} می‌گذارند.",
    "برای پذیرایی، {name} را در بشقاب {plate} روی سفره‌ی {cloth} بچینید و {count} {garnish} کنارش بگذارید.",
    "این {name} که {count} {garnish} دارد، در بشقابی {plate} و بر سفره‌ای {cloth} آورده می‌شود.",
)


def write_dishes(out: Path, seed: int) -> dict[str, int]:
    """Write a folder a dish."""
    n_pictures = 0
    for i, recipe in enumerate(choose_recipes(seed, _N_DISHES)):
        rng = generator_of(seed, 5, i)
        name = f"{_FORMS[recipe.form]} {_FLAVOURS[recipe.flavour]}"
        folder = out / f"{i + 1:03d} {name}"
        folder.mkdir()
        pictures = [f"{k + 1}.jpg" for k in range(int(rng.integers(1, 4)))]
        for k, picture in enumerate(pictures):
            save(draw_recipe(recipe, generator_of(seed, 6, i, k)), folder / picture)
        n_pictures += len(pictures)
        records = _records(recipe, name, folder.name, pictures, rng)
        if len(records) == len(pictures) and i % 4 == 0:
            # Only what image_path names is the dish; this lies beside it.
            save(_draw_ingredient(generator_of(seed, 7, i)), folder / "ingredients.jpg")
        _write_json(folder, records, i)
    return {"dishes": _N_DISHES, "pictures": n_pictures}


def _records(recipe: Recipe, name: str, folder: str, pictures: list[str], rng: Generator) -> list[dict[str, Any]]:
    """One record that names the folder, or one for each picture."""
    passage = pick(rng, _PASSAGES).format(
        name=name,
        count=_COUNTS[recipe.count],
        garnish=_GARNISHES[recipe.garnish],
        plate=_PLATES[recipe.plate],
        cloth=_CLOTHS[recipe.cloth],
    )
    if rng.uniform() < 0.2:
        passage = passage.replace("ی", "ي").replace("ک", "ك")
    said = {"title": name, "response": passage}
    if rng.uniform() < 0.5:
        return [{**said, "folder_path": folder}]
    return [{**said, "image_path": f"{folder}/{picture}"} for picture in pictures]


def _write_json(folder: Path, records: list[dict[str, Any]], number: int) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    if len(records) == 1 and number % 2 == 0:
        text = json.dumps(records[0], ensure_ascii=False, indent=1)
    else:
        text = "\n".join(lines) if number % 3 == 0 else f"[{', '.join(lines)}]"
    (folder / "info.json").write_text(text + "\n", encoding="utf-8")


def _draw_ingredient(rng: Generator) -> np.ndarray:
    side = SIDE * ZOOM
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in rng.uniform(150.0, 240.0, 3)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(4):
        draw_clutter(draw, rng)
    return lit(canvas, rng)
