"""Before the first step: the rows, the complete settings, what the run will cost and what the user should hear."""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkit import console
from vlkit.config.presets import model_preset
from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.loading.epoch_sampler import EpochSampler
from vlkit.data.loading.retrieval_batches import PairDataset
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.distributed import SINGLE, World
from vlkit.errors import DataError, ResourceError, UsageError
from vlkit.evaluation.retrieval.retention import read_guard_rows
from vlkit.models import dual_encoder as towers_module
from vlkit.models import loading, quantization, tuning
from vlkit.models.device import best_device, best_precision
from vlkit.models.dual_encoder import FAMILIES, DualEncoder
from vlkit.runs import Run, default_run_name, local_runs_dir
from vlkit.storage import format_bytes, nearest_existing
from vlkit.training.fill_cache import Amounts, plans

if TYPE_CHECKING:
    import pandas as pd

FORECAST_BATCHES = 20


@dataclass(frozen=True)
class Rows:
    """What a run trains on and selects by.

    Attributes:
        wrong: rows that do not match, whose texts the pictures of `train` are contrasted with; None: there are none.
    """

    pairs: Pairs
    train: Pairs
    val: Pairs
    negatives: pd.DataFrame | None = None

    @classmethod
    def of(cls, config: TrainRetrievalConfig) -> Rows:
        """Read the prepared folder; test rows are not even looked at."""
        pairs = read_pairs(config.data)
        matching = pairs.positives()
        train, val = (matching.split(split, limit=config.limit, seed=config.seed) for split in ("train", "val"))
        if config.patience is not None and not len(val):
            raise UsageError("--patience waits for validation, and there are no validation rows")
        if config.interpolate and not len(val):
            raise UsageError("--interpolate is decided by validation, and there are no validation rows")
        if config.guard is not None:
            read_guard_rows(config.guard)  # A folder that is none is better known before the night than after it.
        if len(train) < 2:
            raise DataError(f"{pairs.folder}: {len(train)} training pairs; contrast needs at least 2")
        return cls(pairs, train, val, _wrong(pairs, train) if config.negatives else None)

    def facts(self) -> dict[str, Any]:
        """What environment.yaml remembers of the data."""
        path, fingerprint = str(self.pairs.folder.absolute), self.pairs.fingerprint
        added = self.pairs.metadata.get("augmentation", {}).get("fingerprint")
        counts = {"train": len(self.train), "val": len(self.val), "negatives": self.negatives}
        return {"path": path, "fingerprint": fingerprint, "augmentation": added, **counts}

    @property
    def negatives(self) -> int:
        """How many rows do not match."""
        return 0 if self.negatives is None else len(self.negatives)


def _wrong(pairs: Pairs, train: Pairs) -> pd.DataFrame | None:
    """The negative rows of the pictures that are trained on."""
    frame = pairs.frame
    of_split = (frame["match"] == 0) & (frame["split"] == "train")
    wrong = frame[of_split & frame["image_id"].isin(set(train.frame["image_id"]))]
    return wrong.reset_index(drop=True) if len(wrong) else None


def _begun_from(config: TrainRetrievalConfig) -> TrainRetrievalConfig:
    """--init-from: the model is the run's. Its weights are copied, so that it may go on living."""
    if config.init_from is None:
        return config
    run = Run(Path(config.init_from))
    settings = run.config()
    if not run.finished:
        raise UsageError(f"--init-from {run.folder}: that run is not finished", hint="train it to its end first")
    if config.was_given("model") and config.model != settings["model"]:
        raise UsageError(f"--init-from {run.folder} is a {settings['model']}, --model says {config.model}")
    if settings.get("quantize"):
        raise UsageError(f"--init-from {run.folder}: its adapter belongs on a model in 4 bits")
    return dataclasses.replace(
        config, model=settings["model"], text_model=settings.get("text_model"), init_from=run.folder.resolve()
    )


def complete(config: TrainRetrievalConfig, train: Pairs) -> TrainRetrievalConfig:
    """Fill in what depends on the data and the model, so that the snapshot repeats the run.

    Raises:
        UsageError: a batch larger than the data, or an unknown model.
    """
    rows = len(train)
    config = _begun_from(config)
    preset = model_preset(config.model, config.text_model)
    batch_size = config.batch_size or preset["batch_size"]
    if batch_size > rows:
        if config.was_given("batch_size"):
            raise UsageError(
                f"--batch-size {batch_size} is larger than the {rows} training pairs",
                hint=f"at most --batch-size {rows}",
            )
        batch_size = rows
    model = loading.model_config(config.model, config.text_model)
    parameters = tuning.count_parameters(towers_module.encoder_on_meta(model)).total
    per_epoch = EpochSampler.from_rows(train, batch_size, config.seed).batches_per_epoch
    total = config.steps or max(1, round((config.epochs or preset.get("epochs", 1)) * per_epoch / config.grad_accum))
    if config.warmup >= total:
        raise UsageError(
            f"--warmup {config.warmup:g} is not below the {total} steps", hint="below 1 it is a share of them"
        )
    if config.tune == "last":
        tuning.check_depth(model, config.unfreeze_layers)
    each_epoch = max(1, round(per_epoch / config.grad_accum))
    eval_every = math.ceil(total / 10) if config.eval_every is None else config.eval_every or each_epoch
    return dataclasses.replace(
        config,
        # A local folder is remembered by its whole path, so that the run is understood from anywhere.
        model=whole_path(config.model),
        text_model=whole_path(config.text_model) if config.text_model else None,
        name=config.name or default_run_name("train-retrieval", config.data),
        steps=total,
        epochs=None,
        batch_size=batch_size,
        lr=config.lr or (1e-4 if config.tune == "lora" else 1e-5),
        loss=config.loss or FAMILIES[model.model_type].loss,
        precision=config.precision or best_precision(best_device(), parameters),
        eval_every=eval_every,
        save_every=config.save_every or eval_every,
    )


def whole_path(name: str) -> str:
    """A model's name; of a local folder its whole path."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def dataset_of(rows: Rows, encoder: DualEncoder, config: TrainRetrievalConfig, world: World = SINGLE) -> PairDataset:
    """The training rows as this model wants them; this process' share of every batch."""
    return PairDataset(
        rows.train,
        encoder.pixel_spec,
        encoder.tokenize,
        encoder.pad,
        labels=config.labels,
        negatives=rows.negatives,
        augmenter=ImageAugmenter.from_settings(config.augment) if config.augment else None,
        world=world,
    )


def false_negatives(dataset: PairDataset, order: EpochSampler) -> float:
    """Texts of a batch, other than its own, that match a row's picture: what `eye` labels would push away from it.

    Returns:
        Their mean number over the rows of the first batches.
    """
    batches = [drawn.rows for drawn, _ in zip(order, range(min(FORECAST_BATCHES, order.batches_per_epoch)), strict=False)]
    return sum(map(dataset.matches_beside_own, batches)) / sum(map(len, batches))


def forecast(dataset: PairDataset, config: TrainRetrievalConfig, encoder: DualEncoder) -> list[str]:
    """What the user should hear before the first step."""
    order = EpochSampler.from_rows(dataset, config.batch_size, config.seed)
    wrong = false_negatives(dataset, order)
    treated = {"eye": "push apart", "mask": "leave alone", "multi-positive": "pull together"}[config.labels]
    told = f"{config.labels} labels {treated} such pairs"
    lines = [f"eye labels would make {wrong:.2f} false negatives a row at this batch size; {told}"]
    if config.grad_accum > 1:
        batch, step = config.batch_size - 1, config.batch_size * config.grad_accum - 1
        lines.append(f"accumulation shares no negatives: a pair is contrasted with {batch} others, not with {step}")
        lines.append(f"--batch-size {step + 1} --micro-batch {batch + 1} contrasts it with {step}, in the same memory")
    if dataset.negative_texts:
        texts = sum(map(len, dataset.negative_texts.values())) / len(dataset)
        lines.append(
            f"negatives: {texts:.2f} texts a row join its batch only to be told apart; --no-negatives is without"
        )
    if dataset.augmenter is not None:
        written = ", those too that augment wrote" if dataset.augmented_image_count else ""
        lines.append(f"pictures are varied anew in every epoch{written}; validation sees them as they are")
    if dataset.truncated:
        lines.append(
            f"{dataset.truncated} of {len(dataset.tokens)} texts are longer than {encoder.text_limit} tokens and are cut"
        )
    return lines


def dry_run_of(config: TrainRetrievalConfig, rows: Rows) -> dict[str, Any]:
    """Resolved settings, counts and estimates; nothing is written where the user would find it.

    Raises:
        ResourceError: the checkpoints would not fit on the disk.
    """
    encoder = towers_module.encoder_on_meta(loading.model_config(config.model, config.text_model))
    counts = tuning.apply_tuning(encoder, config, seed=config.seed)
    kept = plans(config, encoder, _amounts(rows, encoder, config))
    facts = {
        "settings": config.to_dict(),
        "rows": {"train": len(rows.train), "val": len(rows.val), "negatives": rows.negatives},
        "steps_per_epoch": _per_epoch(config, rows.train) / config.grad_accum,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        **_estimate(config, counts, encoder, rows.negatives / len(rows.train)),
        "cache": {plan.frozen.kind: plan.facts() for plan in kept},
        "dry_run": True,
    }
    console.print_table("settings", ("", "value"), [(key, str(value)) for key, value in facts["settings"].items()])
    steps = f"{facts['steps_per_epoch']:.1f} steps an epoch"
    console.print_result(f"{len(rows.train)} training and {len(rows.val)} validation pairs, {steps}")
    console.print_result(str(counts))
    console.print_result(f"memory about {facts['memory_gb']:.2f} GB, disk about {facts['disk_gb']:.2f} GB")
    for plan in kept:
        console.print_result(str(plan))
    refuse_small_disk(config, counts, encoder)
    return facts


def refuse_small_disk(config: TrainRetrievalConfig, counts: tuning.ParameterCounts, encoder: DualEncoder) -> None:
    """Before a night is spent on it: what the run will write has to fit.

    Raises:
        ResourceError: it does not.
    """
    needed = _estimate(config, counts, encoder, 0.0)["disk_gb"] * 2**30
    folder = local_runs_dir(config.runs_dir) / str(config.name)
    there = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*") if path.is_file())
    free = shutil.disk_usage(nearest_existing(folder)).free
    if needed - there > free:
        sizes = f"{format_bytes(needed - there)}, {format_bytes(free)} are free in {nearest_existing(folder)}"
        told = f"checkpoints and model need about {sizes}"
        raise ResourceError(told, hint="a smaller --keep, or another --runs-dir")


def _amounts(rows: Rows, encoder: DualEncoder, config: TrainRetrievalConfig) -> Amounts:
    """What a cache would hold. No tokenizer is at hand: texts are taken to be as long as they may be."""
    texts = set(rows.train.frame["text_id"]) | set(() if rows.negatives is None else rows.negatives["text_id"])
    validation = max(len(set(rows.val.frame["image_id"])), len(set(rows.val.frame["text_id"])))
    pictures = len(set(rows.train.frame["image_id"]))
    return Amounts(pictures, len(texts), validation, encoder.text_limit, config.augment is not None)


def _per_epoch(config: TrainRetrievalConfig, train: Pairs) -> int:
    return EpochSampler.from_rows(train, config.batch_size, config.seed).batches_per_epoch


def _estimate(
    config: TrainRetrievalConfig, counts: tuning.ParameterCounts, encoder: DualEncoder, wrong: float
) -> dict[str, float]:
    """Gigabytes, rough, with `negatives` texts a row beside its own, as if captions used all of the token table.

    Activations: s b h (34 + 5 a s / h) bytes a layer at 16 bit (arXiv 2205.05198, equation 2).
    """
    wide = 2.0 if config.precision == "fp32" else 1.0
    micro = None if config.micro_batch in (None, "auto") else int(config.micro_batch)
    vision, text = encoder.model.config.vision_config, encoder.model.config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    activations = matrices = 0.0
    for part, tokens, items in ((vision, patches, 1.0), (text, encoder.text_limit, 1.0 + wrong)):
        width, layers, heads = part.hidden_size, part.num_hidden_layers, part.num_attention_heads
        at_once = min(config.batch_size * items, micro or math.inf)
        layer = wide * tokens * at_once * width * (34 + 5 * heads * tokens / width)
        # Computed again, a layer keeps what went into it, and one layer at a time all it made of that.
        kept = 2 * wide * tokens * at_once * width
        activations += layers * kept + layer if config.checkpoint_activations else layers * layer
        matrices += layers * (4 * width**2 + 2 * width * getattr(part, "intermediate_size", 4 * width))
    weights = 4 * counts.total - (4 - quantization.BYTES) * matrices * bool(config.quantize)
    # Gradients and two moments, all float32.
    memory = weights + 12 * counts.trainable + activations
    exported = 4 * (counts.trainable if config.tune == "lora" else counts.total) + 4 * counts.total * config.merge
    disk = 12 * counts.trainable * (config.keep + 2) + exported
    return {"memory_gb": memory / 2**30, "disk_gb": disk / 2**30}
