"""train-retrieval and eval together: the run folder, resuming, repeating, measuring."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers import final_state
from safetensors.torch import load_file

from vlkit import checkpoints
from vlkit.metrics import metric_names
from vlkit.remote import file_sha256
from vlkit.training import train_retrieval


def train(vlkit, prepared, runs, name, *extra):
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", runs, "--name", name)
    return vlkit(*base, "--steps", 6, "--batch-size", 16, *extra)


def exported(run):
    return {path.name: file_sha256(path) for path in (run / "model").iterdir() if path.suffix == ".safetensors"}


def test_the_run_folder_holds_what_it_should(trained):
    actual = {path.name for path in trained.iterdir() if not path.name.startswith(".")}
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
    } <= actual
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
    assert final_state(trained.parent / "second") == final_state(trained)
    assert exported(trained.parent / "second") == exported(trained)


def test_workers_change_no_byte(trained, prepared, vlkit, tmp_path):
    assert train(vlkit, prepared, tmp_path, "w", "--workers", 2).code == 0
    assert final_state(tmp_path / "w") == final_state(trained)


def test_another_seed_is_another_run(trained, prepared, vlkit, tmp_path):
    train(vlkit, prepared, tmp_path, "s", "--seed", 7)
    assert final_state(tmp_path / "s")[1] != final_state(trained)[1]


class Killed(BaseException):
    """Stands for the process being gone."""


# More than an epoch (3 steps of 2 x 16 rows in 88), steep enough to move, dropout on, saves that miss the kill.
HARD = ("--grad-accum", 2, "--lr", 1e-2, "--warmup", 1, "--steps", 9, "--save-every", 4, "--eval-every", 5)
WAYS = {
    "full": HARD,
    "lora": (*HARD, "--tune", "lora", "--lora-dropout", 0.3),
    "fp16": (*HARD, "--tune", "lora", "--precision", "fp16"),
}


@pytest.fixture(scope="module")
def uninterrupted(prepared, vlkit, tmp_path_factory):
    """The runs that a stopped one is compared with, each trained once."""
    done = {}

    def run(way):
        if way not in done:
            folder = tmp_path_factory.mktemp(way)
            outcome = train(vlkit, prepared, folder, "whole", *WAYS[way])
            assert outcome.code == 0, outcome.err
            done[way] = folder / "whole"
        return done[way]

    return run


@pytest.mark.parametrize(("way", "after"), [("full", 1), ("full", 5), ("full", 7), ("lora", 6), ("fp16", 6)])
def test_a_stopped_run_goes_on_to_the_same_bytes(way, after, uninterrupted, prepared, vlkit, tmp_path, monkeypatch):
    real = train_retrieval.steps

    def stopping(*args, **settings):
        yield from itertools.islice(real(*args, **settings), after)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(train_retrieval, "steps", stopping)
        with pytest.raises(Killed):
            train(vlkit, prepared, tmp_path, "k", *WAYS[way])
    assert not (tmp_path / "k/finished.json").exists()
    with (tmp_path / "k/metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 5, "val": {"text_to_image": {"recall@1": 0.5}'
        )  # Torn by the kill, and it ends in a brace.
    outcome = train(vlkit, prepared, tmp_path, "k", *WAYS[way])
    assert outcome.code == 0, outcome.err
    assert final_state(tmp_path / "k") == final_state(uninterrupted(way))
    best = [json.loads((run / "best.json").read_text()) for run in (tmp_path / "k", uninterrupted(way))]
    assert best[0] == best[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_the_step_at_hand_and_the_command_goes_on(number, uninterrupted, prepared, vlkit, tmp_path):
    """A real signal to a real process, in mid-training."""
    arguments = ("--data", prepared, "--model", "tiny-siglip", "--runs-dir", tmp_path, "--name", "s")
    options = ("--steps", 6, "--batch-size", 16, *WAYS["full"], "--steps", 2000)
    program = [sys.executable, "-m", "vlkit", "train-retrieval", *map(str, (*arguments, *options))]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "s/metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(number)
    report = process.communicate(timeout=60)[1]
    assert process.returncode == 75, report
    assert "run the same command again" in report
    last = json.loads((tmp_path / "s/last.json").read_text())["step"]
    assert last == final_state(tmp_path / "s")[2][-1][0]
    assert not (tmp_path / "s/finished.json").exists()


def test_other_data_under_the_same_name_is_refused(prepared, raw, vlkit, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "data")
    real = train_retrieval.steps

    def stopping(*args, **settings):
        yield from itertools.islice(real(*args, **settings), 3)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(train_retrieval, "steps", stopping)
        with pytest.raises(Killed):
            train(vlkit, tmp_path / "data", tmp_path, "d", "--save-every", 2)
    vlkit("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "data", "--seed", 7)
    outcome = train(vlkit, tmp_path / "data", tmp_path, "d", "--save-every", 2)
    assert (outcome.code, "data fingerprint was" in outcome.err) == (2, True)


def test_a_refused_setting_does_not_block_the_name(prepared, vlkit, tmp_path):
    assert train(vlkit, prepared, tmp_path, "u", "--tune", "last", "--unfreeze-layers", 9).code == 2
    assert not (tmp_path / "u").exists()
    assert train(vlkit, prepared, tmp_path, "u", "--tune", "last", "--unfreeze-layers", 1).code == 0


def test_training_that_explodes_exits_4(prepared, vlkit, tmp_path):
    outcome = train(vlkit, prepared, tmp_path, "nan", "--lr", 1e30, "--warmup", 0)
    assert (outcome.code, "not finite" in outcome.err or "in a row" in outcome.err) == (4, True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_gone_is_named(workers, raw, vlkit, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    vlkit("prep", "--domain", "recipes", "--source", tmp_path / "raw", "--out", tmp_path / "data")
    shutil.rmtree(tmp_path / "raw/images")
    outcome = train(vlkit, tmp_path / "data", tmp_path, "g", "--workers", workers)
    assert (outcome.code, "no such image" in outcome.err, "run prep again" in outcome.err) == (3, True, True)
    assert "Traceback" not in outcome.err


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
    assert (outcome.code, "is not a run" in outcome.err) == (2, True)


def test_two_processes_on_one_run(prepared, vlkit, tmp_path):
    from vlkit.runs import Run

    with Run(tmp_path / "busy").lock():
        outcome = train(vlkit, prepared, tmp_path, "busy")
    assert outcome.code == 2
    assert "in use by process" in outcome.err
    assert train(vlkit, prepared, tmp_path, "busy").code == 0


def test_the_smoke_run(prepared, vlkit, tmp_path):
    """--limit below the default batch size: the batch shrinks to the data."""
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", tmp_path)
    assert vlkit(*base, "--name", "smoke", "--limit", 32, "--steps", 5).code == 0
    assert yaml.safe_load((tmp_path / "smoke/config.yaml").read_text())["batch_size"] == 32
    assert vlkit("eval", "--run", tmp_path / "smoke").code == 0
    whole = (tmp_path / "smoke/results.json").read_text()
    assert vlkit("eval", "--run", tmp_path / "smoke", "--limit", 8).code == 0
    assert (tmp_path / "smoke/results.json").read_text() == whole
    assert (tmp_path / "smoke/results-limit8.json").is_file()


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
    metrics = set(metric_names("text_to_image"))
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
    images, texts = read_pairs(prepared).split("test").match_sets()
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


def test_a_damaged_last_checkpoint_costs_only_its_steps(uninterrupted, vlkit, tmp_path):
    """The one before is taken, the damaged one is written anew, also where it is the one to export."""
    shutil.copytree(uninterrupted("full"), tmp_path / "hurt")
    config = yaml.safe_load((tmp_path / "hurt/config.yaml").read_text()) | {"runs_dir": str(tmp_path), "name": "hurt"}
    (tmp_path / "hurt/config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "hurt/finished.json").unlink()
    newest = checkpoints.list_checkpoints(tmp_path / "hurt/checkpoints")[-1]
    (newest / "state.json").write_text("{}")
    outcome = vlkit("train-retrieval", "--config", tmp_path / "hurt/config.yaml")
    assert outcome.code == 0, outcome.err
    assert newest.name in outcome.err
    assert final_state(tmp_path / "hurt") == final_state(uninterrupted("full"))
    assert checkpoints.read_verified(newest).step == 9


def test_an_evaluation_each_epoch_and_an_early_end(prepared, vlkit, tmp_path):
    """The best on validation is exported, and a run that was killed after its end finds the same."""
    train = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", tmp_path, "--name", "a")
    flags = ("--batch-size", 32, "--epochs", 40, "--lr", 1e-9, "--eval-every", 0, "--patience", 2)
    outcome = vlkit(*train, *flags, "--json")
    assert outcome.code == 0, outcome.err
    output = outcome.json()
    settings = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "val" in line]
    assert settings["eval_every"] == settings["steps"] // 40
    assert evaluated == [settings["eval_every"] * times for times in range(1, len(evaluated) + 1)]
    assert output["steps"] == evaluated[-1] < settings["steps"]
    assert output["steps"] == 3 * settings["eval_every"], "nothing moves at this rate"
    assert "without a better recall" in outcome.err
    (tmp_path / "a/finished.json").unlink()
    again = vlkit(*train, *flags, "--json").json()
    assert again["exported_step"] == output["exported_step"]


def test_patience_without_validation_is_refused(vlkit, tmp_path, raw):
    prep = ("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "data", "--val-share", 0)
    assert vlkit(*prep).code == 0
    outcome = vlkit("train-retrieval", "--data", tmp_path / "data", "--model", "tiny-siglip", "--patience", 2)
    assert outcome.code == 2 and "no validation rows" in outcome.err


def test_a_batch_of_a_preset_shrinks_to_the_data_also_with_init_from(trained, prepared, vlkit, tmp_path):
    """The settings are rebuilt with the run's model; the batch that nobody gave is still not taken for given."""
    few = ("train-retrieval", "--data", prepared, "--init-from", trained, "--runs-dir", tmp_path, "--limit", 30)
    outcome = vlkit(*few, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["settings"]["batch_size"] < 64
    values = vlkit(*few, "--batch-size", 64, "--dry-run")
    assert (values.code, "--batch-size 64" in values.err) == (2, True)


def test_settings_without_effect_are_refused(prepared, vlkit):
    idle = ("--tune", "full", "--lora-rank", 16, "--unfreeze-layers", 5)
    outcome = vlkit("train-retrieval", "--data", prepared, "--model", "tiny-siglip", *idle)
    assert outcome.code == 2
    assert all(flag in outcome.err for flag in ("--lora-rank 16", "--unfreeze-layers 5", "--tune full", "--tune lora"))


def test_the_snapshot_of_a_run_repeats_it_whatever_its_preset_said(trained, vlkit, tmp_path):
    """An older version recorded settings of a preset that have no effect."""
    text = (trained / "config.yaml").read_text().replace("unfreeze_layers: 2", "unfreeze_layers: 4")
    (tmp_path / "config.yaml").write_text(text)
    again = ("--config", tmp_path / "config.yaml", "--runs-dir", tmp_path, "--name", "again", "--dry-run", "--json")
    outcome = vlkit("train-retrieval", *again)
    assert outcome.code == 0, outcome.err
    assert "unfreeze_layers: 4" in text and outcome.json()["settings"]["unfreeze_layers"] == 2
