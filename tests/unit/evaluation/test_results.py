"""results.json: read as it was written, and refused with the file and the key where it is damaged."""

import copy
import json
import math

import pytest

from vlkit.errors import ArtifactError, QualityError
from vlkit.evaluation.results import (
    SCHEMA,
    ClassRow,
    CorruptedRecall,
    Corruption,
    Difference,
    Folds,
    Group,
    OneToOne,
    Results,
    Retention,
    Slice,
    result_suffix,
)
from vlkit.metrics import DIRECTIONS


def group_of(value):
    change = {"recall@1": Difference(0.25, 0.1, 0.5, 0.01)}
    interval = {"recall@1": (0.0, 1.0)}
    return Group(
        {"recall@1": value, "queries": 8, "gallery": 4},
        interval,
        {"recall@1": 8},
        {"recall@1": value - 0.25},
        interval,
        change,
        {"recall@1": 0.125},
        "better",
        "better: recall@1 +0.250",
    )


@pytest.fixture
def results():
    change = Difference(-0.125, -0.25, 0.0, 0.5)
    cell = CorruptedRecall(0.5, (0.25, 0.75), change, 0.25, (0.0, 0.5), change, change)
    both = {direction: {"recall@1": 0.5} for direction in DIRECTIONS}
    return Results(
        task="retrieval",
        model="first",
        data={"path": "/data", "split": "test", "fingerprint": "f", "limit": None, "rows": 8},
        groups={direction: group_of(0.5) for direction in DIRECTIONS},
        classes={"rust": ClassRow(3, 1, {"f1": 1.0}, {"f1": None})},
        one_to_one=OneToOne(8, 8, dict.fromkeys(DIRECTIONS, 1.0), both, both),
        folds=Folds(4, 2, both),
        slices={"words": {"up to 5": {"text_to_image": Slice(4, 4, None, 0.5, (0.25, 0.75))}}},
        shifts={"blur": Corruption("blurred", cell, cell)},
        retention=Retention({"path": "/guard", "fingerprint": "g"}, None, {d: group_of(0.75) for d in DIRECTIONS}),
    )


def test_results_are_read_as_they_were_written(results, tmp_path):
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results
    assert Results.read(tmp_path / "results-val.json") is None


def test_the_keys_of_the_file(results):
    written = results.to_dict()
    assert list(written)[:6] == ["schema", "task", "model", "data", "metrics", "intervals"]
    assert written["difference"]["text_to_image"]["recall@1"] == {
        "value": 0.25,
        "low": 0.1,
        "high": 0.5,
        "p_value": 0.01,
    }
    assert written["one_to_one"]["of"] == 8 and written["classes"]["rust"]["pictures"] == 1
    assert written["slices"]["words"]["up to 5"]["text_to_image"] == {
        "queries": 4,
        "units": 4,
        "gap": None,
        "recall@1": 0.5,
        "interval": [0.25, 0.75],
    }
    assert written["retention"]["metrics"]["image_to_text"]["recall@1"] == 0.75


def test_a_number_that_is_not_finite_is_null_and_back(results, tmp_path):
    results.groups["text_to_image"].metrics["recall@1"] = math.nan
    results.write(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["metrics"]["text_to_image"]["recall@1"] is None
    assert math.isnan(Results.read(tmp_path / "results.json").groups["text_to_image"].metrics["recall@1"])


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("metrics",), None, "metrics"),
        (("intervals", "image_to_text"), None, "intervals.image_to_text"),
        (("model",), "", "model"),
        (("metrics", "text_to_image", "recall@1"), "0.5", "metrics.recall@1"),
        (
            ("slices", "words", "up to 5", "text_to_image", "recall@1"),
            ...,
            "slices.words.up to 5.text_to_image.recall@1",
        ),
        (("shifts", "blur", "text_to_image"), ..., "shifts.blur.text_to_image"),
        (("classes", "rust"), [], "classes.rust"),
        (("retention", "intervals"), ..., "retention.intervals"),
        (("efficiency",), 3, "efficiency"),
    ],
)
def test_a_damaged_file_names_the_file_and_the_key(keys, value, named, results, tmp_path):
    raw = copy.deepcopy(json.loads(json.dumps(results.to_dict())))
    *outer, last = keys
    holder = raw
    for key in outer:
        holder = holder[key]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    path = tmp_path / "results.json"
    with pytest.raises(ArtifactError) as refused:
        Results.from_dict(raw, path)
    assert refused.value.exit_code == 6
    assert str(path) in refused.value.message and named in refused.value.message


def test_another_schema_is_refused(results, tmp_path):
    with pytest.raises(ArtifactError, match=f"reads {SCHEMA}"):
        Results.from_dict(results.to_dict() | {"schema": 99}, tmp_path / "results.json")


def test_a_demand_that_is_missed_names_the_metric(results):
    results.check_fail_under([("text_to_image", "recall@1", 0.5)])
    with pytest.raises(QualityError, match=r"text_to_image\.recall@1 is 0\.5000, 0\.6 was demanded"):
        results.check_fail_under([("text_to_image", "recall@1", 0.6)])
    with pytest.raises(QualityError, match="too few of these rows have classes"):
        results.check_fail_under([("classification", "accuracy", 0.1)])


def test_the_whole_test_split_has_no_suffix():
    assert [result_suffix("test", None), result_suffix("val", None), result_suffix("val", 9)] == [
        "",
        "-val",
        "-val-limit9",
    ]
