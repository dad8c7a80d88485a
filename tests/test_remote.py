"""s3:// against a real server on this machine: raw folders, prepared folders, runs; with failing requests too."""

import json
import random

import pandas as pd
import pytest
import yaml
from conftest import patterned, write_recipes

s3fs = pytest.importorskip("s3fs", reason="needs vlkit[s3]")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")


class Failing:
    """A WSGI application in front of the server that answers a share of the requests with 500."""

    def __init__(self, app):
        self.app, self.share, self.random, self.failed, self.asked = app, 0.0, random.Random(0), 0, []

    def __call__(self, environ, start_response):
        self.asked.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if self.random.random() < self.share:
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
    raw = write_recipes(tmp_path / "raw", recipes=20)
    put_raw(lake, raw)
    local = vlkit("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "local", "--json").json()
    zone = ("prep", "--domain", "recipes", "--source", "s3://trusted-zone/", "--out", "s3://fine-tuning-zone/")
    outcome = vlkit(*zone, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["fingerprint"] == local["fingerprint"]
    tables = {path.rpartition("/")[2] for path in lake.ls("fine-tuning-zone/datasets")}
    assert tables == {path.name for path in (tmp_path / "local").iterdir()} | {"MANIFEST.json"}
    there = pd.read_parquet(lake.open("fine-tuning-zone/datasets/pairs.parquet"))
    here = pd.read_parquet(tmp_path / "local/pairs.parquet")
    assert there[ROWS].equals(here[ROWS])
    assert len(lake.ls("fine-tuning-zone/images")) == 40
    for image, key in zip(there["image"], there["image_key"], strict=True):
        assert lake.cat(f"fine-tuning-zone/{image}") == (raw / key).read_bytes()


def test_train_and_eval_from_the_zone_into_the_zone(lake, tmp_path, vlkit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=20))
    zone = "s3://fine-tuning-zone/"
    assert vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", zone).code == 0
    train = ("train-retrieval", "--data", zone, "--model", "tiny-siglip", "--steps", 3, "--batch-size", 8)
    outcome = vlkit(*train, "--name", "first", "--runs-dir", zone, "--tune", "lora")
    assert outcome.code == 0, outcome.err
    outcome = vlkit("eval", "--run", "runs/first")
    assert outcome.code == 0, outcome.err
    run = "fine-tuning-zone/experiments/lora/run_first"
    found = {path.removeprefix(run + "/") for path in lake.find(run)}
    assert {
        "config.yaml",
        "adapter/adapter_model.safetensors",
        "logs/metrics.jsonl",
        "results/results.json",
        "examples/examples_top5.json",
        "checkpoints/step-000003/MANIFEST.json",
    } <= found
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
    lake.put(str(patterned(tmp_path / "other.png", 3)), name)
    pictures = tmp_path / "cache/vlkit/pictures"
    for path in pictures.rglob("*"):
        if path.is_file():
            path.unlink()
    outcome = vlkit("eval", "--model", "tiny-siglip", "--data", out, "--out", tmp_path / "e", "--split", "train")
    assert outcome.code == 3 and "not the picture that prep read" in outcome.err


def test_what_has_not_changed_is_not_fetched_again(lake, server, tmp_path, vlkit):
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=10, pictures=1))
    line = ("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", tmp_path / "out", "--json")
    assert vlkit(*line).json()["pictures_read"] == 10
    server.asked.clear()
    assert vlkit(*line).json()["pictures_read"] == 0
    assert not [each for each in server.asked if each.startswith("GET") and each.endswith(".png")]
    lake.put(str(patterned(tmp_path / "other.png", 3)), "trusted-zone/images/0-0.png")
    server.asked.clear()
    assert vlkit(*line).json()["pictures_read"] == 1
    assert [each for each in server.asked if each.endswith(".png")] == ["GET /trusted-zone/images/0-0.png"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_five_requests_in_a_hundred_fail(seed, lake, server, tmp_path, vlkit):
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=20))
    zone = ("prep", "--domain", "recipes", "--source", "s3://trusted-zone/", "--out", "s3://fine-tuning-zone/")
    server.random, server.share, server.failed = random.Random(seed), 0.05, 0
    outcome = vlkit(*zone, "--json")
    server.share = 0.0
    assert outcome.code == 0, outcome.err
    assert server.failed >= 2
    local = vlkit("prep", "--domain", "recipes", "--source", tmp_path / "raw", "--out", tmp_path / "l", "--json")
    assert outcome.json()["fingerprint"] == local.json()["fingerprint"]
    assert len(lake.ls("fine-tuning-zone/images")) == 40


def test_a_half_written_folder_is_refused(lake, tmp_path, vlkit):
    put_raw(lake, write_recipes(tmp_path / "raw", recipes=12))
    out = "s3://fine-tuning-zone/data"
    assert vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", out).code == 0
    evaluate = ("eval", "--model", "tiny-siglip", "--data", out, "--out", tmp_path / "e")
    whole = lake.cat("fine-tuning-zone/data/pairs.parquet")
    lake.pipe("fine-tuning-zone/data/pairs.parquet", whole[:-10])
    outcome = vlkit(*evaluate)
    assert outcome.code == 6 and "MANIFEST.json" in outcome.err
    lake.rm("fine-tuning-zone/data/MANIFEST.json")
    outcome = vlkit(*evaluate)
    assert outcome.code == 3 and "MANIFEST.json" in outcome.err


def test_what_is_not_there_is_said(lake, tmp_path, vlkit, monkeypatch):
    outcome = vlkit("prep", "--domain", "recipes", "--source", "s3://no-such-zone", "--out", tmp_path / "out")
    assert outcome.code == 3 and "no such bucket" in outcome.err
    outcome = vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", tmp_path / "out")
    assert outcome.code == 3 and "is empty" in outcome.err
    monkeypatch.setenv("MINIO_ENDPOINT", "127.0.0.1:9")
    monkeypatch.setattr("vlkit.remote.ATTEMPTS", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    outcome = vlkit("prep", "--domain", "recipes", "--source", "s3://trusted-zone", "--out", tmp_path / "out")
    assert outcome.code == 7 and "MINIO_ENDPOINT" in outcome.err
