"""One picture of many: originals with their variants beside them and a caption under each, for a person to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

SIDE, MARGIN = 200, 12  # pixels
LETTERS, LINE = 32, 15  # of a caption: letters a line, pixels a line
CAPTION_LINES, NOTE_LINES = 3, 4


class Cell(NamedTuple):
    """A picture, the caption under it, and in grey what else there is to say."""

    picture: Image.Image
    caption: str
    note: str


def write_contact_sheet(path: Path, rows: Sequence[Sequence[Cell]]) -> None:
    """Write a PNG: a row of cells for each row."""
    from PIL import Image, ImageDraw, ImageOps

    across, down = SIDE + MARGIN, SIDE + MARGIN + (CAPTION_LINES + NOTE_LINES) * LINE
    sheet = Image.new("RGB", (max(map(len, rows)) * across + MARGIN, len(rows) * down + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            left, top = MARGIN + j * across, MARGIN + i * down
            sheet.paste(ImageOps.pad(cell.picture, (SIDE, SIDE), color="#eeeeee"), (left, top))
            lines = [(line, "black") for line in _wrapped(cell.caption, CAPTION_LINES)]
            lines += [(line, "#777777") for line in _wrapped(cell.note, NOTE_LINES)]
            for number, (line, colour) in enumerate(lines):
                draw.text((left + SIDE / 2, top + SIDE + 3 + number * LINE), line, colour, font, anchor="ma")
    sheet.save(path, "PNG")


def _wrapped(text: str, lines: int) -> list[str]:
    return textwrap.wrap(text, LETTERS, max_lines=lines, placeholder=" ...")


def _font():  # type: ignore[no-untyped-def]
    """DejaVu Sans, which has Persian and most other letters, as matplotlib brings it along."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 11)
