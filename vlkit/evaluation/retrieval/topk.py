"""The items ranked first; of equal scores, the one that stands first in the gallery: so no block size shows."""

from __future__ import annotations

import torch

from vlkit.evaluation.retrieval.average_precision import count_compared

LOW = 2**32 - 1


def top_items(scores: torch.Tensor, keep: int, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest of each row of float32 scores [queries, items]: scores and int64 items, [queries, keep].

    Args:
        keep: at least 1, at most all.
        spare: memory as large as the scores.
    """
    values, items = scores.topk(keep, dim=1)
    # Where more are equal than there is room for, topk takes any.
    tied = torch.nonzero(count_compared(torch.ge, scores, values.amin(1), spare) > keep)[:, 0]
    if len(tied):
        items[tied] = items_of(
            ranking_keys(scores[tied], torch.arange(scores.shape[1], device=scores.device)).topk(keep)[0]
        )
    return values, items


def ranking_keys(scores: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """int64: a float32 score and its item as one number, the larger the earlier it is ranked."""
    # Added to zero, -0.0 is 0.0. The bits of floats are in order, but for negative ones, which run the other way.
    return (_turned((scores + 0.0).view(torch.int32)).long() << 32) | (LOW - items)


def items_of(keys: torch.Tensor) -> torch.Tensor:
    """int64: the items of `ranking_keys`."""
    return LOW - (keys & LOW)


def scores_of(keys: torch.Tensor) -> torch.Tensor:
    """float32: the scores of `ranking_keys`."""
    return _turned((keys >> 32).int()).view(torch.float32)


def _turned(bits: torch.Tensor) -> torch.Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
