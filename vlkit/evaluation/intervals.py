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


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided: twice the share of draws on the other side of 0, the observed one counted among them."""
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(differences) + 1)))
