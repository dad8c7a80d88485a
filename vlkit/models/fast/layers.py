"""What transformers' layers compute, with less work: the same numbers but for rounding.

    attention   matrix products instead of the fused kernel, where that is slow (16 bits on a CPU)
    QuickGELU   one kernel forward and one backward, instead of three and five
    layer norm  its rows become 16 bits once, not once for queries, keys and values each
    patches     a picture's patches are rows of one matrix product, as they do not overlap
    padding     texts of a CLIP stand end to end, but for attention, see `packing.py`
    linear      in float32 by oneDNN, see `products.py`
    the last layer   of a tower that pools one position: only that position is asked, and goes through the MLP

`use_fast_layers` puts them into a model in place; parameters, their names and what is saved stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlkit.models.fast.linear import Linear, linear
from vlkit.models.fast.packing import Packing

NAME = "vlkit"
# Scores of a longer sequence no longer fit in the caches, and the fused kernel catches up.
LONGEST = 512
QUICK = 1.702


def use_fast_layers(model: nn.Module) -> None:
    """Let a CLIP's or SigLIP's towers, or one of them, take the shorter ways."""
    _register()
    for module in list(model.modules()):
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa" and type(module).__name__ in KNOWN:
            config._attn_implementation = NAME
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


# Attention that is called as `attention` expects.
KNOWN = ("CLIPAttention", "SiglipAttention", "Siglip2Attention")


def _register() -> None:
    """Make the attention known to transformers under its name, with the masks of its own fused one."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: [items, heads, length, head width] three times -> [items, length, heads, head width].

    Texts that stand end to end are one item, and come with their packing.

    On a CPU, torch's fused attention takes up to six times as long in 16 bits as the products that it is made of, most
    of it in its backward pass (torch 2.13). Scores are rounded to 16 bits before softmax, as in transformers' eager
    attention; the fused kernel does not round them.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is not None:
        padded = (packing.unpack(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value))
        return packing.pack(attention(module, *padded, attention_mask, **options)[0]), None
    slow = query.device.type == "cpu" and query.dtype != torch.float32 and query.shape[2] <= LONGEST
    if not slow or attention_mask is not None or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return _by_products(query, key, value, scaling, bool(causal)).transpose(1, 2), None


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool
) -> torch.Tensor:
    items, heads, length, width = query.shape
    rows, keys, values = (each.reshape(items * heads, -1, width) for each in (query, key, value))
    if causal:
        ahead = torch.full((length, keys.shape[1]), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
        scores = torch.baddbmm(ahead, rows, keys.transpose(1, 2), alpha=scaling)
    else:
        scores = torch.baddbmm(rows.new_empty(1), rows, keys.transpose(1, 2), beta=0, alpha=scaling)
    return torch.bmm(scores.softmax(-1), values).view(items, heads, length, width)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), as silu(1.702 x) / 1.702: the two factors cancel in the derivative."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Element by element."""
        return _QuickGELU.apply(values)  # type: ignore[no-any-return]


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        scaled = values * QUICK
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / QUICK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, scaled)  # type: ignore[no-any-return]


class NarrowLayerNorm(nn.LayerNorm):
    """Under autocast its result has the type that the products after it want."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Each row normalised."""
        found, kind = super().forward(values), values.device.type
        if values.is_meta or not torch.is_autocast_enabled(kind):
            return found
        return found.to(torch.get_autocast_dtype(kind))


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel: patches side by side, each a row of one matrix product."""

    @staticmethod
    def fits(convolution: nn.Conv2d) -> bool:
        """Its patches lie side by side, each sees all channels and nothing lies around or between its pixels."""
        side_by_side = convolution.stride == convolution.kernel_size and convolution.padding in ((0, 0), "valid")
        return side_by_side and convolution.groups == 1 and convolution.dilation == (1, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[pictures, channels, height, width] -> [pictures, out channels, rows, columns]; what is left over is cut."""
        down, across = self.kernel_size
        rows, columns = pixels.shape[2] // down, pixels.shape[3] // across
        pixels = pixels[:, :, : rows * down, : columns * across]
        cut = pixels.unflatten(3, (columns, across)).unflatten(2, (rows, down))
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        found = linear(patches, self.weight.flatten(1), self.bias)
        return found.view(len(pixels), rows, columns, self.out_channels).permute(0, 3, 1, 2)


def pooled_layer(layer: nn.Module, values: torch.Tensor, ends: torch.Tensor | Packing | int) -> torch.Tensor:
    """The last encoder layer of a CLIP or SigLIP for one position of every item: only that one is used afterwards.

    Keys and values are those of all positions; query, output projection and MLP of that one alone. Hooks of the
    projections run, those of the layer and of its attention do not.

    Args:
        layer: transformers' encoder layer, with adapters or without.
        values: [items, length, width]; packed [1, tokens, width].
        ends: int64 [items], the positions, and those behind are not looked at, or the packing of texts that end there;
            or one position of all items, which looks at everything.

    Returns:
        [items, width].
    """
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return layer._gradient_checkpointing_func(_pooled, layer, values, ends)  # type: ignore[no-any-return,operator]
    return _pooled(layer, values, ends)


def _pooled(layer: Any, values: torch.Tensor, ends: torch.Tensor | Packing | int) -> torch.Tensor:
    attended, normed = layer.self_attn, layer.layer_norm1(values)
    query = attended.q_proj(_one(normed, ends))
    key, value = attended.k_proj(normed), attended.v_proj(normed)
    if isinstance(ends, Packing):
        key, value = ends.unpack(key), ends.unpack(value)
    items, length, width = key.shape
    heads = (items, -1, attended.num_heads, attended.head_dim)
    query, key, value = (each.view(heads).transpose(1, 2) for each in (query, key, value))
    scores = (query @ key.transpose(2, 3)).float() * attended.scale  # [items, heads, 1, length]
    if not isinstance(ends, int):
        last = ends.ends if isinstance(ends, Packing) else ends
        behind = torch.arange(length, device=values.device) > last.to(values.device)[:, None]
        scores = scores.masked_fill(behind[:, None, None], -torch.inf)
    share = F.dropout(scores.softmax(-1), attended.dropout, attended.training).to(value.dtype)
    states = _one(values, ends) + attended.out_proj((share @ value).reshape(items, width))
    return states + layer.mlp(layer.layer_norm2(states))  # type: ignore[no-any-return]


def _one(values: torch.Tensor, ends: torch.Tensor | Packing | int) -> torch.Tensor:
    if isinstance(ends, int):
        return values[:, ends].contiguous()  # Rows that lie apart are slow to multiply.
    if isinstance(ends, Packing):
        return values[0, ends.last]
    return values[torch.arange(len(values), device=values.device), ends.to(values.device)]
