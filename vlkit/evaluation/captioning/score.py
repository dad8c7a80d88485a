"""Captions and their references, scored as COCO does, with intervals over images; of any captioner."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlkit import console
from vlkit.errors import DataError
from vlkit.evaluation.captioning.caption_files import read_captions
from vlkit.evaluation.captioning.metrics import CaptionScores
from vlkit.evaluation.captioning.ptb_tokens import coco_tokens
from vlkit.evaluation.comparison import PerQueryMetrics, compare
from vlkit.evaluation.results import Group

if TYPE_CHECKING:
    from vlkit.data.pairs import Pairs

EXAMPLES = 20


@dataclass(frozen=True)
class References:
    """The captions that people wrote: image id -> texts."""

    by_image: Mapping[str, list[str]]

    @classmethod
    def from_pairs(cls, pairs: Pairs) -> References:
        """Collect the texts of a table by their image."""
        by_image: dict[str, list[str]] = defaultdict(list)
        for image, text in zip(pairs.frame["image_id"], pairs.frame["text"], strict=True):
            by_image[image].append(text)
        return cls(by_image)

    def of_images(self, images: Sequence[str]) -> list[list[str]]:
        """Return the references of each image."""
        return [self.by_image[image] for image in images]


@dataclass(frozen=True)
class CaptionSet:
    """Captions to score, an image each.

    Attributes:
        references: [images][at least one].
        tokens: of the captions.
        reference_tokens: of the references.
    """

    images: list[str]
    captions: list[str]
    references: list[list[str]]
    tokens: list[list[str]]
    reference_tokens: list[list[list[str]]]

    @classmethod
    def from_texts(cls, images: list[str], captions: list[str], references: list[list[str]]) -> CaptionSet:
        """Split everything into COCO's tokens."""
        flat = iter(coco_tokens([text for texts in references for text in texts]))
        reference_tokens = [[next(flat) for _ in texts] for texts in references]
        return cls(images, captions, references, coco_tokens(captions), reference_tokens)

    @classmethod
    def read(cls, captions: Path, references: Path) -> CaptionSet:
        """Read a COCO results file and a COCO annotation file.

        Raises:
            DataError: a file is none, an image has two captions, or no reference.
        """
        by_image: dict[str, list[str]] = defaultdict(list)
        for image, text in read_captions(references):
            by_image[image].append(text)
        rows = read_captions(captions)
        twice = [image for image, count in Counter(image for image, _ in rows).items() if count > 1]
        if twice:
            hint = "one caption an image is scored; or are --captions and --references swapped?"
            raise DataError(f"{captions}: image {twice[0]} has several captions", hint=hint)
        alone = [image for image, _ in rows if image not in by_image]
        if alone:
            more = f", nor have {len(alone) - 1} others" if len(alone) > 1 else ""
            message = f"{captions}: image {alone[0]} has no reference in {references}{more}"
            raise DataError(message, hint="are these the references of the same split?")
        if missing := len(by_image) - len(rows):
            console.warn(f"{missing} of {len(by_image)} images of {references} have no caption: left out")
        if len(rows) == 1:
            console.warn("CIDEr of one image is always 0: it weighs words by how few of the images have them")
        images = [image for image, _ in rows]
        captioned = cls.from_texts(images, [text for _, text in rows], [by_image[image] for image in images])
        if empty := sum(not tokens for tokens in captioned.tokens):
            console.warn(f"{empty} of {len(rows)} captions have no words: they score 0")
        return captioned

    def with_captions(self, captions: list[str]) -> CaptionSet:
        """Return other captions of the same images."""
        return replace(self, captions=captions, tokens=coco_tokens(captions))

    def exact(self) -> np.ndarray:
        """Return float64 [images]: 1 where a caption is word for word one of its references."""
        pairs = zip(self.tokens, self.reference_tokens, strict=True)
        return np.array([bool(tokens) and tokens in references for tokens, references in pairs], np.float64)


class CaptionScorer(Protocol):
    """Scores captions by a model: see `clipscore.ClipScorer`."""

    def __call__(self, captioned: CaptionSet) -> Mapping[str, np.ndarray]:
        """Return metric -> float64 [images]."""


@dataclass(frozen=True)
class ScoredCaptions:
    """Captions with all their scores."""

    captioned: CaptionSet
    scores: CaptionScores
    per_query: PerQueryMetrics

    @classmethod
    def from_captions(cls, captioned: CaptionSet, scorer: CaptionScorer | None = None) -> ScoredCaptions:
        """Score captions on COCO's tokens; and with a scorer, by a model."""
        scores = CaptionScores.from_tokens(captioned.tokens, captioned.reference_tokens)
        per_query = scores.per_query_metrics()
        more = {"exact": captioned.exact(), **(scorer(captioned) if scorer is not None else {})}
        return cls(captioned, scores, replace(per_query, means={**per_query.means, **more}))


def caption_metrics(images: Sequence[str], texts: Sequence[str], references: References) -> dict[str, float]:
    """Return BLEU, ROUGE_L, CIDEr and the exact share of captions, without intervals.

    Args:
        images: id of the image of each text.
    """
    captioned = CaptionSet.from_texts(list(images), list(texts), references.of_images(images))
    per_query = ScoredCaptions.from_captions(captioned).per_query
    return {name: per_query.value(name, len(images)) for name in per_query.names}


def compare_captions(scored: ScoredCaptions, base: ScoredCaptions | None, *, draws: int, seed: int) -> Group:
    """Return metrics and intervals and, with other captions of the images, the paired difference."""

    def select(metrics: PerQueryMetrics, is_selected: Callable[[str], bool]) -> PerQueryMetrics:
        return replace(metrics, means={name: values for name, values in metrics.means.items() if is_selected(name)})

    images, own = scored.captioned.images, scored.per_query
    if base is None:
        group = compare(own, None, images, draws=draws, seed=seed)
    else:
        known = base.per_query.means
        both = select(own, known.__contains__), select(base.per_query, own.means.__contains__)
        group = compare(*both, images, draws=draws, seed=seed)
        # Metrics of one side only are compared with nothing.
        alone = PerQueryMetrics({name: values for name, values in own.means.items() if name not in known})
        rest = compare(alone, None, images, draws=draws, seed=seed)
        group.metrics.update(rest.metrics)
        group.intervals.update(rest.intervals)
        group.units.update(rest.units)
    group.metrics["images"] = len(images)
    return group


def diversity(captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return how much captions differ: shares of distinct captions, words and word pairs; mean length.

    Args:
        captions: their tokens.
    """
    words = [word for tokens in captions for word in tokens]
    couples = [couple for tokens in captions for couple in pairwise(tokens)]
    return {
        "distinct_captions": len({tuple(tokens) for tokens in captions}) / len(captions),
        "distinct_1": len(set(words)) / max(1, len(words)),
        "distinct_2": len(set(couples)) / max(1, len(couples)),
        "vocabulary": len(set(words)),
        "mean_length": len(words) / len(captions),
    }


def worst_and_best(
    captioned: CaptionSet, scores: CaptionScores, files: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Return the captions of the lowest and the highest CIDEr.

    Args:
        files: path of each image.
    """
    order = np.argsort(scores.cider, kind="stable")

    def examples(indices: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "image": captioned.images[index],
                **({"file": files[index]} if files else {}),
                "caption": captioned.captions[index],
                "references": captioned.references[index],
                "cider": float(scores.cider[index]),
                "rouge_l": float(scores.rouge_l[index]),
            }
            for index in indices.tolist()
        ]

    # No image is in both lists, however few there are.
    half = len(order) // 2
    worst, best = min(EXAMPLES, len(order) - half), min(EXAMPLES, half)
    return {"worst": examples(order[:worst]), "best": examples(order[::-1][:best])}
