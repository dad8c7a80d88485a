"""Before the first step: complete settings, the dry run, and what the user should know."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.config.base import require_resolved
from vlkit.config.data import TINY_MODELS
from vlkit.config.fusion import TrainFusionConfig
from vlkit.config.presets import model_preset
from vlkit.config.training import TrainingConfig, TrainRetrievalConfig
from vlkit.data.loading.epoch_sampler import EpochSampler
from vlkit.data.loading.retrieval_batches import PairDataset
from vlkit.errors import UsageError
from vlkit.models import loading, tuning
from vlkit.models.cache.feature_cache import FrozenImages
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.vision_encoder import VisionEncoder
from vlkit.models.device import best_device, best_precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.families import dual_family
from vlkit.runs import Run, default_run_name
from vlkit.training.setup.estimates import (
    Estimate,
    MetaModels,
    estimate_fusion,
    estimate_retrieval,
    fusion_memory_hints,
)
from vlkit.training.setup.fill_cache import CacheDemand, CachePlan, plan_cache, plan_caches
from vlkit.training.setup.rows import CaptionRows, RetrievalRows

# Batches over which false negatives are counted before training starts.
COUNTED_BATCHES = 20
DEFAULT_FUSION_STEPS = 1200


def resolve_retrieval(config: TrainRetrievalConfig, rows: RetrievalRows) -> TrainRetrievalConfig:
    """Fill in what depends on data and model, so that the snapshot repeats the run.

    Raises:
        UsageError: a batch larger than the data, a warm-up longer than the run, or an unknown model.
    """
    config = _start_from_run(config)
    preset = model_preset(config.model, config.text_model)
    batch_size = _batch_size(config, config.batch_size or preset["batch_size"], len(rows.train), "pairs")
    model = loading.model_config(config.model, config.text_model)
    if config.tune == "last":
        tuning.check_depth(model, config.unfreeze_layers)
    batches = EpochSampler.from_rows(rows.train, batch_size, config.seed).batches_per_epoch
    parameters = tuning.count_parameters(loading.encoder_on_meta(model)).total
    return dataclasses.replace(
        config,
        # A local folder is recorded by its whole path, so that the run is understood from anywhere.
        model=whole_path(config.model),
        text_model=whole_path(config.text_model) if config.text_model else None,
        name=config.name or default_run_name("train-retrieval", require_resolved(config.data)),
        batch_size=batch_size,
        lr=config.lr or (1e-4 if config.tune == "lora" else 1e-5),
        loss=config.loss or dual_family(model.model_type).loss,
        precision=config.precision or best_precision(best_device(), parameters),
        **_schedule(config, batches, default_epochs=preset.get("epochs", 1)),
    )


def resolve_fusion(config: TrainFusionConfig, rows: CaptionRows, models: MetaModels) -> TrainFusionConfig:
    """Fill in what depends on data and models, so that the snapshot repeats the run.

    Raises:
        UsageError: a batch larger than the data, or a warm-up longer than the run.
    """
    batch_size = _batch_size(config, config.batch_size, len(rows.train), "captions")
    batches = EpochSampler.from_rows(rows.train, batch_size, config.seed, min_rows=1).batches_per_epoch
    parameters = sum(p.numel() for p in models.language.parameters())
    return dataclasses.replace(
        config,
        data=rows.pairs.folder,
        vision=whole_path(config.vision),
        llm=whole_path(config.llm),
        name=config.name or default_run_name("train-fusion", require_resolved(config.data)),
        batch_size=batch_size,
        precision=config.precision or best_precision(best_device(), parameters),
        **_schedule(config, batches, default_steps=DEFAULT_FUSION_STEPS),
    )


def _start_from_run(config: TrainRetrievalConfig) -> TrainRetrievalConfig:
    """Take the model of --init-from from that run. Its weights are copied, so the run may be deleted later."""
    if config.init_from is None:
        return config
    run = Run(Path(config.init_from))
    settings = run.config()
    if not run.finished:
        raise UsageError(f"--init-from {run.folder}: that run is not finished", hint="train it to its end first")
    if config.was_given("model") and config.model != settings["model"]:
        message = f"--init-from {run.folder} is a {settings['model']}, --model says {config.model}"
        raise UsageError(message, hint="leave out --model: the run names its model")
    if settings.get("quantize"):
        raise UsageError(f"--init-from {run.folder}: its adapter needs its model in 4 bits, and cannot be merged")
    return dataclasses.replace(
        config, model=settings["model"], text_model=settings.get("text_model"), init_from=run.folder.resolve()
    )


def _batch_size(config: TrainingConfig, batch_size: int, rows: int, noun: str) -> int:
    """Return the batch size, at most the number of rows; one that the user gave is refused where it is larger."""
    if batch_size > rows and config.was_given("batch_size"):
        message = f"--batch-size {batch_size} is larger than the {rows} training {noun}"
        raise UsageError(message, hint=f"at most --batch-size {rows}")
    return min(batch_size, rows)


def _schedule(
    config: TrainingConfig, batches_per_epoch: int, *, default_epochs: float = 1, default_steps: int | None = None
) -> dict[str, Any]:
    """Return steps, eval_every and save_every; epochs become steps."""

    def steps_in(epochs: float) -> int:
        return max(1, round(epochs * batches_per_epoch / config.grad_accum))

    steps = steps_in(config.epochs) if config.epochs else config.steps or default_steps or steps_in(default_epochs)
    if config.warmup >= steps:
        message = f"--warmup {config.warmup:g} is not below the {steps} steps"
        raise UsageError(message, hint="a number below 1 is a share of the steps")
    eval_every = math.ceil(steps / 10) if config.eval_every is None else config.eval_every or steps_in(1)
    save_every = config.save_every or eval_every
    return {"steps": steps, "epochs": None, "eval_every": eval_every, "save_every": save_every}


def whole_path(name: str) -> str:
    """Return a model's name; of a local folder the absolute path."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def false_negatives_per_row(dataset: PairDataset, sampler: EpochSampler) -> float:
    """Return how many texts of a batch, besides its own, match a row's image: `eye` labels would push them away.

    The mean over the rows of the first batches.
    """
    count = min(COUNTED_BATCHES, sampler.batches_per_epoch)
    batches = [indices.rows for indices, _ in zip(sampler, range(count), strict=False)]
    return sum(map(dataset.count_false_negatives, batches)) / sum(map(len, batches))


def print_retrieval_start(
    counts: tuning.ParameterCounts, run: Run, dataset: PairDataset, config: TrainRetrievalConfig, encoder: DualEncoder
) -> None:
    """Print sizes, what is trained, and what the user should know of the data."""
    work = f"{config.steps} steps of {config.batch_size} x {config.grad_accum}"
    console.say(f"{run.folder}: {len(dataset)} pairs, {work}, {config.precision} on {encoder.device}")
    console.say(f"{config.model}, {config.tune}: {counts}")
    for line in warnings_before_training(dataset, config, encoder):
        console.say(line)


def print_fusion_start(
    counts: tuning.ParameterCounts,
    run: Run,
    rows: CaptionRows,
    config: TrainFusionConfig,
    captioner: Captioner,
    truncated: int,
) -> None:
    """Print sizes, what is trained, and what the user should know of the captions."""
    captions = len(rows.train)
    work = f"{config.steps} steps of {config.batch_size} x {config.grad_accum}"
    console.say(f"{run.folder}: {captions} captions, {work}, {config.precision} on {captioner.device}")
    console.say(f"{config.vision} and {config.llm} ({config.quantize}): {counts}")
    tokens = captioner.fusion.shape.tokens
    console.say(f"the language model reads {captioner.overhead} tokens before a caption, {tokens} of them the image")
    if not captioner.language.has_chat:
        console.warn(f"{config.llm} has no chat template: it reads image and prompt without one")
    if config.vision in TINY_MODELS:
        console.warn(f"{config.vision} is untrained: --vision RUN takes an encoder that train-retrieval has trained")
    if rows.empty:
        console.warn(f"{rows.empty} captions without a word are left out")
    if truncated:
        message = f"{truncated} of {captions} captions are longer than {config.max_length} tokens and are cut"
        console.warn(f"{message}: the model does not learn where they end; raise --max-length")


def warnings_before_training(dataset: PairDataset, config: TrainRetrievalConfig, encoder: DualEncoder) -> list[str]:
    """Return lines that the user should read before the first step."""
    batch_size = require_resolved(config.batch_size)
    sampler = EpochSampler.from_rows(dataset, batch_size, config.seed)
    treatment = {"eye": "pushes them apart", "mask": "ignores them", "multi-positive": "treats them as matches"}
    lines = [
        f"a batch has {false_negatives_per_row(dataset, sampler):.2f} matching texts per row beside its own; "
        f"--labels {config.labels} {treatment[config.labels]}"
    ]
    if config.grad_accum > 1:
        batch, step = batch_size - 1, batch_size * config.grad_accum - 1
        lines.append(f"accumulation shares no negatives: a pair is contrasted with {batch} others, not with {step}")
        lines.append(f"--batch-size {step + 1} --micro-batch {batch + 1} contrasts it with {step}, in the same memory")
    if dataset.negative_texts:
        texts = sum(map(len, dataset.negative_texts.values())) / len(dataset)
        lines.append(
            f"negatives: {texts:.2f} texts a row join its batch as non-matches; --no-negatives leaves them out"
        )
    if dataset.augmenter is not None:
        written = ", including those that augment wrote" if dataset.augmented_image_count else ""
        lines.append(f"images are augmented anew in every epoch{written}; validation images are not")
    if dataset.truncated:
        limit = encoder.text_limit
        lines.append(f"{dataset.truncated} of {len(dataset.tokens)} texts are cut: they are longer than {limit} tokens")
    return lines


def print_retrieval_dry_run(config: TrainRetrievalConfig, rows: RetrievalRows) -> dict[str, Any]:
    """Print resolved settings, counts and estimates, and return them as --json prints them; nothing is written.

    Raises:
        ResourceError: the checkpoints would not fit on the disk.
    """
    encoder = loading.encoder_on_meta(loading.model_config(config.model, config.text_model))
    counts = tuning.apply_tuning(encoder, config, seed=config.seed)
    caches = plan_caches(config, encoder, _cache_demand(rows, encoder, config))
    estimate = estimate_retrieval(config, counts, encoder, rows.negative_count / len(rows.train))
    batches = EpochSampler.from_rows(rows.train, require_resolved(config.batch_size), config.seed).batches_per_epoch
    facts = {
        "settings": config.to_dict(),
        "rows": {"train": len(rows.train), "val": len(rows.val), "negatives": rows.negative_count},
        "steps_per_epoch": batches / config.grad_accum,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "memory_gb": estimate.memory_gb,
        "disk_gb": estimate.disk_gb,
        "cache": {plan.prefix.kind: plan.to_dict() for plan in caches},
        "dry_run": True,
    }
    _print_settings(config)
    steps = f"{facts['steps_per_epoch']:.1f} steps an epoch"
    console.print_result(f"{len(rows.train)} training and {len(rows.val)} validation pairs, {steps}")
    _print_estimate(counts, estimate, caches)
    estimate.check_disk(config)
    return facts


def print_fusion_dry_run(config: TrainFusionConfig, rows: CaptionRows, models: MetaModels) -> dict[str, Any]:
    """Print resolved settings, counts and estimates, and return them as --json prints them; nothing is written.

    Raises:
        ResourceError: memory or disk are too small.
    """
    counts, estimate = models.counts(config), estimate_fusion(config, models)
    cache = plan_patch_cache(config, models.vision, rows)
    batches = EpochSampler.from_rows(rows.train, config.batch_size, config.seed, min_rows=1).batches_per_epoch
    facts = {
        "settings": config.to_dict(),
        "rows": {"train": len(rows.train), "val": len(rows.val_all)},
        "steps_per_epoch": batches / config.grad_accum,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "memory_gb": {part: size / 2**30 for part, size in estimate.memory.items()},
        "disk_gb": estimate.disk_gb,
        "cache": "off" if cache is None else cache.to_dict(),
        "dry_run": True,
    }
    _print_settings(config)
    _print_estimate(counts, estimate, [] if cache is None else [cache])
    estimate.check_memory(best_device(), fusion_memory_hints(config))
    estimate.check_disk(config)
    return facts


def _print_settings(config: TrainingConfig) -> None:
    console.print_table("settings", ("", "value"), [(name, str(value)) for name, value in config.to_dict().items()])


def _print_estimate(counts: tuning.ParameterCounts, estimate: Estimate, caches: list[CachePlan]) -> None:
    rows = [(part, f"{size / 2**30:.2f} GB") for part, size in estimate.memory.items()]
    console.print_table("memory", ("part", "about"), rows)
    console.print_result(str(counts))
    console.print_result(f"memory about {estimate.memory_gb:.2f} GB, disk about {estimate.disk_gb:.2f} GB")
    for plan in caches:
        console.print_result(str(plan))


def plan_patch_cache(config: TrainFusionConfig, vision: VisionEncoder, rows: CaptionRows) -> CachePlan | None:
    """Plan the cache of the frozen encoder's patches; None with --cache off."""
    if config.cache == "off":
        return None
    prefix = FrozenImages.from_encoder(vision, require_resolved(config.precision))
    train, val = (part.frame["image_id"].nunique() for part in (rows.train, rows.val_all))
    return plan_cache(
        prefix, config.cache, train, val, require_resolved(config.steps) * config.batch_size * config.grad_accum
    )


def _cache_demand(rows: RetrievalRows, encoder: DualEncoder, config: TrainRetrievalConfig) -> CacheDemand:
    """Return what a cache would hold. Without a tokenizer, texts are assumed to be as long as the model allows."""
    negative_texts = set() if rows.negatives is None else set(rows.negatives["text_id"])
    texts = set(rows.train.frame["text_id"]) | negative_texts
    validation = max(len(set(rows.val.frame["image_id"])), len(set(rows.val.frame["text_id"])))
    images = len(set(rows.train.frame["image_id"]))
    return CacheDemand(images, len(texts), validation, encoder.text_limit, config.augment is not None)
