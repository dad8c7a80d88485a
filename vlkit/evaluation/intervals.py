"""How far a number can be believed: intervals and a paired difference by resampling units.

Queries of one unit (a recipe, a picture and its copies) rise and fall together, so units are drawn, not queries. The
gallery stays as it is. Percentile bootstrap, Efron & Tibshirani 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

LEVEL = 0.95
# Weights are held for this many draws at a time, so that memory does not grow with draws times units.
DRAWS_AT_ONCE = 64

K = TypeVar("K", bound=Hashable)


def resample(
    means: Mapping[K, np.ndarray], medians: Mapping[K, np.ndarray], units: Sequence[str], *, draws: int, seed: int
) -> dict[K, np.ndarray]:
    """Means and medians over the queries, in every draw of units. All see the same draws, so differences are paired.

    Args:
        means, medians: name -> float64 [queries].
        units: the unit of each query.

    Returns:
        name -> float64 [draws].
    """
    names, unit_of = np.unique(np.asarray(units, dtype=str), return_inverse=True)
    sizes = np.bincount(unit_of, minlength=len(names)).astype(np.float64)
    sums = (
        np.stack([np.bincount(unit_of, weights=v, minlength=len(names)) for v in means.values()], axis=1)
        if means
        else np.zeros((len(names), 0))
    )
    generator = np.random.default_rng(seed)
    found = {name: np.empty(draws) for name in (*means, *medians)}
    for start in range(0, draws, DRAWS_AT_ONCE):
        chunk = slice(start, min(start + DRAWS_AT_ONCE, draws))
        weights = _draw(generator, chunk.stop - chunk.start, len(names))
        averaged = (weights @ sums) / (weights @ sizes)[:, None]
        for column, name in enumerate(means):
            found[name][chunk] = averaged[:, column]
        for name, values in medians.items():
            found[name][chunk] = _weighted_medians(values, weights[:, unit_of])
    return found


def _draw(generator: np.random.Generator, draws: int, units: int) -> np.ndarray:
    """float64 [draws, units]: how often each unit came up when as many as there are were drawn with replacement."""
    picked = generator.integers(units, size=(draws, units)) + units * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * units).reshape(draws, units).astype(np.float64)


def _weighted_medians(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [draws]: np.median of the values, each repeated by its weight in the draw."""
    order = np.argsort(values, kind="stable")
    ascending, reached = values[order], np.cumsum(weights[:, order], axis=1)
    total = reached[:, -1:]
    low = (reached > (total - 1) // 2).argmax(axis=1)
    high = (reached > total // 2).argmax(axis=1)
    return (ascending[low] + ascending[high]) / 2


def interval(draws: np.ndarray, *, units: int, bounds: tuple[float, float] | None = None) -> tuple[float, float]:
    """The middle 95 % of the draws.

    Where all draws are equal (no hit at all, or nothing but hits) resampling knows no doubt, but a few units leave
    much: the interval is then as wide as `units` trials without an exception allow, 1 - 0.025^(1/units) to either side.

    Args:
        units: how many units were drawn from.
        bounds: of a metric that has them: (0, 1) for recall and MRR, (-1, 1) for their differences.
    """
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if bounds is not None and np.ptp(draws) == 0:
        doubt = 1 - ((1 - LEVEL) / 2) ** (1 / units)
        low, high = max(bounds[0], low - doubt), min(bounds[1], high + doubt)
    return float(low), float(high)


def units_that_differ(one: np.ndarray, other: np.ndarray, units: Sequence[str]) -> int:
    """How many units have a query whose value is not the same in both, float64 [queries] each."""
    return len(set(np.asarray(units, dtype=str)[one != other]))


def p_value(differences: np.ndarray, changed: int) -> float:
    """Two-sided probability of such a difference between equal models.

    Twice the share of draws on the other side of 0, the observed one counted among them; but never less than what a
    sign test could say of the `changed` units that differ at all: were the models equal, each would have fallen either
    way with even odds, so three units that all improved do so by luck one time in four.
    """
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, max(2 * (tail + 1) / (len(differences) + 1), 2.0 * 0.5**changed)))
