"""eval as a whole: what is measured besides ranks, what is paid once, what is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import write_image, write_recipes
from PIL import Image
from safetensors.torch import load_file, save_file

from vlkit.data.pairs import read_pairs
from vlkit.distributed import SINGLE
from vlkit.evaluation.formatting import retention_sentence
from vlkit.evaluation.json_codec import encode
from vlkit.evaluation.retrieval.one_to_one import choose_fold_size, fold_metrics
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalTask, embed_task, rank_task
from vlkit.metrics import DIRECTIONS, demandable_names


def results_of(vlkit, *flags):
    outcome = vlkit("eval", *flags, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json()


def test_the_untouched_model_is_paid_once(trained, vlkit, tmp_path, monkeypatch):
    """The second evaluation, and that of another run on the same rows, opens not one picture for it."""
    first = results_of(vlkit, "--run", trained, "--out", tmp_path / "a", "--cache", tmp_path / "cache")
    remaining = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name.split("-")[0] for name in remaining] == ["pictures", "texts"]
    from vlkit.data.images import decode

    opened = []
    real = decode.load_pixels
    monkeypatch.setattr(decode, "load_pixels", lambda path, spec: opened.append(path) or real(path, spec))
    again = results_of(vlkit, "--run", trained, "--out", tmp_path / "b", "--cache", tmp_path / "cache")
    assert len(opened) == 12, "the tuned model's, and no more"
    without = results_of(vlkit, "--run", trained, "--out", tmp_path / "c", "--cache", "off")
    assert len(opened) == 36
    assert first["baseline"] == again["baseline"]
    for direction in DIRECTIONS:
        for metric in demandable_names(direction):
            assert without["baseline"][direction][metric] == pytest.approx(first["baseline"][direction][metric])


def test_another_picture_under_the_same_name_is_embedded_anew(raw, vlkit, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    vlkit("prep", "--domain", "recipes", "--source", tmp_path / "raw", "--out", tmp_path / "data")
    model = ("--model", "tiny-siglip", "--data", tmp_path / "data")
    train = ("train-retrieval", *model, "--runs-dir", tmp_path, "--name", "r", "--steps", 2, "--batch-size", 8)
    assert vlkit(*train).code == 0
    before = results_of(vlkit, "--run", tmp_path / "r", "--cache", tmp_path / "cache")
    rows = read_pairs(tmp_path / "data").split("test")
    for number, path in enumerate(rows.image_paths(rows.unique_images())):
        write_image(path, (number * 20, 0, 0), seed=number)
    after = results_of(vlkit, "--run", tmp_path / "r", "--cache", tmp_path / "cache")
    assert before["baseline"] != after["baseline"]


def test_the_recipes_of_a_run_have_every_number(trained, vlkit, tmp_path):
    actual = results_of(vlkit, "--run", trained, "--out", tmp_path)
    for part in ("metrics", "baseline"):
        for direction in DIRECTIONS:
            assert set(demandable_names(direction)) <= actual[part][direction].keys()
    assert set(demandable_names("classification")).isdisjoint(actual["metrics"]), "recipes have no classes"
    assert actual["efficiency"]["latency_ms"] <= actual["efficiency"]["latency_ms_p95"]
    assert actual["efficiency"]["train_peak_memory_process_gb"] > 0.1
    assert actual["efficiency"]["peak_memory_gpu_gb"] is None or torch.cuda.is_available()
    curve = actual["curves"]["text_to_image"]["tuned"]
    assert curve["recall"][curve["k"].index(1)] == pytest.approx(actual["metrics"]["text_to_image"]["recall@1"])
    assert sum(curve["ranks"]["queries"]) == actual["metrics"]["text_to_image"]["queries"]
    assert curve["ranks"]["to"][-1] >= actual["metrics"]["text_to_image"]["gallery"] and curve["recall"][-1] == 1


def test_queries_have_the_results_in_them(trained, vlkit, tmp_path):
    from vlkit.remote import file_sha256

    actual = results_of(vlkit, "--run", trained, "--out", tmp_path)
    frame = pd.read_parquet(tmp_path / actual["queries"]["file"])
    assert file_sha256(tmp_path / actual["queries"]["file"]) == actual["queries"]["hash"]
    for direction in DIRECTIONS:
        rows = frame[frame["direction"] == direction]
        for metric in ("recall@1", "recall@5", "recall@10", "mrr"):
            assert rows[metric].mean() == pytest.approx(actual["metrics"][direction][metric])
            assert rows[f"baseline_{metric}"].mean() == pytest.approx(actual["baseline"][direction][metric])
        assert ((rows["rank"] == 1) == rows["top5_hits"].map(lambda hits: hits[0])).all()


def embedded(images, texts):
    return Embeddings(images, texts, np.full(len(images), np.nan), 1.0, 1.0)


def task_of_captions(pictures, captions):
    from vlkit.data.pairs import Pairs, make_frame
    from vlkit.storage import Location

    rows = [(p, c) for p in range(pictures) for c in range(captions)]
    columns = {
        "image": [f"{p}.png" for p, _ in rows],
        "image_id": [f"i{p}" for p, _ in rows],
        "text": [f"caption {c} of {p}" for p, c in rows],
        "image_group": [str(p) for p, _ in rows],
        "unit": [str(p) for p, _ in rows],
        "class_name": [None] * len(rows),
        "split": ["test"] * len(rows),
    }
    return RetrievalTask.from_pairs(Pairs(make_frame(columns), Location(".")))


def test_folds_are_means_over_parts_that_are_ranked_alone(trained):
    """As COCO's 1k: five captions a picture, folds in the table's order."""
    task = task_of_captions(23, 5)
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(23, 8, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(
        images.repeat_interleave(5, 0) + torch.randn(115, 8, generator=generator), dim=1
    )
    actual = encode(fold_metrics(task, {"tuned": embedded(images, texts)}, 10, SINGLE))
    assert (actual["size"], actual["folds"]) == (10, 2)
    recalls = []
    for start in (0, 10):
        scores = (texts[start * 5 : (start + 10) * 5] @ images[start : start + 10].T).argmax(1)
        recalls.append((scores == torch.arange(10).repeat_interleave(5)).double().mean().item())
    assert actual["metrics"]["text_to_image"]["recall@1"] == pytest.approx(np.mean(recalls))
    whole = rank_task(task, embedded(images, texts)).metrics()
    assert actual["metrics"]["text_to_image"]["recall@1"] > whole["text_to_image"]["recall@1"], "smaller galleries"
    assert choose_fold_size(task, None) == 0 and choose_fold_size(task, 7) == 7
    assert (
        choose_fold_size(task_of_captions(2000, 2), None) == 1000
        and choose_fold_size(task_of_captions(2000, 1), None) == 0
    )


def test_shifts_and_the_guard_are_measured_for_both_models(trained, raw, vlkit, tmp_path):
    guard = tmp_path / "guard"
    vlkit("prep", "--domain", "recipes", "--source", raw, "--out", guard, "--seed", 9)
    flags = ("--shift", "low-light,jpeg", "--guard", guard, "--out", tmp_path / "out")
    actual = results_of(vlkit, "--run", trained, *flags)
    assert list(actual["shifts"]) == ["low-light", "jpeg"]
    for of in actual["shifts"].values():
        for direction in DIRECTIONS:
            cell, plain = of[direction], actual["metrics"][direction]["recall@1"]
            assert cell["change"]["value"] == pytest.approx(cell["recall@1"] - plain)
            before = actual["baseline"][direction]["recall@1"]
            assert cell["baseline_change"]["value"] == pytest.approx(cell["baseline"] - before)
            assert cell["difference"]["value"] == pytest.approx(cell["recall@1"] - cell["baseline"])
    there = results_of(vlkit, "--run", trained, "--data", guard, "--out", tmp_path / "there")
    for part in ("metrics", "baseline", "difference"):
        for direction in DIRECTIONS:
            assert actual["retention"][part][direction]["recall@1"] == there[part][direction]["recall@1"], part
    both = [np.mean([actual["retention"][part][d]["recall@1"] for d in DIRECTIONS]) for part in ("metrics", "baseline")]
    assert actual["retention"]["retained"] == (pytest.approx(both[0] / both[1]) if both[1] else None)


def test_a_missed_quality_exits_with_8_and_leaves_the_results(trained, vlkit, tmp_path):
    out = ("eval", "--run", trained, "--out", tmp_path)
    outcome = vlkit(*out, "--fail-under", "text_to_image.recall@10=0", "--fail-under", "image_to_text.mrr=0")
    assert outcome.code == 0, outcome.err
    outcome = vlkit(*out, "--fail-under", "text_to_image.mrr=1", "--json")
    assert outcome.code == 8 and "text_to_image.mrr is 0." in outcome.err and "1 was demanded" in outcome.err
    assert json.loads(outcome.out)["error"]["exit_code"] == 8
    assert (tmp_path / "results.json").is_file()
    outcome = vlkit(*out, "--fail-under", "classification.accuracy=0")
    assert outcome.code == 8 and "not measured" in outcome.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("text_to_image.recall@3=0.5", "did you mean"),
        ("text_to_images.recall@1=0.5", "did you mean 'text_to_image'"),
        ("text_to_image.recall@1", "a number must follow"),
        ("text_to_image.recall@1=50", "between 0 and 1"),
        ("text_to_image.median_rank=3", "unknown"),
    ],
)
def test_a_demand_that_cannot_be_meant_is_refused_before_any_work(line, message, trained, vlkit, tmp_path):
    outcome = vlkit("eval", "--run", trained, "--out", tmp_path / "o", "--fail-under", line)
    assert outcome.code == 2 and message in outcome.err
    assert not (tmp_path / "o").exists()


def test_unknown_corruptions_are_refused(trained, vlkit):
    outcome = vlkit("eval", "--run", trained, "--shift", "blurr")
    assert outcome.code == 2 and "did you mean 'blur'" in outcome.err


def test_weights_that_are_not_finite_are_no_numbers(trained, vlkit, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run/model/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("fc1.weight"))
    save_file(weights | {name: weights[name] * float("nan")}, path, metadata={"format": "pt"})
    outcome = vlkit("eval", "--run", tmp_path / "run")
    assert outcome.code == 4 and "not finite" in outcome.err
    assert not (tmp_path / "run/results.json").exists() or "first" in str(trained)


def test_a_picture_that_is_gone_is_named(vlkit, tmp_path):
    write_recipes(tmp_path / "raw", recipes=12)
    vlkit("prep", "--domain", "recipes", "--source", tmp_path / "raw", "--out", tmp_path / "data")
    pairs = read_pairs(tmp_path / "data").split("test")
    gone = pairs.image_paths(pairs.unique_images())[0]
    gone.unlink()
    model = ("--model", "tiny-siglip", "--data", tmp_path / "data", "--out", tmp_path / "out")
    outcome = vlkit("eval", *model)
    assert outcome.code == 3 and gone.name in outcome.err and "run prep again" in outcome.err


def test_rows_that_augment_wrote_measure_nothing(prepared, vlkit, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    model = ("--model", "tiny-siglip", "--data", tmp_path / "data", "--out", tmp_path / "out", "--split", "train")
    before = results_of(vlkit, *model)
    assert vlkit("augment", "--data", tmp_path / "data", "--negatives-per-positive", 0).code == 0
    after = results_of(vlkit, *model)
    assert before["metrics"]["text_to_image"]["queries"] == after["metrics"]["text_to_image"]["queries"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(trained, vlkit, tmp_path):
    """torchrun: pictures, texts and ranks shared; one writes, and says the same numbers."""
    alone = results_of(vlkit, "--run", trained, "--out", tmp_path / "one", "--cache", "off", "--shift", "jpeg")
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlkit", "--", "eval"]
    flags = ["--run", str(trained), "--out", str(tmp_path / "two"), "--cache", str(tmp_path / "c"), "--shift", "jpeg"]
    done = subprocess.run([sys.executable, *program, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "two/results.json").read_text())
    for part in ("metrics", "intervals", "baseline"):
        for direction in DIRECTIONS:
            for metric, value in alone[part][direction].items():
                assert both[part][direction][metric] == pytest.approx(value, abs=1e-6), (part, direction, metric)
    assert both["shifts"]["jpeg"]["text_to_image"]["recall@1"] == alone["shifts"]["jpeg"]["text_to_image"]["recall@1"]


def test_brightness_is_of_what_the_model_sees(vlkit, tmp_path, tiny):
    for number, light in enumerate((10, 120, 250)):
        Image.new("RGB", (50, 50), (light, light, light)).save(tmp_path / f"{number}.png")
    task = task_of_captions(3, 1)
    task.images["image"] = [str(tmp_path / f"{n}.png") for n in range(3)]
    actual = embed_task(tiny("tiny-siglip"), task, batch_size=2, precision="fp32")
    assert actual.brightness == pytest.approx([10, 120, 250], abs=0.5)
    for number, colour in enumerate([(200, 0, 0), (0, 200, 0), (0, 0, 200)]):
        Image.new("RGB", (50, 50), colour).save(tmp_path / f"{number}.png")
    actual = embed_task(tiny("tiny-siglip"), task, batch_size=2, precision="fp32")
    assert actual.brightness == pytest.approx([59.8, 117.4, 22.8], abs=0.5), "Rec. 601"


def test_corruptions_are_kept_apart_from_the_pictures(trained, vlkit, tmp_path):
    """With a cache, filled or new, and without one: the same numbers of the untouched model under a corruption."""
    flags = ("--run", trained, "--shift", "low-light,rotate")
    off = results_of(vlkit, *flags, "--out", tmp_path / "off", "--cache", "off")
    results_of(vlkit, "--run", trained, "--out", tmp_path / "a", "--cache", tmp_path / "c")
    for _ in range(2):
        remaining = results_of(vlkit, *flags, "--out", tmp_path / "b", "--cache", tmp_path / "c")
        assert remaining["shifts"] == off["shifts"]
    store = next((tmp_path / "c").glob("pictures-*"))
    keys = [key for line in (store / "index.jsonl").read_text().splitlines() for key in json.loads(line)["keys"]]
    assert len(keys) == len(set(keys)) == 36, "plain and under two corruptions"


def test_a_cache_that_nobody_asked_for_fails_nobody(trained, vlkit, tmp_path, monkeypatch):
    """Damaged rows, and a folder that cannot be made: said, and measured all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    first = results_of(vlkit, "--run", trained, "--out", tmp_path / "a")
    store = next((tmp_path / "home/vlkit/features").glob("pictures-*"))
    rows = bytearray((store / "rows.bin").read_bytes())
    rows[7] ^= 0xFF
    (store / "rows.bin").write_bytes(bytes(rows))
    outcome = vlkit("eval", "--run", trained, "--out", tmp_path / "a", "--json")
    assert outcome.code == 0 and "are not cached" in outcome.err and "damaged" in outcome.err
    assert outcome.json()["baseline"] == first["baseline"]
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    outcome = vlkit("eval", "--run", trained, "--out", tmp_path / "a", "--json")
    assert outcome.code == 0 and "are not cached" in outcome.err
    outcome = vlkit("eval", "--run", trained, "--out", tmp_path / "a", "--cache", tmp_path / "file/x")
    assert outcome.code != 0, "one that was asked for"


def test_a_metric_that_is_what_was_demanded_passes(trained, vlkit, tmp_path):
    value = results_of(vlkit, "--run", trained, "--out", tmp_path)["metrics"]["text_to_image"]["recall@10"]
    demand = f"text_to_image.recall@10={value!r}"
    assert vlkit("eval", "--run", trained, "--out", tmp_path, "--fail-under", demand).code == 0


def test_results_of_other_data_are_never_written_over(trained, raw, vlkit, tmp_path):
    """A folder called like a split, and two folders of one name; and no run gets another model's results."""
    shutil.copytree(trained, tmp_path / "runs/run")
    run = tmp_path / "runs/run"
    assert vlkit("eval", "--run", run, "--split", "val").code == 0
    for seed in (5, 6):
        data = tmp_path / str(seed) / "val"
        vlkit("prep", "--domain", "recipes", "--source", raw, "--out", data, "--seed", seed)
        assert vlkit("eval", "--run", run, "--data", data).code == 0
    content = [json.loads(path.read_text()) for path in run.glob("results-val*.json")]
    assert sorted(item["data"]["split"] for item in content) == ["test", "test", "val"]
    assert len({item["data"]["fingerprint"] for item in content}) == 3
    before = (run / "results-val.json").read_text()
    assert vlkit("eval", "--run", run, "--data", data).code == 0
    assert (run / "results-val.json").read_text() == before
    outcome = vlkit("eval", "--model", "tiny-siglip", "--data", data, "--out", run)
    assert outcome.code == 2 and "is the folder of a run" in outcome.err
    assert vlkit("eval", "--run", trained, "--out", run).code == 2
    (tmp_path / "file").write_text("x")
    outcome = vlkit("eval", "--run", run, "--out", tmp_path / "file")
    assert outcome.code == 2 and "is a file" in outcome.err


def test_an_extended_run_has_no_results_of_what_it_was(trained, vlkit, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    config = (tmp_path / "run/config.yaml").read_text().replace(str(trained.parent), str(tmp_path))
    (tmp_path / "run/config.yaml").write_text(config.replace("name: first", "name: run"))
    assert vlkit("eval", "--run", tmp_path / "run", "--split", "val").code == 0
    assert vlkit("report", "--run", tmp_path / "run").code == 0
    outcome = vlkit("train-retrieval", "--config", tmp_path / "run/config.yaml", "--extend-to", 8)
    assert outcome.code == 0, outcome.err
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not any(name.startswith(("results", "queries", "examples", "plots", "report")) for name in left)


def test_a_limit_counts_rows_that_are_measured(prepared, vlkit, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    assert vlkit("augment", "--data", tmp_path / "data", "--pictures", 3, "--texts", 0).code == 0
    model = ("--model", "tiny-siglip", "--data", tmp_path / "data", "--out", tmp_path / "out", "--split", "train")
    assert 25 <= results_of(vlkit, *model, "--limit", 30)["data"]["rows"] <= 30


def test_folds_that_cannot_be_made_are_said(trained, vlkit, tmp_path):
    outcome = vlkit("eval", "--run", trained, "--out", tmp_path, "--fold-size", 1000, "--templates", "a {class_name}")
    assert outcome.code == 0 and "too few for a fold" in outcome.err and "no classes to tell apart" in outcome.err


def test_the_card_says_what_was_forgotten(trained, prepared, vlkit, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    actual = results_of(vlkit, "--run", tmp_path / "run", "--guard", prepared)
    card = (tmp_path / "run/README.md").read_text()
    remaining = actual["retention"]["retained"]
    assert (
        "was not measured" in card
        if remaining is None
        else retention_sentence(remaining, f"`{prepared.name}`")[1:] in card
    )
