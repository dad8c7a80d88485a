"""augment: what it adds, what it leaves as it was, and what training makes of it."""

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import write_class_folders, write_image, write_patterned_image, write_table
from PIL import Image

from vlkit.config.data import ImageAugmentSettings
from vlkit.data import labels
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.images import decode
from vlkit.data.images.spec import PixelSpec
from vlkit.data.loading.epoch_sampler import BatchIndices
from vlkit.data.loading.retrieval_batches import PairDataset
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.remote import file_sha256

VIEW = "train_pairs_augmented_with_negatives.csv"


def files(folder: Path) -> dict[str, str]:
    """Name -> hash of every file below."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def data(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture
def augment(vlkit, data):
    """Run augment on a copy of the prepared recipes: its table."""

    def run(*flags, code=0):
        outcome = vlkit("augment", "--data", data, *flags)
        assert outcome.code == code, outcome.err
        return pd.read_parquet(data / "pairs.parquet") if code == 0 else outcome

    return run


def test_new_rows_stand_behind_old_ones_that_stay_as_they_are(augment, data, prepared):
    before, described = files(data), yaml.safe_load((data / "data.yaml").read_text())
    old = pd.read_parquet(data / "pairs.parquet")
    frame = augment("--pictures", 2, "--texts", 2)
    pd.testing.assert_frame_equal(frame.iloc[: len(old)][list(old)], old)
    assert frame["source_pair_id"].iloc[: len(old)].isna().all()
    new = frame.iloc[len(old) :]
    assert set(new["split"]) == {"train"}
    assert set(new["origin"]) == {"augmented", "negative"}
    rows = frame.set_index("pair_id")
    assert rows.index.is_unique
    for row in new.itertuples():
        source = rows.loc[row.source_pair_id]
        assert source["split"] == "train" and source["match"] == 1
        assert (row.image_group, row.unit, row.class_name) == (source["image_group"], source["unit"], None)
        assert (row.match, row.text_group == row.image_group) == ((0, False) if row.origin == "negative" else (1, True))
        assert (row.text_id == source["text_id"]) + (row.image_id == source["image_id"]) == 1
    after = files(data)
    written = {name for name in after if name.startswith("augmented_images/")} | {VIEW}
    assert {name for name in after if before.get(name) != after[name]} - written == {"pairs.parquet", "data.yaml"}
    assert before.keys() <= after.keys()
    now = yaml.safe_load((data / "data.yaml").read_text())
    augmentation = now.pop("augmentation")
    assert now == described
    kinds = [(new["origin"] == "augmented") & new["image"].str.startswith("augmented_images/")]
    kinds += [(new["origin"] == "augmented") & ~kinds[0], new["origin"] == "negative"]
    names = ("augmented images", "augmented texts", "negatives")
    assert augmentation["rows"] == {name: int(kind.sum()) for name, kind in zip(names, kinds, strict=True)}
    assert all(augmentation["rows"].values())


def test_a_written_picture_is_what_its_row_says(augment, data):
    frame = augment("--pictures", 2)
    drawn = frame[frame["image"].str.startswith("augmented_images/")].drop_duplicates("image_id")
    assert {f"augmented_images/{path.name}" for path in (data / "augmented_images").iterdir()} == set(drawn["image"])
    for row in drawn.itertuples():
        content = (data / row.image).read_bytes()
        assert hashlib.sha256(content).hexdigest()[:20] == row.image_id
        assert Image.open(data / row.image).size == (row.width, row.height)
    assert not set(drawn["image_id"]) & set(frame.loc[frame["origin"] == "original", "image_id"])


def test_nothing_of_validation_or_test_appears_among_the_new_rows(augment, data):
    frame = augment("--pictures", 2, "--texts", 3)
    pairs = read_pairs(data)
    held_out, new = frame[frame["split"] != "train"], frame[frame["origin"] != "original"]
    assert not set(held_out["text_id"]) & set(new["text_id"])
    assert not set(held_out["image_id"]) & set(new["image_id"])

    def seen(rows):
        paths = Pairs(rows, pairs.folder, pairs.metadata).image_paths(rows.drop_duplicates("image_id"))
        return {hashlib.sha256(np.asarray(decode.load_rgb(path)).tobytes()).hexdigest() for path in paths}

    assert not seen(held_out) & seen(new)


def test_twice_is_as_once_and_another_seed_is_another(augment, data):
    augment()
    once = files(data)
    augment()
    assert files(data) == once
    augment("--seed", 7, "--pictures", 3)
    other = files(data)
    assert other != once
    augment()
    assert files(data) == once


def test_processes_change_no_byte(augment, data):
    augment("--pictures", 3, "--workers", 1)
    one = files(data)
    augment("--pictures", 3, "--workers", 2)
    assert files(data) == one


def test_asking_for_nothing_undoes_it(augment, data, prepared):
    augment("--preview", 2)
    augment()
    augment("--pictures", 0, "--texts", 0, "--negatives-per-positive", 0)
    (data / "augment_preview.png").unlink()
    assert files(data) == files(prepared)


def test_negatives_do_not_match(augment, data):
    """Against the definition of a match, row by row, and against every right text of the picture, case folded."""
    frame = augment("--negatives-per-positive", 3)
    positives, wrong = frame[(frame["match"] == 1) & (frame["split"] == "train")], frame[frame["match"] == 0]
    assert wrong.groupby("source_pair_id").size().to_dict() == dict.fromkeys(positives["pair_id"], 3)
    assert not wrong.duplicated(["image_id", "text_id"]).any()
    groups_of_text = positives.groupby("text_id")["text_group"].agg(set)
    for row in wrong.itertuples():
        own = positives[positives["image_id"] == row.image_id]
        assert not set(own["image_group"]) & groups_of_text[row.text_id]
        assert row.text.casefold() not in set(own["text"].str.casefold())
        assert row.text_id not in set(own["text_id"])
    assert wrong["text_id"].nunique() > 0.9 * frame[frame["origin"] == "original"]["text_id"].nunique() * 0.7


def test_negatives_of_pictures_that_have_several_conditions(vlkit, tmp_path):
    """Never a text of any class that a picture has; where every text matches, there is none, and it is said."""
    (tmp_path / "raw").mkdir()
    rows = []
    for number in range(60):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
        condition = ("acne", "acne|rosacea", "rosacea", "ACNE")[number % 4]
        described = f"Lesion number {number}." if number % 3 == 0 else ""
        rows.append({"image": f"{number}.png", "condition": condition, "patient": number, "description": described})
    write_table(tmp_path / "raw", rows, "labels.csv")
    out = tmp_path / "out"
    assert vlkit("prep", "--domain", "dermatology", "--source", tmp_path / "raw", "--out", out).code == 0
    outcome = vlkit("augment", "--data", out, "--json")
    frame = pd.read_parquet(out / "pairs.parquet")
    wrong = frame[frame["match"] == 0]
    assert len(wrong) and all(
        set(image).isdisjoint(text) for image, text in zip(wrong["image_group"], wrong["text_group"], strict=True)
    )
    image_sets, text_sets = labels.match_sets(frame)
    assert all(image_sets[i].isdisjoint(text_sets[t]) for i, t in zip(wrong["image_id"], wrong["text_id"], strict=True))
    both = frame[(frame["match"] == 1) & (frame["split"] == "train") & frame["image_group"].map(len).gt(1)]
    asked = frame[(frame["match"] == 1) & (frame["split"] == "train")]
    assert outcome.json()["short_of_negatives"] == len(asked) - len(wrong) >= len(both) > 0
    assert "every other text matches" in outcome.err


def test_hard_negatives_are_the_nearest_wrong_texts(data, trained, vlkit):
    flags = ("--hard", trained, "--negatives-per-positive", 2, "--pictures", 0, "--texts", 0)
    assert vlkit("augment", "--data", data, *flags).code == 0
    from vlkit.models.encode import text_encoder
    from vlkit.models.loading import load_model

    frame = pd.read_parquet(data / "pairs.parquet")
    old = frame[(frame["origin"] == "original") & (frame["split"] == "train")]
    texts = old.drop_duplicates("text_id").reset_index(drop=True)
    vectors = text_encoder(load_model(str(trained)))(list(texts["text"]))
    scores = pd.DataFrame(vectors @ vectors.T, index=texts["text_id"], columns=texts["text_id"])
    wrong = frame[frame["match"] == 0].groupby("source_pair_id")["text_id"].agg(set)
    values: dict[str, set[str]] = {}
    for row in old.itertuples():
        chosen = values.setdefault(row.image_id, set())
        others = texts.loc[(texts["text_group"] != row.text_group) & ~texts["text_id"].isin(chosen), "text_id"]
        ranked = scores.loc[row.text_id, others].sort_values(ascending=False)
        assert sorted(scores.loc[row.text_id, list(wrong[row.pair_id])]) == pytest.approx(sorted(ranked.iloc[:2]))
        chosen |= wrong[row.pair_id]


def test_the_view_has_every_training_row_with_its_label(augment, data):
    frame = augment()
    rows = list(csv.DictReader((data / VIEW).open(encoding="utf-8")))
    train = frame[frame["split"] == "train"]
    assert list(rows[0]) == ["recipe_id", "image_key", "caption", "label"]
    expected = zip(train["image_group"], train["image_key"], train["text"], train["match"].astype(str), strict=True)
    assert [tuple(row.values()) for row in rows] == list(expected)
    assert {row["label"] for row in rows} == {"0", "1"}


def test_a_dry_run_counts_and_writes_nothing(augment, data, vlkit):
    before = files(data)
    outcome = vlkit("augment", "--data", data, "--dry-run", "--json", "--pictures", 2)
    output = outcome.json()
    assert files(data) == before
    augment("--pictures", 2)
    done = yaml.safe_load((data / "data.yaml").read_text())["augmentation"]["rows"]
    assert output["added"] == done
    size = sum(path.stat().st_size for path in (data / "augmented_images").iterdir()) / 2**30
    assert output["disk_gb"] == pytest.approx(size, rel=0.25, abs=1e-4)


def test_a_kill_half_way_leaves_the_folder_as_it_was(data, vlkit, monkeypatch):
    from vlkit.data.augment import augment as room

    vlkit("augment", "--data", data)
    before = files(data)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(room.pairs, "view", killed)
    assert vlkit("augment", "--data", data, "--seed", 5).code == 130
    assert files(data) == before
    assert sorted(path.name for path in data.parent.iterdir()) == ["data"]


def test_the_preview_is_one_sheet_and_nothing_else(augment, data, prepared):
    before = files(data)
    augment("--preview", 5, "--texts", 2)
    after = files(data)
    assert after.keys() - before.keys() == {"augment_preview.png"}
    assert {name: after[name] for name in before} == before
    sheet = np.asarray(Image.open(data / "augment_preview.png"))
    assert sheet.shape[0] > 5 * 200 and sheet.shape[1] > 5 * 200
    again = Image.open(data / "augment_preview.png")
    augment("--preview", 5, "--texts", 2)
    assert np.array_equal(np.asarray(again), np.asarray(Image.open(data / "augment_preview.png")))
    # An original lies where it should, fitted into its cell.
    row = pd.read_parquet(data / "pairs.parquet")
    colours = {tuple(pixel) for pixel in sheet[12:212, 12:212].reshape(-1, 3).tolist()}
    assert len(colours) > 100 and len(row)


def test_prep_again_removes_what_augment_added(augment, data, raw, vlkit, prepared):
    augment("--preview", 2)
    augment()
    outcome = vlkit("prep", "--domain", "recipes", "--source", raw, "--out", data)
    assert outcome.code == 0 and "run it again" in outcome.err
    assert files(data) == files(prepared)
    (data / "augmented_images").mkdir()
    outcome = vlkit("prep", "--domain", "recipes", "--source", raw, "--out", data)
    assert outcome.code == 2 and "augmented_images" in outcome.err


def test_what_a_domain_forbids_stays_off_and_cannot_be_asked_for(vlkit, tmp_path):
    write_class_folders(tmp_path / "raw")
    out = tmp_path / "out"
    assert vlkit("prep", "--domain", "agriculture", "--source", tmp_path / "raw", "--out", out).code == 0
    output = vlkit("augment", "--data", out, "--dry-run", "--json").json()
    assert (output["settings"]["saturation"], output["settings"]["low_light"]) == (0.0, 0.15)
    for flags in (("augment",), ("train-retrieval", "--model", "tiny-siglip")):
        command, *rest = flags
        (tmp_path / "mine.yaml").write_text("saturation: 0.5\n")
        flag = "--config" if command == "augment" else "--augment"
        outcome = vlkit(command, "--data", out, flag, tmp_path / "mine.yaml", "--dry-run", *rest)
        assert outcome.code == 2 and "--saturation is forbidden" in outcome.err
        (tmp_path / "mine.yaml").write_text("saturation: 0.5\nforbid: []\n")
        assert vlkit(command, "--data", out, flag, tmp_path / "mine.yaml", "--dry-run", *rest).code == 0
    # Templates are shared by all splits: a variant may differ from a held-out text in nothing but case.
    assert vlkit("augment", "--data", out).code == 0
    frame = pd.read_parquet(out / "pairs.parquet")
    new = frame[(frame["origin"] == "augmented") & frame["image_looks"].ne("")]
    assert len(new) and not set(new["text_id"]) & set(frame.loc[frame["split"] != "train", "text_id"])


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--rotate-range", "10"), 2, "not two numbers"),
        (("--rotate-range", "25,-25"), 2, "must rise"),
        (("--text-rules", "synonym"), 2, "unknown 'synonym'"),
        (("--forbid", "sepia"), 2, "unknown 'sepia'"),
        (("--hard", "tiny-siglip"), 2, "--hard tiny-siglip"),
        (("--hard", "runs/none"), 6, "no such run: runs/none"),
        (("--synonyms", "nothing"), 2, "crispy = crunchy"),
        (("--preview", 0), 2, "--preview 0"),
        (("--pictures", -1), 2, "--pictures -1"),
        (("--format", "gif"), 2, "none of png, jpeg, webp"),
    ],
)
def test_bad_inputs_are_told(flags, code, message, data, vlkit):
    before = files(data)
    outcome = vlkit("augment", "--data", data, *flags)
    assert (outcome.code, message in outcome.err) == (code, True), outcome.err
    assert files(data) == before


def test_other_tables_and_missing_pictures(data, vlkit, tmp_path, raw):
    csv_only = tmp_path / "table"
    csv_only.mkdir()
    pd.read_parquet(data / "pairs.parquet").to_csv(csv_only / "pairs.csv", index=False)
    outcome = vlkit("augment", "--data", csv_only)
    assert outcome.code == 2 and "no pairs.parquet" in outcome.err
    assert vlkit("augment", "--data", tmp_path / "nowhere").code == 3
    mine = Path(shutil.copytree(raw, tmp_path / "raw"))
    assert vlkit("prep", "--domain", "recipes", "--source", mine, "--out", tmp_path / "mine").code == 0
    frame = pd.read_parquet(tmp_path / "mine/pairs.parquet")
    gone = Path(frame.loc[frame["split"] == "train", "image"].iloc[0])
    gone.unlink()
    before = files(tmp_path / "mine")
    outcome = vlkit("augment", "--data", tmp_path / "mine")
    assert outcome.code == 3 and gone.name in outcome.err
    assert files(tmp_path / "mine") == before


def test_a_disk_that_is_too_small_is_told_before(data, vlkit, monkeypatch):
    usage = shutil.disk_usage(data)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    outcome = vlkit("augment", "--data", data)
    assert outcome.code == 5 and "are free" in outcome.err


def test_a_text_that_another_split_knows_as_right_is_no_negative(vlkit, tmp_path):
    """And where there are texts that only training has, those of validation and test are left to them."""
    rows = []
    for number in range(40):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
        name = "AB"[number % 2]
        split = ("train", "train", "val", "test")[number // 10]
        # What is A's in training is B's in the test.
        text = "shared words" if (name == "A") == (split == "train") else f"only number {number}"
        rows.append({"image": f"{number}.png", "caption": text, "label": name, "split": split})
    write_table(tmp_path / "raw", rows)
    prep = ("prep", "--source", tmp_path / "raw", "--out", tmp_path / "out", "--split-by", "source")
    assert vlkit(*prep).code == 0
    assert vlkit("augment", "--data", tmp_path / "out", "--synonyms", "only = just").code == 0
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    image_sets, text_sets = labels.match_sets(frame)
    wrong = frame[frame["match"] == 0]
    assert len(wrong)
    assert all(image_sets[i].isdisjoint(text_sets[t]) for i, t in zip(wrong["image_id"], wrong["text_id"], strict=True))
    assert "shared words" not in set(wrong["text"])


def test_other_words_for_a_right_text_are_no_negative(vlkit, tmp_path):
    rows = []
    for number in range(60):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
        text = f"{('crispy', 'crunchy')[number % 2]} tofu {'abcdefghij'[number // 6]}"
        rows.append({"image": f"{number}.png", "caption": text, "group": f"g{number}"})
    write_table(tmp_path / "raw", rows)
    prep = ("prep", "--source", tmp_path / "raw", "--out", tmp_path / "out", "--group-column", "group")
    assert vlkit(*prep).code == 0
    flags = ("--synonyms", "crispy = crunchy", "--negatives-per-positive", 5)
    assert vlkit("augment", "--data", tmp_path / "out", *flags).code == 0
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    wrong = frame[frame["match"] == 0].merge(frame, left_on="source_pair_id", right_on="pair_id")
    crispy = wrong[wrong["text_y"].str.startswith("crispy")]
    assert len(crispy) > 20
    assert not (crispy["text_x"] == crispy["text_y"].str.replace("crispy", "crunchy")).any()


def test_files_of_somebody_else_are_not_replaced(data, vlkit):
    for name in (VIEW, "augmented_images/own.jpg"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("mine")
        before = files(data)
        outcome = vlkit("augment", "--data", data)
        assert outcome.code == 2 and "was not written by augment" in outcome.err
        assert files(data) == before
        (data / name).unlink()
    (data / "augmented_images").rmdir()
    assert vlkit("augment", "--data", data).code == 0
    (data / "augmented_images/own.jpg").write_text("mine")
    assert vlkit("augment", "--data", data).code == 2
    (data / "augmented_images/own.jpg").unlink()
    (data / "notes").mkdir()
    (data / "notes/mine.txt").write_text("mine")
    assert vlkit("augment", "--data", data).code == 0
    assert (data / "notes/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("line", ["prefixes: [null, Classic]", "prefixes: [yes]", "synonyms: {crispy: [crunchy]}"])
def test_a_yaml_list_that_holds_no_texts_is_refused(line, data, vlkit, tmp_path):
    (tmp_path / "mine.yaml").write_text(line + "\n")
    outcome = vlkit("augment", "--data", data, "--config", tmp_path / "mine.yaml", "--dry-run")
    assert outcome.code == 2 and "is not a list of texts" in outcome.err
    (tmp_path / "mine.yaml").write_text("seed: null\nprefixes: null\n")
    assert vlkit("augment", "--data", data, "--config", tmp_path / "mine.yaml", "--dry-run").code == 0


def test_a_damaged_data_yaml_is_told(data, vlkit):
    (data / "data.yaml").write_text("settings: 7\n")
    outcome = vlkit("augment", "--data", data)
    assert outcome.code == 3 and "settings holds no" in outcome.err
    (data / "data.yaml").write_text("settings:\naugmentation:\n")
    assert vlkit("augment", "--data", data, "--dry-run").code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_order(number, code, data):
    program = [sys.executable, "-m", "vlkit", "augment", "--data", str(data), "--pictures", "200", "--workers", "2"]
    before = files(data)
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    while not list(data.parent.glob(".data.*.part/augmented_images/*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    _, report = process.communicate(timeout=60)
    assert process.returncode == code and "stopped" in report and "Traceback" not in report
    assert files(data) == before
    assert sorted(path.name for path in data.parent.iterdir()) == ["data"]


def test_the_persian_sample_gets_other_words(vlkit, tmp_path):
    assert vlkit("sample", "persian-food", tmp_path / "raw").code == 0
    prep = ("prep", "--domain", "persian-food", "--source", tmp_path / "raw", "--out", tmp_path / "out")
    assert vlkit(*prep).code == 0
    output = vlkit("augment", "--data", tmp_path / "out", "--pictures", 0, "--json").json()
    assert output["added"]["augmented texts"] > 50


def test_rows_that_augment_did_not_make_stay_whatever_they_are_called(augment, data, vlkit, trained):
    """Scraped rows, and somebody's own mismatched pairs: kept, and neither varied nor taken for matching."""
    old = pd.read_parquet(data / "pairs.parquet")
    train = old.index[old["split"] == "train"]
    old.loc[train[:5], "origin"] = "scraped"
    mine = old.loc[train[10]].to_dict() | {"text": "a text that is wrong", "text_id": "f" * 20, "text_group": "nobody"}
    mine |= {"pair_id": "e" * 20, "match": 0, "origin": "negative"}
    old = pd.concat([old, pd.DataFrame([mine])], ignore_index=True)
    old.to_parquet(data / "pairs.parquet", index=False)
    for _ in range(2):
        frame = augment()
        pd.testing.assert_frame_equal(frame.iloc[: len(old)][list(old)], old)
    new = frame.iloc[len(old) :]
    assert "e" * 20 not in set(new["source_pair_id"]) and "f" * 20 not in set(new["text_id"])
    assert set(old.loc[train[:5], "pair_id"]) <= set(new["source_pair_id"])
    assert vlkit("augment", "--data", data, "--hard", trained, "--pictures", 0).code == 0
    augment("--pictures", 0, "--texts", 0, "--negatives-per-positive", 0)
    pd.testing.assert_frame_equal(pd.read_parquet(data / "pairs.parquet"), old)


def test_a_phrasing_of_validation_or_test_is_left_out(vlkit, tmp_path):
    rows = []
    for number in range(30):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
        split = ("train", "train", "test")[number % 3]
        text = f"Pie {number - 2}" if split == "test" else f"Pie {number} (vegan)"
        rows.append({"image": f"{number}.png", "caption": text, "group": f"g{number}", "split": split})
    write_table(tmp_path / "raw", rows)
    prep = ("prep", "--source", tmp_path / "raw", "--out", tmp_path / "out", "--split-by", "source")
    assert vlkit(*prep, "--group-column", "group", "--val-share", 0).code == 0
    output = vlkit("augment", "--data", tmp_path / "out", "--json").json()
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    held_out, new = frame[frame["split"] == "test"], frame[frame["origin"] != "original"]
    assert not set(held_out["text"]) & set(new["text"])
    assert output["left_out"] == {"equal to a text of validation or test": len(held_out)}
    assert set(new["text"]) & {f"Pie {number}" for number in range(30)}


def test_the_view_the_keys_and_the_fingerprint_follow(augment, data):
    frame = augment()
    drawn = frame[frame["image"].str.startswith("augmented_images/")]
    assert (drawn["image_key"] == drawn["image"]).all()
    first = yaml.safe_load((data / "data.yaml").read_text())["augmentation"]["fingerprint"]
    frame = augment("--pictures", 0, "--texts", 0, "--seed", 5)
    second = yaml.safe_load((data / "data.yaml").read_text())["augmentation"]["fingerprint"]
    augment("--pictures", 0, "--texts", 0, "--seed", 6)
    third = yaml.safe_load((data / "data.yaml").read_text())["augmentation"]["fingerprint"]
    assert len({first, second, third}) == 3


def test_what_is_not_augments_is_kept_and_not_copied(augment, data):
    (data / "sub/augmented_images").mkdir(parents=True)
    for name in ("sub/augmented_images/a.txt", "sub/pairs.parquet", "sub/data.yaml"):
        (data / name).write_text("mine")
    (data / "link").symlink_to("docstore.parquet")
    before = (data / "docstore.parquet").stat().st_ino
    augment()
    assert (data / "docstore.parquet").stat().st_ino == before
    assert (data / "link").is_symlink()
    assert {(data / name).read_text() for name in ("sub/augmented_images/a.txt", "sub/pairs.parquet")} == {"mine"}


def test_a_disk_just_too_small(data, vlkit, monkeypatch):
    output = vlkit("augment", "--data", data, "--dry-run", "--pictures", 9, "--json").json()
    usage = shutil.disk_usage(data)
    for share, code in ((0.9, 5), (1.2, 0)):
        free = int(output["disk_gb"] * 2**30 * share)
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        assert vlkit("augment", "--data", data, "--dry-run", "--pictures", 9).code == code


# Training


@pytest.fixture
def encoder(tiny_folder):
    from vlkit.models.loading import load_dual_encoder

    return load_dual_encoder(str(tiny_folder("tiny-clip")))


def dataset(data, encoder, *, mode="multi-positive", augmenter=None, negatives=True):
    frame = read_pairs(data).frame
    rows = frame[frame["match"] == 0].reset_index(drop=True)
    train = read_pairs(data).positives().split("train")
    return PairDataset(
        train,
        PixelSpec(32),
        encoder.tokenize,
        encoder.pad,
        labels=mode,
        negatives=rows if negatives and len(rows) else None,
        augmenter=augmenter,
    )


@pytest.mark.parametrize("mode", ["eye", "multi-positive", "mask"])
def test_negatives_join_a_batch_as_columns(augment, data, encoder, mode):
    frame = augment("--negatives-per-positive", 2)
    items = dataset(data, encoder, mode=mode)
    plain = dataset(data, encoder, mode=mode, negatives=False)
    rows = list(range(0, 40, 2))
    batch, without = items[BatchIndices(0, rows, [0] * 20)], plain[BatchIndices(0, rows, [0] * 20)]
    signs = batch.labels.rows()
    assert torch.equal(signs[:, :20], without.labels.rows())
    width = without.texts.shape[1]
    assert torch.equal(batch.texts[batch.text_index[:20], :width], without.texts[without.text_index])
    own = set(frame.set_index("pair_id").loc[batch.pair_ids, "text_id"])
    chosen = frame[frame["source_pair_id"].isin(batch.pair_ids) & (frame["match"] == 0)]
    extra = sorted(set(chosen["text_id"]) - own)
    assert signs.shape == (20, 20 + len(extra))
    # Column by column, against the table.
    image_sets, text_sets = labels.match_sets(frame)
    texts = frame.drop_duplicates("text_id").set_index("text_id")["text"]
    observed = {tuple(batch.texts[batch.text_index[column]].tolist()): column for column in range(20, 20 + len(extra))}
    tokens, _ = encoder.tokenize([texts[text] for text in extra])
    width = batch.texts.shape[1]
    pad = next(row[-1] for row in batch.texts.tolist() if len(set(row[-2:])) == 1)
    for text, ids in zip(extra, tokens, strict=True):
        column = observed[tuple(ids + [pad] * (width - len(ids)))]
        for position, pair in enumerate(batch.pair_ids):
            image = frame.set_index("pair_id").loc[pair, "image_id"]
            matches = bool(image_sets[image] & text_sets[text])
            expected = {"eye": -1, "mask": 0 if matches else -1, "multi-positive": 1 if matches else -1}[mode]
            assert signs[position, column] == expected


def test_only_negatives_of_what_is_trained_on_are_taken(augment, data):
    from vlkit.config.training import TrainRetrievalConfig
    from vlkit.storage import Location
    from vlkit.training.setup.rows import RetrievalRows

    frame = augment()
    val = (
        frame[frame["split"] == "val"]
        .iloc[[0]]
        .assign(match=0, pair_id="e" * 20, text_group="nobody", text_id="f" * 20)
    )
    pd.concat([frame, val], ignore_index=True).to_parquet(data / "pairs.parquet", index=False)
    whole = RetrievalRows.read(TrainRetrievalConfig(data=Location(data)))
    assert whole.negative_count == ((frame["match"] == 0) & (frame["split"] == "train")).sum()
    part = RetrievalRows.read(TrainRetrievalConfig(data=Location(data), limit=20))
    assert len(part.train) == 20
    assert set(part.negatives["image_id"]) <= set(part.train.frame["image_id"])
    assert part.train.frame["unit"].nunique() < 6, "whole units with all their rows, but for the last"
    assert RetrievalRows.read(TrainRetrievalConfig(data=Location(data), negatives=False)).negatives is None


def test_a_run_that_is_older_than_a_setting_goes_on(data, vlkit, tmp_path):
    train = ("train-retrieval", "--data", data, "--model", "tiny-siglip", "--runs-dir", tmp_path, "--name", "a")
    assert vlkit(*train, "--steps", 4, "--batch-size", 16).code == 0
    (tmp_path / "a/finished.json").unlink()
    settings = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    for name in ("negatives", "augment", "patience"):
        settings.pop(name)
    (tmp_path / "a/config.yaml").write_text(yaml.safe_dump(settings))
    assert vlkit(*train, "--steps", 4, "--batch-size", 16).code == 0


def test_what_training_sees_in_epoch_0_is_what_is_written(augment, data, encoder):
    frame = augment("--pictures", 1)
    old = dataset(data, encoder, augmenter=ImageAugmenter.from_settings(ImageAugmentSettings()))
    batch = old[BatchIndices(0, list(range(30)), [0] * 30)]
    rows, written = frame.set_index("pair_id"), 0
    for position, pair in enumerate(batch.pair_ids):
        source = rows.loc[pair]
        created = frame[(frame["source_pair_id"] == pair) & frame["image"].str.startswith("augmented_images/")]
        created = created[created["match"] == 1]
        if len(created):
            written += 1
            pixels = decode.load_pixels(data / created["image"].iloc[0], PixelSpec(32))
        else:
            pixels = decode.load_pixels(Path(source["image"]), PixelSpec(32))
        assert np.array_equal(batch.images[position].numpy(), pixels)
    assert written > 20
    assert not torch.equal(old[BatchIndices(1, list(range(30)), [0] * 30)].images, batch.images)


def test_a_run_on_augmented_data_repeats_to_the_byte_from_its_snapshot(augment, data, vlkit, tmp_path):
    augment()
    (tmp_path / "mine.yaml").write_text("rotate: 0.9\nnegatives_per_positive: 3\n")
    train = ("train-retrieval", "--data", data, "--model", "tiny-siglip", "--runs-dir", tmp_path, "--steps", 4)
    flags = ("--batch-size", 16, "--augment", tmp_path / "mine.yaml", "--seed", 3)
    outcome = vlkit(*train, "--name", "first", *flags)
    assert outcome.code == 0, outcome.err
    assert "augmented anew" in outcome.err and "negatives: 1.00 texts a row" in outcome.err
    settings = yaml.safe_load((tmp_path / "first/config.yaml").read_text())
    assert (settings["augment"]["rotate"], settings["augment"]["seed"]) == (0.9, 3)
    (tmp_path / "mine.yaml").unlink()
    again = vlkit("train-retrieval", "--config", tmp_path / "first/config.yaml", "--name", "second")
    assert again.code == 0, again.err
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("first", "second"))
    assert file_sha256(one) == file_sha256(other)
    config = ("train-retrieval", "--config", tmp_path / "first/config.yaml")
    assert vlkit(*config, "--name", "no-negatives", "--no-negatives").code == 0
    assert vlkit(*train, "--name", "as-they-are", "--batch-size", 16, "--seed", 3).code == 0
    for name in ("no-negatives", "as-they-are"):
        assert file_sha256(tmp_path / name / "model/model.safetensors") != file_sha256(one)


def test_an_unfinished_run_does_not_go_on_with_another_augmentation(augment, data, vlkit, tmp_path):
    train = ("train-retrieval", "--data", data, "--model", "tiny-siglip", "--runs-dir", tmp_path, "--name", "a")
    assert vlkit(*train, "--steps", 4, "--batch-size", 16).code == 0
    (tmp_path / "a/finished.json").unlink()
    augment()
    outcome = vlkit(*train, "--steps", 4, "--batch-size", 16)
    assert outcome.code == 2 and "data augmentation was None" in outcome.err


def test_test_rows_are_measured_as_before_whatever_training_rows_were_added(augment, data, trained, vlkit, tmp_path):
    """The run was trained on the plain folder: the same test rows, the same numbers, no warning of a changed folder."""
    before = vlkit("eval", "--run", trained, "--data", data, "--out", tmp_path / "one", "--json").json()
    augment()
    outcome = vlkit("eval", "--run", trained, "--data", data, "--out", tmp_path / "other", "--json")
    assert outcome.json()["metrics"] == before["metrics"]
    assert outcome.json()["data"]["fingerprint"] == before["data"]["fingerprint"]


def test_the_same_file_serves_both_commands_and_odd_keys_are_refused(data, vlkit, tmp_path):
    (tmp_path / "mine.yaml").write_text("rotate: 1\nroate_range: [1, 2]\n")
    for command, flag in (("augment", "--config"), ("train-retrieval", "--augment")):
        outcome = vlkit(command, "--data", data, flag, tmp_path / "mine.yaml", "--dry-run")
        assert outcome.code == 2 and "roate_range" in outcome.err and "rotate_range" in outcome.err
    outcome = vlkit("train-retrieval", "--data", data, "--augment", tmp_path / "none.yaml")
    assert outcome.code == 2 and "no such file" in outcome.err


def test_oversampled_rows_keep_their_weight(vlkit, tmp_path):
    write_class_folders(tmp_path / "raw", per_class=8)
    for number in range(40):
        write_image(tmp_path / "raw/Leaf___common" / f"{number}.png", (10 * (number % 9), 90, 120), seed=9000 + number)
    prep = ("prep", "--domain", "agriculture", "--source", tmp_path / "raw", "--out", tmp_path / "out")
    assert vlkit(*prep, "--oversample-below", 12, "--near-duplicates", -1).code == 0
    assert vlkit("augment", "--data", tmp_path / "out").code == 0
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    rows = frame.set_index("pair_id")
    new = frame[frame["origin"] != "original"]
    assert (new["weight"].to_numpy() == rows.loc[new["source_pair_id"], "weight"].to_numpy()).all()
    assert new["weight"].nunique() > 1


def test_the_whole_is_said_as_one_json_object(data, vlkit):
    content = json.loads(vlkit("augment", "--data", data, "--json").out)
    assert content.keys() == {
        *("data", "training_rows", "added", "left_out", "short_of_negatives", "disk_gb", "dry_run"),
    }
