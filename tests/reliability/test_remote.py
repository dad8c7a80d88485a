"""s3:// against a real server on this machine: raw folders, prepared folders, runs; with failing requests too."""

import json
import random

import pandas as pd
import pytest
import yaml
from helpers import write_patterned_image, write_recipes

from vlkit.data.pairs import read_pairs
from vlkit.remote import Remote

s3fs = pytest.importorskip("s3fs", reason="needs vlkit[s3]")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")


class Failing:
    """A WSGI application in front of the server that answers a share of the requests with 500."""

    def __init__(self, app):
        self.app, self.share, self.random, self.failed, self.asked = app, 0.0, random.Random(0), 0, []
        self.puts_left: int | None = None

    def __call__(self, environ, start_response):
        self.asked.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if self.puts_left is not None and environ["REQUEST_METHOD"] == "PUT":
            self.puts_left -= 1
        if self.random.random() < self.share or (self.puts_left is not None and self.puts_left < 0):
            self.failed += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("500 Internal Server Error", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return [b""]
        return self.app(environ, start_response)


@pytest.fixture(scope="module")
def server():
    """An S3 server and the failures in front of it."""
    import logging
    import threading

    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    failing = Failing(moto_server.DomainDispatcherApplication(moto_server.create_backend_app))
    served = make_server("127.0.0.1", 0, failing, threaded=True)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    failing.url = f"http://127.0.0.1:{served.server_port}"
    yield failing
    served.shutdown()


@pytest.fixture
def lake(server, monkeypatch, tmp_path):
    """Empty zones, reached as a lake of one's own is: by the MinIO names of the environment."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MINIO_ENDPOINT", server.url)
    monkeypatch.setenv("MINIO_USER", "someone")
    monkeypatch.setenv("MINIO_PASSWORD", "secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.share = 0.0
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(key="someone", secret="secret", endpoint_url=server.url, use_listings_cache=False)
    for zone in ("trusted-zone", "fine-tuning-zone"):
        if fs.exists(zone):
            fs.rm(zone, recursive=True)
        fs.mkdir(zone)
    return fs


def put_raw(fs, raw, prefix="trusted-zone"):
    """A raw recipes folder as the lake has it: documents/recipes.jsonl and images/."""
    fs.put(str(raw / "recipes.jsonl"), f"{prefix}/documents/recipes.jsonl")
    fs.put(str(raw / "images"), f"{prefix}/images", recursive=True)


ROWS = ["image_id", "text", "image_group", "unit", "split", "image_key", "pair_id"]


def test_from_zone_to_zone(lake, tmp_path, vlkit):
    """The same pairs as from the local folder; tables under datasets/, pictures under images/, the manifest last."""
    raw = write_recipes(tmp_path / "raw", recipes=10)
    put_raw(lake, raw)
    local = vlkit("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "local", "--json").json()
    zone = ("prep", "--domain", "recipes", "--source", "s3://trusted-zone/", "--out", "s3://fine-tuning-zone/")
    outcome = vlkit(*zone, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["fingerprint"] == local["fingerprint"]
    tables = {path.rpartition("/")[2] for path in lake.ls("fine-tuning-zone/datasets")} - {".versions"}
    assert tables == {path.name for path in (tmp_path / "local").iterdir()} | {"MANIFEST.json"}
    there = pd.read_parquet(lake.open("fine-tuning-zone/datasets/pairs.parquet"))
    here = pd.read_parquet(tmp_path / "local/pairs.parquet")
    assert there[ROWS].equals(here[ROWS])
    assert len(lake.ls("fine-tuning-zone/images")) == 20
    for image, key in zip(there["image"], there["image_key"], strict=True):
        assert lake.cat(f"fine-tuning-zone/{image}") == (raw / key).read_bytes()


def test_train_and_eval_from_the_zone_into_the_zone(lake, tmp_path, vlkit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=20, images=1))
    zone = "s3://fine-tuning-zone/"
    assert vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", zone).code == 0
    train = ("train-retrieval", "--data", zone, "--model", "tiny-siglip", "--steps", 3, "--batch-size", 8)
    outcome = vlkit(*train, "--name", "first", "--runs-dir", zone, "--tune", "lora")
    assert outcome.code == 0, outcome.err
    outcome = vlkit("eval", "--run", "runs/first")
    assert outcome.code == 0, outcome.err
    run = "fine-tuning-zone/experiments/lora/run_first"
    actual = {path.removeprefix(run + "/") for path in lake.find(run)}
    assert {
        "config.yaml",
        "adapter/adapter_model.safetensors",
        "logs/metrics.jsonl",
        "results/results.json",
        "examples/examples_top5.json",
        "checkpoints/step-000003/MANIFEST.json",
    } <= actual
    assert yaml.safe_load(lake.cat(f"{run}/config.yaml"))["data"] == zone
    for name, local in (("results/results.json", "results.json"), ("logs/metrics.jsonl", "metrics.jsonl")):
        assert lake.cat(f"{run}/{name}") == (tmp_path / "runs/first" / local).read_bytes()
    base = vlkit("eval", "--model", "tiny-siglip", "--data", zone, "--out", zone)
    assert base.code == 0, base.err
    results = json.loads(lake.cat("fine-tuning-zone/experiments/baseline/run_tiny-siglip/results/results.json"))
    assert results["model"] == "tiny-siglip"


def test_a_prefix_is_a_prepared_folder_that_points_into_the_source(lake, tmp_path, vlkit):
    raw = write_recipes(tmp_path / "raw", recipes=12)
    put_raw(lake, raw, "trusted-zone/deep/down")
    out = "s3://fine-tuning-zone/data/recipes"
    assert vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone/deep/down", "--out", out).code == 0
    names = {path.rpartition("/")[2] for path in lake.find("fine-tuning-zone")}
    assert "pairs.parquet" in names and not any(name.endswith(".png") for name in names)
    assert (
        vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone/deep/down", "--out", tmp_path / "o").code
        == 0
    )
    for data in (out, tmp_path / "o"):
        outcome = vlkit("eval", "--model", "tiny-siglip", "--data", data, "--out", tmp_path / "e", "--split", "train")
        assert outcome.code == 0, outcome.err
    # A picture that is not the one prep read is refused, not trained on.
    name = lake.ls("trusted-zone/deep/down/images")[0]
    lake.put(str(write_patterned_image(tmp_path / "other.png", 3)), name)
    pictures = tmp_path / "cache/vlkit/pictures"
    for path in pictures.rglob("*"):
        if path.is_file():
            path.unlink()
    outcome = vlkit("eval", "--model", "tiny-siglip", "--data", out, "--out", tmp_path / "e", "--split", "train")
    assert outcome.code == 3 and "has changed since prep read it" in outcome.err


def test_what_has_not_changed_is_not_fetched_again(lake, server, tmp_path, vlkit):
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=10, images=1))
    line = ("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", tmp_path / "out", "--json")
    assert vlkit(*line).json()["pictures_read"] == 10
    server.asked.clear()
    assert vlkit(*line).json()["pictures_read"] == 0
    assert not [item for item in server.asked if item.startswith("GET") and item.endswith(".png")]
    lake.put(str(write_patterned_image(tmp_path / "other.png", 3)), "trusted-zone/images/0-0.png")
    server.asked.clear()
    assert vlkit(*line).json()["pictures_read"] == 1
    assert [item for item in server.asked if item.endswith(".png")] == ["GET /trusted-zone/images/0-0.png"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_five_requests_in_a_hundred_fail(seed, lake, server, tmp_path, vlkit):
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=20, images=1))
    zone = ("prep", "--domain", "recipes", "--source", "s3://trusted-zone/", "--out", "s3://fine-tuning-zone/")
    server.random, server.share, server.failed = random.Random(seed), 0.05, 0
    outcome = vlkit(*zone, "--json")
    server.share = 0.0
    assert outcome.code == 0, outcome.err
    assert server.failed >= 2
    local = vlkit("prep", "--domain", "recipes", "--source", tmp_path / "raw", "--out", tmp_path / "l", "--json")
    assert outcome.json()["fingerprint"] == local.json()["fingerprint"]
    assert len(lake.ls("fine-tuning-zone/images")) == 20


def test_a_half_written_folder_is_refused(lake, tmp_path, vlkit):
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=12))
    out = "s3://fine-tuning-zone/data"
    assert vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", out).code == 0
    evaluate = ("eval", "--model", "tiny-siglip", "--data", out, "--out", tmp_path / "e")
    name = next(path for path in lake.find("fine-tuning-zone/data/.versions") if path.endswith("pairs.parquet"))
    lake.pipe(name, lake.cat(name)[:-10])
    outcome = vlkit(*evaluate)
    assert outcome.code == 6 and "MANIFEST.json" in outcome.err
    for content in (b"{", b'{"files": {"../../x": {"sha256": "0"}}}', b"[]"):
        lake.pipe("fine-tuning-zone/data/MANIFEST.json", content)
        assert vlkit(*evaluate).code == 6
    lake.rm("fine-tuning-zone/data/MANIFEST.json")
    outcome = vlkit(*evaluate)
    assert outcome.code == 3 and "MANIFEST.json" in outcome.err


@pytest.mark.parametrize("after", [0, 3, 9, 14])
def test_an_upload_that_breaks_leaves_the_old_folder_whole(after, lake, server, tmp_path, vlkit, monkeypatch):
    """From some PUT on every request fails: readers still have the old rows; the next prep has the new ones."""
    monkeypatch.setattr("vlkit.remote.MAX_ATTEMPTS", 1)
    out = "s3://fine-tuning-zone/data"
    line = ("prep", "--domain", "recipes", "--source", tmp_path / "raw", "--out", out)
    write_recipes(tmp_path / "raw", recipes=8)
    assert vlkit(*line).code == 0
    write_recipes(tmp_path / "raw", recipes=20)
    s3fs.S3FileSystem.clear_instance_cache()
    server.puts_left = after
    outcome = vlkit(*line)
    server.puts_left = None
    s3fs.S3FileSystem.clear_instance_cache()
    assert outcome.code == 7
    assert len(read_pairs(out)) == 32
    assert vlkit(*line).code == 0 and len(read_pairs(out)) == 80
    versions = {path.split("/")[3] for path in lake.find("fine-tuning-zone/data/.versions")}
    assert len(versions) == 1


def test_a_slash_at_the_end_changes_nothing(lake, tmp_path, vlkit):
    raw = tmp_path / "raw"
    for name in "ab":
        for number in range(5):
            write_patterned_image(raw / name / f"{number}.png", ord(name) * 10 + number)
    lake.put(str(raw), "trusted-zone/cls", recursive=True)
    actual = []
    for source in ("s3://trusted-zone/cls/", "s3://trusted-zone/cls", "s3://trusted-zone/cls/"):
        line = ("prep", "--source", source, "--out", "s3://trusted-zone/cls/out", "--copy-images", "--json")
        outcome = vlkit(*line)
        assert outcome.code == 0, outcome.err
        actual.append((outcome.json()["fingerprint"], outcome.json()["counts"]))
    assert actual[0] == actual[1] == actual[2] and actual[0][1]["pictures"] == 10


def test_an_upload_of_copies_that_broke_off_can_be_repeated(lake, tmp_path, vlkit):
    raw = write_recipes(tmp_path / "raw", recipes=12)
    lake.put(str(raw / "images/0-0.png"), "fine-tuning-zone/x/images/" + "0a" * 10 + ".png")
    line = ("prep", "--domain", "recipes", "--source", raw, "--out", "s3://fine-tuning-zone/x", "--copy-images")
    assert vlkit(*line, "--training-view", "mine.csv").code == 0
    assert lake.exists("fine-tuning-zone/x/mine.csv")
    assert vlkit(*line).code == 0
    assert not lake.exists("fine-tuning-zone/x/mine.csv")
    lake.pipe("fine-tuning-zone/x/thesis.txt", b"precious")
    assert vlkit(*line).code == 2


def test_copies_in_the_bucket_follow_the_table(lake, tmp_path, vlkit):
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=12))
    zone = ("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", "s3://fine-tuning-zone")
    assert vlkit(*zone).code == 0
    assert vlkit(*zone, "--limit", 8).code == 0
    remaining = pd.read_parquet(lake.open("fine-tuning-zone/datasets/pairs.parquet"))["image"]
    assert {path.removeprefix("fine-tuning-zone/") for path in lake.find("fine-tuning-zone/images")} == set(remaining)


def test_names_in_a_bucket_that_lead_out_are_not_followed(lake, tmp_path):
    lake.pipe("trusted-zone/a/../../../escaped.txt", b"x")
    lake.pipe("trusted-zone/a/fine.txt", b"y")
    assert list(Remote("s3://trusted-zone/a").listing()) == ["fine.txt"]


def test_one_picture_under_two_names_can_be_trained_on(lake, tmp_path, vlkit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = write_recipes(tmp_path / "raw", recipes=12)
    (raw / "images/1-0.png").write_bytes((raw / "images/0-0.png").read_bytes())
    put_raw(lake, raw)
    assert vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", "data").code == 0
    train = ("train-retrieval", "--data", "data", "--model", "tiny-siglip", "--steps", 1, "--batch-size", 4)
    outcome = vlkit(*train)
    assert outcome.code == 0, outcome.err


def test_a_run_trained_anew_under_its_name_is_mirrored_anew(lake, tmp_path, vlkit, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    raw = write_recipes(tmp_path / "raw", recipes=12)
    assert vlkit("prep", "--domain", "recipes", "--source", raw, "--out", "data").code == 0
    train = ("train-retrieval", "--data", "data", "--model", "tiny-siglip", "--steps", 1, "--batch-size", 4)
    for seed in (1, 2):
        shutil.rmtree("runs", ignore_errors=True)
        outcome = vlkit(*train, "--seed", seed, "--runs-dir", "s3://fine-tuning-zone/runs", "--name", "x")
        assert outcome.code == 0, outcome.err
    there = lake.cat("fine-tuning-zone/runs/x/model/model.safetensors")
    assert there == (tmp_path / "runs/x/model/model.safetensors").read_bytes()


def test_the_source_may_be_a_table_or_hold_the_output(lake, tmp_path, vlkit):
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=12), "trusted-zone/here")
    table = "s3://trusted-zone/here/documents/recipes.jsonl"
    lake.put(str(tmp_path / "raw/images"), "trusted-zone/here/documents/images", recursive=True)
    line = (
        "prep",
        "--domain",
        "recipes",
        "--source",
        table,
        "--out",
        "s3://trusted-zone/here/documents/out",
        "--copy-images",
    )
    first = vlkit(*line, "--json")
    assert first.code == 0, first.err
    second = vlkit(*line, "--json")
    assert second.json()["fingerprint"] == first.json()["fingerprint"]
    assert second.json()["counts"] == first.json()["counts"]


def test_what_is_not_there_is_said(lake, tmp_path, vlkit, monkeypatch):
    outcome = vlkit("prep", "--domain", "recipes", "--source", "s3://no-such-zone", "--out", tmp_path / "out")
    assert outcome.code == 3 and "no such bucket" in outcome.err
    outcome = vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", tmp_path / "out")
    assert outcome.code == 3 and "no images or tables in" in outcome.err
    monkeypatch.setenv("MINIO_ENDPOINT", "127.0.0.1:9")
    monkeypatch.setattr("vlkit.remote.MAX_ATTEMPTS", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    outcome = vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", tmp_path / "out")
    assert outcome.code == 7 and "MINIO_ENDPOINT" in outcome.err


@pytest.mark.parametrize(
    "zone", [pytest.param("s3://fine-tuning-zone/", marks=pytest.mark.slow), "s3://fine-tuning-zone/recipes"]
)
def test_augment_in_the_zone_is_as_on_the_disk(zone, lake, server, tmp_path, vlkit, monkeypatch):
    """Rows and pictures; twice; broken off half way; trained on; undone by prep."""
    monkeypatch.chdir(tmp_path)
    raw = write_recipes(tmp_path / "raw", recipes=20, images=1)
    prep = ("prep", "--domain", "recipes", "--source", raw, "--out")
    assert vlkit(*prep, zone).code == vlkit(*prep, "local").code == 0
    plain = {path for path in lake.find("fine-tuning-zone") if "/.versions/" not in path}
    for data in (zone, "local"):
        outcome = vlkit("augment", "--data", data)
        assert outcome.code == 0, outcome.err
    place = tables = zone.removeprefix("s3://").rstrip("/")
    tables += "/datasets" if zone.endswith("zone/") else ""
    here = pd.read_parquet("local/pairs.parquet").drop(columns="image")
    assert read_pairs(zone).frame[list(here)].equals(read_pairs("local").frame[list(here)])
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "local/augmented_images").iterdir()}
    there = lake.ls(f"{place}/augmented_images")
    assert {path.rpartition("/")[2]: lake.cat(path) for path in there} == pictures
    assert lake.exists(f"{tables}/train_pairs_augmented_with_negatives.csv")
    server.puts_left = 10
    try:
        assert vlkit("augment", "--data", zone, "--seed", 5).code == 7
    finally:
        server.puts_left = None
    assert read_pairs(zone).frame[list(here)].equals(read_pairs("local").frame[list(here)])
    assert vlkit("augment", "--data", zone).code == 0
    assert sorted(lake.ls(f"{place}/augmented_images")) == sorted(there)
    train = ("train-retrieval", "--data", zone, "--model", "tiny-siglip", "--steps", 2, "--batch-size", 8)
    assert vlkit(*train, "--name", "a").code == 0
    assert vlkit("augment", "--data", zone, "--preview", 2).code == 0
    assert (tmp_path / "augment_preview.png").is_file()
    assert vlkit(*prep, zone).code == 0
    assert {path for path in lake.find("fine-tuning-zone") if "/.versions/" not in path} == plain


def test_augment_touches_no_picture_of_somebody_else_and_fetches_few_to_forecast(lake, server, tmp_path, vlkit):
    zone = "s3://fine-tuning-zone/recipes"
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=30, images=1))
    source = ("--source", "s3://trusted-zone")
    assert vlkit("prep", "--domain", "recipes", *source, "--out", zone, "--no-check-images").code == 0
    server.asked.clear()
    assert vlkit("augment", "--data", zone, "--dry-run").code == 0
    assert 0 < sum(asked.startswith("GET") and asked.endswith(".png") for asked in server.asked) <= 12
    lake.pipe("fine-tuning-zone/recipes/augmented_images/mine.png", b"mine")
    outcome = vlkit("augment", "--data", zone)
    assert outcome.code == 2 and "mine.png was not written by augment" in outcome.err
    lake.rm("fine-tuning-zone/recipes/augmented_images/mine.png")
    server.puts_left = 3
    try:
        assert vlkit("augment", "--data", zone).code == 7
    finally:
        server.puts_left = None
    assert vlkit("prep", "--domain", "recipes", *source, "--out", zone, "--no-check-images").code == 0


def test_an_index_lies_in_s3(lake, trained, tmp_path, vlkit):
    """Written, searched, updated; a file that is not the manifest's, and a place without one, are told."""
    place = "s3://fine-tuning-zone/indexes/soups"
    created = ("index", "--run", trained, "--out", place)
    outcome = vlkit(*created, "--json")
    assert outcome.code == 0, outcome.err
    assert vlkit("index", "--run", trained, "--out", tmp_path / "here").code == 0
    ask = ("a red soup", "-k", 3, "--json")
    there, here = (vlkit("search", "--index", index, *ask) for index in (place, tmp_path / "here"))
    assert there.code == 0, there.err
    assert there.json()["queries"] == here.json()["queries"]
    assert "up to date" in vlkit(*created, "--update").out
    fewer = vlkit(*created, "--update", "--limit", 10, "--json").json()["searched"]
    assert fewer["texts"]["embedded"] == 0 and fewer["texts"]["count"] <= 10
    assert len(vlkit("search", "--index", place, "soup", "-k", 900, "--json").json()["queries"][0]["texts"]) <= 10
    nothing = vlkit("search", "--index", "s3://fine-tuning-zone/indexes/nothing", "soup")
    assert nothing.code == 6 and "no such index: s3://" in nothing.err
    (version,) = {name.split("/")[4] for name in lake.find("fine-tuning-zone/indexes/soups/.versions")}
    with lake.open(f"fine-tuning-zone/indexes/soups/.versions/{version}/texts.faiss", "wb") as file:
        file.write(b"half")
    assert vlkit("search", "--index", place, "soup").code == 6
    lake.pipe("fine-tuning-zone/mine/notes.txt", b"mine")
    other = vlkit("index", "--run", trained, "--out", "s3://fine-tuning-zone/mine")
    assert other.code == 2 and "is not an index" in other.err and lake.exists("fine-tuning-zone/mine/notes.txt")
