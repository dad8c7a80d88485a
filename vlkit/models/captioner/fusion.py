"""The trained part of a captioner: an image's patches become tokens that a language model reads.

    patches [images, patches, vision width]
      -> adapter: LayerNorm, two-layer MLP               [images, patches, hidden]
      -> fusion: learned queries that cross-attend to them, 1 to 4 layers
      -> visual tokens                                   [images, queries, hidden]

The LayerNorm comes first, so that an encoder whose features are ten times as large makes no other start. Everything is
computed in float32, also under autocast: a few million parameters that a loss scale or bf16 would round away.

Sources: the adapter is LLaVA-1.5's (arXiv 2310.03744) behind a norm; the queries are BLIP-2's (arXiv 2301.12597)
without its self-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Kind = Literal["cross-attention", "mlp"]
HEAD_WIDTH = 64


@dataclass(frozen=True)
class FusionShape:
    """All that decides the shape of a fusion.

    Attributes:
        vision: width of a patch.
        patches: of an image.
        hidden: width of the language model's embeddings.
        kind: cross-attention, or mlp: the adapted patches themselves are the visual tokens.
        queries, layers: of the cross-attention.
    """

    vision: int
    patches: int
    hidden: int
    kind: Kind = "cross-attention"
    queries: int = 32
    layers: int = 1

    @property
    def tokens(self) -> int:
        """Visual tokens of an image."""
        return self.queries if self.kind == "cross-attention" else self.patches


class Fusion(nn.Module):
    """Adapter and cross-attention.

    Attributes:
        shape: what it was built for.
    """

    def __init__(self, shape: FusionShape) -> None:
        super().__init__()
        self.shape = shape
        self.adapter = nn.Sequential(
            nn.LayerNorm(shape.vision),
            nn.Linear(shape.vision, shape.hidden),
            nn.GELU(),
            nn.Linear(shape.hidden, shape.hidden),
        )
        self.layers = nn.ModuleList()
        if shape.kind == "cross-attention":
            self.queries = nn.Parameter(torch.randn(shape.queries, shape.hidden) * shape.hidden**-0.5)
            # Position embeddings, under the name that trained weights have.
            self.places = nn.Parameter(torch.randn(shape.patches, shape.hidden) * 0.02)
            self.layers.extend(CrossAttention(shape.hidden) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        # Embeddings of a language model are small: visual tokens begin at their size, which the caller sets.
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Map patches [images, patches, vision] of any precision to visual tokens, float32 [images, tokens, hidden]."""
        # On the meta device, where shapes are asked for, there is no autocast to switch off.
        with torch.autocast("cpu" if patches.is_meta else patches.device.type, enabled=False):
            adapted: torch.Tensor = self.adapter(patches.float())
            tokens = adapted
            if len(self.layers):
                keys, tokens = adapted + self.places, self.queries.expand(len(patches), -1, -1)
                for layer in self.layers:
                    tokens = layer(tokens, keys)
            visual: torch.Tensor = self.scale * self.norm(tokens)
            return visual


class CrossAttention(nn.Module):
    """Queries attend to patches, then a feed-forward: pre-norm, residual."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = max(1, hidden // HEAD_WIDTH)
        while hidden % self.heads:
            self.heads -= 1
        # Trained weights have these names.
        self.query_norm, self.seen_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Map tokens [images, queries, hidden], and patches [images, patches, hidden], to tokens of the same shape."""
        queries, patches = self.query_norm(tokens), self.seen_norm(patches)
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(queries), self.key(patches), self.value(patches))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        return tokens + self.feed_forward(tokens)  # type: ignore[no-any-return]
