"""The dual encoder: an image and a text become unit vectors, their product a logit.

`DualEncoder` wraps transformers' SiglipModel, CLIPModel or another of `families.py`, or a pair of two models.
`loading.py` loads one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vlkit.data.images.spec import PixelSpec
from vlkit.models import families, paired_encoder, preprocessing
from vlkit.models.fast.layers import use_fast_layers
from vlkit.models.paired_encoder import PairedEncoder
from vlkit.models.stages import Modality, PartialForward, Stage, run_stages
from vlkit.storage import json_text


class DualEncoder(torch.nn.Module):
    """A vision and a text encoder with a common space.

    Attributes:
        model: transformers' model, or a `PairedEncoder`; adapters are put into it in place.
        source: hub name or folder that it came from.
        peft: the PeftModel around `model` if it has adapters, else None.
        family: what is particular to its kind.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: Any, tokenizer: Any, pixel_spec: PixelSpec, source: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.pixel_spec, self.source = model, tokenizer, pixel_spec, source
        self.peft: Any = None
        family = families.dual_family(model.config.model_type)
        self.family = families.paired_family(family) if self.is_paired else family
        use_fast_layers(model, families.attention_classes())
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pixel_spec.mean, pixel_spec.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @property
    def image_chain(self) -> list[Stage]:
        """From normalised pixels to an image's row of the common space, which is not a unit vector yet."""
        return self.family.image_chain(self.model)

    @property
    def text_chain(self) -> list[Stage]:
        """From padded token ids to a text's row of the common space, which is not a unit vector yet."""
        return self.family.text_chain(self.model)

    def chain(self, modality: Modality) -> list[Stage]:
        """Return `image_chain` or `text_chain`."""
        return self.image_chain if modality == "images" else self.text_chain

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @property
    def width(self) -> int:
        """Width of the common space, read from the configuration."""
        return self.family.embedding_width(self.model.config)

    @property
    def is_paired(self) -> bool:
        """The text encoder is a model of its own, beside another model's vision tower."""
        return isinstance(self.model, PairedEncoder)

    def tower_config(self, modality: Modality) -> Any:
        """Return transformers' configuration of one tower."""
        return self.model.config.vision_config if modality == "images" else self.model.config.text_config

    @property
    def text_limit(self) -> int:
        """Tokens that a text may have, special ones included."""
        return self.family.text_limit(self.model.config, self.tokenizer)

    @property
    def text_pooling(self) -> str | None:
        """How a pair pools its token states: mean or cls; None for other models."""
        return self.model.config.pooling if self.is_paired else None

    @property
    def pads_to_max_length(self) -> bool:
        """Every text is padded to the limit, else to the longest of its batch."""
        return self.family.pads_to_max_length

    @property
    def pad_id(self) -> int:
        """The token that pads texts."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return each text's token ids, unpadded, cut to the limit but for the end token; and how many were cut."""
        if not texts:
            return [], 0
        full, limit = token_ids(self.tokenizer, texts), self.text_limit
        cut = [ids if len(ids) <= limit else ids[: limit - 1] + ids[-1:] for ids in full]
        return cut, sum(len(ids) > limit for ids in full)

    def pad(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return token ids as one int64 tensor [texts, length]: the limit for SigLIP, the longest here for CLIP."""
        length = self.text_limit if self.pads_to_max_length else max(map(len, ids), default=0)
        padded = torch.full((len(ids), length), self.pad_id, dtype=torch.long)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        return padded

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 [images, 3, size, size] into what the image chain begins with, on the encoder's device."""
        # In place: more copies of a batch's images would cost more than the arithmetic.
        return (pixels.to(self.device) / 255).sub_(self.mean).div_(self.std)

    def pool_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return where texts are pooled, int64 [texts].

        For CLIP the first end-of-text token (some CLIPs pad with it, too); 0 for families that pool elsewhere.
        """
        if not self.family.pools_at_end or not len(input_ids):
            return torch.zeros(len(input_ids), dtype=torch.long)
        end = self.model.config.text_config.eos_token_id
        # Configurations older than the token's number say 2: there the end is the highest of all tokens.
        score = input_ids if end == 2 else (input_ids == end).int()
        return score.argmax(dim=-1)

    def embed_images(self, images: torch.Tensor | PartialForward) -> torch.Tensor:
        """Embed uint8 [images, 3, size, size], or what the lower stages made of it: unit rows [images, width]."""
        if isinstance(images, torch.Tensor):
            images = PartialForward(self.normalize_pixels(images), 0)
        return self._embed(self.image_chain, images)

    def embed_texts(self, texts: torch.Tensor | PartialForward) -> torch.Tensor:
        """Embed padded token ids [texts, length], or what the lower stages made of them: unit rows [texts, width].

        No attention mask: SigLIP was trained without, a causal CLIP does not look behind the end of its text, and a
        pair makes its own.
        """
        if isinstance(texts, torch.Tensor):
            texts = PartialForward(texts.to(self.device), 0, self.pool_positions(texts))
        return self._embed(self.text_chain, texts)

    def _embed(self, chain: Sequence[Stage], partial: PartialForward) -> torch.Tensor:
        if not len(partial):
            return torch.zeros(0, self.width, device=self.device)
        values = partial.values.to(self.device)
        values = values.float() if values.is_floating_point() else values
        partial = PartialForward(values, partial.depth, partial.pool_positions)
        return F.normalize(run_stages(chain, partial).values.float(), dim=-1)

    def logits(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Return scale * cosine + bias, float32 [images, texts]. No autocast: a bf16 logit at scale 100 errs by 0.1."""
        with torch.autocast(images.device.type, enabled=False):
            scale: torch.Tensor = self.model.logit_scale.float().exp()
            scaled = scale * (images.float() @ texts.float().T)
            bias = getattr(self.model, "logit_bias", None)
            return scaled if bias is None else scaled + bias.float()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp logit_scale to the family's maximum."""
        if self.family.max_logit_scale is not None:
            self.model.logit_scale.clamp_(max=math.log(self.family.max_logit_scale))

    def logit_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the scale, and the bias if any. They are always trained, and no PEFT adapter file holds them."""
        return {name: p for name, p in self.model.named_parameters() if name in ("logit_scale", "logit_bias")}

    def logit_values(self) -> dict[str, float]:
        """Return the logit parameters as numbers, for the log."""
        return {name: p.detach().float().item() for name, p in self.logit_parameters().items()}

    def save(self, folder: Path) -> None:
        """Write everything that transformers needs to load this again: weights, tokenizer, preprocessing."""
        if not self.is_paired:
            self.model.save_pretrained(folder)
            self.save_processors(folder)
            return
        paired_encoder.save(self.model, folder)
        self.tokenizer.save_pretrained(Path(folder) / "text")
        self._save_preprocessing(Path(folder) / "vision")

    def save_processors(self, folder: Path) -> None:
        """Write tokenizer and preprocessing alone."""
        self.tokenizer.save_pretrained(folder)
        self._save_preprocessing(Path(folder))

    def _save_preprocessing(self, folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(
            json_text(preprocessing.processor_dict(self.pixel_spec), indent=2) + "\n", encoding="utf-8"
        )


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return each text's token ids, special ones included, none cut off."""
    options = {"add_special_tokens": True, "padding": False, "truncation": False, "verbose": False}
    ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    return ids
