"""The settings of the commands that train a captioner and run it: train-fusion, caption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vlkit.config.base import POSITIONAL, REPEATED, Settings, requires
from vlkit.config.checks import require_above, require_at_least, require_between, require_cache
from vlkit.config.data import TINY_LLM, Decode
from vlkit.config.training import MicroBatch, TrainingConfig
from vlkit.errors import UsageError
from vlkit.storage import Location

PROMPT = "Describe the picture."
CROSS_ATTENTION = requires("fusion", "cross-attention")


@dataclass(frozen=True, kw_only=True)
class TrainFusionConfig(TrainingConfig):
    """`vlkit train-fusion`."""

    data: Annotated[
        Location | None,
        "prepared folder, or a raw COCO folder, which is prepared first (default: data/coco); s3:// too",
    ] = None
    steps: Annotated[int | None, "optimizer steps (default: 1200)"] = None
    batch_size: Annotated[int, "captions per batch"] = 4
    grad_accum: Annotated[int, "batches per optimizer step; every token of their captions weighs the same"] = 4
    micro_batch: Annotated[
        MicroBatch, "captions processed at once: same gradients, less memory; auto halves it when memory runs out"
    ] = None
    lr: Annotated[float, "peak learning rate"] = 3e-5
    patience: Annotated[
        int | None, "stop after this many evaluations on validation without a lower loss (default: never)"
    ] = None
    vision: Annotated[
        str, "frozen encoder: SigLIP, SigLIP 2 or CLIP by hub name or folder, a finished run, tiny-siglip or tiny-clip"
    ] = "google/siglip-base-patch16-224"
    llm: Annotated[str, "frozen causal language model by hub name or folder, or tiny-qwen"] = (
        "Qwen/Qwen2.5-1.5B-Instruct"
    )
    quantize: Annotated[Literal["nf4", "int8", "none"], "load the language model in 4 bits, in 8 bits, or whole"] = (
        "nf4"
    )
    fusion: Annotated[
        Literal["cross-attention", "mlp"],
        "how images enter the language model: learned queries attend to the patches, or every patch is a token",
    ] = "cross-attention"
    queries: Annotated[int, "visual tokens per image with --fusion cross-attention", CROSS_ATTENTION] = 32
    fusion_layers: Annotated[int, "layers of --fusion cross-attention, 1 to 4", CROSS_ATTENTION] = 1
    adapter_lr: Annotated[
        float | None, "peak learning rate of the adapter (default: --lr; a new one needs 1e-4 to 1e-3)"
    ] = None
    fusion_lr: Annotated[
        float | None, "peak learning rate of what follows the adapter: cross-attention, norm and scale (default: --lr)"
    ] = None
    alpha_align: Annotated[
        float, "weight of the alignment loss: 1 - cosine of an image's and its caption's mean tokens, both centred"
    ] = 0.1
    llm_lora: Annotated[int | None, "rank of LoRA adapters on the language model's attention (default: none)"] = None
    lora_alpha: Annotated[float, "scale of the adapters of --llm-lora: alpha / rank", requires("llm_lora")] = 16.0
    lora_dropout: Annotated[float, "dropout of the adapters of --llm-lora", requires("llm_lora")] = 0.05
    teach_steps: Annotated[
        int, "steps that --llm tiny-qwen first learns the captions as a language", requires("llm", TINY_LLM)
    ] = 800
    prompt: Annotated[str, "text that the language model reads after the image"] = PROMPT
    max_length: Annotated[int, "tokens of a caption with its end; longer ones are cut, and counted"] = 64
    checkpoint_activations: Annotated[bool, "recompute activations in the backward pass: less memory, slower"] = False
    cache: Annotated[
        str, "reuse the frozen encoder's patches of each image: off, auto (~/.cache/vlkit, where it pays), or a folder"
    ] = "auto"
    val_limit: Annotated[int, "validation images, one caption each, per evaluation"] = 500
    samples: Annotated[int, "captions of validation images that each evaluation writes into metrics.jsonl"] = 8
    num_beams: Annotated[int, "beams of the captions that are scored at the end; 1: greedy"] = 1
    max_new_tokens: Annotated[int, "maximum tokens of a generated caption"] = 30

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
            raise UsageError("--prompt is empty", hint=f"give a text, such as {PROMPT!r}")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(Settings):
    """`vlkit caption`."""

    run: Annotated[Path, "finished run of train-fusion"]
    pictures: Annotated[tuple[str, ...], "images, and folders of images", POSITIONAL, REPEATED] = ()
    num_beams: Annotated[int, "beams of the beam search; 1: greedy"] = 1
    max_new_tokens: Annotated[int, "maximum tokens of a caption"] = 30
    prompt: Annotated[str | None, "text that the language model reads after the image (default: the run's)"] = None
    batch_size: Annotated[int, "images captioned at once"] = 16
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, "precision of matrix products (default: the run's)"
    ] = None
    decode: Annotated[Decode | None, "how images are read (default: the run's way)"] = None
    out: Annotated[Path | None, "file for JSON lines of {image, caption}; resumes where it stopped"] = None
    limit: Annotated[int | None, "caption only the first images"] = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_beams", "max_new_tokens", "batch_size", "limit")
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("--prompt is empty", hint=f"give a text, such as {PROMPT!r}")
