"""The contrastive loss of a batch: embedded at once, or in micro-batches with the same result.

Two passes (gradient caching, arXiv 2101.06983): embed everything without gradients; compute the loss and its gradient
with respect to the embeddings; embed again, one micro-batch at a time, and backpropagate each one's part of that
gradient. The last micro-batch of images keeps its graph and is embedded once. Every pair is contrasted with the whole
batch, in the memory of a micro-batch. The second pass replays the random state of the first, so dropout drops the same
units; scale and bias get their gradient once, with the loss.
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

# Micro-batches of a trained tower that the first pass embeds together: without gradients their widest layer takes less
# memory than all layers of one micro-batch in the second pass.
MICRO_BATCHES_AT_ONCE = 4
# Rows of the logit matrix that are computed at a time.
BLOCK_ROWS = 512


class ContrastiveLoss:
    """The objective of train-retrieval.

    Args:
        loss: a name of `LOSSES`.
        micro_batch: images or texts embedded with gradients at a time; None: all.
        world: processes that share every batch. Each embeds its share and sends the embeddings to the others; each then
            computes the whole loss, and the gradient of its own share.

    Attributes:
        largest: images or texts of the largest batch so far.
    """

    def __init__(
        self, encoder: DualEncoder, loss: LossName, micro_batch: int | None = None, world: World = SINGLE
    ) -> None:
        self.encoder, self.loss, self.micro_batch, self.world, self.largest = encoder, loss, micro_batch, world, 1

    def __call__(self, batch: Batch) -> torch.Tensor | Iterator[Part]:
        """Return the mean loss over the batch's pairs, a float32 scalar, or parts that add up to it."""
        size = max(len(batch.images), len(batch.texts))
        self.largest = max(self.largest, size)
        if self.world.size > 1 or (self.micro_batch is not None and self.micro_batch < size):
            return self._in_parts(batch, self.micro_batch or size)
        images = self.encoder.embed_images(batch.images)
        texts = self.encoder.embed_texts(batch.texts)[batch.text_index.to(images.device)]
        return LOSSES[self.loss](self.encoder.logits(images, texts), batch.labels.rows())

    def reduce_micro_batch(self) -> bool:
        """Halve the micro-batch after memory ran out. Return False where it is 1 already."""
        size = min(self.micro_batch or self.largest, self.largest)
        self.micro_batch = max(1, size // 2)
        if size > 1:
            console.say(f"out of memory: --micro-batch is {self.micro_batch} from now on; the result is the same")
        return size > 1

    def _in_parts(self, batch: Batch, size: int) -> Iterator[Part]:
        world, encoder = self.world, self.encoder
        empty = torch.zeros((0, encoder.width), device=encoder.device)
        images = TwoPassEncoder(
            encoder.embed_images,
            batch.images,
            size,
            empty,
            keep_last=True,
            at_once=_micro_batches_at_once(encoder.image_chain),
        )
        texts = TwoPassEncoder(
            encoder.embed_texts, batch.texts, size, empty, at_once=_micro_batches_at_once(encoder.text_chain)
        )
        all_images = world.all_gather(images.embeddings, len(batch))
        all_texts = world.all_gather(texts.embeddings, batch.text_count)
        index = batch.text_index.to(all_images.device)
        logit_parameters = list(encoder.logit_parameters().values())
        result = loss_and_embedding_gradients(
            self.loss, encoder.logits, all_images, all_texts[index], logit_parameters, batch.labels
        )
        # A text that stands in several pairs was encoded once: its gradients add up.
        text_gradients = torch.zeros_like(all_texts).index_add_(0, index, result.texts)
        # Every rank knows the whole loss and the gradient of scale and bias; the sum over ranks must count them once.
        once = 1.0 if world.is_main else 0.0
        pairs = zip(logit_parameters, result.logit_parameters, strict=True)
        yield Part(sum((p * gradient * once for p, gradient in pairs), torch.zeros(())), result.loss * once)
        yield from images.second_pass(result.images[world.shard(len(batch))])
        yield from texts.second_pass(text_gradients[world.shard(batch.text_count)])


class TwoPassEncoder:
    """One tower's inputs, embedded without gradients first, and again with them.

    Where dropout draws random numbers, each micro-batch is embedded alone, and its random state is kept for the second
    pass.

    Attributes:
        embeddings: float32 [inputs, width], of the first pass.
    """

    def __init__(
        self,
        embed: Callable[[Any], torch.Tensor],
        inputs: Any,
        size: int,
        empty: torch.Tensor,
        *,
        keep_last: bool = False,
        at_once: int = MICRO_BATCHES_AT_ONCE,
    ) -> None:
        """Run the first pass.

        Args:
            inputs: pixels or token ids [inputs, ...]; none where a process has no share of a small batch.
            size: of a micro-batch.
            empty: the embeddings where there are no inputs.
            keep_last: keep the graph of the last micro-batch, which is then embedded once. An only one is always kept.
            at_once: micro-batches that may be embedded together.
        """
        self.embed, self.inputs, self.at_once = embed, inputs, at_once
        slices = [slice(start, start + size) for start in range(0, len(inputs), max(1, size))]
        keep_last = bool(slices) and (keep_last or len(slices) == 1)
        self.slices = slices[:-1] if keep_last else slices
        self.last_slice = slices[-1] if keep_last else None
        self.random_states: list[list[torch.Tensor]] = []
        with torch.no_grad():
            blocks = list(self._first_pass())
        # Weights cast to 16 bits under no_grad carry no gradient, and must not be reused.
        torch.clear_autocast_cache()
        self.last_embeddings = None if self.last_slice is None else embed(inputs[self.last_slice])
        if self.last_embeddings is not None:
            blocks.append(self.last_embeddings.detach())
        self.embeddings = torch.cat(blocks) if blocks else empty

    def _first_pass(self) -> Iterator[torch.Tensor]:
        position = 0
        while position < len(self.slices):
            state = _random_state()
            # If the first micro-batch drew no random number, none does.
            alone = position == 0 or not _same_state(self.random_states[0], state)
            chunk = self.slices[position : position + (1 if alone else self.at_once)]
            self.random_states += [state] * len(chunk)
            yield self.embed(self.inputs[chunk[0].start : chunk[-1].stop])
            position += len(chunk)

    def second_pass(self, gradient: torch.Tensor) -> Iterator[Part]:
        """Yield parts whose gradients are those of the loss; none where nothing of this tower is trained.

        Args:
            gradient: of the loss with respect to `embeddings`, [inputs, width].
        """
        zero, state_after = gradient.new_zeros(()), _random_state()
        if self.last_embeddings is not None:
            if not self.last_embeddings.requires_grad:
                return
            yield Part((self.last_embeddings * gradient[self.last_slice]).sum(), zero)
            self.last_embeddings = None
        for chunk, state in zip(self.slices, self.random_states, strict=True):
            _set_random_state(state)
            embeddings = self.embed(self.inputs[chunk])
            if not embeddings.requires_grad:
                break
            yield Part((embeddings * gradient[chunk]).sum(), zero)
        _set_random_state(state_after)


def _micro_batches_at_once(chain: Sequence[Stage]) -> int:
    """Return how many micro-batches the first pass embeds together: 1 of a frozen tower, whose peak is the first."""
    return MICRO_BATCHES_AT_ONCE if frozen_depth(chain) < len(chain) else 1


@dataclass(frozen=True)
class LossAndGradients:
    """A loss and its gradients.

    Attributes:
        loss: a scalar.
        images, texts: gradients, [images, width] and [texts, width].
        logit_parameters: gradients, in the parameters' order.
    """

    loss: torch.Tensor
    images: torch.Tensor
    texts: torch.Tensor
    logit_parameters: list[torch.Tensor]


def loss_and_embedding_gradients(
    loss: LossName,
    logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    texts: torch.Tensor,
    logit_parameters: list[torch.nn.Parameter],
    labels: Labels,
    *,
    block_rows: int = BLOCK_ROWS,
) -> LossAndGradients:
    """Compute the loss of all pairs and its gradients by blocks of rows, without the matrix of all logits.

    Args:
        images, texts: float32 [images, width] and [texts, width]; gradients stop there.
        logits: (images, texts) -> logits, a function of `logit_parameters` too.
        block_rows: images of a block.
    """
    starts = range(0, len(images), block_rows)
    blockwise = BLOCKWISE[loss](labels, [slice(start, start + block_rows) for start in starts])
    if blockwise.needs_columns:
        with torch.no_grad():
            for block in blockwise.blocks:
                blockwise.see(logits(images[block], texts), block)
    texts = texts.detach().requires_grad_()
    image_gradients, text_gradients = torch.empty_like(images), torch.zeros_like(texts)
    parameter_gradients = [torch.zeros_like(p) for p in logit_parameters]
    total = images.new_zeros(())
    for block in blockwise.blocks:
        block_images = images[block].detach().requires_grad_()
        with torch.enable_grad():
            surrogate, value = blockwise.loss(logits(block_images, texts), block)
        gradients = torch.autograd.grad(surrogate, [block_images, texts, *logit_parameters])
        image_gradients[block] = gradients[0]
        text_gradients += gradients[1]
        for accumulated, gradient in zip(parameter_gradients, gradients[2:], strict=True):
            accumulated += gradient
        total += value
    return LossAndGradients(total, image_gradients, text_gradients, parameter_gradients)


def _random_state() -> list[torch.Tensor]:
    """Return the state of the CPU's generator and of the GPU's, if there is one."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _same_state(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
