"""A tower as a chain of stages: embeddings, encoder layers, pooling, projection.

Written out because a chain can be cut: what the frozen stages make of a picture never changes, so it can be computed
once (`features.py`) and the rest of the chain goes on from there. The modules are transformers' own; only the order in
which they are called stands here, and that the last layer before a pooling of one position asks for that one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlkit.models.fast.layers import NAME, pooled_layer
from vlkit.models.fast.packing import Packing

Run = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """One link of the chain.

    Attributes:
        modules: whose parameters it uses.
        run: (values [items, ...], ends int64 [items] or None) -> values. `pool_positions` are the positions that texts are
            pooled at; texts that stand end to end are [1, tokens, ...] and come with their `Packing` instead.
        layers: encoder layers in it.
        width: of what comes out, where an item is one row and no run is needed to know it.
        attends: configuration of its causal attention, which says whether it can take texts end to end.
    """

    modules: tuple[nn.Module, ...]
    run: Run
    layers: int = 0
    width: int | None = None
    attends: Any = None

    @property
    def packs(self) -> bool:
        """It takes texts end to end; another attention would take them for one text."""
        return self.attends is not None and self.attends._attn_implementation == NAME

    @property
    def frozen(self) -> bool:
        """None of its parameters is trained."""
        return not any(p.requires_grad for module in self.modules for p in module.parameters())


@dataclass(frozen=True)
class PartialForward:
    """What the first `depth` stages of a tower made of some pictures or texts.

    Attributes:
        values: [items, ...].
        ends: int64 [items], where a text is pooled; None for pictures.
    """

    values: torch.Tensor
    depth: int
    pool_positions: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, some: slice) -> PartialForward:
        """Some of the items."""
        return PartialForward(self.values[some], self.depth, None if self.pool_positions is None else self.pool_positions[some])


def run_stages(chain: Sequence[Stage], halfway: PartialForward, depth: int | None = None) -> PartialForward:
    """Carry on to `depth` (None: to the end)."""
    values, depth = halfway.values, len(chain) if depth is None else depth
    packing: Packing | None = None
    for stage in chain[halfway.depth : depth]:
        if stage.packs and packing is None and values.device.type == "cpu":
            packing = Packing.of(_said(halfway.pool_positions), values.shape[1])
            values = values if packing is None else packing.pack(values)
        values = stage.run(values, halfway.pool_positions if packing is None else packing)
        if stage.width is not None:  # Pooled: a row for every text.
            packing = None
    return PartialForward(values if packing is None else packing.unpack(values), depth, halfway.pool_positions)


def frozen_depth(chain: Sequence[Stage]) -> int:
    """How many stages come before the first that is trained."""
    trained = (depth for depth, stage in enumerate(chain) if not stage.frozen)
    return next(trained, len(chain))


def image_chain(model: Any) -> list[Stage]:
    """Of a CLIP's, SigLIP's or pair's pictures: normalised pixels [pictures, 3, size, size] -> [pictures, width]."""
    vision = model.vision_model
    layers = [layer(each) for each in vision.encoder.layers]
    if hasattr(model, "visual_projection"):
        last = vision.encoder.layers[-1]
        return [
            Stage((vision.embeddings, vision.pre_layrnorm), lambda x, _: vision.pre_layrnorm(vision.embeddings(x))),
            *layers[:-1],
            # The class token, which stands first.
            Stage((last,), lambda x, _: pooled_layer(last, x, 0), 1, vision.config.hidden_size),
            Stage((vision.post_layernorm,), lambda x, _: vision.post_layernorm(x)),
            Stage((model.visual_projection,), lambda x, _: model.visual_projection(x)),
        ]
    return [
        Stage((vision.embeddings,), lambda x, _: vision.embeddings(x)),
        *layers,
        Stage((vision.post_layernorm,), lambda x, _: vision.post_layernorm(x)),
        Stage((vision.head,), lambda x, _: vision.head(x)),
    ]


def text_chain(model: Any) -> list[Stage]:
    """Of a CLIP's, SigLIP's or pair's texts: padded token ids [texts, length] -> [texts, width]."""
    text = model.text_model
    if hasattr(model, "text_states"):
        return [
            Stage(
                (text,), lambda ids, _: model.text_states(ids), text.config.num_hidden_layers, text.config.hidden_size
            ),
            Stage(
                (model.text_projection,),
                lambda x, _: model.text_projection(x),
                width=model.text_projection.out_features,
            ),
        ]
    embeddings = Stage((text.embeddings,), lambda ids, _: text.embeddings(input_ids=ids))
    *lower, last = text.encoder.layers
    norm, width = Stage((text.final_layer_norm,), lambda x, _: text.final_layer_norm(x)), text.config.hidden_size
    if hasattr(model, "text_projection"):
        return [
            embeddings,
            *(_causal_layer(each, text.config) for each in lower),
            Stage((last,), lambda x, where: pooled_layer(last, x, where), 1, width, text.config),
            norm,
            Stage((model.text_projection,), lambda x, _: model.text_projection(x)),
        ]
    return [
        embeddings,
        *map(layer, lower),
        # The last position, be it padding.
        Stage((last,), lambda x, _: pooled_layer(last, x, -1), 1, width),
        norm,
        Stage((text.head,), lambda x, _: text.head(x)),
    ]


def layer(module: nn.Module) -> Stage:
    """One encoder layer without a mask."""
    return Stage((module,), lambda x, _: module(x, None), 1)


def _causal_layer(module: nn.Module, config: Any) -> Stage:
    def run(values: torch.Tensor, where: torch.Tensor | Packing) -> torch.Tensor:
        if isinstance(where, Packing):
            return module(values, None, is_causal=True, packing=where)  # type: ignore[no-any-return]
        return module(values, _causal_mask(values, config), is_causal=True)  # type: ignore[no-any-return]

    return Stage((module,), run, 1, attends=config)


def _causal_mask(values: torch.Tensor, config: Any) -> Any:
    """What transformers hands this attention: eager's and flex's know no flag and need a mask, a fused one does not."""
    from transformers.masking_utils import create_causal_mask

    if config._attn_implementation == NAME:
        return None  # So would the call below, in a hundred times the time.
    return create_causal_mask(config=config, inputs_embeds=values, attention_mask=None, past_key_values=None)


def _said(ends: torch.Tensor | None) -> torch.Tensor:
    if ends is None:
        raise ValueError("a CLIP's text is pooled at its end, which is not said")
    return ends
