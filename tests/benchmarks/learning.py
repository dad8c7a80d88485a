"""Learning must not pay for speed: recall of unseen rows after equal steps, beside the same peers, three seeds.

python tests/benchmarks/learning.py [--steps 600] [--seeds 3] [--precision fp32]

A tiny CLIP in a folder, the sample recipes, the same batches in the same order, the same rate: only the trainer is
another. The peers' loss knows position alone (`eye`), and vlkit trains with that, too, and with its own labels. The
scale, 20 at first, is trained by all but sentence-transformers, so that vlkit also keeps it once. What each has trained
is measured by the same code, on recipes that nobody saw. Values are means over the seeds. Intervals resample recipes,
and seeds, too: another seed moves a way by more than other recipes would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import ours
import peers
import photos

DRAWS = 4000
EYE, KEPT, OURS = "vlkit, eye labels", "vlkit, eye labels, scale kept", "vlkit"


def prepared(folder: Path) -> Path:
    """The sample recipes, split by recipe; more of them than usual are kept for the test."""
    from vlkit import console
    from vlkit.config.data import SampleConfig
    from vlkit.config.presets import resolve_prep
    from vlkit.data.prep.prepare import prepare
    from vlkit.data.samples.write import sample

    console.silence()
    sample(SampleConfig(layout="recipes", out=folder / "raw"))
    settings = {"domain": "recipes", "source": str(folder / "raw"), "out": str(folder / "data"), "test_share": 0.5}
    prepare(resolve_prep(settings), dry_run=False)
    return folder / "data"


def work_for(folder: Path, data: Path, seed: int, options: argparse.Namespace) -> tuple[peers.Work, Any]:
    """A seed's initial model and batches, and the table of the training rows."""
    from vlkit.data.loading.epoch_sampler import EpochSampler
    from vlkit.data.pairs import read_pairs

    pairs = read_pairs(data).split("train").positives()
    texts = list(pairs.frame["text"])
    model = folder / f"model-{seed}"
    if not model.is_dir():
        photos.write_model(model, "tiny", sorted(set(texts)), seed)
    order = []
    for drawn in EpochSampler.from_rows(pairs, options.batch, seed):
        # Trainers refuse a last batch of another size.
        order += [drawn.rows] if len(drawn.rows) == options.batch else []
        if len(order) == options.steps:
            break
    files = pairs.image_paths(pairs.frame)
    return peers.Work(model, files, texts, order, options.precision, lr=options.lr, workers=1, seed=seed), pairs


def hits(way: str, folder: Path, data: Path, seed: int, options: argparse.Namespace) -> np.ndarray:
    """Recall@1 of every text of the test, after training."""
    from vlkit.data.pairs import read_pairs
    from vlkit.evaluation.retrieval.task import RetrievalTask, score_task
    from vlkit.models import loading

    work, pairs = work_for(folder, data, seed, options)
    if way in (EYE, KEPT, OURS):
        model, dataset, config = ours.opened(work, pairs, labels="multi-positive" if way == OURS else "eye")
        model.model.logit_scale.requires_grad_(way != KEPT)
        ours.trainer(model, dataset, config, work.order)(len(work.order))
        weights = model.model.state_dict()
    else:
        model, trained = peers.TRAINERS[way](work)
        trained(len(work.order))
        weights = peers.weights_of(way, model, loading.dual_encoder_config(str(work.model)))
    tuned = loading.load_dual_encoder(str(work.model))
    lacking = tuned.model.load_state_dict(weights, strict=False).missing_keys
    if [name for name in lacking if not name.endswith("position_ids")]:
        raise RuntimeError(f"{way}: {lacking} are not among its weights")
    task = RetrievalTask.from_pairs(read_pairs(data).split("test"))
    return score_task(tuned, task, batch_size=64, precision="fp32").values()["text_to_image", "recall@1"]


def measured(options: argparse.Namespace, ways: Sequence[str] = (OURS, EYE, KEPT)) -> dict[str, dict[str, Any]]:
    """Way -> recall, its interval, and the lowest and highest seed.

    Args:
        ways: of vlkit; the peers' come after them.
    """
    from vlkit.data.pairs import read_pairs
    from vlkit.evaluation.retrieval.task import RetrievalTask
    from vlkit.evaluation.statistics import interval, resample

    here, left_out = ([], []) if options.without_peers else peers.installed()
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepared(folder)
        units = RetrievalTask.from_pairs(read_pairs(data).split("test")).queries("text_to_image")["unit"].to_numpy()
        for way in [*ways, *here]:
            # What trainers print must not stand among the figures.
            with contextlib.redirect_stdout(sys.stderr):
                found[way] = np.stack([hits(way, folder, data, seed, options) for seed in range(options.seeds)])
            print(f"{way}: {found[way].mean(1).round(3).tolist()}", file=sys.stderr, flush=True)
    runs = {(way, seed): values for way, by_seed in found.items() for seed, values in enumerate(by_seed)}
    draws = resample(runs, {}, units, draws=DRAWS, seed=0)
    count, generator = len(np.unique(units)), np.random.default_rng(0)
    rows = {}
    for way, by_seed in found.items():
        # In each draw of recipes as many seeds as there are, drawn with replacement.
        drawn = generator.integers(0, len(by_seed), (len(by_seed), DRAWS))
        of_seed = np.stack([draws[way, seed] for seed in range(len(by_seed))])
        between = interval(np.take_along_axis(of_seed, drawn, 0).mean(0), units=count, bounds=(0, 1))
        seeds = by_seed.mean(1)
        rows[way] = {"recall@1": by_seed.mean(), "interval": between, "seeds": (seeds.min(), seeds.max())}
    return rows


def verdicts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Whether vlkit's recall, with the labels that a peer knows, is within the peer's interval or above it."""
    lines = []
    for way in (way for way in (EYE, KEPT) if way in rows):
        value = rows[way]["recall@1"]
        for peer in (peer for peer in rows if peer in peers.TRAINERS):
            low, high = rows[peer]["interval"]
            place = "below" if value < low else "above" if value > high else "within"
            lines.append(f"{way}, {value:.3f}, is {place} the interval of {peer}: {'MISSED' if value < low else 'met'}")
    return lines


def shown(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """The table."""
    head = ["", "recall@1 of unseen", "95 % interval", "seeds"]
    cells = []
    for way, row in rows.items():
        (low, high), (least, most) = row["interval"], row["seeds"]
        cells.append([way, f"{row['recall@1']:.3f}", f"[{low:.3f}, {high:.3f}]", f"{least:.3f}-{most:.3f}"])
    told = f"{options.steps} steps of {options.batch}, rate {options.lr:g}, {options.precision}, {options.seeds} seeds"
    title = f"tiny CLIP, sample recipes, text -> image; {told}"
    return "\n".join([title, measuring.table(head, cells), *verdicts(rows)])


def arguments() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = measuring.parser(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    return parser


def main() -> None:
    """Measure and print."""
    options = arguments().parse_args()
    rows = measured(options)
    if options.json:
        found = {"machine": measuring.machine(), "steps": options.steps, "rows": rows}
        print(json.dumps(found, indent=2, default=float))
        return
    print(measuring.header(("torch", "transformers", "open_clip_torch", "sentence-transformers")))
    print(shown(rows, options))


if __name__ == "__main__":
    main()
