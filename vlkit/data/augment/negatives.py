"""Honest negatives: a picture with a text that does not match it, drawn at random or the nearest by a model.

Never a text that matches the picture in the sense of `labels.py`, nor one that equals a right one but for case.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.random import Generator

from vlkit.data import captions, labels
from vlkit.data.splits import seeded_rng

if TYPE_CHECKING:
    import pandas as pd

# Texts -> unit vectors, float32 [texts, width].
EmbedTexts = Callable[[Sequence[str]], np.ndarray]
NEAREST = 64  # that are found for all texts at once
TRIES = 40


class Negative(NamedTuple):
    """A text that does not match."""

    text_id: str
    text: str


class NegativeSampler:
    """Chooses wrong texts for pictures.

    The texts are those of the training rows that augment has not made: first those that are in training alone, then, as
    with captions of classes, those that validation and test have too.

    Args:
        rows: the matching rows of all splits, new ones included; what matches by any of them is no negative.
        phrasings: other words for a text, case folded, by its id: they are right where it is.
        seed: of the draws.
        embed: where the nearest texts are wanted; None: at random.

    Attributes:
        short: how many rows got fewer texts than they asked for: there were no more that do not match.
    """

    def __init__(
        self, rows: pd.DataFrame, phrasings: Mapping[str, Collection[str]], seed: int, embed: EmbedTexts | None = None
    ) -> None:
        self.seed, self.short = seed, 0
        self.image_sets, text_sets = labels.match_sets(rows)
        originals = rows[rows["split"] == "train"]
        if "source_pair_id" in rows:
            originals = originals[originals["source_pair_id"].isna()]
        originals = originals.drop_duplicates("text_id")
        self.texts = [Negative(*each) for each in zip(originals["text_id"], originals["text"], strict=True)]
        self.place = {each.text_id: position for position, each in enumerate(self.texts)}
        held_out = set(rows.loc[rows["split"] != "train", "text_id"])
        own = [position for position, each in enumerate(self.texts) if each.text_id not in held_out]
        self.pools = [np.array(own, np.int64), np.arange(len(self.texts))]
        self.members = self._members(rows, text_sets, phrasings)
        reached: dict[str, list[int]] = defaultdict(list)
        for position, members in enumerate(self.members):
            for member in members:
                reached[member].append(position)
        self.reached = {member: np.array(positions) for member, positions in reached.items()}
        self.words: dict[str, set[str]] = defaultdict(set)
        for image_id, text_id, text in zip(rows["image_id"], rows["text_id"], rows["text"], strict=True):
            words = map(_said, phrasings.get(text_id, ()))
            self.words[image_id].update(words, [_can_be_said(captions.fold_case(text))])
        self.given: dict[str, set[int]] = defaultdict(set)
        self.near = NearestTexts(embed([each.text for each in self.texts])) if embed and len(self.texts) > 1 else None

    def _members(
        self, rows: pd.DataFrame, text_sets: Mapping[str, frozenset[str]], phrasings: Mapping[str, Collection[str]]
    ) -> list[frozenset[str]]:
        """The match set of each text, and its wordings. Texts that differ in case alone have one set between them."""
        sets: dict[str, set[str]] = defaultdict(set)
        for text_id, text in zip(rows["text_id"], rows["text"], strict=True):
            sets[captions.fold_case(text)] |= text_sets[text_id]
        found = []
        for each in self.texts:
            folded = captions.fold_case(each.text)
            words = map(_can_be_said, phrasings.get(each.text_id, ()))
            found.append(frozenset({*sets[folded], _said(folded), *words}))
        return found

    def choose(self, row: str, image_id: str, original_text: str, count: int) -> list[Negative]:
        """`count` texts that do not match a picture, none that it was given before; fewer where there are no more.

        Args:
            row: the pair's id, which decides what is drawn.
            original_text: id of the pair's text, or of the one that it is a variant of: nearest to this.
        """
        rng, found = seeded_rng(f"{self.seed}\0{row}"), list[int]()
        for pool in self.pools:
            wanted = count - len(found)
            if wanted and len(pool):
                nearest = self.near is not None
                some = self._nearest(pool, image_id, original_text) if nearest else self._drawn(pool, image_id, rng)
                found += islice(some, wanted)
                self.given[image_id].update(found)
        self.short += len(found) < count
        return [self.texts[position] for position in found]

    def _drawn(self, pool: np.ndarray, image_id: str, rng: Generator) -> Iterator[int]:
        """Texts of the pool that do not match, in random order: a few tries, which mostly do, then what is left."""
        tried = dict.fromkeys(pool[rng.integers(len(pool), size=TRIES)].tolist())
        fitting = [each for each in tried if each not in self.given[image_id] and not self._matches(image_id, each)]
        yield from fitting
        left = self._free(pool, image_id)
        left[fitting] = False
        yield from rng.permutation(np.flatnonzero(left)).tolist()

    def _nearest(self, pool: np.ndarray, image_id: str, original_text: str) -> Iterator[int]:
        """Texts of the pool that do not match, those nearest to the right one first."""
        assert self.near is not None
        free = self._free(pool, image_id)
        for some in self.near.blocks(self.place[original_text]):
            yield from some[free[some]].tolist()

    def _matches(self, image_id: str, position: int) -> bool:
        members = self.members[position]
        return not (members.isdisjoint(self.image_sets[image_id]) and members.isdisjoint(self.words[image_id]))

    def _free(self, pool: np.ndarray, image_id: str) -> np.ndarray:
        """bool [texts]: those of the pool that neither match the picture nor were given to it."""
        free = np.zeros(len(self.texts), np.bool_)
        free[pool] = True
        for member in (*self.image_sets[image_id], *self.words[image_id]):
            free[self.reached.get(member, [])] = False
        free[list(self.given[image_id])] = False
        return free


def _said(folded: str) -> str:
    """A wording as a member of match sets, out of the way of any group and any text's id."""
    return f"\0said:{folded}"


def _can_be_said(folded: str) -> str:
    """The same of what a text becomes by a rule: a picture's own text must not be that, either way round."""
    return f"\0can be said:{folded}"


class NearestTexts:
    """The texts nearest to each, by the inner products of their unit vectors.

    Args:
        vectors: float32 [texts, width].
    """

    def __init__(self, vectors: np.ndarray) -> None:
        import faiss

        self.vectors, index = vectors, faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        _, self.first = index.search(vectors, min(NEAREST, len(vectors)))

    def blocks(self, position: int) -> Iterator[np.ndarray]:
        """All other texts by blocks, nearest first; those beyond the first few are looked for when asked for."""
        seen = np.array([position])
        for wanted in (0, 32 * NEAREST, len(self.vectors)):
            found = self._first(position, wanted) if wanted else self.first[position]
            new = found[~np.isin(found, seen)]
            yield new
            seen = np.concatenate([seen, new])

    def _first(self, position: int, count: int) -> np.ndarray:
        """The `count` nearest, nearest first."""
        scores = self.vectors @ self.vectors[position]
        count = min(count, len(scores))
        best = np.argpartition(-scores, count - 1)[:count]
        return best[np.argsort(-scores[best], kind="stable")]
