"""The sample Persian dishes: one folder a dish with images and a JSON file, which holds a passage in Persian.

The images are those of the sample recipes; the passage names what they show: kind, flavour, garnish and its number,
plate and cloth. As in real folders the JSON is an object, a list or JSON lines; it names one image, or the folder;
images of ingredients lie beside those of the dish; some passages have Arabic letters for the Persian ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from vlkit.data.samples.drawing import SIDE, ZOOM, draw_clutter, item_rng, photograph, save_jpeg
from vlkit.data.samples.recipes import Recipe, choose, choose_recipes, draw_recipe

_DISH_COUNT = 240
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
    """Write one folder a dish."""
    image_count = 0
    for i, recipe in enumerate(choose_recipes(seed, _DISH_COUNT)):
        rng = item_rng(seed, 5, i)
        name = f"{_FORMS[recipe.form]} {_FLAVOURS[recipe.flavour]}"
        folder = out / f"{i + 1:03d} {name}"
        folder.mkdir()
        images = [f"{k + 1}.jpg" for k in range(int(rng.integers(1, 4)))]
        for k, image in enumerate(images):
            save_jpeg(draw_recipe(recipe, item_rng(seed, 6, i, k)), folder / image)
        image_count += len(images)
        records = _records(recipe, name, folder.name, images, rng)
        if len(records) == len(images) and i % 4 == 0:
            # The dish is the image that image_path names; this one lies beside it.
            save_jpeg(_draw_ingredient(item_rng(seed, 7, i)), folder / "ingredients.jpg")
        _write_json(folder, records, i)
    return {"dishes": _DISH_COUNT, "pictures": image_count}


def _records(recipe: Recipe, name: str, folder: str, images: list[str], rng: Generator) -> list[dict[str, Any]]:
    """Return one record that names the folder, or one for each image."""
    passage = choose(rng, _PASSAGES).format(
        name=name,
        count=_COUNTS[recipe.count],
        garnish=_GARNISHES[recipe.garnish],
        plate=_PLATES[recipe.plate],
        cloth=_CLOTHS[recipe.cloth],
    )
    if rng.uniform() < 0.2:
        passage = passage.replace("ی", "ي").replace("ک", "ك")
    texts = {"title": name, "response": passage}
    if rng.uniform() < 0.5:
        return [{**texts, "folder_path": folder}]
    return [{**texts, "image_path": f"{folder}/{image}"} for image in images]


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
    return photograph(canvas, rng)
