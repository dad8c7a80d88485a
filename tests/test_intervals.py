"""Resampling against a plain loop, and what an interval must and must not say."""

import numpy as np
import pytest

from vlkit.evaluation.evaluate import verdict
from vlkit.evaluation.intervals import interval, p_value, resample


def test_resampling_equals_repeating_the_queries():
    """Rebuild every draw by hand: repeat each unit's queries as often as it was drawn, take numpy's mean and median."""
    generator = np.random.default_rng(0)
    units = np.array([f"u{n}" for n in generator.integers(0, 8, 40)])
    values = generator.integers(1, 9, 40).astype(float)
    names = np.unique(units)
    # A mean per unit tells how often it was drawn: give each unit a huge number of its own.
    found = resample({"mean": values, "count": np.ones(40)}, {"median": values}, units, draws=200, seed=3)
    picks = np.random.default_rng(3)
    for start in range(0, 200, 64):
        chosen = picks.integers(len(names), size=(min(64, 200 - start), len(names)))
        for offset, drawn in enumerate(chosen):
            rows = np.concatenate([np.flatnonzero(units == names[unit]) for unit in drawn])
            assert found["mean"][start + offset] == pytest.approx(values[rows].mean())
            assert found["median"][start + offset] == pytest.approx(np.median(values[rows]))
    assert found["count"] == pytest.approx(np.ones(200))


def test_one_unit_has_no_spread():
    found = resample({"x": np.array([0.0, 1.0])}, {}, ["a", "a"], draws=100, seed=0)
    assert interval(found["x"]) == (0.5, 0.5)


def test_queries_of_a_unit_widen_the_interval():
    """Ten copies of each query are no ten queries."""
    generator = np.random.default_rng(1)
    once = generator.integers(0, 2, 50).astype(float)
    tenfold, units = np.repeat(once, 10), np.repeat([str(n) for n in range(50)], 10)
    by_unit = interval(resample({"x": tenfold}, {}, units, draws=2000, seed=0)["x"])
    single = interval(resample({"x": once}, {}, [str(n) for n in range(50)], draws=2000, seed=0)["x"])
    assert by_unit[1] - by_unit[0] == pytest.approx(single[1] - single[0], rel=0.1)


def test_intervals_hold_the_truth():
    """200 units, true value 0.4: the 95 % interval holds it about 95 times in 100."""
    generator = np.random.default_rng(5)
    held = 0
    for trial in range(300):
        low, high = interval(
            resample(
                {"x": (generator.random(200) < 0.4).astype(float)},
                {},
                [str(n) for n in range(200)],
                draws=1000,
                seed=trial,
            )["x"]
        )
        held += low <= 0.4 <= high
    assert 0.91 <= held / 300 <= 0.99


def test_the_verdict_follows_the_interval():
    assert verdict({"value": 0.3, "low": 0.2, "high": 0.4}, 50).startswith("better")
    assert verdict({"value": -0.3, "low": -0.4, "high": -0.2}, 50).startswith("worse")
    assert verdict({"value": 0.1, "low": -0.1, "high": 0.3}, 50).startswith("no difference that this test set can show")
    assert verdict({"value": 0.0, "low": 0.0, "high": 0.0}, 50).startswith("no difference")


def test_p_value_is_two_sided():
    draws = np.linspace(-1, 3, 1001)
    assert p_value(draws) == pytest.approx(0.5, abs=0.01)
    assert p_value(np.zeros(1000)) == 1.0
    assert p_value(np.ones(1999)) == pytest.approx(0.001)
