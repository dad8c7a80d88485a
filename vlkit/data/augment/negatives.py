"""Negatives: an image with a text that does not match it, drawn at random or chosen as the nearest by a model.

A negative never matches the image in the sense of `labels.py`, nor equals a matching text but for case.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.random import Generator

from vlkit.data import captions, labels
from vlkit.data.pairs import index_of_ids
from vlkit.data.splits import seeded_rng

if TYPE_CHECKING:
    import pandas as pd

# Texts -> unit vectors, float32 [texts, width].
EmbedTexts = Callable[[Sequence[str]], np.ndarray]
NEAREST_COUNT = 64  # neighbours that are searched for all texts at once
RANDOM_TRIES = 40


class Negative(NamedTuple):
    """A text that does not match."""

    text_id: str
    text: str


class NegativeSampler:
    """Chooses negatives for images.

    The texts are those of the original training rows: first those that are in training alone, then, as with captions
    of classes, those that validation and test have too.

    Args:
        rows: the matching rows of all splits, new ones included; a text that matches by any of them is no negative.
        variants: text id -> its variants, case folded; they match where the text does.
        seed: of the draws.
        embed: to choose the nearest texts; None: choose at random.

    Attributes:
        short_rows: how many rows got fewer negatives than asked for, because no other text fails to match.
    """

    def __init__(
        self, rows: pd.DataFrame, variants: Mapping[str, Collection[str]], seed: int, embed: EmbedTexts | None = None
    ) -> None:
        self.seed, self.short_rows = seed, 0
        self.image_sets, text_sets = labels.match_sets(rows)
        originals = rows[rows["split"] == "train"]
        if "source_pair_id" in rows:
            originals = originals[originals["source_pair_id"].isna()]
        originals = originals.drop_duplicates("text_id")
        self.texts = [Negative(*row) for row in zip(originals["text_id"], originals["text"], strict=True)]
        self.position_of = index_of_ids(text.text_id for text in self.texts)
        held_out = set(rows.loc[rows["split"] != "train", "text_id"])
        training_only = [position for position, text in enumerate(self.texts) if text.text_id not in held_out]
        self.pools = [np.array(training_only, np.int64), np.arange(len(self.texts))]
        self.members = self._match_members(rows, text_sets, variants)
        positions_of: dict[str, list[int]] = defaultdict(list)
        for position, members in enumerate(self.members):
            for member in members:
                positions_of[member].append(position)
        self.positions_of = {member: np.array(positions) for member, positions in positions_of.items()}
        self.wordings: dict[str, set[str]] = defaultdict(set)
        for image_id, text_id, text in zip(rows["image_id"], rows["text_id"], rows["text"], strict=True):
            wordings = map(_text_member, variants.get(text_id, ()))
            self.wordings[image_id].update(wordings, [_variant_member(captions.fold_case(text))])
        self.used: dict[str, set[int]] = defaultdict(set)
        self.nearest = (
            NearestTexts(embed([text.text for text in self.texts])) if embed and len(self.texts) > 1 else None
        )

    def _match_members(
        self, rows: pd.DataFrame, text_sets: Mapping[str, frozenset[str]], variants: Mapping[str, Collection[str]]
    ) -> list[frozenset[str]]:
        """Return the match set of each text, with its wordings. Texts that differ in case alone share one set."""
        sets: dict[str, set[str]] = defaultdict(set)
        for text_id, text in zip(rows["text_id"], rows["text"], strict=True):
            sets[captions.fold_case(text)] |= text_sets[text_id]
        members = []
        for text in self.texts:
            folded = captions.fold_case(text.text)
            wordings = map(_variant_member, variants.get(text.text_id, ()))
            members.append(frozenset({*sets[folded], _text_member(folded), *wordings}))
        return members

    def choose(self, pair_id: str, image_id: str, original_text: str, count: int) -> list[Negative]:
        """Return up to `count` texts that do not match an image, none that it got before.

        Args:
            pair_id: of the row; seeds the draws.
            original_text: id of the row's text, or of the text that it is a variant of: nearest to this one.
        """
        rng, chosen = seeded_rng(f"{self.seed}\0{pair_id}"), list[int]()
        for pool in self.pools:
            missing = count - len(chosen)
            if missing and len(pool):
                candidates = (
                    self._random_texts(pool, image_id, rng)
                    if self.nearest is None
                    else self._nearest_texts(self.nearest, pool, image_id, original_text)
                )
                chosen += islice(candidates, missing)
                self.used[image_id].update(chosen)
        self.short_rows += len(chosen) < count
        return [self.texts[position] for position in chosen]

    def _random_texts(self, pool: np.ndarray, image_id: str, rng: Generator) -> Iterator[int]:
        """Yield texts of the pool that do not match, in random order: first a few tries, then the rest."""
        tries = dict.fromkeys(pool[rng.integers(len(pool), size=RANDOM_TRIES)].tolist())
        fitting = [text for text in tries if text not in self.used[image_id] and not self._matches(image_id, text)]
        yield from fitting
        free = self._free_texts(pool, image_id)
        free[fitting] = False
        yield from rng.permutation(np.flatnonzero(free)).tolist()

    def _nearest_texts(
        self, nearest: NearestTexts, pool: np.ndarray, image_id: str, original_text: str
    ) -> Iterator[int]:
        """Yield texts of the pool that do not match, those nearest to the matching one first."""
        free = self._free_texts(pool, image_id)
        for block in nearest.blocks(self.position_of[original_text]):
            yield from block[free[block]].tolist()

    def _matches(self, image_id: str, position: int) -> bool:
        members = self.members[position]
        return not (members.isdisjoint(self.image_sets[image_id]) and members.isdisjoint(self.wordings[image_id]))

    def _free_texts(self, pool: np.ndarray, image_id: str) -> np.ndarray:
        """Return bool [texts]: the texts of the pool that neither match the image nor were used for it."""
        free = np.zeros(len(self.texts), np.bool_)
        free[pool] = True
        for member in (*self.image_sets[image_id], *self.wordings[image_id]):
            free[self.positions_of.get(member, [])] = False
        free[list(self.used[image_id])] = False
        return free


def _text_member(folded: str) -> str:
    """Return a text as a member of match sets that no group and no text id can equal."""
    return f"\0said:{folded}"


def _variant_member(folded: str) -> str:
    """Return a text that a rule makes of another as such a member; no text of an image may equal it, either way."""
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
        _, self.first = index.search(vectors, min(NEAREST_COUNT, len(vectors)))

    def blocks(self, position: int) -> Iterator[np.ndarray]:
        """Yield all other texts in blocks, nearest first; those beyond the first block are searched on demand."""
        earlier = np.array([position])
        for count in (0, 32 * NEAREST_COUNT, len(self.vectors)):
            nearest = self._search(position, count) if count else self.first[position]
            new = nearest[~np.isin(nearest, earlier)]
            yield new
            earlier = np.concatenate([earlier, new])

    def _search(self, position: int, count: int) -> np.ndarray:
        """Return the `count` nearest texts, nearest first."""
        scores = self.vectors @ self.vectors[position]
        count = min(count, len(scores))
        best = np.argpartition(-scores, count - 1)[:count]
        return best[np.argsort(-scores[best], kind="stable")]
