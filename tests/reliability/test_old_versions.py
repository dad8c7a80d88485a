"""What an earlier version wrote still resumes, evaluates and searches.

`tests/data/old-versions.tar.xz` holds raw images, a prepared folder, runs and an index, written in the folder
/vlkit-old by the code of commit e5979c5 with one thread on an AVX512 CPU: `full` (train-retrieval, 6 steps),
`unfinished` (the same, killed after its checkpoint of step 3), `lora`, `captions` (train-fusion), and what search and
caption answered then.
"""

import json
import platform
import re
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import ROOT, read_metrics, rewrite_manifest
from safetensors.torch import load_file

from vlkit.remote import file_sha256

ARCHIVE = ROOT / "tests/data/old-versions.tar.xz"
WRITTEN_IN = "/vlkit-old"
TRAIN = (
    *(
        "train-retrieval",
        "--data",
        "data",
        "--model",
        "models/siglip",
        "--steps",
        6,
        "--batch-size",
        16,
        "--lr",
        "1e-2",
    ),
    *("--warmup", 1, "--save-every", 3, "--eval-every", 6, "--keep", 1, "--precision", "fp32", "--cache", "off"),
)
AFTER_8_STEPS = "fbd402f6adc4e16e1c4a60b8ee676a1142270d60a896e612f8ec352a9150520e"
# The norms of some of its weights, and the losses of the steps to it. Of each are five digits the same on other CPUs.
NORMS_AFTER_8_STEPS = {
    "logit_scale": 2.31001,
    "logit_bias": 9.94686,
    "text_model.embeddings.token_embedding.weight": 7.1758,
    "text_model.head.weight": 2.58072,
    "vision_model.embeddings.patch_embedding.weight": 3.4575,
    "vision_model.head.mlp.fc1.weight": 3.54232,
}
LOSSES = {7: 5.397594, 8: 4.259397}
# Another CPU or torch sums in another order, and gives other last bits.
SAME_MACHINE = (
    torch.__version__.split("+")[0] == "2.13.0"
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and platform.machine() == "x86_64"
    and "AMD" in Path("/proc/cpuinfo").read_text()
)


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The unpacked folder, which is the working directory; its text files name it in place of the old one."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in sorted(tmp_path.rglob("*")):
        if path.suffix in (".json", ".jsonl", ".yaml", ".md"):
            path.write_text(path.read_text(encoding="utf-8").replace(WRITTEN_IN, str(tmp_path)), encoding="utf-8")
    rewrite_manifest(tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without_times(value):
    """Return results without what differs from run to run: durations, dates, versions."""
    if isinstance(value, dict):
        passing = re.compile("second|latency|memory|time|date|version|commit|command|python|parameters_per")
        return {key: without_times(item) for key, item in value.items() if not passing.search(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_equal(actual, expected, where=""):
    """Compare results, numbers to 1e-5 of their size."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal(actual[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for number, value in enumerate(expected):
            assert_equal(actual[number], value, f"{where}/{number}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True), where
    else:
        assert actual == expected, where


def assert_same_weights(path, expected):
    ours, theirs = load_file(path), load_file(expected)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, atol=1e-4), key


def test_an_unfinished_run_goes_on_to_the_same_weights(old, vlkit):
    outcome = vlkit(*TRAIN, "--name", "unfinished")
    assert outcome.code == 0 and "step 3" in outcome.err, outcome.err
    model, expected = (old / f"runs/{name}/model/model.safetensors" for name in ("unfinished", "full"))
    assert_same_weights(model, expected)
    assert not SAME_MACHINE or file_sha256(model) == file_sha256(expected)
    losses = [
        [
            (line["step"], line["loss"])
            for line in map(json.loads, (old / f"runs/{name}/metrics.jsonl").open())
            if "loss" in line
        ]
        for name in ("unfinished", "full")
    ]
    assert_equal([list(pair) for pair in losses[0]], [list(pair) for pair in losses[1]])


def test_a_finished_run_is_extended(old, vlkit):
    outcome = vlkit(*TRAIN, "--name", "full", "--extend-to", 8)
    assert outcome.code == 0, outcome.err
    weights = old / "runs/full/checkpoints/step-000008/trainable.safetensors"
    assert not SAME_MACHINE or file_sha256(weights) == AFTER_8_STEPS
    tensors = load_file(weights)
    norms = {name: tensors[name].norm().item() for name in NORMS_AFTER_8_STEPS}
    assert norms == pytest.approx(NORMS_AFTER_8_STEPS, rel=1e-4)
    losses = {line["step"]: line["loss"] for line in read_metrics(old / "runs/full") if "loss" in line}
    assert {step: losses[step] for step in LOSSES} == pytest.approx(LOSSES, rel=1e-4)


@pytest.mark.parametrize("run", ["full", "lora", "captions"])
def test_a_run_evaluates_to_the_same_numbers(run, old, vlkit):
    expected = without_times(json.loads((old / f"runs/{run}/results.json").read_text()))
    captions = old / f"runs/{run}/captions.json"
    before = json.loads(captions.read_text()) if run == "captions" else None
    # What is compared below must be what eval writes now.
    (old / f"runs/{run}/results.json").unlink()
    captions.unlink(missing_ok=before is None)
    outcome = vlkit("eval", "--run", f"runs/{run}")
    assert outcome.code == 0, outcome.err
    assert_equal(without_times(json.loads((old / f"runs/{run}/results.json").read_text())), expected)
    assert before is None or json.loads(captions.read_text()) == before


def test_a_captioner_writes_the_same_captions(old, vlkit):
    before = [json.loads(line) for line in (old / "captions.json").read_text().splitlines()]
    outcome = vlkit("caption", "--run", "runs/captions", "raw/images", "--limit", 6, "--out", "again.json")
    assert outcome.code == 0, outcome.err
    after = [json.loads(line) for line in (old / "again.json").read_text().splitlines()]
    assert [Path(line["image"]).name for line in after[1:]] == [Path(line["image"]).name for line in before[1:]]
    assert [line["caption"] for line in after[1:]] == [line["caption"] for line in before[1:]]
    (old / "captions.json").unlink()
    again = vlkit("caption", "--run", "runs/captions", "raw/images", "--limit", 6, "--out", "captions.json", "--json")
    assert again.code == 0, again.err
    assert (old / "captions.json").read_text().splitlines() == [json.dumps(line, ensure_ascii=False) for line in before]


def test_an_index_gives_the_same_hits_and_is_up_to_date(old, vlkit):
    before = json.loads((old / "search.json").read_text())["queries"][0]
    outcome = vlkit("search", "--index", "index", "red soup", "--json")
    assert outcome.code == 0, outcome.err
    after = outcome.json()["queries"][0]
    for kind in ("texts", "images"):
        assert [hit["id"] for hit in after[kind]] == [hit["id"] for hit in before[kind]]
        assert_equal([hit["score"] for hit in after[kind]], [hit["score"] for hit in before[kind]])
    outcome = vlkit("index", "--run", "runs/full", "--data", "data", "--out", "index", "--json")
    assert outcome.code == 0, outcome.err
    assert len(pd.read_parquet(old / "index/docstore.parquet")) == 144


def test_a_prepared_folder_is_what_prep_makes_today(old, vlkit):
    before = pd.read_parquet(old / "data/pairs.parquet")
    outcome = vlkit("prep", "--domain", "recipes", "--source", "raw", "--out", "again", "--copy-images")
    assert outcome.code == 0, outcome.err
    pd.testing.assert_frame_equal(pd.read_parquet(old / "again/pairs.parquet"), before)
