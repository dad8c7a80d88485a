"""Scores of captions beside pycocoevalcap: seconds for tokens, BLEU, ROUGE_L and CIDEr, and the same numbers.

python tests/benchmarks/captions.py [--json] [--images 5000] [--runs 3]

Five distinct references an image, of a vocabulary in which few words are frequent. Both ways take turns in one process.
The peer needs Java and `pip install --no-deps pycocoevalcap==1.2`; without them vlkit's own seconds are shown alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import shutil
import sys
import time
from typing import Any

import measuring

OURS, PEER = "vlkit", "pycocoevalcap"
IMAGES = 5000
PARTS = ("tokens", "scores", "all")
WANTED, EQUAL = 1.5, 1e-6

Found = tuple[measuring.Numbers, list[float]]


def captions(images: int) -> tuple[list[str], list[list[str]]]:
    """A caption and five references for each image: 8 to 13 words, a few of them frequent."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(5000)]
    weights = [1 / (number + 1) for number in range(len(words))]

    def one() -> str:
        return " ".join(rng.choices(words, weights, k=rng.randint(8, 13))) + "."

    return [one() for _ in range(images)], [[one() for _ in range(5)] for _ in range(images)]


def ours(made: list[str], told: list[list[str]]) -> Found:
    """Seconds and scores of vlkit, the three scorers together."""
    from vlkit.evaluation.captioning.metrics import CaptionScores
    from vlkit.evaluation.captioning.ptb_tokens import _tokens, coco_tokens

    _tokens.cache_clear()
    began = time.perf_counter()
    candidates = coco_tokens(made)
    flat = iter(coco_tokens([text for each in told for text in each]))
    between = time.perf_counter()
    scores = CaptionScores.from_tokens(candidates, [[next(flat) for _ in each] for each in told])
    values = [*scores.bleu(), scores.rouge_l.mean(), scores.cider.mean()]
    done = time.perf_counter()
    return {"tokens": between - began, "scores": done - between, "all": done - began}, [float(v) for v in values]


def theirs(made: list[str], told: list[list[str]]) -> Found:
    """The same of pycocoevalcap."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        tokenizer = PTBTokenizer()
        references = tokenizer.tokenize({n: [{"caption": text} for text in each] for n, each in enumerate(told)})
        candidates = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(made)})
        between = time.perf_counter()
        bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
        rouge, _ = Rouge().compute_score(references, candidates)
        cider, _ = Cider().compute_score(references, candidates)
        done = time.perf_counter()
    seconds = {"tokens": between - began, "scores": done - between, "all": done - began}
    return seconds, [*map(float, bleu), float(rouge), float(cider)]


def measured(images: int, runs: int, *, peers: bool = True) -> dict[str, dict[str, Any]]:
    """Way -> seconds of each part, how many times vlkit's all of it takes, and how far its scores are from vlkit's."""
    made, told = captions(images)
    ways = {OURS: ours}
    lacking = ["pycocoevalcap"] * (importlib.util.find_spec("pycocoevalcap") is None)
    lacking += ["java"] * (shutil.which("java") is None)
    if peers and lacking:
        print(f"{PEER} is left out: {', '.join(lacking)} not installed", file=sys.stderr)
    elif peers:
        ways[PEER] = theirs
    taken: dict[str, list[measuring.Numbers]] = {way: [] for way in ways}
    scores: dict[str, list[float]] = {}
    for number in range(runs + 1):
        for way, run in ways.items():
            seconds, scores[way] = run(made, told)
            # The first round warms up.
            taken[way] += [seconds] if number else []
    return {
        way: {
            **{part: measuring.middle(each, part) for part in PARTS},
            "spread": measuring.spread(each, "all"),
            "time_is": measuring.ratio(each, taken[OURS], "all"),
            "difference": max(abs(a - b) for a, b in zip(scores[way], scores[OURS], strict=True)),
        }
        for way, each in taken.items()
    }


def main() -> None:
    """Print the table."""
    parser = measuring.parser(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=IMAGES)
    options = parser.parse_args()
    rows = measured(options.images, options.runs, peers=not options.without_peers)
    if options.json:
        print(json.dumps({"machine": measuring.machine(), "images": options.images, "rows": rows}, indent=2))
        return
    print(measuring.header((PEER,)))
    print(f"{options.images} captions, five references each; seconds, medians of {options.runs}")
    lines = []
    for way, row in rows.items():
        low, high = row["spread"]
        seconds = [f"{row[part]:.2f}" for part in PARTS]
        lines.append([way, *seconds, f"{low:.2f}-{high:.2f}", f"{row['time_is']:.1f} x", f"{row['difference']:.1e}"])
    print(measuring.table(["", *PARTS, "spread", "time", "largest difference"], lines))
    if PEER in rows and options.images == IMAGES:
        apart = rows[PEER]["difference"]
        print(measuring.verdict(f"speed of {PEER}", rows[PEER]["time_is"], WANTED))
        print(f"scores {apart:.1e} apart, wanted at most {EQUAL:g}: {'met' if apart <= EQUAL else 'MISSED'}")


if __name__ == "__main__":
    main()
