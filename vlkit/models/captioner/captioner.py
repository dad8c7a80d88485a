"""A captioner: a frozen vision tower, a trained fusion, a frozen language model.

What the language model reads, as embeddings:

    before   the chat template up to the user's words
    visual   the fusion's tokens                      (32 of them)
    after    the prompt, and the template up to the answer
    caption  its words; labels are these and the end token, and nothing else

`before`, `visual` and `after` are as long for every picture, so only captions are padded, behind their end, where no
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
    """Sums over the words of some captions, their ends included.

    Attributes:
        cross_entropy: nats.
        alignment: of each caption 1 - cosine to its visual tokens, once a word; None where it is not asked for.
        words: how many.
    """

    cross_entropy: torch.Tensor
    alignment: torch.Tensor | None
    words: int


class Captioner(torch.nn.Module):
    """Pictures to captions.

    Attributes:
        vision: may leave once all its patches are kept.
        prompt: the words that ask for a caption.
        precision: of the frozen parts' products. The fusion's are float32.
    """

    def __init__(
        self,
        vision: VisionEncoder | None,
        fusion: Fusion,
        language: LanguageModel,
        prompt: str,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.vision, self.fusion, self.language = vision, fusion, language
        self.prompt, self.precision = prompt, precision
        asked = language.prompt_ids(prompt)
        self.prefix, self.suffix = asked.prefix, asked.suffix
        # The common mean of all words: what is left of an embedding without it is its own.
        self.register_buffer("mean", _mean(language), persistent=False)

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
        """With a fusion that nobody has trained.

        Args:
            seed: of its weights.
            shape: kind, queries and layers of `FusionShape`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fusion = Fusion(FusionShape(vision.width, vision.patches, language.hidden_size, **shape))
        with torch.no_grad():
            # Visual tokens begin at the size of a word's embedding; a norm makes sqrt(hidden) of anything.
            fusion.scale.fill_(_spread(language))
        return cls(vision, fusion, language, prompt, precision)

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.language.embeddings.device

    @property
    def overhead(self) -> int:
        """Tokens that every caption has before its first word."""
        return len(self.prefix) + self.fusion.shape.tokens + len(self.suffix)

    def refuse_small_window(self, words: int, hint: str) -> None:
        """Refuse captions of more tokens than the language model's window leaves room for.

        Args:
            hint: the way out.

        Raises:
            UsageError: names the numbers.
        """
        if self.overhead + words > self.language.context_length:
            told = f"prompt and picture take {self.overhead} tokens, a caption {words}: {self.language.source} reads"
            raise UsageError(f"{told} {self.language.context_length}", hint=hint)

    def patches(self, pictures: torch.Tensor | PartialForward) -> torch.Tensor:
        """uint8 [pictures, 3, size, size], or what the cache has of them -> patches [pictures, patches, width]."""
        if isinstance(pictures, PartialForward):
            return pictures.values.to(self.device)
        assert self.vision is not None  # It leaves only when nothing but the cache is asked.
        with autocast(self.device, self.precision):
            return self.vision(pictures)

    def losses(
        self, patches: torch.Tensor, captions: torch.Tensor, lengths: torch.Tensor, *, aligned: bool = False
    ) -> CaptionLosses:
        """The loss of captions under their pictures.

        Args:
            patches: [captions, patches, width].
            captions: int64 [captions, longest], token ids with their ends, padded behind.
            lengths: int64 [captions], of each.
            aligned: the alignment, too.
        """
        captions, lengths = captions.to(self.device), lengths.to(self.device)
        visual = self.fusion(patches)
        words = self.language.embed(captions)
        asked = self._asked(visual, words.dtype)
        # The last word of a caption is a label only.
        told = torch.cat([asked, words[:, :-1]], dim=1)
        there = torch.arange(captions.shape[1], device=self.device) < lengths[:, None]
        mask = torch.cat([there.new_ones(asked.shape[:2]), there[:, 1:]], dim=1).long()
        states = self.language.states(told, mask)[:, asked.shape[1] - 1 :]
        nats = self.language.cross_entropy(states[there], captions[there])
        alignment = self._alignment(visual, words, there) if aligned else None
        return CaptionLosses(nats, alignment, int(lengths.sum()))

    def _asked(self, visual: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """before, visual, after as embeddings: [pictures, overhead, hidden], in the language model's own precision."""
        ids = torch.tensor([self.prefix + self.suffix], device=self.device)
        around = self.language.embed(ids).expand(len(visual), -1, -1)
        split = len(self.prefix)
        return torch.cat([around[:, :split], visual.to(dtype), around[:, split:]], dim=1)

    def _alignment(self, visual: torch.Tensor, words: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Sum over words of 1 - cos(mean visual token, mean word), the vocabulary's mean taken off both."""
        with torch.autocast(visual.device.type, enabled=False):
            counts = there.sum(dim=1, keepdim=True).clamp(min=1)
            said = (words.float() * there[..., None]).sum(dim=1) / counts - self.mean
            seen = visual.float().mean(dim=1) - self.mean
            return ((1 - F.cosine_similarity(seen, said, dim=-1)) * there.sum(dim=1)).sum()

    @torch.inference_mode()
    def generate(
        self, patches: torch.Tensor, *, max_new_tokens: int, num_beams: int = 1, use_cache: bool = True
    ) -> list[str]:
        """A caption of each picture: greedy, or the best of a beam search. The same patches give the same words.

        Args:
            patches: [pictures, patches, width].
            max_new_tokens: of a caption, its end included.
            use_cache: off, everything is computed again for every word; the result is the same.
        """
        from transformers import GenerationConfig

        if not len(patches):
            return []
        language = self.language
        asked = self._asked(self.fusion(patches), language.embeddings.dtype)
        # A published model brings sampling and penalties along, which are none of a caption's business.
        how = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=language.eos_id,
            pad_token_id=language.pad_id,
        )
        was = language.model.generation_config
        language.model.generation_config = how
        try:
            mask = torch.ones(asked.shape[:2], dtype=torch.long, device=self.device)
            with autocast(self.device, self.precision):
                made = language.model.generate(inputs_embeds=asked, attention_mask=mask, generation_config=how)
        finally:
            language.model.generation_config = was
        texts = language.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """name -> parameter, of what is trained: the fusion, and a LoRA where there is one."""
        found = {f"fusion.{name}": p for name, p in self.fusion.named_parameters()}
        return found | {f"llm.{name}": p for name, p in self.language.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _mean(language: LanguageModel) -> torch.Tensor:
    """Mean embedding of the vocabulary, summed in float32 a piece at a time: the table may be gigabytes."""
    table = language.embeddings
    if table.is_meta:
        return torch.zeros(table.shape[1], device="meta")
    total = torch.zeros(table.shape[1], device=table.device)
    for ids in torch.arange(len(table), device=table.device).split(8192):
        total += language.embed(ids).float().sum(dim=0)
    return total / len(table)


@torch.no_grad()
def _spread(language: LanguageModel) -> float:
    """Root mean square of the numbers in the embeddings of the first words."""
    table = language.embeddings
    if table.is_meta:
        return 1.0
    some = language.embed(torch.arange(min(8192, len(table)), device=table.device))
    return float(some.float().square().mean().sqrt())
