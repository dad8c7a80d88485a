"""Assign units to splits, and prove that no unit is in two.

A unit is what must stay together: all pairs of a recipe, every copy of an image. Its split follows from a hash of
(seed, unit), so adding a recipe moves few others and the order of the rows does not matter.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING

from vlkit.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.random import Generator

SPLITS = ("train", "val", "test")
LEAK_HINT = "a test that was trained on measures nothing: run prep again, or repair the split column"


def hash_order(seed: int, item: str) -> int:
    """Return a pseudo-random 64-bit number that depends on the seed and the item alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{item}".encode(), digest_size=8).digest())


def seeded_rng(key: str) -> Generator:
    """Return a random generator that depends on the key alone."""
    from numpy.random import PCG64, Generator

    return Generator(PCG64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest())))


def connected_components(links: Iterable[tuple[str, Hashable]]) -> dict[str, str]:
    """Merge units that share something, such as an image's bytes: unit -> the first name in its component."""
    parent: dict[str, str] = {}

    def root(unit: str) -> str:
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    first_unit: dict[Hashable, str] = {}
    for unit, shared in links:
        parent.setdefault(unit, unit)
        other = first_unit.setdefault(shared, unit)
        low, high = sorted((root(unit), root(other)))
        parent[high] = low
    return {unit: root(unit) for unit in parent}


def split_from_name(name: str) -> str | None:
    """Return the split that a folder, file or cell names: train2017 -> train, valid -> val; None for other names."""
    word = re.sub(r"(?:[\W\d_]+(?:images?|imgs?|set|data|split))?[\W\d_]*$", "", name.strip().lower())
    return {
        **dict.fromkeys(("train", "training", "restval"), "train"),
        **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
        **dict.fromkeys(("test", "testing", "holdout"), "test"),
    }.get(word)


def split_units(
    units: Mapping[str, Collection[str]], *, test_share: float, val_share: float, seed: int
) -> dict[str, str]:
    """Assign every unit to "train", "val" or "test".

    Args:
        units: each unit with its classes: none, one or several. Every class is split in the same shares, and so are
            the units without a class.
        test_share: of all units.
        val_share: of the units that remain after the test.

    A share above zero takes at least one unit of a class while one is left for training: a class of three is in all
    splits, a class of two trains and is tested or, for every other class, validated. A class of one trains, unless
    most units are such: then they are split like units without a class. Where units have several classes the rarest
    class is served first (Sechidis and others, 2011); a commoner one takes the units that are left.
    """
    members: dict[str | None, list[str]] = defaultdict(list)
    for unit, classes in units.items():
        for class_name in dict.fromkeys(classes) if classes else (None,):
            members[class_name].append(unit)
    _pool_single_unit_classes(members, len(units))
    split: dict[str, str] = {}
    for class_name in sorted(members, key=lambda name: (len(members[name]), name or "")):
        class_units = members[class_name]
        test_first = hash_order(seed, f"two of {class_name}") % 2 == 0
        quotas = _held_out_quotas(len(class_units), test_share, val_share, test_first)
        assigned = [split[unit] for unit in class_units if unit in split]
        free = sorted(
            (unit for unit in class_units if unit not in split), key=lambda unit: (hash_order(seed, unit), unit)
        )
        if free and "train" not in assigned:
            split[free.pop()] = "train"
        start = 0
        for name, quota in quotas.items():
            stop = start + max(0, quota - assigned.count(name))
            split |= dict.fromkeys(free[start:stop], name)
            start = stop
        split |= dict.fromkeys(free[start:], "train")
    return split


def _pool_single_unit_classes(members: dict[str | None, list[str]], unit_count: int) -> None:
    """Move classes of one unit to the units without a class, if they are more than half."""
    single = [name for name, class_units in members.items() if len(class_units) == 1 and name is not None]
    if 2 * len(single) > unit_count:
        for name in single:
            unit = members.pop(name)[0]
            if unit not in members[None]:
                members[None].append(unit)


def _held_out_quotas(size: int, test_share: float, val_share: float, test_first: bool) -> dict[str, int]:
    """Return how many of a class' units go to the test and to validation."""
    if size == 2 and test_share > 0 and val_share > 0:
        return {"test": int(test_first), "val": int(not test_first)}
    test = _quota(test_share, size)
    return {"test": test, "val": _quota(val_share, size - test)}


def _quota(share: float, size: int) -> int:
    if share <= 0 or size < 2:
        return 0
    return min(max(1, round(share * size)), size - 1)


def splits_from_source(units: Mapping[str, Collection[str]]) -> tuple[dict[str, str], list[str]]:
    """Return unit -> split as the source has it; a unit in several splits goes to the one held out most.

    Returns:
        The splits, without units that the source puts in none; and the units that were in several.
    """
    split, in_several = {}, []
    for unit, names in units.items():
        known = [name for name in reversed(SPLITS) if name in names]
        if known:
            split[unit] = known[0]
        if len(known) > 1:
            in_several.append(unit)
    return split, in_several


def subsample_units(sizes: Mapping[str, int], limit: int, seed: int) -> list[str]:
    """Return whole units in the order of their hash until they have `limit` rows or more."""
    chosen: list[str] = []
    rows = 0
    for unit in sorted(sizes, key=lambda unit: (hash_order(seed, unit), unit)):
        if rows >= limit:
            break
        chosen.append(unit)
        rows += sizes[unit]
    return chosen


def refuse_leaks(pairs: pd.DataFrame, table_name: str, near: int = -1) -> None:
    """Refuse a table in which a unit, an image, or two images that look alike are in two splits.

    Args:
        near: bits in which perceptual hashes (the column image_looks, if present) may differ; -1: no check.

    Raises:
        DataError: names the first offender and its splits.
    """
    for column, kind in (("unit", "unit"), ("image_id", "image")):
        split_counts = pairs.groupby(column)["split"].nunique()
        leaks = split_counts[split_counts > 1]
        if len(leaks):
            rows = pairs[pairs[column] == leaks.index[0]]
            names = " and ".join(sorted(set(rows["split"])))
            more = f", and {len(leaks) - 1} more" if len(leaks) > 1 else ""
            message = f"{table_name}: {kind} {leaks.index[0]} ({rows['image'].iloc[0]}) is in {names}{more}"
            raise DataError(message, hint=LEAK_HINT)
    if near >= 0 and "image_looks" in pairs:
        _refuse_lookalikes(pairs.drop_duplicates("image_id"), table_name, near)


def _refuse_lookalikes(images: pd.DataFrame, table_name: str, near: int) -> None:
    from vlkit.data.images import phash

    hashes = [phash.from_hex(text) for text in images["image_looks"]]
    split = images["split"].to_numpy()
    earlier: list[int] = []
    for name in SPLITS:
        current = [int(row) for row in (split == name).nonzero()[0]]
        match = phash.first_lookalike([hashes[row] for row in current], [hashes[row] for row in earlier], near)
        if match is not None:
            first, second = images.iloc[current[match[0]]], images.iloc[earlier[match[1]]]
            both = f"{first['image']} ({first['split']}) and {second['image']} ({second['split']})"
            raise DataError(f"{table_name}: {both} look the same", hint=LEAK_HINT)
        earlier += current
