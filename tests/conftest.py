"""Fixtures of all tests: small raw folders, a prepared one, tiny models, and the command line in this process."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread and two sum in another order, so bytes are compared under one; and threads that wait for each other on a
# busy machine are slower than none.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vlkit-test-cache-")
os.environ.pop("VLKIT_DEBUG", None)

import pandas as pd
import pytest
from helpers import COLOURS, FORMS, Outcome, write_recipes
from typer.testing import CliRunner
from zygote import Zygote

# A shell starts what it puts in the background deaf to Ctrl-C, and so would be the commands that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


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

    created: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in created:
            created[name] = tmp_path_factory.mktemp(name)
            write_tiny(name, [f"a {colour} {form}" for colour in COLOURS for form in FORMS], created[name], seed=1)
        return created[name]

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
        train = read_pairs(prepared).split("train")
        pretrain_tiny_llm.write_tiny_llm(train, "Describe the picture.", folder, seed=1, total=120)
    return folder


@pytest.fixture(scope="session")
def zygote():
    """Starts commands in processes of their own, to be killed."""
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def tiny(tiny_folder):
    """A freshly loaded tiny model by name."""
    from vlkit.models.loading import load_dual_encoder

    return lambda name: load_dual_encoder(str(tiny_folder(name)))


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory, vlkit) -> Path:
    """A finished run of a few steps."""
    runs = tmp_path_factory.mktemp("runs")
    train = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", runs, "--name", "first")
    outcome = vlkit(*train, "--steps", 6, "--batch-size", 16)
    assert outcome.code == 0, outcome.err
    return runs / "first"
