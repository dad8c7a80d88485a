"""The loss of a batch of captions: cross-entropy, and how far a picture's tokens are from its caption's words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vlkit import console
from vlkit.data.loading.caption_batches import CaptionBatch
from vlkit.distributed import World
from vlkit.models.captioner.captioner import Captioner
from vlkit.training.loop import Part


@dataclass
class Seen:
    """Sums since the last look: nats, alignment, words."""

    nats: float = 0.0
    alignment: float = 0.0
    words: int = 0


class CaptionLoss:
    """What the loop calls with every batch: the mean over its captions' words, in parts that fit into memory.

    Both losses are sums over words, divided by the words of all processes' captions: so micro-batches, accumulation
    and processes make no difference to the gradient.

    Args:
        alpha: weight of the alignment; of a caption it counts once a word.
        micro_batch: captions at a time; None: all of a batch.

    Attributes:
        seen: what the batches of the step at hand have come to.
        largest: of the batches so far.
    """

    def __init__(self, captioner: Captioner, alpha: float, micro_batch: int | None) -> None:
        self.captioner, self.alpha, self.micro_batch = captioner, alpha, micro_batch
        self.seen, self.largest = Seen(), 1

    def __call__(self, batch: CaptionBatch) -> Iterator[Part]:
        """Parts that add up to the mean loss of the batch."""
        self.largest = max(self.largest, len(batch))
        patches = self.captioner.patches(batch.images) if len(batch) else None
        size = self.micro_batch or max(1, len(batch))
        index = batch.image_index.to(self.captioner.device)
        for start in range(0, len(batch), size):
            assert patches is not None
            some = slice(start, start + size)
            lengths = batch.lengths[some]
            captions = batch.captions[some, : int(lengths.max())]
            found = self.captioner.losses(patches[index[some]], captions, lengths, aligned=self.alpha > 0)
            loss = found.cross_entropy
            self.seen.nats += float(found.cross_entropy.detach())
            self.seen.words += found.words
            if found.alignment is not None:
                loss = loss + self.alpha * found.alignment
                self.seen.alignment += float(found.alignment.detach())
            loss = loss / batch.token_count
            yield Part(loss, loss)

    def halve(self) -> bool:
        """Memory ran out: half as many captions at a time from now on. Returns whether that is less.

        The loop then takes the whole window of its step again, so what was seen of it is forgotten.
        """
        size = min(self.micro_batch or self.largest, self.largest)
        self.micro_batch, self.seen = max(1, size // 2), Seen()
        if size > 1:
            console.say(f"memory ran out: {self.micro_batch} captions at a time from now on, with the same result")
        return size > 1

    def taken(self, world: World) -> dict[str, float]:
        """Both losses a word, over the step at hand and all processes; then it begins anew."""
        seen, self.seen = self.seen, Seen()
        sums = torch.tensor([seen.nats, seen.alignment, seen.words], dtype=torch.float64, device=self.captioner.device)
        world.all_reduce([sums])
        nats, alignment, words = sums.tolist()
        told = {"caption_loss": nats / max(1, words)}
        return told | ({"alignment": alignment / max(1, words)} if self.alpha else {})
