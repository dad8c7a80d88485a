"""vlkit as train-retrieval puts it together: its own loading, datasets, loss and loop, a few steps at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, islice, pairwise
from typing import Any

import peers
import photos


def opened(work: peers.Work, pairs: Any = None, **settings: Any) -> tuple[Any, Any, Any]:
    """A model of which is trained what the settings say, the dataset that belongs to it, and all its settings.

    Args:
        pairs: the table that `work` was made of; None: its captions decide what belongs together.
        settings: of TrainRetrievalConfig; without any, everything is trained and nothing kept.
    """
    from vlkit import console
    from vlkit.config.training import TrainRetrievalConfig
    from vlkit.distributed import SINGLE
    from vlkit.models import loading, tuning
    from vlkit.models.device import best_device
    from vlkit.training.setup.rows import RetrievalRows
    from vlkit.training.train_retrieval import build_dataset

    console.silence()
    pairs = photos.pairs_of(work.model.parent, work.files, work.texts) if pairs is None else pairs
    common = {"tune": "full", "loss": "softmax", "cache": "off", "batch_size": len(work.order[0]), "steps": 10**6}
    config = TrainRetrievalConfig(
        data=str(work.model.parent),
        model=str(work.model),
        precision=work.precision,
        seed=work.seed,
        lr=work.lr,
        weight_decay=work.weight_decay,
        **(common | settings),
    )
    model = loading.load_dual_encoder(str(work.model))
    tuning.apply_tuning(model, config, seed=work.seed)
    tuning.train_mode(model)
    model.to(best_device())
    dataset = build_dataset(RetrievalRows(pairs, pairs, pairs.split("val")), model, config, SINGLE)
    return model, dataset, config


def trainer(
    model: Any, dataset: Any, config: Any, order: Sequence[Sequence[int]], workers: int | None = None
) -> peers.Trained:
    """Its loop, over and over through these batches; each is a step, of `config.grad_accum` pieces.

    Args:
        workers: that load data beside it, as it does by itself with pictures that are too many to be kept; None: as
            many as it takes for so few.

    Returns:
        As the peers' do: seconds of each step but the first.
    """
    from vlkit.data.loading.epoch_sampler import batch_stream
    from vlkit.models import tuning
    from vlkit.training.gradient_cache import ContrastiveLoss
    from vlkit.training.loop import steps
    from vlkit.training.optimizer import adamw, new_scaler

    contrast = ContrastiveLoss(model, config.loss, config.micro_batch)
    optimizer = adamw(tuning.trainable(model), lr=config.lr, weight_decay=config.weight_decay)
    scaler = new_scaler(model.device, config.precision)
    batches = cycle(drawn(order, config.grad_accum))

    def trained(count: int) -> list[float]:
        # Loaded by processes of this turn: what others load ahead while it is not theirs would be free.
        some = batch_stream(dataset, list(islice(batches, count * config.grad_accum)), workers=workers)
        how = {"total": count, "accumulate": config.grad_accum, "precision": config.precision, "scaler": scaler}
        ends = [time.perf_counter()]
        for _ in steps(some, contrast, len, optimizer, **how):
            model.clamp_logit_scale()
            ends.append(time.perf_counter())
        return [after - before for before, after in pairwise(ends)][1:]

    return trained


def drawn(order: Iterable[Sequence[int]], pieces: int = 1) -> list[Any]:
    """Batches as a dataset is asked for them, each in so many pieces."""
    from vlkit.data.loading.epoch_sampler import BatchIndices

    def cut(rows: Sequence[int]) -> list[Any]:
        size = len(rows) // pieces
        parts = [list(rows[start : start + size]) for start in range(0, size * pieces, size)]
        return [BatchIndices(0, part, [0] * len(part)) for part in parts]

    return list(chain.from_iterable(map(cut, order)))
