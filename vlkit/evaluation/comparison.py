"""Two models on the same queries: each number with its interval, the difference, and what may be said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlkit.evaluation.statistics import (
    Statistic,
    count_changed_units,
    interval,
    minimum_detectable_difference,
    p_value,
    permutation_test,
    resample,
)

# Of few pictures a class, a draw misses some and repeats others: these numbers then lie beside what they are drawn
# from, and their draws are moved back to it.
CENTRED = ("precision_macro", "recall_macro", "f1_macro", "average_precision_macro")
PARTS = ("metrics", "intervals", "units", "baseline", "baseline_intervals", "difference", "smallest_difference")


@dataclass(frozen=True)
class PerQueryMetrics:
    """What a model did, query by query.

    Attributes:
        means: metric -> float64 [queries], whose mean it is; NaN: that query is not asked.
        others: metric -> how it is made of the queries.
        told_by: metric of `others` -> array [queries, ...] that is equal where two models did the same.
        counted: metric of `others` -> bool [queries], those that it is made of; without it, all.
    """

    means: Mapping[str, np.ndarray]
    others: Mapping[str, Statistic] = field(default_factory=dict)
    told_by: Mapping[str, np.ndarray] = field(default_factory=dict)
    counted: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every metric."""
        return [*self.means, *self.others]

    def value(self, metric: str, queries: int) -> float:
        """A metric over all queries; NaN where none is asked."""
        if metric in self.others:
            return float(self.others[metric](np.ones((1, queries)))[0])
        asked = self.means[metric][self.asked(metric, queries)]
        return float(asked.mean()) if len(asked) else math.nan

    def asked(self, metric: str, queries: int) -> np.ndarray:
        """bool [queries]: those that a metric is made of."""
        if metric in self.means:
            return ~np.isnan(self.means[metric])
        return self.counted.get(metric, np.ones(queries, bool))


def compare(
    tuned: PerQueryMetrics, base: PerQueryMetrics | None, units: Sequence[str], *, draws: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Values and intervals of both, and the paired difference.

    Args:
        base: the untouched model on the same queries; None: there is none to compare with.
        units: the unit of each query.
        draws, seed: of the bootstrap.

    Returns:
        PARTS -> metric -> number, [low, high], or {"value", "low", "high", "p_value"}; units: how many the metric is
        made of. Without a base the parts that speak of it are empty.
    """
    models = {"tuned": tuned} | ({"base": base} if base else {})
    drawn = resample(
        {(who, metric): values for who, of in models.items() for metric, values in of.means.items()},
        {(who, metric): statistic for who, of in models.items() for metric, statistic in of.others.items()},
        units,
        draws=draws,
        seed=seed,
    )
    for (who, metric), draw in drawn.items():
        if metric in CENTRED and not np.isnan(draw).all():
            draw += models[who].value(metric, len(units)) - np.nanmean(draw)
    names = np.asarray(units, dtype=str)
    found: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for metric in tuned.names:
        bounds, apart = _bounds(metric)
        count = len(np.unique(names[tuned.asked(metric, len(names))]))
        found["units"][metric] = count
        for who, of, value, around in (
            ("tuned", tuned, "metrics", "intervals"),
            ("base", base, "baseline", "baseline_intervals"),
        ):
            if of is not None:
                found[value][metric] = of.value(metric, len(units))
                ends = interval(drawn[who, metric], units=count, bounds=bounds)
                found[around][metric] = _around(found[value][metric], ends, bounds)
        if base is not None:
            between = drawn["tuned", metric] - drawn["base", metric]
            needed = None
            if metric in tuned.means:
                by_luck, needed = permutation_test(
                    tuned.means[metric], base.means[metric], units, draws=draws, seed=seed
                )
            else:
                changed = count_changed_units(tuned.told_by[metric], base.told_by[metric], units)
                by_luck = p_value(between, changed)
            value = found["metrics"][metric] - found["baseline"][metric]
            found["difference"][metric] = difference(value, between, by_luck, units=count, bounds=apart)
            if bounds:
                found["smallest_difference"][metric] = minimum_detectable_difference(between, count, needed)
    return found


def _around(value: float, ends: tuple[float, float], bounds: tuple[float, float] | None) -> tuple[float, float]:
    """An interval that has its value in it, and nothing that cannot be."""
    low, high = min(ends[0], value), max(ends[1], value)
    return (low, high) if bounds is None else (max(low, bounds[0]), min(high, bounds[1]))


def _bounds(metric: str) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Between which numbers a metric, and a difference of it, must lie; not so ranks, CIDEr and CLIPScore."""
    free = metric.endswith(("rank", "cider", "clipscore")) or metric.startswith(("bleu", "rouge"))
    return (None, None) if free else ((0.0, 1.0), (-1.0, 1.0))


def difference(
    value: float, drawn: np.ndarray, by_luck: float, *, units: int, bounds: tuple[float, float] | None
) -> dict[str, float]:
    """A difference with its interval and p-value.

    Args:
        drawn: the same in every draw.
        by_luck: its p-value.
    """
    low, high = interval(drawn, units=units, bounds=bounds)
    return {"value": value, "low": low, "high": high, "p_value": by_luck}


def excludes_zero(difference: Mapping[str, float]) -> bool:
    """Its interval lies on one side of 0."""
    return difference["low"] > 0 or difference["high"] < 0


def verdict_label(difference: Mapping[str, float]) -> str:
    """better, worse or no difference: it is one where the interval and the p-value agree."""
    if not (difference["p_value"] < 0.05 and excludes_zero(difference)):
        return "no difference"
    return "better" if difference["low"] > 0 else "worse"


def verdict(difference: Mapping[str, float], units: int, smallest: float, metric: str = "recall@1") -> str:
    """One plain sentence about a metric.

    Args:
        smallest: about the smallest difference that the units could have shown; NaN: they could show none.
    """
    told = f"{metric} {difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    told += f", p {format_p(difference['p_value'])}, over {units} unit{'' if units == 1 else 's'}"
    found = verdict_label(difference)
    if found == "no difference":
        taken = f"it would have taken about {smallest:.3f}" if smallest == smallest else "so few can show none"
        return f"no difference that this test set can show: {told}; {taken}"
    return f"{found}: {told}"


def format_p(value: float | None) -> str:
    """A p-value as people write it."""
    return "-" if value is None or value != value else "< 0.001" if value < 0.001 else f"{value:.3f}"
