"""Folders as they really come: nothing is lost without a word, nothing is read that should not be."""

import json
import os

import pandas as pd
import pytest
import yaml
from helpers import read_rejects, write_class_folders, write_patterned_image, write_table


def pictures(folder, names):
    for number, name in enumerate(names):
        write_patterned_image(folder / name, number + 1)


def test_weights_and_sizes_count_every_class_of_a_picture(prep, tmp_path):
    """Rare only ever second; rows without a class; groups beside classes."""
    cells = ["common|rare" if n < 6 else "common" if n < 50 else "" for n in range(60)]
    rows = [
        {"image": f"{n}.png", "caption": f"words {n}", "label": cell, "who": f"w{n}"} for n, cell in enumerate(cells)
    ]
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(60)])
    write_table(tmp_path / "raw", rows)
    frame = prep("--group-column", "who", "--oversample-below", 10)
    described = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert {name: sum(of.values()) for name, of in described["classes"].items()} == {"common": 50, "rare": 6}
    assert described["counts"]["classes"] == 2
    training = frame[frame["split"] == "train"]
    rare = training["image_key"].isin([f"{n}.png" for n in range(6)])
    assert set(training.loc[rare, "weight"]) == {10 / rare.sum()}
    assert set(training.loc[~rare, "weight"]) == {1.0}


@pytest.mark.parametrize("tree", ["plain", "wrapped", "beside", "below"])
def test_folders_of_splits_are_seen_wherever_they_stand(tree, prep, tmp_path):
    place = {
        "plain": "{split}/{name}",
        "wrapped": "dataset/{split}/{name}",
        "beside": "{split}/{name}",
        "below": "{name}/{split}",
    }[tree]
    names = [
        f"{place.format(split=split, name=name)}/{n}.png"
        for split in ("train", "val", "test")
        for name in ("cat", "dog")
        for n in range(2)
    ]
    pictures(tmp_path / "raw", [*names, *(["docs/figure.png"] if tree == "beside" else [])])
    frame = prep("--split-by", "source")
    assert set(frame["class_name"]) == {"cat", "dog"}
    for key, split in zip(frame["image_key"], frame["split"], strict=True):
        assert split in key.split("/")
    if tree == "beside":
        assert read_rejects(tmp_path)["docs/figure.png"] == "not in a folder of a split"


def test_folders_that_look_like_masks_or_places_may_be_classes(prep, tmp_path):
    names = [
        "mask/1.png",
        "mask/2.png",
        "no_mask/1.png",
        "beef/raw/1.png",
        "beef/cooked/1.png",
        "raw/1.png",
        "x/images/1.png",
    ]
    pictures(tmp_path / "raw", names)
    frame = prep()
    actual = dict(zip(frame["image_key"], frame["class_name"], strict=True))
    assert actual == {
        name: name.removesuffix("/images/1.png") if "/images/" in name else name.rpartition("/")[0] for name in names
    }
    pictures(tmp_path / "raw/leaf", ["1.png", "mask/1.png"])
    write_patterned_image(tmp_path / "raw/leaf/only_mask.png", 77)
    frame = prep()
    assert read_rejects(tmp_path)["leaf/mask/1.png"] == "a mask: it is in a folder of masks"
    # A name that ends like a mask's, with nothing beside it that it could mask, is a picture.
    assert "leaf/only_mask.png" in set(frame["image_key"])


def test_rows_that_the_source_puts_in_no_split_are_listed(prep, tmp_path):
    rows = [
        {"image": f"{n}.png", "caption": f"words {n}", "split": ["train", "train", "test", "", "fold1", "val"][n % 6]}
        for n in range(24)
    ]
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(24)])
    write_table(tmp_path / "raw", rows)
    frame = prep("--split-by", "source")
    assert len(frame) == 16
    assert list(read_rejects(tmp_path).values()).count("the source assigns it to no split") == 8
    assert dict(zip(frame["image_key"], frame["split"], strict=True)) == {
        row["image"]: row["split"] for row in rows if row["split"] in ("train", "val", "test")
    }


def test_a_copy_in_two_of_the_sources_splits_is_told_and_held_out(vlkit, tmp_path):
    pictures(tmp_path / "raw", [f"{s}/{c}/{n}.png" for s in ("train", "test") for c in "ab" for n in range(4)])
    (tmp_path / "raw/test/a/0.png").write_bytes((tmp_path / "raw/train/a/0.png").read_bytes())
    outcome = vlkit("prep", "--source", tmp_path / "raw", "--out", tmp_path / "out", "--split-by", "source")
    assert outcome.code == 0 and "1 unit is in several of the source's splits" in outcome.err
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    assert not frame.loc[frame["split"] == "train", "image_key"].str.contains("a/0.png").any()


def test_captions_of_two_pictures_each_leave_the_shares_as_they_are(prep, tmp_path):
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(60)])
    write_table(tmp_path / "raw", [{"image": f"{n}.png", "caption": f"words {n // 2}"} for n in range(60)])
    assert prep()["split"].value_counts().to_dict() == {"train": 49, "test": 6, "val": 5}
    write_table(tmp_path / "raw", [{"image": f"{n}.png", "caption": f"words {n % 3}"} for n in range(60)])
    counts = prep().groupby(["text", "split"]).size().unstack()
    assert (counts[["train", "val", "test"]] == [16, 2, 2]).all(axis=None)


def test_two_coco_files_that_count_from_one(prep, tmp_path):
    """The same ids and the same file names in both splits are other pictures."""
    for split, start in (("train", 0), ("val", 50)):
        for n in range(10):
            write_patterned_image(tmp_path / f"raw/images/{split}/{n}.png", start + n)
        content = {
            "images": [{"id": n, "file_name": f"{n}.png"} for n in range(10)],
            "annotations": [{"id": n, "image_id": n, "caption": f"{split} words {n}"} for n in range(10)],
        }
        (tmp_path / "raw/annotations").mkdir(exist_ok=True)
        (tmp_path / f"raw/annotations/captions_{split}.json").write_text(json.dumps(content))
    frame = prep("--domain", "coco")
    assert frame["unit"].nunique() == frame["image_group"].nunique() == 20
    assert set(frame.loc[frame["split"] == "test", "image_key"]) == {f"images/val/{n}.png" for n in range(10)}
    unseen = prep("--domain", "coco", "--no-check-images")
    assert sorted(unseen["image"]) == sorted(frame["image"])


def test_without_looking_json_folders_name_their_own_pictures(prep, tmp_path):
    for dish in "abcdefgh":
        write_patterned_image(tmp_path / f"raw/{dish}/0.png", ord(dish))
        messages = {"response": f"passage {dish}", "image_path": "0.png"}
        (tmp_path / f"raw/{dish}/info.json").write_text(json.dumps(messages))
    frame = prep("--domain", "persian-food", "--no-check-images")
    assert set(frame["image_key"]) == {f"{dish}/0.png" for dish in "abcdefgh"}
    assert "names" in yaml.safe_load((tmp_path / "out/data.yaml").read_text())["image_ids"]


def test_lists_that_cannot_be_read_are_no_classes(prep, tmp_path):
    cells = ["['acne' 'eczema']", "['acne', 'ecz", "{'acne': 0.7}", "('acne', 'eczema')", "{'eczema'}", "[nan, 'acne']"]
    cells += ["acne", "eczema"] * 4
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(len(cells))])
    write_table(tmp_path / "raw", [{"image": f"{n}.png", "label": cell} for n, cell in enumerate(cells)])
    frame = prep()
    assert set(frame["class_name"]) == {"acne", "eczema"}
    report = read_rejects(tmp_path)
    assert {name for name, reason in report.items() if "list that cannot be read" in reason} == {
        "0.png",
        "1.png",
        "2.png",
    }


def test_a_sources_own_columns_are_kept_beside_preps(prep, tmp_path):
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(10)])
    rows = [
        {"image": f"{n}.png", "caption": f"w {n}", "width": f"{n} cm", "origin": "Iran", "who": f"p{n}"}
        for n in range(10)
    ]
    write_table(tmp_path / "raw", rows)
    frame = prep("--unit-column", "who")
    assert set(frame["width"]) == {96} and set(frame["origin"]) == {"original"}
    assert list(frame["source_width"]) == [f"{n} cm" for n in range(10)]
    assert set(frame["source_origin"]) == {"Iran"} and set(frame["who"]) == set(frame["unit"])
    for dish in "ab":
        write_patterned_image(tmp_path / f"raw2/{dish}/0.png", ord(dish))
        messages = {"response": f"passage {dish}", "split": "x", "image_id": 7, "text": "t", "pair_id": "p"}
        (tmp_path / f"raw2/{dish}/info.json").write_text(json.dumps(messages))
    (tmp_path / "raw").rename(tmp_path / "old")
    (tmp_path / "raw2").rename(tmp_path / "raw")
    assert set(prep("--domain", "persian-food")["source_split"]) == {"x"}


def test_what_cannot_be_read_is_listed_and_stops_nothing(prep, tmp_path):
    raw = tmp_path / "raw"
    pictures(raw, [f"a/{n}.png" for n in range(6)])
    (raw / "a/broken.png").symlink_to(raw / "nowhere.png")
    (raw / "linked").symlink_to(raw / "a")
    os.mkfifo(raw / "a/pipe.png")
    (raw / "a" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    assert len(prep("--layout", "class-folders")) == 6
    report = read_rejects(tmp_path)
    assert report["a/broken.png"] == "the link leads nowhere"
    assert report["linked"] == "a link to a folder inside the source: not followed"
    assert report["a/pipe.png"] == "neither a file nor a folder"
    assert "its name is not UTF-8" in report.values()


def test_one_text_in_another_encoding_is_one_reject(prep, tmp_path):
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(5)])
    for n in range(5):
        (tmp_path / f"raw/{n}.txt").write_bytes("crème".encode("latin1" if n == 2 else "utf-8"))
    assert len(prep()) == 4
    assert "not UTF-8" in read_rejects(tmp_path)["2.png"]


def test_a_link_inside_does_not_open_a_way_out(prep, tmp_path):
    raw = tmp_path / "raw"
    pictures(raw / "real", [f"{n}.png" for n in range(4)])
    write_patterned_image(tmp_path / "elsewhere/secret.png", 99)
    (raw / "real/x.png").symlink_to(tmp_path / "elsewhere/secret.png")
    (raw / "inside").symlink_to(raw / "real")
    names = ["real/0.png", "real/1.png", "inside/2.png", "inside/x.png"]
    write_table(raw, [{"image": name, "caption": name} for name in names])
    assert set(prep()["text"]) == set(names[:3])
    # Unseen, a name is only a name; but nothing from outside is copied.
    prep("--no-check-images")
    outcome = prep("--no-check-images", "--copy-images", code=3)
    assert "leads out" in outcome.err


@pytest.mark.parametrize("stray", ["classes.json", "notes.csv", "cat/1.txt", "cat/dataset.json"])
def test_a_stray_file_does_not_change_the_layout(stray, prep, tmp_path):
    pictures(tmp_path / "raw", [f"{c}/{n}.png" for c in ("cat", "dog") for n in range(4)])
    content = {"classes.json": '{"0": "cat"}', "notes.csv": "what,when\nx,y\n", "cat/dataset.json": "{}"}
    (tmp_path / "raw" / stray).write_text(content.get(stray, "words"))
    assert set(prep()["class_name"]) == {"cat", "dog"}


def test_the_column_whose_pictures_are_there_is_taken(prep, tmp_path):
    pictures(tmp_path / "raw", [f"p/{n}.png" for n in range(6)])
    write_table(
        tmp_path / "raw", [{"Image": f"id{n}", "Image_Path": f"p/{n}.png", "Caption": f"w {n}"} for n in range(6)]
    )
    assert set(prep()["image_key"]) == {f"p/{n}.png" for n in range(6)}


def test_a_column_that_begins_late_is_read(prep, tmp_path):
    pictures(tmp_path / "raw", [f"{n % 5}.png" for n in range(5)])
    rows = [
        {"image": f"{n % 5}.png", "caption": f"w {n}", **({"late": f"late {n}"} if n > 240 else {})} for n in range(250)
    ]
    (tmp_path / "raw/t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prep("--text-column", "caption,late")["text"].str.startswith("late").sum() == 9
    assert "no column 'lat'" in prep("--text-column", "caption,lat", code=3).err


def test_what_would_be_lost_or_cannot_be_meant_is_refused_first(vlkit, tmp_path):
    raw = write_class_folders(tmp_path / "raw", per_class=6)
    (tmp_path / "out/images").mkdir(parents=True)
    base = ("prep", "--source", raw, "--out")
    for flags, report in {
        (tmp_path / "out",): "prep did not write it",
        (tmp_path,): "would replace",
        (tmp_path / "new", "--templates", "a photo of {clas_name}"): "did you mean 'class_name'?",
        (tmp_path / "new", "--min-words", 5, "--max-words", 2): "more than --max-words",
        (tmp_path / "new", "--training-view", "pairs.parquet"): "CSV",
        (tmp_path / "new", "--seed", -1): "at least 0",
    }.items():
        outcome = vlkit(*base, *flags)
        assert outcome.code == 2 and report in outcome.err, (flags, outcome.err)
    assert vlkit(*base, tmp_path / "new", "--copy-images").code == 0
    images = ("--image-root", tmp_path / "new")
    assert vlkit("prep", "--source", raw, *images, "--out", tmp_path / "new").code == 2
    again = vlkit("prep", "--source", tmp_path / "new", "--out", tmp_path / "x")
    assert again.code == 3 and "prepared folder already" in again.err


def test_copied_pictures_make_the_folder_movable(vlkit, tmp_path):
    raw = write_class_folders(tmp_path / "raw", per_class=6)
    assert vlkit("prep", "--source", raw, "--out", tmp_path / "out", "--copy-images").code == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "raw").rename(tmp_path / "gone")
    frame = pd.read_parquet(tmp_path / "moved/pairs.parquet")
    assert len(list((tmp_path / "moved/images").iterdir())) == frame["image_id"].nunique() == 30
    for image, key in zip(frame["image"], frame["image_key"], strict=True):
        assert (tmp_path / "moved" / image).read_bytes() == (tmp_path / "gone" / key).read_bytes()
    outcome = vlkit("eval", "--model", "tiny-siglip", "--data", tmp_path / "moved", "--out", tmp_path / "e")
    assert outcome.code == 0, outcome.err


def test_words_are_counted_at_the_edges(prep, tmp_path):
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(1, 7)])
    write_table(tmp_path / "raw", [{"image": f"{n}.png", "caption": " ".join(["word"] * n)} for n in range(1, 7)])
    assert sorted(len(text.split()) for text in prep("--min-words", 2, "--max-words", 5)["text"]) == [2, 3, 4, 5]


def test_limit_keeps_whole_units_by_the_seed(prep, tmp_path):
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(20)])
    rows = [{"image": f"{n}.png", "caption": f"{which} {n}"} for n in range(20) for which in ("a", "b")]
    write_table(tmp_path / "raw", rows)
    remaining = [set(prep("--limit", limit, "--seed", seed)["image_key"]) for limit, seed in ((10, 1), (9, 1), (10, 2))]
    assert [len(item) for item in remaining] == [5, 5, 5]
    assert remaining[0] == remaining[1] != remaining[2]


def test_names_with_brackets_are_no_markup(vlkit, tmp_path):
    pictures(tmp_path / "raw", [f"{c}/{n}.png" for c in ("x [/red] y", "[b]old") for n in range(3)])
    outcome = vlkit("prep", "--source", tmp_path / "raw", "--out", tmp_path / "o_[/b]mk")
    assert outcome.code == 0 and "x [/red] y" in outcome.out and "[b]old" in outcome.out


def test_the_same_bytes_from_another_place_and_spelling(vlkit, tmp_path, monkeypatch):
    raw = write_class_folders(tmp_path / "raw", per_class=4)
    (tmp_path / "link").symlink_to(raw)
    (tmp_path / "deep").mkdir()
    vlkit("prep", "--source", raw, "--out", tmp_path / "a")
    monkeypatch.chdir(tmp_path / "deep")
    vlkit("prep", "--source", "../raw", "--out", "../b", "--workers", 2)
    vlkit("prep", "--source", "../deep/../link", "--out", "../c")
    for name in ("pairs.parquet", "data.yaml", "rejects.csv"):
        assert len({(tmp_path / place / name).read_bytes() for place in "abc"}) == 1, name


def test_a_leak_in_what_was_written_stops_it(vlkit, tmp_path, monkeypatch):
    """Should the split ever tear a unit, the folder is not put in place."""
    from vlkit.data.prep import prepare

    raw = write_class_folders(tmp_path / "raw", per_class=4)
    whole = prepare.build_table

    def leaking(collected, config):
        table = whole(collected, config)
        frame = table.frame
        frame.loc[frame.index[0], "split"] = "test" if frame["split"].iloc[0] != "test" else "train"
        frame["unit"] = "one"
        return table

    monkeypatch.setattr(prepare, "build_table", leaking)
    outcome = vlkit("prep", "--source", raw, "--out", tmp_path / "out")
    assert outcome.code == 3 and " is in t" in outcome.err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_deep_and_strange_pixels_keep_what_they_show(tmp_path):
    import numpy as np
    from PIL import Image, ImageCms

    from vlkit.data.images.decode import load_pixels, verify_image
    from vlkit.data.images.spec import PixelSpec
    from vlkit.errors import DataError

    for most in (255, 4095, 65535):
        values = np.linspace(0, most, 64).reshape(8, 8).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "deep.png")
        observed = load_pixels(tmp_path / "deep.png", PixelSpec(8))[0]
        assert abs(int(observed.max()) - 255) <= 1 and observed.min() == 0
    base = Image.open(write_patterned_image(tmp_path / "rgb.png", 4)).convert("RGB")
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(base, *profiles, outputMode="LAB").save(tmp_path / "lab.tif")
    spec = PixelSpec(48)
    apart = load_pixels(tmp_path / "lab.tif", spec).astype(int) - load_pixels(tmp_path / "rgb.png", spec)
    assert np.abs(apart).mean() < 3
    Image.new("F", (20, 20), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="floating-point"):
        verify_image(tmp_path / "float.tif")


def test_what_the_summary_forecasts(vlkit, tmp_path):
    """Against counts by hand: false negatives of one-to-one labels, and the ceiling of one-to-one scoring."""
    pictures(tmp_path / "raw", [f"{name}/{n}.png" for name in "abcd" for n in range(40)])
    outcome = vlkit("prep", "--source", tmp_path / "raw", "--out", tmp_path / "out", "--json", "--near-duplicates", -1)
    described = outcome.json()
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    test, train = frame[frame["split"] == "test"], frame[frame["split"] == "train"]
    assert described["one_to_one_ceiling"] == round(4 / len(test), 3)
    sizes = train["class_name"].value_counts()
    same = sum(size * (size - 1) for size in sizes) / (len(train) * (len(train) - 1))
    assert described["eye_false_negatives"]["batch_size"] == 32
    assert described["eye_false_negatives"]["a_row"] == pytest.approx(31 * same, rel=0.1)
    assert described["pictures_a_text"] == {"mean": 40.0, "most": 40}


TREES = {
    "two wrappers": ("archive/PlantVillage/{split}/{name}", ("Train", "Valid", "Test")),
    "a wrapper of no common name": ("plants/{split}/{name}", ("train", "test")),
    "longer names": ("{split}/{name}", ("train_images", "test_images")),
    "places below": ("data/{split}/images/{name}", ("train", "val", "test")),
    "one class": ("tomato/{split}", ("train", "val", "test")),
}


@pytest.mark.parametrize("tree", TREES)
def test_splits_are_found_at_any_depth(tree, prep, tmp_path):
    place, splits = TREES[tree]
    classes = ["tomato"] if tree == "one class" else ["cat", "dog"]
    folders = {place.format(split=split, name=name): (split, name) for split in splits for name in classes}
    pictures(tmp_path / "raw", [f"{folder}/{n}.png" for folder in folders for n in range(4)])
    frame = prep("--split-by", "source", "--val-share", 0.2)
    assert set(frame["class_name"]) == set(classes)
    for key, split in zip(frame["image_key"], frame["split"], strict=True):
        named = next(split for folder, (split, _) in folders.items() if key.startswith(folder)).lower()[:3]
        assert split[:3] == named or (split == "val" and named == "tra"), key


def test_classes_that_are_called_like_splits_are_told(vlkit, tmp_path):
    pictures(
        tmp_path / "raw", [f"{c}/{n}.png" for c in ("a/train", "a/test", "b/other", "b/more", "c/x") for n in range(2)]
    )
    outcome = vlkit("prep", "--source", tmp_path / "raw", "--out", tmp_path / "out")
    assert outcome.code == 0 and "named like splits are taken for classes: test, train" in outcome.err


def test_a_class_of_masks_is_a_class_and_masks_are_masks(prep, tmp_path):
    pictures(tmp_path / "raw", [f"dataset/{c}/{c}{n}.png" for c in ("masks", "no_masks") for n in range(4)])
    assert set(prep()["class_name"]) == {"masks", "no_masks"}
    pictures(tmp_path / "raw", [f"images/leaf/{n}.png" for n in range(3)])
    pictures(tmp_path / "raw", [f"masks/leaf/{n}_mask.png" for n in range(3)])
    prep("--layout", "class-folders")
    assert list(read_rejects(tmp_path).values()).count("a mask: it is in a folder of masks") == 3


def test_a_prepared_folder_inside_the_source_is_not_read(prep, vlkit, tmp_path):
    raw = tmp_path / "raw"
    pictures(raw, [f"{c}/{n}.png" for c in "ab" for n in range(4)])
    assert vlkit("prep", "--source", raw, "--out", raw / "earlier", "--copy-images").code == 0
    frame = prep()
    assert len(frame) == 8 and set(frame["class_name"]) == {"a", "b"}
    assert read_rejects(tmp_path)["earlier"] == "a prepared folder, not part of the raw one"


def test_a_limit_keeps_the_sources_splits_in_their_shares(prep, tmp_path):
    splits = ["train"] * 6 + ["val"] * 4 + ["test"] * 20
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(30)])
    write_table(
        tmp_path / "raw", [{"image": f"{n}.png", "caption": f"w {n}", "split": s} for n, s in enumerate(splits)]
    )
    frame = prep("--split-by", "source", "--limit", 9)
    assert frame["split"].value_counts().to_dict() == {"test": 6, "train": 2, "val": 1}
    assert all(splits[int(key[:-4])] == split for key, split in zip(frame["image_key"], frame["split"], strict=True))


def test_a_column_named_like_the_one_that_prep_renames(prep, tmp_path):
    pictures(tmp_path / "raw", [f"{n}.png" for n in range(6)])
    rows = [{"image": f"{n}.png", "caption": f"w {n}", "text": f"t{n}", "source_text": f"s{n}"} for n in range(6)]
    write_table(tmp_path / "raw", rows)
    frame = prep()
    assert list(frame["source_text"]) == [f"s{n}" for n in range(6)]
    assert list(frame["source_source_text"]) == [f"t{n}" for n in range(6)]


def test_capitals_of_suffixes_and_the_line_of_spreadsheets(prep, tmp_path):
    for n in range(5):
        write_patterned_image(tmp_path / f"raw/p{n}.JPG", n, format="JPEG")
        (tmp_path / f"raw/p{n}.TXT").write_text(f"words {n}")
    assert set(prep()["text"]) == {f"words {n}" for n in range(5)}
    for n in range(5):
        (tmp_path / f"raw/p{n}.TXT").unlink()
    table = "sep=;\nimage;caption\n" + "".join(f"p{n}.JPG;other, words {n}\n" for n in range(5))
    (tmp_path / "raw/t.csv").write_text(table)
    assert set(prep()["text"]) == {f"other, words {n}" for n in range(5)}
