"""Texts end to end instead of padded: the layers of a causal tower then work on what is text alone.

Everything but attention treats positions one by one. For attention, queries, keys and values are laid out padded again;
what stands behind a text's end is looked at by no position of the text. So the numbers are those of the padded batch
(but LoRA's dropout draws others: one for each position that is there).

A little of the padding is kept, to bring the number of tokens to one that occurs often: for every new one oneDNN makes
kernels, and keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Of positions that are padding from which on leaving them out pays for moving the rest.
WORTH = 0.05
# Of the number of tokens, the bits that are told apart.
FINE = 5


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the positions of some texts are.

    Attributes:
        ends: int64 [texts], the last position of each text.
        flat: int64 [tokens], where each token is among the texts' padded positions, one after the other. The padding
            that is kept counts as tokens.
        place: int64 [texts x length], which token stands at each of these; where none does, the one before.
        last: int64 [texts], which token is the last of each text.
    """

    ends: torch.Tensor
    flat: torch.Tensor
    place: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, ends: torch.Tensor, length: int) -> Packing | None:
        """Of texts that are padded to a length; None where little of it is padding."""
        tokens = int((ends + 1).sum())
        rounded = _rounded(tokens)
        if rounded >= (1 - WORTH) * len(ends) * length:
            return None
        at = torch.arange(length, device=ends.device)
        kept = (at <= ends[:, None]).flatten()
        behind = (~kept).nonzero()[:, 0]
        kept[behind[: rounded - tokens]] = True
        place = kept.cumsum(0) - 1
        last = ends + length * torch.arange(len(ends), device=ends.device)
        return cls(ends, kept.nonzero()[:, 0], place, place[last])

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[texts, length, ...] -> [1, tokens, ...]."""
        return _Packed.apply(padded.flatten(0, 1), self.flat)[None]  # type: ignore[no-any-return]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, tokens, ...] -> [texts, length, ...]; behind a text's end stands what nobody may use."""
        found = _Unpacked.apply(packed[0], self.place, self.flat)
        return found.unflatten(0, (len(self.ends), -1))  # type: ignore[no-any-return]


class _Packed(torch.autograd.Function):
    """Some rows, none of them twice: a gradient is copied to its place, where torch would add it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(flat)
        ctx.rows = len(rows)
        return rows.index_select(0, flat)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (flat,) = ctx.saved_tensors
        return gradient.new_zeros((ctx.rows, *gradient.shape[1:])).index_copy_(0, flat, gradient), None


class _Unpacked(torch.autograd.Function):
    """Some rows, of which one may stand many times: in its own place, whose gradient it gets, and behind texts' ends.

    Nobody looks there, so that no gradient comes from there, and none is added up.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, place: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(flat)
        return rows.index_select(0, place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (flat,) = ctx.saved_tensors
        return gradient.index_select(0, flat), None, None


def _rounded(tokens: int) -> int:
    """Up, by a sixteenth at most."""
    step = 2 ** max(0, tokens.bit_length() - FINE)
    return -(-tokens // step) * step
