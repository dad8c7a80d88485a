"""train-retrieval and eval together: the run folder, resuming, repeating, measuring."""

import itertools
import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from vlkit import checkpoints
from vlkit.training import retrieval


def train(vlkit, prepared, runs, name, *extra):
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", runs, "--name", name)
    return vlkit(*base, "--steps", 6, "--batch-size", 16, *extra)


def weights(run):
    return {path.name: path.read_bytes() for path in (run / "model").iterdir() if path.suffix == ".safetensors"}


def test_the_run_folder_holds_what_it_should(trained):
    found = {path.name for path in trained.iterdir() if not path.name.startswith(".")}
    assert {
        "config.yaml",
        "environment.yaml",
        "metrics.jsonl",
        "checkpoints",
        "best.json",
        "last.json",
        "model",
        "base",
        "finished.json",
    } <= found
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert all("recall@1" in line["val"]["text_to_image"] for line in lines if "val" in line)
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    assert (settings["loss"], settings["precision"], settings["labels"]) == ("sigmoid", "fp32", "multi-positive")
    best = json.loads((trained / "best.json").read_text())
    keys = [[sum(d[m] for d in line["val"].values()) for m in ("recall@1", "mrr")] for line in lines if "val" in line]
    assert best["key"] == max(keys)
    assert (trained / best["checkpoint"] / "MANIFEST.json").is_file()


def test_the_snapshot_repeats_the_run_to_the_byte(trained, vlkit):
    outcome = vlkit("train-retrieval", "--config", trained / "config.yaml", "--name", "second")
    assert outcome.code == 0, outcome.err
    assert weights(trained.parent / "second") == weights(trained)


def test_workers_change_no_byte(trained, prepared, vlkit, tmp_path):
    assert train(vlkit, prepared, tmp_path, "w", "--workers", 2).code == 0
    assert weights(tmp_path / "w") == weights(trained)


def test_another_seed_is_another_run(trained, prepared, vlkit, tmp_path):
    train(vlkit, prepared, tmp_path, "s", "--seed", 7)
    assert weights(tmp_path / "s") != weights(trained)


class Killed(BaseException):
    """Stands for the process being gone."""


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bytes(after, trained, prepared, vlkit, tmp_path, monkeypatch):
    real = retrieval.steps

    def stopping(*args, **settings):
        yield from itertools.islice(real(*args, **settings), after)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(retrieval, "steps", stopping)
        with pytest.raises(Killed):
            train(vlkit, prepared, tmp_path, "k", "--save-every", 2)
    assert not (tmp_path / "k/finished.json").exists()
    outcome = train(vlkit, prepared, tmp_path, "k", "--save-every", 2)
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "k/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert weights(tmp_path / "k") == weights(trained)


def test_a_name_that_is_taken(trained, prepared, vlkit, tmp_path):
    outcome = train(vlkit, prepared, trained.parent, trained.name)
    assert (outcome.code, "is finished" in outcome.err, "vlkit eval" in outcome.err) == (2, True, True)
    shutil.copytree(trained, tmp_path / "open")
    (tmp_path / "open/finished.json").unlink()
    outcome = train(vlkit, prepared, tmp_path, "open", "--lr", 1e-3)
    assert (outcome.code, "lr was" in outcome.err) == (2, True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("x")
    outcome = train(vlkit, prepared, tmp_path, "foreign")
    assert (outcome.code, "is no run" in outcome.err) == (2, True)


def test_two_processes_on_one_run(prepared, vlkit, tmp_path):
    from vlkit.runs import Run

    with Run(tmp_path / "busy").locked():
        outcome = train(vlkit, prepared, tmp_path, "busy")
    assert outcome.code == 2
    assert "in use by process" in outcome.err
    assert train(vlkit, prepared, tmp_path, "busy").code == 0


def test_the_smoke_run(prepared, vlkit, tmp_path):
    """--limit below the default batch size: the batch shrinks to the data."""
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", tmp_path)
    assert vlkit(*base, "--name", "smoke", "--limit", 32, "--steps", 5).code == 0
    assert yaml.safe_load((tmp_path / "smoke/config.yaml").read_text())["batch_size"] == 32
    assert vlkit("eval", "--run", tmp_path / "smoke", "--limit", 8).code == 0


@pytest.mark.parametrize("labels", ["eye", "mask"])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_every_loss_and_labelling_trains(loss, labels, prepared, vlkit, tmp_path):
    outcome = train(vlkit, prepared, tmp_path, "x", "--loss", loss, "--labels", labels, "--grad-accum", 2)
    assert outcome.code == 0, outcome.err
    assert "accumulation shares no negatives" in outcome.err


def test_lora_trains_and_is_measured(prepared, vlkit, tmp_path):
    assert (
        train(vlkit, prepared, tmp_path, "lora", "--tune", "lora", "--precision", "bf16", "--deterministic").code == 0
    )
    saved = load_file(tmp_path / "lora/adapter/adapter_model.safetensors")
    assert saved
    assert all("encoder.layers" in name for name in saved)
    assert set(load_file(tmp_path / "lora/adapter/logit_parameters.safetensors")) == {"logit_scale", "logit_bias"}
    outcome = vlkit("eval", "--run", tmp_path / "lora", "--json")
    assert outcome.json()["efficiency"]["trainable_parameters"] == sum(p.numel() for p in saved.values()) + 2


def test_results_have_the_published_shape(trained, prepared, vlkit):
    outcome = vlkit("eval", "--run", trained, "--json")
    assert outcome.code == 0, outcome.err
    results = json.loads((trained / "results.json").read_text())
    assert results == outcome.json()
    assert (results["schema"], results["task"], results["data"]["split"]) == (1, "retrieval", "test")
    metrics = {"recall@1", "recall@5", "recall@10", "mrr", "median_rank", "mean_rank"}
    for direction, queries, gallery in (("text_to_image", 12, 12), ("image_to_text", 12, 12)):
        assert set(results["metrics"][direction]) == metrics | {"queries", "gallery"}
        assert set(results["baseline"][direction]) == metrics | {"queries", "gallery"}
        assert (results["metrics"][direction]["queries"], results["metrics"][direction]["gallery"]) == (
            queries,
            gallery,
        )
        assert set(results["intervals"][direction]) == set(results["difference"][direction]) == metrics
        for metric in metrics:
            low, high = results["intervals"][direction][metric]
            assert low <= results["metrics"][direction][metric] <= high
            assert set(results["difference"][direction][metric]) == {"value", "low", "high", "p_value"}
    assert results["efficiency"]["train_seconds"] > 0
    examples = json.loads((trained / "examples_top5.json").read_text())
    assert len(examples["text_to_image"]) == 12
    first = examples["text_to_image"][0]
    assert len(first["top5"]) == len(first["baseline_top5"]) == 5
    assert (first["rank"] == 1) == first["top5"][0]["hit"]


def test_a_hit_is_any_match_in_both_training_and_evaluation(trained, prepared, vlkit, tmp_path):
    """eval's hits, taken from its examples, are exactly the +1s of the label matrix."""
    from vlkit.data.labels import label_matrix
    from vlkit.data.pairs import read_pairs

    assert vlkit("eval", "--run", trained, "--out", tmp_path).code == 0
    examples = json.loads((tmp_path / "examples_top5.json").read_text())
    images, texts = read_pairs(prepared).of("test").match_sets()
    for example in examples["text_to_image"]:
        for shown in example["top5"]:
            label = label_matrix([images[shown["image_id"]]], [texts[example["text_id"]]], "multi-positive").item()
            assert (label == 1) == shown["hit"]


def test_a_model_as_it_is(prepared, tiny_folder, vlkit, tmp_path):
    outcome = vlkit(
        "eval", "--model", tiny_folder("tiny-clip"), "--data", prepared, "--out", tmp_path / "out", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json()["baseline"] == {}
    assert (tmp_path / "out/results.json").is_file()


def test_other_rows_land_beside_the_first(trained, raw, vlkit, tmp_path):
    vlkit("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "reseeded", "--seed", 5)
    assert vlkit("eval", "--run", trained, "--data", tmp_path / "reseeded").code == 0
    assert vlkit("eval", "--run", trained, "--split", "val").code == 0
    assert (trained / "results-reseeded.json").is_file()
    assert (trained / "results-val.json").is_file()


def test_a_damaged_last_checkpoint_costs_only_its_steps(trained, prepared, vlkit, tmp_path):
    shutil.copytree(trained, tmp_path / "hurt")
    config = yaml.safe_load((tmp_path / "hurt/config.yaml").read_text()) | {"runs_dir": str(tmp_path), "name": "hurt"}
    (tmp_path / "hurt/config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "hurt/finished.json").unlink()
    newest = checkpoints.listed(tmp_path / "hurt/checkpoints")[-1]
    (newest / "state.json").write_text("{}")
    outcome = vlkit("train-retrieval", "--config", tmp_path / "hurt/config.yaml")
    assert outcome.code == 0, outcome.err
    assert newest.name in outcome.err
    assert weights(tmp_path / "hurt") == weights(trained)
