"""Captions worth reading: the worst and the best of a measured captioner, with their pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlkit.report.galleries import Item, Shelf
from vlkit.report.load_run import Collected


@dataclass(frozen=True)
class Saying:
    """A picture, what was said of it, and what people say."""

    picture: Item
    caption: str
    references: list[str]
    cider: float


@dataclass(frozen=True)
class Sayings:
    """Some captions of one kind: worst or best."""

    title: str
    said: list[Saying]


def sayings(collected: Collected) -> Iterator[Sayings]:
    """The worst and the best captions of results.json; none of a run that writes no captions."""
    examples = collected.results.get("examples") or {}
    if not examples:
        return
    shelf = Shelf(collected.pairs) if collected.pairs else None
    for title in ("worst", "best"):
        yield Sayings(title, [_saying(each, shelf) for each in examples.get(title, [])])


def _saying(example: dict[str, Any], shelf: Shelf | None) -> Saying:
    key = str(example["image"])
    item = shelf.item("image", key, None) if shelf else Item("", missing="the pictures are not to be had")
    return Saying(item, example["caption"], list(example["references"]), float(example["cider"]))
