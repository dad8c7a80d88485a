"""Measure a dual encoder on some rows, alone or beside the untouched model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from vlkit import console
from vlkit.config.evaluation import EvalRetrievalConfig
from vlkit.data.pairs import Pairs
from vlkit.distributed import World
from vlkit.evaluation.comparison import PerQueryMetrics, compare
from vlkit.evaluation.results import (
    ClassRow,
    CorruptedRecall,
    Corruption,
    Difference,
    Efficiency,
    Group,
    Results,
    Retention,
)
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
from vlkit.metrics import DIRECTIONS, headline_of
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.encode import encode_texts
from vlkit.storage import Location

# Items that a query's row in queries.parquet names: top5.
TOP = 5

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Models(Generic[T]):
    """The measured model's part, and the untouched model's; None without one."""

    tuned: T
    base: T | None

    def items(self) -> list[tuple[str, T]]:
        """Return tuned and base by their names in results.json."""
        return [("tuned", self.tuned), *([] if self.base is None else [("base", self.base)])]

    def to_dict(self) -> dict[str, T]:
        """Return name -> part."""
        return dict(self.items())

    def map(self, function: Callable[[T], U]) -> Models[U]:
        """Return what a function makes of both."""
        return Models(function(self.tuned), None if self.base is None else function(self.base))


@dataclass(frozen=True)
class ModelEmbeddings:
    """Everything that a model encodes for an evaluation.

    Attributes:
        rows: of the task.
        prompts: class prompt -> float32 [width].
        corrupted: corruption -> the same rows under it.
        guard: the guard set's rows; None without a guard set.
        image_size: pixels of a side of what the model sees.
    """

    rows: Embeddings
    prompts: dict[str, torch.Tensor]
    corrupted: dict[str, Embeddings]
    guard: Embeddings | None
    image_size: int


@dataclass(frozen=True)
class RetrievalEvaluation:
    """The rows to measure on, and the settings.

    Attributes:
        pairs: the whole prepared folder.
        task: the rows that are measured on.
    """

    config: EvalRetrievalConfig
    pairs: Pairs
    task: RetrievalTask
    precision: Precision
    world: World

    @cached_property
    def classes(self) -> Classes | None:
        """The classes of the rows; None without classes."""
        return Classes.from_pairs(self.pairs, self.task, self.config.templates)

    @cached_property
    def guard(self) -> RetrievalTask | None:
        """The guard set's rows."""
        return RetrievalTask.from_pairs(read_guard_rows(self.config.guard)) if self.config.guard else None

    def embed_all(self, encoder: DualEncoder, *, cache: str) -> ModelEmbeddings:
        """Encode everything that the settings ask for.

        Args:
            cache: off, auto or a folder; for a model that is evaluated again and again.
        """
        rows = self._embed(encoder, self.task, cache)
        texts = self.classes.texts() if self.classes else []
        prompts: dict[str, torch.Tensor] = {}
        if texts:
            encoded = encode_texts(encoder, texts, batch_size=self.config.batch_size, precision=self.precision)
            prompts = dict(zip(texts, encoded, strict=True))
        corrupted = {
            corruption: self._embed(encoder, self.task, cache, corruption=corruption, texts=rows.texts)
            for corruption in self.config.shift
        }
        guard = self._embed(encoder, self.guard, cache) if self.guard else None
        return ModelEmbeddings(rows, prompts, corrupted, guard, encoder.pixel_spec.size)

    def _embed(
        self,
        encoder: DualEncoder,
        task: RetrievalTask,
        cache: str,
        *,
        corruption: str | None = None,
        texts: torch.Tensor | None = None,
    ) -> Embeddings:
        return embed_cached(
            encoder,
            task,
            batch_size=self.config.batch_size,
            precision=self.precision,
            cache=cache,
            corruption=corruption,
            texts=texts,
            world=self.world,
        )

    def rank_models(self, embeddings: Models[ModelEmbeddings]) -> Models[RetrievalScores]:
        """Rank the rows with both models."""
        return embeddings.map(
            lambda model: rank_task(self.task, model.rows, keep=TOP, all_matches=True, world=self.world)
        )

    def compare_models(
        self,
        embeddings: Models[ModelEmbeddings],
        scores: Models[RetrievalScores],
        *,
        name: str,
        data: dict[str, Any],
        efficiency: Efficiency,
    ) -> Results:
        """Measure both models and compare them.

        Args:
            name, data, efficiency: facts for the results, which are returned with the numbers.
        """
        config, task = self.config, self.task
        groups = self._compare_directions(task, scores)
        class_scores = self._score_classes(embeddings)
        if class_scores is not None:
            groups["classification"] = self._compare_classification(class_scores)
        elif config.templates:
            console.warn("--templates: these rows have no classes to tell apart")
        rows = embeddings.map(lambda model: model.rows)
        size = embeddings.tuned.image_size
        slicings = make_slicings(task, rows.tuned, self.pairs, self.classes, size, config.slice_by)
        fold_size = choose_fold_size(task, config.fold_size)
        return Results(
            task="retrieval",
            model=name,
            data=data,
            groups=groups,
            **self._class_sections(class_scores, scores),
            one_to_one=one_to_one_metrics(task, rows.to_dict(), seed=config.seed, world=self.world),
            folds=fold_metrics(task, rows.to_dict(), fold_size, self.world),
            curves=self._curves(scores),
            slices=compare_slices(slicings, scores.tuned, scores.base, task, draws=config.draws, seed=config.seed),
            shifts={
                corruption: self._compare_corruption(corruption, embeddings, scores) for corruption in config.shift
            },
            retention=self._measure_retention(embeddings),
            efficiency=efficiency,
        )

    def _compare(
        self, tuned: PerQueryMetrics, base: PerQueryMetrics | None, units: np.ndarray, headline: str | None = None
    ) -> Group:
        draws, seed = self.config.draws, self.config.seed
        return compare(tuned, base, units.tolist(), draws=draws, seed=seed, headline=headline)

    def _compare_directions(self, task: RetrievalTask, scores: Models[RetrievalScores]) -> dict[str, Group]:
        """Return the groups of both directions."""
        groups = {}
        for direction in DIRECTIONS:
            ranks = Models(scores.tuned.ranks[direction], None if scores.base is None else scores.base.ranks[direction])
            metrics = ranks.map(per_query_metrics)
            units = task.queries(direction)["unit"].to_numpy()[ranks.tuned.query]
            group = self._compare(metrics.tuned, metrics.base, units, headline_of(direction))
            for values in (group.metrics, *([] if scores.base is None else [group.baseline])):
                values |= {"queries": len(ranks.tuned), "gallery": ranks.tuned.gallery}
            groups[direction] = group
        return groups

    def _score_classes(self, embeddings: Models[ModelEmbeddings]) -> Models[ClassScores] | None:
        """Score every class for every image; None where the rows have no classes."""
        classes = self.classes
        if classes is None:
            return None
        warn_of_single_images(classes)
        tens = TenChoices.draw(self.task, classes, self.config.seed)
        return embeddings.map(lambda model: ClassScores.from_embeddings(classes, model.rows, model.prompts, tens))

    def _compare_classification(self, class_scores: Models[ClassScores]) -> Group:
        metrics = class_scores.map(lambda model: model.per_query_metrics())
        units = self.task.images["unit"].to_numpy()
        group = self._compare(metrics.tuned, metrics.base, units, headline_of("classification"))
        group.metrics.update(class_scores.tuned.counts())
        return group

    def _class_sections(
        self, class_scores: Models[ClassScores] | None, scores: Models[RetrievalScores]
    ) -> dict[str, Any]:
        """Return the table of the classes, the confusion matrix and the prompts."""
        classes = self.classes
        if classes is None or class_scores is None:
            return {}
        table: dict[str, ClassRow] = class_table(classes, class_scores.to_dict(), scores.to_dict())
        confusion = {name: model.confusion().round(4).tolist() for name, model in class_scores.items()}
        return {
            "classes": table,
            "confusion": {"classes": classes.names, **confusion},
            "prompts": dict(zip(classes.names, classes.prompts, strict=True)),
        }

    def _curves(self, scores: Models[RetrievalScores]) -> dict[str, dict[str, dict[str, Any]]]:
        """Return what the report draws of the ranks."""
        return {
            direction: {
                name: {
                    **per_query.recall_curve(model, direction),
                    "ranks": per_query.rank_histogram(model, direction),
                }
                for name, model in scores.items()
            }
            for direction in DIRECTIONS
        }

    def _compare_corruption(
        self, corruption: str, embeddings: Models[ModelEmbeddings], scores: Models[RetrievalScores]
    ) -> Corruption:
        """Return recall under a corruption, what it costs each model, and the difference that remains."""
        corrupted = embeddings.map(lambda model: rank_task(self.task, model.corrupted[corruption], world=self.world))
        text_to_image, image_to_text = (
            self._compare_corrupted(direction, corrupted, scores) for direction in DIRECTIONS
        )
        return Corruption(CORRUPTIONS[corruption], text_to_image, image_to_text)

    def _compare_corrupted(
        self, direction: str, corrupted: Models[RetrievalScores], plain: Models[RetrievalScores]
    ) -> CorruptedRecall:
        recall = headline_of(direction)
        units = self.task.queries(direction)["unit"].to_numpy()[plain.tuned.ranks[direction].query]

        def cost(under: RetrievalScores, before: RetrievalScores) -> tuple[float, tuple[float, float], Difference]:
            group = self._compare(_headline_only(under, direction), _headline_only(before, direction), units)
            return group.metrics[recall], group.intervals[recall], group.difference[recall]

        tuned = cost(corrupted.tuned, plain.tuned)
        if corrupted.base is None or plain.base is None:
            return CorruptedRecall(*tuned)
        base = cost(corrupted.base, plain.base)
        return CorruptedRecall(*tuned, *base, cost(corrupted.tuned, corrupted.base)[2])

    def _measure_retention(self, embeddings: Models[ModelEmbeddings]) -> Retention | None:
        """Return both models' numbers on the guard set, and how much is retained; None without one."""
        guard = self.guard
        if guard is None:
            return None
        scores = embeddings.map(
            lambda model: rank_task(guard, _present(model.guard), all_matches=True, world=self.world)
        )
        groups = self._compare_directions(guard, scores)
        fingerprint = guard.pairs.fingerprint
        if fingerprint == self.pairs.fingerprint:
            console.warn("--guard is the data that is measured on: it does not show what was forgotten")
        retained = None
        if scores.base is not None:
            retained = retained_share(
                {name: group.metrics for name, group in groups.items()},
                {name: group.baseline for name, group in groups.items()},
            )
        path = Location(str(self.config.guard)).absolute
        return Retention({"path": str(path), "fingerprint": fingerprint}, retained, groups)


def _present(value: T | None) -> T:
    assert value is not None
    return value


def _headline_only(scores: RetrievalScores, direction: str) -> PerQueryMetrics:
    """Return the headline metric alone."""
    headline = headline_of(direction)
    return PerQueryMetrics({headline: per_query_metrics(scores.ranks[direction]).means[headline]})
