"""prep with copies, lookalikes and conflicts; its cache; and what a kill leaves."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml
from helpers import write_class_folders, write_image, write_patterned_image, write_recipes
from PIL import Image

from vlkit.data.images import phash
from vlkit.data.images.decode import verify_image
from vlkit.data.pairs import read_pairs
from vlkit.errors import DataError


@pytest.fixture
def folders(tmp_path):
    """Class folders with a turned copy in another class and an exact copy in a third."""
    raw = write_class_folders(tmp_path / "raw", per_class=4)
    names = sorted(path.name for path in raw.iterdir())
    write_patterned_image(raw / names[0] / "original.png", 7, size=(160, 120))
    Image.open(raw / names[0] / "original.png").rotate(90, expand=True).save(raw / names[1] / "turned.jpg", quality=80)
    shutil.copy(raw / names[0] / "original.png", raw / names[2] / "copy.png")
    return raw, names


@pytest.mark.parametrize("rule", ["keep", "drop", "first"])
def test_one_picture_under_two_classes(rule, folders, tmp_path, vlkit):
    raw, names = folders
    outcome = vlkit(
        "prep", "--domain", "agriculture", "--source", raw, "--out", tmp_path / "out", "--on-conflict", rule
    )
    assert outcome.code == 0 and "1 image has several classes" in outcome.err
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    rows = frame[frame["image_key"].str.endswith(("original.png", "copy.png"))]
    matches = read_pairs(tmp_path / "out").match_sets()[0]
    if rule == "drop":
        assert not len(rows)
        assert sum(pd.read_csv(tmp_path / "out/rejects.csv")["reason"].str.contains("other classes")) == 2
    else:
        remaining = {names[0], names[2]} if rule == "keep" else {names[0]}
        assert {group for group in matches[rows["image_id"].iloc[0]] if "\0" not in group} == remaining
    turned = frame[frame["image_key"].str.endswith("turned.jpg")]
    if rule != "drop":
        assert set(turned["unit"]) == set(rows["unit"]) and set(turned["split"]) == set(rows["split"])


def test_a_planted_lookalike_across_splits_is_refused(tmp_path, vlkit):
    for number in range(20):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
        (tmp_path / f"raw/{number}.txt").write_text(f"words {number}")
    assert vlkit("prep", "--source", tmp_path / "raw", "--out", tmp_path / "out").code == 0
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    train, test = frame[frame["split"] == "train"].iloc[0], frame[frame["split"] == "test"].iloc[0]
    stolen = {**test, "image": "/x.png", "image_id": "new", "pair_id": "new", "unit": "new", "text_id": "new"}
    stolen |= {"image_looks": train["image_looks"]}
    pd.concat([frame, pd.DataFrame([stolen])]).to_parquet(tmp_path / "out/pairs.parquet")
    with pytest.raises(DataError, match="look the same"):
        read_pairs(tmp_path / "out")
    # A mirrored copy, between val and test, in a table without its data.yaml.
    val = frame[frame["split"] == "val"].iloc[0]
    mirrored = Image.open(val["image"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(tmp_path / "mirrored.png")
    stolen["image_looks"] = phash.to_hex(verify_image(tmp_path / "mirrored.png").perceptual_hash)
    pd.concat([frame, pd.DataFrame([stolen])]).to_parquet(tmp_path / "alone.parquet")
    with pytest.raises(DataError, match="look the same"):
        read_pairs(tmp_path / "alone.parquet")


def test_one_picture_and_text_in_two_groups_is_one_row_of_both(tmp_path, vlkit):
    raw = write_recipes(tmp_path / "raw", recipes=12, images=1)
    shutil.copy(raw / "images/0-0.png", raw / "images/1-0.png")
    text = (raw / "recipes.jsonl").read_text().replace("green tart number 1", "red tart number 0")
    (raw / "recipes.jsonl").write_text(text)
    assert vlkit("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "out").code == 0
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    shared = frame[frame["text"] == "red tart number 0"]
    assert len(shared) == 1
    assert set(shared["image_group"].iloc[0]) == {"r000", "r001"}


def read_count(outcome):
    return outcome.json()["pictures_read"]


def test_a_second_prep_reads_only_what_is_new(tmp_path, vlkit):
    raw = write_class_folders(tmp_path / "raw", per_class=5)
    time.sleep(0.1)
    line = ("prep", "--domain", "agriculture", "--source", raw, "--out", tmp_path / "out", "--json")
    assert read_count(vlkit(*line)) == 25
    first = (tmp_path / "out/pairs.parquet").read_bytes()
    assert read_count(vlkit(*line)) == 0
    assert (tmp_path / "out/pairs.parquet").read_bytes() == first
    new = sorted(raw.iterdir())[0] / "new.png"
    write_image(new, (1, 2, 3), seed=77)
    changed = sorted(raw.iterdir())[1] / "0.png"
    write_image(changed, (4, 5, 6), seed=78)
    assert read_count(vlkit(*line)) == 2
    assert read_count(vlkit(*line, "--rehash")) == 26
    # Same size and time, other bytes: the cache cannot know, --rehash does.
    stat, content = changed.stat(), bytearray(changed.read_bytes())
    before = vlkit(*line).json()["fingerprint"]
    (tmp_path / "other.png").write_bytes(content)
    time.sleep(0.1)
    write_image(new, (1, 2, 3), seed=79)
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert vlkit(*line, "--rehash").json()["fingerprint"] != before


def test_a_cache_that_is_damaged_is_told_and_not_used(tmp_path, monkeypatch, vlkit):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache/vlkit").mkdir(parents=True)
    (tmp_path / "cache/vlkit/pictures.sqlite").write_bytes(b"garbage" * 400)
    raw = write_class_folders(tmp_path / "raw", per_class=2)
    outcome = vlkit("prep", "--domain", "agriculture", "--source", raw, "--out", tmp_path / "out")
    assert outcome.code == 0 and "read again" in outcome.err


def test_killed_at_any_moment_the_old_folder_is_whole(tmp_path, vlkit):
    raw, out = write_recipes(tmp_path / "raw", recipes=8), tmp_path / "out"
    line = ["prep", "--domain", "recipes", "--source", str(raw), "--out", str(out)]
    assert vlkit(*line).code == 0
    write_recipes(tmp_path / "raw", recipes=60)
    sizes = set()
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "vlkit", *line, "--seed", "1"], check=True, capture_output=True)
    whole = time.monotonic() - began
    vlkit(*line, "--limit", 32)
    for share in (0.5, 0.8, 0.9, 0.97):
        process = subprocess.Popen(
            [sys.executable, "-m", "vlkit", *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(whole * share)
        process.send_signal(signal.SIGKILL)
        process.wait()
        pairs = read_pairs(out)
        assert pairs.metadata["counts"]["pairs"] == len(pairs)
        sizes.add(len(pairs))
    assert sizes <= {32, 240}
    assert vlkit(*line).code == 0 and len(read_pairs(out)) == 240


def test_what_killed_preps_left_aside_is_removed_by_the_next(tmp_path, vlkit):
    import socket

    raw = write_class_folders(tmp_path / "raw", per_class=2)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for owner, stays in (
        (f"{socket.gethostname()}-{dead.pid}", False),
        (f"{socket.gethostname()}-1", True),
        ("other-7", True),
    ):
        (tmp_path / f".out.{owner}.x.part").mkdir()
        assert vlkit("prep", "--source", raw, "--out", tmp_path / "out").code == 0
        assert (tmp_path / f".out.{owner}.x.part").exists() == stays


def test_an_output_that_is_a_link_stays_one(tmp_path, vlkit):
    raw = write_class_folders(tmp_path / "raw", per_class=2)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/data")
    for _ in range(2):
        assert vlkit("prep", "--source", raw, "--out", tmp_path / "out").code == 0
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/data/pairs.parquet").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["data"]


def test_hidden_files_and_the_output_are_not_part_of_the_source(tmp_path, vlkit):
    raw = write_class_folders(tmp_path / "raw", per_class=2)
    write_patterned_image(raw / ".cache/a/1.png", 5)
    write_patterned_image(raw / "__MACOSX/a/1.png", 6)
    counts = []
    for _ in range(2):
        outcome = vlkit("prep", "--source", raw, "--out", raw / "out", "--copy-images", "--json")
        counts.append(outcome.json()["counts"])
    assert counts[0] == counts[1] and counts[0]["pictures"] == 10 and counts[0]["rejects"] == 0


def test_lookalikes_of_two_classes_count_for_both_when_split(tmp_path, vlkit):
    """A unit of two classes is one of each: neither class is split as if it had none of it."""
    raw = tmp_path / "raw"
    for name, start in (("a", 0), ("b", 50)):
        for number in range(3):
            write_patterned_image(raw / name / f"{number}.png", start + number, size=(160, 120))
    Image.open(raw / "a/0.png").rotate(180).save(raw / "b/turned.jpg", quality=85)
    outcome = vlkit("prep", "--source", raw, "--out", tmp_path / "out")
    assert outcome.code == 0 and "1 group of lookalikes has different classes" in outcome.err
    sizes = yaml.safe_load((tmp_path / "out/data.yaml").read_text())["classes"]
    assert all(min(of.values()) >= 1 for of in sizes.values()), sizes


def test_the_fingerprint_follows_the_splits(tmp_path, vlkit):
    raw = write_class_folders(tmp_path / "raw", per_class=6)
    line = ("prep", "--source", raw, "--out", tmp_path / "out", "--json")
    assert vlkit(*line, "--seed", 1).json()["fingerprint"] != vlkit(*line, "--seed", 2).json()["fingerprint"]
