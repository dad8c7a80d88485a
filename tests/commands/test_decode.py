"""--decode: what is trained in one way is measured, indexed and searched in that way, and nothing is mixed."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import write_patterned_image

from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.images.spec import PixelSpec
from vlkit.data.pairs import read_pairs
from vlkit.inference.index.index_folder import open_index
from vlkit.inference.index.query_encoder import image_decode
from vlkit.inference.search.search import Searcher
from vlkit.models.cache.feature_cache import FrozenImages
from vlkit.models.loading import load_base, load_model, load_tuned
from vlkit.models.preprocessing import with_decode
from vlkit.runs import Run
from vlkit.storage import Location


@pytest.fixture(scope="module")
def photographed(tmp_path_factory, vlkit):
    """A prepared folder of JPEGs that are large enough to be decoded at a part of their size."""
    folder = tmp_path_factory.mktemp("photographed")
    for number in range(12):
        write_patterned_image(folder / f"raw/{'ab'[number % 2]}/{number}.jpg", number, (301, 223), quality=90)
    assert vlkit("prep", "--source", folder / "raw", "--out", folder / "data", "--near-duplicates", -1).code == 0
    return folder / "data"


@pytest.fixture(scope="module")
def runs(photographed, tmp_path_factory, vlkit):
    """decode -> a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    train = ("train-retrieval", "--data", photographed, "--model", "tiny-clip", "--runs-dir", folder, "--steps", 2)
    for decode in ("exact", "fast", "reduced"):
        outcome = vlkit(*train, "--name", decode, "--decode", decode, "--batch-size", 4)
        assert outcome.code == 0, outcome.err
    return {decode: Run(folder / decode) for decode in ("exact", "fast", "reduced")}


def older(run, folder):
    """The run as it was written before there was a choice."""
    shutil.copytree(run.folder, folder)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings.pop("decode")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return Run(folder)


def test_the_default_is_fast_and_what_is_older_was_exact(runs, tmp_path):
    assert TrainRetrievalConfig().decode == PixelSpec(8).decode == "fast"
    run = older(runs["exact"], tmp_path / "older")
    assert run.config()["decode"] == load_tuned(run).pixel_spec.decode == load_base(run).pixel_spec.decode
    assert run.config()["decode"] == "exact"
    assert TrainRetrievalConfig.from_layers(run.config()).decode == "exact"


def test_a_model_reads_as_it_was_trained_and_otherwise_only_if_told(runs):
    for decode, run in runs.items():
        assert load_tuned(run).pixel_spec.decode == decode
        assert load_base(run).pixel_spec.decode == decode
        assert load_model(str(run.folder)).pixel_spec.decode == decode
        assert load_model(str(run.folder), "exact").pixel_spec.decode == "exact"
        assert load_model(str(run.folder / "model")).pixel_spec.decode == "fast"


@pytest.mark.parametrize("of", ["run", "model"])
def test_eval_reads_as_it_is_told(of, runs, photographed, tmp_path, vlkit, monkeypatch):
    """The way reaches the file, of the tuned and of the untouched model."""
    from vlkit.data.images import decode

    read, whole = set(), decode.decode_pixels
    monkeypatch.setattr(
        decode, "decode_pixels", lambda file, spec, *more: read.add(spec.decode) or whole(file, spec, *more)
    )
    run = runs["reduced"].folder
    what = ("--run", run) if of == "run" else ("--model", run / "model", "--data", photographed)
    options = ("eval", *what, "--out", tmp_path / "out", "--cache", "off", "--split", "train")
    for flags, expected in ((), "reduced" if of == "run" else "fast"), (("--decode", "exact"), "exact"):
        outcome = vlkit(*options, *flags)
        assert outcome.code == 0, outcome.err
        assert read == {expected}
        read.clear()


def test_an_unfinished_run_goes_on_only_in_its_own_way(photographed, tmp_path, vlkit):
    train = ("train-retrieval", "--data", photographed, "--model", "tiny-clip", "--runs-dir", tmp_path, "--name", "r")
    assert vlkit(*train, "--steps", 2, "--batch-size", 4, "--decode", "exact").code == 0
    run = older(Run(tmp_path / "r"), tmp_path / "s")
    (run.folder / "finished.json").unlink()
    again = (*train[:-1], "s", "--steps", 2, "--batch-size", 4)
    outcome = vlkit(*again)
    assert outcome.code == 2 and "decode was 'exact', now 'fast'" in outcome.err.replace("\n", " ")
    assert vlkit(*again, "--decode", "exact").code == 0


def test_a_cache_is_of_one_way_and_that_of_old_is_the_exact_one(tiny, tmp_path):
    encoder = tiny("tiny-clip")
    encoder.model.requires_grad_(False)

    def folder(decode):
        return FrozenImages.from_encoder(with_decode(encoder, decode), "fp32").folder(tmp_path)

    assert len({folder(decode) for decode in ("exact", "fast", "reduced")}) == 3
    spec = with_decode(encoder, "exact").pixel_spec
    before = dataclasses.asdict(spec)
    del before["decode"]
    assert spec.identity() == before


@pytest.mark.parametrize("decode", ["exact", "fast", "reduced"])
def test_an_index_is_searched_as_it_was_made(decode, runs, photographed, tmp_path, vlkit):
    """A picture that it holds is found as itself, whatever the run was trained with."""
    flags = (
        "index",
        "--run",
        runs["fast"].folder,
        "--data",
        photographed,
        "--out",
        tmp_path / "index",
        "--of",
        "images",
    )
    outcome = vlkit(*flags, "--decode", decode, "--cache", "off")
    assert outcome.code == 0, outcome.err
    index = open_index(Location(tmp_path / "index"))
    assert image_decode(index.about) == decode
    assert ("decode" in index.about["preprocessing"]["images"]) == (decode != "exact")
    pairs = read_pairs(photographed)
    path = pairs.image_paths(pairs.unique_images())[3]
    searched = vlkit("search", "--index", tmp_path / "index", "--image", path, "--json")
    best = searched.json()["queries"][0]["images"][0]
    assert best["path"] == str(path.resolve()) and best["score"] == pytest.approx(1, abs=1e-6)
    assert vlkit(*flags, "--update").code == 0
    other = vlkit(*flags, "--update", "--decode", "fast" if decode == "exact" else "exact")
    assert other.code == 6 and "have other preprocessing" in other.err


def test_the_ways_differ_as_much_as_they_should(runs, photographed):
    """Else the tests above would compare a thing with itself."""
    pairs = read_pairs(photographed)
    path = pairs.image_paths(pairs.unique_images())[0]
    observed = {}
    for decode in runs:
        searcher = with_decode(load_model(str(runs[decode].folder)), decode)
        observed[decode] = torch.from_numpy(np.stack([_pixels(path, searcher.pixel_spec)])).int()
    assert (observed["fast"] - observed["exact"]).abs().max() <= 1
    assert 1 <= (observed["reduced"] - observed["exact"]).abs().max() <= 10


def _pixels(path, spec):
    from vlkit.data.images.decode import load_pixels

    return load_pixels(path, spec)


def test_searching_opens_the_model_in_the_index_way(runs, photographed, tmp_path, vlkit):
    flags = ("index", "--model", runs["fast"].folder / "model", "--data", photographed, "--out", tmp_path / "index")
    assert vlkit(*flags, "--decode", "reduced").code == 0
    assert Searcher.open(Location(tmp_path / "index")).query_encoder.encoder.pixel_spec.decode == "reduced"
    moved = Searcher.open(Location(tmp_path / "index"), str(runs["fast"].folder))
    assert moved.query_encoder.encoder.pixel_spec.decode == "reduced"
