"""Slices: which query is in which, and a gap that equals one computed by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from vlkit.errors import UsageError
from vlkit.evaluation.json_codec import encode
from vlkit.evaluation.retrieval.classification import Classes
from vlkit.evaluation.retrieval.ranking import rank
from vlkit.evaluation.retrieval.slices import LEAST_UNITS, Slicing, compare_slices, make_slicings, script
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalScores, RetrievalTask


def test_a_text_has_the_script_of_most_of_its_letters():
    assert script("a photo of rust") == "Latin"
    assert script("کیک شکلاتی با 3 stars") == "Arabic"
    assert script("помидор") == "Cyrillic"
    assert script("番茄叶") == "Han"
    assert script("12, 34!") is None


def scores_of(hits):
    """Scores whose recall@1 both ways is `hits`: the gallery is the identity, a miss points to its neighbour."""
    count = len(hits)
    eye = torch.eye(count)
    asking = torch.stack([eye[n] if hit else eye[(n + 1) % count] for n, hit in enumerate(hits)])
    names = [str(n) for n in range(count)]
    ranks = rank(asking, eye, names, names)
    return RetrievalScores({"text_to_image": ranks, "image_to_text": ranks})


def slices_as_json(*args, **settings):
    return encode(compare_slices(*args, **settings))


def task_of(count, **columns):
    frame = pd.DataFrame(
        {
            "image": [f"{n}.png" for n in range(count)],
            "image_id": [f"i{n}" for n in range(count)],
            "text": [f"text {n}" for n in range(count)],
            "text_id": [f"t{n}" for n in range(count)],
            "image_group": [str(n) for n in range(count)],
            "text_group": [str(n) for n in range(count)],
            "unit": [f"u{n // 2}" for n in range(count)],
            "class_name": [None] * count,
            "split": ["test"] * count,
            "origin": ["original"] * count,
            "match": [1] * count,
            **columns,
        }
    )
    from vlkit.data.pairs import Pairs
    from vlkit.storage import Location

    return RetrievalTask.from_pairs(Pairs(frame, Location(".")))


def test_a_gap_is_the_slice_less_the_rest_over_the_same_draws():
    generator = np.random.default_rng(0)
    hits = generator.random(40) < np.where(np.arange(40) < 16, 0.3, 0.8)
    task = task_of(40)
    cut = Slicing("half", "text_to_image", ["a"] * 16 + ["b"] * 24)
    actual = slices_as_json([cut], scores_of(hits), None, task, draws=2000, seed=5)["half"]["a"]["text_to_image"]
    assert (actual["queries"], actual["units"]) == (16, 8)
    assert actual["recall@1"] == pytest.approx(hits[:16].mean())
    assert actual["gap"]["value"] == pytest.approx(hits[:16].mean() - hits[16:].mean())
    units, gaps, means = np.arange(40) // 2, [], []
    picks = np.random.default_rng(17)
    for _ in range(3000):
        drawn = np.concatenate([np.flatnonzero(units == unit) for unit in picks.integers(20, size=20)])
        inside = drawn < 16
        if inside.any() and (~inside).any():
            means.append(hits[drawn[inside]].mean())
            gaps.append(means[-1] - hits[drawn[~inside]].mean())
    assert (actual["gap"]["low"], actual["gap"]["high"]) == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=0.04)
    assert actual["interval"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.04)


def test_few_units_have_no_gap():
    few = 2 * (LEAST_UNITS - 1)
    cut = Slicing("tail", "image_to_text", ["few"] * few + ["many"] * (40 - few))
    actual = slices_as_json([cut], scores_of([True] * 40), None, task_of(40), draws=1000, seed=0)["tail"]
    assert actual["few"]["image_to_text"]["gap"] is None and actual["many"]["image_to_text"]["gap"] is None
    low, high = actual["few"]["image_to_text"]["interval"]
    assert high == 1 and low < 0.6, "four units are no certainty"


def test_the_two_models_are_compared_within_the_slice():
    cut = Slicing("half", "text_to_image", ["a"] * 20 + ["b"] * 20)
    tuned, base = scores_of([True] * 20 + [False] * 20), scores_of([False] * 40)
    actual = slices_as_json([cut], tuned, base, task_of(40), draws=4000, seed=0)["half"]
    assert actual["a"]["text_to_image"]["difference"]["value"] == 1
    assert actual["a"]["text_to_image"]["difference"]["p_value"] == pytest.approx(2 * 0.5**10, abs=1e-3)
    assert actual["b"]["text_to_image"]["difference"]["value"] == 0
    assert actual["b"]["text_to_image"]["difference"]["p_value"] == 1


def labels(actual, name, direction):
    return next(item.labels for item in actual if (item.name, item.direction) == (name, direction))


def test_every_usual_slicing():
    """Light, size, words, script, rare classes; and a column, whose value must be the query's own."""
    task = task_of(
        6,
        text=["one two", "three four five six seven eight", "word " * 20, "سلام", "five", "six"],
        width=[20, 40, 20, 40, 20, 40],
        height=[400, 40, 400, 40, 400, 40],
        text_id=["t0", "t1", "t2", "t3", "t4", "t4"],
        site=["leg", "arm", "leg", None, "arm", "leg"],
        age=[1, 2, 3, 4, 5, 6],
        class_name=["rust", "scab", "rust", "scab", "rust", "scab"],
        image_group=["rust", "scab"] * 3,
    )
    light = np.array([10, 200, 63.9, 64.0, np.nan, 90])
    embedded = Embeddings(torch.eye(6), torch.eye(5), light, 1.0, 1.0)
    classes = Classes(["rust", "scab"], np.zeros((6, 2), bool), np.array([49, 50]), [])
    actual = make_slicings(task, embedded, task.pairs, classes, 32, ("site", "age"))
    assert labels(actual, "light", "image_to_text") == ["low light", "normal", "low light", "normal", None, "normal"]
    assert labels(actual, "shorter side", "image_to_text") == ["below 32 pixels", "32 and more"] * 3
    assert labels(actual, "words", "text_to_image") == ["up to 5", "6 to 15", "more than 15", "up to 5", "up to 5"]
    assert labels(actual, "script", "text_to_image") == ["Latin", "Latin", "Latin", "Arabic", "Latin"]
    rare = "rare (below 50 training pictures)"
    assert labels(actual, "class size", "image_to_text") == [rare, "common"] * 3
    assert labels(actual, "class size", "text_to_image") == [rare, "common", rare, "common", rare]
    assert labels(actual, "site", "image_to_text") == ["leg", "arm", "leg", None, "arm", "leg"]
    assert labels(actual, "site", "text_to_image") == ["leg", "arm", "leg", None, "(several)"]
    with pytest.raises(UsageError, match="no such column") as refused:
        make_slicings(task, embedded, task.pairs, classes, 32, ("sites",))
    assert "site" in refused.value.hint


def test_many_numbers_are_cut_into_quarters_and_many_names_to_the_commonest():
    count = 60
    task = task_of(count, age=list(range(count)), city=[f"c{n % 20}" if n > 20 else "Hue" for n in range(count)])
    embedded = Embeddings(torch.eye(count), torch.eye(count), np.full(count, np.nan), 1.0, 1.0)
    actual = make_slicings(task, embedded, task.pairs, None, 32, ("age", "city"))
    ages = labels(actual, "age", "image_to_text")
    assert [ages.count(name) for name in dict.fromkeys(ages)] == [15] * 4
    cities = labels(actual, "city", "image_to_text")
    assert cities.count("Hue") == 21 and "(other)" in cities and len(set(cities)) == 12


def cut_by(count, **columns):
    task = task_of(count, **columns)
    embedded = Embeddings(torch.eye(count), torch.eye(count), np.linspace(0, 200, count), 1.0, 1.0)
    return make_slicings(task, embedded, task.pairs, None, 32, tuple(columns))


def test_a_column_called_like_a_usual_slicing_stays_its_own():
    actual = cut_by(20, light=["normal", "off"] * 10)
    assert set(labels(actual, "light", "image_to_text")) == {"low light", "normal"}
    assert set(labels(actual, "light (column)", "image_to_text")) == {"normal", "off"}


def test_quarters_have_ends_that_can_be_read():
    seconds = [1_700_000_000 + 60 * n for n in range(40)]
    assert labels(cut_by(40, age=list(range(1, 41))), "age", "image_to_text")[0] == "1 to 10"
    actual = labels(cut_by(40, taken=seconds), "taken", "image_to_text")
    assert actual[0] == f"{seconds[0]} to {seconds[9]}" and len(set(actual)) == 4
    days = pd.date_range("2024-01-01", periods=40)
    assert labels(cut_by(40, day=days), "day", "image_to_text")[-1] == "2024-01-31 to 2024-02-09"
    mixed = [True, False] * 20
    assert set(labels(cut_by(40, flash=mixed), "flash", "image_to_text")) == {"True", "False"}


def test_cells_of_several_values_are_refused():
    with pytest.raises(UsageError, match="several values"):
        cut_by(4, image_group=[["a", "b"], ["a"], ["b"], ["c"]])


def test_the_rest_is_what_is_in_another_slice():
    """Queries in no slice at all belong to neither side; a difference lies within its ends."""
    hits = [True] * 12 + [False] * 12 + [True] * 16
    cut = Slicing("third", "image_to_text", ["a"] * 12 + ["b"] * 12 + [None] * 16)
    actual = slices_as_json([cut], scores_of(hits), scores_of([False] * 40), task_of(40), draws=1000, seed=0)["third"]
    assert actual["a"]["image_to_text"]["gap"]["value"] == 1
    assert actual["b"]["image_to_text"]["gap"]["value"] == -1
    apart = actual["a"]["image_to_text"]["difference"]
    assert apart["low"] <= apart["value"] <= apart["high"] and apart["value"] == 1


def test_no_hit_in_a_small_slice_is_no_sure_gap():
    """0 of 5 against 5 of 19: Fisher's exact test gives 0.54, and so the gap's interval holds 0."""
    hits = [False] * 5 + [True] * 5 + [False] * 14
    cut = Slicing("few", "image_to_text", ["a"] * 5 + ["b"] * 19)
    task = task_of(24, unit=[str(n) for n in range(24)])
    actual = slices_as_json([cut], scores_of(hits), None, task, draws=2000, seed=0)["few"]["a"]["image_to_text"]["gap"]
    assert actual["low"] < actual["value"] < 0 < actual["high"]


def test_a_column_of_ones_own_values_makes_no_slices():
    actual = cut_by(40, patient=[f"p{n}" for n in range(40)])
    assert "patient" not in {item.name for item in actual}


def test_a_usual_slicing_may_be_asked_for_by_name():
    task = task_of(6)
    embedded = Embeddings(torch.eye(6), torch.eye(6), np.linspace(0, 200, 6), 1.0, 1.0)
    assert {item.name for item in make_slicings(task, embedded, task.pairs, None, 32, ("light",))} == {"light"}
