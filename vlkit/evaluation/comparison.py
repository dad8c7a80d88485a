"""Two models on the same queries: every number with its interval, the difference, and its verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlkit.evaluation.formatting import format_p
from vlkit.evaluation.results import Difference, Group, Interval
from vlkit.evaluation.statistics import (
    Statistic,
    count_changed_units,
    interval,
    minimum_detectable_difference,
    p_value,
    permutation_test,
    resample,
)
from vlkit.metrics import METRICS

SIGNIFICANCE = 0.05
NO_DIFFERENCE = "no difference"


@dataclass(frozen=True)
class PerQueryMetrics:
    """A model's metrics, query by query.

    Attributes:
        means: metric -> float64 [queries], whose mean it is; NaN: the metric leaves that query out.
        others: metric -> the statistic of the queries that it is.
        compared_by: metric of `others` -> array [queries, ...] that is equal where two models did the same.
        counted: metric of `others` -> bool [queries], those that it is made of; without it, all.
    """

    means: Mapping[str, np.ndarray]
    others: Mapping[str, Statistic] = field(default_factory=dict)
    compared_by: Mapping[str, np.ndarray] = field(default_factory=dict)
    counted: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every metric."""
        return [*self.means, *self.others]

    def value(self, metric: str, queries: int) -> float:
        """Return a metric over all queries; NaN without a query."""
        if metric in self.others:
            return float(self.others[metric](np.ones((1, queries)))[0])
        values = self.means[metric][self.is_counted(metric, queries)]
        return float(values.mean()) if len(values) else math.nan

    def is_counted(self, metric: str, queries: int) -> np.ndarray:
        """Return bool [queries]: those that a metric is made of."""
        if metric in self.means:
            counted: np.ndarray = ~np.isnan(self.means[metric])
            return counted
        return self.counted.get(metric, np.ones(queries, bool))


def compare(
    tuned: PerQueryMetrics,
    base: PerQueryMetrics | None,
    units: Sequence[str],
    *,
    draws: int,
    seed: int,
    headline: str | None = None,
) -> Group:
    """Return values and intervals of both models, and the paired difference.

    Args:
        base: the untouched model on the same queries; None: there is nothing to compare with.
        units: the unit of each query.
        draws, seed: of the bootstrap.
        headline: the metric of the verdict, which needs a base; None: no verdict.
    """
    models = {"tuned": tuned} | ({"base": base} if base else {})
    drawn = _resample_models(models, units, draws=draws, seed=seed)
    names = np.asarray(units, dtype=str)
    group = Group({}, {})
    for metric in tuned.names:
        bounds = METRICS[metric].bounds
        count = len(np.unique(names[tuned.is_counted(metric, len(names))]))
        group.units[metric] = count
        group.metrics[metric] = tuned.value(metric, len(units))
        ends = interval(drawn["tuned", metric], units=count, bounds=bounds)
        group.intervals[metric] = _include(group.metrics[metric], ends, bounds)
        if base is None:
            continue
        group.baseline[metric] = base.value(metric, len(units))
        ends = interval(drawn["base", metric], units=count, bounds=bounds)
        group.baseline_intervals[metric] = _include(group.baseline[metric], ends, bounds)
        between, needed = drawn["tuned", metric] - drawn["base", metric], None
        if metric in tuned.means:
            p, needed = permutation_test(tuned.means[metric], base.means[metric], units, draws=draws, seed=seed)
        else:
            p = p_value(between, count_changed_units(tuned.compared_by[metric], base.compared_by[metric], units))
        value = group.metrics[metric] - group.baseline[metric]
        group.difference[metric] = difference_from_draws(
            value, between, p, units=count, bounds=METRICS[metric].difference_bounds
        )
        if bounds:
            group.smallest_difference[metric] = minimum_detectable_difference(between, count, needed)
    return group if headline is None or base is None else _with_verdict(group, headline)


def _resample_models(
    models: Mapping[str, PerQueryMetrics], units: Sequence[str], *, draws: int, seed: int
) -> dict[tuple[str, str], np.ndarray]:
    """Return (model, metric) -> float64 [draws], all of the same draws; centred where the metric asks for it."""
    drawn = resample(
        {(name, metric): values for name, model in models.items() for metric, values in model.means.items()},
        {(name, metric): statistic for name, model in models.items() for metric, statistic in model.others.items()},
        units,
        draws=draws,
        seed=seed,
    )
    for (name, metric), draw in drawn.items():
        if METRICS[metric].centre_draws and not np.isnan(draw).all():
            draw += models[name].value(metric, len(units)) - np.nanmean(draw)
    return drawn


def _include(value: float, ends: Interval, bounds: Interval | None) -> Interval:
    """Widen an interval to its value, and cut it at what is possible."""
    low, high = min(ends[0], value), max(ends[1], value)
    return (low, high) if bounds is None else (max(low, bounds[0]), min(high, bounds[1]))


def difference_from_draws(
    value: float, draws: np.ndarray, p: float, *, units: int, bounds: Interval | None
) -> Difference:
    """Return a difference with the interval of its draws.

    Args:
        draws: float64, the same difference in every draw.
        p: its p-value.
    """
    return Difference(value, *interval(draws, units=units, bounds=bounds), p)


def _with_verdict(group: Group, metric: str) -> Group:
    difference = group.difference[metric]
    return replace(
        group,
        judged=verdict_label(difference, metric),
        verdict=verdict(difference, group.units[metric], group.smallest_difference[metric], metric),
    )


def verdict_label(difference: Difference, metric: str) -> str:
    """Return better, worse or no difference: it is one where the interval and the p-value agree.

    A lower rank is better, a higher recall is.
    """
    significant = difference.p_value is not None and difference.p_value < SIGNIFICANCE
    if not (significant and difference.excludes_zero):
        return NO_DIFFERENCE
    return "better" if (difference.low > 0) == METRICS[metric].higher_is_better else "worse"


def verdict(difference: Difference, units: int, smallest: float, metric: str) -> str:
    """Return one plain sentence about a metric.

    Args:
        smallest: about the smallest difference that the units could have shown; NaN: they could show none.
    """
    numbers = f"{metric} {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    numbers += f", p {format_p(difference.p_value)}, over {units} unit{'' if units == 1 else 's'}"
    label = verdict_label(difference, metric)
    if label == NO_DIFFERENCE:
        needed = f"it would have taken about {smallest:.3f}" if smallest == smallest else "so few can show none"
        return f"{NO_DIFFERENCE} that this test set can show: {numbers}; {needed}"
    return f"{label}: {numbers}"
