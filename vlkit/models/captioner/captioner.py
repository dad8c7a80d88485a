"""A captioner: a frozen vision tower, a trained fusion, a frozen language model.

What the language model reads, as embeddings:

    prefix   the chat template up to the user's words
    visual   the fusion's tokens                      (32 of them)
    suffix   the prompt, and the template up to the answer
    caption  its words; labels are these and the end token, and nothing else

`prefix`, `visual` and `suffix` are as long for every image, so only captions are padded, behind their end, where no
label is; and a batch that is generated needs no padding at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlkit.errors import UsageError
from vlkit.models.captioner.fusion import Fusion, FusionShape
from vlkit.models.captioner.language_model import LanguageModel
from vlkit.models.captioner.vision_encoder import VisionEncoder
from vlkit.models.device import Precision, autocast
from vlkit.models.stages import PartialForward


@dataclass(frozen=True)
class CaptionLosses:
    """Sums over the tokens of some captions, their ends included.

    Attributes:
        cross_entropy: nats.
        alignment: of each caption 1 - cosine to its visual tokens, once a token; None if not asked for.
        token_count: tokens, ends included.
    """

    cross_entropy: torch.Tensor
    alignment: torch.Tensor | None
    token_count: int


class Captioner(torch.nn.Module):
    """Images to captions.

    Attributes:
        vision: its weights may be released once all patches are cached.
        prompt: the words that ask for a caption.
        prefix, suffix: token ids before and after the visual tokens.
        precision: of the frozen parts' products. The fusion's are float32.
    """

    mean: torch.Tensor

    def __init__(
        self,
        vision: VisionEncoder,
        fusion: Fusion,
        language: LanguageModel,
        prompt: str,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.vision, self.fusion, self.language = vision, fusion, language
        self.prompt, self.precision = prompt, precision
        prompt_ids = language.prompt_ids(prompt)
        self.prefix, self.suffix = prompt_ids.prefix, prompt_ids.suffix
        # The common mean of all words: without it, an embedding is that of its own word alone.
        self.register_buffer("mean", _mean_embedding(language), persistent=False)

    @classmethod
    def fresh(
        cls,
        vision: VisionEncoder,
        language: LanguageModel,
        prompt: str,
        precision: Precision = "fp32",
        *,
        seed: int,
        **shape: Any,
    ) -> Captioner:
        """Return a captioner with an untrained fusion.

        Args:
            seed: of its weights.
            shape: kind, queries and layers of `FusionShape`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fusion = Fusion(FusionShape(vision.width, vision.patches, language.hidden_size, **shape))
        with torch.no_grad():
            # Visual tokens begin at the size of a word's embedding; a norm makes sqrt(hidden) of anything.
            fusion.scale.fill_(_rms_embedding(language))
        return cls(vision, fusion, language, prompt, precision)

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.language.embeddings.device

    @property
    def overhead(self) -> int:
        """Tokens that every caption has before its first word."""
        return len(self.prefix) + self.fusion.shape.tokens + len(self.suffix)

    def check_context_length(self, words: int, hint: str) -> None:
        """Refuse captions of more tokens than the language model has room for.

        Args:
            words: tokens of a caption.
            hint: the way out.

        Raises:
            UsageError: names the numbers.
        """
        if self.overhead + words > self.language.context_length:
            raise UsageError(
                f"prompt and image take {self.overhead} tokens, a caption {words}: "
                f"{self.language.source} reads {self.language.context_length}",
                hint=hint,
            )

    def patches(self, images: torch.Tensor | PartialForward) -> torch.Tensor:
        """Map uint8 [images, 3, size, size], or cached features of them, to patches [images, patches, width]."""
        if isinstance(images, PartialForward):
            return images.values.to(self.device)
        with autocast(self.device, self.precision):
            patches: torch.Tensor = self.vision(images)
        return patches

    def losses(
        self, patches: torch.Tensor, captions: torch.Tensor, lengths: torch.Tensor, *, with_alignment: bool = False
    ) -> CaptionLosses:
        """Return the losses of captions, each under its image.

        Args:
            patches: [captions, patches, width].
            captions: int64 [captions, longest], token ids with their ends, padded behind.
            lengths: int64 [captions], of each.
        """
        captions, lengths = captions.to(self.device), lengths.to(self.device)
        visual = self.fusion(patches)
        words = self.language.embed(captions)
        prompt_embeds = self._prompt_embeds(visual, words.dtype)
        # The last word of a caption is a label only.
        inputs_embeds = torch.cat([prompt_embeds, words[:, :-1]], dim=1)
        label_mask = torch.arange(captions.shape[1], device=self.device) < lengths[:, None]
        attention_mask = torch.cat([label_mask.new_ones(prompt_embeds.shape[:2]), label_mask[:, 1:]], dim=1).long()
        states = self.language.states(inputs_embeds, attention_mask)[:, prompt_embeds.shape[1] - 1 :]
        cross_entropy = self.language.cross_entropy(states[label_mask], captions[label_mask])
        alignment = self._alignment(visual, words, label_mask) if with_alignment else None
        return CaptionLosses(cross_entropy, alignment, int(lengths.sum()))

    def _prompt_embeds(self, visual: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return prefix, visual, suffix as embeddings [images, overhead, hidden], in the language model's precision."""
        ids = torch.tensor([self.prefix + self.suffix], device=self.device)
        text = self.language.embed(ids).expand(len(visual), -1, -1)
        split = len(self.prefix)
        return torch.cat([text[:, :split], visual.to(dtype), text[:, split:]], dim=1)

    def _alignment(self, visual: torch.Tensor, words: torch.Tensor, label_mask: torch.Tensor) -> torch.Tensor:
        """Sum over words 1 - cos(mean visual token, mean word), the vocabulary's mean taken off both."""
        with torch.autocast(visual.device.type, enabled=False):
            counts = label_mask.sum(dim=1, keepdim=True).clamp(min=1)
            caption = (words.float() * label_mask[..., None]).sum(dim=1) / counts - self.mean
            image = visual.float().mean(dim=1) - self.mean
            return ((1 - F.cosine_similarity(image, caption, dim=-1)) * label_mask.sum(dim=1)).sum()

    @torch.inference_mode()
    def generate(
        self, patches: torch.Tensor, *, max_new_tokens: int, num_beams: int = 1, use_cache: bool = True
    ) -> list[str]:
        """Caption each image: greedy, or the best of a beam search. The same patches give the same words.

        Args:
            patches: [images, patches, width].
            max_new_tokens: of a caption, its end included.
            use_cache: if off, everything is computed again for every word; the result is the same.
        """
        from transformers import GenerationConfig

        if not len(patches):
            return []
        language = self.language
        prompt_embeds = self._prompt_embeds(self.fusion(patches), language.embeddings.dtype)
        # A published model brings sampling and penalties along, which do not suit captions.
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=language.eos_id,
            pad_token_id=language.pad_id,
        )
        own_settings = language.model.generation_config
        language.model.generation_config = settings
        try:
            mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=self.device)
            with autocast(self.device, self.precision):
                ids = language.model.generate(
                    inputs_embeds=prompt_embeds, attention_mask=mask, generation_config=settings
                )
        finally:
            language.model.generation_config = own_settings
        texts = language.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return name -> parameter, of what is trained: the fusion, and a LoRA if any."""
        fusion = {f"fusion.{name}": p for name, p in self.fusion.named_parameters()}
        return fusion | {f"llm.{name}": p for name, p in self.language.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _mean_embedding(language: LanguageModel) -> torch.Tensor:
    """Return the vocabulary's mean embedding, summed in float32 in chunks: the table may be gigabytes."""
    table = language.embeddings
    if table.is_meta:
        return torch.zeros(table.shape[1], device="meta")
    total = torch.zeros(table.shape[1], device=table.device)
    for ids in torch.arange(len(table), device=table.device).split(8192):  # type: ignore[no-untyped-call]
        total += language.embed(ids).float().sum(dim=0)
    return total / len(table)


@torch.no_grad()
def _rms_embedding(language: LanguageModel) -> float:
    """Return the root mean square of the numbers in the embeddings of the first words."""
    table = language.embeddings
    if table.is_meta:
        return 1.0
    embeddings = language.embed(torch.arange(min(8192, len(table)), device=table.device))
    return float(embeddings.float().square().mean().sqrt())
