"""What a tuned model retains of its general knowledge: recall on a guard set, which selects nothing."""

from __future__ import annotations

from vlkit import console
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.errors import DataError
from vlkit.metrics import DIRECTIONS, HEADLINES
from vlkit.storage import Location

Metrics = dict[str, dict[str, float]]


def read_guard_rows(guard: Location) -> Pairs:
    """Read the rows of a guard set: its test split, else validation, else training; say so if it is not the test.

    Raises:
        DataError: it has no matching rows, or an image file is missing.
    """
    pairs = read_pairs(guard).positives()
    for split in ("test", "val", "train"):
        rows = pairs.split(split)
        if len(rows):
            missing = [path for path in rows.image_paths(rows.unique_images()) if not path.is_file()]
            if missing:
                raise DataError(f"--guard {guard}: no such image: {missing[0]}", hint="run prep again")
            if split != "test":
                console.say(f"--guard {guard} has no test split: the {split} split is used")
            return rows
    raise DataError(f"{guard}: the guard set has no matching rows")


def mean_recall(metrics: Metrics | None) -> float:
    """Return recall@1, the mean of both directions; 0 if nothing was measured."""
    return sum(values[HEADLINES["retrieval"]] for values in (metrics or {}).values()) / len(DIRECTIONS)


def retained_share(tuned: Metrics, untouched: Metrics) -> float | None:
    """Return the share of the untouched model's recall@1 that is left; None if it had none."""
    before = mean_recall(untouched)
    return mean_recall(tuned) / before if before else None
