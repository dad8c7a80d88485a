"""Captions are scored as COCO scores them: against formulas, brute force, published numbers, and Java where it is."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from helpers import SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.evaluation.captioning.metrics import CaptionScores, longest_common, rouge_l
from vlkit.evaluation.captioning.ptb_tokens import DROPPED, coco_tokens

GOLDEN = SHARED_DATA / "caption-metrics"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="shared/data/caption-metrics is not here")
WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=12)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_the_longest_common_subsequence_is_that_of_the_table(one, other):
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for row, left in enumerate(one, start=1):
        for column, right in enumerate(other, start=1):
            above = max(table[row - 1, column], table[row, column - 1])
            table[row, column] = table[row - 1, column - 1] + 1 if left == right else above
    assert longest_common(one, other) == table[-1, -1]


def grams(tokens, order):
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def bleu_by_hand(candidates, references):
    """Corpus BLEU in plain sums, as its paper says it."""
    found = []
    ours = sum(map(len, candidates))
    theirs = sum(
        min(((abs(len(r) - len(c)), len(r)) for r in told), default=(0, 0))[1]
        for c, told in zip(candidates, references, strict=True)
    )
    product = 1.0
    for order in range(1, 5):
        right = whole = 0
        for candidate, told in zip(candidates, references, strict=True):
            own = grams(candidate, order)
            whole += sum(own.values())
            right += sum(min(count, max(grams(r, order)[gram] for r in told)) for gram, count in own.items())
        product *= (right + 1e-15) / (whole + 1e-9)
        ratio = (ours + 1e-15) / (theirs + 1e-9)
        found.append(product ** (1 / order) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1))
    return found


def cider_by_hand(candidates, references):
    """CIDEr-D with vectors over all n-grams of the set."""
    images, scores = len(candidates), []
    for candidate, told in zip(candidates, references, strict=True):
        total = 0.0
        for order in range(1, 5):
            every = sorted(
                set().union(*(grams(r, order) for each in references for r in each), grams(candidate, order))
            )
            df = [sum(any(grams(r, order)[g] for r in each) for each in references) for g in every]
            idf = np.log(images) - np.log(np.maximum(1, df))
            own = np.array([grams(candidate, order)[g] for g in every]) * idf
            for reference in told:
                other = np.array([grams(reference, order)[g] for g in every]) * idf
                size = np.linalg.norm(own) * np.linalg.norm(other)
                off = sum(grams(candidate, 2).values()) - sum(grams(reference, 2).values())
                if size:
                    total += np.minimum(own, other) @ other / size * math.exp(-(off**2) / 72) / len(told)
        scores.append(10 * total / 4)
    return scores


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS.filter(bool), min_size=1, max_size=4)), min_size=1, max_size=6))
def test_scores_are_those_of_the_formulas(drawn):
    candidates, references = [one for one, _ in drawn], [told for _, told in drawn]
    scores = CaptionScores.from_tokens(candidates, references)
    assert scores.bleu() == pytest.approx(bleu_by_hand(candidates, references), rel=1e-9, abs=1e-12)
    assert scores.cider == pytest.approx(cider_by_hand(candidates, references), rel=1e-9, abs=1e-12)


def test_draws_of_images_are_sets_in_which_they_repeat():
    rng = np.random.default_rng(0)
    made = [rng.choice(list("abcdef"), rng.integers(1, 9)).tolist() for _ in range(30)]
    scores = CaptionScores.from_tokens(made[:10], [[made[10 + i], made[20 + i]] for i in range(10)])
    weights = rng.integers(0, 3, (4, 10)).astype(float)
    for row, drawn in zip(scores.bleu(weights), weights.astype(int), strict=True):
        chosen = [image for image, times in enumerate(drawn) for _ in range(times)]
        again = bleu_by_hand([made[i] for i in chosen], [[made[10 + i], made[20 + i]] for i in chosen])
        assert row == pytest.approx(again, rel=1e-9)


def test_rouge_takes_the_best_precision_and_the_best_recall_each_on_its_own():
    candidate = ["a", "b", "c", "d"]
    references = [["a", "b"], ["a", "b", "c", "x", "y", "z", "u", "v"]]
    precision, recall = 3 / 4, 1.0
    assert rouge_l(candidate, references) == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    assert rouge_l([], references) == rouge_l(["q"], references) == 0
    assert rouge_l([], [[], ["a"]]) == 1


def test_one_image_has_no_cider():
    """All its n-grams stand in every image."""
    assert CaptionScores.from_tokens([["a", "b"]], [[["a", "b"]]]).cider.tolist() == [0.0]


@pytest.mark.parametrize(
    "caption, tokens",
    [
        ("It's a dog's ball; they don't stop.", "it 's a dog 's ball they do n't stop"),
        ("A T-shirt -- and 1/2 of 22 3/4...", "a t-shirt and 1/2 of 22\u00a03/4"),
        ("(left) [right]", "-lrb- left -rrb- -lsb- right -rsb-"),
        ("Mr. Smith lives at Main St.", "mr. smith lives at main st."),
        ("He feels ill. A man in Ill. too", "he feels ill a man in ill. too"),
        ("$5, 50% off #1", "$ 5 50 % off # 1"),
        ("Hello!!! what?! no!", "hello !!! what ?! no"),
        ("get 'em 'cause US$5 C# &quot;x&quot; &lt;", "get 'em 'cause us$ 5 c# x <"),
        (
            "a\u0301 cafe\u0301 \u0928\u092e\u0938\u094d\u0924\u0947",
            "a\u0301 cafe\u0301 \u0928\u092e\u0938\u094d\u0924\u0947",
        ),
        ("  \t ", ""),
        ("a\nb\u2028c", "a b c"),
        ("\u201csmart\u201d \u2018ones\u2019 \u2013 \u2026", "smart ones"),
    ],
)
def test_tokens(caption, tokens):
    assert [" ".join(each) for each in coco_tokens([caption])] == [tokens]


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_text_has_tokens(captions):
    found = coco_tokens(captions)
    assert len(found) == len(captions)
    assert all(token and token == token.strip(" \t\n") and token not in DROPPED for each in found for token in each)


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@needs_golden
@pytest.mark.parametrize("name", ["golden_ptb_probe.json", "golden_ptb_llava80.json"])
def test_tokens_are_those_of_stanford(name):
    rows = golden(name)
    found = [" ".join(each) for each in coco_tokens([row["raw"] for row in rows])]
    assert found == [row["coco"] for row in rows]


@needs_golden
def test_a_thousand_captions_have_the_published_number_of_tokens():
    rows = golden("captions_val2014_fakecap_results.json")
    tokens = coco_tokens([row["caption"] for row in rows])
    scores = CaptionScores.from_tokens(tokens, [[each] for each in tokens])
    assert scores.guessed.sum(axis=0).tolist() == [9893, 8893, 7893, 6893]


@pytest.fixture
def coco(tmp_path):
    """Files as COCO has them, of the 80 images."""
    rows = [json.loads(line) for line in (GOLDEN / "llava_caps_boxes_coco2014_val_80.jsonl").open(encoding="utf-8")]
    made = [{"image_id": int(row["id"]), "caption": row["captions"][0]} for row in rows]
    told = [{"image_id": int(row["id"]), "caption": text} for row in rows for text in row["captions"][1:]]
    (tmp_path / "made.json").write_text(json.dumps(made))
    (tmp_path / "told.json").write_text(json.dumps({"annotations": told}))
    return tmp_path


@needs_golden
def test_the_command_gives_the_golden_scores(coco, vlkit):
    how = ("eval", "--captions", coco / "made.json", "--references", coco / "told.json", "--out", coco / "out")
    outcome = vlkit(*how, "--json", "--fail-under", "captions.cider=0.95")
    assert outcome.code == 0, outcome.err
    found = outcome.json()
    (wanted,) = golden("golden_scores.json").values()
    names = {f"bleu_{n}": f"Bleu_{n}" for n in range(1, 5)} | {"rouge_l": "ROUGE_L", "cider": "CIDEr"}
    for ours, theirs in names.items():
        assert found["metrics"]["captions"][ours] == pytest.approx(wanted[theirs], abs=1e-9)
        low, high = found["intervals"]["captions"][ours]
        assert low < wanted[theirs] < high
    assert json.loads((coco / "out/results.json").read_text()) == found
    ciders = [each["cider"] for each in found["examples"]["worst"]]
    assert len(ciders) == 20 and ciders == sorted(ciders) and ciders[0] < found["examples"]["best"][0]["cider"]
    missed = vlkit(*how, "--fail-under", "captions.bleu_4=0.9")
    assert missed.code == 8 and "captions.bleu_4 is 0.1655, 0.9 was demanded" in missed.err


def write(folder, made, told):
    (folder / "made.json").write_text(json.dumps(made))
    (folder / "told.json").write_text(json.dumps(told))
    return ("eval", "--captions", folder / "made.json", "--references", folder / "told.json")


def test_a_caption_that_is_a_reference_is_exact_and_empty_ones_are_told(tmp_path, vlkit):
    told = [{"image_id": n, "caption": text} for n in range(4) for text in (f"a dog number {n} runs", "Some dog.")]
    made = [
        {"image_id": n, "caption": text} for n, text in enumerate(["A dog number 0 runs.", "some dog", "", "a cat"])
    ]
    outcome = vlkit(*write(tmp_path, made, told), "--json")
    assert outcome.code == 0 and "1 of 4 captions have no words" in outcome.err
    metrics = outcome.json()["metrics"]["captions"]
    assert outcome.json()["intervals"]["captions"].keys() == metrics.keys() - {"images"}
    assert metrics["exact"] == 0.5 and metrics["images"] == 4 and 0 < metrics["rouge_l"] < 1
    fewer = vlkit(*write(tmp_path, made[:2], told))
    assert "2 of 4 images" in fewer.err and "BLEU-4" in fewer.out and "CIDEr" in fewer.out


@pytest.mark.parametrize(
    "made, told, what",
    [
        ([{"image_id": 1, "caption": "x"}] * 2, [{"image_id": 1, "caption": "x"}], "has several captions"),
        ([{"image_id": 2, "caption": "x"}], [{"image_id": 1, "caption": "x"}], "has no reference"),
        ([{"image": 2, "caption": "x"}], [{"image_id": 2, "caption": "x"}], "entry 1 has no image_id"),
        ([{"image_id": 2, "caption": 5}], [{"image_id": 2, "caption": "x"}], "entry 1 has no image_id or no caption"),
        ({"x": 1}, [], "holds no captions"),
        ([], [{"image_id": 1, "caption": "x"}], "holds no captions"),
    ],
)
def test_files_that_are_none(made, told, what, tmp_path, vlkit):
    outcome = vlkit(*write(tmp_path, made, told))
    assert outcome.code == 3 and what in outcome.err, outcome.err


def test_files_as_they_come(tmp_path, vlkit):
    """JSON lines, a byte order mark, ids padded with zeros or written as floats, half an emoji."""
    lines = [
        '{"image_id": "000000000007", "caption": "a \\ud83d dog"}',
        '{"image_id": 8.0, "caption": "a cat", "score": 1}',
    ]
    (tmp_path / "made.jsonl").write_text("\ufeff" + "\n".join(lines))
    (tmp_path / "told.json").write_text(json.dumps([{"image_id": n, "caption": "a dog"} for n in (7, 8)]))
    how = ("eval", "--captions", tmp_path / "made.jsonl", "--references", tmp_path / "told.json")
    assert vlkit(*how, "--json").json()["metrics"]["captions"]["images"] == 2
    (tmp_path / "told.json").write_text("[" * 100_000)
    for odd in (tmp_path / "told.json", tmp_path):
        outcome = vlkit(*how[:-1], odd)
        assert outcome.code == 3, outcome.err


def test_one_image_is_told_and_a_run_keeps_its_results(tmp_path, trained, vlkit):
    how = write(tmp_path, [{"image_id": 1, "caption": "a dog"}], [{"image_id": 1, "caption": "a dog"}])
    outcome = vlkit(*how, "--out", tmp_path / "out")
    assert outcome.code == 0 and "of one image CIDEr is always 0" in outcome.err
    assert vlkit(*how, "--out", trained).code == 2
    report = vlkit("report", "--run", tmp_path / "out")
    assert report.code == 0, report.err
    assert "a dog" in (tmp_path / "out/report.html").read_text()
    assert vlkit(*how, "--out", tmp_path / "two", "--against", tmp_path / "made.json").code == 0
    assert vlkit("report", "--run", tmp_path / "two").code == 0


def test_a_long_caption_takes_no_time():
    """No rule looks at all that is to come from every place anew."""
    assert len(coco_tokens(["_" * 200_000, "a+" * 50_000, "x@" * 50_000])) == 3


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
