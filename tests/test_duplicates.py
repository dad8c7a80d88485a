"""Copies, lookalikes, conflicts; and pictures read once, on all cores, with the same result."""

import os
import shutil
import signal
import subprocess
import sys
import time

import imagehash
import numpy as np
import pandas as pd
import pytest
from conftest import patterned, picture, write_class_folders, write_recipes
from PIL import Image, ImageEnhance

from vlkit.config import PrepConfig
from vlkit.data import checking, perceptual
from vlkit.data.images import check
from vlkit.data.pairs import read_pairs
from vlkit.data.sources import Source
from vlkit.errors import DataError
from vlkit.storage import Location

COPIES = {
    "jpeg": lambda p: p,
    "half": lambda p: p.resize((p.width // 2, p.height // 2)),
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.15),
    "turned": lambda p: p.transpose(Image.Transpose.ROTATE_90),
    "upside down": lambda p: p.transpose(Image.Transpose.ROTATE_180),
    "mirrored": lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_look_alike_and_others_do_not(name, tmp_path):
    paths = [patterned(tmp_path / f"{seed}.png", seed, size=(160, 120)) for seed in range(12)]
    COPIES[name](Image.open(paths[5])).save(tmp_path / "copy.jpg", quality=70)
    looks = [check(path).looks for path in [*paths, tmp_path / "copy.jpg"]]
    found = perceptual.clusters(looks, PrepConfig.near_duplicates).tolist()
    assert found == [*range(12), 5]


@pytest.mark.parametrize("bits", [8, 20, 28, 64])
def test_clusters_are_what_hangs_together_within_the_distance(bits, tmp_path):
    """Against a loop over imagehash's own distance and all 8 ways to turn, in a crowd with many near misses."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(14):
        base = patterned(tmp_path / f"{number}.png", number % 5, size=(64, 64))
        noisy = np.asarray(Image.open(base)).astype(int) + rng.integers(-90, 90, (64, 64, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).rotate(90 * (number % 4)).save(base)
        paths.append(base)

    def hashes(path):
        grey = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BOX).convert("L")
        return [imagehash.phash(each, hash_size=16) for each in (grey, *(grey.transpose(t) for t in Image.Transpose))]

    hashed = [hashes(path) for path in paths]
    near = {(i, j) for i in range(14) for j in range(14) if min(one - hashed[j][0] for one in hashed[i]) <= bits}
    expected = []
    for start in range(14):
        reached, frontier = {start}, {start}
        while frontier := {j for i in frontier for j in range(14) if (i, j) in near or (j, i) in near} - reached:
            reached |= frontier
        expected.append(min(reached))
    looks = [check(path).looks for path in paths]
    assert perceptual.clusters(looks, bits).tolist() == expected
    assert 5 <= len(set(expected)) <= 14
    assert perceptual.first_alike(looks[:1], looks[1:], 256) == (0, 0)


def test_thousands_of_lookalikes_cost_little(tmp_path):
    looks = check(patterned(tmp_path / "a.png", 1)).looks
    nearly = [looks[:3] + bytes([n % 256 & 3, n >> 8 & 3]) + looks[5:] for n in range(6000)]
    assert set(perceptual.clusters([*nearly, b"", b""], 28).tolist()) == {0, 6000, 6001}


def test_colour_and_detail_decide_too(tmp_path):
    grey = np.asarray(Image.open(patterned(tmp_path / "a.png", 1)).convert("L")).astype(float)
    for name, tint in (("warm", (1.0, 0.7, 0.4)), ("cold", (0.4, 0.7, 1.0))):
        Image.fromarray((grey[:, :, None] * tint).astype(np.uint8)).save(tmp_path / f"{name}.png")
    looks = [check(tmp_path / f"{name}.png").looks for name in ("warm", "cold")]
    assert perceptual.clusters(looks, 31).tolist() == [0, 1]
    for shade in (250, 252):
        Image.new("RGB", (50, 50), (shade,) * 3).save(tmp_path / f"{shade}.png")
    blank = [check(tmp_path / f"{shade}.png").looks for shade in (250, 252)]
    assert blank == [b"", b""] and perceptual.clusters(blank, 31).tolist() == [0, 1]


@pytest.fixture
def folders(tmp_path):
    """Class folders with a turned copy in another class and an exact copy in a third."""
    raw = write_class_folders(tmp_path / "raw", per_class=4)
    names = sorted(path.name for path in raw.iterdir())
    patterned(raw / names[0] / "original.png", 7, size=(160, 120))
    Image.open(raw / names[0] / "original.png").rotate(90, expand=True).save(raw / names[1] / "turned.jpg", quality=80)
    shutil.copy(raw / names[0] / "original.png", raw / names[2] / "copy.png")
    return raw, names


@pytest.mark.parametrize("rule", ["keep", "drop", "first"])
def test_one_picture_under_two_classes(rule, folders, tmp_path, vlkit):
    raw, names = folders
    outcome = vlkit(
        "prep", "--domain", "agriculture", "--source", raw, "--out", tmp_path / "out", "--on-conflict", rule
    )
    assert outcome.code == 0 and "1 picture stands under several classes" in outcome.err
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    rows = frame[frame["image_key"].str.endswith(("original.png", "copy.png"))]
    matches = read_pairs(tmp_path / "out").match_sets()[0]
    if rule == "drop":
        assert not len(rows)
        assert sum(pd.read_csv(tmp_path / "out/rejects.csv")["reason"].str.contains("under other classes")) == 4
    else:
        kept = {names[0], names[2]} if rule == "keep" else {names[0]}
        assert {group for group in matches[rows["image_id"].iloc[0]] if "\0" not in group} == kept
    turned = frame[frame["image_key"].str.endswith("turned.jpg")]
    if rule != "drop":
        assert set(turned["unit"]) == set(rows["unit"]) and set(turned["split"]) == set(rows["split"])


def test_a_planted_lookalike_across_splits_is_refused(tmp_path, vlkit):
    for number in range(20):
        patterned(tmp_path / f"raw/{number}.png", number)
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
    stolen["image_looks"] = perceptual.kept(check(tmp_path / "mirrored.png").looks)
    pd.concat([frame, pd.DataFrame([stolen])]).to_parquet(tmp_path / "alone.parquet")
    with pytest.raises(DataError, match="look the same"):
        read_pairs(tmp_path / "alone.parquet")


def test_one_picture_and_text_in_two_groups_is_one_row_of_both(tmp_path, vlkit):
    raw = write_recipes(tmp_path / "raw", recipes=12, pictures=1)
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
    picture(new, (1, 2, 3), seed=77)
    changed = sorted(raw.iterdir())[1] / "0.png"
    picture(changed, (4, 5, 6), seed=78)
    assert read_count(vlkit(*line)) == 2
    assert read_count(vlkit(*line, "--rehash")) == 26
    # Same size and time, other bytes: the cache cannot know, --rehash does.
    stat, content = changed.stat(), bytearray(changed.read_bytes())
    before = vlkit(*line).json()["fingerprint"]
    (tmp_path / "other.png").write_bytes(content)
    time.sleep(0.1)
    picture(new, (1, 2, 3), seed=79)
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert vlkit(*line, "--rehash").json()["fingerprint"] != before


def test_processes_find_what_one_finds(tmp_path):
    raw = write_class_folders(tmp_path / "raw", per_class=30)
    (raw / "broken.png").write_bytes(b"no")
    source = Source(Location(raw))
    one = checking.check_all(source, list(source.files), workers=1, rehash=True).of
    assert len(one) == 151
    assert checking.check_all(source, list(source.files), workers=2, rehash=True).of == one


def test_a_cache_that_is_damaged_is_told_and_not_used(tmp_path, monkeypatch, vlkit):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache/vlkit").mkdir(parents=True)
    (tmp_path / "cache/vlkit/pictures.sqlite").write_bytes(b"garbage" * 400)
    raw = write_class_folders(tmp_path / "raw", per_class=2)
    outcome = vlkit("prep", "--domain", "agriculture", "--source", raw, "--out", tmp_path / "out")
    assert outcome.code == 0 and "read anew" in outcome.err


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
        assert pairs.described["counts"]["pairs"] == len(pairs)
        sizes.add(len(pairs))
    assert sizes <= {32, 240}
    assert vlkit(*line).code == 0 and len(read_pairs(out)) == 240
