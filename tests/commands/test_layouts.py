"""Raw folders in every layout -> rows, and a plain word for each that is none."""

import json

import pandas as pd
import pytest
import yaml
from helpers import read_rejects, write_class_folders, write_patterned_image, write_table


def test_a_table_of_pictures_and_captions_without_a_domain(prep, tmp_path):
    for number in range(12):
        write_patterned_image(tmp_path / f"raw/pictures/{number}.png", number)
    rows = [{"file_name": f"pictures/{n}.png", "caption": f"caption {n % 6}", "note": f"n{n}"} for n in range(12)]
    write_table(tmp_path / "raw", rows)
    frame = prep()
    assert set(zip(frame["image_key"], frame["text"], frame["note"], strict=True)) == {
        (row["file_name"], row["caption"], row["note"]) for row in rows
    }
    assert (frame["unit"] == frame["image_key"]).all()
    # Without classes, repeated captions are what is stratified; equal texts match whatever the groups say.
    assert frame["class_name"].isna().all()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_table_gives_the_same_pairs(kind, prep, tmp_path):
    rows = [{"image": f"{n}.png", "caption": f"words {n}", "label": "ab"[n % 2]} for n in range(20)]
    for number in range(20):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
    path = tmp_path / f"raw/table.{kind}"
    frame = pd.DataFrame(rows)
    {
        "csv": lambda: frame.to_csv(path, index=False),
        "tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: frame.to_json(path, orient="records"),
        "parquet": lambda: frame.to_parquet(path),
    }[kind]()
    outcome = prep()
    assert set(zip(outcome["image_key"], outcome["text"], outcome["class_name"], strict=True)) == {
        tuple(row.values()) for row in rows
    }


def test_columns_by_flags_classes_groups_and_units(prep, tmp_path):
    for number in range(24):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
    rows = [
        {"Foto": f"{n}.png", "de": f"text {n}", "en": f"words {n}", "dish": f"d{n // 2}", "who": f"p{n // 6}"}
        for n in range(24)
    ]
    write_table(tmp_path / "raw", rows)
    frame = prep("--image-column", "Foto", "--text-column", "de,en", "--group-column", "dish", "--unit-column", "who")
    assert len(frame) == 48
    assert set(frame["image_group"]) == {f"d{n}" for n in range(12)}
    assert set(frame["unit"]) == {"p0", "p1", "p2", "p3"}
    assert frame.groupby("unit")["split"].nunique().max() == 1


def test_several_classes_a_picture(prep, tmp_path):
    """a|b, a list written as text, or columns of 0 and 1 are the same; the picture matches texts of both."""
    for number in range(9):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
    cells = ["a", "b", "a|b", "['a', 'b']", '["b"]', "a;b", "a", "b", "a"]
    write_table(tmp_path / "raw", [{"image": f"{n}.png", "label": cell} for n, cell in enumerate(cells)])
    frame = prep("--templates", "a picture of {class_name}")
    of_two = frame[frame["image_key"] == "2.png"]
    assert set(of_two["text"]) == {"a picture of a", "a picture of b"}
    groups = {
        text: set(g) if not isinstance(g, str) else {g}
        for text, g in zip(of_two["text"], of_two["image_group"], strict=True)
    }
    assert groups == {"a picture of a": {"a"}, "a picture of b": {"b"}}
    one_hot = [{"image": f"{n}.png", "a": int("a" in cell), "b": int("b" in cell)} for n, cell in enumerate(cells)]
    write_table(tmp_path / "raw", one_hot)
    again = prep("--templates", "a picture of {class_name}", "--label-column", "a,b")
    key = ["image_key", "text", "class_name"]
    assert again[key].values.tolist() == frame[key].values.tolist()


def test_a_description_comes_first_else_the_template(prep, tmp_path):
    for number in range(6):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
    rows = [
        {"image": f"{n}.png", "condition": "tinea_pedis", "description": "red scaly sole" * (n == 0)} for n in range(6)
    ]
    write_table(tmp_path / "raw", rows)
    texts = set(prep("--domain", "dermatology")["text"])
    assert texts == {"red scaly sole", "A dermatological image showing tinea pedis."}
    assert set(prep("--domain", "dermatology", "--templates-for", "all")["text"]) == {
        *texts,
        "Clinical presentation of tinea pedis: red scaly sole",
    }


def test_rare_classes_get_weights_in_training_only(prep, tmp_path):
    sizes = {"common": 60, "rare": 10}
    rows = [{"image": f"{name}{n}.png", "label": name} for name, size in sizes.items() for n in range(size)]
    for number, row in enumerate(rows):
        write_patterned_image(tmp_path / "raw" / row["image"], number, size=(24, 18))
    write_table(tmp_path / "raw", rows)
    frame = prep("--oversample-below", 30)
    rare = frame[(frame["class_name"] == "rare") & (frame["split"] == "train")]
    assert len(rare) == 8
    assert set(rare["weight"]) == {30 / 8}
    assert set(frame.loc[(frame["class_name"] != "rare") | (frame["split"] != "train"), "weight"]) == {1.0}


def test_names_are_found_however_they_are_spelt(prep, tmp_path):
    names = [
        "deep/A b.JPG",
        "deep/قرمه\u200cسبزی.png",
        "images/no-suffix.jpeg",
        "deep/caf\u00e9.png",
        "twin/x.png",
        "other/x.png",
    ]
    for number, name in enumerate(names):
        write_patterned_image(tmp_path / "raw" / name, number, format="PNG")
    spelt = {
        "deep\\A b.JPG": names[0],
        "deep/قرمه\u200cسبزی.png": names[1],
        "no-suffix": names[2],
        "./images/../deep/cafe\u0301.png": names[3],
        "deep/a b.jpg": names[0],
        str(tmp_path / "raw/twin/x.png"): names[4],
    }
    rows = [
        {"image": name, "caption": f"words {n}"}
        for n, name in enumerate([*spelt, "x", "gone.png", "../out.png", "/etc/hostname"])
    ]
    write_table(tmp_path / "raw", rows)
    frame = prep()
    assert dict(zip(frame["text"], frame["image_key"], strict=True)) == {
        f"words {n}": name for n, name in enumerate(spelt.values())
    }
    report = read_rejects(tmp_path)
    assert report["x"] == "several images have this name"
    assert report["gone.png"] == "no such image"
    assert report["../out.png"] == report["/etc/hostname"] == "the path leads out of the source"
    assert report["other/x.png"] == "no row names this image"


def test_links_out_of_the_source_are_refused_and_links_inside_followed(prep, tmp_path):
    for number in range(6):
        write_patterned_image(tmp_path / f"raw/real/{number}.png", number)
    write_patterned_image(tmp_path / "elsewhere/secret.png", 99)
    (tmp_path / "raw/out.png").symlink_to(tmp_path / "elsewhere/secret.png")
    (tmp_path / "raw/outdir").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw/inside").symlink_to(tmp_path / "raw/real")
    names = [*(f"real/{n}.png" for n in range(5)), "inside/5.png", "out.png", "outdir/secret.png"]
    write_table(tmp_path / "raw", [{"image": name, "caption": name} for name in names])
    frame = prep()
    assert sorted(frame["text"]) == sorted(names[:6])
    report = read_rejects(tmp_path)
    assert report["out.png"] == report["outdir/secret.png"] == "the link leads out of the source"


def test_class_folders_nested_with_originals_masks_and_splits(prep, tmp_path):
    raw = tmp_path / "raw"
    number = 0
    for split in ("train", "valid", "test"):
        for class_name in ("rice/blast/orig", "Tomato___Early_blight"):
            for n in range(4):
                number += 1
                write_patterned_image(raw / split / class_name / f"{n}.png", number)
    write_patterned_image(raw / "train/rice/blast/aug/0.png", 900)
    write_patterned_image(raw / "train/Tomato___Early_blight/0_mask.png", 901)
    write_patterned_image(raw / "train/Tomato___Early_blight/masks/1.png", 902)
    frame = prep("--domain", "agriculture", "--split-by", "source")
    assert set(frame["class_name"]) == {"rice/blast", "Tomato___Early_blight"}
    assert "a photo of rice blast" in set(frame["text"])
    source = {name: name.split("/")[0].replace("valid", "val") for name in frame["image_key"]}
    assert dict(zip(frame["image_key"], frame["split"], strict=True)) == source
    report = read_rejects(tmp_path)
    assert report["train/rice/blast/aug/0.png"].startswith("an augmented copy")
    assert report["train/Tomato___Early_blight/0_mask.png"] == "a mask: its name is that of an image beside it"
    assert report["train/Tomato___Early_blight/masks/1.png"] == "a mask: it is in a folder of masks"


def test_pictures_with_texts_beside_them(prep, tmp_path):
    raw = tmp_path / "raw"
    for number in range(5):
        write_patterned_image(raw / f"a/{number}.png", number)
        if number < 4:
            (raw / f"a/{number}.txt").write_text(f"first of {number}\nsecond of {number}\n", encoding="utf-8")
    (raw / "a/orphan.txt").write_text("nobody")
    frame = prep()
    assert set(frame["text"]) == {f"{which} of {n}" for which in ("first", "second") for n in range(4)}
    report = read_rejects(tmp_path)
    assert report == {
        "a/4.png": "no .txt file of this name beside the image",
        "a/orphan.txt": "no image of this name beside the text file",
    }


def test_json_in_folders(prep, tmp_path):
    """Object, list and JSON lines; image_path, folder_path or nothing; equal passages are one dish."""
    raw = tmp_path / "raw"
    for number, dish in enumerate(("one", "two", "three", "four", "five", "again")):
        for n in range(2):
            write_patterned_image(raw / dish / f"{n}.png", 10 * number + n)
    write_patterned_image(raw / "two/ingredients.png", 77)
    messages = {
        "one": json.dumps({"title": "t", "response": "passage one", "folder_path": "dishes/one/"}),
        "two": json.dumps([{"response": "passage two", "image_path": f"two/{n}.png"} for n in range(2)]),
        "three": "\n".join(json.dumps({"response": "passage three", "image_path": f"{n}.png"}) for n in range(2)),
        "four": json.dumps({"response": "كتلت مي\u200cخواهم"}),  # noqa: RUF001
        "five": json.dumps({"response": "passage five", "folder_path": "elsewhere"}),
        "again": json.dumps({"response": "کتلت  می\u200cخواهم"}),  # noqa: RUF001
    }
    for dish, text in messages.items():
        (raw / dish / "info.json").write_text(text, encoding="utf-8")
    frame = prep("--domain", "persian-food")
    actual = {dish: sorted(frame.loc[frame["image_key"].str.startswith(dish + "/"), "image_key"]) for dish in messages}
    assert actual["one"] == ["one/0.png", "one/1.png"]
    assert actual["two"] == ["two/0.png", "two/1.png"]
    assert actual["three"] == ["three/0.png", "three/1.png"]
    assert actual["five"] == []
    same = frame[frame["image_key"].str.startswith(("four", "again"))]
    assert len(same) == 4 and same["image_group"].nunique() == same["unit"].nunique() == 1
    assert "\u200c" in same["text"].iloc[0] and "ك" not in same["text"].iloc[0]
    report = read_rejects(tmp_path)
    assert report["two/ingredients.png"] == "no JSON names this image"
    assert report["elsewhere"] == "no such folder in the source"
    docstore = pd.read_parquet(tmp_path / "out/docstore.parquet")
    assert docstore["text_id"].is_unique and set(docstore["text"]) == set(frame["text"])
    training = pd.read_csv(tmp_path / "out/training_pairs.csv")
    assert len(training) == (frame["split"] == "train").sum()


BAD = {
    "cut csv": ({"t.csv": 'image,caption\na.png,"never closed\nb.png,x\n'}, "never closed"),
    "no picture matches": ({"t.csv": "image,caption\ngone.png,x\nlost.png,y\n"}, "2 x no such image"),
    "no texts": ({"t.csv": "image,caption\na.png,\n"}, "no text in caption"),
    "no image column": ({"t.csv": "what,caption\na.png,x\n"}, "which column names the images"),
    "no text column": ({"t.csv": "image,what\na.png,x\n"}, "no column of texts"),
    "no rows": ({"t.csv": "image,caption\n"}, "no row under its header"),
    "two tables": ({"t.csv": "image,caption\na.png,x\n", "u.csv": "image,caption\na.png,x\n"}, "--table"),
    "broken coco": ({"annotations/captions_x.json": '{"images": ['}, "not a COCO caption file"),
    "coco of nothing": ({"annotations/captions_x.json": "{}"}, "lists no images"),
    "texts without pictures": ({"lone.txt": "words"}, "class folders"),
    "latin": ({"t.csv": b"image,caption\na.png,cr\xe8me\n"}, "line 2: not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_gives_no_pairs_is_refused_with_what_was_found(name, prep, tmp_path):
    files, report = BAD[name]
    write_patterned_image(tmp_path / "raw/a.png", 1)
    for file, content in files.items():
        path = tmp_path / "raw" / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = prep(code=3)
    assert report in outcome.err, outcome.err
    assert "->" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_mistyped_column_is_named(prep, tmp_path):
    write_patterned_image(tmp_path / "raw/a.png", 1)
    write_table(tmp_path / "raw", [{"image": "a.png", "caption": "x", "recipe_id": "1"}])
    outcome = prep("--group-column", "recipeid", code=3)
    assert "did you mean 'recipe_id'?" in outcome.err


@pytest.mark.parametrize(
    "layout",
    [
        *(pytest.param(entry, marks=pytest.mark.slow) for entry in ("recipes", "coco")),
        "agriculture",
        "dermatology",
        "persian-food",
    ],
)
def test_the_ugly_samples_are_prepared_to_the_last_good_picture(layout, vlkit, tmp_path):
    """Every odd picture that can be decoded is in the table, every broken one among the rejects, none from outside."""
    assert vlkit("sample", layout, tmp_path / "raw", "--ugly").code == 0
    outcome = vlkit("prep", "--domain", layout, "--source", tmp_path / "raw", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    used = {key.rpartition("/")[2] for key in frame["image_key"]}
    odd = sorted((tmp_path / "raw").rglob("good*"))
    assert len(odd) == 17
    assert {path.name for path in odd} <= used
    table = pd.read_csv(tmp_path / "out/rejects.csv")
    reasons = {item.rpartition("/")[2]: reason for item, reason in zip(table["item"], table["reason"], strict=True)}
    for name, reason in {
        "truncated.jpg": "does not decode",
        "page.jpg": "an HTML page",
        "pointer.jpg": "git lfs pull",
        "empty.jpg": "the file is empty",
        "text.png": "unknown format",
        "dot.png": "fewer than 8 pixels",
        "bomb.png": "more pixels than is safe",
    }.items():
        assert reason in reasons[name] and name not in used
    assert all(image.startswith(str(tmp_path / "raw")) for image in frame["image"])
    assert not any("hostname" in key or key.startswith("/") or ".." in key for key in frame["image_key"])


def test_a_yaml_of_ones_own_is_a_domain(prep, tmp_path):
    write_class_folders(tmp_path / "raw", per_class=6)
    (tmp_path / "mine.yaml").write_text(
        "prep:\n  layout: class-folders\n  templates: ['a leaf, {class_name}']\n  near_duplicates: -1\n"
    )
    frame = prep("--domain", tmp_path / "mine.yaml")
    assert set(frame["text"].str[:8]) == {"a leaf, "}
    described = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert described["settings"]["near_duplicates"] == -1
