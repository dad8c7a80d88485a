"""Captions are scored as COCO scores them: against formulas, brute force, and what pycocoevalcap gave once."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.evaluation.captioning.metrics import CaptionScores, longest_common_subsequence, rouge_l
from vlkit.evaluation.captioning.ptb_tokens import DROPPED, coco_tokens

GOLDEN = json.loads((ROOT / "tests/data/caption-scores.json").read_text(encoding="utf-8"))
WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=12)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_the_longest_common_subsequence_is_that_of_the_table(one, other):
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for row, left in enumerate(one, start=1):
        for column, right in enumerate(other, start=1):
            above = max(table[row - 1, column], table[row, column - 1])
            table[row, column] = table[row - 1, column - 1] + 1 if left == right else above
    assert longest_common_subsequence(one, other) == table[-1, -1]


def grams(tokens, order):
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def bleu_by_hand(candidates, references):
    """Corpus BLEU in plain sums, as its paper says it."""
    actual = []
    ours = sum(map(len, candidates))
    theirs = sum(
        min(((abs(len(r) - len(c)), len(r)) for r in reference_list), default=(0, 0))[1]
        for c, reference_list in zip(candidates, references, strict=True)
    )
    product = 1.0
    for order in range(1, 5):
        right = whole = 0
        for candidate, reference_list in zip(candidates, references, strict=True):
            own = grams(candidate, order)
            whole += sum(own.values())
            right += sum(min(count, max(grams(r, order)[gram] for r in reference_list)) for gram, count in own.items())
        product *= (right + 1e-15) / (whole + 1e-9)
        ratio = (ours + 1e-15) / (theirs + 1e-9)
        actual.append(product ** (1 / order) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1))
    return actual


def cider_by_hand(candidates, references):
    """CIDEr-D with vectors over all n-grams of the set."""
    images, scores = len(candidates), []
    for candidate, reference_list in zip(candidates, references, strict=True):
        total = 0.0
        for order in range(1, 5):
            every = sorted(
                set().union(*(grams(r, order) for item in references for r in item), grams(candidate, order))
            )
            df = [sum(any(grams(r, order)[g] for r in item) for item in references) for g in every]
            idf = np.log(images) - np.log(np.maximum(1, df))
            own = np.array([grams(candidate, order)[g] for g in every]) * idf
            for reference in reference_list:
                other = np.array([grams(reference, order)[g] for g in every]) * idf
                size = np.linalg.norm(own) * np.linalg.norm(other)
                off = sum(grams(candidate, 2).values()) - sum(grams(reference, 2).values())
                if size:
                    total += np.minimum(own, other) @ other / size * math.exp(-(off**2) / 72) / len(reference_list)
        scores.append(10 * total / 4)
    return scores


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS.filter(bool), min_size=1, max_size=4)), min_size=1, max_size=6))
def test_scores_are_those_of_the_formulas(drawn):
    candidates, references = [one for one, _ in drawn], [reference_list for _, reference_list in drawn]
    scores = CaptionScores.from_tokens(candidates, references)
    assert scores.bleu() == pytest.approx(bleu_by_hand(candidates, references), rel=1e-9, abs=1e-12)
    assert scores.cider == pytest.approx(cider_by_hand(candidates, references), rel=1e-9, abs=1e-12)


def test_draws_of_images_are_sets_in_which_they_repeat():
    rng = np.random.default_rng(0)
    created = [rng.choice(list("abcdef"), rng.integers(1, 9)).tolist() for _ in range(30)]
    scores = CaptionScores.from_tokens(created[:10], [[created[10 + i], created[20 + i]] for i in range(10)])
    weights = rng.integers(0, 3, (4, 10)).astype(float)
    for row, drawn in zip(scores.bleu(weights), weights.astype(int), strict=True):
        chosen = [image for image, times in enumerate(drawn) for _ in range(times)]
        again = bleu_by_hand([created[i] for i in chosen], [[created[10 + i], created[20 + i]] for i in chosen])
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
    assert [" ".join(item) for item in coco_tokens([caption])] == [tokens]


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_text_has_tokens(captions):
    actual = coco_tokens(captions)
    assert len(actual) == len(captions)
    assert all(token and token == token.strip(" \t\n") and token not in DROPPED for item in actual for token in item)


def test_a_long_caption_takes_no_time():
    """No rule looks at all that is to come from every place anew."""
    assert len(coco_tokens(["_" * 200_000, "a+" * 50_000, "x@" * 50_000])) == 3


def test_tokens_are_those_that_java_gave():
    raw = [text for image in GOLDEN["images"] for text in (image["caption"], *image["references"])]
    expected = [tokens for image in GOLDEN["images"] for tokens in image["tokens"]]
    assert len(expected) == 180
    assert [" ".join(tokens) for tokens in coco_tokens(raw)] == expected


def test_scores_are_those_that_pycocoevalcap_gave():
    images = GOLDEN["images"]
    candidates = coco_tokens([image["caption"] for image in images])
    references = [coco_tokens(image["references"]) for image in images]
    scores, expected = CaptionScores.from_tokens(candidates, references), GOLDEN["metrics"]
    assert len(images) == 30
    assert scores.bleu() == pytest.approx([expected[f"bleu_{n}"] for n in (1, 2, 3, 4)], abs=1e-12)
    assert scores.rouge_l == pytest.approx([image["rouge_l"] for image in images], abs=1e-12)
    assert scores.cider == pytest.approx([image["cider"] for image in images], abs=1e-9)
    assert scores.rouge_l.mean() == pytest.approx(expected["rouge_l"], abs=1e-12)
    assert scores.cider.mean() == pytest.approx(expected["cider"], abs=1e-9)
