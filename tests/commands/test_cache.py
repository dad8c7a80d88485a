"""--cache: the same training, whatever was cached before."""

import pytest
from helpers import read_metrics, torchrun

WAYS = {
    "head": ("--tune", "head"),
    "last": ("--tune", "last", "--unfreeze-layers", 1),
    "text": ("--tune", "text"),
    "image": ("--tune", "image"),
    "lora": ("--tune", "lora", "--towers", "text", "--lora-dropout", 0.3),
    "micro": ("--tune", "last", "--unfreeze-layers", 1, "--micro-batch", 5),
}

# Three batches are an epoch.
STEPS = ("--steps", 6, "--batch-size", 16, "--eval-every", 3)

BOTH = [("tiny-siglip", way) for way in WAYS] + [("tiny-clip", "last"), ("tiny-clip", "image")]
REST = [("tiny-clip", way) for way in ("head", "text", "lora", "micro")]


@pytest.mark.parametrize(("model", "way"), [*BOTH, *(pytest.param(*item, marks=pytest.mark.slow) for item in REST)])
def test_the_loss_curve_is_that_of_no_cache(model, way, prepared, vlkit, tmp_path):
    """Losses and validation to 1e-5, weights as near as float32 lets them be; a second run computes nothing."""

    def train(name, *extra):
        base = ("train-retrieval", "--data", prepared, "--model", model, "--runs-dir", tmp_path, "--name", name)
        outcome = vlkit(*base, *STEPS, "--lr", 1e-3, "--warmup", 1, *WAYS[way], *extra)
        assert outcome.code == 0, outcome.err
        return outcome

    train("plain", "--cache", "off")
    first, second = train("first", "--cache", tmp_path / "c"), train("second", "--cache", tmp_path / "c")
    assert "to be computed" in first.err and "; 0 to be computed" in second.err
    losses = {
        name: [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("plain", "first", "second")
    }
    assert losses["first"] == pytest.approx(losses["plain"], rel=1e-5) and len(losses["plain"]) == 6
    assert losses["second"] == losses["first"]
    scores = [[line["val"] for line in read_metrics(tmp_path / name) if "val" in line] for name in ("plain", "first")]
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


@pytest.mark.parametrize(("value", "code"), [("s3://b/x", 2), ("OFF", 2), ("", 2), ("FILE", 2), ("FILE/below", 2)])
def test_a_cache_that_cannot_be_is_refused_before_anything_else(value, code, prepared, vlkit, tmp_path):
    (tmp_path / "file").write_text("x")
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-clip", "--runs-dir", tmp_path / "runs")
    flags = ("--name", "x", "--tune", "text", "--cache", value.replace("FILE", str(tmp_path / "file")))
    for more in ((), ("--dry-run",)):
        outcome = vlkit(*base, *flags, *more)
        assert outcome.code == code and "--cache" in outcome.err, outcome.err
    assert not (tmp_path / "runs").exists() or not (tmp_path / "runs/x/checkpoints").exists()


def test_a_damaged_cache_that_nobody_asked_for_is_filled_again(prepared, vlkit, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def train(name, *extra):
        base = ("train-retrieval", "--data", prepared, "--model", "tiny-clip", "--runs-dir", tmp_path, "--name", name)
        return vlkit(*base, "--steps", 12, "--batch-size", 16, "--tune", "text", *extra)

    assert train("first").code == 0
    (index,) = (tmp_path / "cache/vlkit/features").glob("pictures-*/index.jsonl")
    index.write_text('{"kexs": []}\n')
    again = train("second")
    assert again.code == 0 and "fills it again" in again.err
    index.write_text('{"kexs": []}\n')
    asked = train("third", "--cache", tmp_path / "cache/vlkit/features")
    assert asked.code == 6 and "damaged" in asked.err


@pytest.mark.slow
def test_processes_of_a_torchrun_share_a_cache_that_is_half_full(prepared, vlkit, tmp_path):
    """One that opens it late finds what the other wrote meanwhile; none misses an item. Losses as of one process."""
    cache = tmp_path / "c"
    flags = ("--data", prepared, "--steps", 8, "--batch-size", 20, "--tune", "text", "--eval-every", 4)
    one = ("train-retrieval", "--model", "tiny-siglip", "--runs-dir", tmp_path, "--name", "one", *flags)
    assert vlkit(*one, "--cache", "off").code == 0
    for number in range(2):
        done = torchrun(2, tmp_path, "--name", f"two-{number}", *flags, "--cache", cache)
        assert done.returncode == 0, done.stderr
        actual = [
            [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("one", "two-0")
        ]
        assert actual[1] == pytest.approx(actual[0], rel=1e-4)
        (index,) = cache.glob("pictures-*/index.jsonl")
        index.write_text(index.read_text().split("\n")[0] + "\n")
