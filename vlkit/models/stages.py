"""An encoder as a chain of stages: embeddings, encoder layers, pooling, projection.

Written out because a chain can be cut: what the frozen stages make of an image never changes, so it can be computed
once (`cache/feature_cache.py`) and the rest of the chain goes on from there. The modules are transformers' own; only
the order in which they are called stands here, and that the last layer before a pooling of one position is asked for
that position alone. Which family has which chain: see `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vlkit.models import fast
from vlkit.models.fast.layers import ATTENTION_NAME, pooled_layer, select_positions

Modality = Literal["images", "texts"]
StageFunction = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """One link of the chain.

    Attributes:
        modules: whose parameters it uses.
        run: (values [items, ...], pool positions int64 [items] or None) -> values.
        layers: encoder layers in it.
        width: of its output, where that is one row an item and known without a run.
    """

    modules: tuple[nn.Module, ...]
    run: StageFunction
    layers: int = 0
    width: int | None = None

    @property
    def frozen(self) -> bool:
        """None of its parameters is trained."""
        return not any(p.requires_grad for module in self.modules for p in module.parameters())


@dataclass(frozen=True)
class PartialForward:
    """What the first `depth` stages of an encoder made of some images or texts.

    Attributes:
        values: [items, ...].
        pool_positions: int64 [items], where a text is pooled; None for images.
    """

    values: torch.Tensor
    depth: int
    pool_positions: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, items: slice) -> PartialForward:
        """Return a part of the items."""
        positions = None if self.pool_positions is None else self.pool_positions[items]
        return PartialForward(self.values[items], self.depth, positions)


def run_stages(chain: Sequence[Stage], partial: PartialForward, depth: int | None = None) -> PartialForward:
    """Carry on to `depth` (None: to the end)."""
    values, depth = partial.values, len(chain) if depth is None else depth
    for stage in chain[partial.depth : depth]:
        values = stage.run(values, partial.pool_positions)
    return PartialForward(values, depth, partial.pool_positions)


def frozen_depth(chain: Sequence[Stage]) -> int:
    """Return how many stages come before the first that is trained."""
    trained = (depth for depth, stage in enumerate(chain) if not stage.frozen)
    return next(trained, len(chain))


def clip_image_chain(model: Any) -> list[Stage]:
    """Return a CLIP's stages from normalised pixels [images, 3, size, size] to [images, width]."""
    vision = model.vision_model
    *lower, last = vision.encoder.layers
    class_token = 0
    return [
        _clip_image_embeddings(vision),
        *map(layer_stage, lower),
        _pooled_stage(last, _run_layer(last), vision.config.hidden_size, class_token),
        module_stage(vision.post_layernorm),
        module_stage(model.visual_projection),
    ]


def clip_text_chain(model: Any) -> list[Stage]:
    """Return a CLIP's stages from padded token ids [texts, length] to [texts, width]: causal, pooled at the end."""
    text = model.text_model
    *lower, last = text.encoder.layers
    return [
        Stage((text.embeddings,), lambda ids, _: text.embeddings(input_ids=ids)),
        *(Stage((layer,), _run_causal_layer(layer, text.config), 1) for layer in lower),
        _pooled_stage(last, _run_causal_layer(last, text.config), text.config.hidden_size, None),
        module_stage(text.final_layer_norm),
        module_stage(model.text_projection),
    ]


def siglip_image_chain(model: Any) -> list[Stage]:
    """Return a SigLIP's stages from normalised pixels [images, 3, size, size] to [images, width]."""
    return [*siglip_patch_chain(model.vision_model), module_stage(model.vision_model.head)]


def siglip_text_chain(model: Any) -> list[Stage]:
    """Return a SigLIP's stages from padded token ids [texts, length] to [texts, width]: pooled at the last position."""
    text = model.text_model
    *lower, last = text.encoder.layers
    return [
        Stage((text.embeddings,), lambda ids, _: text.embeddings(input_ids=ids)),
        *map(layer_stage, lower),
        _pooled_stage(last, _run_layer(last), text.config.hidden_size, -1),  # Padding, too, is pooled there.
        module_stage(text.final_layer_norm),
        module_stage(text.head),
    ]


def paired_text_chain(model: Any) -> list[Stage]:
    """Return a PairedEncoder's stages from padded token ids [texts, length] to [texts, width]."""
    text, projection = model.text_model, model.text_projection
    return [
        Stage((text,), lambda ids, _: model.text_states(ids), text.config.num_hidden_layers, text.config.hidden_size),
        Stage((projection,), lambda states, _: projection(states), width=projection.out_features),
    ]


def clip_patch_chain(vision: Any) -> list[Stage]:
    """Return the stages of a CLIP's vision tower to the patches [images, patches, width] of its layer before the last.

    The last layer serves the class token alone, which is cut off (as LLaVA does, arXiv 2304.08485).
    """
    layers = [layer_stage(layer) for layer in vision.encoder.layers]
    return [_clip_image_embeddings(vision), *layers[:-1], Stage((), lambda states, _: states[:, 1:])]


def siglip_patch_chain(vision: Any) -> list[Stage]:
    """Return the stages of a SigLIP's vision tower to the patches [images, patches, width] that its head pools."""
    return [
        module_stage(vision.embeddings),
        *map(layer_stage, vision.encoder.layers),
        module_stage(vision.post_layernorm),
    ]


def naflex_patch_chain(vision: Any) -> list[Stage]:
    """Return the same for a SigLIP 2 of flexible resolution: it takes patches that are cut already, and their grid."""
    patch = vision.config.patch_size

    def embed(pixels: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        grid = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [images, 3, rows, columns, patch, patch]
        rows, columns = grid.shape[2:4]
        patches = grid.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([[rows, columns]] * len(pixels))
        return vision.embeddings(patches, shapes)  # type: ignore[no-any-return]

    return [Stage((vision.embeddings,), embed), *siglip_patch_chain(vision)[1:]]


def module_stage(module: Any) -> Stage:
    """Return the stage of a module that takes the values alone."""
    return Stage((module,), lambda values, _: module(values))


def layer_stage(layer: nn.Module) -> Stage:
    """Return the stage of an encoder layer without a mask."""
    return Stage((layer,), _run_layer(layer), 1)


def _clip_image_embeddings(vision: Any) -> Stage:
    norm = vision.pre_layrnorm
    return Stage((vision.embeddings, norm), lambda pixels, _: norm(vision.embeddings(pixels)))


def _pooled_stage(layer: nn.Module, run_layer: StageFunction, width: int, position: int | None) -> Stage:
    """Return the stage of the last layer, computed for one position only.

    Args:
        run_layer: the layer as transformers runs it, for all positions.
        position: the same for all items; None: the pool positions.
    """

    def run(values: torch.Tensor, pool_positions: torch.Tensor | None) -> torch.Tensor:
        positions = pool_positions if position is None else position
        if positions is None:
            raise ValueError("texts are pooled at their ends, and no pool positions are given")
        if fast.enabled():
            return pooled_layer(layer, values, positions)
        return select_positions(run_layer(values, pool_positions), positions)

    return Stage((layer,), run, 1, width)


def _run_layer(layer: Any) -> StageFunction:
    return lambda values, _: layer(values, None)


def _run_causal_layer(layer: Any, config: Any) -> StageFunction:
    return lambda values, _: layer(values, _causal_mask(values, config), is_causal=True)


def _causal_mask(values: torch.Tensor, config: Any) -> Any:
    """Return the mask that transformers gives this attention: eager and flex need one, a fused one has a flag."""
    from transformers.masking_utils import create_causal_mask

    if config._attn_implementation == ATTENTION_NAME:
        return None  # So would the call below, in a hundred times the time.
    return create_causal_mask(config=config, inputs_embeds=values, attention_mask=None, past_key_values=None)
