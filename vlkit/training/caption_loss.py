"""The loss of a batch of captions: cross-entropy, and the distance of an image's tokens from its caption's."""

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
class RunningSums:
    """Sums since the last `pop`: nats of cross-entropy, alignment, tokens."""

    nats: float = 0.0
    alignment: float = 0.0
    tokens: int = 0


class CaptionLoss:
    """The objective of train-fusion: the mean over the captions' tokens, in parts that fit into memory.

    Both losses are sums over tokens, divided by those of all processes' captions: micro-batches, accumulation and
    processes do not change the gradient.

    Args:
        alpha: weight of the alignment loss, which counts once for each token.
        micro_batch: captions at a time; None: the whole batch.

    Attributes:
        sums: over the batches of the current step.
        largest: captions of the largest batch so far.
    """

    def __init__(self, captioner: Captioner, alpha: float, micro_batch: int | None) -> None:
        self.captioner, self.alpha, self.micro_batch = captioner, alpha, micro_batch
        self.sums, self.largest = RunningSums(), 1

    def __call__(self, batch: CaptionBatch) -> Iterator[Part]:
        """Yield parts that add up to the mean loss of the batch."""
        self.largest = max(self.largest, len(batch))
        if not len(batch):
            return
        patches = self.captioner.patches(batch.images)
        size = self.micro_batch or len(batch)
        index = batch.image_index.to(self.captioner.device)
        for start in range(0, len(batch), size):
            chunk = slice(start, start + size)
            lengths = batch.lengths[chunk]
            captions = batch.captions[chunk, : int(lengths.max())]
            losses = self.captioner.losses(patches[index[chunk]], captions, lengths, with_alignment=self.alpha > 0)
            loss = losses.cross_entropy
            self.sums.nats += float(losses.cross_entropy.detach())
            self.sums.tokens += losses.token_count
            if losses.alignment is not None:
                loss = loss + self.alpha * losses.alignment
                self.sums.alignment += float(losses.alignment.detach())
            loss = loss / batch.token_count
            yield Part(loss, loss)

    def reduce_micro_batch(self) -> bool:
        """Halve the micro-batch after memory ran out. Return False where it is 1 already.

        The loop then repeats the whole step, so the sums start anew.
        """
        size = min(self.micro_batch or self.largest, self.largest)
        self.micro_batch, self.sums = max(1, size // 2), RunningSums()
        if size > 1:
            console.say(f"out of memory: --micro-batch is {self.micro_batch} from now on; the result is the same")
        return size > 1

    def pop(self, world: World) -> dict[str, float]:
        """Return both losses in nats per token, over the step and all processes, and start anew."""
        sums, self.sums = self.sums, RunningSums()
        totals = torch.tensor([sums.nats, sums.alignment, sums.tokens], dtype=torch.float64)
        totals = totals.to(self.captioner.device)
        world.all_reduce([totals])
        nats, alignment, tokens = totals.tolist()
        losses = {"caption_loss": nats / max(1, tokens)}
        return losses | ({"alignment": alignment / max(1, tokens)} if self.alpha else {})
