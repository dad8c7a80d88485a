"""Resampling against a plain loop, and what an interval must and must not say."""

import numpy as np
import pytest

from vlkit.evaluation.comparison import verdict
from vlkit.evaluation.intervals import interval, median_of, p_value, resample, units_that_differ


def test_resampling_equals_repeating_the_queries():
    """Rebuild every draw by hand: repeat each unit's queries as often as it was drawn, take numpy's mean and median."""
    generator = np.random.default_rng(0)
    units = np.array([f"u{n}" for n in generator.integers(0, 8, 40)])
    values = generator.integers(1, 9, 40).astype(float)
    names = np.unique(units)
    # A mean per unit tells how often it was drawn: give each unit a huge number of its own.
    found = resample({"mean": values, "count": np.ones(40)}, {"median": median_of(values)}, units, draws=200, seed=3)
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
    assert interval(found["x"], units=1) == (0.5, 0.5)


@pytest.mark.parametrize("units", [1, 5, 24, 240])
def test_no_hit_at_all_is_no_certainty(units):
    """Clopper and Pearson's exact bound for 0 of n: the share that gives no hit in n trials 2.5 % of the time."""
    low, high = interval(np.zeros(1000), units=units, bounds=(0, 1))
    assert (low, (1 - high) ** units) == (0, pytest.approx(0.025))
    low, high = interval(np.ones(1000), units=units, bounds=(0, 1))
    assert (low**units, high) == (pytest.approx(0.025), 1)
    low, high = interval(np.zeros(1000), units=units, bounds=(-1, 1))
    assert low == -high < 0


@pytest.mark.parametrize("changed", [1, 2, 3, 4, 5, 6, 12])
def test_a_handful_of_units_proves_nothing(changed):
    """All of n units went from wrong to right: the sign test gives 2 / 2^n, and five units are not enough."""
    p = p_value(np.ones(2000), changed)
    assert p == pytest.approx(max(2 * 0.5**changed, 2 / 2001))
    told = verdict({"value": 1.0, "low": 0.9, "high": 1.0, "p_value": p}, changed, 0.1)
    assert told.startswith("better") == (changed >= 6)


def test_equal_models_are_rarely_called_different():
    """Two models that are right by the toss of a coin, 60 units: at most 6 of 100 such pairs are called different."""
    generator = np.random.default_rng(11)
    units, called = [str(n) for n in range(60)], 0
    for trial in range(300):
        one, other = (generator.integers(0, 2, (2, 60))).astype(float)
        draws = resample({"a": one, "b": other}, {}, units, draws=1000, seed=trial)
        drawn = draws["a"] - draws["b"]
        low, high = interval(drawn, units=60, bounds=(-1, 1))
        p = p_value(drawn, units_that_differ(one, other, units))
        called += not verdict({"value": 0.0, "low": low, "high": high, "p_value": p}, 60, 0.1).startswith(
            "no difference"
        )
    assert called / 300 <= 0.08


def test_queries_of_a_unit_widen_the_interval():
    """Ten copies of each query are no ten queries."""
    generator = np.random.default_rng(1)
    once = generator.integers(0, 2, 50).astype(float)
    tenfold, units = np.repeat(once, 10), np.repeat([str(n) for n in range(50)], 10)
    by_unit = interval(resample({"x": tenfold}, {}, units, draws=2000, seed=0)["x"], units=50)
    single = interval(resample({"x": once}, {}, [str(n) for n in range(50)], draws=2000, seed=0)["x"], units=50)
    assert by_unit[1] - by_unit[0] == pytest.approx(single[1] - single[0], rel=0.1)


def test_intervals_hold_the_truth():
    """200 units, true value 0.4: the 95 % interval holds it about 95 times in 100."""
    generator = np.random.default_rng(5)
    held = 0
    for trial in range(300):
        hits = (generator.random(200) < 0.4).astype(float)
        draws = resample({"x": hits}, {}, [str(n) for n in range(200)], draws=1000, seed=trial)["x"]
        low, high = interval(draws, units=200, bounds=(0, 1))
        held += low <= 0.4 <= high
    assert 0.91 <= held / 300 <= 0.99


def test_the_verdict_follows_the_interval():
    def said(low, high, p):
        return verdict({"value": (low + high) / 2, "low": low, "high": high, "p_value": p}, 50, 0.1)

    assert said(0.2, 0.4, 0.001).startswith("better")
    assert said(-0.4, -0.2, 0.001).startswith("worse")
    assert said(-0.1, 0.3, 0.4).startswith("no difference that this test set can show")
    assert said(0.1, 0.3, 0.2).startswith("no difference")
    assert said(0.0, 0.0, 1.0).startswith("no difference")


def test_p_value_is_two_sided():
    draws = np.linspace(-1, 3, 1001)
    assert p_value(draws, 100) == pytest.approx(0.5, abs=0.01)
    assert p_value(np.zeros(1000), 0) == 1.0
    assert p_value(np.ones(1999), 100) == pytest.approx(0.001)
