"""The items ranked first; of equal scores, the earlier in the gallery, so that the block size changes nothing."""

from __future__ import annotations

import torch

from vlkit.evaluation.retrieval.average_precision import count_compared

LOW_BITS = 2**32 - 1


def top_items(scores: torch.Tensor, keep: int, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest of each row of float32 scores [queries, items]: scores and int64 items, [queries, keep].

    Args:
        keep: at least 1, at most all.
        spare: memory as large as the scores.
    """
    values, items = scores.topk(keep, dim=1)
    # Where more scores are equal than `keep` has room for, topk takes any of them.
    tied = torch.nonzero(count_compared(torch.ge, scores, values.amin(1), spare) > keep)[:, 0]
    if len(tied):
        items[tied] = items_of(
            ranking_keys(scores[tied], torch.arange(scores.shape[1], device=scores.device)).topk(keep)[0]
        )
    return values, items


def ranking_keys(scores: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Return a float32 score and its item as one int64, the larger the earlier it is ranked."""
    # Adding zero turns -0.0 into 0.0. The bits of floats are in order, except that negative ones run the other way.
    return (_ordered_bits((scores + 0.0).view(torch.int32)).long() << 32) | (LOW_BITS - items)


def items_of(keys: torch.Tensor) -> torch.Tensor:
    """Return the items of `ranking_keys`, int64."""
    return LOW_BITS - (keys & LOW_BITS)


def scores_of(keys: torch.Tensor) -> torch.Tensor:
    """Return the scores of `ranking_keys`, float32."""
    return _ordered_bits((keys >> 32).int()).view(torch.float32)


def _ordered_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
