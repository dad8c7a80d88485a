"""Does a captioner use the image? The loss of captions with their own image, another one, and a blank one.

A language model alone writes fluent captions of nothing; the gap between the first loss and the others is the
information that it takes from the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vlkit import signals
from vlkit.data.loading.caption_batches import CaptionBatch, CaptionDataset
from vlkit.data.loading.stores import InputStore
from vlkit.data.pairs import Pairs
from vlkit.distributed import SINGLE, World
from vlkit.errors import NonFiniteError
from vlkit.evaluation.results import ImageReliance
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.device import autocast

BATCH_SIZE = 32


def one_caption_per_image(pairs: Pairs, limit: int | None, seed: int) -> Pairs:
    """Return the first row of every image, of at most `limit` images, drawn by the seed."""
    return pairs.with_rows(pairs.unique_images()).subsample(limit, seed)


def caption_dataset(
    pairs: Pairs, captioner: Captioner, max_length: int, world: World = SINGLE
) -> tuple[CaptionDataset, int]:
    """Return a table's rows as this captioner needs them, and how many captions are cut at `max_length` tokens."""
    tokens, cut = captioner.language.captions(list(pairs.frame["text"]), max_length)
    return CaptionDataset(pairs, captioner.vision.pixel_spec, tokens, captioner.language.pad_id, world), cut


def image_reliance(
    captioner: Captioner,
    dataset: CaptionDataset,
    blank: torch.Tensor,
    *,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> ImageReliance:
    """Return the loss of a table's captions with their own image, a shuffled one and a blank one.

    Args:
        blank: patches of a blank image, [1, patches, width].
        seed: of the shuffle, in which no row keeps its image.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    rows = list(range(len(dataset)))
    circle = np.random.default_rng(seed).permutation(len(rows))
    other = np.empty(len(rows), np.int64)
    other[circle] = np.roll(circle, 1)
    sums = torch.zeros(3, dtype=torch.float64, device=captioner.device)
    tokens = 0
    captioner.eval()
    for start in range(0, len(rows), batch_size):
        signals.raise_if_stopped()
        chunk = rows[start : start + batch_size]
        right, shuffled = dataset.batch_of_rows(chunk), dataset.batch_of_rows(chunk, other[chunk].tolist())
        tokens += right.token_count
        blank_patches = blank.expand(len(right), -1, -1).to(captioner.device)
        for index, (batch, patches) in enumerate(((right, None), (shuffled, None), (right, blank_patches))):
            if len(batch):
                sums[index] += sum_caption_losses(captioner, batch, patches)
    dataset.world.all_reduce([sums])
    losses = (sums / max(1, tokens)).tolist()
    if not np.isfinite(losses).all():
        raise NonFiniteError(f"the captions' loss is {losses[0]}", hint="a lower --lr, or --precision fp32")
    several = len(set(dataset.image_ids)) > 1
    return ImageReliance(right=losses[0], shuffled=losses[1] if several else None, blank=losses[2])


@torch.inference_mode()
def sum_caption_losses(captioner: Captioner, batch: CaptionBatch, patches: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of a batch's caption losses, float64, without gradients.

    Args:
        patches: instead of those of its images.
    """
    with autocast(captioner.device, captioner.precision):
        if patches is None:
            patches = captioner.patches(batch.images)[batch.image_index.to(captioner.device)]
        return captioner.losses(patches, batch.captions, batch.lengths).cross_entropy.double()


def generate_captions(
    captioner: Captioner,
    images: InputStore,
    positions: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write captions of the images at some positions, batch by batch.

    Args:
        on_progress: called with the number of images done.
    """
    captions: list[str] = []
    captioner.eval()
    for start in range(0, len(positions), batch_size):
        signals.raise_if_stopped()
        patches = captioner.patches(images[positions[start : start + batch_size]])
        captions += captioner.generate(patches, num_beams=num_beams, max_new_tokens=max_new_tokens)
        if on_progress is not None:
            on_progress(len(captions))
    return captions
