"""Resampling against a plain loop, and what an interval must and must not say."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.evaluation.comparison import PerQueryMetrics, compare, verdict, verdict_label
from vlkit.evaluation.results import Difference
from vlkit.evaluation.statistics import interval, p_value, permutation_test, resample, weighted_median

RECALL = "recall@1"


def test_resampling_equals_repeating_the_queries():
    """Rebuild every draw by hand: repeat each unit's queries as often as it was drawn, take numpy's mean and median."""
    generator = np.random.default_rng(0)
    units = np.array([f"u{n}" for n in generator.integers(0, 8, 40)])
    values = generator.integers(1, 9, 40).astype(float)
    names = np.unique(units)
    # A mean per unit tells how often it was drawn: give each unit a huge number of its own.
    actual = resample(
        {"mean": values, "count": np.ones(40)}, {"median": weighted_median(values)}, units, draws=200, seed=3
    )
    picks = np.random.default_rng(3)
    for start in range(0, 200, 64):
        chosen = picks.integers(len(names), size=(min(64, 200 - start), len(names)))
        for offset, drawn in enumerate(chosen):
            rows = np.concatenate([np.flatnonzero(units == names[unit]) for unit in drawn])
            assert actual["mean"][start + offset] == pytest.approx(values[rows].mean())
            assert actual["median"][start + offset] == pytest.approx(np.median(values[rows]))
    assert actual["count"] == pytest.approx(np.ones(200))


def test_one_unit_has_no_spread():
    actual = resample({"x": np.array([0.0, 1.0])}, {}, ["a", "a"], draws=100, seed=0)
    assert interval(actual["x"], units=1) == (0.5, 0.5)


@pytest.mark.parametrize("units", [1, 5, 24, 240])
def test_no_hit_at_all_is_no_certainty(units):
    """Clopper and Pearson's exact bound for 0 of n: the share that gives no hit in n trials 2.5 % of the time."""
    low, high = interval(np.zeros(1000), units=units, bounds=(0, 1))
    assert (low, (1 - high) ** units) == (0, pytest.approx(0.025))
    low, high = interval(np.ones(1000), units=units, bounds=(0, 1))
    assert (low**units, high) == (pytest.approx(0.025), 1)
    low, high = interval(np.zeros(1000), units=units, bounds=(-1, 1))
    assert low == -high < 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_swapping_is_the_exact_permutation_test(seed, count):
    """Against scipy's, which goes through every way of swapping."""
    from scipy import stats

    generator = np.random.default_rng(seed)
    one, other = generator.integers(0, 4, (2, count)) / 4

    def statistic(a, b, axis):
        return (a - b).mean(axis=axis)

    flags = {"permutation_type": "samples", "n_resamples": np.inf, "alternative": "two-sided"}
    exact = stats.permutation_test((one, other), statistic, **flags).pvalue
    actual = permutation_test(one, other, [str(n) for n in range(count)], draws=20000, seed=0).p_value
    assert actual == pytest.approx(min(1.0, exact), abs=0.02)


@pytest.mark.parametrize("changed", [1, 2, 3, 4, 5, 6, 12])
def test_a_handful_of_units_proves_nothing_by_swapping_either(changed):
    """All of n units went from wrong to right, each with three queries: two of 2^n ways are as good."""
    units = np.repeat(np.arange(40), 3).astype(str)
    one = np.repeat(np.arange(40) < changed, 3).astype(float)
    actual = permutation_test(one, np.zeros(120), units, draws=20000, seed=0).p_value
    assert actual == pytest.approx(2 * 0.5**changed, abs=0.01)


@pytest.mark.parametrize("changed", [1, 2, 3, 4, 5, 6, 12])
def test_a_handful_of_units_proves_nothing(changed):
    """All of n units went from wrong to right: the sign test gives 2 / 2^n, and five units are not enough."""
    p = p_value(np.ones(2000), changed)
    assert p == pytest.approx(max(2 * 0.5**changed, 2 / 2001))
    report = verdict(Difference(1.0, 0.9, 1.0, p), changed, 0.1, RECALL)
    assert report.startswith("better") == (changed >= 6)


def called_different(trials, units, agreeing):
    """Share of pairs of equally good models that a verdict tells apart; `agreeing`: share of queries they share."""
    generator, names, called = np.random.default_rng(11), [str(n) for n in range(units)], 0
    for trial in range(trials):
        one, other = (generator.integers(0, 2, (2, units))).astype(float)
        other = np.where(generator.random(units) < agreeing, one, other)
        actual = compare(
            PerQueryMetrics({RECALL: one}), PerQueryMetrics({RECALL: other}), names, draws=1000, seed=trial
        )
        called += verdict_label(actual.difference[RECALL], RECALL) != "no difference"
    return called / trials


@pytest.mark.parametrize("agreeing", [0.0, 0.8])
def test_equal_models_are_rarely_called_different(agreeing):
    """Two models that are right by the toss of a coin, 200 units: at most 6 of 100 such pairs."""
    assert called_different(500, 200, agreeing) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("units", [20, 60, 200])
@pytest.mark.parametrize("agreeing", [0.0, 0.5, 0.9])
def test_equal_models_are_rarely_called_different_however_many_units(units, agreeing):
    assert called_different(2000, units, agreeing) <= 0.06


def test_queries_of_a_unit_widen_the_interval():
    """Ten copies of each query are no ten queries."""
    generator = np.random.default_rng(1)
    once = generator.integers(0, 2, 50).astype(float)
    tenfold, units = np.repeat(once, 10), np.repeat([str(n) for n in range(50)], 10)
    by_unit = interval(resample({"x": tenfold}, {}, units, draws=2000, seed=0)["x"], units=50)
    single = interval(resample({"x": once}, {}, [str(n) for n in range(50)], draws=2000, seed=0)["x"], units=50)
    assert by_unit[1] - by_unit[0] == pytest.approx(single[1] - single[0], rel=0.1)


def holds(trials, truth, queries):
    """How often the interval of 200 units, each of up to `queries` queries that go together, holds the true value."""
    generator, contents = np.random.default_rng(5), 0
    for trial in range(trials):
        unit_hits = (generator.random(200) < truth).astype(float)
        sizes = generator.integers(1, queries + 1, 200)
        units = np.repeat(np.arange(200), sizes).astype(str)
        draws = resample({"x": np.repeat(unit_hits, sizes)}, {}, units, draws=1000, seed=trial)["x"]
        low, high = interval(draws, units=200, bounds=(0, 1))
        contents += low <= truth <= high
    return contents / trials


@pytest.mark.parametrize("truth", [0.3, 0.5, 0.7])
def test_intervals_hold_the_truth(truth):
    """200 units: the 95 % interval holds the true value 92 to 98 times in 100."""
    assert 0.92 <= holds(500, truth, queries=1) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("truth", [0.3, 0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("queries", [1, 4])
def test_intervals_hold_the_truth_however_often_it_is_tried(truth, queries):
    assert 0.92 <= holds(2000, truth, queries) <= 0.98


def test_the_smallest_difference_is_about_what_can_be_shown():
    """Models whose true difference is twice that are told apart more often than not; at a quarter of it, rarely."""
    generator, units = np.random.default_rng(2), [str(n) for n in range(200)]

    def shown(apart):
        actual, smallest = 0, []
        for trial in range(100):
            one = (generator.random(200) < 0.5 + apart / 2).astype(float)
            other = (generator.random(200) < 0.5 - apart / 2).astype(float)
            report = compare(
                PerQueryMetrics({RECALL: one}), PerQueryMetrics({RECALL: other}), units, draws=1000, seed=trial
            )
            actual += verdict_label(report.difference[RECALL], RECALL) == "better"
            smallest.append(report.smallest_difference[RECALL])
        return actual / 100, np.mean(smallest)

    _, smallest = shown(0.1)
    assert shown(2 * smallest)[0] > 0.9 and shown(smallest / 4)[0] < 0.2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from([2, 5, 100]))
def test_a_verdict_does_not_contradict_itself(seed, units, steps):
    """What was not shown is no larger than what it would have taken; of fewer than six units none is."""
    generator, names = np.random.default_rng(seed), [str(n) for n in range(units)]
    one, other = generator.integers(0, steps, (2, units)) / (steps - 1)
    actual = compare(PerQueryMetrics({RECALL: one}), PerQueryMetrics({RECALL: other}), names, draws=1000, seed=0)
    between, smallest = actual.difference[RECALL], actual.smallest_difference[RECALL]
    report = verdict(between, units, smallest, RECALL)
    if units < 6:
        assert np.isnan(smallest) and report.endswith("so few can show none")
    elif report.startswith("no difference"):
        assert abs(between.value) <= smallest * 1.15 + 1e-9, report


def test_the_smallest_difference_of_models_that_agree_is_six_units():
    same = np.ones(20)
    actual = compare(
        PerQueryMetrics({RECALL: same}),
        PerQueryMetrics({RECALL: same}),
        [str(n) for n in range(20)],
        draws=1000,
        seed=0,
    )
    assert actual.smallest_difference[RECALL] == pytest.approx(0.3), "six of twenty, or the test of units sees nothing"


def test_a_p_value_is_never_nothing():
    """The observed difference is one of those that might have been."""
    assert (
        permutation_test(np.ones(60), np.zeros(60), [str(n) for n in range(60)], draws=999, seed=0).p_value >= 1 / 1000
    )


def test_the_interval_and_the_test_must_agree():
    unsure = Difference(0.1, -0.01, 0.2, 0.01)
    assert verdict_label(unsure, RECALL) == "no difference"
    assert verdict_label(replace(unsure, low=0.01, p_value=0.06), RECALL) == "no difference"
    assert verdict_label(replace(unsure, low=0.01), RECALL) == "better"
    assert verdict_label(replace(unsure, low=-0.2, high=-0.001), RECALL) == "worse"


def test_a_lower_rank_is_better():
    assert verdict_label(Difference(-3.0, -5.0, -1.0, 0.001), "median_rank") == "better"
    assert verdict_label(Difference(3.0, 1.0, 5.0, 0.001), "mean_rank") == "worse"


def test_ten_queries_a_unit_are_one_unit_of_doubt():
    actual = compare(
        PerQueryMetrics({RECALL: np.ones(100)}),
        None,
        np.repeat(np.arange(10), 10).astype(str).tolist(),
        draws=1000,
        seed=0,
    )
    assert actual.intervals[RECALL][0] ** 10 == pytest.approx(0.025) and actual.units[RECALL] == 10


def test_the_verdict_follows_the_interval():
    def said(low, high, p):
        return verdict(Difference((low + high) / 2, low, high, p), 50, 0.1, RECALL)

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


def test_what_it_would_have_taken_is_more_than_what_was_not_shown():
    """34 units, six up and none down but for two that went the other way: p 0.07 or so, and the next step would do."""
    one, other = np.zeros(34), np.zeros(34)
    one[:8], other[8:10] = 1, 1
    actual = compare(
        PerQueryMetrics({RECALL: one}),
        PerQueryMetrics({RECALL: other}),
        [str(n) for n in range(34)],
        draws=4000,
        seed=0,
    )
    between = actual.difference[RECALL]
    assert between.p_value > 0.05 and actual.smallest_difference[RECALL] > between.value + 1e-9


def test_an_interval_has_its_value_in_it_where_nearly_all_draws_are_equal():
    from vlkit.evaluation.retrieval.classification import ClassScores

    truth = np.eye(5)[np.arange(34) % 5]
    same = np.zeros((34, 5), np.float32)
    same[:, 2] = 1
    measured = ClassScores(same, truth.astype(bool), np.full(34, np.nan)).per_query_metrics()
    actual = compare(measured, None, [str(n) for n in range(34)], draws=1000, seed=0)
    for metric, value in actual.metrics.items():
        low, high = actual.intervals[metric]
        assert np.isnan(value) or low <= value <= high, metric
    low, high = actual.intervals["recall_macro"]
    assert high - low > 0.05, "34 pictures are no certainty"
