"""What transformers' layers compute, with less work: the same numbers but for rounding.

    attention   matrix products instead of the fused kernel, where that is slow (16 bits on a CPU)
    QuickGELU   one kernel forward and one backward, instead of three and five
    layer norm  its rows become 16 bits once, not once for queries, keys and values each
    patches     an image's patches are rows of one matrix product, as they do not overlap
    linear      in float32 by oneDNN, see `linear.py`
    last layer  of an encoder that pools one position: query, output projection and MLP of that position alone

`use_fast_layers` puts all but the last into a model in place; parameters, their names and saved files stay the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlkit.models import fast
from vlkit.models.fast.linear import Linear, linear

# The name that transformers knows `attention` by.
ATTENTION_NAME = "vlkit"
# Scores of a longer sequence no longer fit in the caches, and the fused kernel catches up.
LONGEST_SEQUENCE = 512
QUICK_GELU_FACTOR = 1.702


def use_fast_layers(model: nn.Module, attention_classes: Collection[str] = ()) -> None:
    """Replace layers of an encoder, in place, by ones that compute the same faster; nothing with VLKIT_FAST=off.

    Args:
        attention_classes: names of transformers' classes that call their attention as `attention` expects.
    """
    if not fast.enabled():
        return
    _register_attention()
    for module in list(model.modules()):
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa" and type(module).__name__ in attention_classes:
            config._attn_implementation = ATTENTION_NAME
        activation = getattr(module, "activation_fn", None)
        if type(activation).__name__ == "QuickGELUActivation":
            module.activation_fn = QuickGELU()
        # A module becomes another by its class: its parameters, its hooks and whatever else it carries stay.
        norm = getattr(module, "layer_norm1", None)
        if type(norm) is nn.LayerNorm:
            norm.__class__ = NarrowLayerNorm
        patches = getattr(module, "patch_embedding", None)
        if type(patches) is nn.Conv2d and PatchProjection.fits(patches):
            patches.__class__ = PatchProjection
        if type(module) is nn.Linear:
            module.__class__ = Linear


def _register_attention() -> None:
    """Make the attention known to transformers under its name, with the masks of its own fused one."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Map [items, heads, length, head width], three times, to [items, length, heads, head width], for transformers.

    On a CPU, torch's fused attention takes up to six times as long in 16 bits as the products that it is made of, most
    of it in its backward pass (torch 2.13). Scores are rounded to 16 bits before softmax, as in transformers' eager
    attention; the fused kernel does not round them.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    slow = query.device.type == "cpu" and query.dtype != torch.float32 and query.shape[2] <= LONGEST_SEQUENCE
    if not slow or attention_mask is not None or options.get("dropout"):
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attended, None
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return _attend_by_products(query, key, value, scaling, bool(causal)).transpose(1, 2), None


def _attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool
) -> torch.Tensor:
    items, heads, length, width = query.shape
    queries, keys, values = (tensor.reshape(items * heads, -1, width) for tensor in (query, key, value))
    if causal:
        mask = torch.full((length, keys.shape[1]), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
        scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scaling)
    else:
        scores = torch.baddbmm(queries.new_empty(1), queries, keys.transpose(1, 2), beta=0, alpha=scaling)
    return torch.bmm(scores.softmax(-1), values).view(items, heads, length, width)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), as silu(1.702 x) / 1.702: the two factors cancel in the derivative."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map each element."""
        return _QuickGELU.apply(values)  # type: ignore[no-any-return,no-untyped-call]


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        scaled = values * QUICK_GELU_FACTOR
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / QUICK_GELU_FACTOR)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, scaled)  # type: ignore[no-any-return]


class NarrowLayerNorm(nn.LayerNorm):
    """A layer norm whose result has, under autocast, the type that the products after it want."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Normalise each row."""
        normed, device = super().forward(values), values.device.type
        if values.is_meta or not torch.is_autocast_enabled(device):
            return normed
        return normed.to(torch.get_autocast_dtype(device))


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel: patches side by side, each a row of one matrix product."""

    @staticmethod
    def fits(convolution: nn.Conv2d) -> bool:
        """Return whether patches lie side by side and see all channels, with no padding and no gaps between pixels."""
        side_by_side = convolution.stride == convolution.kernel_size and convolution.padding in ((0, 0), "valid")
        return side_by_side and convolution.groups == 1 and convolution.dilation == (1, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map [images, channels, height, width] to [images, out channels, rows, columns]; a remainder is cut off."""
        height, width = self.kernel_size
        rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
        pixels = pixels[:, :, : rows * height, : columns * width]
        grid = pixels.reshape(*pixels.shape[:2], rows, height, columns, width)
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        projected = linear(patches, self.weight.flatten(1), self.bias)
        return projected.view(len(pixels), rows, columns, self.out_channels).permute(0, 3, 1, 2)


def pooled_layer(layer: nn.Module, values: torch.Tensor, positions: torch.Tensor | int) -> torch.Tensor:
    """Run the last encoder layer of a CLIP or SigLIP for one position of every item: only that one is used afterwards.

    Keys and values are those of all positions; query, output projection and MLP of that one alone. Hooks of the
    projections run, those of the layer and of its attention do not.

    Args:
        layer: transformers' encoder layer, with adapters or without.
        values: [items, length, width].
        positions: int64 [items], which attend to what comes before them only; or one position of all items, which
            attends to everything.

    Returns:
        [items, width].
    """
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return layer._gradient_checkpointing_func(_pooled_layer, layer, values, positions)  # type: ignore[no-any-return,operator]
    return _pooled_layer(layer, values, positions)


def _pooled_layer(layer: Any, values: torch.Tensor, positions: torch.Tensor | int) -> torch.Tensor:
    attention, normed = layer.self_attn, layer.layer_norm1(values)
    items, length, width = values.shape
    by_head = (items, -1, attention.num_heads, attention.head_dim)
    query, key, value = (
        projected.view(by_head).transpose(1, 2)
        for projected in (
            attention.q_proj(select_positions(normed, positions)),
            attention.k_proj(normed),
            attention.v_proj(normed),
        )
    )
    scores = (query @ key.transpose(2, 3)).float() * attention.scale  # [items, heads, 1, length]
    if not isinstance(positions, int):
        later = torch.arange(length, device=values.device) > positions.to(values.device)[:, None]
        scores = scores.masked_fill(later[:, None, None], -torch.inf)
    weights = F.dropout(scores.softmax(-1), attention.dropout, attention.training).to(value.dtype)
    states = select_positions(values, positions) + attention.out_proj((weights @ value).reshape(items, width))
    return states + layer.mlp(layer.layer_norm2(states))  # type: ignore[no-any-return]


def select_positions(values: torch.Tensor, positions: torch.Tensor | int) -> torch.Tensor:
    """Return one position of every item: values [items, length, width] -> [items, width].

    Args:
        positions: int64 [items], or the same one for all items.
    """
    if isinstance(positions, int):
        return values[:, positions].contiguous()  # Rows that lie apart are slow to multiply.
    return values[torch.arange(len(values), device=values.device), positions.to(values.device)]
