"""The classes of a labelled domain, told from their names alone: prompts, accuracy, F1, the confusion matrix.

A class is the mean of its prompts' embeddings; a picture has the class that scores highest. Where several classes share
the highest score, each has its share of the picture: a model that says the same of everything is at chance.
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
from vlkit.data.pairs import Pairs
from vlkit.data.splits import seeded_rng
from vlkit.errors import UsageError
from vlkit.evaluation.comparison import PerQueryMetrics
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalScores, RetrievalTask

DEFAULT_TEMPLATES = ("a photo of {class_name}",)
# Names under which a template finds the class.
CLASS_FIELDS = ("class_name", "condition")
OTHERS = 9
BLOCK = 256
# Scores that are compared at a time.
THRESHOLDS = 2**22


@dataclass(frozen=True)
class Classes:
    """What there is to be told apart.

    Attributes:
        names: all classes of the data, sorted.
        of: bool [pictures, classes], which of them each picture of the task has.
        training: int64 [classes], training pictures of each, augmented ones not counted.
        prompts: texts for each class.
    """

    names: list[str]
    of: np.ndarray
    training: np.ndarray
    prompts: list[list[str]]

    @classmethod
    def from_pairs(cls, pairs: Pairs, task: RetrievalTask, templates: Sequence[str] = ()) -> Classes | None:
        """The classes of a prepared folder, as its rows name them; None where it has fewer than two.

        Args:
            pairs: all splits.
            templates: with {class_name}; without any, those that prep made captions by.
        """
        names = sorted({str(name) for name in pairs.frame["class_name"].dropna()})
        if len(names) < 2:
            return None
        asked = classes_by_id(task.pairs.frame, "image", names)
        of = np.array([[name in asked[key] for name in names] for key in task.images["image_id"]])
        if not of.any():
            return None
        train = pairs.split("train")
        own = classes_by_id(train.frame[train.frame["origin"] != "augmented"], "image", names).values()
        counts = [sum(name in found for found in own) for name in names]
        fields = {*CLASS_FIELDS, *(pairs.metadata.get("settings", {}).get("label_column") or ())}
        filled = templates or _templates(pairs.metadata, fields)
        prompts = [[_filled(template, name, fields) for template in filled] for name in names]
        return cls(names, of, np.array(counts, np.int64), prompts)

    def embeddings(self, encoded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 [classes, width]: each class as the mean of its prompts, of length 1."""
        means = torch.stack([torch.stack([encoded[text] for text in texts]).mean(0) for texts in self.prompts])
        return torch.nn.functional.normalize(means, dim=1)

    def texts(self) -> list[str]:
        """Every prompt once."""
        return list(dict.fromkeys(text for texts in self.prompts for text in texts))


def classes_by_id(frame: pd.DataFrame, kind: str, names: Iterable[str]) -> dict[str, set[str]]:
    """id -> classes, of every picture (kind image) or text: those that its rows name, and those among its groups."""
    known, found = set(names), dict[str, set[str]]()
    columns = (frame[column] for column in (f"{kind}_id", f"{kind}_group", "class_name"))
    for key, group, name in zip(*columns, strict=True):
        own = {str(name)} if isinstance(name, str) else set()
        found.setdefault(key, set()).update(own | (as_set(group) & known))
    return found


def _templates(described: Mapping[str, Any], fields: Collection[str]) -> Sequence[str]:
    """Those of prep's templates that need nothing but the class."""
    known = described.get("settings", {}).get("templates") or ()
    return [each for each in known if set(captions.template_fields(each)) <= set(fields)] or DEFAULT_TEMPLATES


def _filled(template: str, name: str, fields: Collection[str]) -> str:
    words = captions.readable_class(name)
    text = captions.fill_template(template, dict.fromkeys(fields, words))
    if not captions.template_fields(template) or not text:
        raise UsageError(f"--templates: {template!r} does not name the class, and it alone, as {{class_name}}")
    return text


@dataclass(frozen=True)
class ClassScores:
    """A model's scores of every class for every picture.

    Attributes:
        scores: float32 [pictures, classes].
        truth: bool [pictures, classes].
        ten: float64 [pictures], probability that the right description wins against nine others; NaN: no others.
    """

    scores: np.ndarray
    truth: np.ndarray
    ten: np.ndarray

    @classmethod
    def from_embeddings(
        cls, classes: Classes, embedded: Embeddings, prompts: Mapping[str, torch.Tensor], tens: TenChoices
    ) -> ClassScores:
        """From embeddings: one product for the classes, one for the descriptions."""
        scores = embedded.images @ classes.embeddings(prompts).T
        return cls(scores.cpu().numpy(), classes.of, tens.won(embedded))

    @property
    def predicted(self) -> np.ndarray:
        """float64 [pictures, classes]: 1 for the highest score, shares of it where several are equal."""
        highest = self.scores == self.scores.max(axis=1, keepdims=True)
        return highest / highest.sum(axis=1, keepdims=True)

    @property
    def single(self) -> np.ndarray:
        """bool [pictures]: those with exactly one class; precision, recall, F1 and the confusion matrix count them."""
        return self.truth.sum(axis=1) == 1

    def confusion(self) -> np.ndarray:
        """float64 [classes, classes]: pictures of the row's class that were taken for the column's."""
        return self.truth[self.single].astype(np.float64).T @ self.predicted[self.single]

    def measured(self) -> PerQueryMetrics:
        """accuracy, top1_of_10 and macro precision, recall, F1 and average precision.

        Accuracy counts a picture as right where the class is any of its own. The macro numbers are means over the
        classes that the pictures have or were taken for, what is undefined being 0, as scikit-learn has it.
        """
        known = self.truth.any(axis=1)
        accuracy = np.where(known, (self.predicted * self.truth).sum(axis=1), np.nan)
        precise: Mapping[str, Any] = {
            f"{name}_macro": partial(_macro, self.predicted, self.truth * self.single[:, None], number)
            for number, name in enumerate(("precision", "recall", "f1"))
        }
        # A model that takes a picture for the same did the same there; of an average precision, that ranks it the same.
        told = dict.fromkeys(precise, self.predicted * self.single[:, None])
        told |= {"average_precision_macro": self.scores.argsort(axis=0).argsort(axis=0)}
        others = {**precise, "average_precision_macro": partial(_average_precision, self.scores, self.truth)}
        counted = dict.fromkeys(precise, self.single) | {"average_precision_macro": known}
        return PerQueryMetrics({"accuracy": accuracy, "top1_of_10": self.ten}, others, told, counted)

    def per_class(self) -> dict[str, np.ndarray]:
        """precision, recall, f1, average_precision: float64 [classes]; NaN for a class that no picture has."""
        weights, truth = np.ones((1, len(self.truth))), self.truth * self.single[:, None]
        parts = _per_class(self.predicted, truth, weights)
        has = truth.any(axis=0)
        names = ("precision", "recall", "f1")
        found = {name: np.where(has, part[0], np.nan) for name, part in zip(names, parts, strict=True)}
        return {**found, "average_precision": _average_precisions(self.scores, self.truth, weights)[0]}


def _per_class(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """precision, recall and F1, float64 [draws, classes] each; NaN for a class that a draw neither has nor predicts.

    One that is predicted and not there has 0 of all three, and so has the precision of one that is never predicted.
    """
    asked = weights * truth.any(axis=1)
    right, taken, there = asked @ (predicted * truth), asked @ predicted, asked @ truth
    unknown = np.where(taken + there > 0, 0.0, np.nan)
    return tuple(
        np.divide(of * right, by, out=unknown.copy(), where=by > 0)
        for of, by in ((1, taken), (1, there), (2, taken + there))
    )


def _macro(predicted: np.ndarray, truth: np.ndarray, number: int, weights: np.ndarray) -> np.ndarray:
    return _mean_of_known(_per_class(predicted, truth, weights)[number])


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the classes that a draw has; NaN where it has none."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1)


def _average_precision(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean_of_known(_average_precisions(scores, truth, weights))


def _average_precisions(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [draws, classes]: precision at each threshold, weighted by the recall it adds, as scikit-learn has it.

    NaN for a class that a draw does not have. A picture of which no class is known is no negative of any.
    """
    found, weights = np.full((len(weights), scores.shape[1]), np.nan), (weights * truth.any(axis=1)).astype(np.float32)
    for number in range(scores.shape[1]):
        right = np.flatnonzero(truth[:, number])
        own = weights[:, right]
        summed = np.zeros(len(weights))
        # Each right picture's score is a threshold; what reaches it is counted by a product, some thresholds at a time.
        block = max(1, THRESHOLDS // len(truth))
        for start in range(0, len(right), block):
            some = slice(start, start + block)
            reached = (scores[:, number, None] >= scores[right[some], number]).astype(np.float32)
            taken, hits = weights @ reached, own @ reached[right]
            summed += (own[:, some] * hits / np.maximum(taken, 1)).sum(axis=1, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            found[:, number] = summed / own.sum(axis=1)
    return found


@dataclass(frozen=True)
class TenChoices:
    """For every picture its own description and those of other classes, drawn by the seed.

    Attributes:
        texts: int64 [pictures, 1 + others], positions among the task's texts, the right one first; -1: there are none.
    """

    texts: np.ndarray

    @classmethod
    def draw(cls, task: RetrievalTask, classes: Classes, seed: int) -> TenChoices:
        """One text of each of nine other classes, or of as many as there are. A picture's draw is its own."""
        image_groups, text_groups = task.groups()
        of_text = classes_by_id(task.pairs.frame, "text", classes.names)
        by_class: dict[str, list[int]] = {}
        for text, text_id in enumerate(task.texts["text_id"]):
            for name in of_text[text_id]:
                by_class.setdefault(name, []).append(text)
        own = task.pairs.frame.groupby("image_id")["text_id"].agg(list)
        place = {text_id: number for number, text_id in enumerate(task.texts["text_id"])}
        rows = np.full((len(task.images), 1 + min(OTHERS, max(0, len(by_class) - 1))), -1, np.int64)
        for row, image_id in enumerate(task.images["image_id"]):
            draws = seeded_rng(f"{seed}\0ten\0{image_id}")
            chosen = [place[own[image_id][int(draws.integers(len(own[image_id])))]]]
            has = {classes.names[number] for number in np.flatnonzero(classes.of[row])}
            for name in draws.permutation(sorted(by_class.keys() - has)).tolist():
                text = by_class[name][int(draws.integers(len(by_class[name])))]
                if text_groups[text] & image_groups[row]:
                    # It fits this picture, too: another one of the class that does not.
                    wrong = [text for text in by_class[name] if not text_groups[text] & image_groups[row]]
                    text = wrong[int(draws.integers(len(wrong)))] if wrong else -1
                if text >= 0:
                    chosen.append(text)
                if len(chosen) == rows.shape[1]:
                    break
            if len(chosen) > 1:
                rows[row, : len(chosen)] = chosen
        return cls(rows)

    def won(self, embedded: Embeddings) -> np.ndarray:
        """float64 [pictures]: probability that the right description scores highest, ties broken at random."""
        found = np.full(len(self.texts), np.nan)
        for start in range(0, len(self.texts), BLOCK):
            listed = torch.from_numpy(self.texts[start : start + BLOCK]).to(embedded.texts.device)
            scores = embedded.images[start : start + BLOCK] @ embedded.texts.T
            scores = scores.gather(1, listed.clamp(min=0)).masked_fill(listed < 0, -torch.inf)
            right = scores[:, :1]
            wins = (scores <= right).all(1).double() / (scores == right).sum(1)
            found[start : start + BLOCK] = wins.where(listed[:, 0] >= 0, torch.nan).cpu().numpy()
        return found


def class_table(
    classes: Classes, models: Mapping[str, ClassScores], scores: Mapping[str, RetrievalScores]
) -> dict[str, dict[str, Any]]:
    """class -> training and test pictures and, of each model, precision, recall, f1, average_precision and recall@1.

    recall@1 is that of its pictures looking for their texts. A class that no picture of the test has is left out.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    for who, model in models.items():
        ranks = scores[who].ranks["image_to_text"]
        hits = np.zeros(len(classes.of))
        hits[ranks.query] = ranks.recall(1)
        with np.errstate(invalid="ignore"):
            parts[who] = {**model.per_class(), "recall@1": hits @ classes.of / classes.of.sum(axis=0)}
    table: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(classes.names):
        if count := int(classes.of[:, number].sum()):
            of_models = {
                who: {part: None if np.isnan(values[number]) else float(values[number]) for part, values in of.items()}
                for who, of in parts.items()
            }
            table[name] = {"training": int(classes.training[number]), "pictures": count, **of_models}
    return table


def warn_of_single_images(classes: Classes) -> None:
    """Say which classes of the test have a single picture."""
    alone = [name[:40] for name, count in zip(classes.names, classes.of.sum(axis=0), strict=True) if count == 1]
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        console.warn(f"one picture only of {', '.join(alone[:3])}{more}: their rows say next to nothing")
