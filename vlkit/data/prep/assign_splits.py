"""Assign every unit to a split: drawn by the seed, or as the source has it, with what the source lacks drawn."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from vlkit.config.data import PrepConfig
from vlkit.data import splits
from vlkit.data.prep.raw_folder import RawRow, Reject


class UnitSplits(NamedTuple):
    """Where the units go.

    Attributes:
        split: unit -> split; units above --limit, and those in no split of the source, are absent.
        rejects: rows of units that the source assigns to no split.
        notes: what differs from what the user may expect.
    """

    split: dict[str, str]
    rejects: list[Reject]
    notes: list[str]


def assign_splits(rows: Sequence[RawRow], unit_of: Mapping[str, str], config: PrepConfig) -> UnitSplits:
    """Assign the units of `rows` to splits.

    Args:
        unit_of: a row's unit -> the unit it was merged into, because they share an image or look alike.
    """
    sizes = Counter(unit_of[row.unit] for row in rows)
    named: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.split and config.split_by == "source":
            named[unit_of[row.unit]].add(row.split)
    selected = _units_under_limit(sizes, named, config)
    strata: dict[str, Collection[str]] = dict.fromkeys((unit for unit in sizes if unit in selected), ())
    if config.stratify:
        classes: dict[str, set[str]] = defaultdict(set)
        repeated = _repeated_texts(rows, unit_of, config)
        for row in rows:
            classes[unit_of[row.unit]].update(row.classes or ((row.text,) if row.text in repeated else ()))
        strata |= {unit: sorted(classes[unit]) for unit in strata if classes[unit]}
    drawn = splits.split_units(strata, test_share=config.test_share, val_share=config.val_share, seed=config.seed)
    if config.split_by == "seed":
        return UnitSplits(drawn, [], [])
    in_source = {unit: names for unit, names in named.items() if unit in selected}
    split, notes = _apply_source_splits(in_source, strata, drawn, config)
    rejects: dict[str, Reject] = {}
    for row in rows:
        unit = unit_of[row.unit]
        if unit in selected and unit not in split:
            rejects.setdefault(row.where, Reject(row.where, row.image, "the source assigns it to no split"))
    return UnitSplits(split, list(rejects.values()), notes)


def _units_under_limit(
    sizes: Mapping[str, int], named: Mapping[str, Collection[str]], config: PrepConfig
) -> Collection[str]:
    """Return the units within --limit rows; each of the source's splits keeps its share."""
    if config.limit is None:
        return sizes.keys()
    by_split: dict[str | None, dict[str, int]] = defaultdict(dict)
    split, _ = splits.splits_from_source(named)
    for unit, size in sizes.items():
        by_split[split.get(unit)][unit] = size
    total, selected = sum(sizes.values()), set()
    for members in by_split.values():
        share = max(1, round(config.limit * sum(members.values()) / total))
        selected.update(splits.subsample_units(members, share, config.seed))
    return selected


def _repeated_texts(rows: Sequence[RawRow], unit_of: Mapping[str, str], config: PrepConfig) -> set[str]:
    """Return texts that occur in enough units to give every split a share: without classes, these are stratified."""
    min_units = 1 / min((share for share in (config.test_share, config.val_share) if share > 0), default=1.0)
    units: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if len(units[row.text]) < min_units:
            units[row.text].add(unit_of[row.unit])
    return {text for text, members in units.items() if len(members) >= max(2, min_units)}


def _apply_source_splits(
    named: Mapping[str, Collection[str]],
    strata: Mapping[str, Collection[str]],
    drawn: dict[str, str],
    config: PrepConfig,
) -> tuple[dict[str, str], list[str]]:
    """Take the source's own splits; draw those that it lacks from its training units.

    A source with val but no test, as COCO is, has its val used as the test: data that selects a model must not measure
    it.

    Returns:
        unit -> split, and notes for the user.
    """
    notes: list[str] = []
    split, torn = splits.splits_from_source(named)
    present = set(split.values())
    if "train" not in present:
        names = f"no training split, only {', '.join(sorted(present))}" if present else "no splits"
        return drawn, [f"the source has {names}: the seed draws all splits"]
    if torn:
        units = "1 unit is" if len(torn) == 1 else f"{len(torn)} units are"
        notes.append(f"{units} in several of the source's splits, through copies: each went to the most held-out one")
    if "test" not in present and "val" in present:
        notes.append("the source has no test split: its val becomes the test, and validation is drawn from train")
        split = {unit: "test" if name == "val" else name for unit, name in split.items()}
        present = set(split.values())
    missing = [name for name in ("test", "val") if name not in present]
    if missing == ["test", "val"]:
        notes.append("the source has neither a test nor a validation split: both are drawn from train")
    training = {unit: strata[unit] for unit, name in split.items() if name == "train"}
    shares = {name: getattr(config, f"{name}_share") if name in missing else 0.0 for name in ("test", "val")}
    more = splits.split_units(training, test_share=shares["test"], val_share=shares["val"], seed=config.seed)
    return split | more, notes
