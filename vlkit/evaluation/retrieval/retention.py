"""What a tuned model has kept of the general: the same measure on a guard set, which nothing is chosen by."""

from __future__ import annotations

from vlkit import console
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.errors import DataError
from vlkit.metrics import DIRECTIONS
from vlkit.storage import Location

Metrics = dict[str, dict[str, float]]


def read_guard_rows(guard: Location) -> Pairs:
    """The rows of a guard set: its test split, else validation, else whatever there is; said, if it is not the test.

    Raises:
        DataError: no row of it matches, or a picture is gone.
    """
    pairs = read_pairs(guard).positives()
    for split in ("test", "val", "train"):
        rows = pairs.split(split)
        if len(rows):
            gone = [path for path in rows.image_paths(rows.unique_images()) if not path.is_file()]
            if gone:
                raise DataError(f"--guard {guard}: no such image: {gone[0]}", hint="run prep again")
            if split != "test":
                console.say(f"--guard {guard} has no test split: its {split} split guards")
            return rows
    raise DataError(f"{guard}: no matching rows to guard by")


def mean_recall(metrics: Metrics | None) -> float:
    """recall@1, the mean of both directions; 0 where nothing was measured."""
    return sum(each["recall@1"] for each in (metrics or {}).values()) / len(DIRECTIONS)


def retained_share(tuned: Metrics, untouched: Metrics) -> float | None:
    """Share of the untouched model's recall@1 that is left; None where it had none."""
    had = mean_recall(untouched)
    return mean_recall(tuned) / had if had else None


def retention_sentence(share: float, guard: str) -> str:
    """A sentence about that share."""
    kept = f"{share:.0%} are left" if share <= 1 else f"the tuned one has {share:.0%}, more than it"
    return f"of the untouched model's recall@1 on {guard}, {kept}"
