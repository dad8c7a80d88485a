"""Define what matches what: the one definition that training labels and evaluation hits share.

An image and a text match when their group sets intersect or when their text ids are equal. Both halves become one rule:
an image gets the ids of its own texts, and a text its own id, as further members of their sets. Then two things match
when their sets intersect, and nothing else needs to know about it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import torch

Groups = str | Collection[str]
LabelMode = Literal["eye", "multi-positive", "mask"]


def as_set(groups: Groups) -> frozenset[str]:
    """Return one id or a collection of them as a set of strings."""
    several = isinstance(groups, Collection) and not isinstance(groups, str)
    return frozenset(map(str, groups)) if several else frozenset((str(groups),))


def matching_pairs(image_groups: Sequence[Groups], text_groups: Sequence[Groups]) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (image, text) of every matching pair, each pair once, sorted by image and then by text.

    Goes through the ids they share, so the cost grows with the matches, not with images times texts.

    Returns:
        Two int64 arrays of equal length.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for position, groups in enumerate(text_groups):
        for group in as_set(groups):
            members[group].append(position)
    positions_of = {group: np.array(positions, np.int64) for group, positions in members.items()}
    images, texts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for position, groups in enumerate(image_groups):
        shared = [positions_of[group] for group in as_set(groups) if group in positions_of]
        if shared:
            hits = np.unique(np.concatenate(shared))
            texts.append(hits)
            images.append(np.full(len(hits), position, np.int64))
    return np.concatenate(images), np.concatenate(texts)


def count_false_negatives(image_groups: Sequence[Groups], text_groups: Sequence[Groups]) -> int:
    """Count matching pairs off the diagonal, which `eye` labels push apart; pair i is image i with text i."""
    images, texts = matching_pairs(image_groups, text_groups)
    return int((images != texts).sum())


def label_matrix(
    image_groups: Sequence[Groups], text_groups: Sequence[Groups], mode: LabelMode = "multi-positive"
) -> torch.Tensor:
    """Return the labels of a batch: +1 pulls an image and a text together, -1 pushes them apart, 0 leaves them alone.

    Args:
        image_groups: for each image (row) the id or ids that make a match.
        text_groups: the same for each text (column).
        mode: "eye" knows only position: the diagonal is positive, all else negative, whatever the ids say.
            "multi-positive" makes every matching pair positive. "mask" makes the diagonal positive and leaves
            the other matching pairs alone.

    Returns:
        float32 [images, texts].
    """
    return Labels.from_groups(image_groups, text_groups, mode).rows()


@dataclass(frozen=True)
class Labels:
    """A sparse label matrix: it stores the matches alone.

    Attributes:
        images, texts: int64 [matches], positions of the matching pairs, sorted by image.
        shape: images, texts.
        mode: see `label_matrix`.
    """

    images: np.ndarray
    texts: np.ndarray
    shape: tuple[int, int]
    mode: LabelMode

    @classmethod
    def from_groups(cls, image_groups: Sequence[Groups], text_groups: Sequence[Groups], mode: LabelMode) -> Labels:
        """Build the labels of these images and texts. Arguments as for `label_matrix`."""
        none = np.empty(0, np.int64)
        images, texts = (none, none) if mode == "eye" else matching_pairs(image_groups, text_groups)
        return cls(images, texts, (len(image_groups), len(text_groups)), mode)

    def rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return float32 [stop - start, texts]: the rows of images `start` to `stop`."""
        import torch

        stop = self.shape[0] if stop is None else stop
        labels = np.full((stop - start, self.shape[1]), -1.0, np.float32)
        first, last = np.searchsorted(self.images, [start, stop])
        labels[self.images[first:last] - start, self.texts[first:last]] = 1.0 if self.mode == "multi-positive" else 0.0
        if self.mode != "multi-positive":
            own = np.arange(start, min(stop, self.shape[1]))
            labels[own - start, own] = 1.0
        return torch.from_numpy(labels)


def match_sets(pairs: pd.DataFrame) -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
    """Return image id -> set and text id -> set of a pairs table; two match when their sets intersect.

    An image or a text of several rows has the groups of all of them. Rows of mismatched pairs (`match` 0) add the
    groups of an image and a text, but do not give the image their text.
    """
    images: dict[str, set[str]] = defaultdict(set)
    texts: dict[str, set[str]] = defaultdict(set)
    rows = zip(
        pairs["image_id"], pairs["text_id"], pairs["image_group"], pairs["text_group"], pairs["match"], strict=True
    )
    for image_id, text_id, image_group, text_group, match in rows:
        images[image_id] |= as_set(image_group)
        texts[text_id] |= as_set(text_group) | {_text_as_group(text_id)}
        if match:
            images[image_id].add(_text_as_group(text_id))
    return (
        {key: frozenset(groups) for key, groups in images.items()},
        {key: frozenset(groups) for key, groups in texts.items()},
    )


def _text_as_group(text_id: str) -> str:
    """Return a text's id as a group that no group of a user can equal."""
    return f"\0text:{text_id}"
