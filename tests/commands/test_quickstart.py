"""The tour, a few steps of it; and the samples that it starts from: no task that colours alone solve."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def tour(tmp_path_factory, vlkit):
    """The folder of a quickstart of a few steps, and what it printed."""
    folder = tmp_path_factory.mktemp("tour") / "tour"
    outcome = vlkit("quickstart", "--out", folder, "--steps", 3)
    assert outcome.code == 0, outcome.err
    return folder, outcome


@pytest.fixture(scope="module")
def sampled(tour):
    """The folder with the sample recipes in raw/, prepared in data/recipes/."""
    return tour[0]


@pytest.fixture(scope="module")
def agriculture(tmp_path_factory, vlkit):
    """The sample class folders."""
    folder = tmp_path_factory.mktemp("agriculture") / "raw"
    assert vlkit("sample", "agriculture", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def frame(sampled):
    return pd.read_parquet(sampled / "data/recipes/pairs.parquet")


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_the_tour(tour, vlkit):
    folder, outcome = tour
    assert "untouched" in outcome.out
    assert "tuned" in outcome.out
    assert "recall@1" in outcome.out
    assert str(folder / "runs/first") in outcome.err
    results = json.loads((folder / "runs/first/results.json").read_text())
    assert results["baseline"]["text_to_image"]["queries"] >= 400
    # An index of all of it, and a search, with hits of either kind.
    assert "recall@10" in outcome.out and "“a chocolate flan" in outcome.out
    assert outcome.out.rstrip().count(".jpg") >= 3
    assert (folder / "indexes/first/index.yaml").is_file()
    # And a captioner, which has described pictures of the test.
    assert "shuffled image" in outcome.err and (folder / "runs/captions/fusion").is_dir()
    assert outcome.out.rstrip().splitlines()[-1].split()[0].endswith(".jpg")
    again = vlkit("quickstart", "--out", folder)
    assert (again.code, "not empty" in again.err) == (2, True)


def test_the_same_seed_writes_the_same_bytes(sampled, agriculture, tmp_path, vlkit):
    vlkit("sample", "recipes", tmp_path / "again")
    assert digest(tmp_path / "again") == digest(sampled / "raw")
    vlkit("sample", "agriculture", tmp_path / "b")
    vlkit("sample", "agriculture", tmp_path / "c", "--seed", 1)
    assert digest(agriculture) == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_at_least_200_recipes_are_unseen_combinations(sampled, frame):
    assert frame[frame["split"] == "test"]["unit"].nunique() >= 200
    texts = frame.drop_duplicates("text_id")
    assert texts.groupby("text_id")["unit"].nunique().max() == 1
    assert len(set(texts["text"].str.lower())) == len(texts)
    records = [json.loads(line) for line in (sampled / "raw/recipes.jsonl").read_text().splitlines()]
    assert {len(record["images"]) for record in records} == {1, 2, 3}


def histograms(frame, sampled):
    rows = frame.drop_duplicates("image_id")
    actual = []
    for image in rows["image"]:
        pixels = np.asarray(Image.open(sampled / "data/recipes" / image)).reshape(-1, 3) // 32
        actual.append(np.bincount(pixels @ [64, 8, 1], minlength=512) / len(pixels))
    return rows["unit"].to_numpy(), np.stack(actual)


def test_nearest_neighbours_of_colour_histograms_do_not_find_the_recipe(sampled, frame):
    """For test pictures that have a sibling: is the nearest other picture, by colours, one of the same recipe?"""
    units, colours = histograms(frame[frame["split"] == "test"], sampled)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    has_sibling = np.array([(units == unit).sum() > 1 for unit in units])
    actual = units[distances.argmin(1)] == units
    assert has_sibling.sum() > 100
    assert actual[has_sibling].mean() < 0.3


def test_colours_predicted_from_words_do_not_find_the_picture(sampled, frame):
    """Ridge regression from the words of a text to a colour histogram, fitted on training rows; nearest picture."""
    train, test = frame[frame["split"] == "train"], frame[frame["split"] == "test"]
    words = sorted({word for text in train["text"] for word in text.lower().split()})
    place = {word: position for position, word in enumerate(words)}

    def bag(texts):
        x = np.zeros((len(texts), len(words)))
        for row, text in enumerate(texts):
            for word in text.lower().split():
                if word in place:
                    x[row, place[word]] = 1
        return x

    colours = histograms(train, sampled)[1]
    rows = train.drop_duplicates("image_id")
    x = bag(rows["text"])
    weights = np.linalg.solve(x.T @ x + np.eye(len(words)), x.T @ (colours - colours.mean(0)))
    asked = test.drop_duplicates("text_id")
    test_units, test_colours = histograms(test, sampled)
    predicted = bag(asked["text"]) @ weights + colours.mean(0)
    nearest = np.abs(predicted[:, None] - test_colours[None]).sum(-1).argmin(1)
    assert (test_units[nearest] == asked["unit"].to_numpy()).mean() < 0.3


def test_sample_folders_are_not_overwritten(sampled, vlkit):
    outcome = vlkit("sample", "recipes", sampled / "raw")
    assert (outcome.code, "not empty" in outcome.err) == (2, True)


def test_the_class_folders_go_through(agriculture, tmp_path, vlkit):
    outcome = vlkit("prep", "--domain", "agriculture", "--source", agriculture, "--out", tmp_path / "out", "--json")
    assert outcome.json()["counts"]["classes"] >= 6
    assert outcome.json()["counts"]["rejects"] == 0
