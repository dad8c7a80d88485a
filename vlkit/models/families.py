"""What differs between families of models: one entry each, and the only place that knows.

A new family of dual encoders is one `Family` in `FAMILIES`, with new stages for its towers if none of `stages.py` fit.
transformers must have a class for it with `vision_model`, `text_model` and a trained `logit_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

from vlkit.errors import UsageError
from vlkit.models import stages
from vlkit.models.preprocessing import CLIP_MEAN, CLIP_STD, FixedSize, NaFlex, Preprocessing
from vlkit.models.stages import Stage

# Attention's projections in an encoder layer, as CLIP and SigLIP, BERT and its kin, DistilBERT and MPNet name them.
PROJECTIONS = {
    "q": r"self_attn\.q_proj|attention\.self\.query|attention\.q_lin|attention\.attn\.q",
    "k": r"self_attn\.k_proj|attention\.self\.key|attention\.k_lin|attention\.attn\.k",
    "v": r"self_attn\.v_proj|attention\.self\.value|attention\.v_lin|attention\.attn\.v",
    "out": r"self_attn\.out_proj|attention\.output\.dense|attention\.out_lin|attention\.attn\.o",
}
_ALONE = "_vision_model"


@dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """What vlkit must know of a kind of vision tower.

    Attributes:
        name: transformers' `model_type` of the whole model; of the tower saved alone it ends in `_vision_model`.
        model_class, vision_class: transformers' classes of the whole model and of the tower alone.
        attention_class: of the encoder layers; called as `fast.layers.attention` expects.
        patch_chain: vision tower -> stages from normalised pixels to patches [images, patches, width].
        preprocessing: as the family was published with.
    """

    name: str
    model_class: str
    vision_class: str
    attention_class: str
    patch_chain: Callable[[Any], list[Stage]]
    preprocessing: Preprocessing


@dataclass(frozen=True, kw_only=True)
class Family(VisionFamily):
    """What vlkit must know of a kind of dual encoder.

    Attributes:
        vision_projection_class: transformers' class of the vision tower with `visual_projection`; None: it has none.
        image_chain, text_chain: model -> stages to a row of the common space, which is not a unit vector yet.
        embedding_width: configuration, of the whole model or of the vision tower alone -> width of the common space.
        text_limit: (configuration, tokenizer) -> tokens that a text may have, special ones included.
        pads_to_max_length: every text is padded to the limit, else to the longest of its batch.
        pools_at_end: texts are pooled at the first token that ends them.
        loss: default of --loss.
        initial_logit_scale, initial_logit_bias: what the family was trained from; None: it has no bias.
        max_logit_scale: maximum of exp(logit_scale), clamped after every step; None: no maximum.
        encoder_layers: regular expression of the list of encoder layers, below a tower.
        projections: of an encoder layer, below it: q, k, v, out -> regular expression.
        head: regular expression of what comes after the encoders, at the beginning of a parameter's name.
        always_trained: parameters that no --tune freezes and no PEFT adapter file holds, where the model has them.
    """

    vision_projection_class: str | None
    image_chain: Callable[[Any], list[Stage]]
    text_chain: Callable[[Any], list[Stage]]
    embedding_width: Callable[[Any], int]
    text_limit: Callable[[Any, Any], int] = lambda config, tokenizer: int(config.text_config.max_position_embeddings)
    pads_to_max_length: bool
    pools_at_end: bool
    loss: Literal["sigmoid", "softmax"]
    initial_logit_scale: float
    initial_logit_bias: float | None
    max_logit_scale: float | None
    # Encoder layers only: SigLIP's pooling head has an out_proj too, whose forward bypasses any adapter.
    encoder_layers: str = r"(encoder|transformer)\.layers?"
    projections: Mapping[str, str] = field(default_factory=lambda: PROJECTIONS)
    head: str = r"(visual_projection|text_projection|(vision_model|text_model)\.head)\."
    always_trained: tuple[str, ...] = ("logit_scale", "logit_bias")


# Trained on texts of exactly 64 tokens and pooled at the last position, so texts must be padded to the limit. Its scale
# must not be clamped: one published scale is 112.3.
SIGLIP = Family(
    name="siglip",
    model_class="SiglipModel",
    vision_class="SiglipVisionModel",
    attention_class="SiglipAttention",
    vision_projection_class=None,
    image_chain=stages.siglip_image_chain,
    text_chain=stages.siglip_text_chain,
    patch_chain=stages.siglip_patch_chain,
    preprocessing=FixedSize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=False),
    embedding_width=lambda config: int(getattr(config, "vision_config", config).hidden_size),
    pads_to_max_length=True,
    pools_at_end=False,
    loss="sigmoid",
    initial_logit_scale=10.0,
    initial_logit_bias=-10.0,
    max_logit_scale=None,
)
# Causal and pooled at the end of the text, so padding to the batch's longest changes nothing.
CLIP = Family(
    name="clip",
    model_class="CLIPModel",
    vision_class="CLIPVisionModel",
    attention_class="CLIPAttention",
    vision_projection_class="CLIPVisionModelWithProjection",
    image_chain=stages.clip_image_chain,
    text_chain=stages.clip_text_chain,
    patch_chain=stages.clip_patch_chain,
    preprocessing=FixedSize(mean=CLIP_MEAN, std=CLIP_STD, crop=True),
    embedding_width=lambda config: int(config.projection_dim),
    pads_to_max_length=False,
    pools_at_end=True,
    loss="softmax",
    initial_logit_scale=1 / 0.07,
    initial_logit_bias=None,
    max_logit_scale=100.0,
)
# Its texts are not read yet; the vision tower serves captioners.
SIGLIP2 = VisionFamily(
    name="siglip2",
    model_class="Siglip2Model",
    vision_class="Siglip2VisionModel",
    attention_class="Siglip2Attention",
    patch_chain=stages.naflex_patch_chain,
    preprocessing=NaFlex(),
)

FAMILIES: dict[str, VisionFamily] = {family.name: family for family in (SIGLIP, CLIP, SIGLIP2)}


def dual_family(model_type: str, name: str = "") -> Family:
    """Return the family of a dual encoder, by transformers' model type, also of its vision tower saved alone.

    Args:
        name: of the model, for the message.

    Raises:
        UsageError: vlkit knows none of this type.
    """
    family = FAMILIES.get(model_type.removesuffix(_ALONE))
    return family if isinstance(family, Family) else refuse_family(model_type, name)


def refuse_family(model_type: str, name: str = "") -> NoReturn:
    """Refuse a model that is no dual encoder of a known family.

    Args:
        name: of the model, for the message.

    Raises:
        UsageError: names the families.
    """
    known = [family for family in FAMILIES if is_dual(family)]
    message = f"{name} is a {model_type} model" if name else f"a {model_type} model is no dual encoder that vlkit knows"
    raise UsageError(message, hint=f"vlkit adapts {' and '.join(known)} models")


def vision_family(model_type: str, name: str = "the model") -> VisionFamily:
    """Return the family of a vision tower, by transformers' model type of the tower or of the whole model.

    Raises:
        UsageError: vlkit knows none of this type.
    """
    family = FAMILIES.get(model_type.removesuffix(_ALONE))
    if family is None:
        raise UsageError(
            f"{name} is a {model_type} model, whose vision tower vlkit does not know",
            hint="take a SigLIP, SigLIP 2 or CLIP; or a finished train-retrieval run",
        )
    return family


def is_dual(model_type: str) -> bool:
    """Return whether transformers' model type is that of a whole dual encoder that vlkit knows."""
    return isinstance(FAMILIES.get(model_type), Family)


def is_vision_alone(model_type: str) -> bool:
    """Return whether transformers' model type is that of a vision tower without the rest of its model."""
    return model_type.endswith(_ALONE)


def attention_classes() -> set[str]:
    """Return transformers' names of all families' attention."""
    return {family.attention_class for family in FAMILIES.values()}


def paired_family(family: Family) -> Family:
    """Return the family of a `PairedEncoder`: a vision tower of this one, and any text encoder of `AutoModel`."""
    return replace(
        family,
        text_chain=stages.paired_text_chain,
        embedding_width=lambda config: int(config.projection_dim),
        text_limit=lambda config, tokenizer: text_encoder_limit(config.text_config, tokenizer),
        pads_to_max_length=False,
        pools_at_end=False,
        always_trained=(*family.always_trained, "text_projection.weight"),
    )


def text_encoder_limit(config: Any, tokenizer: Any) -> int:
    """Return how many tokens a text encoder takes: its positions, and no more than its tokenizer was made for.

    Args:
        config: the text encoder's.
        tokenizer: None: its positions alone decide.
    """
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    # RoBERTa and its relatives number positions from the padding id + 1 on.
    if "roberta" in config.model_type or config.model_type in ("camembert", "mpnet"):
        positions -= config.pad_token_id + 1
    return positions if tokenizer is None else min(positions, int(tokenizer.model_max_length))
