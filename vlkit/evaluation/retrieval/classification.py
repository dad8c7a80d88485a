"""Zero-shot classification of a labelled domain by class names: prompts, accuracy, F1, the confusion matrix.

A class is the mean of its prompts' embeddings; an image gets the class that scores highest. Where several classes
share the highest score, each gets its share of the image: a model that scores everything the same is at chance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from vlkit import console
from vlkit.data import captions
from vlkit.data.labels import as_set
from vlkit.data.pairs import Pairs, index_of_ids
from vlkit.data.splits import seeded_rng
from vlkit.errors import UsageError
from vlkit.evaluation.comparison import PerQueryMetrics
from vlkit.evaluation.results import ClassRow
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalScores, RetrievalTask
from vlkit.metrics import HEADLINES

DEFAULT_TEMPLATES = ("a photo of {class_name}",)
# Fields of a template that stand for the class.
CLASS_FIELDS = ("class_name", "condition")
OTHERS = 9
ROWS_PER_BLOCK = 256
# Scores that are compared at a time.
SCORES_PER_BLOCK = 2**22


@dataclass(frozen=True)
class Classes:
    """The classes of the rows.

    Attributes:
        names: all classes of the data, sorted.
        of_image: bool [images, classes], which of them each image of the task has.
        training: int64 [classes], training images of each, without augmented ones.
        prompts: texts for each class.
    """

    names: list[str]
    of_image: np.ndarray
    training: np.ndarray
    prompts: list[list[str]]

    @classmethod
    def from_pairs(cls, pairs: Pairs, task: RetrievalTask, templates: Sequence[str] = ()) -> Classes | None:
        """Collect the classes of a prepared folder, as its rows name them; None with fewer than two.

        Args:
            pairs: all splits.
            templates: with {class_name}; without any, those of prep's captions.
        """
        names = sorted({str(name) for name in pairs.frame["class_name"].dropna()})
        if len(names) < 2:
            return None
        by_image = classes_by_id(task.pairs.frame, "image", names)
        of_image = np.array([[name in by_image[key] for name in names] for key in task.images["image_id"]])
        if not of_image.any():
            return None
        train = pairs.split("train")
        training = classes_by_id(train.frame[train.frame["origin"] != "augmented"], "image", names).values()
        counts = [sum(name in classes for classes in training) for name in names]
        fields = {*CLASS_FIELDS, *(pairs.metadata.get("settings", {}).get("label_column") or ())}
        chosen = templates or _prep_templates(pairs.metadata, fields)
        prompts = [[_fill(template, name, fields) for template in chosen] for name in names]
        return cls(names, of_image, np.array(counts, np.int64), prompts)

    def embeddings(self, encoded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return float32 [classes, width]: each class as the mean of its prompts, of length 1."""
        means = torch.stack([torch.stack([encoded[text] for text in texts]).mean(0) for texts in self.prompts])
        return torch.nn.functional.normalize(means, dim=1)

    def texts(self) -> list[str]:
        """Return every prompt once."""
        return list(dict.fromkeys(text for texts in self.prompts for text in texts))


def classes_by_id(frame: pd.DataFrame, kind: str, names: Iterable[str]) -> dict[str, set[str]]:
    """Return id -> classes of every image or text (`kind`): those that its rows name, and those among its groups."""
    known, classes = set(names), dict[str, set[str]]()
    columns = (frame[column] for column in (f"{kind}_id", f"{kind}_group", "class_name"))
    for key, group, name in zip(*columns, strict=True):
        own = {str(name)} if isinstance(name, str) else set()
        classes.setdefault(key, set()).update(own | (as_set(group) & known))
    return classes


def _prep_templates(metadata: Mapping[str, Any], fields: Collection[str]) -> Sequence[str]:
    """Return those of prep's templates that need only the class."""
    known = metadata.get("settings", {}).get("templates") or ()
    usable = [template for template in known if set(captions.template_fields(template)) <= set(fields)]
    return usable or DEFAULT_TEMPLATES


def _fill(template: str, name: str, fields: Collection[str]) -> str:
    words = captions.readable_class(name)
    text = captions.fill_template(template, dict.fromkeys(fields, words))
    if not captions.template_fields(template) or not text:
        raise UsageError(f"--templates: {template!r} must have {{class_name}} and no other field")
    return text


@dataclass(frozen=True)
class ClassScores:
    """A model's scores of every class for every image.

    Attributes:
        scores: float32 [images, classes].
        truth: bool [images, classes].
        ten: float64 [images], probability that the right description wins against nine others; NaN: no others.
        choices: descriptions that an image chooses among in top1_of_10, at most 10.
    """

    scores: np.ndarray
    truth: np.ndarray
    ten: np.ndarray
    choices: int = 0

    @classmethod
    def from_embeddings(
        cls, classes: Classes, embeddings: Embeddings, prompts: Mapping[str, torch.Tensor], tens: TenChoices
    ) -> ClassScores:
        """Score images by embeddings: one product for the classes, one for the descriptions."""
        scores = embeddings.images @ classes.embeddings(prompts).T
        return cls(scores.cpu().numpy(), classes.of_image, tens.win_probability(embeddings), tens.choices)

    @property
    def predicted(self) -> np.ndarray:
        """float64 [images, classes]: 1 for the highest score, shares of it where several are equal."""
        highest = self.scores == self.scores.max(axis=1, keepdims=True)
        shares: np.ndarray = highest / highest.sum(axis=1, keepdims=True)
        return shares

    @property
    def single(self) -> np.ndarray:
        """bool [images]: those with exactly one class; precision, recall, F1 and the confusion matrix count them."""
        single: np.ndarray = self.truth.sum(axis=1) == 1
        return single

    def confusion(self) -> np.ndarray:
        """Return float64 [classes, classes]: images of the row's class that were predicted as the column's."""
        matrix: np.ndarray = self.truth[self.single].astype(np.float64).T @ self.predicted[self.single]
        return matrix

    def per_query_metrics(self) -> PerQueryMetrics:
        """Return accuracy, top1_of_10 and macro precision, recall, F1 and average precision.

        Accuracy counts an image as right where the predicted class is any of its own. The macro numbers are means over
        the classes that the images have or were predicted as; undefined ones are 0, as in scikit-learn.
        """
        known: np.ndarray = np.asarray(self.truth.any(axis=1))
        accuracy = np.where(known, (self.predicted * self.truth).sum(axis=1), np.nan)
        per_class: Mapping[str, Any] = {
            f"{name}_macro": partial(_macro_mean, self.predicted, self.truth * self.single[:, None], number)
            for number, name in enumerate(("precision", "recall", "f1"))
        }
        # Two models did the same where they predict the same; for an average precision, where they rank the same.
        compared_by = dict.fromkeys(per_class, self.predicted * self.single[:, None])
        compared_by |= {"average_precision_macro": self.scores.argsort(axis=0).argsort(axis=0)}
        others = {**per_class, "average_precision_macro": partial(_average_precision, self.scores, self.truth)}
        counted: dict[str, np.ndarray] = dict.fromkeys(per_class, self.single) | {"average_precision_macro": known}
        return PerQueryMetrics({"accuracy": accuracy, "top1_of_10": self.ten}, others, compared_by, counted)

    def counts(self) -> dict[str, int]:
        """Return the counts that results.json has beside the metrics."""
        return {
            "pictures": int(self.truth.any(axis=1).sum()),
            "classes": self.truth.shape[1],
            "pictures_of_one_class": int(self.single.sum()),
            "choices_of_10": self.choices,
        }

    def per_class(self) -> dict[str, np.ndarray]:
        """Return precision, recall, f1, average_precision: float64 [classes]; NaN for a class that no image has."""
        weights, truth = np.ones((1, len(self.truth))), self.truth * self.single[:, None]
        parts = _per_class(self.predicted, truth, weights)
        has = truth.any(axis=0)
        names = ("precision", "recall", "f1")
        table = {name: np.where(has, part[0], np.nan) for name, part in zip(names, parts, strict=True)}
        return {**table, "average_precision": _average_precisions(self.scores, self.truth, weights)[0]}


def _per_class(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return precision, recall and F1, float64 [draws, classes]; NaN for a class that a draw neither has nor predicts.

    All three are 0 for a class that is predicted and absent; precision is 0 for one that is never predicted.
    """
    counted = weights * truth.any(axis=1)
    right, positive, actual = counted @ (predicted * truth), counted @ predicted, counted @ truth
    undefined = np.where(positive + actual > 0, 0.0, np.nan)
    return tuple(
        np.divide(factor * right, total, out=undefined.copy(), where=total > 0)
        for factor, total in ((1, positive), (1, actual), (2, positive + actual))
    )


def _macro_mean(predicted: np.ndarray, truth: np.ndarray, number: int, weights: np.ndarray) -> np.ndarray:
    return _mean_of_known(_per_class(predicted, truth, weights)[number])


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Return the mean over the classes that a draw has; NaN if it has none."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1)
    return mean


def _average_precision(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean_of_known(_average_precisions(scores, truth, weights))


def _average_precisions(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return float64 [draws, classes]: precision at each threshold, weighted by the recall it adds, as in scikit-learn.

    NaN for a class that a draw does not have. An image without a class is no negative of any.
    """
    weights = (weights * truth.any(axis=1)).astype(np.float32)
    precisions = np.full((len(weights), scores.shape[1]), np.nan)
    for number in range(scores.shape[1]):
        right = np.flatnonzero(truth[:, number])
        own = weights[:, right]
        summed = np.zeros(len(weights))
        # Each right image's score is a threshold; a product counts the images that reach it, a block at a time.
        block = max(1, SCORES_PER_BLOCK // len(truth))
        for start in range(0, len(right), block):
            chunk = slice(start, start + block)
            reached = (scores[:, number, None] >= scores[right[chunk], number]).astype(np.float32)
            total, hits = weights @ reached, own @ reached[right]
            summed += (own[:, chunk] * hits / np.maximum(total, 1)).sum(axis=1, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            precisions[:, number] = summed / own.sum(axis=1)
    return precisions


@dataclass(frozen=True)
class TenChoices:
    """For every image its own description and those of other classes, drawn by the seed.

    Attributes:
        texts: int64 [images, 1 + others], positions among the task's texts, the right one first; -1: none.
    """

    texts: np.ndarray

    @classmethod
    def draw(cls, task: RetrievalTask, classes: Classes, seed: int) -> TenChoices:
        """Draw a text of each of nine other classes, or of as many as there are; each image has its own draw."""
        image_groups, text_groups = task.groups()
        text_classes = classes_by_id(task.pairs.frame, "text", classes.names)
        by_class: dict[str, list[int]] = {}
        for text, text_id in enumerate(task.texts["text_id"]):
            for name in text_classes[text_id]:
                by_class.setdefault(name, []).append(text)
        own = task.pairs.frame.groupby("image_id")["text_id"].agg(list)
        text_index = index_of_ids(task.texts["text_id"])
        rows = np.full((len(task.images), 1 + min(OTHERS, max(0, len(by_class) - 1))), -1, np.int64)
        for row, image_id in enumerate(task.images["image_id"]):
            draws = seeded_rng(f"{seed}\0ten\0{image_id}")
            chosen = [text_index[own[image_id][int(draws.integers(len(own[image_id])))]]]
            has = {classes.names[number] for number in np.flatnonzero(classes.of_image[row])}
            for name in draws.permutation(sorted(by_class.keys() - has)).tolist():
                text = by_class[name][int(draws.integers(len(by_class[name])))]
                if text_groups[text] & image_groups[row]:
                    # The text fits this image, too: draw one of the class that does not.
                    wrong = [text for text in by_class[name] if not text_groups[text] & image_groups[row]]
                    text = wrong[int(draws.integers(len(wrong)))] if wrong else -1
                if text >= 0:
                    chosen.append(text)
                if len(chosen) == rows.shape[1]:
                    break
            if len(chosen) > 1:
                rows[row, : len(chosen)] = chosen
        return cls(rows)

    @property
    def choices(self) -> int:
        """The most texts that an image chooses among."""
        return int((self.texts >= 0).sum(axis=1).max())

    def win_probability(self, embeddings: Embeddings) -> np.ndarray:
        """Return float64 [images]: the probability that the right text scores highest, ties broken at random."""
        probability = np.full(len(self.texts), np.nan)
        for start in range(0, len(self.texts), ROWS_PER_BLOCK):
            choices = torch.from_numpy(self.texts[start : start + ROWS_PER_BLOCK]).to(embeddings.texts.device)
            scores = embeddings.images[start : start + ROWS_PER_BLOCK] @ embeddings.texts.T
            scores = scores.gather(1, choices.clamp(min=0)).masked_fill(choices < 0, -torch.inf)
            right = scores[:, :1]
            wins = (scores <= right).all(1).double() / (scores == right).sum(1)
            probability[start : start + ROWS_PER_BLOCK] = wins.where(choices[:, 0] >= 0, torch.nan).cpu().numpy()
        return probability


def class_table(
    classes: Classes, models: Mapping[str, ClassScores], scores: Mapping[str, RetrievalScores]
) -> dict[str, ClassRow]:
    """Return class -> its row, without the classes that no image of the test has.

    Its recall@1 is that of its images as queries.

    Args:
        models, scores: tuned and base -> scores.
    """
    recall = HEADLINES["retrieval"]
    columns: dict[str, dict[str, np.ndarray]] = {}
    for model_name, model in models.items():
        ranks = scores[model_name].ranks["image_to_text"]
        hits = np.zeros(len(classes.of_image))
        hits[ranks.query] = ranks.recall(1)
        with np.errstate(invalid="ignore"):
            of_class = hits @ classes.of_image / classes.of_image.sum(axis=0)
        columns[model_name] = {**model.per_class(), recall: of_class}
    table = {}
    for number, name in enumerate(classes.names):
        if count := int(classes.of_image[:, number].sum()):
            tuned, base = (
                {part: None if np.isnan(values[number]) else float(values[number]) for part, values in parts.items()}
                for parts in (columns["tuned"], columns.get("base", {}))
            )
            table[name] = ClassRow(int(classes.training[number]), count, tuned, base or None)
    return table


def warn_of_single_images(classes: Classes) -> None:
    """Warn of the classes that have a single test image."""
    alone = [name[:40] for name, count in zip(classes.names, classes.of_image.sum(axis=0), strict=True) if count == 1]
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        console.warn(f"only one test image of {', '.join(alone[:3])}{more}: the numbers of such a class mean little")
