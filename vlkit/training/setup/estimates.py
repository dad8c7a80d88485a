"""Memory and disk that a run will need, for both trainers."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlkit.config.base import require_resolved
from vlkit.config.data import TINY_LLM
from vlkit.config.fusion import TrainFusionConfig
from vlkit.config.training import TrainingConfig, TrainRetrievalConfig
from vlkit.errors import ResourceError
from vlkit.models import quantization
from vlkit.models.captioner.fusion import Fusion, FusionShape
from vlkit.models.captioner.language_model import (
    ATTENTION_MODULES,
    WORDS_AT_ONCE,
    LanguageModel,
    llm_config,
    llm_on_meta,
)
from vlkit.models.captioner.tiny_llm import tiny_llm_config
from vlkit.models.captioner.vision_encoder import VisionEncoder, vision_config, vision_encoder_on_meta
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tuning import ParameterCounts
from vlkit.runs import local_runs_dir
from vlkit.storage import format_bytes, nearest_existing

# Bytes per weight of a quantised language model's layers.
WEIGHT_BYTES = {"nf4": quantization.BYTES_PER_WEIGHT, "int8": 1.0}
# Prompt and chat template, before a tokenizer is loaded: about so many tokens.
PROMPT_TOKENS = 40
# Room for everything that is not counted.
MARGIN = 1.1
# A checkpoint holds the trained weights and two moments, float32.
CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class Estimate:
    """What a run needs, roughly, in bytes.

    Attributes:
        memory: part -> bytes at the peak.
        disk: bytes of all checkpoints and of the exported model.
    """

    memory: Mapping[str, float]
    disk: float

    @property
    def memory_gb(self) -> float:
        """GB of 2^30 bytes, all parts."""
        return sum(self.memory.values()) / 2**30

    @property
    def disk_gb(self) -> float:
        """GB of 2^30 bytes."""
        return self.disk / 2**30

    def check_disk(self, config: TrainingConfig) -> None:
        """Check before training starts that what the run will write fits on its disk.

        Raises:
            ResourceError: it does not.
        """
        folder = local_runs_dir(config.runs_dir) / str(config.name)
        written = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*") if path.is_file())
        disk = nearest_existing(folder)
        needed, free = self.disk - written, shutil.disk_usage(disk).free
        if needed > free:
            message = f"checkpoints and model need about {format_bytes(needed)}; {disk} has {format_bytes(free)} free"
            raise ResourceError(message, hint="a smaller --keep, or another --runs-dir")

    def check_memory(self, device: torch.device, hints: Mapping[str, str]) -> None:
        """Check before a model is loaded that it fits into memory.

        Args:
            hints: part -> the setting that makes it smaller.

        Raises:
            ResourceError: names the largest part, and its hint.
        """
        needed, free = sum(self.memory.values()) * MARGIN, _free_memory(device)
        if needed > free:
            largest = max(self.memory, key=lambda part: self.memory[part])
            message = f"this run needs about {format_bytes(needed)} of memory; {device} has {format_bytes(free)} free"
            part = f"the largest part is the {largest}, {format_bytes(self.memory[largest])}"
            raise ResourceError(f"{message}; {part}", hint=hints[largest])


def fixed_micro_batch(config: TrainingConfig) -> int | None:
    """Return the --micro-batch that is a number; None where all of a batch is tried at first."""
    return None if config.micro_batch in (None, "auto") else int(config.micro_batch)


def estimate_retrieval(
    config: TrainRetrievalConfig, counts: ParameterCounts, encoder: DualEncoder, negatives_per_pair: float = 0.0
) -> Estimate:
    """Estimate train-retrieval, from a model that may be on the meta device.

    Activations: s b h (34 + 5 a s / h) bytes a layer at 16 bit (arXiv 2205.05198, equation 2).
    """
    batch_size = require_resolved(config.batch_size)
    wide = 2.0 if config.precision == "fp32" else 1.0
    vision, text = encoder.model.config.vision_config, encoder.model.config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    activations = matrices = 0.0
    for tower, tokens, items in ((vision, patches, 1.0), (text, encoder.text_limit, 1.0 + negatives_per_pair)):
        width, layers, heads = tower.hidden_size, tower.num_hidden_layers, tower.num_attention_heads
        at_once = min(batch_size * items, fixed_micro_batch(config) or math.inf)
        layer = wide * tokens * at_once * width * (34 + 5 * heads * tokens / width)
        # With recomputation a layer keeps its input, and one layer at a time all its activations.
        inputs = 2 * wide * tokens * at_once * width
        activations += layers * inputs + layer if config.checkpoint_activations else layers * layer
        matrices += layers * (4 * width**2 + 2 * width * getattr(tower, "intermediate_size", 4 * width))
    weights = 4 * counts.total - (4 - quantization.BYTES_PER_WEIGHT) * matrices * bool(config.quantize)
    exported = 4 * (counts.trainable if config.tune == "lora" else counts.total) + 4 * counts.total * config.merge
    return Estimate(
        # Gradients and two moments of what is trained, float32.
        memory={"weights": weights, "trained": 12.0 * counts.trainable, "activations": activations},
        disk=CHECKPOINT_BYTES * counts.trainable * (config.keep + 2) + exported,
    )


@dataclass(frozen=True)
class MetaModels:
    """The models of a train-fusion run on the meta device: names, shapes and counts, no weights."""

    vision: VisionEncoder
    language: LanguageModel
    fusion: Fusion

    @classmethod
    def from_config(cls, config: TrainFusionConfig) -> MetaModels:
        """Build them from the models' configurations.

        Raises:
            UsageError, NetworkError: a model cannot be found.
        """
        vision = vision_encoder_on_meta(vision_config(config.vision))
        language = llm_on_meta(tiny_llm_config() if config.llm == TINY_LLM else llm_config(config.llm))
        with torch.device("meta"):
            shape = FusionShape(
                vision.width, vision.patches, language.hidden_size, config.fusion, config.queries, config.fusion_layers
            )
            return cls(vision, language, Fusion(shape))

    def counts(self, config: TrainFusionConfig) -> ParameterCounts:
        """Count trained and all parameters."""
        trained = sum(p.numel() for p in self.fusion.parameters()) + _lora_parameters(config, self.language)
        return ParameterCounts(
            trained, trained + sum(p.numel() for m in (self.vision, self.language) for p in m.parameters())
        )


def estimate_fusion(config: TrainFusionConfig, models: MetaModels) -> Estimate:
    """Estimate train-fusion, part by part."""
    language = models.language.model
    llm = language.config
    wide = 4 if config.precision == "fp32" else 2
    total = sum(p.numel() for p in models.language.parameters())
    outer = (language.get_input_embeddings(), language.get_output_embeddings())
    unquantized = {id(module.weight) for module in outer if module is not None}
    matrices = sum(p.numel() for p in language.parameters() if p.ndim > 1 and id(p) not in unquantized)
    weights = matrices * WEIGHT_BYTES.get(config.quantize, wide) + (total - matrices) * wide
    at_once = min(config.batch_size, fixed_micro_batch(config) or config.batch_size)
    tokens = at_once * (models.fusion.shape.tokens + PROMPT_TOKENS + config.max_length)
    layer, layers = tokens * _frozen_layer_bytes(llm, wide), llm.num_hidden_layers
    inputs = layers * 2 * wide * tokens * llm.hidden_size
    trained = models.counts(config).trainable
    return Estimate(
        memory={
            "vision encoder": 4.0 * sum(p.numel() for p in models.vision.parameters()),
            "language model": float(weights),
            "trained": 16.0 * trained,
            "activations": float(inputs + layer if config.checkpoint_activations else layers * layer),
            "output layer": float(2 * 4 * min(WORDS_AT_ONCE, at_once * config.max_length) * llm.vocab_size),
        },
        disk=CHECKPOINT_BYTES * trained * (config.keep + 2),
    )


def fusion_memory_hints(config: TrainFusionConfig) -> dict[str, str]:
    """Return, for each part of the estimate, the setting that makes it smaller."""
    micro_batch = "--micro-batch 1, which changes no result"
    activations = f"--checkpoint-activations, or {micro_batch}"
    if config.checkpoint_activations:
        activations = f"{micro_batch}; or a smaller --max-length"
    return {
        "vision encoder": "a smaller --vision",
        "language model": "--quantize nf4" if config.quantize != "nf4" else "a smaller --llm",
        "trained": "fewer --fusion-layers, or a smaller --llm",
        "activations": activations,
        "output layer": activations,
    }


def _frozen_layer_bytes(llm: Any, wide: int) -> float:
    """Return the bytes per token that a frozen decoder layer keeps for the backward pass.

    Its matrices are not trained, so their inputs are not kept: two norms in float32; queries, keys, values and the
    attention's output; gate, up and their product.
    """
    hidden = llm.hidden_size
    heads = llm.num_attention_heads
    keys = getattr(llm, "num_key_value_heads", heads) / heads * hidden
    inner = getattr(llm, "intermediate_size", None) or 4 * hidden
    return float(4 * 4 * hidden + wide * (2 * hidden + 2 * keys + 3 * inner))


def _lora_parameters(config: TrainFusionConfig, language: LanguageModel) -> int:
    """Count the parameters of --llm-lora: two thin matrices at each projection of the attention."""
    if config.llm_lora is None:
        return 0
    shapes = [m.weight.shape for name, m in language.model.named_modules() if re.fullmatch(ATTENTION_MODULES, name)]
    return sum(config.llm_lora * sum(shape) for shape in shapes)


def _free_memory(device: torch.device) -> int:
    """Return the device's free bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
