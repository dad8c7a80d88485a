"""Everything that eval measures on some rows: one model, or the tuned one beside the untouched one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vlkit import console
from vlkit.config.evaluation import EvalConfig
from vlkit.data.pairs import Pairs
from vlkit.distributed import World
from vlkit.evaluation.comparison import PARTS, PerQueryMetrics, compare, verdict, verdict_label
from vlkit.evaluation.retrieval import per_query
from vlkit.evaluation.retrieval.classification import (
    Classes,
    ClassScores,
    TenChoices,
    class_table,
    warn_of_single_images,
)
from vlkit.evaluation.retrieval.corruptions import CORRUPTIONS
from vlkit.evaluation.retrieval.one_to_one import choose_fold_size, fold_metrics, one_to_one_metrics
from vlkit.evaluation.retrieval.ranking import per_query_metrics
from vlkit.evaluation.retrieval.retention import read_guard_rows, retained_share
from vlkit.evaluation.retrieval.slices import compare_slices, make_slicings
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalScores, RetrievalTask, embed_cached, rank_task
from vlkit.metrics import DIRECTIONS
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.encode import encode_texts
from vlkit.storage import Location

HITS = "recall@1"
# Items that are shown of what a query ranks first: top5 in queries.parquet.
SHOWN = 5


@dataclass(frozen=True)
class ModelEmbeddings:
    """All that a model makes of the rows.

    Attributes:
        prompts: class prompt -> float32 [width].
        shifted: corruption -> the same rows under it.
        guard: the guard set's rows, where there is one.
        size: pixels of a side of what it sees.
    """

    own: Embeddings
    prompts: dict[str, torch.Tensor]
    shifted: dict[str, Embeddings]
    guard: Embeddings | None
    size: int


@dataclass
class RetrievalEvaluation:
    """What is asked, and how.

    Attributes:
        pairs: the whole prepared folder.
        task: the rows that are measured on.
        tuned, base: how the models did, once `compared` has been called; base None: there is no other model.
    """

    config: EvalConfig
    pairs: Pairs
    task: RetrievalTask
    precision: Precision
    world: World
    tuned: RetrievalScores = field(init=False)
    base: RetrievalScores | None = field(init=False, default=None)

    @cached_property
    def classes(self) -> Classes | None:
        """The classes of the rows, where they have any."""
        return Classes.from_pairs(self.pairs, self.task, self.config.templates)

    @cached_property
    def guard(self) -> RetrievalTask | None:
        """The guard set's rows."""
        return RetrievalTask.from_pairs(read_guard_rows(self.config.guard)) if self.config.guard else None

    def seen(self, encoder: DualEncoder, *, cache: str) -> ModelEmbeddings:
        """Embed all that is asked for with one model.

        Args:
            cache: whether, and where, embeddings are kept: for a model that is evaluated again and again.
        """
        how: dict[str, Any] = {"batch_size": self.config.batch_size, "precision": self.precision}
        kept = {**how, "cache": cache, "world": self.world}
        own = embed_cached(encoder, self.task, **kept)
        named = self.classes.texts() if self.classes else []
        prompts = dict(zip(named, encode_texts(encoder, named, **how), strict=True)) if named else {}
        shifted = {
            shift: embed_cached(encoder, self.task, corruption=shift, texts=own.texts, **kept)
            for shift in self.config.shift
        }
        guard = embed_cached(encoder, self.guard, **kept) if self.guard else None
        return ModelEmbeddings(own, prompts, shifted, guard, encoder.pixel_spec.size)

    def compared(self, tuned: ModelEmbeddings, base: ModelEmbeddings | None) -> dict[str, Any]:
        """The sections of results.json that say how the models did."""
        config, task = self.config, self.task
        self.tuned = rank_task(task, tuned.own, keep=SHOWN, all_matches=True, world=self.world)
        self.base = rank_task(task, base.own, keep=SHOWN, all_matches=True, world=self.world) if base else None
        found = self._both_ways(task, self.tuned, self.base)
        if self.classes is not None:
            self._classification(found, tuned, base)
        elif config.templates:
            console.warn("--templates: these rows have no classes to tell apart")
        models = {"tuned": tuned.own} | ({"base": base.own} if base else {})
        cuts = make_slicings(task, tuned.own, self.pairs, self.classes, tuned.size, config.slice_by)
        return {
            **found,
            "one_to_one": one_to_one_metrics(task, models, config, self.world),
            "folds": fold_metrics(task, models, choose_fold_size(task, config.fold_size), self.world),
            "curves": self._curves(),
            "slices": compare_slices(cuts, self.tuned, self.base, task, draws=config.draws, seed=config.seed),
            "shifts": {shift: self._shift(shift, tuned, base) for shift in config.shift},
            "retention": self._retention(tuned, base),
        }

    def _both_ways(self, task: RetrievalTask, tuned: RetrievalScores, base: RetrievalScores | None) -> dict[str, Any]:
        """metrics to verdict of both directions."""
        found: dict[str, Any] = {part: {} for part in (*PARTS, "judged", "verdict")}
        for direction in DIRECTIONS:
            ranks = tuned.ranks[direction]
            units = task.queries(direction)["unit"].to_numpy()[ranks.query]
            before = per_query_metrics(base.ranks[direction]) if base else None
            self._compare(found, direction, per_query_metrics(ranks), before, units, HITS)
            for part in ("metrics", "baseline") if before else ("metrics",):
                found[part][direction] |= {"queries": len(ranks), "gallery": ranks.gallery}
        return found

    def _compare(
        self,
        found: dict[str, Any],
        group: str,
        tuned: PerQueryMetrics,
        base: PerQueryMetrics | None,
        units: np.ndarray,
        metric: str,
    ) -> None:
        """Add a group's numbers to `found`, and a verdict on one metric."""
        compared = compare(tuned, base, units.tolist(), draws=self.config.draws, seed=self.config.seed)
        for part in PARTS:
            if part in ("metrics", "intervals", "units") or base is not None:
                found[part][group] = compared[part]
        if base is not None:
            smallest, between = compared["smallest_difference"][metric], compared["difference"][metric]
            found["verdict"][group] = verdict(between, compared["units"][metric], smallest, metric)
            found["judged"][group] = verdict_label(between)

    def _classification(self, found: dict[str, Any], tuned: ModelEmbeddings, base: ModelEmbeddings | None) -> None:
        """Add the group classification, the table of the classes and the confusion matrix."""
        classes = self.classes
        assert classes is not None
        warn_of_single_images(classes)
        tens = TenChoices.draw(self.task, classes, self.config.seed)
        models = {"tuned": ClassScores.from_embeddings(classes, tuned.own, tuned.prompts, tens)}
        if base is not None:
            models["base"] = ClassScores.from_embeddings(classes, base.own, base.prompts, tens)
        before = models["base"].measured() if "base" in models else None
        units = self.task.images["unit"].to_numpy()
        self._compare(found, "classification", models["tuned"].measured(), before, units, "accuracy")
        found["metrics"]["classification"] |= {
            "pictures": int(classes.of.any(axis=1).sum()),
            "classes": len(classes.names),
            "pictures_of_one_class": int(models["tuned"].single.sum()),
            "choices_of_10": int((tens.texts >= 0).sum(axis=1).max()),
        }
        ranks = {"tuned": self.tuned} | ({"base": self.base} if self.base else {})
        found["classes"] = class_table(classes, models, ranks)
        found["confusion"] = {
            "classes": classes.names,
            **{who: model.confusion().round(4).tolist() for who, model in models.items()},
        }
        found["prompts"] = dict(zip(classes.names, classes.prompts, strict=True))

    def _curves(self) -> dict[str, Any]:
        """What the report draws of the ranks."""
        models = {"tuned": self.tuned} | ({"base": self.base} if self.base else {})
        return {
            direction: {
                who: {**per_query.recall_curve(scores, direction), "ranks": per_query.rank_histogram(scores, direction)}
                for who, scores in models.items()
            }
            for direction in DIRECTIONS
        }

    def _shift(self, shift: str, tuned: ModelEmbeddings, base: ModelEmbeddings | None) -> dict[str, Any]:
        """recall@1 under a corruption, what it costs each model, and what is left between them."""
        under = {"tuned": rank_task(self.task, tuned.shifted[shift], world=self.world)}
        plain = {"tuned": self.tuned}
        if base is not None and self.base is not None:
            under["base"], plain["base"] = rank_task(self.task, base.shifted[shift], world=self.world), self.base
        found: dict[str, Any] = {"stated": CORRUPTIONS[shift]}
        for direction in DIRECTIONS:
            units = self.task.queries(direction)["unit"].to_numpy()[self.tuned.ranks[direction].query]
            how: dict[str, Any] = {"draws": self.config.draws, "seed": self.config.seed}
            cell: dict[str, Any] = {}
            for who, names in (
                ("tuned", (HITS, "interval", "change")),
                ("base", ("baseline", "baseline_interval", "baseline_change")),
            ):
                if who in under:
                    cost = compare(_hits(under[who], direction), _hits(plain[who], direction), units.tolist(), **how)
                    parts = (cost[part][HITS] for part in ("metrics", "intervals", "difference"))
                    cell |= dict(zip(names, parts, strict=True))
            if "base" in under:
                both = compare(_hits(under["tuned"], direction), _hits(under["base"], direction), units.tolist(), **how)
                cell["difference"] = both["difference"][HITS]
            found[direction] = cell
        return found

    def _retention(self, tuned: ModelEmbeddings, base: ModelEmbeddings | None) -> dict[str, Any]:
        """The guard set's numbers for both models, and how much is left."""
        if self.guard is None or tuned.guard is None:
            return {}
        scores = rank_task(self.guard, tuned.guard, all_matches=True, world=self.world)
        before = rank_task(self.guard, base.guard, all_matches=True, world=self.world) if base and base.guard else None
        found = self._both_ways(self.guard, scores, before)
        kept = retained_share(found["metrics"], found["baseline"]) if before else None
        place, fingerprint = Location(str(self.config.guard)).absolute, self.guard.pairs.fingerprint
        if fingerprint == self.pairs.fingerprint:
            console.warn("--guard is the data that is measured on anyway: it says nothing of what was forgotten")
        return {"data": {"path": str(place), "fingerprint": fingerprint}, "retained": kept, **found}


def _hits(scores: RetrievalScores, direction: str) -> PerQueryMetrics:
    return PerQueryMetrics({HITS: per_query_metrics(scores.ranks[direction]).means[HITS]})
