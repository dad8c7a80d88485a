"""The settings of the commands that teach a language model to describe pictures, and let it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vlkit.config.base import POSITIONAL, REPEATED, Settings
from vlkit.config.checks import require_above, require_at_least, require_between, require_cache
from vlkit.config.data import TINY_LLM, Decode
from vlkit.config.training import TrainingConfig
from vlkit.errors import UsageError
from vlkit.storage import Location

PROMPT = "Describe the picture."


@dataclass(frozen=True, kw_only=True)
class TrainFusionConfig(TrainingConfig):
    """`vlkit train-fusion`."""

    data: Annotated[
        Location | None, "prepared folder, or a raw COCO one, prepared on the way (default: data/coco); s3:// too"
    ] = None
    steps: Annotated[int | None, "optimizer steps (default: 1200)"] = None
    batch_size: Annotated[int, "captions a batch"] = 4
    grad_accum: Annotated[int, "batches whose gradients make one step; their captions' words weigh alike"] = 4
    micro_batch: Annotated[
        str | None, "captions at a time, with the same result in less memory; auto: half as many whenever it runs out"
    ] = None
    lr: Annotated[float, "peak learning rate"] = 3e-5
    patience: Annotated[
        int | None, "end after this many evaluations on validation without a lower loss (default: never)"
    ] = None
    vision: Annotated[
        str, "frozen: SigLIP, SigLIP 2 or CLIP by hub name or folder, a finished run, or tiny-siglip, tiny-clip"
    ] = "google/siglip-base-patch16-224"
    llm: Annotated[str, "frozen: a causal language model by hub name or folder, or tiny-qwen"] = (
        "Qwen/Qwen2.5-1.5B-Instruct"
    )
    quantize: Annotated[Literal["nf4", "int8", "none"], "the language model in 4 bits, in 8, or whole"] = "nf4"
    fusion: Annotated[
        Literal["cross-attention", "mlp"], "learned queries that look at the patches; or every patch a token"
    ] = "cross-attention"
    queries: Annotated[int, "with --fusion cross-attention: visual tokens a picture"] = 32
    fusion_layers: Annotated[int, "with --fusion cross-attention: 1 to 4"] = 1
    adapter_lr: Annotated[float | None, "peak rate of the adapter (default: --lr; new ones like 1e-4 to 1e-3)"] = None
    fusion_lr: Annotated[float | None, "peak rate of the cross-attention (default: --lr)"] = None
    alpha_align: Annotated[
        float, "weight of the alignment: 1 - cosine of a picture's tokens and its caption's, means taken off"
    ] = 0.1
    llm_lora: Annotated[int | None, "rank of a LoRA on the language model's attention (default: none)"] = None
    lora_alpha: Annotated[float, "with --llm-lora: the update is scaled by alpha / rank"] = 16.0
    lora_dropout: Annotated[float, "with --llm-lora"] = 0.05
    teach_steps: Annotated[int, "with --llm tiny-qwen: steps in which it learns the captions as a language, before"] = (
        800
    )
    prompt: Annotated[str, "what the language model is asked, after the picture"] = PROMPT
    max_length: Annotated[int, "tokens of a caption, its end included; longer ones are cut, and counted"] = 64
    checkpoint_activations: Annotated[bool, "compute activations again in the backward pass: less memory, slower"] = (
        False
    )
    cache: Annotated[
        str, "keep the frozen encoder's patches of each picture: off, auto (~/.cache/vlkit, where it pays), or a folder"
    ] = "auto"
    val_limit: Annotated[int, "validation pictures, one caption each, that an evaluation looks at"] = 500
    samples: Annotated[int, "captions of validation pictures that each evaluation writes into metrics.jsonl"] = 8
    num_beams: Annotated[int, "of the captions that are scored at the end; 1: greedy"] = 1
    max_new_tokens: Annotated[int, "tokens of a caption that is written"] = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(
            self, 1, "batch_size", "queries", "llm_lora", "num_beams", "max_new_tokens", "val_limit", "teach_steps"
        )
        require_at_least(self, 2, "max_length")
        require_at_least(self, 0, "alpha_align", "samples")
        require_between(self, 1, 4, "fusion_layers")
        require_between(self, 0.0, 0.99, "lora_dropout")
        require_above(self, 0, "adapter_lr", "fusion_lr", "lora_alpha")
        require_cache(self.cache)
        if not self.prompt.strip():
            raise UsageError("--prompt is empty: say what the model is asked")
        self._refuse_idle("--fusion mlp", self.fusion == "mlp", "queries", "fusion_layers")
        self._refuse_idle("no --llm-lora", self.llm_lora is None, "lora_alpha", "lora_dropout")
        self._refuse_idle(f"--llm {self.llm}", self.llm != TINY_LLM, "teach_steps")

    def _refuse_idle(self, why: str, idle: bool, *names: str) -> None:
        """Refuse a setting that would change nothing; at its default it says nothing."""
        for name in names:
            if idle and getattr(self, name) != self.fields()[name].default:
                raise UsageError(f"{self.fields()[name].flag} has no use with {why}", hint="leave it out")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(Settings):
    """`vlkit caption`."""

    run: Annotated[Path, "finished run of train-fusion"]
    pictures: Annotated[tuple[str, ...], "pictures, and folders of them", POSITIONAL, REPEATED] = ()
    num_beams: Annotated[int, "of a beam search; 1: greedy"] = 1
    max_new_tokens: Annotated[int, "tokens of a caption, at most"] = 30
    prompt: Annotated[str | None, "what the language model is asked (default: what it was trained with)"] = None
    batch_size: Annotated[int, "pictures at a time"] = 16
    precision: Annotated[Literal["bf16", "fp16", "fp32"] | None, "of the products (default: the run's)"] = None
    decode: Annotated[Decode | None, "how pictures are read (default: as the run read them)"] = None
    out: Annotated[Path | None, "JSON lines of {image, caption}; goes on where it stopped"] = None
    limit: Annotated[int | None, "only the first of the pictures"] = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_beams", "max_new_tokens", "batch_size", "limit")
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("--prompt is empty: say what the model is asked")
