"""The tour, a few steps of it."""

import json


def test_the_tour(tmp_path, vlkit):
    outcome = vlkit("quickstart", "--out", tmp_path / "tour", "--steps", 3)
    assert outcome.code == 0, outcome.err
    assert "untouched" in outcome.out
    assert "tuned" in outcome.out
    assert "recall@1" in outcome.out
    assert str(tmp_path / "tour/runs/first") in outcome.err
    results = json.loads((tmp_path / "tour/runs/first/results.json").read_text())
    assert results["baseline"]["text_to_image"]["queries"] >= 400
    # An index of all of it, and a search, with hits of either kind.
    assert "recall@10" in outcome.out and "“a chocolate flan" in outcome.out
    assert outcome.out.rstrip().count(".jpg") >= 3
    assert (tmp_path / "tour/indexes/first/index.yaml").is_file()
    # And a captioner, which has described pictures of the test.
    assert "shuffled picture" in outcome.err and (tmp_path / "tour/runs/captions/fusion").is_dir()
    assert outcome.out.rstrip().splitlines()[-1].split()[0].endswith(".jpg")
    again = vlkit("quickstart", "--out", tmp_path / "tour")
    assert (again.code, "not empty" in again.err) == (2, True)
