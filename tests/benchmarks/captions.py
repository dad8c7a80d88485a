"""Scores of captions beside pycocoevalcap: seconds for tokens, BLEU, ROUGE_L and CIDEr, and the same numbers.

python tests/benchmarks/captions.py [--json] [--images 5000] [--runs 3]

Five distinct references an image, of a vocabulary in which few words are frequent. Both ways take turns in one process.
The peer needs Java and `pip install --no-deps pycocoevalcap==1.2`; without them vlkit's own seconds are shown alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import random
import shutil
import statistics
import time

Found = tuple[dict[str, float], list[float]]


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
    from vlkit.evaluation.caption_metrics import CaptionScores
    from vlkit.evaluation.caption_tokens import _tokens, coco_tokens

    _tokens.cache_clear()
    began = time.perf_counter()
    candidates = coco_tokens(made)
    flat = iter(coco_tokens([text for each in told for text in each]))
    between = time.perf_counter()
    scores = CaptionScores.of(candidates, [[next(flat) for _ in each] for each in told])
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    made, told = captions(options.images)
    ways = {"vlkit": ours}
    if importlib.util.find_spec("pycocoevalcap") and shutil.which("java"):
        ways["pycocoevalcap"] = theirs
    taken: dict[str, list[Found]] = {way: [] for way in ways}
    for _ in range(options.runs):
        for way, run in ways.items():
            taken[way].append(run(made, told))
    rows = {
        way: {part: statistics.median(seconds[part] for seconds, _ in runs) for part in ("tokens", "scores", "all")}
        for way, runs in taken.items()
    }
    for way, row in rows.items():
        row["ratio"] = row["all"] / rows["vlkit"]["all"]
        row["difference"] = max(abs(a - b) for a, b in zip(taken[way][0][1], taken["vlkit"][0][1], strict=True))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    if options.json:
        print(json.dumps({"machine": machine, "images": options.images, "rows": rows}, indent=2))
        return
    print(f"{options.images} captions, five references each; {machine}; median of {options.runs}")
    print(f"{'':14} {'tokens':>8} {'scores':>8} {'all':>8} {'time':>7} {'largest difference':>20}")
    for way, row in rows.items():
        seconds = f"{row['tokens']:6.2f} s {row['scores']:6.2f} s {row['all']:6.2f} s"
        print(f"{way:14} {seconds} {row['ratio']:6.1f}x {row['difference']:20.1e}")


if __name__ == "__main__":
    main()
