"""train-fusion, caption and eval of captions through the command line: runs, resuming, measuring, bad input."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html import escape

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import COLOURS, write_image
from safetensors.torch import load_file

from vlkit.training import train_fusion


@pytest.fixture(scope="module")
def train(vlkit, prepared, trained, tiny_qwen):
    """Run train-fusion for six steps on the prepared recipes."""

    def run(runs, name="c", *flags):
        base = ("train-fusion", "--data", prepared, "--vision", trained, "--llm", tiny_qwen, "--quantize", "none")
        settings = ("--runs-dir", runs, "--name", name, "--steps", 6, "--eval-every", 3, "--batch-size", 4)
        return vlkit(*base, *settings, "--lr", "1e-3", "--max-new-tokens", 12, *flags)

    return run


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """A finished run."""
    runs = tmp_path_factory.mktemp("fusion-runs")
    outcome = train(runs)
    assert outcome.code == 0, outcome.err
    return runs / "c"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be hurt."""
    shutil.copytree(finished, tmp_path / "copied")
    return tmp_path / "copied"


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_holds_what_it_should_and_no_frozen_weight(finished):
    assert {path.name for path in finished.iterdir()} >= {
        *("config.yaml", "environment.yaml", "metrics.jsonl", "checkpoints", "best.json", "last.json"),
        *("fusion", "README.md", "finished.json", "frozen.json"),
    }
    saved = load_file(next(finished.glob("checkpoints/*/trainable.safetensors")))
    assert saved and all(name.startswith("fusion.") for name in saved)
    facts = json.loads((finished / "finished.json").read_text())
    assert facts["trainable_parameters"] == sum(value.numel() for value in saved.values())
    assert set(facts["captions"]) == {*("bleu_1", "bleu_2", "bleu_3", "bleu_4"), "rouge_l", "cider", "exact"}
    assert "trained on" in (finished / "README.md").read_text()


def test_every_evaluation_says_whether_it_looks_and_writes_captions(finished):
    steps = [line for line in lines(finished) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert line["loss"] == pytest.approx(line["caption_loss"] + 0.1 * line["alignment"], rel=1e-4)
    actual = [line["val"] for line in lines(finished) if "val" in line]
    assert len(actual) == 2
    for val in actual:
        assert set(val["looking"]) == {"right", "shuffled", "blank"}
        assert 0 < len(val["samples"]) <= 8
        assert set(val["samples"][0]) == {"image", "caption", "reference"}


@pytest.mark.parametrize(("flags", "after"), [((), 1), ((), 4), (("--llm-lora", 2, "--cache", "off"), 4)])
def test_a_stopped_run_goes_on_to_the_same_bytes(flags, after, train, finished, tmp_path, monkeypatch):
    whole = tmp_path / "whole" if flags else finished
    assert not flags or train(tmp_path, "whole", *flags).code == 0
    real = train_fusion.steps

    class Killed(BaseException):
        pass

    def stopping(*args, **values):
        yield from itertools.islice(real(*args, **values), after)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(train_fusion, "steps", stopping)
        with pytest.raises(Killed):
            train(tmp_path, "killed", *flags)
    outcome = train(tmp_path, "killed", *flags)
    assert outcome.code == 0, outcome.err
    for name in ("fusion/fusion.safetensors", *(["adapter/adapter_model.safetensors"] if flags else [])):
        assert (whole / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    report = [[line for line in lines(run) if "loss" in line] for run in (whole, tmp_path / "killed")]
    assert report[0] == report[1]


def test_the_cache_changes_nothing_and_lets_the_encoder_go(train, finished, tmp_path, monkeypatch):
    released, real = [], train_fusion.fill_patches

    def fill_and_look(config, rows, captioner, datasets, world):
        real(config, rows, captioner, datasets, world)
        released.append(next(captioner.vision.parameters()).is_meta)

    monkeypatch.setattr(train_fusion, "fill_patches", fill_and_look)
    assert train(tmp_path, "plain", "--cache", "off").code == 0
    assert train(tmp_path, "cached", "--cache", tmp_path / "kept").code == 0
    assert released == [False, True]
    assert (tmp_path / "kept").is_dir()
    for run in ("plain", "cached"):
        name = "fusion/fusion.safetensors"
        assert (tmp_path / run / name).read_bytes() == (finished / name).read_bytes()


def test_a_step_is_replayed(finished, vlkit):
    outcome = vlkit("train-fusion", "--config", finished / "config.yaml", "--replay", 5, "--json")
    assert outcome.code == 0, outcome.err
    output = outcome.json()
    assert output["loss"] == output["recorded"]["loss"] and len(output["pair_ids"]) == 16


def test_an_extended_run_has_no_captions_of_what_it_was(copied, vlkit):
    assert vlkit("eval", "--run", copied).code == 0
    assert (copied / "captions.json").is_file()
    where = ("--runs-dir", copied.parent, "--name", copied.name)
    outcome = vlkit("train-fusion", "--config", copied / "config.yaml", *where, "--extend-to", 8)
    assert outcome.code == 0, outcome.err
    assert not (copied / "captions.json").exists() and not (copied / "results.json").exists()
    assert [line["step"] for line in lines(copied) if "loss" in line] == [*range(1, 9)]


def test_eval_measures_a_captioner_on_pictures_it_has_not_seen(copied, vlkit, prepared, tmp_path):
    outcome = vlkit("eval", "--run", copied, "--json")
    assert outcome.code == 0, outcome.err
    results = outcome.json()
    assert (results["task"], results["data"]["split"]) == ("captioning", "test")
    frame = pd.read_parquet(prepared / "pairs.parquet")
    pictures = set(frame[frame.split == "test"].image_id)
    written = json.loads((copied / "captions.json").read_text())
    assert {item["image_id"] for item in written} == pictures
    assert results["metrics"]["captions"]["images"] == len(pictures)
    assert set(results["metrics"]["looking"]) == {"right", "shuffled", "blank"}
    assert results["compared_with"] == "a blank picture"
    # The same captions and references as files score the same.
    notes = [
        {"id": number, "image_id": row.image_id, "caption": row.text}
        for number, row in enumerate(frame[frame.split == "test"].itertuples())
    ]
    (tmp_path / "references.json").write_text(json.dumps({"annotations": notes}))
    again = vlkit(
        *("eval", "--captions", copied / "captions.json", "--references", tmp_path / "references.json", "--json")
    ).json()
    for name, value in again["metrics"]["captions"].items():
        assert results["metrics"]["captions"][name] == pytest.approx(value, abs=1e-12)
    assert vlkit("eval", "--run", copied, "--fail-under", "captions.cider=9.9").code == 8
    assert vlkit("eval", "--run", copied, "--fail-under", "text_to_image.recall@1=0.1").code == 2
    assert vlkit("eval", "--run", copied, "--slice-by", "colour").code == 2


def test_the_difference_of_two_captioners_is_paired(copied, vlkit, tmp_path):
    assert vlkit("eval", "--run", copied).code == 0
    same = vlkit("eval", "--run", copied, "--against", copied, "--json", "--out", tmp_path / "out").json()
    assert same["difference"]["captions"]["cider"]["value"] == 0
    written = json.loads((copied / "captions.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(written[1:]))
    lost = vlkit("eval", "--run", copied, "--limit", 3, "--against", copied)
    assert lost.code == 3 and "captions-limit3.json" in lost.err and "vlkit eval --run" in lost.err
    assert vlkit("eval", "--run", copied, "--limit", 3).code == 0
    assert vlkit("eval", "--run", copied, "--limit", 3, "--against", copied).code == 0
    refused = vlkit("eval", "--run", copied, "--against", tmp_path / "few.json")
    assert refused.code == 3 and written[0]["image_id"] in refused.err


def test_clipscore_is_its_formula(copied, vlkit, trained, prepared):
    """Beside transformers' own model, one pair at a time."""
    from vlkit.models.loading import load_model

    results = vlkit("eval", "--run", copied, "--clip-model", trained, "--json").json()
    encoder = load_model(str(trained)).eval()
    frame = pd.read_parquet(prepared / "pairs.parquet")
    frame = frame[frame.split == "test"]
    from vlkit.data.images import decode as pictures
    from vlkit.data.pairs import read_pairs

    pairs = read_pairs(prepared).split("test")
    places = dict(zip(pairs.frame.image_id, pairs.image_paths(pairs.frame), strict=True))

    def told(text: str) -> np.ndarray:
        ids = encoder.pad(encoder.tokenize([f"A photo depicts {text}"])[0])
        return encoder.embed_texts(ids).detach().numpy()[0]

    clip, ref = [], []
    for item in json.loads((copied / "captions.json").read_text()):
        pixels = torch.from_numpy(pictures.load_pixels(places[item["image_id"]], encoder.pixel_spec))[None]
        observed = encoder.embed_images(pixels).detach().numpy()[0]
        messages = told(item["caption"])
        alone = 2.5 * max(float(observed @ messages), 0.0)
        best = max(0.0, *(float(messages @ told(text)) for text in frame[frame.image_id == item["image_id"]].text))
        clip.append(alone)
        ref.append(2 * alone * best / (alone + best) if alone + best else 0.0)
    assert results["metrics"]["captions"]["clipscore"] == pytest.approx(np.mean(clip), abs=1e-5)
    assert results["metrics"]["captions"]["refclipscore"] == pytest.approx(np.mean(ref), abs=1e-5)
    assert results["clip_model"] == str(trained)


# caption


def test_captions_go_on_where_they_stopped(finished, vlkit, tmp_path):
    for number, colour in enumerate(COLOURS):
        write_image(tmp_path / f"pictures/{colour}.png", COLOURS[colour], seed=number)
    ask = ("caption", "--run", finished, "--max-new-tokens", 8, "--batch-size", 2)
    whole = vlkit(*ask, tmp_path / "pictures", "--json")
    assert whole.code == 0, whole.err
    captions = whole.json()["captions"]
    assert [item["image"] for item in captions] == sorted(str(p) for p in (tmp_path / "pictures").iterdir())
    out = tmp_path / "captions.jsonl"
    assert vlkit(*ask, tmp_path / "pictures", "--out", out, "--limit", 3).code == 0
    with out.open("a") as file:
        file.write('{"image": "torn by a ki')
    second = vlkit(*ask, tmp_path / "pictures", "--out", out, "--json").json()
    assert len(second["captions"]) == 2
    written = [json.loads(line) for line in out.read_text().splitlines()][1:]
    assert written == captions
    one = vlkit(*ask, tmp_path / "pictures/red.png", "--json").json()["captions"]
    assert one == [item for item in captions if item["image"].endswith("red.png")]
    other = vlkit(*ask, tmp_path / "pictures", "--out", out, "--num-beams", 2)
    assert other.code == 2 and "num_beams" in other.err


def test_what_is_not_its_own_file_is_left_alone(finished, vlkit, tmp_path):
    write_image(tmp_path / "one.png", COLOURS["red"], seed=1)
    ask = ("caption", "--run", finished, tmp_path / "one.png", "--max-new-tokens", 4, "--out", tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").write_text("")
    lost = vlkit("caption", "--run", tmp_path / "none", *ask[3:])
    assert lost.code == 6 and not (tmp_path / "out.jsonl").exists()
    for content in (
        '{"precious": 1}',
        '{"precious": 1}\n',
        "notes",
        '[{"image_id": 1, "caption": "x"}]\n',
        "{",
        '{"asked": "x"}',
        '{"asked": 1}\n',
    ):
        (tmp_path / "out.jsonl").write_text(content)
        outcome = vlkit(*ask)
        assert outcome.code == 6 and "give another --out" in outcome.err
        assert (tmp_path / "out.jsonl").read_text() == content
    # Torn in its very first line, or empty, it begins anew.
    for size in (15, 0, 40):
        (tmp_path / "out.jsonl").unlink()
        assert vlkit(*ask).code == 0
        (tmp_path / "out.jsonl").write_bytes((tmp_path / "out.jsonl").read_bytes()[:size])
        assert vlkit(*ask).code == 0
        assert (tmp_path / "out.jsonl").read_text().count("\n") == 2


def test_one_process_writes_into_a_file_and_failures_are_tried_again(finished, vlkit, tmp_path):
    import fcntl

    write_image(tmp_path / "p/a.png", COLOURS["red"], seed=1)
    (tmp_path / "p/b.png").write_text("<html>")
    ask = ("caption", "--run", finished, tmp_path / "p", "--max-new-tokens", 4, "--out", tmp_path / "out.jsonl")
    first = vlkit(*ask)
    assert first.code == 0 and "1 captions written, 1 images cannot be read" in first.out
    again = vlkit(*ask)
    assert again.code == 0 and "0 captions written, 1 were already there, 1 images cannot be read" in again.out
    write_image(tmp_path / "p/b.png", COLOURS["blue"], seed=2)
    assert "1 captions written, 1 were already there" in vlkit(*ask).out
    with (tmp_path / "out.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        outcome = vlkit(*ask)
    assert outcome.code == 2 and "another process" in outcome.err
    # Other weights are another captioner.
    shutil.copytree(finished, tmp_path / "other" / finished.name)
    weights = tmp_path / "other" / finished.name / "fusion/fusion.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    moved = vlkit("caption", "--run", weights.parent.parent, *ask[3:])
    assert moved.code == 2 and "model" in moved.err


def test_what_caption_wrote_is_scored_by_file_names(finished, vlkit, tmp_path):
    for number, colour in enumerate(list(COLOURS)[:3]):
        write_image(tmp_path / f"p/{number:012d}.png", COLOURS[colour], seed=number)
    assert vlkit("caption", "--run", finished, tmp_path / "p", "--out", tmp_path / "c.jsonl").code == 0
    notes = [{"image_id": number, "caption": f"a {number}"} for number in range(3)]
    images = [{"id": number, "file_name": f"{number:012d}.png"} for number in range(3)]
    (tmp_path / "r.json").write_text(json.dumps({"annotations": notes, "images": images}))
    score = ("eval", "--captions", tmp_path / "c.jsonl", "--references", tmp_path / "r.json", "--samples", 2)
    outcome = vlkit(*score)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("a 0") == 1 and outcome.out.count("a 1") == 1 and "a 2" not in outcome.out
    assert vlkit(*score, "--json").json()["metrics"]["captions"]["images"] == 3
    (tmp_path / "odd.json").write_text(json.dumps({"annotations": notes, "images": [{"file_name": "x.png"}]}))
    clip = ("--clip-model", finished, "--images", tmp_path / "p")
    refused = vlkit("eval", "--captions", tmp_path / "c.jsonl", "--references", tmp_path / "odd.json", *clip)
    assert refused.code == 3 and "names no file" in refused.err


def test_pictures_that_are_none_are_told(finished, vlkit, tmp_path):
    write_image(tmp_path / "p/good.png", COLOURS["red"], seed=1)
    (tmp_path / "p/bad.jpg").write_text("<html>sign in</html>")
    outcome = vlkit("caption", "--run", finished, tmp_path / "p", "--json")
    assert outcome.code == 0
    output = {item["image"]: item for item in outcome.json()["captions"]}
    assert (
        "error" in output[str(tmp_path / "p/bad.jpg")] and output[str(tmp_path / "p/good.png")]["caption"] is not None
    )
    assert vlkit("caption", "--run", finished, tmp_path / "p/bad.jpg").code == 3
    assert vlkit("caption", "--run", finished).code == 2
    assert vlkit("caption", "--run", finished, tmp_path / "nothing.jpg").code == 2


# What is refused


def test_a_run_of_another_kind_writes_no_captions(trained, vlkit, tmp_path):
    write_image(tmp_path / "one.png", COLOURS["red"], seed=1)
    outcome = vlkit("caption", "--run", trained, tmp_path / "one.png")
    assert outcome.code == 6 and "train-fusion" in outcome.err


def test_another_encoder_or_language_model_than_it_was_trained_beside_is_refused(copied, vlkit, tmp_path):
    write_image(tmp_path / "one.png", COLOURS["red"], seed=1)
    about = json.loads((copied / "fusion/fusion.json").read_text())
    for part, word in (("vision", "first"), ("llm", "llm")):
        changed = {**about, "frozen": {**about["frozen"], part: "0" * 64}}
        (copied / "fusion/fusion.json").write_text(json.dumps(changed))
        outcome = vlkit("caption", "--run", copied, tmp_path / "one.png")
        assert outcome.code == 6 and "another" in outcome.err and word in outcome.err


def test_a_damaged_fusion_is_told(copied, vlkit, tmp_path):
    write_image(tmp_path / "one.png", COLOURS["red"], seed=1)
    whole = (copied / "fusion/fusion.safetensors").read_bytes()
    (copied / "fusion/fusion.safetensors").write_bytes(whole[: len(whole) // 2])
    outcome = vlkit("caption", "--run", copied, tmp_path / "one.png")
    assert outcome.code == 6 and "damaged" in outcome.err


def test_a_damaged_or_lost_lora_is_told(train, vlkit, tmp_path):
    write_image(tmp_path / "one.png", COLOURS["red"], seed=1)
    assert train(tmp_path, "l", "--llm-lora", 2).code == 0
    (tmp_path / "l/adapter/adapter_model.safetensors").write_text("x")
    outcome = vlkit("caption", "--run", tmp_path / "l", tmp_path / "one.png")
    assert outcome.code == 6 and "restore it" in outcome.err
    shutil.rmtree(tmp_path / "l/adapter")
    outcome = vlkit("caption", "--run", tmp_path / "l", tmp_path / "one.png")
    assert outcome.code == 6 and "restore it" in outcome.err


def test_texts_without_a_word_and_pictures_that_are_gone_are_told(prepared, train, vlkit, tmp_path):
    frame = pd.read_parquet(prepared / "pairs.parquet")
    odd = frame.copy()
    first = {split: odd.index[odd.split == split][0] for split in ("train", "test")}
    for place in first.values():
        odd.loc[place, ["text", "text_id"]] = ["  ", f"none{place}"]
    odd.to_parquet(tmp_path / "pairs.parquet")
    outcome = train(tmp_path / "runs", "e", "--data", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "1 captions without a word are left out" in outcome.err
    report = vlkit("eval", "--run", tmp_path / "runs/e")
    assert report.code == 0 and "1 texts of the test split without a word" in report.err
    lost = odd[odd.split == "train"]["image_id"].iloc[-1]
    odd.loc[odd.image_id == lost, "image"] = "images/gone.png"
    odd.to_parquet(tmp_path / "pairs.parquet")
    gone = train(tmp_path / "runs", "g", "--data", tmp_path)
    assert gone.code == 3 and "gone.png" in gone.err


def test_a_run_does_not_go_on_with_another_language_model(train, tmp_path, monkeypatch):
    real = train_fusion.steps

    def stopping(*args, **values):
        yield from itertools.islice(real(*args, **values), 4)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train_fusion, "steps", stopping)
        train(tmp_path)
    frozen = json.loads((tmp_path / "c/frozen.json").read_text())
    (tmp_path / "c/frozen.json").write_text(json.dumps({**frozen, "llm": "0"}))
    outcome = train(tmp_path)
    assert outcome.code == 6 and "language model" in outcome.err


def test_what_cannot_fit_is_refused_with_the_setting_to_change(train, tmp_path, monkeypatch):
    from vlkit.training.setup import estimates

    outcome = train(tmp_path, "d", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    facts = outcome.json()
    assert set(facts["memory_gb"]) == {"vision encoder", "language model", "trained", "activations", "output layer"}
    assert not (tmp_path / "d").exists()
    monkeypatch.setattr(estimates, "_free_memory", lambda device: 2**20)
    outcome = train(tmp_path, "d")
    assert outcome.code == 5 and "--" in outcome.err
    assert not (tmp_path / "d").exists()


def test_settings_that_cannot_be_are_refused(train, vlkit, prepared, tmp_path):
    for flags, word in (
        (("--queries", 600), "reads 512"),
        (("--fusion-layers", 9), "--fusion-layers"),
        (("--batch-size", 5000), "training captions"),
        (("--warmup", 6), "--warmup"),
        (("--prompt", " "), "--prompt"),
        (("--prompt", "x <|im_end|>"), "im_end"),
        (("--fusion", "mlp", "--queries", 8), "--queries"),
        (("--lora-alpha", 3), "--lora-alpha"),
        (("--teach-steps", 9), "--teach-steps"),
        (("--vision", "runs/nothing"), "runs/nothing"),
        (("--llm", "tiny-qwn"), "tiny-qwen"),
    ):
        outcome = train(tmp_path, "r", *flags)
        assert outcome.code == 2 or (outcome.code == 6 and "nothing" in outcome.err), outcome.err
        assert word in outcome.err, outcome.err
        assert not (tmp_path / "r").exists()


def test_the_names_of_the_settings_are_those_of_the_parameters(train, tmp_path):
    """A LoRA learns at --lr, adapter and cross-attention at their own rates."""
    from vlkit.config.fusion import TrainFusionConfig
    from vlkit.training.setup.load_models import learning_rates

    named = dict.fromkeys(("fusion.adapter.1.weight", "fusion.queries", "llm.x.lora_A"), torch.nn.Parameter())
    config = TrainFusionConfig(adapter_lr=0.1, fusion_lr=0.2)
    assert learning_rates(named, config) == {"fusion.adapter.1.weight": 0.1, "fusion.queries": 0.2}
    assert learning_rates(named, TrainFusionConfig()) == {}


def test_a_raw_coco_folder_is_prepared_on_the_way(vlkit, trained, tiny_qwen, tmp_path):
    notes, images = [], []
    for number, colour in enumerate(list(COLOURS) * 4):
        write_image(tmp_path / f"coco/images/train2017/{number}.png", COLOURS[colour], seed=number)
        images.append({"id": number, "file_name": f"{number}.png"})
        notes += [{"id": 2 * number + k, "image_id": number, "caption": f"{k} a {colour} patch"} for k in range(2)]
    (tmp_path / "coco/annotations").mkdir()
    content = json.dumps({"images": images, "annotations": notes})
    (tmp_path / "coco/annotations/captions_train2017.json").write_text(content)
    base = ("train-fusion", "--data", tmp_path / "coco", "--vision", trained, "--llm", tiny_qwen)
    flags = ("--quantize", "none", "--runs-dir", tmp_path / "runs", "--name", "c", "--steps", 2, "--samples", 0)
    outcome = vlkit(*base, *flags)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "coco/prepared/pairs.parquet").is_file()
    assert vlkit("eval", "--run", tmp_path / "runs/c", "--split", "train", "--limit", 4).code == 0
    assert (tmp_path / "runs/c/results-train-limit4.json").is_file()


# What people see


def test_the_report_shows_the_worst_and_the_best_with_their_pictures(copied, finished, trained, vlkit):
    assert vlkit("eval", "--run", copied).code == 0
    outcome = vlkit("report", "--run", copied)
    assert outcome.code == 0, outcome.err
    page = (copied / "report.html").read_text()
    examples = json.loads((copied / "results.json").read_text())["examples"]
    assert page.count('<figure class="caption-example">') == len(examples["worst"]) + len(examples["best"])
    assert page.count("data:image/jpeg;base64,") == len(examples["worst"]) + len(examples["best"])
    assert escape(examples["worst"][0]["caption"] or "(empty)") in page
    assert "a blank image" in page and (copied / "plots/looking.png").is_file()
    report = vlkit("runs", "--runs-dir", copied.parent)
    assert "CIDEr" in report.out and "nats per token" in report.out
    shutil.copytree(copied, copied.parent / "twin")
    beside = vlkit("report", "--run", copied, "--against", copied.parent / "twin")
    assert beside.code == 0, beside.err
    page = (copied / "report.html").read_text()
    assert "Comparison with other runs" in page and "no difference: CIDEr +0.000" in page
    assert vlkit("report", "--run", copied, "--against", finished.parent.parent / "nothing").code == 6
    assert vlkit("report", "--run", copied, "--against", trained).code == 2


# Processes of their own


def started(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)], stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_two_processes_write_the_run_of_one(train, prepared, trained, tiny_qwen, tmp_path):
    assert train(tmp_path, "one", "--batch-size", 5).code == 0
    flags = ("train-fusion", "--data", prepared, "--vision", trained, "--llm", tiny_qwen, "--quantize", "none")
    more = ("--runs-dir", tmp_path, "--name", "two", "--steps", 6, "--eval-every", 3, "--batch-size", 5, "--lr", "1e-3")
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vlkit")
    process = started((*launch, *flags, *more, "--max-new-tokens", 12))
    _, report = process.communicate(timeout=300)
    assert process.returncode == 0, report
    for mine, its in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        if "loss" in mine:
            for name in ("loss", "caption_loss", "alignment", "grad_norm"):
                assert its[name] == pytest.approx(mine[name], rel=1e-3), name
        else:
            assert its["val"]["looking"] == pytest.approx(mine["val"]["looking"], rel=1e-3)


@pytest.mark.slow
def test_killed_while_the_language_is_learned_the_same_command_makes_the_run(prepared, trained, vlkit, tmp_path):
    base = ("train-fusion", "--data", prepared, "--vision", trained, "--llm", "tiny-qwen", "--runs-dir", tmp_path)
    flags = ("--teach-steps", 40, "--steps", 2, "--samples", 0, "--max-new-tokens", 4)
    process = started(("vlkit", *base, "--name", "k", *flags))
    while not list(tmp_path.glob("k/base/*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "k/base/llm").exists()
    for name in ("k", "whole"):
        assert vlkit(*base, "--name", name, *flags).code == 0
    for name in ("fusion/fusion.safetensors", "base/llm/model.safetensors"):
        assert (tmp_path / "k" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [path for path in (tmp_path / "k/base").iterdir() if path.name not in ("llm", "vision")]


def test_a_signal_saves_what_is_done_and_the_same_command_goes_on(finished, prepared, trained, tiny_qwen, tmp_path):
    base = ("train-fusion", "--data", prepared, "--vision", trained, "--llm", tiny_qwen, "--quantize", "none")
    flags = ("--runs-dir", tmp_path, "--name", "s", "--steps", 4000, "--eval-every", 4000, "--samples", 0)
    process = started(("vlkit", *base, *flags))
    while not (tmp_path / "s/metrics.jsonl").is_file() or len(lines(tmp_path / "s")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, report = process.communicate(timeout=60)
    assert process.returncode == 75 and "run the same command again" in report, report
    saved = json.loads((tmp_path / "s/last.json").read_text())["step"]
    assert 3 <= saved == len(lines(tmp_path / "s"))
