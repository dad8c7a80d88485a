"""Retrieval evaluation from embeddings, both directions: seconds, memory above rest, and whether the numbers are equal.

python tests/benchmarks/ranking.py [--texts 25000] [--images 5000] [--width 512] [--runs 3] [--without-peers] [--json]

Every way is given the same embeddings and which text is whose, and finds recall@1, 5 and 10 of both directions. vlkit
also finds exact ranks with ties, and in its second row all that `vlkit eval` shows: average precision over every right
item and the first five of each query. CLIP_benchmark's own functions run in its own batches of 64, as its `evaluate`
calls them; dense scores are one product, with topk on it and on its transpose. Memory is the highest that the process
held, above what it held before its first round.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import measuring

OURS, WHOLE, PEER, DENSE = "vlkit", "vlkit, all that eval shows", "CLIP_benchmark", "dense scores, topk"
KS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")
RECALLS = [f"{direction} recall@{k}" for direction in DIRECTIONS for k in KS]
# Of SIZE: at least so many times faster, and with at most so much of the memory.
WANTED = {PEER: (20, 1 / 20), DENSE: (1.8, 1 / 4)}
SIZE = 25000, 5000
BATCH = 64


def prepare(way: str, options: argparse.Namespace) -> Callable[[], measuring.Numbers]:
    """The embeddings, and a way to rank them that has been tried on a few."""
    import torch

    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(options.images, options.width), dim=1)
    # The captions of a picture beside each other, as COCO has them.
    right = torch.arange(options.texts) * options.images // options.texts
    texts = torch.nn.functional.normalize(images[right] + 0.3 * torch.randn(options.texts, options.width), dim=1)
    recalls = {OURS: ours, WHOLE: whole, PEER: clip_benchmark, DENSE: dense}[way]
    few = min(64, options.images, options.texts)
    recalls(texts[:few], images[:few], right[:few])
    rest = measuring.held_gb()

    def work() -> measuring.Numbers:
        measuring.forget_peak()
        began = time.perf_counter()
        found = recalls(texts, images, right)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "gb": measuring.peak_gb() - rest, **dict(zip(RECALLS, found, strict=True))}

    return work


def ours(texts: Any, images: Any, right: Any, **how: Any) -> list[float]:
    """vlkit: exact ranks, as each evaluation while training and each fold has them."""
    from vlkit.evaluation.retrieval.ranking import metric_values, rank_both

    own, groups = [str(image) for image in right.tolist()], [str(image) for image in range(len(images))]
    both = rank_both(texts, images, own, groups, **{"keep": 0, **how})
    values = [metric_values(ranks) for ranks in both]
    return [float(of[f"recall@{k}"].mean()) for of in values for k in KS]


def whole(texts: Any, images: Any, right: Any) -> list[float]:
    """vlkit: average precision and the first five as well."""
    return ours(texts, images, right, keep=5, all_matches=True)


def clip_benchmark(texts: Any, images: Any, right: Any) -> list[float]:
    """What `clip_benchmark.metrics.zeroshot_retrieval.evaluate` does once it has the embeddings."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = texts @ images.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), right] = True
    return [
        (batchify(recall_at_k, asked, pairs, BATCH, "cpu", k=k) > 0).float().mean().item()
        for asked, pairs in ((scores, positive), (scores.T, positive.T))
        for k in KS
    ]


def dense(texts: Any, images: Any, right: Any) -> list[float]:
    """The full score matrix, and the first ten of each of its rows and columns."""
    import torch

    scores = texts @ images.T
    of_texts = scores.topk(10, dim=1).indices == right[:, None]
    of_images = right[scores.T.topk(10, dim=1).indices] == torch.arange(len(images))[:, None]
    return [hits[:, :k].any(dim=1).float().mean().item() for hits in (of_texts, of_images) for k in KS]


def rates(options: argparse.Namespace) -> dict[str, float]:
    """Seconds that the one product of all scores takes at the best rate of torch's and of vlkit's multiplication."""
    import torch

    from vlkit.evaluation.retrieval.score_blocks import matmul_t

    work = 2 * options.texts * options.images * options.width
    rows, columns = torch.randn(1024, options.width), torch.randn(1024, options.width)
    best, until = 0.0, time.perf_counter() + 1
    while time.perf_counter() < until:
        began = time.perf_counter()
        matmul_t(rows, columns)
        best = max(best, 2 * 1024 * 1024 * options.width / (time.perf_counter() - began))
    return {"gflop": work / 1e9, "torch": work / measuring.matmul_rate("fp32"), "vlkit": work / best}


def summary(found: dict[str, list[measuring.Numbers]]) -> dict[str, Any]:
    """Each way's medians, least and greatest seconds, how many times ours they are; how far the recalls lie apart."""
    rows = {}
    for way, runs in found.items():
        rows[way] = {key: measuring.middle(runs, key) for key in ("seconds", "gb", *RECALLS)}
        rows[way] |= {"spread": measuring.spread(runs, "seconds")}
        rows[way] |= {f"{key}_ratio": measuring.ratio(runs, found[OURS], key) for key in ("seconds", "gb")}
    apart = max(abs(row[name] - rows[OURS][name]) for row in rows.values() for name in RECALLS)
    return {"rows": rows, "recalls_apart": apart}


def told(result: dict[str, Any], options: argparse.Namespace) -> str:
    """The table, and what it comes to."""
    head = ("", "seconds", "least-most", "GB above rest", "text>image R@10", "image>text R@10", "time", "memory")
    lines = [
        (
            way,
            f"{row['seconds']:.2f}",
            "{:.2f}-{:.2f}".format(*row["spread"]),
            f"{row['gb']:.3f}",
            *(f"{row[f'{direction} recall@10']:.4f}" for direction in DIRECTIONS),
            f"{row['seconds_ratio']:.1f}x",
            f"{row['gb_ratio']:.1f}x",
        )
        for way, row in result["rows"].items()
    ]
    floor, apart = result["floor"], result["recalls_apart"]
    # Means of as many queries differ by more as soon as one query does.
    same = apart < 0.5 / max(options.texts, options.images)
    numbers = "are the same in every way" if same else f"lie {apart:.1e} apart at most"
    said = [
        f"{options.texts} texts x {options.images} pictures, width {options.width}; median of {options.runs}",
        measuring.table(head, lines),
        f"recall@1, 5 and 10 of both directions {numbers}.",
        f"The product of all scores, {floor['gflop']:.0f} GFLOP, takes {floor['torch']:.2f} s at the best rate of "
        f"torch's matrix products and {floor['vlkit']:.2f} s at that of vlkit's.",
    ]
    for way, (times, part) in WANTED.items():
        if way in result["rows"] and (options.texts, options.images) == SIZE:
            row = result["rows"][way]
            said.append(measuring.verdict(f"time of {way}", row["seconds_ratio"], times))
            said.append(measuring.verdict(f"memory of {way}", row["gb_ratio"], 1 / part))
    return "\n".join(said)


def main() -> None:
    """Print the table."""
    parser = measuring.parser(__doc__, rounds=3)
    parser.add_argument("--texts", type=int, default=SIZE[0])
    parser.add_argument("--images", type=int, default=SIZE[1])
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    if measuring.as_child(prepare, options):
        return
    ways = [OURS, WHOLE, PEER, DENSE]
    if options.without_peers or find_spec("clip_benchmark") is None:
        ways.remove(PEER)
        if not options.without_peers:
            print(f"{PEER} is not installed: measured without it", file=sys.stderr)
    found = measuring.in_turns(__file__, ways, options.runs, sys.argv[1:])
    result = {"machine": measuring.machine(), "options": vars(options), **summary(found), "floor": rates(options)}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(measuring.header(("torch", "clip_benchmark")))
    print(told(result, options))


if __name__ == "__main__":
    main()
