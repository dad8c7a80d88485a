"""Contrastive losses: (logits, labels) -> scalar, in float32 at least.

Labels are those of `vlkit.data.labels.label_matrix`: +1 pulls, -1 pushes, 0 is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from vlkit.data.labels import Labels

LossName = Literal["sigmoid", "softmax"]


def sigmoid_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Every pair is its own yes-or-no question (SigLIP, arXiv 2303.15343, with more than one positive a row).

    Args:
        logits: [images, texts], scale * cosine + bias.
        labels: [images, texts] of +1, -1, 0.

    Returns:
        Scalar: sum of -logsigmoid(label * logit) over non-zero labels, divided by the number of image rows.
    """
    logits, labels = _wide(logits, labels)
    return -(F.logsigmoid(labels * logits) * labels.abs()).sum() / len(logits)


def softmax_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each picture picks its texts among all, each text its pictures (CLIP's InfoNCE, arXiv 2103.00020; with several
    positives the target is spread evenly over them, as in SupCon's outer sum, arXiv 2004.11362).

    Args:
        logits: [images, texts], scale * cosine.
        labels: [images, texts] of +1, -1, 0; zeros leave the denominator.

    Returns:
        Scalar: mean of the two directions, each a mean over the rows that have a positive.
    """
    logits, labels = _wide(logits, labels)
    return (_spread_cross_entropy(logits, labels) + _spread_cross_entropy(logits.T, labels.T)) / 2


def _wide(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float32 (float64 stays): a half-precision sum over thousands of pairs is no loss."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, labels.to(logits)


def _spread_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    positive = labels > 0
    log_share = logits.masked_fill(labels == 0, -torch.inf).log_softmax(dim=1)
    # Where a label is 0 the log is -inf; it is no target, and 0 * -inf must not become NaN.
    per_row = -(log_share.masked_fill(~positive, 0.0)).sum(1) / positive.sum(1).clamp(min=1)
    rows = positive.any(1)
    return per_row[rows].sum() / rows.sum().clamp(min=1)


LOSSES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}


class BlockwiseSigmoid:
    """`sigmoid_loss` by blocks of rows, which know nothing of each other.

    Args:
        labels: of all images and texts.
        blocks: slices of the images.
    """

    needs_columns = False

    def __init__(self, labels: Labels, blocks: Sequence[slice]) -> None:
        self.labels, self.blocks = labels, blocks

    def loss(self, logits: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """What to differentiate, and the value: the block's share of the loss.

        Args:
            logits: [images of the block, texts].
        """
        logits, labels = _wide(logits, _rows_of(self.labels, block).to(logits.device))
        share = -(F.logsigmoid(labels * logits) * labels.abs()).sum() / self.labels.shape[0]
        return share, share.detach()


class BlockwiseSoftmax:
    """`softmax_loss` by blocks of rows. A text's pictures lie in many blocks: `see` all of them first, then `loss`.

    Attributes:
        total: float [texts], log of the sum of exp(logit) over the pictures that a text is compared with.
        positives: float [texts], its matching pictures.
    """

    needs_columns = True

    def __init__(self, labels: Labels, blocks: Sequence[slice]) -> None:
        self.labels, self.blocks = labels, blocks
        self.total: torch.Tensor | None = None
        self.rows = 0

    def see(self, logits: torch.Tensor, block: slice) -> None:
        """A block of the columns' denominators."""
        logits, labels = _wide(logits, _rows_of(self.labels, block).to(logits.device))
        total = logits.masked_fill(labels == 0, -torch.inf).logsumexp(0)
        positives = (labels > 0).sum(0)
        self.rows += int((labels > 0).any(1).sum())
        if self.total is None:
            self.total, self.positives = total, positives
        else:
            self.total, self.positives = torch.logaddexp(self.total, total), self.positives + positives

    def loss(self, logits: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """What to differentiate, and the value: the block's share of the loss.

        A column's log-sum-exp is known, not computed from the block; its derivative, the softmax, stands in for it.

        Args:
            logits: [images of the block, texts].
        """
        assert self.total is not None, "see every block first"
        logits, labels = _wide(logits, _rows_of(self.labels, block).to(logits.device))
        chosen = (labels > 0).any(1)
        by_rows = _spread_cross_entropy(logits, labels) * chosen.sum() / max(1, self.rows)
        asked = self.positives > 0
        columns = asked.sum().clamp(min=1)
        target = (labels > 0).to(logits.dtype) / self.positives.clamp(min=1)
        pulled = -(logits * target).sum() / columns
        share = (logits.detach() - self.total).exp().masked_fill((labels == 0) | ~asked, 0.0)
        # Each block brings its own share of the denominators' values: all of them together, the whole.
        value = pulled.detach() + self.total[asked].sum() / columns * (len(logits) / self.labels.shape[0])
        surrogate = (by_rows + pulled + (logits * share).sum() / columns) / 2
        return surrogate, (by_rows.detach() + value) / 2


def _rows_of(labels: Labels, block: slice) -> torch.Tensor:
    return labels.rows(block.start, min(block.stop, labels.shape[0]))


BLOCKWISE = {"sigmoid": BlockwiseSigmoid, "softmax": BlockwiseSoftmax}
