"""Captions beside published figures: COCO's example captions, which lie beside the repository on some machines."""

import json

import pytest
from helpers import SHARED_DATA

from vlkit.evaluation.captioning.metrics import CaptionScores
from vlkit.evaluation.captioning.ptb_tokens import coco_tokens

GOLDEN = SHARED_DATA / "caption-metrics"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="shared/data/caption-metrics is not here")


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["golden_ptb_probe.json", "golden_ptb_llava80.json"])
def test_tokens_are_those_of_stanford(name):
    rows = golden(name)
    actual = [" ".join(item) for item in coco_tokens([row["raw"] for row in rows])]
    assert actual == [row["coco"] for row in rows]


def test_a_thousand_captions_have_the_published_number_of_tokens():
    rows = golden("captions_val2014_fakecap_results.json")
    tokens = coco_tokens([row["caption"] for row in rows])
    scores = CaptionScores.from_tokens(tokens, [[item] for item in tokens])
    assert scores.total.sum(axis=0).tolist() == [9893, 8893, 7893, 6893]


@pytest.fixture
def coco(tmp_path):
    """Files as COCO has them, of the 80 images."""
    rows = [json.loads(line) for line in (GOLDEN / "llava_caps_boxes_coco2014_val_80.jsonl").open(encoding="utf-8")]
    captions = [{"image_id": int(row["id"]), "caption": row["captions"][0]} for row in rows]
    references = [{"image_id": int(row["id"]), "caption": text} for row in rows for text in row["captions"][1:]]
    (tmp_path / "made.json").write_text(json.dumps(captions))
    (tmp_path / "told.json").write_text(json.dumps({"annotations": references}))
    return tmp_path


def test_the_command_gives_the_golden_scores(coco, vlkit):
    flags = ("eval", "--captions", coco / "made.json", "--references", coco / "told.json", "--out", coco / "out")
    outcome = vlkit(*flags, "--json", "--fail-under", "captions.cider=0.95")
    assert outcome.code == 0, outcome.err
    output = outcome.json()
    (expected,) = golden("golden_scores.json").values()
    names = {f"bleu_{n}": f"Bleu_{n}" for n in range(1, 5)} | {"rouge_l": "ROUGE_L", "cider": "CIDEr"}
    for ours, theirs in names.items():
        assert output["metrics"]["captions"][ours] == pytest.approx(expected[theirs], abs=1e-9)
        low, high = output["intervals"]["captions"][ours]
        assert low < expected[theirs] < high
    assert json.loads((coco / "out/results.json").read_text()) == output
    ciders = [item["cider"] for item in output["examples"]["worst"]]
    assert len(ciders) == 20 and ciders == sorted(ciders) and ciders[0] < output["examples"]["best"][0]["cider"]
    missed = vlkit(*flags, "--fail-under", "captions.bleu_4=0.9")
    assert missed.code == 8 and "captions.bleu_4 is 0.1655, 0.9 was demanded" in missed.err
