"""Captions worth reading: the worst and the best of a measured captioner, with their pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlkit.report.galleries import Item, ItemLookup
from vlkit.report.load_run import LoadedRun


@dataclass(frozen=True)
class CaptionExample:
    """A picture, what was said of it, and what people say."""

    picture: Item
    caption: str
    references: list[str]
    cider: float


@dataclass(frozen=True)
class CaptionExamples:
    """Some captions of one kind: worst or best."""

    title: str
    said: list[CaptionExample]


def sayings(collected: LoadedRun) -> Iterator[CaptionExamples]:
    """The worst and the best captions of results.json; none of a run that writes no captions."""
    examples = collected.results.get("examples") or {}
    if not examples:
        return
    shelf = ItemLookup(collected.pairs) if collected.pairs else None
    for title in ("worst", "best"):
        yield CaptionExamples(title, [_saying(each, shelf) for each in examples.get(title, [])])


def _saying(example: dict[str, Any], shelf: ItemLookup | None) -> CaptionExample:
    key = str(example["image"])
    item = shelf.item("image", key, None) if shelf else Item("", missing="the pictures are not to be had")
    return CaptionExample(item, example["caption"], list(example["references"]), float(example["cider"]))
