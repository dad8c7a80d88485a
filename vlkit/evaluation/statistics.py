"""Intervals and tests of paired differences, by resampling units.

Queries of one unit (a recipe, an image and its copies) rise and fall together, so units are drawn, not queries. The
gallery stays as it is. Percentile bootstrap, Efron & Tibshirani 1993, chapter 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

LEVEL = 0.95
# Draws per block, so that memory does not grow with draws times units.
DRAWS_PER_BLOCK = 64
# Of two equal models, five units all change to one side more often than one time in twenty.
LEAST_UNITS = 6

K = TypeVar("K", bound=Hashable)
# float64 [draws, queries], how often each query came up in each draw -> float64 [draws], a number for each.
Statistic = Callable[[np.ndarray], np.ndarray]


def resample(
    means: Mapping[K, np.ndarray],
    others: Mapping[K, Statistic],
    units: Sequence[str],
    *,
    draws: int,
    seed: int,
) -> dict[K, np.ndarray]:
    """Compute numbers about the queries in every draw of units; all see the same draws, so differences are paired.

    Args:
        means: name -> float64 [queries], whose mean is computed; NaN leaves the query out.
        others: name -> another statistic of the queries, such as `weighted_median`.
        units: the unit of each query.

    Returns:
        name -> float64 [draws]; NaN where a draw has none of the queries.
    """
    names, unit_of = np.unique(np.asarray(units, dtype=str), return_inverse=True)
    sums, sizes = np.zeros((2, len(names), len(means)))
    for column, values in enumerate(means.values()):
        counted = ~np.isnan(values)
        sums[:, column] = np.bincount(unit_of[counted], weights=values[counted], minlength=len(names))
        sizes[:, column] = np.bincount(unit_of[counted], minlength=len(names))
    generator = np.random.default_rng(seed)
    drawn = {name: np.empty(draws) for name in (*means, *others)}
    for start in range(0, draws, DRAWS_PER_BLOCK):
        chunk = slice(start, min(start + DRAWS_PER_BLOCK, draws))
        weights = _draw_units(generator, chunk.stop - chunk.start, len(names))
        with np.errstate(invalid="ignore"):
            averaged = (weights @ sums) / (weights @ sizes)
        for column, name in enumerate(means):
            drawn[name][chunk] = averaged[:, column]
        query_weights = weights[:, unit_of] if others else weights
        for name, statistic in others.items():
            drawn[name][chunk] = statistic(query_weights)
    return drawn


def _draw_units(generator: np.random.Generator, draws: int, units: int) -> np.ndarray:
    """Return float64 [draws, units]: how often each unit came up when all were drawn anew, with replacement."""
    picked = generator.integers(units, size=(draws, units)) + units * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * units).reshape(draws, units).astype(np.float64)


def weighted_median(values: np.ndarray) -> Statistic:
    """Return a statistic: np.median of the values, each repeated by its weight in the draw."""
    order = np.argsort(values, kind="stable")
    ascending = values[order]

    def median(weights: np.ndarray) -> np.ndarray:
        reached = np.cumsum(weights[:, order], axis=1)
        total = reached[:, -1:]
        low = (reached > (total - 1) // 2).argmax(axis=1)
        high = (reached > total // 2).argmax(axis=1)
        middle: np.ndarray = (ascending[low] + ascending[high]) / 2
        return middle

    return median


def interval(draws: np.ndarray, *, units: int, bounds: tuple[float, float] | None = None) -> tuple[float, float]:
    """Return the middle 95 % of the draws.

    Where the draws are equal (no hit at all, or nothing but hits) resampling shows no doubt, though a few units leave
    much: the interval is then as wide as `units` trials without an exception allow, 1 - 0.025^(1/units) to either side.

    Args:
        draws: NaN where a draw has no query; if all are NaN, so is the interval.
        units: how many units were drawn from.
        bounds: of a metric that has them: (0, 1) for recall and MRR, (-1, 1) for their differences.
    """
    if np.isnan(draws).all():
        return math.nan, math.nan
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if bounds is not None and low == high:
        doubt = 1 - ((1 - LEVEL) / 2) ** (1 / units)
        low, high = max(bounds[0], low - doubt), min(bounds[1], high + doubt)
    return float(low), float(high)


def newcombe_interval(
    value: float, inside: tuple[float, float], rest: float, outside: tuple[float, float]
) -> tuple[float, float]:
    """Return the interval of a share less another one, of other units: Newcombe's hybrid (1998, method 10).

    Resampling alone shows no doubt of a share of 0 or 1, and too little of the difference; their own intervals do.

    Args:
        value, inside: a share and its interval.
        rest, outside: the other one.
    """
    low = value - rest - math.hypot(value - inside[0], outside[1] - rest)
    high = value - rest + math.hypot(inside[1] - value, rest - outside[0])
    return max(-1.0, low), min(1.0, high)


def count_changed_units(one: np.ndarray, other: np.ndarray, units: Sequence[str]) -> int:
    """Count the units that have a query whose values are not the same in both, [queries, ...] each."""
    changed = (one != other).reshape(len(one), -1).any(axis=1)
    return len(set(np.asarray(units, dtype=str)[changed]))


class PermutationTest(NamedTuple):
    """The outcome of a paired permutation test.

    Attributes:
        p_value: probability of a difference as large as the one observed, were the models equal.
        needed: about the smallest difference that would be significant: beyond 95 % of those by chance, and of at least
            six units, for five may all change to one side by chance (2 / 2^5 > 0.05); NaN: there are fewer.
    """

    p_value: float
    needed: float


def permutation_test(
    one: np.ndarray, other: np.ndarray, units: Sequence[str], *, draws: int, seed: int
) -> PermutationTest:
    """Return the two-sided probability of such a difference of means between equal models, by swapping units' results.

    If the models were equal, each unit's two results could be exchanged. They are, at random; the share of such draws
    whose difference is as large as the observed one, itself among them, is the probability: for three units that all
    improved about one in four. Fisher 1935; Efron & Tibshirani 1993, chapter 15.

    Args:
        one, other: float64 [queries]; NaN leaves a query out of both.
        units: of the queries; those of a unit are exchanged together.
    """
    counted = ~np.isnan(one - other)
    names, unit_of = np.unique(np.asarray(units, dtype=str)[counted], return_inverse=True)
    if not len(names):
        return PermutationTest(math.nan, math.nan)
    differences = np.bincount(unit_of, weights=(one - other)[counted], minlength=len(names))
    changed, generator = differences[differences != 0], np.random.default_rng(seed)
    by_chance = np.concatenate(
        [
            np.abs((generator.integers(0, 2, (min(DRAWS_PER_BLOCK, draws - start), len(changed))) * 2 - 1) @ changed)
            for start in range(0, draws, DRAWS_PER_BLOCK)
        ]
    )
    # Sums that differ by rounding are equal.
    p = (int((by_chance >= abs(differences.sum()) * (1 - 1e-9)).sum()) + 1) / (draws + 1)
    mean_change = float(np.abs(changed).mean()) if len(changed) else 1.0
    needed = max(_critical_value(by_chance.round(9), mean_change), LEAST_UNITS * mean_change) / int(counted.sum())
    return PermutationTest(p, needed if len(names) >= LEAST_UNITS else math.nan)


def _critical_value(by_chance: np.ndarray, step: float) -> float:
    """Return the least value that chance reaches at most one time in twenty; else a step beyond all."""
    values, counts = np.unique(by_chance, return_counts=True)
    reached = counts[::-1].cumsum()[::-1] / len(by_chance)
    rare = values[reached <= 1 - LEVEL]
    return float(rare[0]) if len(rare) else float(values[-1]) + step


def p_value(differences: np.ndarray, changed: int) -> float:
    """Return the two-sided p-value of a statistic that is no mean, by the draws of the bootstrap.

    It is twice the share of draws on the other side of 0, the observed one counted among them; but never less than a
    sign test of the `changed` units allows: if the models were equal, each would have changed either way with even
    odds, so three units that all improved do so by chance one time in four.
    """
    known = differences[~np.isnan(differences)]
    if not len(known):
        return math.nan
    tail = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, max(2 * (tail + 1) / (len(known) + 1), 2.0 * 0.5**changed)))


def minimum_detectable_difference(drawn: np.ndarray, units: int, needed: float | None = None) -> float:
    """Return about the smallest difference that these units could have shown, had it been there; NaN: none at all.

    A difference counts where its interval excludes 0, beyond 1.96 standard deviations of its draws, and where a test of
    the units agrees.

    Args:
        needed: by that test (see `PermutationTest`); None: there is no such test of this statistic.
    """
    known = drawn[~np.isnan(drawn)]
    if not len(known) or units < LEAST_UNITS:
        return math.nan
    return max(1.96 * float(np.std(known)), needed or 0.0)
