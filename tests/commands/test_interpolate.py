"""--interpolate and --guard: validation decides between the base and the tuned weights."""

import json

import pytest

from vlkit.models import loading
from vlkit.runs import Run
from vlkit.training.wise_ft import STRENGTHS


@pytest.fixture
def guard(vlkit, tmp_path):
    from helpers import write_class_folders

    write_class_folders(tmp_path / "leaves", per_class=6)
    out = tmp_path / "guard"
    assert vlkit("prep", "--domain", "agriculture", "--source", tmp_path / "leaves", "--out", out).code == 0
    return out


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_run_exports_the_best_of_the_sweep(tune, prepared, trained, guard, vlkit, tmp_path):
    """Every point's validation is that of the model it stands for; what is exported is the one that is named."""
    base = ("train-retrieval", "--data", prepared, "--model", trained / "model", "--runs-dir", tmp_path, "--name", "i")
    flags = ("--tune", tune, "--steps", 5, "--batch-size", 16, "--lr", 2e-2, "--interpolate", "--guard", guard)
    outcome = vlkit(*base, *flags, "--json")
    assert outcome.code == 0, outcome.err
    content = json.loads((tmp_path / "i/interpolation.json").read_text())
    assert [point["strength"] for point in content["points"]] == list(STRENGTHS)
    assert outcome.json()["strength"] == content["strength"]
    remaining = next(point for point in content["points"] if point["strength"] == content["strength"])
    assert outcome.json()["validation"] == remaining["val"] and outcome.json()["retained"] == remaining["retained"]
    measured = vlkit("eval", "--run", tmp_path / "i", "--split", "val", "--json").json()
    ends = {"metrics": remaining, "baseline": content["points"][0]}
    for which, point in ends.items():
        for direction, metrics in measured[which].items():
            assert metrics["mrr"] == pytest.approx(point["val"][direction]["mrr"], abs=1e-6), (which, direction)
    elsewhere = vlkit("eval", "--run", tmp_path / "i", "--data", guard, "--json", "--out", tmp_path / "g").json()
    for direction, metrics in remaining["guard"].items():
        assert metrics["recall@1"] == pytest.approx(elsewhere["metrics"][direction]["recall@1"])
    assert content["points"][0]["retained"] == 1.0
    assert loading.load_model(str(tmp_path / "i")).source
    assert "strength" in (tmp_path / "i/README.md").read_text() and Run(tmp_path / "i").finished


def test_a_guard_alone_says_what_is_retained_and_chooses_nothing(prepared, trained, guard, vlkit, tmp_path):
    base = ("train-retrieval", "--data", prepared, "--model", trained / "model", "--runs-dir", tmp_path)
    flags = ("--steps", 3, "--batch-size", 16, "--lr", 1e-2)
    output = vlkit(*base, "--name", "g", *flags, "--guard", guard, "--json").json()
    plain = vlkit(*base, "--name", "p", *flags, "--json").json()
    assert output["strength"] == 1.0 and output["retained"] >= 0 and output["validation"] == plain["validation"]
    refused = vlkit(*base, "--name", "x", *flags, "--guard", tmp_path / "nowhere")
    assert refused.code == 3 and not (tmp_path / "x").exists()
