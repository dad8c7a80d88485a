"""augment --preview: one sheet of originals with their variants beside them, before thousands are written."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlkit.config.data import AugmentConfig
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.augment.negatives import NegativeSampler
from vlkit.data.augment.text_variants import TextVariants
from vlkit.data.images import decode
from vlkit.data.splits import hash_order

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image, ImageFont

MIN_VARIANTS = 3  # variants of an image, enough to judge the ranges
SIDE, MARGIN = 200, 12  # pixels
LINE_LETTERS, LINE_HEIGHT = 32, 15  # of a caption: letters, pixels
CAPTION_LINES, NOTE_LINES = 3, 4


class Cell(NamedTuple):
    """An image, the caption under it, and a note in grey."""

    image: Image.Image
    caption: str
    note: str


def choose_preview_rows(training: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Return the first row of `count` images, in a seeded order."""
    unique = training.drop_duplicates("image_id")
    order = sorted(unique.index, key=lambda row: hash_order(seed, unique["image_id"][row]))
    return unique.loc[order[:count]].reset_index(drop=True)


def preview_cells(
    row: Mapping[str, Any],
    path: Path,
    config: AugmentConfig,
    augmenter: ImageAugmenter,
    text_variants: TextVariants,
    sampler: NegativeSampler,
) -> Iterator[Cell]:
    """Yield a training row's original, and each new row that it would get.

    Later epochs follow where --pictures asks for fewer variants than it takes to judge the ranges.
    """
    image_id, text_id = row["image_id"], row["text_id"]
    original = decode.load_rgb(path, max_side=config.max_side)
    yield Cell(original, row["text"], "the original")
    for epoch in range(max(MIN_VARIANTS, config.pictures)) if config.pictures else ():
        operations = ", ".join(
            f"{name.replace('_', ' ')} {amount:.2g}".removesuffix(" 0")
            for name, amount in augmenter.chosen_operations(epoch, image_id).items()
        )
        prefix = "" if epoch < config.pictures else f"(epoch {epoch}) "
        yield Cell(augmenter.load_image(path, epoch, image_id), row["text"], prefix + (operations or "unchanged"))
    for variant in text_variants.for_pair(row["pair_id"], text_id):
        yield Cell(original, variant, text_variants.by_text[text_id][variant])
    for negative in sampler.choose(row["pair_id"], image_id, text_id, config.negatives_per_positive):
        yield Cell(original, negative.text, "a negative")


def write_contact_sheet(path: Path, rows: Sequence[Sequence[Cell]]) -> None:
    """Write a PNG with a row of cells for each row."""
    from PIL import Image, ImageDraw, ImageOps

    width, height = SIDE + MARGIN, SIDE + MARGIN + (CAPTION_LINES + NOTE_LINES) * LINE_HEIGHT
    sheet = Image.new("RGB", (max(map(len, rows)) * width + MARGIN, len(rows) * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            left, top = MARGIN + j * width, MARGIN + i * height
            sheet.paste(ImageOps.pad(cell.image, (SIDE, SIDE), color="#eeeeee"), (left, top))
            lines = [(line, "black") for line in _wrap(cell.caption, CAPTION_LINES)]
            lines += [(line, "#777777") for line in _wrap(cell.note, NOTE_LINES)]
            for number, (line, colour) in enumerate(lines):
                draw.text((left + SIDE / 2, top + SIDE + 3 + number * LINE_HEIGHT), line, colour, font, anchor="ma")
    sheet.save(path, "PNG")


def _wrap(text: str, lines: int) -> list[str]:
    return textwrap.wrap(text, LINE_LETTERS, max_lines=lines, placeholder=" ...")


def _font() -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has Persian and most other letters, from matplotlib's files."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 11)
