"""Tokens and scores beside pycocoevalcap itself, which runs Stanford's tokenizer in Java: `pytest -m java`."""

import json
import random
import shutil

import numpy as np
import pytest
from helpers import SHARED_DATA

from vlkit.evaluation.captioning.metrics import CaptionScores
from vlkit.evaluation.captioning.ptb_tokens import coco_tokens

pytestmark = [
    pytest.mark.java,
    pytest.mark.skipif(shutil.which("java") is None, reason="there is no java"),
]
pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap")

RECIPES = SHARED_DATA / "recipes/recipes.jsonl"
# Whatever a rule speaks of, within captions.
ODD = """
ill. Ill. St. no. No. a.m. U.S. o'clock dogs' she'll can't cannot gonna w/ b/w 7-up 1st 5'10" 3.5 1,000 12:30 #2 etc.
(red) [x] {y} "quoted" 'single' -- - ... !!! ?! 1/2 50% $5 B. Mr. Ave. T.V. half-eaten and/or black,white 1990's '90s
d'or O'Brien
na\u00efve \u201csmart\u201d \u2018it\u2019s\u2019 \u2013 \u2026 \u00bd :) & AT&T R&B rock&roll <b> x@y.com 20's
http://a.com/b?c=1 rock'n'roll 'n' wait.A 22 3/4
"""
PLAIN = "a man in red is holding two white dogs on the street near A big The sign"


def tokenized(captions):
    """By pycocoevalcap: the tokens of each caption."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    references = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(captions)})
    return [references[number][0] for number in range(len(captions))]


def said():
    rng, plain, odd = random.Random(4), PLAIN.split(), ODD.split()
    return [
        " ".join(rng.choice(odd) if rng.random() < 0.25 else rng.choice(plain) for _ in range(rng.randint(1, 14)))
        for _ in range(400)
    ]


def test_tokens_of_odd_captions():
    captions = said()
    actual = [" ".join(item) for item in coco_tokens(captions)]
    wrong = [(c, a, b) for c, a, b in zip(captions, actual, tokenized(captions), strict=True) if a != b]
    # What no caption says may differ: a letter's full stop before a tag.
    assert len(wrong) <= 2, wrong[:5]


@pytest.mark.skipif(not RECIPES.is_file(), reason="shared/data/recipes is not here")
def test_tokens_of_real_sentences():
    rows = [json.loads(line) for line in RECIPES.open(encoding="utf-8")]
    texts = {text for row in rows for value in row.values() for text in str(value).splitlines()}
    captions = sorted(text for text in texts if 3 < len(text) < 200 and "/" not in text.split(" ")[0])
    actual = [" ".join(item) for item in coco_tokens(captions)]
    wrong = [(c, a, b) for c, a, b in zip(captions, actual, tokenized(captions), strict=True) if a != b]
    assert len(captions) > 500 and len(wrong) <= 0.001 * len(captions), (len(wrong), len(captions), wrong[:5])


def test_scores_of_random_captions():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rng = random.Random(5)
    words = ["a", "dog", "cat", "man", "runs", "sits", "on", "the", "red", "blue", "street", "with", "two", "22\xa03/4"]

    def caption():
        return [rng.choice(words) for _ in range(rng.randint(1, 12))]

    candidates, references = [caption() for _ in range(60)], [[caption() for _ in range(5)] for _ in range(60)]
    ours = CaptionScores.from_tokens(candidates, references)
    candidates_of = {number: [" ".join(item)] for number, item in enumerate(candidates)}
    report = {number: [" ".join(text) for text in item] for number, item in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(report, candidates_of, verbose=0)
    rouge, rouges = Rouge().compute_score(report, candidates_of)
    cider, ciders = Cider().compute_score(report, candidates_of)
    assert ours.bleu() == pytest.approx(bleu, abs=1e-12)
    assert ours.rouge_l == pytest.approx(np.asarray(rouges), abs=1e-12) and ours.rouge_l.mean() == pytest.approx(rouge)
    assert ours.cider == pytest.approx(np.asarray(ciders), abs=1e-9) and ours.cider.mean() == pytest.approx(cider)
