"""Contrastive losses: (logits, labels) -> scalar, in float32 at least.

Labels are those of `vlkit.data.labels.label_matrix`: +1 pulls, -1 pushes, 0 is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from vlkit.data.labels import Labels

LossName = Literal["sigmoid", "softmax"]


def sigmoid_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Ask of every pair whether it matches (SigLIP, arXiv 2303.15343, with any number of positives a row).

    Args:
        logits: [images, texts], scale * cosine + bias.
        labels: [images, texts] of +1, -1, 0.

    Returns:
        Scalar: sum of -logsigmoid(label * logit) over non-zero labels, divided by the number of image rows.
    """
    logits, labels = _to_float32(logits, labels)
    return -(F.logsigmoid(labels * logits) * labels.abs()).sum() / len(logits)


def softmax_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Classify each image's texts among all, and each text's images (CLIP's InfoNCE, arXiv 2103.00020).

    With several positives the target is spread evenly over them, as in SupCon's outer sum (arXiv 2004.11362).

    Args:
        logits: [images, texts], scale * cosine.
        labels: [images, texts] of +1, -1, 0; zeros leave the denominator.

    Returns:
        Scalar: mean of the two directions, each a mean over the rows that have a positive.
    """
    logits, labels = _to_float32(logits, labels)
    return (_spread_cross_entropy(logits, labels) + _spread_cross_entropy(logits.T, labels.T)) / 2


def _to_float32(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert both to float32 (float64 stays): a half-precision sum over thousands of pairs is too coarse."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, labels.to(logits)


def _spread_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    positive = labels > 0
    log_share = logits.masked_fill(labels == 0, -torch.inf).log_softmax(dim=1)
    # Where a label is 0 the log is -inf: not a target, and 0 * -inf must not become NaN.
    per_row = -(log_share.masked_fill(~positive, 0.0)).sum(1) / positive.sum(1).clamp(min=1)
    rows = positive.any(1)
    return per_row[rows].sum() / rows.sum().clamp(min=1)


LOSSES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}


class BlockwiseSigmoid:
    """`sigmoid_loss` by blocks of rows, independent of each other.

    Args:
        labels: of all images and texts.
        blocks: slices of the images.
    """

    needs_columns = False

    def __init__(self, labels: Labels, blocks: Sequence[slice]) -> None:
        self.labels, self.blocks = labels, blocks

    def see(self, logits: torch.Tensor, block: slice) -> None:
        """Do nothing: a block needs no other."""

    def loss(self, logits: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what to differentiate, and the value: the block's share of the loss.

        Args:
            logits: [images of the block, texts].
        """
        logits, labels = _to_float32(logits, _rows_of(self.labels, block).to(logits.device))
        share = -(F.logsigmoid(labels * logits) * labels.abs()).sum() / self.labels.shape[0]
        return share, share.detach()


class BlockwiseSoftmax:
    """`softmax_loss` by blocks of rows. A text's images lie in many blocks: call `see` on all of them, then `loss`.

    Attributes:
        total: float [texts], log of the sum of exp(logit) over the images that a text is compared with.
        positives: float [texts], the number of matching images.
    """

    needs_columns = True

    def __init__(self, labels: Labels, blocks: Sequence[slice]) -> None:
        self.labels, self.blocks = labels, blocks
        self.total: torch.Tensor | None = None
        self.rows = 0

    def see(self, logits: torch.Tensor, block: slice) -> None:
        """Add a block to the columns' denominators."""
        logits, labels = _to_float32(logits, _rows_of(self.labels, block).to(logits.device))
        total = logits.masked_fill(labels == 0, -torch.inf).logsumexp(0)
        positives = (labels > 0).sum(0)
        self.rows += int((labels > 0).any(1).sum())
        if self.total is None:
            self.total, self.positives = total, positives
        else:
            self.total, self.positives = torch.logaddexp(self.total, total), self.positives + positives

    def loss(self, logits: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what to differentiate, and the value: the block's share of the loss.

        A column's log-sum-exp comes from `see`, not from the block; the surrogate has its derivative, the softmax.

        Args:
            logits: [images of the block, texts].
        """
        assert self.total is not None, "call see on every block first"
        logits, labels = _to_float32(logits, _rows_of(self.labels, block).to(logits.device))
        has_positive = (labels > 0).any(1)
        by_rows = _spread_cross_entropy(logits, labels) * has_positive.sum() / max(1, self.rows)
        has_image = self.positives > 0
        columns = has_image.sum().clamp(min=1)
        target = (labels > 0).to(logits.dtype) / self.positives.clamp(min=1)
        by_columns = -(logits * target).sum() / columns
        share = (logits.detach() - self.total).exp().masked_fill((labels == 0) | ~has_image, 0.0)
        # Each block adds its share of the denominators' values; all blocks add up to the whole.
        value = by_columns.detach() + self.total[has_image].sum() / columns * (len(logits) / self.labels.shape[0])
        surrogate = (by_rows + by_columns + (logits * share).sum() / columns) / 2
        return surrogate, (by_rows.detach() + value) / 2


def _rows_of(labels: Labels, block: slice) -> torch.Tensor:
    return labels.rows(block.start, min(block.stop, labels.shape[0]))


class BlockwiseLoss(Protocol):
    """A loss by blocks of rows. With `needs_columns`, `see` is called on every block before `loss`."""

    needs_columns: bool
    blocks: Sequence[slice]

    def __init__(self, labels: Labels, blocks: Sequence[slice]) -> None: ...

    def see(self, logits: torch.Tensor, block: slice) -> None:
        """Add a block to what the columns need."""

    def loss(self, logits: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what to differentiate, and the value."""


BLOCKWISE: dict[LossName, type[BlockwiseLoss]] = {"sigmoid": BlockwiseSigmoid, "softmax": BlockwiseSoftmax}
