"""Which unit goes to which split, and the proof that none went to two.

A unit is what must not be torn apart: all pairs of a recipe, every copy of a picture. Its place is drawn by hashing
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


def hash_order(seed: int, item: str) -> int:
    """A 64-bit number that looks random and depends on nothing but the seed and the item."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{item}".encode(), digest_size=8).digest())


def seeded_rng(key: str) -> Generator:
    """Random numbers that depend on nothing but the key."""
    from numpy.random import PCG64, Generator

    return Generator(PCG64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest())))


def connected_components(links: Iterable[tuple[str, Hashable]]) -> dict[str, str]:
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


def split_from_name(name: str) -> str | None:
    """The split that a folder, a file or a cell means: train2017 -> train, valid -> val; None for any other name."""
    word = re.sub(r"(?:[\W\d_]+(?:images?|imgs?|set|data|split))?[\W\d_]*$", "", name.strip().lower())
    return {
        **dict.fromkeys(("train", "training", "restval"), "train"),
        **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
        **dict.fromkeys(("test", "testing", "holdout"), "test"),
    }.get(word)


def split_units(
    units: Mapping[str, Collection[str]], *, test_share: float, val_share: float, seed: int
) -> dict[str, str]:
    """unit -> "train", "val" or "test".

    Args:
        units: each unit with its classes: none, one or several. Every class is split in the same shares, and so are
            the units of none.
        test_share: of all units.
        val_share: of the units that remain after the test.

    A share above zero takes at least one unit of a class while one is left for training: a class of three stands in
    all splits, a class of two trains and is tested or, for every other one, validated. A class of one trains, unless
    most units are such: then they are split like units of no class. Where units have several classes the rarest class
    is served first (Sechidis and others, 2011); a commoner one takes what those units leave.
    """
    members: dict[str | None, list[str]] = defaultdict(list)
    for unit, classes in units.items():
        for class_name in dict.fromkeys(classes) if classes else (None,):
            members[class_name].append(unit)
    _pool_single(members, len(units))
    split: dict[str, str] = {}
    for class_name in sorted(members, key=lambda name: (len(members[name]), name or "")):
        of_class = members[class_name]
        wanted = _wanted(len(of_class), test_share, val_share, hash_order(seed, f"two of {class_name}") % 2 == 0)
        placed = [split[unit] for unit in of_class if unit in split]
        free = sorted((unit for unit in of_class if unit not in split), key=lambda unit: (hash_order(seed, unit), unit))
        if free and "train" not in placed:
            split[free.pop()] = "train"
        given = 0
        for name, count in wanted.items():
            more = max(0, count - placed.count(name))
            split |= dict.fromkeys(free[given : given + more], name)
            given += more
        split |= dict.fromkeys(free[given:], "train")
    return split


def _pool_single(members: dict[str | None, list[str]], units: int) -> None:
    """Classes of one unit become units of no class, where they are most."""
    single = [name for name, of_class in members.items() if len(of_class) == 1 and name is not None]
    if 2 * len(single) > units:
        for name in single:
            unit = members.pop(name)[0]
            if unit not in members[None]:
                members[None].append(unit)


def _wanted(size: int, test_share: float, val_share: float, tested: bool) -> dict[str, int]:
    """How many of a class' units go to the test and to validation."""
    if size == 2 and test_share > 0 and val_share > 0:
        return {"test": int(tested), "val": int(not tested)}
    test = _count(test_share, size)
    return {"test": test, "val": _count(val_share, size - test)}


def splits_from_source(units: Mapping[str, Collection[str]]) -> tuple[dict[str, str], list[str]]:
    """unit -> split as the source has it. A unit that stands in several goes wholly to the one that is held out most.

    Returns:
        The splits, without the units that the source puts nowhere; and the units that stood in several.
    """
    split, torn = {}, []
    for unit, named in units.items():
        found = [name for name in reversed(SPLITS) if name in named]
        if found:
            split[unit] = found[0]
        if len(found) > 1:
            torn.append(unit)
    return split, torn


def _count(share: float, members: int) -> int:
    if share <= 0 or members < 2:
        return 0
    return min(max(1, round(share * members)), members - 1)


def subsample_units(sizes: Mapping[str, int], limit: int, seed: int) -> list[str]:
    """Whole units in the order of their draw until they have `limit` rows or more."""
    kept: list[str] = []
    total = 0
    for unit in sorted(sizes, key=lambda unit: (hash_order(seed, unit), unit)):
        if total >= limit:
            break
        kept.append(unit)
        total += sizes[unit]
    return kept


def refuse_leaks(pairs: pd.DataFrame, where: str, near: int = -1) -> None:
    """Refuse a table in which a unit or a picture stands in two splits, or two that look the same stand in two.

    Args:
        near: bits in which perceptual hashes (the column image_looks, where there is one) may differ; -1: not asked.

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
            told = f"{where}: {what} {torn.index[0]} ({rows['image'].iloc[0]}) stands in {both}{more}"
            raise DataError(told, hint=LEAK_HINT)
    if near >= 0 and "image_looks" in pairs:
        _refuse_lookalikes(pairs.drop_duplicates("image_id"), where, near)


def _refuse_lookalikes(pictures: pd.DataFrame, where: str, near: int) -> None:
    from vlkit.data.images import phash

    looks = [phash.from_hex(each) for each in pictures["image_looks"]]
    split = pictures["split"].to_numpy()
    seen: list[int] = []
    for name in SPLITS:
        here = [int(i) for i in (split == name).nonzero()[0]]
        found = phash.first_lookalike([looks[i] for i in here], [looks[i] for i in seen], near)
        if found is not None:
            first, second = pictures.iloc[here[found[0]]], pictures.iloc[seen[found[1]]]
            both = f"{first['image']} ({first['split']}) and {second['image']} ({second['split']})"
            raise DataError(f"{where}: {both} look the same", hint=LEAK_HINT)
        seen += here


LEAK_HINT = "a test that was trained on measures nothing: run prep again, or repair the split column"
