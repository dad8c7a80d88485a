"""Does it look at the picture? The loss of captions under their own picture, another one, and a blank one.

A language model alone writes fluent captions of nothing; the gap between the first number and the others is what it
has from the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlkit import signals
from vlkit.data.loading.caption_batches import CaptionBatch, CaptionDataset
from vlkit.data.loading.stores import InputStore
from vlkit.data.pairs import Pairs
from vlkit.distributed import SINGLE, World
from vlkit.errors import NonFiniteError
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.device import autocast

AT_ONCE = 32


@dataclass(frozen=True)
class ImageReliance:
    """Nats a token. `shuffled` is None where there are no two pictures."""

    right: float
    shuffled: float | None
    blank: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return {"right": self.right, "shuffled": self.shuffled, "blank": self.blank}


def one_caption_per_image(pairs: Pairs, limit: int | None, seed: int) -> Pairs:
    """The first row of every picture, of at most `limit` pictures, drawn by the seed."""
    first = Pairs(pairs.unique_images(), pairs.folder, pairs.metadata)
    return first.subsample(limit, seed)


def caption_dataset(
    pairs: Pairs, captioner: Captioner, max_length: int, world: World = SINGLE
) -> tuple[CaptionDataset, int]:
    """A table's rows as this captioner wants them; and how many captions are cut at `max_length` tokens."""
    assert captioner.vision is not None
    tokens, cut = captioner.language.captions(list(pairs.frame["text"]), max_length)
    return CaptionDataset(pairs, captioner.vision.pixel_spec, tokens, captioner.language.pad_id, world), cut


def image_reliance(
    captioner: Captioner,
    dataset: CaptionDataset,
    blank: torch.Tensor,
    *,
    seed: int = 0,
    at_once: int = AT_ONCE,
) -> ImageReliance:
    """The loss of a table's captions, with the right picture, a shuffled and a blank one.

    Args:
        blank: patches of a blank picture, [1, patches, width].
        seed: of the shuffle, in which no row keeps its picture's place.
    """
    rows = list(range(len(dataset)))
    circle = np.random.default_rng(seed).permutation(len(rows))
    other = np.empty(len(rows), np.int64)
    other[circle] = np.roll(circle, 1)
    sums = torch.zeros(3, dtype=torch.float64, device=captioner.device)
    words = 0
    captioner.eval()
    for start in range(0, len(rows), at_once):
        signals.raise_if_stopped()
        some = rows[start : start + at_once]
        right, shuffled = dataset.batch_of_rows(some), dataset.batch_of_rows(some, other[some].tolist())
        words += right.token_count
        for place, (batch, patches) in enumerate(
            ((right, None), (shuffled, None), (right, blank.expand(len(right), -1, -1).to(captioner.device)))
        ):
            if len(batch):
                sums[place] += sum_caption_losses(captioner, batch, patches)
    dataset.world.all_reduce([sums])
    found = (sums / max(1, words)).tolist()
    if not np.isfinite(found).all():
        raise NonFiniteError(f"the captions' loss is {found[0]}", hint="a lower --lr, or --precision fp32")
    return ImageReliance(found[0], found[1] if len(set(dataset.image_ids)) > 1 else None, found[2])


@torch.inference_mode()
def sum_caption_losses(captioner: Captioner, batch: CaptionBatch, patches: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of a batch's caption losses, without gradients.

    Args:
        patches: instead of its pictures'.
    """
    with autocast(captioner.device, captioner.precision):
        if patches is None:
            patches = captioner.patches(batch.images)[batch.image_index.to(captioner.device)]
        return captioner.losses(patches, batch.captions, batch.lengths).cross_entropy.double()


def generate_captions(
    captioner: Captioner,
    pictures: InputStore,
    positions: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    at_once: int = AT_ONCE,
    watch: Callable[[int], None] | None = None,
) -> list[str]:
    """Captions of the pictures at some positions, batch by batch.

    Args:
        watch: called with the number of pictures done.
    """
    captions: list[str] = []
    captioner.eval()
    for start in range(0, len(positions), at_once):
        signals.raise_if_stopped()
        patches = captioner.patches(pictures[positions[start : start + at_once]])
        captions += captioner.generate(patches, num_beams=num_beams, max_new_tokens=max_new_tokens)
        if watch is not None:
            watch(len(captions))
    return captions
