"""Honest negatives: a picture with a text that does not match it, drawn at random or the nearest by a model.

Never a text that matches the picture in the sense of `labels.py`, nor one that equals a right one but for case.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.random import PCG64, Generator

from vlkit.data import captions, labels

if TYPE_CHECKING:
    import pandas as pd

# Texts -> unit vectors, float32 [texts, width].
Embed = Callable[[Sequence[str]], np.ndarray]
NEAREST = 64
TRIES = 40


class Wrong(NamedTuple):
    """A text that does not match."""

    text_id: str
    text: str


class Negatives:
    """Chooses wrong texts for pictures.

    The texts are those of the original training rows: first those that are in training alone, then, as with captions of
    classes, those that validation and test have too.

    Args:
        rows: the matching rows of all splits, new ones included; what matches by any of them is no negative.
        phrasings: other words for a text, case folded, by its id: they are right where it is.
        seed: of the draws.
        embed: where the nearest texts are wanted; None: at random.

    Attributes:
        short: how many rows got fewer texts than they asked for: there were no more that do not match.
    """

    def __init__(
        self, rows: pd.DataFrame, phrasings: Mapping[str, Collection[str]], seed: int, embed: Embed | None = None
    ) -> None:
        self.seed, self.short = seed, 0
        self.image_sets, self.text_sets = labels.match_sets(rows)
        originals = rows[(rows["origin"] == "original") & (rows["split"] == "train")].drop_duplicates("text_id")
        self.texts = [Wrong(*each) for each in zip(originals["text_id"], originals["text"], strict=True)]
        held_out = set(rows.loc[rows["split"] != "train", "text_id"])
        own = [position for position, each in enumerate(self.texts) if each.text_id not in held_out]
        self.pools = [np.array(own, np.int64), np.arange(len(self.texts))]
        self.folded = [captions.folded(each.text) for each in self.texts]
        self.right: dict[str, set[str]] = defaultdict(set)
        for image_id, text_id, text in zip(rows["image_id"], rows["text_id"], rows["text"], strict=True):
            self.right[image_id] |= {captions.folded(text), *phrasings.get(text_id, ())}
        self.given: dict[str, set[int]] = defaultdict(set)
        self.place = {each.text_id: position for position, each in enumerate(self.texts)}
        self.nearest = nearest(embed([each.text for each in self.texts])) if embed and len(self.texts) > 1 else None

    def of(self, row: str, image_id: str, original_text: str, count: int) -> list[Wrong]:
        """`count` texts that do not match a picture, none that it was given before; fewer where there are no more.

        Args:
            row: the pair's id, which decides what is drawn.
            original_text: id of the pair's text, or of the one that it is a variant of: nearest to this.
        """
        found: list[int] = []
        for position in self._candidates(row, original_text) if count else ():
            if position in self.given[image_id] or self._matches(image_id, position):
                continue
            self.given[image_id].add(position)
            found.append(position)
            if len(found) == count:
                break
        self.short += len(found) < count
        return [self.texts[position] for position in found]

    def _candidates(self, row: str, original_text: str) -> Iterator[int]:
        """Of each pool the nearest first, where there is a model; then some at random; then all, from a random one."""
        key = hashlib.blake2b(f"{self.seed}\0{row}".encode(), digest_size=16).digest()
        rng = Generator(PCG64(int.from_bytes(key)))
        for pool in self.pools:
            if self.nearest is not None:
                near = self.nearest[self.place[original_text]]
                yield from near[np.isin(near, pool)].tolist()
            if len(pool):
                yield from pool[rng.integers(len(pool), size=TRIES)].tolist()
                start = int(rng.integers(len(pool)))
                yield from (int(pool[(start + step) % len(pool)]) for step in range(len(pool)))

    def _matches(self, image_id: str, position: int) -> bool:
        together = not self.text_sets[self.texts[position].text_id].isdisjoint(self.image_sets[image_id])
        return together or self.folded[position] in self.right[image_id]


def nearest(vectors: np.ndarray, count: int = NEAREST) -> np.ndarray:
    """For every vector the positions of those with the largest inner products, largest first, itself left out.

    Args:
        vectors: float32 [texts, width].

    Returns:
        int64 [texts, at most `count`].
    """
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    count = min(count, len(vectors) - 1)
    _, found = index.search(vectors, count + 1)
    others = found != np.arange(len(vectors))[:, None]
    # Where many are equal, it may itself not be among the nearest.
    others[others.all(axis=1), -1] = False
    return found[others].reshape(len(vectors), count)
