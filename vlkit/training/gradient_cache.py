"""The contrastive loss of a batch: embedded at once, or, where that is too much, in micro-batches with the same result.

Two passes (gradient caching, arXiv 2101.06983): embed all without gradients; find the loss and its gradient at the
embeddings; embed again, a micro-batch at a time, and send each its part of that gradient. Of the pictures the last
micro-batch keeps its graph, and is embedded once. Every pair is contrasted with the whole batch, in the memory of a
micro-batch. The second pass sees the first one's random numbers, so dropout drops the same; scale and bias get their
gradient once, with the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlkit import console
from vlkit.data.labels import Labels
from vlkit.data.loading.retrieval_batches import Batch
from vlkit.distributed import SINGLE, World
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.stages import Stage, frozen_depth
from vlkit.training.loop import Part
from vlkit.training.losses import BLOCKWISE, LOSSES, LossName

# Micro-batches of a trained tower that are embedded together in the first pass: their widest layer is smaller than what
# is kept of all layers of one in the second.
AT_ONCE = 4


class Contrast:
    """What the loop calls with every batch.

    Args:
        towers: what embeds.
        loss: of `LOSSES`.
        micro_batch: pictures or texts that are embedded with gradients at a time; None: all.
        world: processes that share every batch. Each embeds its share and tells the others; each then knows the whole
            loss, and its gradient at its own share.

    Attributes:
        largest: of the batches so far, in pictures or texts.
    """

    def __init__(
        self, encoder: DualEncoder, loss: LossName, micro_batch: int | None = None, world: World = SINGLE
    ) -> None:
        self.encoder, self.loss, self.micro_batch, self.world, self.largest = encoder, loss, micro_batch, world, 1

    def __call__(self, batch: Batch) -> torch.Tensor | Iterator[Part]:
        """The mean loss over the batch's pairs, or parts that add up to it."""
        size = max(len(batch.images), len(batch.texts))
        self.largest = max(self.largest, size)
        if self.world.size > 1 or (self.micro_batch is not None and self.micro_batch < size):
            return self._in_parts(batch, self.micro_batch or size)
        images = self.encoder.embed_images(batch.images)
        texts = self.encoder.embed_texts(batch.texts)[batch.text_index.to(images.device)]
        return LOSSES[self.loss](self.encoder.logits(images, texts), batch.labels.rows())

    def halve(self) -> bool:
        """Memory ran out: embed half as many at a time from now on. Returns whether that is less."""
        size = min(self.micro_batch or self.largest, self.largest)
        self.micro_batch = max(1, size // 2)
        if size > 1:
            console.say(f"memory ran out: {self.micro_batch} at a time from now on, contrasted with the whole batch")
        return size > 1

    def _in_parts(self, batch: Batch, size: int) -> Iterator[Part]:
        world, encoder = self.world, self.encoder
        none = torch.zeros((0, encoder.width), device=encoder.device)
        images = _Pass(
            encoder.embed_images, batch.images, size, none, keep_last=True, at_once=_at_once(encoder.image_chain)
        )
        texts = _Pass(encoder.embed_texts, batch.texts, size, none, at_once=_at_once(encoder.text_chain))
        all_images = world.all_gather(images.embedded, len(batch))
        all_texts = world.all_gather(texts.embedded, batch.text_count)
        index = batch.text_index.to(all_images.device)
        logit_parameters = list(encoder.logit_parameters().values())
        cached = cached_gradients(
            self.loss, encoder.logits, all_images, all_texts[index], logit_parameters, batch.labels
        )
        of_texts = torch.zeros_like(all_texts).index_add_(0, index, cached.texts)
        # Every process knows the whole loss, and the gradient of scale and bias; added up, they must count once.
        once = 1.0 if world.is_main else 0.0
        pairs = zip(logit_parameters, cached.logit_parameters, strict=True)
        yield Part(sum((p * gradient * once for p, gradient in pairs), torch.zeros(())), cached.loss * once)
        yield from images.again(cached.images[world.shard(len(batch))])
        yield from texts.again(of_texts[world.shard(batch.text_count)])


class _Pass:
    """The first pass of one tower, and what it takes to go through it again.

    Where dropout is at work, each slice is embedded by itself, from a random state that is remembered.
    """

    def __init__(
        self,
        embed: Callable[[Any], torch.Tensor],
        inputs: Any,
        size: int,
        empty: Any,
        *,
        keep_last: bool = False,
        at_once: int = AT_ONCE,
    ) -> None:
        """Embed.

        Args:
            inputs: may be none at all: a process' share of a small batch.
            size: of a slice.
            keep_last: keep the last slice's graph, which then need not be embedded again. An only slice's always is.
            at_once: slices that may be embedded together.
        """
        self.embed, self.inputs, self.at_once, self.states = embed, inputs, at_once, list[list[torch.Tensor]]()
        self.slices = [slice(start, start + size) for start in range(0, len(inputs), max(1, size))]
        kept = self.slices[-1:] if keep_last or len(self.slices) == 1 else []
        self.slices, self.last = self.slices[: len(self.slices) - len(kept)], kept[0] if kept else None
        with torch.no_grad():
            found = list(self._without_gradients())
        # Weights that were cast to 16 bits for it have no gradient, and must not be taken again.
        torch.clear_autocast_cache()
        self.kept = None if self.last is None else embed(inputs[self.last])
        found += [] if self.kept is None else [self.kept.detach()]
        self.embedded = torch.cat(found) if found else empty

    def _without_gradients(self) -> Iterator[torch.Tensor]:
        at = 0
        while at < len(self.slices):
            state = _random_state()
            # If the first slice drew no random number, none does.
            alone = at == 0 or not _same(self.states[0], state)
            some = self.slices[at : at + (1 if alone else self.at_once)]
            self.states += [state] * len(some)
            yield self.embed(self.inputs[some[0].start : some[-1].stop])
            at += len(some)

    def again(self, gradient: torch.Tensor) -> Iterator[Part]:
        """Parts whose gradients are those of the loss; none where nothing of this tower is trained."""
        nothing, after = gradient.new_zeros(()), _random_state()
        if self.kept is not None:
            if not self.kept.requires_grad:
                return
            yield Part((self.kept * gradient[self.last]).sum(), nothing)
            self.kept = None
        for part, state in zip(self.slices, self.states, strict=True):
            _set_random_state(state)
            embedded = self.embed(self.inputs[part])
            if not embedded.requires_grad:
                break
            yield Part((embedded * gradient[part]).sum(), nothing)
        _set_random_state(after)


def _at_once(chain: Sequence[Stage]) -> int:
    """Nothing is ever kept of a frozen tower: its micro-batches are all that it takes memory for."""
    return AT_ONCE if frozen_depth(chain) < len(chain) else 1


@dataclass(frozen=True)
class Cached:
    """A loss and its gradients.

    Attributes:
        images, texts: of the shape of the embeddings.
        logit_parameters: in their order.
    """

    loss: torch.Tensor
    images: torch.Tensor
    texts: torch.Tensor
    logit_parameters: list[torch.Tensor]


def cached_gradients(
    loss: LossName,
    logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    texts: torch.Tensor,
    logit_parameters: list[torch.nn.Parameter],
    labels: Labels,
    *,
    rows: int = 512,
) -> Cached:
    """The loss of all pairs and its gradients, by blocks of rows: no matrix of all images and texts is ever held.

    Args:
        images, texts: float32 [images, width] and [texts, width]; gradients up to them only.
        logits: (images, texts) -> logits, with the parameters of `logit_parameters`.
        rows: of a block.
    """
    blockwise = BLOCKWISE[loss](labels, [slice(start, start + rows) for start in range(0, len(images), rows)])
    if blockwise.needs_columns:
        with torch.no_grad():
            for block in blockwise.blocks:
                blockwise.see(logits(images[block], texts), block)
    texts = texts.detach().requires_grad_()
    of_images, of_texts = torch.empty_like(images), torch.zeros_like(texts)
    of_parameters = [torch.zeros_like(p) for p in logit_parameters]
    total = images.new_zeros(())
    for block in blockwise.blocks:
        some = images[block].detach().requires_grad_()
        with torch.enable_grad():
            surrogate, value = blockwise.loss(logits(some, texts), block)
        found = torch.autograd.grad(surrogate, [some, texts, *logit_parameters])
        of_images[block] = found[0]
        of_texts += found[1]
        for kept, gradient in zip(of_parameters, found[2:], strict=True):
            kept += gradient
        total += value
    return Cached(total, of_images, of_texts, of_parameters)


def _random_state() -> list[torch.Tensor]:
    """Of the CPU's generator and, where there is one, of the GPU's."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
