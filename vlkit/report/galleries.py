"""Examples on the page: the best, worst, most improved and most regressed queries, and the best and worst captions."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlkit.data.images import decode
from vlkit.data.pairs import Pairs
from vlkit.data.splits import hash_order
from vlkit.errors import VlkitError
from vlkit.evaluation.formatting import format_direction
from vlkit.metrics import DIRECTIONS, SELECTION, headline_of
from vlkit.report.load_run import LoadedRun

THUMBNAIL_SIDE, JPEG_QUALITY = 160, 80


@dataclass(frozen=True)
class Item:
    """An image or a text in a gallery.

    Attributes:
        text: the text; for an image, one of its texts, as alternative text.
        thumbnail: data URI of an image; None: it is a text, or the image cannot be read.
        missing: why there is no thumbnail.
        hit: whether it is a right answer; None: it is the query.
    """

    text: str
    thumbnail: str | None = None
    missing: str | None = None
    hit: bool | None = None


@dataclass(frozen=True)
class RankedItems:
    """The items that a model ranks first for a query, and the rank of its first right one."""

    model_name: str
    rank: float
    items: list[Item]


@dataclass(frozen=True)
class QueryExample:
    """A query with the answers of both models."""

    query: Item
    answers: list[RankedItems]


@dataclass(frozen=True)
class Gallery:
    """Query examples of one kind."""

    title: str
    direction: str
    examples: list[QueryExample]


@dataclass(frozen=True)
class CaptionExample:
    """An image with its caption and the captions that people wrote."""

    image: Item
    caption: str
    references: list[str]
    cider: float


@dataclass(frozen=True)
class CaptionExamples:
    """Captions of one kind: worst or best."""

    title: str
    examples: list[CaptionExample]


class ItemLookup:
    """Find the images and texts of a prepared folder by their ids."""

    def __init__(self, pairs: Pairs) -> None:
        frame = pairs.frame
        images = frame.drop_duplicates("image_id")
        self.pairs, self.images = pairs, images
        self.row_of_image = dict(zip(images["image_id"], range(len(images)), strict=True))
        self.text_of_image = dict(zip(images["image_id"], images["text"], strict=True))
        self.text = dict(zip(frame["text_id"], frame["text"], strict=True))
        self.thumbnail = cache(self._make_thumbnail)

    def query_example(self, row: pd.Series[Any], direction: str) -> QueryExample:
        """Return a row of queries.parquet with its items."""
        query, answer = ("text", "image") if direction == "text_to_image" else ("image", "text")
        answers = [
            RankedItems(
                model_name,
                float(row[f"{prefix}rank"]),
                [
                    self.item(answer, key, bool(hit))
                    for key, hit in zip(row[f"{prefix}top5"], row[f"{prefix}top5_hits"], strict=True)
                ],
            )
            for prefix, model_name in (("baseline_", "untouched"), ("", "tuned"))
            if f"{prefix}rank" in row
        ]
        return QueryExample(self.item(query, row["query_id"]), answers)

    def item(self, kind: str, key: str, hit: bool | None = None) -> Item:
        """Return an image or a text by its id."""
        if kind == "text":
            return Item(self.text.get(key, "(this text is no longer in the folder)"), hit=hit)
        if key not in self.row_of_image:
            return Item("", missing="this image is no longer in the folder", hit=hit)
        thumbnail, missing = self.thumbnail(key)
        return Item(self.text_of_image[key], thumbnail, missing, hit)

    def _make_thumbnail(self, key: str) -> tuple[str | None, str | None]:
        """Return the thumbnail of an image, or why there is none."""
        try:
            (path,) = self.pairs.image_paths(self.images.iloc[[self.row_of_image[key]]])
            return encode_thumbnail(path), None
        except VlkitError as error:
            return None, error.message


def encode_thumbnail(path: Path) -> str:
    """Return a small JPEG as a data URI.

    Raises:
        DataError: the file is gone or does not decode.
    """
    image, content = decode.load_rgb(path, max_side=THUMBNAIL_SIDE), io.BytesIO()
    image.save(content, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def query_galleries(run: LoadedRun, count: int) -> Iterator[Gallery]:
    """Return the galleries of a run, `count` queries each; none where the queries or the data are missing."""
    queries, pairs = run.queries, run.pairs
    if queries is None or pairs is None:
        return
    lookup = ItemLookup(pairs)
    for direction in DIRECTIONS:
        rows = queries[queries["direction"] == direction].reset_index(drop=True)
        for title, chosen in _choose_queries(rows, count):
            examples = [lookup.query_example(row, direction) for _, row in chosen.iterrows()]
            yield Gallery(title, format_direction(direction), examples)


def _choose_queries(rows: pd.DataFrame, count: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """Return titles with rows of queries: at most one per unit, ties in an order drawn by hash."""
    order = np.argsort([hash_order(0, str(key)) for key in rows["query_id"]])
    rows = rows.iloc[order]

    def first(candidates: pd.DataFrame, key: Callable[[pd.DataFrame], Any]) -> pd.DataFrame:
        ranked = candidates.iloc[np.argsort(key(candidates), kind="stable")]
        return ranked.drop_duplicates("unit").head(count)

    yield "best", first(rows, lambda r: r["rank"])
    yield "worst", first(rows, lambda r: -r["rank"])
    if f"baseline_{SELECTION[-1]}" in rows:
        now, before = SELECTION[-1], f"baseline_{SELECTION[-1]}"
        better, worse = rows[rows[now] > rows[before]], rows[rows[now] < rows[before]]
        yield "most improved", first(better, lambda r: r[before] - r[now])
        yield "most regressed", first(worse, lambda r: r[now] - r[before])


def caption_galleries(run: LoadedRun) -> Iterator[CaptionExamples]:
    """Return the worst and the best captions of results.json; none for a run that writes no captions."""
    stored = (run.results.examples if run.results else None) or {}
    if not stored:
        return
    lookup = ItemLookup(run.pairs) if run.pairs else None
    for title in ("worst", "best"):
        yield CaptionExamples(title, [_caption_example(example, lookup) for example in stored.get(title, [])])


def _caption_example(example: dict[str, Any], lookup: ItemLookup | None) -> CaptionExample:
    image = lookup.item("image", str(example["image"])) if lookup else Item("", missing="the images are not available")
    cider = float(example[headline_of("captions")])
    return CaptionExample(image, example["caption"], list(example["references"]), cider)
