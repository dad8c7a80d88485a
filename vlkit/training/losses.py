"""Contrastive losses: (logits, labels) -> scalar, in float32 at least.

Labels are those of `vlkit.data.labels.label_matrix`: +1 pulls, -1 pushes, 0 is left alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
