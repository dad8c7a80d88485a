"""Before train-fusion's first step: its rows, the complete settings, and what it will cost, part by part."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlkit import console
from vlkit.config.data import TINY_LLM
from vlkit.config.fusion import TrainFusionConfig
from vlkit.config.presets import resolve_prep
from vlkit.data.loading.epoch_sampler import EpochSampler
from vlkit.data.pairs import TABLE_FILES, Pairs, read_pairs
from vlkit.data.prep.prepare import prepare
from vlkit.errors import DataError, ResourceError, UsageError
from vlkit.evaluation.captioning.image_reliance import one_caption_per_image
from vlkit.models.cache.feature_cache import FrozenPrefix
from vlkit.models.captioner.fusion import Fusion, FusionShape
from vlkit.models.captioner.language_model import CHUNK, LanguageModel, llm_config, llm_on_meta
from vlkit.models.captioner.tiny_llm import tiny_llm_config
from vlkit.models.captioner.vision_encoder import VisionEncoder, vision_config, vision_encoder_on_meta
from vlkit.models.device import best_device, best_precision
from vlkit.models.quantization import BYTES
from vlkit.runs import default_run_name, local_runs_dir
from vlkit.storage import Location, format_bytes, nearest_existing
from vlkit.training.fill_cache import CachePlan, planned
from vlkit.training.plan import whole_path

if TYPE_CHECKING:
    import pandas as pd

# Bytes a weight of the language model's layers takes.
WEIGHT_BYTES = {"nf4": BYTES, "int8": 1.0}
# No tokenizer is at hand yet: prompt and chat template take about so many.
PROMPT_TOKENS = 40
# What is left aside for everything that is not counted.
MARGIN = 1.1


@dataclass(frozen=True)
class CaptionRows:
    """What a run trains on and selects by.

    Attributes:
        val: of each validation picture one caption; `val_all` has all of them.
        empty: captions of training and validation without a word, left out.
    """

    pairs: Pairs
    train: Pairs
    val: Pairs
    val_all: Pairs
    empty: int

    @classmethod
    def of(cls, config: TrainFusionConfig, *, dry_run: bool = False) -> CaptionRows:
        """Read the prepared folder, or prepare a raw COCO one on the way; test rows are not even looked at."""
        assert config.data is not None
        pairs = read_pairs(_prepared(config.data, dry_run=dry_run))
        told, _ = pairs.positives().with_text()
        train = told.split("train", limit=config.limit, seed=config.seed)
        val_all = told.split("val", limit=config.limit, seed=config.seed)
        if not len(train):
            raise DataError(f"{pairs.folder}: there are no training pairs")
        if config.patience is not None and not len(val_all):
            raise UsageError("--patience waits for validation, and there are no validation rows")
        val = one_caption_per_image(val_all, config.val_limit, config.seed)
        _, empty = Pairs(_selecting(pairs), pairs.folder, pairs.metadata).with_text()
        _refuse_gone(train, val_all)
        return cls(pairs, train, val, val_all, empty)

    def facts(self) -> dict[str, Any]:
        """What environment.yaml remembers of the data."""
        path, fingerprint = str(self.pairs.folder.absolute), self.pairs.fingerprint
        return {"path": path, "fingerprint": fingerprint, "train": len(self.train), "val": len(self.val_all)}


def _selecting(pairs: Pairs) -> pd.DataFrame:
    frame = pairs.frame
    return frame[(frame["match"] == 1) & frame["split"].isin(("train", "val"))]


def _refuse_gone(*parts: Pairs) -> None:
    """Refuse rows whose pictures are no longer there, before a model is loaded for them; remote ones are not looked at.

    Raises:
        DataError: names the first.
    """
    for part in parts:
        places = part.image_locations(part.unique_images())
        gone = [place for place in places if not place.is_remote and not place.path.is_file()]
        if gone:
            more = f", nor {len(gone) - 1} others" if len(gone) > 1 else ""
            raise DataError(f"no such image: {gone[0]}{more}", hint="bring them back, or run prep again")


def _prepared(data: Location, *, dry_run: bool) -> Location:
    """The prepared folder of --data: itself, or, of a raw COCO folder, the one within it, made if it is not there."""
    if data.is_remote or not data.path.is_dir() or any((data.path / name).is_file() for name in TABLE_FILES):
        return data
    if not any(data.path.glob("annotations/captions_*.json")):
        return data
    prepared = data / "prepared"
    if not (prepared.path / "pairs.parquet").is_file():
        if dry_run:
            told = f"{data} is a raw COCO folder: without --dry-run it is prepared on the way"
            raise UsageError(told, hint=f"vlkit prep --domain coco --source {data} --out {prepared}")
        console.say(f"{data} is a raw COCO folder: vlkit prep --domain coco --source {data} --out {prepared}")
        prepare(resolve_prep({"domain": "coco", "source": data, "out": prepared}))
    return prepared


@dataclass(frozen=True)
class Parts:
    """The models of a run on the meta device: names, shapes and counts without their weights."""

    vision: VisionEncoder
    language: LanguageModel
    fusion: Fusion

    @classmethod
    def of(cls, config: TrainFusionConfig) -> Parts:
        """Those of the settings.

        Raises:
            UsageError, NetworkError: no such model.
        """
        vision = vision_encoder_on_meta(vision_config(config.vision))
        of_llm = tiny_llm_config() if config.llm == TINY_LLM else llm_config(config.llm)
        language = llm_on_meta(of_llm)
        with torch.device("meta"):
            fusion = Fusion(shape_of(config, vision.width, vision.patches, language.hidden_size))
        return cls(vision, language, fusion)


def shape_of(config: TrainFusionConfig, width: int, patches: int, hidden: int) -> FusionShape:
    """The fusion that the settings ask for."""
    return FusionShape(width, patches, hidden, config.fusion, config.queries, config.fusion_layers)


def complete(config: TrainFusionConfig, rows: CaptionRows, parts: Parts) -> TrainFusionConfig:
    """Fill in what depends on the data and the models, so that the snapshot repeats the run.

    Raises:
        UsageError: a batch larger than the data, or a warm-up longer than the run.
    """
    count = len(rows.train)
    if config.batch_size > count and config.was_given("batch_size"):
        raise UsageError(f"--batch-size {config.batch_size} is larger than the {count} training captions")
    batch_size = min(config.batch_size, count)
    per_epoch = EpochSampler.from_rows(rows.train, batch_size, config.seed, min_rows=1).batches_per_epoch
    by_epochs = config.epochs and max(1, round(config.epochs * per_epoch / config.grad_accum))
    total = int(by_epochs or config.steps or 1200)
    if config.warmup >= total:
        told = f"--warmup {config.warmup:g} is not below the {total} steps"
        raise UsageError(told, hint="below 1 it is a share of them")
    each_epoch = max(1, round(per_epoch / config.grad_accum))
    eval_every = math.ceil(total / 10) if config.eval_every is None else config.eval_every or each_epoch
    parameters = sum(p.numel() for p in parts.language.parameters())
    return dataclasses.replace(
        config,
        data=rows.pairs.folder,
        vision=whole_path(config.vision),
        llm=whole_path(config.llm),
        name=config.name or default_run_name("train-fusion", config.data),
        steps=total,
        epochs=None,
        batch_size=batch_size,
        precision=config.precision or best_precision(best_device(), parameters),
        eval_every=eval_every,
        save_every=config.save_every or eval_every,
    )


def cache_plan(config: TrainFusionConfig, vision: VisionEncoder, rows: CaptionRows) -> CachePlan | None:
    """What is kept of the frozen encoder's patches; None with --cache off."""
    if config.cache == "off":
        return None
    frozen = FrozenPrefix.of(vision, "pictures", config.precision)
    pictures, validation = (part.frame["image_id"].nunique() for part in (rows.train, rows.val_all))
    return planned(frozen, config.cache, pictures, validation, config.steps * config.batch_size * config.grad_accum)


def memory_parts(config: TrainFusionConfig, parts: Parts) -> dict[str, float]:
    """Bytes at the peak, part by part; rough."""
    language, fusion = parts.language, parts.fusion
    config_of = language.model.config
    overhead = fusion.shape.tokens + PROMPT_TOKENS
    wide = 4 if config.precision == "fp32" else 2
    total = sum(p.numel() for p in language.parameters())
    outer = (language.model.get_input_embeddings(), language.model.get_output_embeddings())
    spared = {id(module.weight) for module in outer if module is not None}
    matrices = sum(p.numel() for p in language.model.parameters() if p.ndim > 1 and id(p) not in spared)
    weights = matrices * WEIGHT_BYTES.get(config.quantize, wide) + (total - matrices) * wide
    trained = sum(p.numel() for p in fusion.parameters()) + lora_numbers(config, language)
    micro = None if config.micro_batch in (None, "auto") else int(config.micro_batch)
    at_once = min(config.batch_size, micro or config.batch_size)
    tokens = at_once * (overhead + config.max_length)
    layer = tokens * _layer_bytes(config_of, wide)
    layers = config_of.num_hidden_layers
    kept = (
        layers * 2 * wide * tokens * config_of.hidden_size + layer if config.checkpoint_activations else layers * layer
    )
    head = 2 * 4 * min(CHUNK, at_once * config.max_length) * config_of.vocab_size
    return {
        "vision encoder": 4.0 * sum(p.numel() for p in parts.vision.parameters()),
        "language model": float(weights),
        "trained": 16.0 * trained,
        "activations": float(kept),
        "output layer": float(head),
    }


def _layer_bytes(config: Any, wide: int) -> float:
    """What a frozen decoder layer keeps of a token for the way back. Its matrices do not learn, so not their inputs.

    Two norms in float32; queries, keys, values and what they found; gate, up and their product.
    """
    hidden = config.hidden_size
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", heads) / heads * hidden
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return 4 * 4 * hidden + wide * (2 * hidden + 2 * keys + 3 * inner)


def lora_numbers(config: TrainFusionConfig, language: LanguageModel) -> int:
    """Parameters of --llm-lora: two thin matrices at each projection of the attention."""
    if config.llm_lora is None:
        return 0
    import re

    from vlkit.models.captioner.language_model import ATTENTION

    shapes = [m.weight.shape for n, m in language.model.named_modules() if re.fullmatch(ATTENTION, n)]
    return sum(config.llm_lora * sum(shape) for shape in shapes)


def refuse_what_cannot_fit(config: TrainFusionConfig, parts: Mapping[str, float]) -> None:
    """Before a night is spent on it: memory and disk.

    Raises:
        ResourceError: names the part, and the setting to change.
    """
    device = best_device()
    needed, there = sum(parts.values()) * MARGIN, _memory(device)
    if needed > there:
        largest = max(parts, key=lambda name: parts[name])
        told = f"this needs about {format_bytes(needed)} of memory, {format_bytes(there)} are there on {device};"
        raise ResourceError(
            f"{told} the most for: {largest}, {format_bytes(parts[largest])}", hint=_smaller(config, largest)
        )
    folder = local_runs_dir(config.runs_dir) / str(config.name)
    disk = 12 / 16 * parts["trained"] * (config.keep + 2)
    free = shutil.disk_usage(nearest_existing(folder)).free
    if disk > free:
        told = f"checkpoints need about {format_bytes(disk)}, {format_bytes(free)} are free in {nearest_existing(folder)}"
        raise ResourceError(told, hint="a smaller --keep, or another --runs-dir")


def _smaller(config: TrainFusionConfig, largest: str) -> str:
    if largest == "language model":
        return "--quantize nf4" if config.quantize != "nf4" else "a smaller --llm"
    if largest == "trained":
        return "fewer --fusion-layers, or a smaller --llm"
    if largest == "vision encoder":
        return "a smaller --vision"
    if not config.checkpoint_activations:
        return "--checkpoint-activations, or --micro-batch 1, which changes no result"
    return "--micro-batch 1, which changes no result; or a smaller --max-length"


def _memory(device: torch.device) -> int:
    """Bytes of the device that nobody holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    told = Path("/proc/meminfo")
    if told.is_file():
        lines = dict(line.split(":", 1) for line in told.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def dry_run_of(config: TrainFusionConfig, rows: CaptionRows, parts: Parts) -> dict[str, Any]:
    """Resolved settings, counts and estimates; nothing is written.

    Raises:
        ResourceError: it would not fit.
    """
    memory = memory_parts(config, parts)
    plan = cache_plan(config, parts.vision, rows)
    trained = sum(p.numel() for p in parts.fusion.parameters()) + lora_numbers(config, parts.language)
    total = trained + sum(p.numel() for m in (parts.vision, parts.language) for p in m.parameters())
    per_epoch = EpochSampler.from_rows(rows.train, config.batch_size, config.seed, min_rows=1).batches_per_epoch
    facts = {
        "settings": config.to_dict(),
        "rows": {"train": len(rows.train), "val": len(rows.val_all)},
        "steps_per_epoch": per_epoch / config.grad_accum,
        "trainable_parameters": trained,
        "total_parameters": total,
        "memory_gb": {name: value / 2**30 for name, value in memory.items()},
        "disk_gb": 12 * trained * (config.keep + 2) / 2**30,
        "cache": "off" if plan is None else plan.facts(),
        "dry_run": True,
    }
    console.print_table("settings", ("", "value"), [(key, str(value)) for key, value in facts["settings"].items()])
    console.print_table("memory", ("part", "about"), [(name, format_bytes(value)) for name, value in memory.items()])
    console.print_result(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
    console.print_result(f"memory about {format_bytes(sum(memory.values()))}, disk about {facts['disk_gb']:.2f} GB")
    if plan is not None:
        console.print_result(str(plan))
    refuse_what_cannot_fit(config, memory)
    return facts
