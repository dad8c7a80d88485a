"""Shared ground: small raw folders, a prepared one, tiny models, and the command line in this process."""

from __future__ import annotations

import csv
import json
import os
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread and two sum in another order, so bytes are compared under one; and threads that wait for each other on a
# busy machine are slower than none.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vlkit-test-cache-")
os.environ.pop("VLKIT_DEBUG", None)

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner
from zygote import Zygote

# A shell starts what it puts in the background deaf to Ctrl-C, and so would be the commands that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 60, 210),
    "yellow": (230, 220, 60),
    "white": (240, 240, 240),
}
FORMS = ("tart", "soup", "pie", "salad", "cake", "bread")


@dataclass
class Outcome:
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    def json(self) -> dict:
        """stdout as the one JSON object it must be."""
        return json.loads(self.out)


@pytest.fixture(scope="session")
def vlkit():
    """Run a vlkit command in this process: vlkit("prep", "--domain", "recipes")."""
    from vlkit.cli import app

    def run(*args: object) -> Outcome:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


def picture(path: Path, colour: tuple[int, int, int], seed: int, size: int = 40) -> None:
    """A noisy patch of one colour; every seed gives other bytes."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size, size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def patterned(path: Path, seed: int, size: tuple[int, int] = (96, 72), **save: object) -> Path:
    """A picture with large forms of its own, so that perceptual hashes tell it from others."""
    small = np.random.default_rng(seed).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, **save)
    return path


def write_recipes(folder: Path, recipes: int = 30, pictures: int = 2) -> Path:
    """A raw folder of recipes: each with `pictures` pictures and two texts."""
    lines = []
    for number in range(recipes):
        colour, form = list(COLOURS)[number % 5], FORMS[number // 5 % 6]
        names = [f"images/{number}-{copy}.png" for copy in range(pictures)]
        for copy, name in enumerate(names):
            picture(folder / name, COLOURS[colour], seed=number * 10 + copy)
        texts = {
            "title": f"{colour} {form} number {number}",
            "description": f"A {form} that is {colour}, made {number} times.",
        }
        lines.append(json.dumps({"recipe_id": f"r{number:03d}", **texts, "images": names}))
    (folder / "recipes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_class_folders(folder: Path, per_class: int = 10) -> Path:
    """A raw folder of classes: one colour each."""
    for position, (colour, value) in enumerate(COLOURS.items()):
        for number in range(per_class):
            picture(folder / f"Leaf___{colour}_spot" / f"{number}.png", value, seed=position * 1000 + number)
    return folder


def rejects(tmp_path):
    table = pd.read_csv(tmp_path / "out/rejects.csv")
    return dict(zip(table["item"], table["reason"], strict=True))


def write_table(folder, rows, name="table.csv"):
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def resealed(index):
    """Write the manifest of an index anew, of what is there now."""
    from vlkit.remote import hash_of

    files = {path.name: {"sha256": hash_of(path)} for path in index.iterdir() if path.name != "MANIFEST.json"}
    (index / "MANIFEST.json").write_text(json.dumps({"schema": 1, "files": files}))


@pytest.fixture
def prep(vlkit, tmp_path):
    """Run prep on tmp_path/raw; the table, or the outcome where it is refused."""

    def run(*flags, code=0):
        outcome = vlkit("prep", "--source", tmp_path / "raw", "--out", tmp_path / "out", *flags)
        assert outcome.code == code, outcome.err
        return pd.read_parquet(tmp_path / "out/pairs.parquet") if code == 0 else outcome

    return run


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    """A raw recipes folder."""
    return write_recipes(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def prepared(raw, tmp_path_factory, vlkit) -> Path:
    """The same, prepared."""
    out = tmp_path_factory.mktemp("prepared") / "recipes"
    assert vlkit("prep", "--domain", "recipes", "--source", raw, "--out", out).code == 0
    return out


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of a tiny model by name, made once."""
    from vlkit.models.tiny import write_tiny

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            write_tiny(name, [f"a {colour} {form}" for colour in COLOURS for form in FORMS], made[name], seed=1)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Path:
    """Folder of a tiny language model that has learned nothing."""
    from vlkit.models.captioner.tiny_llm import write_fresh_llm

    folder = tmp_path_factory.mktemp("tiny-qwen")
    texts = [f"a {colour} {form}, on a plate" for colour in COLOURS for form in FORMS]
    write_fresh_llm([*texts, "Describe the picture."], folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen(prepared, tmp_path_factory) -> Path:
    """Folder of one that has learned the words of the prepared recipes."""
    from vlkit.data.pairs import read_pairs
    from vlkit.training import pretrain_tiny_llm

    folder = tmp_path_factory.mktemp("taught") / "llm"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pretrain_tiny_llm, "BATCH", 16)
        train = read_pairs(prepared).of("train")
        pretrain_tiny_llm.write_tiny_llm(train, "Describe the picture.", folder, seed=1, total=120)
    return folder


@pytest.fixture(scope="module")
def zygote():
    """Starts commands in processes of their own, to be killed."""
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def tiny(tiny_folder):
    """A freshly loaded tiny model by name."""
    from vlkit.models.dual_encoder import load

    return lambda name: load(str(tiny_folder(name)))


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory, vlkit) -> Path:
    """A finished run of a few steps."""
    runs = tmp_path_factory.mktemp("runs")
    train = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", runs, "--name", "first")
    outcome = vlkit(*train, "--steps", 6, "--batch-size", 16)
    assert outcome.code == 0, outcome.err
    return runs / "first"
