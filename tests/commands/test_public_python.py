"""`import vlkit` beside the commands: the same rows, metrics and hits."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlkit as face
from vlkit.errors import UsageError


def test_tables_and_labels_need_no_torch(prepared):
    code = f"""
import sys, vlkit
pairs = vlkit.read_pairs({str(prepared)!r})
assert isinstance(pairs, vlkit.Pairs) and len(pairs)
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == [
        "False",
        "False",
    ]


def test_a_run_gives_the_metrics_of_eval(trained, prepared, vlkit):
    """Recall from vectors and labels alone, beside what `vlkit eval` wrote."""
    assert vlkit("eval", "--run", trained).code == 0
    metrics = json.loads((trained / "results.json").read_text())["metrics"]["text_to_image"]
    encoder, pairs = face.load(trained), face.read_pairs(prepared).positives().split("test")
    unique, texts = pairs.unique_images(), pairs.unique_texts()
    rows = encoder.encode_images(pairs.image_paths(unique))
    columns = encoder.encode_texts(texts["text"].tolist())
    matches = np.array([[bool(set(a) & set(b)) for b in group_sets(unique)] for a in group_sets(texts)])
    best = (columns @ rows.T).argmax(axis=1)
    assert matches[np.arange(len(best)), best].mean() == pytest.approx(metrics["recall@1"], abs=1e-6)


def group_sets(frame):
    column = "image_group" if "image_group" in frame else "text_group"
    return [[group] if isinstance(group, str) else list(group) for group in frame[column]]


def test_search_gives_what_the_command_prints(trained, tmp_path, vlkit):
    index = tmp_path / "index"
    assert vlkit("index", "--run", trained, "--out", index).code == 0
    printed = vlkit("search", "--index", index, "a red tart", "-k", 3, "--json").json()["queries"][0]
    assert face.search(index, "a red tart", k=3) == {name: printed[name] for name in ("texts", "images", "notes")}
    path = Path(printed["images"][0]["path"])
    for query in (path, Image.open(path)):
        assert face.search(index, query, k=1, of="images")["images"][0]["path"] == str(path)
    with pytest.raises(UsageError, match="is empty"):
        face.search(index, " ")
