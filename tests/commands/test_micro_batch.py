"""--micro-batch: a run in micro-batches is the run."""

import json

import pytest


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_in_micro_batches_is_the_run(precision, prepared, vlkit, tmp_path):
    train = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", tmp_path, "--steps", 5)
    losses = []
    for name, flags in (("whole", ()), ("micro", ("--micro-batch", 5)), ("auto", ("--micro-batch", "auto"))):
        outcome = vlkit(*train, "--name", name, "--batch-size", 24, "--precision", precision, *flags)
        assert outcome.code == 0, outcome.err
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    tolerance = 1e-4 if precision == "fp32" else 0.02
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert losses[2] == losses[0]


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5", "007", "\u0663"])
def test_a_micro_batch_that_is_no_number_is_refused(value, prepared, vlkit):
    outcome = vlkit("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--micro-batch", value)
    assert outcome.code == 2 and "--micro-batch" in outcome.err
