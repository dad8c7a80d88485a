"""prep: from a raw folder to a table without leaks, and a plain word for everything that is wrong."""

import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import COLOURS, SHARED_DATA, write_class_folders, write_image, write_recipes
from PIL import Image

from vlkit.data.images.decode import load_pixels, verify_image
from vlkit.data.images.spec import PixelSpec
from vlkit.data.pairs import PAIR_COLUMNS, read_pairs
from vlkit.errors import DataError
from vlkit.remote import file_sha256


def test_recipes_become_pairs(raw, prepared):
    """Every picture with every text of its recipe; groups and units are the recipe."""
    frame = pd.read_parquet(prepared / "pairs.parquet")
    records = [json.loads(line) for line in (raw / "recipes.jsonl").read_text().splitlines()]
    expected = {
        (r["recipe_id"], key, text) for r in records for key in r["images"] for text in (r["title"], r["description"])
    }
    assert set(zip(frame["image_group"], frame["image_key"], frame["text"], strict=True)) == expected
    assert list(frame.columns[: len(PAIR_COLUMNS)]) == list(PAIR_COLUMNS)
    assert (frame["image_group"] == frame["text_group"]).all()
    assert (frame["unit"] == frame["image_group"]).all()
    assert set(frame["match"]) == {1}
    assert set(frame["origin"]) == {"original"}
    assert frame["pair_id"].is_unique
    first = frame.iloc[0]
    assert hashlib.sha256((raw / first["image_key"]).read_bytes()).hexdigest().startswith(first["image_id"])
    assert (prepared / first["image"]).is_file()


def test_the_split_is_80_20_by_recipe_with_validation_held_out_of_the_80(prepared):
    units = pd.read_parquet(prepared / "pairs.parquet").drop_duplicates("unit")["split"].value_counts()
    assert units.to_dict() == {"test": 6, "val": 2, "train": 22}


def test_the_files_of_a_prepared_folder(prepared):
    frame = pd.read_parquet(prepared / "pairs.parquet")
    for split in ("train", "val", "test"):
        view = pd.read_csv(prepared / f"{split}_pairs_positive.csv")
        assert list(view.columns) == ["recipe_id", "image_key", "caption"]
        assert list(view["caption"]) == list(frame[frame["split"] == split]["text"])
    docstore = pd.read_parquet(prepared / "docstore.parquet")
    assert list(docstore.columns) == ["text_id", "text", "text_group", "class_name"]
    assert docstore["text_id"].is_unique
    assert set(docstore["text"]) == set(frame["text"])
    described = yaml.safe_load((prepared / "data.yaml").read_text())
    assert described["counts"]["pairs"] == len(frame) == 120
    assert described["settings"]["seed"] == 42


def test_the_same_input_gives_the_same_bytes(raw, tmp_path, vlkit):
    for name in ("a", "deeper/b"):
        assert vlkit("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / name).code == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [path.name for path in sorted((tmp_path / "deeper/b").iterdir())] == files
    for name in files:
        assert file_sha256(tmp_path / "a" / name) == file_sha256(tmp_path / "deeper/b" / name), name


def test_the_fingerprint_follows_the_bytes_of_the_pictures(tmp_path, vlkit):
    write_recipes(tmp_path / "raw", recipes=6)

    def fingerprint(source):
        vlkit("prep", "--domain", "recipes", "--source", source, "--out", tmp_path / "out")
        return yaml.safe_load((tmp_path / "out/data.yaml").read_text())["fingerprint"]

    before = fingerprint(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw", tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == before
    write_image(tmp_path / "moved/images/0-0.png", COLOURS["red"], seed=999)
    assert fingerprint(tmp_path / "moved") != before


def test_class_folders_are_stratified_80_10_10(tmp_path, vlkit):
    write_class_folders(tmp_path / "raw")
    outcome = vlkit(
        "prep", "--domain", "agriculture", "--source", tmp_path / "raw", "--out", tmp_path / "out", "--json"
    )
    assert outcome.code == 0
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    pictures = frame.drop_duplicates("image_id").groupby(["class_name", "split"]).size().unstack()
    assert (pictures[["train", "val", "test"]] == [8, 1, 1]).all(axis=None)
    assert set(frame["text"]) == {
        f"{start} leaf {colour} spot" for colour in COLOURS for start in ("a photo of", "a leaf showing")
    }
    assert set(frame["image_group"]) == set(frame["class_name"])
    assert frame["unit"].nunique() == 50
    assert list(pd.read_csv(tmp_path / "out/test_pairs_positive.csv").columns) == ["class_name", "image_key", "caption"]


def test_one_bad_row_or_picture_does_not_stop_the_rest(tmp_path, vlkit):
    source = write_recipes(tmp_path / "raw", recipes=8)
    (source / "images/0-0.png").write_bytes(b"<html>not here</html>")
    (source / "images/1-0.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (source / "images/2-0.png").write_bytes((source / "images/2-0.png").read_bytes()[:300])
    (source / "images/3-0.png").unlink()
    (source / "images/4-0.png").write_bytes(b"")
    with (source / "recipes.jsonl").open("a") as file:
        file.write('{"recipe_id": "pictureless", "title": "x", "images": []}\n')
        file.write('{"recipe_id": "textless", "title": " ", "images": ["images/5-0.png"]}\n')
        file.write('{"title": "nameless", "images": ["images/5-0.png"]}\n')
        file.write('{"recipe_id": "outside", "title": "y", "images": ["../../etc/hostname"]}\n')
        file.write("{not json\n[1, 2]\n")
    outcome = vlkit("prep", "--domain", "recipes", "--source", source, "--out", tmp_path / "out", "--json")
    assert outcome.code == 0
    rejects = pd.read_csv(tmp_path / "out/rejects.csv")
    report = dict(zip(rejects["where"], rejects["reason"], strict=True))
    assert report["recipes.jsonl:1"] == "not an image (an HTML page)"
    assert "git lfs pull" in report["recipes.jsonl:2"]
    assert "does not decode" in report["recipes.jsonl:3"]
    assert report["recipes.jsonl:4"] == "no such image"
    assert report["recipes.jsonl:5"] == "the file is empty"
    assert report["recipes.jsonl:9"] == "no image in images"
    assert report["recipes.jsonl:10"] == "no text in title, description"
    assert report["recipes.jsonl:11"] == "no recipe_id"
    assert report["recipes.jsonl:12"] == "the path leads out of the source"
    assert report["recipes.jsonl:13"].startswith("not JSON")
    assert report["recipes.jsonl:14"] == "not a JSON object"
    assert outcome.json()["counts"]["rejects"] == len(rejects) == 11
    assert len(pd.read_parquet(tmp_path / "out/pairs.parquet")) == 8 * 2 * 2 - 5 * 2


@pytest.mark.parametrize("what", ["missing", "empty", "file", "no table", "no pair", "no class"])
def test_a_folder_without_pairs_is_refused(what, tmp_path, vlkit):
    source, domain = tmp_path / "raw", "agriculture" if what == "no class" else "recipes"
    if what == "file":
        source.write_text("x")
    elif what != "missing":
        source.mkdir()
    if what == "no table":
        (source / "notes.txt").write_text("x")
    if what == "no pair":
        (source / "recipes.jsonl").write_text('{"recipe_id": "a", "title": "t", "images": ["gone.jpg"]}\n')
    if what == "no class":
        write_image(source / "loose.png", (1, 2, 3), seed=0)
    outcome = vlkit("prep", "--domain", domain, "--source", source, "--out", tmp_path / "out")
    assert outcome.code == 3
    assert str(source) in outcome.err
    assert "->" in outcome.err or what == "file"
    assert not (tmp_path / "out").exists()


def test_a_foreign_output_folder_is_not_touched(raw, tmp_path, vlkit):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    assert vlkit("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "out").code == 2
    assert (tmp_path / "out/thesis.txt").read_text() == "precious"
    assert vlkit("prep", "--domain", "recipes", "--source", raw, "--out", raw).code == 2


def test_a_dry_run_writes_nothing(raw, tmp_path, vlkit):
    outcome = vlkit("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "out", "--dry-run", "--json")
    assert outcome.json()["counts"]["pairs"] == 120
    assert list(tmp_path.iterdir()) == []


def test_identical_pictures_stay_together(tmp_path, vlkit):
    """The same bytes in several recipes make one unit of them."""
    source = write_recipes(tmp_path / "raw", recipes=20, images=1)
    for number in range(1, 10):
        shutil.copy(source / "images/0-0.png", source / f"images/{number}-0.png")
    vlkit("prep", "--domain", "recipes", "--source", source, "--out", tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    copies = frame[frame["image_group"].isin([f"r{n:03d}" for n in range(10)])]
    assert copies["unit"].nunique() == copies["split"].nunique() == copies["image_id"].nunique() == 1


def test_a_planted_leak_is_refused(prepared, tmp_path, vlkit):
    shutil.copytree(prepared, tmp_path / "leaky")
    frame = pd.read_parquet(tmp_path / "leaky/pairs.parquet")
    train, test = frame[frame["split"] == "train"].iloc[0], frame[frame["split"] == "test"].iloc[0]
    stolen = {**test, "image": train["image"], "image_id": train["image_id"], "pair_id": "stolen"}
    pd.concat([frame, pd.DataFrame([stolen])]).to_parquet(tmp_path / "leaky/pairs.parquet")
    with pytest.raises(DataError, match=r"image .* is in test and train"):
        read_pairs(tmp_path / "leaky")
    for command in (
        ("train-retrieval", "--model", "tiny-siglip"),
        ("eval", "--model", "tiny-siglip", "--out", tmp_path / "out"),
    ):
        assert vlkit(*command, "--data", tmp_path / "leaky").code == 3
    moved = frame.copy()
    moved.loc[moved.index[moved["unit"] == train["unit"]][0], "split"] = "test"
    moved.to_parquet(tmp_path / "leaky/pairs.parquet")
    with pytest.raises(DataError, match="unit r"):
        read_pairs(tmp_path / "leaky")


def test_tables_in_csv_and_jsonl_read_the_same(prepared, tmp_path):
    frame = pd.read_parquet(prepared / "pairs.parquet")
    frame.to_csv(tmp_path / "pairs.csv", index=False)
    frame.to_json(tmp_path / "pairs.jsonl", orient="records", lines=True)
    expected = read_pairs(prepared)
    for name in ("pairs.csv", "pairs.jsonl"):
        actual = read_pairs(tmp_path / name)
        assert actual.fingerprint == expected.fingerprint
        assert actual.frame["match"].tolist() == expected.frame["match"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop", "no column 'text'"),
        ("blank", "row 3 has no text"),
        ("split", "row 3 has the unknown split 'dev'"),
        ("none", "has no rows"),
    ],
)
def test_a_table_that_is_wrong_is_refused(change, message, prepared, tmp_path):
    frame = pd.read_parquet(prepared / "pairs.parquet")
    if change == "drop":
        frame = frame.drop(columns="text")
    elif change == "blank":
        frame.loc[2, "text"] = ""
    elif change == "split":
        frame.loc[2, "split"] = "dev"
    else:
        frame = frame.iloc[:0]
    frame.to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path)


def test_limit_draws_whole_units_by_the_seed(prepared):
    pairs = read_pairs(prepared)
    few = pairs.split("train", limit=8, seed=1)
    assert len(few) == 8
    assert few.frame["unit"].nunique() == 2
    assert few.frame["pair_id"].tolist() == pairs.split("train", limit=8, seed=1).frame["pair_id"].tolist()
    assert set(few.frame["unit"]) != set(pairs.split("train", limit=8, seed=2).frame["unit"])


def test_pictures_of_every_kind_become_upright_rgb(tmp_path):
    base = np.zeros((20, 30, 3), np.uint8)
    base[:, :15] = (250, 10, 10)
    picture = Image.fromarray(base)
    spec = PixelSpec(30, resample=0)
    picture.save(tmp_path / "plain.png")
    plain = load_pixels(tmp_path / "plain.png", spec)
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif")
    picture.convert("CMYK").save(tmp_path / "cmyk.tif")
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.rotate(180).save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "really-webp.jpg", format="WEBP", lossless=True)
    for name in ("palette.gif", "cmyk.tif", "turned.png", "really-webp.jpg"):
        assert verify_image(tmp_path / name).width == 30
        assert np.abs(load_pixels(tmp_path / name, spec).astype(int) - plain).max() <= 12, name
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert load_pixels(tmp_path / "deep.png", PixelSpec(4))[0, 0, 0] == 40000 >> 8
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_pixels(tmp_path / "clear.png", PixelSpec(4)).min() == 255


@pytest.mark.skipif(not (SHARED_DATA / "recipes").is_dir(), reason="the published recipes are not here")
def test_the_published_recipes(tmp_path, vlkit):
    outcome = vlkit(
        "prep", "--domain", "recipes", "--source", SHARED_DATA / "recipes", "--out", tmp_path / "out", "--json"
    )
    counts = outcome.json()["counts"]
    assert (counts["units"], counts["pictures"], counts["rejects"]) == (115, 136, 0)


def test_prep_counts_tokens_by_the_models_own_tokenizer(tiny_folder, tmp_path, vlkit):
    """Against the tokenizer itself; a model that is not here is counted by words, as a lower bound."""
    from transformers import AutoTokenizer

    raw = write_recipes(tmp_path / "raw", recipes=12, images=1)
    long = "very long description of a dish " * 12
    text = (raw / "recipes.jsonl").read_text()
    (raw / "recipes.jsonl").write_text(text.replace("made 3 times", long))
    model = tiny_folder("tiny-clip")
    line = ("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "out", "--json")
    output = vlkit(*line, "--model", model).json()["tokens"]
    texts = pd.read_parquet(tmp_path / "out/docstore.parquet")["text"]
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(model)(list(texts))["input_ids"]]
    assert output["counted_by"] == "tokenizer"
    assert output["over"] == sum(length > output["limit"] for length in lengths) > 0
    by_words = vlkit(*line).json()["tokens"]
    assert by_words["counted_by"] == "words" and by_words["over"] == 1
