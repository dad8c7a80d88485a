"""The same weights in open_clip's CLIP as in transformers', there and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def open_clip_model(folder: Path) -> Any:
    """open_clip's CLIP with the weights of a transformers' CLIP folder."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from transformers import CLIPModel

    source = CLIPModel.from_pretrained(folder)
    vision, text = source.config.vision_config, source.config.text_config
    model = CLIP(
        source.config.projection_dim,
        CLIPVisionCfg(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            head_width=vision.hidden_size // vision.num_attention_heads,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        CLIPTextCfg(
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            layers=text.num_hidden_layers,
            mlp_ratio=text.intermediate_size / text.hidden_size,
        ),
        quick_gelu=vision.hidden_act == "quick_gelu",
        output_dict=True,
    )
    model.load_state_dict(to_open_clip(source.state_dict(), source.config))
    return model


def _names(config: Any) -> Iterator[tuple[str, str, bool]]:
    """Of each weight open_clip's name, transformers', and whether one is the other transposed."""
    vision, text = "vision_model", "text_model"
    yield "logit_scale", "logit_scale", False
    yield "visual.class_embedding", f"{vision}.embeddings.class_embedding", False
    yield "visual.conv1.weight", f"{vision}.embeddings.patch_embedding.weight", False
    yield "visual.positional_embedding", f"{vision}.embeddings.position_embedding.weight", False
    yield "visual.proj", "visual_projection.weight", True
    yield "token_embedding.weight", f"{text}.embeddings.token_embedding.weight", False
    yield "positional_embedding", f"{text}.embeddings.position_embedding.weight", False
    yield "text_projection", "text_projection.weight", True
    modules = {"visual.ln_pre": f"{vision}.pre_layrnorm", "visual.ln_post": f"{vision}.post_layernorm"}
    modules["ln_final"] = f"{text}.final_layer_norm"
    for theirs, ours in _layers(config):
        modules |= {f"{theirs}.ln_1": f"{ours}.layer_norm1", f"{theirs}.ln_2": f"{ours}.layer_norm2"}
        modules |= {f"{theirs}.mlp.c_fc": f"{ours}.mlp.fc1", f"{theirs}.mlp.c_proj": f"{ours}.mlp.fc2"}
        modules[f"{theirs}.attn.out_proj"] = f"{ours}.self_attn.out_proj"
    for theirs, ours in modules.items():
        for kind in ("weight", "bias"):
            yield f"{theirs}.{kind}", f"{ours}.{kind}", False


def _layers(config: Any) -> Iterator[tuple[str, str]]:
    for number in range(config.vision_config.num_hidden_layers):
        yield f"visual.transformer.resblocks.{number}", f"vision_model.encoder.layers.{number}"
    for number in range(config.text_config.num_hidden_layers):
        yield f"transformer.resblocks.{number}", f"text_model.encoder.layers.{number}"


def to_open_clip(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A transformers CLIP's weights under open_clip's names."""
    found = {to: weights[of].T if turned else weights[of] for to, of, turned in _names(config)}
    for to, of in _layers(config):
        for kind in ("weight", "bias"):
            parts = [weights[f"{of}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
            found[f"{to}.attn.in_proj_{kind}"] = torch.cat(parts)
    return found


def from_open_clip(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """And back."""
    found = {of: weights[to].T.contiguous() if turned else weights[to] for to, of, turned in _names(config)}
    for to, of in _layers(config):
        for kind in ("weight", "bias"):
            for which, part in zip("qkv", weights[f"{to}.attn.in_proj_{kind}"].chunk(3), strict=True):
                found[f"{of}.self_attn.{which}_proj.{kind}"] = part
    return found
