"""index: an index equals brute force, is written whole, updated by what changed, and never half read."""

import json
import os
import random
import shutil
import signal
import threading
import time

import faiss
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from helpers import rewrite_manifest, write_image
from PIL import Image

from vlkit.config.base import read_yaml
from vlkit.config.search import IndexConfig
from vlkit.data.pairs import read_pairs
from vlkit.errors import ArtifactError, UsageError
from vlkit.inference.index import index_folder
from vlkit.inference.index.build import index
from vlkit.inference.index.faiss_index import VectorIndex
from vlkit.inference.index.index_folder import open_index
from vlkit.storage import Location


def unit_rows(count, width, seed):
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def indexed(trained, tmp_path_factory, vlkit):
    """An index of the trained run's texts and pictures, and what the command said."""
    out = tmp_path_factory.mktemp("indexed") / "index"
    outcome = vlkit("index", "--run", trained, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    return out, outcome.json()


def embedded_elsewhere(run, texts, paths):
    """By transformers alone, from what the run wrote for others."""
    model = transformers.AutoModel.from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    processor = transformers.AutoImageProcessor.from_pretrained(run / "model", use_fast=False)
    with torch.no_grad():
        ids = tokenizer(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")["input_ids"]
        report = model.get_text_features(input_ids=ids).pooler_output
        opened = [Image.open(path).convert("RGB") for path in paths]
        observed = model.get_image_features(**processor(opened, return_tensors="pt")).pooler_output
    return [torch.nn.functional.normalize(item, dim=1).numpy() for item in (report, observed)]


def test_an_index_holds_what_others_compute_in_the_order_of_its_docstore(indexed, trained, prepared):
    out, messages = indexed
    pairs, docstore = read_pairs(prepared), pd.read_parquet(out / "docstore.parquet")
    texts, pictures = (docstore[docstore["kind"] == kind].reset_index(drop=True) for kind in ("texts", "images"))
    assert list(docstore["kind"]) == ["texts"] * len(texts) + ["images"] * len(pictures)
    store = pd.read_parquet(prepared / "docstore.parquet")
    assert list(texts["id"]) == list(store["text_id"]) and list(texts["text"]) == list(store["text"])
    assert set(pictures["id"]) == set(pairs.frame["image_id"])
    assert all(os.path.isabs(path) and os.path.isfile(path) for path in pictures["path"])
    report, observed = embedded_elsewhere(trained, list(texts["text"]), list(pictures["path"]))
    for rows, kind in ((report, "texts"), (observed, "images")):
        stored = faiss.read_index(str(out / f"{kind}.faiss"))
        assert np.abs(stored.reconstruct_n(0, stored.ntotal) - rows).max() < 2e-5
    about = read_yaml(out / "index.yaml")
    assert about["searched"]["texts"]["recall@10"] == 1.0 and about["searched"]["images"]["count"] == len(pictures)
    assert about["data"]["fingerprint"] == pairs.fingerprint and about["model"]["run"] == str(trained)
    assert {"weights", "preprocessing", "width", "encoding_ms"} <= about.keys()
    assert messages["searched"] == about["searched"] and messages["index"] == str(out)
    groups = dict(zip(pictures["id"], pictures["group"], strict=True))
    assert all(list(groups[row.image_id]) == [row.image_group] for row in pairs.frame.itertuples())


def test_dry_run_says_how_large_it_gets_and_writes_nothing(trained, tmp_path, vlkit, indexed):
    outcome = vlkit("index", "--run", trained, "--out", tmp_path / "new", "--dry-run", "--json")
    assert outcome.code == 0 and not (tmp_path / "new").exists()
    planned = outcome.json()
    assert planned["types"] == {"texts": "flat", "images": "flat"}
    written = sum(path.stat().st_size for path in indexed[0].iterdir())
    assert written * 0.8 < planned["bytes"] < written * 2


@pytest.fixture
def own(prepared, tmp_path):
    """A prepared folder to be changed, its pictures beside it."""
    shutil.copytree(prepared, tmp_path / "data")
    pairs = read_pairs(tmp_path / "data")
    frame = pairs.frame
    for place, path in zip(frame.index, pairs.image_paths(frame), strict=True):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        target = tmp_path / "pictures" / path.name
        if not target.exists():
            shutil.copy2(path, target)
        frame.loc[place, "image"] = str(target)
    frame.to_parquet(tmp_path / "data/pairs.parquet")
    return tmp_path


def rows_of(folder):
    """(kind, key) -> embedding."""
    opened = open_index(Location(folder))
    return {(kind, key): row for kind in opened.vectors for key, row in opened.embeddings(kind).items()}


def test_update_embeds_what_is_new_and_drops_what_is_gone(own, trained, vlkit, monkeypatch):
    flags = ("--run", trained, "--data", own / "data", "--cache", "off", "--json")
    assert vlkit("index", *flags, "--out", own / "index").code == 0
    same = vlkit("index", *flags, "--out", own / "index", "--update")
    assert same.code == 0 and "up to date" not in same.out
    stamp = (own / "index").stat().st_ino
    frame = pd.read_parquet(own / "data/pairs.parquet")
    gone = frame["unit"].iloc[0]
    frame = frame[frame["unit"] != gone].reset_index(drop=True)
    new_text, changed = frame["text_id"].iloc[0], frame["image"].iloc[5]
    frame.loc[frame["text_id"] == new_text, ["text", "text_id"]] = ("other words", "0" * 20)
    write_image(own / "pictures" / os.path.basename(changed), (1, 2, 3), seed=99)
    frame.to_parquet(own / "data/pairs.parquet")
    updated = vlkit("index", *flags, "--out", own / "index", "--update")
    assert updated.code == 0, updated.err
    searched = updated.json()["searched"]
    assert (searched["texts"]["embedded"], searched["images"]["embedded"]) == (1, 1)
    assert searched["texts"]["count"] == frame["text_id"].nunique()
    assert searched["images"]["count"] == frame["image_id"].nunique()
    assert (own / "index").stat().st_ino != stamp
    assert vlkit("index", *flags, "--out", own / "anew").code == 0
    left, right = rows_of(own / "index"), rows_of(own / "anew")
    assert left.keys() == right.keys()
    assert all(np.abs(left[key] - right[key]).max() < 1e-5 for key in left)
    assert open_index(Location(own / "index")).table.equals(open_index(Location(own / "anew")).table)


def test_update_keeps_what_it_is_not_told_to_change(own, trained, vlkit):
    """The type, what is indexed, how many, the precision; a type that is asked for, or a target, is obeyed."""
    flags = ("index", "--run", trained, "--data", own / "data", "--out", own / "index", "--json")
    assert vlkit(*flags, "--type", "hnsw", "--of", "texts", "--limit", 20, "--precision", "bf16").code == 0
    again = vlkit(*flags, "--update")
    assert "searched" in again.json() and "embedded" not in again.err
    searched = again.json()["searched"]
    assert list(searched) == ["texts"] and searched["texts"]["type"] == "hnsw" and searched["texts"]["count"] <= 20
    assert again.json()["model"]["precision"] == "bf16" and again.json()["data"]["limit"] == 20
    created = again.json()["made"]
    other = vlkit(*flags, "--update", "--target-recall", 0.5).json()
    assert other["target_recall"] == 0.5 and other["searched"]["texts"]["embedded"] == 0
    flat = vlkit(*flags, "--update", "--type", "flat").json()
    assert flat["searched"]["texts"]["type"] == "flat" and flat["searched"]["texts"]["embedded"] == 0
    assert created and flat["target_recall"] == 0.5


def test_what_augment_wrote_and_wrong_pairs_are_not_found(own, trained, vlkit):
    frame = pd.read_parquet(own / "data/pairs.parquet")
    rows = [frame.iloc[number].copy() for number in range(2)]
    for number, row in enumerate(rows):
        row["text"], row["text_id"], row["pair_id"] = f"never said {number}", f"{number}" * 20, f"{number}" * 20
    rows[0]["origin"], rows[1]["match"], rows[1]["origin"] = "augmented", 0, "negative"
    pd.concat([frame, pd.DataFrame(rows)], ignore_index=True).to_parquet(own / "data/pairs.parquet")
    assert vlkit("index", "--run", trained, "--data", own / "data", "--out", own / "index").code == 0
    assert not pd.read_parquet(own / "index/docstore.parquet")["text"].str.contains("never said").any()


@pytest.mark.parametrize("kind, count", [("hnsw", 1), ("hnsw", 2), ("flat", 1), ("ivf-pq", 999), ("flat", 0)])
def test_very_few_texts(kind, count, trained, tmp_path, vlkit):
    """One is found; too few for codes are refused before any is embedded."""
    table = tmp_path / "t.parquet"
    pd.DataFrame({"text": [f"text {number}" for number in range(count)]}).to_parquet(table)
    if not count:
        table.write_bytes(b"no table")
    outcome = vlkit("index", "--run", trained, "--data", table, "--out", tmp_path / "index", "--type", kind)
    assert outcome.code == {999: 2, 0: 3}.get(count, 0), outcome.err
    if count in (1, 2):
        assert vlkit("search", "--index", tmp_path / "index", "text", "--json").code == 0


def test_update_of_what_is_the_same_writes_nothing(indexed, trained, vlkit):
    out, _ = indexed
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    outcome = vlkit("index", "--run", trained, "--out", out, "--update")
    assert outcome.code == 0 and "up to date" in outcome.out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def test_update_with_another_model_is_refused(indexed, trained, vlkit):
    out, _ = indexed
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    outcome = vlkit("index", "--run", trained, "--untouched", "--out", out, "--update")
    assert outcome.code == 6 and "have other weights" in outcome.err and "leave out --update" in outcome.err
    other = vlkit("index", "--run", trained, "--out", out, "--update", "--precision", "bf16")
    assert other.code == 6 and "have other precision" in other.err
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.parametrize("what", ["pictures", "tokens"])
def test_update_with_another_preprocessing_is_refused(what, own, trained, tmp_path, vlkit):
    """The weights are the same, the vectors would not be; search says so, too."""
    model = shutil.copytree(trained / "model", tmp_path / "model")
    flags = ("index", "--model", model, "--data", own / "data", "--out", own / "index")
    assert vlkit(*flags).code == 0
    if what == "pictures":
        settings = json.loads((model / "preprocessor_config.json").read_text())
        (model / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1, 0.9, 0.3]}))
    else:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        changed = {**settings, "do_lower_case": not settings.get("do_lower_case", True)}
        (model / "tokenizer_config.json").write_text(json.dumps(changed))
    outcome = vlkit(*flags, "--update")
    assert outcome.code == 6 and "have other preprocessing" in outcome.err
    part = ("--image", next((own / "pictures").iterdir())) if what == "pictures" else ("A Soup",)
    searched = vlkit("search", "--index", own / "index", *part)
    assert searched.code == 6 and "has other preprocessing" in searched.err


def test_an_interrupted_index_goes_on_from_what_was_embedded(own, trained, monkeypatch):
    """What the first try has embedded, the second does not embed again."""
    from vlkit.models.cache import feature_cache

    calls = []
    whole = feature_cache.FrozenPrefix.__call__

    def counted(self, inputs):
        calls.append(len(inputs))
        if self.kind == "pictures":
            raise KeyboardInterrupt
        return whole(self, inputs)

    config = IndexConfig(
        run=trained, data=Location(own / "data"), out=Location(own / "index"), cache=str(own / "cache")
    )
    monkeypatch.setattr(feature_cache.FrozenPrefix, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        index(config, dry_run=False)
    assert not (own / "index").exists() and sum(calls) > 20
    monkeypatch.setattr(
        feature_cache.FrozenPrefix, "__call__", lambda self, inputs: (kinds.append(self.kind), whole(self, inputs))[1]
    )
    kinds: list[str] = []
    index(config, dry_run=False)
    assert set(kinds) == {"pictures"}


def test_a_table_of_texts_is_a_docstore(trained, tmp_path, vlkit):
    rows = [{"text": f"passage number {number}", "class_name": "ab"[number % 2], "source": "x"} for number in range(8)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    outcome = vlkit(
        "index", "--run", trained, "--data", tmp_path / "texts.jsonl", "--out", tmp_path / "index", "--json"
    )
    assert outcome.code == 0, outcome.err
    docstore = pd.read_parquet(tmp_path / "index/docstore.parquet")
    assert list(docstore["text"]) == [row["text"] for row in rows]
    assert list(docstore["class"]) == list("abababab") and json.loads(docstore["metadata"][0]) == {"source": "x"}
    only = vlkit(
        "index", "--run", trained, "--data", tmp_path / "texts.jsonl", "--of", "images", "--out", tmp_path / "i"
    )
    assert only.code == 3 and "no images" in only.err


@pytest.mark.parametrize("content", ["", '{"text": ""}\n', "text\n"])
def test_an_empty_docstore(content, trained, tmp_path, vlkit):
    table = tmp_path / ("texts.csv" if content == "text\n" else "texts.jsonl")
    table.write_text(content)
    outcome = vlkit("index", "--run", trained, "--data", table, "--out", tmp_path / "index")
    assert outcome.code == 3 and "no texts" in outcome.err.replace("\n", " "), outcome.err
    assert not (tmp_path / "index").exists()


def test_what_comes_into_the_folder_meanwhile_is_not_lost(indexed, tmp_path):
    """It is looked at again just before the two change places."""
    folder = tmp_path / "index"
    shutil.copytree(indexed[0], folder)
    opened = open_index(Location(folder))
    (folder / "thesis.txt").write_text("years of work")
    about = {key: value for key, value in opened.about.items() if key != "schema"}
    with pytest.raises(UsageError, match="is not an index"):
        index_folder.write_index(Location(folder), about, opened.table, opened.vectors)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_table_as_people_have_it(trained, tmp_path, vlkit):
    """Ids that are numbers, rows without a text, one id for two texts: told; a text that is none: refused."""
    rows = [{"text_id": 1, "text": "one", "class_name": 7}, {"text_id": 1, "text": "two"}, {"text_id": 3, "text": ""}]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    flags = ("index", "--run", trained, "--data", table, "--out", tmp_path / "index")
    outcome = vlkit(*flags)
    assert outcome.code == 0, outcome.err
    assert "1 rows have no text" in outcome.err and "1 rows have the text_id of an earlier row" in outcome.err
    assert pd.read_parquet(tmp_path / "index/docstore.parquet")[["id", "class"]].values.tolist() == [["1", "7"]]
    table.write_text('{"text": ["a", "b"]}')
    refused = vlkit(*flags)
    assert refused.code == 3 and "t.jsonl:1" in refused.err and "is not a text" in refused.err


def test_the_docstore_of_a_persian_folder_stays_persian(trained, tmp_path, vlkit):
    arabic = "كيك شكلاتي"
    pd.DataFrame({"text_id": ["a"], "text": [arabic]}).to_parquet(tmp_path / "docstore.parquet")
    (tmp_path / "data.yaml").write_text("settings: {script: persian}\n")
    flags = ("index", "--run", trained, "--data", tmp_path / "docstore.parquet", "--out", tmp_path / "index")
    assert vlkit(*flags).code == 0
    assert pd.read_parquet(tmp_path / "index/docstore.parquet")["text"][0] == "کیک شکلاتی"
    output = vlkit("search", "--index", tmp_path / "index", arabic, "--json").json()["queries"][0]["texts"]
    assert output[0]["score"] > 0.9999


def test_another_folder_is_never_replaced(trained, indexed, tmp_path, vlkit):
    """Also one that has files of the same names, and an index that somebody keeps something in."""
    (tmp_path / "mine").mkdir()
    for name in ("index.yaml", "MANIFEST.json"):
        (tmp_path / "mine" / name).write_text("{}")
    shutil.copytree(indexed[0], tmp_path / "theirs")
    shutil.copytree(indexed[0], tmp_path / "odd")
    (tmp_path / "odd/texts.faiss").unlink()
    (tmp_path / "odd/texts.faiss").mkdir()
    assert vlkit("index", "--run", trained, "--out", tmp_path / "odd").code == 2
    for folder in (tmp_path / "mine", tmp_path / "theirs"):
        (folder / "thesis.txt").write_text("years of work")
        outcome = vlkit("index", "--run", trained, "--out", folder)
        assert outcome.code == 2 and "is not an index" in outcome.err
        assert (folder / "thesis.txt").read_text() == "years of work"
    assert vlkit("index", "--run", trained, "--out", tmp_path / "theirs/thesis.txt").code == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "--run RUN or --model M"),
        (("--model", "tiny-siglip"), "a tiny model exists only in the run"),
        (("--model", "x/y", "--untouched"), "--untouched has no effect without --run"),
        (("--run", "r", "--target-recall", 1.5), "--target-recall 1.5 must lie between"),
        (("--run", "r", "--type", "annoy"), "none of flat, hnsw, ivf-pq"),
    ],
)
def test_settings_that_cannot_be_meant(flags, message, vlkit):
    outcome = vlkit("index", *flags)
    assert outcome.code == 2 and message in outcome.err


def damaged(folder, name, change):
    content = bytearray((folder / name).read_bytes())
    (folder / name).write_bytes(change(content))


@pytest.mark.parametrize("name", ["texts.faiss", "images.faiss", "docstore.parquet", "index.yaml", "MANIFEST.json"])
def test_a_damaged_file_is_named_before_anything_is_parsed(name, indexed, tmp_path, vlkit, monkeypatch):
    for number, change in enumerate((lambda c: c[: len(c) // 2], lambda c: c[:20] + b"\xff" + c[21:], None)):
        folder = tmp_path / str(number)
        shutil.copytree(indexed[0], folder)
        if change is None:
            (folder / name).unlink()
        else:
            damaged(folder, name, change)
        with monkeypatch.context() as patched:
            patched.setattr(faiss, "read_index", lambda *_: pytest.fail("FAISS has read a file that is not verified"))
            outcome = vlkit("search", "--index", folder, "soup")
        assert outcome.code == 6 and name in outcome.err, outcome.err


def test_parts_that_do_not_belong_together(indexed, tmp_path, vlkit):
    """With a manifest that fits: counts, width and the kind of file are compared all the same."""

    def with_yaml(change):
        def apply(folder):
            about = (folder / "index.yaml").read_text()
            (folder / "index.yaml").write_text(change(about))

        return apply

    def shorter(folder):
        pd.read_parquet(folder / "docstore.parquet").iloc[1:].to_parquet(folder / "docstore.parquet", index=False)

    cases = [
        (lambda f: VectorIndex.build(unit_rows(7, 128, 0), "flat").write(f / "images.faiss"), "images.faiss has 7"),
        (shorter, "docstore.parquet"),
        (
            with_yaml(lambda text: text.replace("width: 128", "width: 64").replace("width: 64\n", "width: 32\n")),
            "columns",
        ),
        (lambda f: (f / "texts.faiss").write_bytes(b"nonsense"), "not a FAISS index"),
        (with_yaml(lambda text: text.replace("schema: 1", "schema: 99")), "another version"),
        (with_yaml(lambda text: text.replace("searched:", "sought:")), "damaged"),
    ]
    for number, (change, report) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(indexed[0], folder)
        change(folder)
        rewrite_manifest(folder)
        outcome = vlkit("search", "--index", folder, "soup")
        assert outcome.code == 6 and report in outcome.err, (report, outcome.err)


def test_an_index_of_another_model(indexed, trained, tmp_path, vlkit):
    outcome = vlkit("search", "--index", indexed[0], "--model", trained / "base", "soup")
    assert outcome.code == 6 and "built with another model" in outcome.err and "weights" in outcome.err
    shutil.copytree(indexed[0], tmp_path / "moved")
    about = (tmp_path / "moved/index.yaml").read_text()
    (tmp_path / "moved/index.yaml").write_text(about.replace(str(trained), str(tmp_path / "gone")))
    rewrite_manifest(tmp_path / "moved")
    gone = vlkit("search", "--index", tmp_path / "moved", "soup")
    assert gone.code == 6 and "no such run: " in gone.err and "--model RUN" in gone.err
    actual = vlkit("search", "--index", tmp_path / "moved", "--model", trained, "soup", "--json")
    assert actual.code == 0 and actual.json()["queries"][0]["texts"]


def test_readers_never_see_half(indexed, tmp_path):
    """Two indexes change places as fast as they can, while others open them."""
    one = open_index(Location(indexed[0]))
    half = len(one.vectors["texts"]) // 2
    few = {"texts": VectorIndex.build(one.vectors["texts"].rows()[:half], "flat")}
    about = {**one.about, "searched": {"texts": {**one.about["searched"]["texts"], "count": half}}}
    about.pop("schema")
    place, writing, opened = Location(tmp_path / "index"), threading.Event(), []
    whole = {key: value for key, value in one.about.items() if key != "schema"}
    index_folder.write_index(place, whole, one.table, one.vectors)

    def write():
        for number in range(40):
            if number % 2:
                index_folder.write_index(place, whole, one.table, one.vectors)
            else:
                index_folder.write_index(place, about, one.table.slice(0, half), few)
        writing.set()

    thread = threading.Thread(target=write)
    thread.start()
    retried = 0
    while not writing.is_set():
        try:
            actual = open_index(place)
        except ArtifactError as error:  # Five times in a row while one was read: it says so.
            assert "again and again" in error.message
            retried += 1
            continue
        opened.append((len(actual.table), sum(map(len, actual.vectors.values()))))
    thread.join()
    assert len(opened) > 5 and {*opened} <= {(len(one.table), len(one.table)), (half, half)}
    assert retried < len(opened)


class Builds:
    """`vlkit index` of other data over an index that is there, in processes to be killed."""

    def __init__(self, zygote, indexed, trained, prepared, tmp_path):
        self.out, self.log, self.zygote = tmp_path / "index", tmp_path / "log", zygote
        shutil.copytree(indexed, self.out)
        self.command = ("index", "--run", trained, "--data", prepared, "--limit", 20, "--out", self.out)
        self.cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def start(self, **env):
        return self.zygote.start(*self.command, log=self.log, **self.cache, **env)

    def counts(self):
        """Of an index that opens and answers."""
        opened = open_index(Location(self.out))
        scores, _ = opened.vectors["images"].search(opened.vectors["images"].rows()[:3], 1)
        assert np.allclose(scores, 1, atol=1e-5)
        return len(opened.table)


def test_killed_while_it_builds_the_old_index_still_answers(zygote, indexed, trained, prepared, tmp_path):
    """At five places, the last before and the first after the two change places."""
    builds = Builds(zygote, indexed[0], trained, prepared, tmp_path)
    old = builds.counts()
    assert zygote.wait(builds.start(VLKIT_FAULT=f"record={tmp_path / 'places'}")) == 0, builds.log.read_text()
    new = builds.counts()
    assert 0 < new < old
    shutil.rmtree(builds.out)
    shutil.copytree(indexed[0], builds.out)
    places = list(dict.fromkeys((tmp_path / "places").read_text().splitlines()))
    before, after = places.index("before rename of index"), places.index("after rename of index")
    # The cache is filled by now: what was flushed for it does not come again.
    ours = [place for place in places if place.split(" of ")[1] in {*os.listdir(builds.out), "index"}]
    chosen = [ours[0], ours[1], ours[-4], places[before], places[after]]
    for place in chosen:
        assert zygote.wait(builds.start(VLKIT_FAULT=f"kill@{place}")) == -9, (place, builds.log.read_text())
        assert builds.counts() == (new if place == places[after] else old), place
    assert zygote.wait(builds.start()) == 0
    assert builds.counts() == new
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_killed_at_twenty_random_moments(zygote, indexed, trained, prepared, tmp_path):
    builds, rng, killed = Builds(zygote, indexed[0], trained, prepared, tmp_path), random.Random(8), 0
    old, sizes = builds.counts(), set()
    assert zygote.wait(builds.start()) == 0
    began = time.perf_counter()
    assert zygote.wait(builds.start()) == 0
    lasts, new = time.perf_counter() - began, builds.counts()
    while killed < 20:
        pid = builds.start()
        time.sleep(rng.uniform(0.2 * lasts, 0.95 * lasts))
        os.kill(pid, signal.SIGKILL)
        killed += zygote.wait(pid) == -9
        sizes.add(builds.counts())
        if rng.random() < 0.5:
            shutil.rmtree(builds.out)
            shutil.copytree(indexed[0], builds.out)
        if rng.random() < 0.3:
            shutil.rmtree(builds.cache["XDG_CACHE_HOME"], ignore_errors=True)
    assert sizes <= {old, new} and old in sizes
    assert zygote.wait(builds.start()) == 0 and builds.counts() == new
