"""eval --captions: any model's captions against references, as COCO has them, without a model."""

import json

import pytest
from helpers import ROOT

GOLDEN = json.loads((ROOT / "tests/data/caption-scores.json").read_text(encoding="utf-8"))


@pytest.fixture
def files(tmp_path):
    """Captions and references in files as COCO has them."""
    captions = [{"image_id": image["image_id"], "caption": image["caption"]} for image in GOLDEN["images"]]
    references = [
        {"image_id": image["image_id"], "caption": text} for image in GOLDEN["images"] for text in image["references"]
    ]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "references.json").write_text(json.dumps({"annotations": references}))
    return ("eval", "--captions", tmp_path / "captions.json", "--references", tmp_path / "references.json")


def test_the_command_gives_the_golden_scores(files, vlkit, tmp_path):
    command = (*files, "--out", tmp_path / "out")
    outcome = vlkit(*command, "--json", "--fail-under", "captions.cider=1.35")
    assert outcome.code == 0, outcome.err
    results = outcome.json()
    for name, expected in GOLDEN["metrics"].items():
        assert results["metrics"]["captions"][name] == pytest.approx(expected, abs=1e-9)
        low, high = results["intervals"]["captions"][name]
        assert low < expected < high
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    ciders = [example["cider"] for example in results["examples"]["worst"]]
    assert len(ciders) == 15 and ciders == sorted(ciders) and ciders[0] < results["examples"]["best"][0]["cider"]
    missed = vlkit(*command, "--fail-under", "captions.bleu_4=0.9")
    assert missed.code == 8 and "captions.bleu_4 is 0.3305" in missed.err


def write(folder, captions, references):
    (folder / "made.json").write_text(json.dumps(captions))
    (folder / "told.json").write_text(json.dumps(references))
    return ("eval", "--captions", folder / "made.json", "--references", folder / "told.json")


def test_a_caption_that_is_a_reference_is_exact_and_empty_ones_are_told(tmp_path, vlkit):
    references = [
        {"image_id": n, "caption": text} for n in range(4) for text in (f"a dog number {n} runs", "Some dog.")
    ]
    captions = [
        {"image_id": n, "caption": text} for n, text in enumerate(["A dog number 0 runs.", "some dog", "", "a cat"])
    ]
    outcome = vlkit(*write(tmp_path, captions, references), "--json")
    assert outcome.code == 0 and "1 of 4 captions have no words" in outcome.err
    metrics = outcome.json()["metrics"]["captions"]
    assert outcome.json()["intervals"]["captions"].keys() == metrics.keys() - {"images"}
    assert metrics["exact"] == 0.5 and metrics["images"] == 4 and 0 < metrics["rouge_l"] < 1
    fewer = vlkit(*write(tmp_path, captions[:2], references))
    assert "2 of 4 images" in fewer.err and "BLEU-4" in fewer.out and "CIDEr" in fewer.out


@pytest.mark.parametrize(
    "captions, references, what",
    [
        ([{"image_id": 1, "caption": "x"}] * 2, [{"image_id": 1, "caption": "x"}], "has several captions"),
        ([{"image_id": 2, "caption": "x"}], [{"image_id": 1, "caption": "x"}], "has no reference"),
        ([{"image": 2, "caption": "x"}], [{"image_id": 2, "caption": "x"}], "entry 1 has no image_id"),
        ([{"image_id": 2, "caption": 5}], [{"image_id": 2, "caption": "x"}], "entry 1 has no image_id or no caption"),
        ({"x": 1}, [], "holds no captions"),
        ([], [{"image_id": 1, "caption": "x"}], "holds no captions"),
    ],
)
def test_files_that_are_none(captions, references, what, tmp_path, vlkit):
    outcome = vlkit(*write(tmp_path, captions, references))
    assert outcome.code == 3 and what in outcome.err, outcome.err


def test_files_as_they_come(tmp_path, vlkit):
    """JSON lines, a byte order mark, ids padded with zeros or written as floats, half an emoji."""
    lines = [
        '{"image_id": "000000000007", "caption": "a \\ud83d dog"}',
        '{"image_id": 8.0, "caption": "a cat", "score": 1}',
    ]
    (tmp_path / "made.jsonl").write_text("\ufeff" + "\n".join(lines))
    (tmp_path / "told.json").write_text(json.dumps([{"image_id": n, "caption": "a dog"} for n in (7, 8)]))
    flags = ("eval", "--captions", tmp_path / "made.jsonl", "--references", tmp_path / "told.json")
    assert vlkit(*flags, "--json").json()["metrics"]["captions"]["images"] == 2
    (tmp_path / "told.json").write_text("[" * 100_000)
    for odd in (tmp_path / "told.json", tmp_path):
        outcome = vlkit(*flags[:-1], odd)
        assert outcome.code == 3, outcome.err


def test_one_image_is_told_and_a_run_keeps_its_results(tmp_path, trained, vlkit):
    flags = write(tmp_path, [{"image_id": 1, "caption": "a dog"}], [{"image_id": 1, "caption": "a dog"}])
    outcome = vlkit(*flags, "--out", tmp_path / "out")
    assert outcome.code == 0 and "CIDEr of one image is always 0" in outcome.err
    assert vlkit(*flags, "--out", trained).code == 2
    report = vlkit("report", "--run", tmp_path / "out")
    assert report.code == 0, report.err
    assert "a dog" in (tmp_path / "out/report.html").read_text()
    assert vlkit(*flags, "--out", tmp_path / "two", "--against", tmp_path / "made.json").code == 0
    assert vlkit("report", "--run", tmp_path / "two").code == 0


def test_settings_that_do_not_go_together(tmp_path, vlkit):
    (tmp_path / "x.json").write_text("nonsense")
    one = ("eval", "--captions", tmp_path / "x.json")
    assert vlkit(*one).code == 2
    assert vlkit(*one, "--references", tmp_path / "x.json").code == 3
    for more in (("--run", "r"), ("--limit", 3), ("--shift", "blur"), ("--fail-under", "text_to_image.recall@1=0.5")):
        refused = vlkit(*one, "--references", tmp_path / "none.json", *more)
        assert refused.code == 2 and more[0] in refused.err
    # A run that is not there: what it measures is not known either.
    assert vlkit("eval", "--run", "r", "--fail-under", "captions.cider=0.5").code == 6
    assert vlkit("eval", "--model", "m", "--data", "d", "--out", "o", "--fail-under", "captions.cider=0.5").code == 2
