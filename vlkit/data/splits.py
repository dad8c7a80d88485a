"""Which unit goes to which split, and the proof that none went to two.

A unit is what must not be torn apart: all pairs of a recipe, every copy of a picture. Its place is drawn by hashing
(seed, unit), so adding a recipe moves few others and the order of the rows does not matter.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING

from vlkit.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "val", "test")


def draw(seed: int, item: str) -> int:
    """A 64-bit number that looks random and depends on nothing but the seed and the item."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{item}".encode(), digest_size=8).digest())


def connected(links: Iterable[tuple[str, Hashable]]) -> dict[str, str]:
    """Merge units that share something (a picture's bytes): unit -> the first name among those it hangs with."""
    parent: dict[str, str] = {}

    def root(unit: str) -> str:
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    holder: dict[Hashable, str] = {}
    for unit, shared in links:
        parent.setdefault(unit, unit)
        other = holder.setdefault(shared, unit)
        low, high = sorted((root(unit), root(other)))
        parent[high] = low
    return {unit: root(unit) for unit in parent}


def split_units(units: Mapping[str, str | None], *, test_share: float, val_share: float, seed: int) -> dict[str, str]:
    """unit -> "train", "val" or "test".

    Args:
        units: each unit with its class, or None; every class is split in the same shares, and so are those of none.
        test_share: of all units.
        val_share: of the units that remain after the test.

    A share above zero takes at least one unit of a class while one is left for training, so a class of one
    trains, a class of two trains and tests.
    """
    classes: dict[str | None, list[str]] = defaultdict(list)
    for unit, class_name in units.items():
        classes[class_name].append(unit)
    split: dict[str, str] = {}
    for members in classes.values():
        members.sort(key=lambda unit: (draw(seed, unit), unit))
        test = _count(test_share, len(members))
        val = _count(val_share, len(members) - test)
        for position, unit in enumerate(members):
            split[unit] = "test" if position < test else "val" if position < test + val else "train"
    return split


def _count(share: float, members: int) -> int:
    if share <= 0 or members < 2:
        return 0
    return min(max(1, round(share * members)), members - 1)


def refuse_leaks(pairs: pd.DataFrame, where: str) -> None:
    """Refuse a table in which a unit or a picture stands in two splits.

    Raises:
        DataError: names the first offender and its splits.
    """
    for column, what in (("unit", "unit"), ("image_id", "picture")):
        splits = pairs.groupby(column)["split"].nunique()
        torn = splits[splits > 1]
        if len(torn):
            rows = pairs[pairs[column] == torn.index[0]]
            both = " and ".join(sorted(set(rows["split"])))
            more = f", and {len(torn) - 1} more" if len(torn) > 1 else ""
            raise DataError(
                f"{where}: {what} {torn.index[0]} ({rows['image'].iloc[0]}) stands in {both}{more}",
                hint="a test that was trained on measures nothing: run prep again, or repair the split column",
            )
