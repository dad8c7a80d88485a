"""What frozen parts have computed once: the same training, whatever was cached before, and no half-written row."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.errors import ArtifactError
from vlkit.models.feature_store import FeatureStore

ROWS = np.arange(60, dtype=np.float32).reshape(10, 2, 3)


def opened(folder, **about):
    return FeatureStore(folder, (2, 3), np.float32, about)


def test_rows_come_back_by_key_in_any_order_from_any_process(tmp_path):
    store, other = opened(tmp_path / "s"), opened(tmp_path / "s")
    store.append(list("abc"), ROWS[:3])
    assert other.missing(list("abcd")) == [0, 1, 2, 3]
    other.append(list("cde"), ROWS[2:5])  # c is there already
    store.reload()
    assert store.places == dict(zip("abcde", range(5), strict=True))
    assert np.array_equal(store.read([4, 0, 2, 0]), ROWS[[4, 0, 2, 0]])
    again = opened(tmp_path / "s")
    assert again.places == store.places and np.array_equal(again.read(range(5)), ROWS[:5])
    assert (tmp_path / "s/rows.bin").stat().st_size == 5 * 24


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400), st.integers(0, 120))
def test_what_a_kill_leaves_is_cut_off(index_bytes, row_bytes):
    """Any prefix of the index's last line, any tail of rows: the blocks before stay, the last one is written anew."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        store = opened(Path(folder) / "s")
        store.append(list("abc"), ROWS[:3])
        index, rows = Path(folder) / "s/index.jsonl", Path(folder) / "s/rows.bin"
        before = index.read_bytes()
        store.append(list("defg"), ROWS[3:7])
        line = index.read_bytes()[len(before) :]
        torn = line[: min(index_bytes, len(line) - 1)]
        index.write_bytes(before + torn)
        rows.write_bytes(rows.read_bytes()[:72] + bytes(range(1, 1 + row_bytes)))
        again = opened(Path(folder) / "s")
        assert list(again.places) == list("abc")
        again.append(list("de"), ROWS[3:5])
        assert np.array_equal(again.read(range(5)), ROWS[:5])
        assert [json.loads(each)["keys"] for each in index.read_text().splitlines()] == [list("abc"), list("de")]


def test_damage_is_found(tmp_path):
    store = opened(tmp_path / "s")
    store.append(list("abc"), ROWS[:3])
    path = tmp_path / "s/rows.bin"
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    again = opened(tmp_path / "s")
    assert np.array_equal(again.read([0, 2]), ROWS[[0, 2]])
    with pytest.raises(ArtifactError, match="damaged"):
        again.read([1])
    path.write_bytes(content[:40])
    with pytest.raises(ArtifactError, match="damaged"):
        opened(tmp_path / "s").read([0])
    (tmp_path / "s/index.jsonl").write_text("{no json\n")
    with pytest.raises(ArtifactError, match="damaged"):
        opened(tmp_path / "s")


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


WAYS = {
    "head": ("--tune", "head"),
    "last": ("--tune", "last", "--unfreeze-layers", 1),
    "text": ("--tune", "text"),
    "image": ("--tune", "image"),
    "lora": ("--tune", "lora", "--towers", "text", "--lora-dropout", 0.3),
    "micro": ("--tune", "last", "--unfreeze-layers", 1, "--micro-batch", 5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["tiny-siglip", "tiny-clip"])
def test_the_loss_curve_is_that_of_no_cache(model, way, prepared, vlkit, tmp_path):
    """Losses and validation to 1e-5, weights as near as float32 lets them be; a second run computes nothing."""

    def train(name, *extra):
        base = ("train-retrieval", "--data", prepared, "--model", model, "--runs-dir", tmp_path, "--name", name)
        outcome = vlkit(*base, "--steps", 12, "--batch-size", 16, "--lr", 1e-3, "--warmup", 1, *WAYS[way], *extra)
        assert outcome.code == 0, outcome.err
        return outcome

    train("plain", "--cache", "off")
    first, second = train("first", "--cache", tmp_path / "c"), train("second", "--cache", tmp_path / "c")
    assert "to be computed" in first.err and "; 0 to be computed" in second.err
    losses = {
        name: [line["loss"] for line in lines_of(tmp_path / name) if "loss" in line]
        for name in ("plain", "first", "second")
    }
    assert losses["first"] == pytest.approx(losses["plain"], rel=1e-5) and len(losses["plain"]) == 12
    assert losses["second"] == losses["first"]
    scores = [[line["val"] for line in lines_of(tmp_path / name) if "val" in line] for name in ("plain", "first")]
    assert scores[0] == scores[1]


def test_what_is_frozen_decides_what_is_kept(prepared, vlkit, tmp_path):
    def kept(*extra):
        base = ("train-retrieval", "--data", prepared, "--model", "tiny-clip", "--runs-dir", tmp_path, "--name", "x")
        outcome = vlkit(*base, "--steps", 12, "--batch-size", 16, *extra, "--dry-run", "--json")
        assert outcome.code == 0, outcome.err
        return outcome.json()["cache"]

    pictures = {"items": 44, "row": [128], "gb": pytest.approx((44 + 6) * 128 * 4 / 2**30, rel=0.2)}
    assert kept("--tune", "full") == {}
    assert kept("--tune", "text")["pictures"] == pictures
    assert kept("--tune", "head", "--towers", "text").keys() == {"pictures", "texts"}
    assert kept("--tune", "last", "--unfreeze-layers", 1)["pictures"]["row"] == [17, 128]
    assert kept("--tune", "text", "--cache", "off") == {}
    assert "hardly" in kept("--tune", "text", "--steps", 2)["pictures"]
    assert kept("--tune", "last", "--unfreeze-layers", 2) == {}, "the embeddings alone are not worth it"
