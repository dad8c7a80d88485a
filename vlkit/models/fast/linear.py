"""Matrix products in float32 on a CPU, by oneDNN.

torch leaves them to MKL, which on AMD processors uses half of the AVX-512 width, where oneDNN uses all of it: twice the
rate on a Zen 5, hardly more on a Zen 4, whose units have only that half. `tests/benchmarks/training.py` measures it on
other machines. Products in bf16 are oneDNN's anyway, and small ones are left to torch, whose call costs less.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlkit.models import fast

# Elements of a weight below which a product's time is that of the call, at the sizes that such small models are used
# at. The weight alone decides: if the rows did, too, a row's result would depend on how many are beside it.
SMALL_WEIGHT = 100_000


def onednn() -> bool:
    """Return whether products are oneDNN's: on a CPU with AVX-512, unless torch.backends.mkldnn is switched off."""
    return _onednn_works() and bool(torch.backends.mkldnn.enabled) and fast.enabled()


@cache
def _onednn_works() -> bool:
    # What torch.compile makes of a linear layer; there is no public call.
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return has and torch.backends.cpu.get_cpu_capability() == "AVX512"


def matmul_t(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return left @ right.T + bias, of matrices [rows, inner] and [columns, inner], without a gradient."""
    if left.device.type == "cpu" and left.dtype == torch.float32 and onednn():
        with torch.no_grad():
            return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(left, right, bias)


def linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return what torch.nn.functional.linear returns, gradients and autocast included."""
    if not _is_faster(values, weight):
        return F.linear(values, weight, bias)
    # Rows that lie apart, as one position of every item does, send oneDNN to a kernel a thousand times slower.
    rows = values.reshape(-1, values.shape[-1]).contiguous()
    result: torch.Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return result.view(*values.shape[:-1], -1)


def _is_faster(values: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a call of oneDNN is faster. The first question is the one that most calls end with."""
    if weight.numel() < SMALL_WEIGHT or torch.is_autocast_enabled("cpu"):
        return False
    is_float32 = values.numel() > 0 and values.dtype == weight.dtype == torch.float32
    return is_float32 and values.device.type == "cpu" and onednn()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(values, weight)
        return matmul_t(values, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        for_values, for_weight, for_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            matmul_t(gradient, weight.t()) if for_values else None,
            matmul_t(gradient.t(), values.t()) if for_weight else None,
            gradient.sum(0) if for_bias else None,
        )


class Linear(nn.Linear):
    """torch's linear layer, multiplied by oneDNN where that is available and faster."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map [..., in features] to [..., out features]."""
        return linear(values, self.weight, self.bias)
