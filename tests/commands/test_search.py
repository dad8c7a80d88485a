"""search: the answers are brute force's, filters are obeyed, and what cannot be asked is told."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from helpers import write_class_folders

from vlkit.errors import UsageError
from vlkit.inference.search.filters import parse_filters
from vlkit.inference.search.search import Query, Searcher
from vlkit.storage import Location


@pytest.fixture(scope="module")
def leaves(tmp_path_factory, vlkit):
    """Classes: a run of a few steps, its prepared folder and an index, side by side."""
    root = tmp_path_factory.mktemp("leaves")
    write_class_folders(root / "raw")
    assert vlkit("prep", "--domain", "agriculture", "--source", root / "raw", "--out", root / "data").code == 0
    train = ("train-retrieval", "--data", root / "data", "--model", "tiny-clip", "--runs-dir", root / "runs")
    assert vlkit(*train, "--name", "leaf", "--steps", 30, "--batch-size", 16).code == 0
    assert vlkit("index", "--run", root / "runs/leaf", "--out", root / "index").code == 0
    return root


@pytest.fixture(scope="module")
def searcher(leaves):
    return Searcher.open(Location(leaves / "index"))


def hits(outcome, kind, query=0):
    assert outcome.code == 0, outcome.err
    return outcome.json()["queries"][query][kind]


def test_the_hits_are_those_of_brute_force(leaves, searcher, vlkit):
    """Words and a picture, in both kinds, by vectors that were read by themselves."""
    words = ["a red spot on a leaf", "something blue"]
    picture = next((leaves / "raw").rglob("3.png"))
    outcome = vlkit("search", "--index", leaves / "index", *words, "--image", picture, "-k", 7, "--json")
    rows, _ = searcher.query_encoder.embed_texts(words)
    observed = searcher.query_encoder.embed_images([searcher.query_encoder.load_pixels(picture)])
    for number, query in enumerate([*rows, *observed]):
        for kind in ("texts", "images"):
            stored, ids = searcher.index.vectors[kind].rows(), searcher.index.column(kind, "id").to_pylist()
            cosines = stored.astype(np.float64) @ query.astype(np.float64)
            actual = hits(outcome, kind, number)
            assert len(actual) == min(7, len(ids))
            best = np.sort(cosines)[::-1][: len(actual)]
            assert np.allclose([hit["score"] for hit in actual], best, atol=2e-6)
            assert np.allclose([cosines[ids.index(hit["id"])] for hit in actual], best, atol=2e-6)
    assert hits(outcome, "images", 2)[0]["path"] == str(picture.resolve())


def test_queries_together_are_answered_as_each_alone(searcher):
    asks = [
        *(Query(text=f"a leaf with {colour} spots", k=3) for colour in ("red", "blue", "green")),
        Query(text="a leaf", k=5, contents="images"),
        Query(text="a leaf with red spots", k=6),
        Query(like=("images", 4), k=6),
        Query(text="spots", k=4, filters=("class=leaf red spot",)),
        Query(text="a leaf with red spots and a great many words more", k=3),
    ]
    together = searcher.answer(asks)
    for ask, answer in zip(asks, together, strict=True):
        (alone,) = searcher.answer([ask])
        assert alone.hits.keys() == answer.hits.keys() and alone.notes == answer.notes
        for kind, actual in alone.hits.items():
            assert [hit.position for hit in actual] == [hit.position for hit in answer.hits[kind]]
            assert np.allclose([hit.score for hit in actual], [hit.score for hit in answer.hits[kind]], atol=1e-5)


def test_like_leaves_the_entry_itself_out(leaves, searcher, vlkit):
    key = searcher.index.column("images", "id")[3].as_py()
    actual = hits(vlkit("search", "--index", leaves / "index", "--like", key, "-k", 4, "--json"), "images")
    rows = searcher.index.vectors["images"].rows()
    order = [int(place) for place in np.argsort(-rows @ rows[3], kind="stable") if place != 3][:4]
    assert [hit["row"] for hit in actual] == order
    every = vlkit("search", "--index", leaves / "index", "--like", key, "-k", 50, "--of", "images", "--json")
    assert len(hits(every, "images")) == 49
    assert every.json()["queries"][0]["notes"] == ["50 images were asked for: there are 49"]
    gone = vlkit("search", "--index", leaves / "index", "--like", "nobody")
    assert gone.code == 2 and "no document with the id 'nobody'" in gone.err


def test_filters(leaves, vlkit):
    ask = ("search", "--index", leaves / "index", "a leaf", "-k", 50, "--json")
    docstore = pd.read_parquet(leaves / "index/docstore.parquet")
    classes = sorted(set(docstore["class"]))
    pictures = docstore[docstore["kind"] == "images"]
    one = hits(vlkit(*ask, "--filter", f"class={classes[0]}"), "images")
    assert {hit["id"] for hit in one} == set(pictures[pictures["class"] == classes[0]]["id"])
    two = hits(vlkit(*ask, "--filter", f"class={classes[0]}", "--filter", f"class={classes[1]}"), "images")
    assert {hit["class"] for hit in two} == set(classes[:2]) and len(two) == 2 * len(one)
    test = hits(vlkit(*ask, "--filter", "split=test", "--filter", f"class={classes[0]}"), "images")
    assert test and all(hit["metadata"]["split"] == "test" and hit["class"] == classes[0] for hit in test)
    group = one[0]["group"][0]
    assert {hit["id"] for hit in hits(vlkit(*ask, "--filter", f"group={group}"), "images")} == {h["id"] for h in one}


def test_filters_that_nothing_passes(leaves, vlkit):
    def told(line):
        outcome = vlkit("search", "--index", leaves / "index", "a leaf", "--filter", line)
        assert outcome.code == 2, outcome
        return outcome.err

    assert "did you mean 'Leaf___red_spot'" in told("class=Leaf___red_spott")
    assert "did you mean 'class'" in told("clas=Leaf___red_spot")
    assert "does not have the form class=rust" in told("class")
    with pytest.raises(UsageError):
        parse_filters(["=x"])
    assert parse_filters(["a=1", "a = 2 ", "b=c=d"]) == {"a": {"1", "2"}, "b": {"c=d"}}


def test_k_above_the_size_and_a_query_beyond_the_limit_are_said(leaves, vlkit):
    many = vlkit("search", "--index", leaves / "index", "a leaf", "-k", 900, "--of", "images")
    assert many.code == 0 and "900 images were asked for: there are 50" in many.err
    assert vlkit("search", "--index", leaves / "index", "a leaf", "-k", 1001).code == 2
    long = vlkit("search", "--index", leaves / "index", "leaf " * 500)
    assert long.code == 0 and "the rest is ignored" in long.err
    assert "the rest is ignored" not in vlkit("search", "--index", leaves / "index", "leaf " * 20).err


@pytest.mark.parametrize(
    "content, message",
    [(b"", "not an image"), (b"<!doctype html><p>404", "an HTML page"), (b"\xff\xd8\xff\xe0 torn", "")],
)
def test_a_picture_that_cannot_be_read(content, message, leaves, tmp_path, vlkit):
    (tmp_path / "leaf.jpg").write_bytes(content)
    outcome = vlkit("search", "--index", leaves / "index", "--image", tmp_path / "leaf.jpg")
    assert outcome.code == 3 and "leaf.jpg" in outcome.err and message in outcome.err
    assert vlkit("search", "--index", leaves / "index", "--image", tmp_path / "none.jpg").code == 3


def test_a_file_of_queries(leaves, tmp_path, vlkit):
    (tmp_path / "queries.txt").write_text("\ufeffred leaf\n\n \u200b \nblue leaf\r\n", encoding="utf-8")
    outcome = vlkit("search", "--index", leaves / "index", "--queries", tmp_path / "queries.txt", "first", "--json")
    assert [item["query"] for item in outcome.json()["queries"]] == [
        {"text": "first"},
        {"text": "red leaf"},
        {"text": "blue leaf"},
    ]
    (tmp_path / "queries.txt").write_text("\n\n")
    assert vlkit("search", "--index", leaves / "index", "--queries", tmp_path / "queries.txt").code == 3
    assert vlkit("search", "--index", leaves / "index", "--queries", tmp_path / "nowhere.txt").code == 3
    assert vlkit("search", "--index", leaves / "index").code == 2
    assert vlkit("search", "--index", leaves / "index", "  ").code == 2


def test_the_only_index_is_taken_and_others_are_named(leaves, tmp_path, vlkit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    none = vlkit("search", "leaf")
    assert none.code == 2 and "none under indexes/" in none.err
    (tmp_path / "indexes").mkdir()
    os.symlink(leaves / "index", tmp_path / "indexes/one")
    assert vlkit("search", "leaf").code == 0
    os.symlink(leaves / "index", tmp_path / "indexes/two")
    several = vlkit("search", "leaf")
    assert several.code == 2 and "indexes/one, indexes/two" in several.err
    missing = vlkit("search", "--index", tmp_path / "nothing", "leaf")
    assert missing.code == 6 and "no such index: " in missing.err
    assert vlkit("search", "--index", leaves / "data", "leaf").code == 6


def test_an_index_of_texts_answers_pictures_by_texts(leaves, tmp_path, vlkit):
    run = leaves / "runs/leaf"
    assert vlkit("index", "--run", run, "--of", "texts", "--out", tmp_path / "texts").code == 0
    picture = next((leaves / "raw").rglob("1.png"))
    outcome = vlkit("search", "--index", tmp_path / "texts", "--image", picture, "--json")
    assert hits(outcome, "texts") and "images" not in outcome.json()["queries"][0]
    refused = vlkit("search", "--index", tmp_path / "texts", "--of", "images", "leaf")
    assert refused.code == 2 and "holds no images" in refused.err


def test_a_table_for_people_cuts_long_texts_and_keeps_markup(leaves, tmp_path, vlkit):
    rows = [{"text": "[bold]no markup[/bold] " + "word " * 60}, {"text": "قورمه‌سبزی با لوبیا"}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    created = ("index", "--run", leaves / "runs/leaf", "--data", tmp_path / "t.jsonl", "--out", tmp_path / "index")
    assert vlkit(*created).code == 0
    outcome = vlkit("search", "--index", tmp_path / "index", "word")
    assert "[bold]no markup[/bold]" in outcome.out and "…" in outcome.out and "قورمه‌سبزی" in outcome.out


def test_search_says_nothing_but_its_object_on_stdout(leaves, vlkit):
    outcome = vlkit("search", "--index", leaves / "index", "leaf", "--json")
    assert set(outcome.json()) == {"index", "model", "queries"} and outcome.err == ""


@pytest.mark.slow
def test_the_persian_domain_from_a_raw_folder_to_answers(tmp_path, vlkit, monkeypatch):
    """A dish's name finds its passages, and pictures of it that were never seen, far beyond chance."""
    monkeypatch.chdir(tmp_path)
    assert vlkit("sample", "persian-food", "raw").code == 0
    assert vlkit("prep", "--domain", "persian-food", "--source", "raw", "--out", "data/persian-food").code == 0
    tiny = ("--model", "tiny-siglip", "--text-model", "tiny-xlmr")
    assert vlkit("train-retrieval", *tiny, "--steps", 400, "--name", "dishes").code == 0
    assert vlkit("index", "--run", "runs/dishes").code == 0
    assert vlkit("index", "--run", "runs/dishes", "--untouched").code == 0
    frame = pd.read_parquet("data/persian-food/pairs.parquet")
    assert frame["text"].str.contains("\u200c").any()
    names = sorted(set(frame[frame["split"] == "test"]["title"]))
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")

    def share(index, kind, *flags):
        """How many names have their own dish among the first five."""
        outcome = vlkit("search", "--index", index, "--queries", "names.txt", "-k", 5, "--of", kind, "--json", *flags)
        output = [[hit["metadata"]["title"] for hit in query[kind]] for query in outcome.json()["queries"]]
        return np.mean([name in titles for name, titles in zip(names, output, strict=True)])

    unseen = ("--filter", "split=test")
    # A passage has its dish's name in it, so this much is had by an untrained encoder, too.
    assert share("indexes/dishes", "texts") >= 0.8
    # Of 16 names five pictures of 46: by chance one in four.
    observed, before = (share(f"indexes/{name}", "images", *unseen) for name in ("dishes", "dishes-untouched"))
    assert observed >= 0.55 and observed > before + 0.2, (observed, before)
    # Written with Arabic letters it is the same query.
    name = next(item for item in names if "\u06cc" in item)
    arabic = name.replace("\u06cc", "\u064a").replace("\u06a9", "\u0643")
    both = vlkit("search", "--index", "indexes/dishes", name, arabic, "--json").json()["queries"]
    one, other = ([(hit["id"], round(hit["score"], 4)) for hit in item["texts"]] for item in both)
    assert arabic != name and one == other
