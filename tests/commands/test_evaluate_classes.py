"""eval of a folder with classes: against counting by hand, with prompts of one's own."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import write_class_folders

from vlkit.data.pairs import read_pairs


@pytest.fixture(scope="module")
def leaves(tmp_path_factory, vlkit):
    """A run on class folders, measured."""
    folder = tmp_path_factory.mktemp("leaves")
    write_class_folders(folder / "raw", per_class=14)
    prep = ("prep", "--domain", "agriculture", "--source", folder / "raw", "--out", folder / "data")
    assert vlkit(*prep, "--test-share", 0.3).code == 0
    train = ("train-retrieval", "--data", folder / "data", "--model", "tiny-siglip", "--runs-dir", folder / "runs")
    assert vlkit(*train, "--name", "leaves", "--steps", 40, "--batch-size", 32).code == 0
    outcome = vlkit("eval", "--run", folder / "runs/leaves")
    assert outcome.code == 0, outcome.err
    return folder / "runs/leaves"


def test_eval_says_the_same_as_counting_by_hand(leaves):
    from vlkit.models.encode import encode_texts
    from vlkit.models.loading import load_model

    results = json.loads((leaves / "results.json").read_text())
    pairs = read_pairs(leaves.parent.parent / "data")
    frame = pairs.split("test").frame.drop_duplicates("image_id")
    names = sorted(pairs.frame["class_name"].unique())
    assert results["confusion"]["classes"] == names
    encoder = load_model(str(leaves))
    encoder.eval()
    prompts = [f"a leaf showing leaf {name.split('___')[1].split('_')[0]} spot" for name in names]
    assert [of[1] for of in results["prompts"].values()] == prompts
    both = [[f"a photo of leaf {p.split()[-2]} spot", p] for p in prompts]
    flat = encode_texts(encoder, [text for pair in both for text in pair], batch_size=8, precision="fp32")
    means = torch.nn.functional.normalize(flat.view(len(names), 2, -1).mean(1), dim=1)
    from vlkit.data.loading.stores import PixelStore

    store = PixelStore(pairs.image_paths(frame), encoder.pixel_spec)
    with torch.no_grad():
        chosen = (encoder.embed_images(store[range(len(frame))]) @ means.T).argmax(1).tolist()
    truth = [names.index(name) for name in frame["class_name"]]
    confusion = np.zeros((len(names), len(names)))
    np.add.at(confusion, (truth, chosen), 1)
    assert np.array_equal(confusion, np.array(results["confusion"]["tuned"]))
    assert results["metrics"]["classification"]["accuracy"] == pytest.approx(np.mean(np.equal(truth, chosen)))
    assert results["metrics"]["classification"]["accuracy"] > results["baseline"]["classification"]["accuracy"]
    low, high = results["intervals"]["classification"]["f1_macro"]
    assert low <= results["metrics"]["classification"]["f1_macro"] <= high
    training = pd.Series(pairs.split("train").frame.drop_duplicates("image_id")["class_name"]).value_counts()
    assert {name: of["training"] for name, of in results["classes"].items()} == training.to_dict()


def test_prompts_of_ones_own(leaves, vlkit, tmp_path):
    flags = ("--templates", "a spotted {class_name}", "--templates", "{class_name}")
    outcome = vlkit("eval", "--run", leaves, "--out", tmp_path, *flags, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["prompts"]["Leaf___red_spot"] == ["a spotted leaf red spot", "leaf red spot"]
    outcome = vlkit("eval", "--run", leaves, "--out", tmp_path, "--templates", "a photo")
    assert outcome.code == 2 and "class_name" in outcome.err


def test_a_class_of_one_picture_is_said(leaves, vlkit, tmp_path):
    outcome = vlkit("eval", "--run", leaves, "--out", tmp_path, "--limit", 6)
    assert outcome.code == 0 and "only one test image of" in outcome.err
