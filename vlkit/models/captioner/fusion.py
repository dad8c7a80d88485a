"""What is trained of a captioner: a picture's patches become tokens that a language model reads.

    patches [pictures, patches, vision width]
      -> adapter: LayerNorm, two-layer MLP               [pictures, patches, hidden]
      -> fusion: learned queries that cross-attend to them, 1 to 4 layers
      -> visual tokens                                   [pictures, queries, hidden]

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
# Width of an attention head.
HEAD = 64


@dataclass(frozen=True)
class FusionShape:
    """All that decides the shape of a fusion.

    Attributes:
        vision: width of a patch.
        patches: of a picture.
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
        """Visual tokens a picture."""
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
            self.places = nn.Parameter(torch.randn(shape.patches, shape.hidden) * 0.02)
            self.layers.extend(CrossAttention(shape.hidden) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        # Embeddings of a language model are small: visual tokens begin at their size, which the caller sets.
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches [pictures, patches, vision] of any precision -> visual tokens, float32 [pictures, tokens, hidden]."""
        # On the meta device, where shapes are asked for, there is no autocast to switch off.
        with torch.autocast("cpu" if patches.is_meta else patches.device.type, enabled=False):
            adapted = self.adapter(patches.float())
            if not len(self.layers):
                return self.scale * self.norm(adapted)
            seen = adapted + self.places
            tokens = self.queries.expand(len(patches), -1, -1)
            for layer in self.layers:
                tokens = layer(tokens, seen)
            return self.scale * self.norm(tokens)


class CrossAttention(nn.Module):
    """Queries look at what was seen, then think: pre-norm, residual, feed-forward."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = max(1, hidden // HEAD)
        while hidden % self.heads:
            self.heads -= 1
        self.query_norm, self.seen_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Tokens [pictures, queries, hidden] and seen [pictures, patches, hidden] -> tokens of the same shape."""
        asked, seen = self.query_norm(tokens), self.seen_norm(seen)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(asked), self.key(seen), self.value(seen))
        )
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(found)
        return tokens + self.feed_forward(tokens)
