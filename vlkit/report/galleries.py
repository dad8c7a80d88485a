"""Queries worth looking at: best, worst, most improved and most regressed, with what either model ranks first."""

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
from vlkit.evaluation.summary import format_direction
from vlkit.metrics import DIRECTIONS
from vlkit.report.load_run import LoadedRun

SIDE, QUALITY = 160, 80


@dataclass(frozen=True)
class Item:
    """A picture or a text in a gallery.

    Attributes:
        text: the text; of a picture, one of its texts, for whoever cannot see it.
        picture: its thumbnail as a data URI; None: it is a text, or the picture is not to be had.
        missing: why there is no thumbnail.
        hit: whether it is right; None: it is the query.
    """

    text: str
    picture: str | None = None
    missing: str | None = None
    hit: bool | None = None


@dataclass(frozen=True)
class RankedItems:
    """What a model ranks first for a query, and where its first right item stands."""

    who: str
    rank: float
    items: list[Item]


@dataclass(frozen=True)
class QueryExample:
    """A query with both models' answers."""

    query: Item
    answers: list[RankedItems]


@dataclass(frozen=True)
class Gallery:
    """Some queries of one kind."""

    title: str
    direction: str
    asked: list[QueryExample]


def galleries(collected: LoadedRun, count: int) -> Iterator[Gallery]:
    """The galleries of a run, `count` queries each."""
    queries, pairs = collected.queries, collected.pairs
    if queries is None or pairs is None:
        return
    shelf = ItemLookup(pairs)
    for direction in DIRECTIONS:
        rows = queries[queries["direction"] == direction].reset_index(drop=True)
        for title, chosen in _chosen(rows, count):
            yield Gallery(title, format_direction(direction), [shelf.asked(row, direction) for _, row in chosen.iterrows()])


def _chosen(rows: pd.DataFrame, count: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """The kinds, with their rows; equals in an order that is drawn, one of a unit."""
    order = np.argsort([hash_order(0, str(key)) for key in rows["query_id"]])
    rows = rows.iloc[order]

    def first(kept: pd.DataFrame, key: Callable[[pd.DataFrame], Any]) -> pd.DataFrame:
        ranked = kept.iloc[np.argsort(key(kept), kind="stable")]
        return ranked.drop_duplicates("unit").head(count)

    yield "best", first(rows, lambda r: r["rank"])
    yield "worst", first(rows, lambda r: -r["rank"])
    if "baseline_mrr" in rows:
        better, worse = rows[rows["mrr"] > rows["baseline_mrr"]], rows[rows["mrr"] < rows["baseline_mrr"]]
        yield "most improved", first(better, lambda r: r["baseline_mrr"] - r["mrr"])
        yield "most regressed", first(worse, lambda r: r["mrr"] - r["baseline_mrr"])


class ItemLookup:
    """The pictures and texts of a prepared folder, by their ids."""

    def __init__(self, pairs: Pairs) -> None:
        frame = pairs.frame
        pictures = frame.drop_duplicates("image_id")
        self.pairs = pairs
        self.row_of = dict(zip(pictures["image_id"], range(len(pictures)), strict=True))
        self.pictures = pictures
        self.caption = dict(zip(pictures["image_id"], pictures["text"], strict=True))
        self.text = dict(zip(frame["text_id"], frame["text"], strict=True))
        self.thumbnail = cache(self._thumbnail)

    def asked(self, row: pd.Series[Any], direction: str) -> QueryExample:
        """A row of queries.parquet, as the page shows it."""
        kind, other = ("text", "image") if direction == "text_to_image" else ("image", "text")
        answers = [
            RankedItems(
                who,
                float(row[f"{prefix}rank"]),
                [
                    self.item(other, key, bool(hit))
                    for key, hit in zip(row[f"{prefix}top5"], row[f"{prefix}top5_hits"], strict=True)
                ],
            )
            for prefix, who in (("baseline_", "untouched"), ("", "tuned"))
            if f"{prefix}rank" in row
        ]
        return QueryExample(self.item(kind, row["query_id"], None), answers)

    def item(self, kind: str, key: str, hit: bool | None) -> Item:
        """One picture or text."""
        if kind == "text":
            return Item(self.text.get(key, "(a text that the folder no longer has)"), hit=hit)
        if key not in self.row_of:
            return Item("", missing="the folder no longer has this picture", hit=hit)
        picture, missing = self.thumbnail(key)
        return Item(self.caption[key], picture, missing, hit)

    def _thumbnail(self, key: str) -> tuple[str | None, str | None]:
        try:
            (path,) = self.pairs.image_paths(self.pictures.iloc[[self.row_of[key]]])
            return thumbnail(path), None
        except VlkitError as error:
            return None, error.message


def thumbnail(path: Path) -> str:
    """A small JPEG as a data URI.

    Raises:
        DataError: the file is gone or does not decode.
    """
    picture, packed = decode.load_rgb(path, max_side=SIDE), io.BytesIO()
    picture.save(packed, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode()
