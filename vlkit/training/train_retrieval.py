"""train-retrieval: adapt a dual encoder to a prepared folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlkit import checkpoints, console
from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.loading.epoch_sampler import EpochSampler, batch_stream
from vlkit.data.loading.retrieval_batches import Batch
from vlkit.distributed import SINGLE, World, init_distributed
from vlkit.evaluation.model_card import write_card
from vlkit.evaluation.retrieval.retention import read_guard_rows
from vlkit.evaluation.retrieval.task import RetrievalTask, score_task
from vlkit.models import loading, tuning
from vlkit.models.device import best_device, use_deterministic_algorithms
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.fast.partial_embedding import train_used_rows
from vlkit.models.preprocessing import with_decode
from vlkit.runs import Run
from vlkit.training import fill_cache
from vlkit.training.gradient_cache import Contrast
from vlkit.training.open_run import begun, opened, refuse_auto, refuse_other_data, replayed_run
from vlkit.training.plan import Rows, complete, dataset_of, dry_run_of, forecast, refuse_small_disk
from vlkit.training.replay import replayed
from vlkit.training.run_state import Training
from vlkit.training.wise_ft import STRENGTHS, Sweep, best, facts, tell

EVALUATED_AT_ONCE = 256


def train_retrieval(config: TrainRetrievalConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Run `vlkit train-retrieval`.

    Returns:
        The run's folder, steps, best validation scores and parameter counts, as --json prints them.
    """
    with init_distributed() as world:
        refuse_auto(config, world)
        if config.replay is not None:
            settings, run = replayed_run(config)
            rows = Rows.of(settings)
            refuse_other_data(settings, run, rows.facts())
            return replayed(_training(settings, run, rows, SINGLE), config.replay)
        rows = Rows.of(config)
        config = complete(config, rows.train)
        if dry_run:
            return dry_run_of(config, rows)
        return begun(
            config, rows.facts(), world, lambda config, run: _training(config, run, rows, world).run_to_the_end()
        )


def _training(config: TrainRetrievalConfig, run: Run, rows: Rows, world: World) -> RetrievalTraining:
    """The run, with a model as it is before the first step."""

    def made() -> DualEncoder:
        encoder = loading.load_or_create(
            config.model,
            list(rows.train.frame["text"]),
            seed=config.seed,
            text_model=config.text_model,
            keep_in=run.base,
            merged_from=Run(config.init_from) if config.init_from else None,
            quantized=config.precision if config.quantize else None,
        )
        return with_decode(encoder, config.decode)

    return RetrievalTraining(config, run, rows, opened(run, world, made), world)


class RetrievalTraining(Training):
    """A dual encoder's training: the towers, their data, and what is kept of their frozen parts."""

    better = "recall"

    def __init__(self, config: TrainRetrievalConfig, run: Run, rows: Rows, encoder: DualEncoder, world: World) -> None:
        if config.deterministic:
            use_deterministic_algorithms()
        self.encoder = encoder
        counts = tuning.apply_tuning(encoder, config, seed=config.seed)
        encoder.to(best_device())
        self.dataset = dataset_of(rows, encoder, config, world)
        # A run that was begun with all of its token table goes on with it.
        self.table = train_used_rows(encoder, self.dataset.tokens.tokens, checkpoints.parameter_names(run.checkpoints))
        trainable = tuning.trainable(encoder)
        self.sweep = Sweep(trainable) if config.interpolate or config.guard else None
        refuse_small_disk(config, tuning.count_parameters(encoder), encoder)
        self.validation = RetrievalTask.from_pairs(rows.val) if len(rows.val) else None
        self.kept = fill_cache.Sources()
        super().__init__(
            config,
            run,
            world,
            trainable=trainable,
            counts=counts,
            rates=tuning.learning_rates(trainable, head=config.head_lr, logit=config.logit_lr),
            order=EpochSampler.from_rows(self.dataset, config.batch_size, config.seed),
            validates=self.validation is not None,
        )
        self.config: TrainRetrievalConfig = config

    def prepare(self) -> None:
        """Compute what the frozen parts make of pictures and texts."""
        self.kept = fill_cache.cached(self.config, self.encoder, self.dataset, self.validation, self.world)

    def train_mode(self) -> None:
        """Towers: what is trained of them."""
        tuning.train_mode(self.encoder)

    def loss(self) -> Contrast:
        """The contrast of a batch."""
        return Contrast(self.encoder, self.config.loss, self.at_once, self.world)

    def batches(self, first: int) -> Iterator[Batch]:
        """Pairs that are contrasted with each other."""
        order = replace(self.order, first_batch=first)
        return batch_stream(self.dataset, order, workers=self.config.workers)

    def items(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch)

    def after_step(self) -> dict[str, float]:
        """Keep CLIP's scale where it was trained to be; log scale and bias."""
        self.encoder.clamp_logit_scale()
        return {name: p.detach().float().item() for name, p in self.encoder.logit_parameters().items()}

    def scores(self) -> dict[str, Any]:
        """Retrieval in both directions."""
        return self._scores(self.validation, self.kept)

    def _scores(self, task: RetrievalTask, sources: fill_cache.Sources) -> dict[str, Any]:
        config = self.config
        return score_task(
            self.encoder,
            task,
            batch_size=min(config.batch_size, self.at_once or EVALUATED_AT_ONCE),
            precision=config.precision,
            image_inputs=sources.images,
            text_inputs=sources.texts,
            world=self.world,
        ).metrics()

    def key_of(self, scores: dict[str, Any]) -> list[float]:
        """Recall@1 of both directions, MRR deciding ties."""
        return [sum(metrics[name] for metrics in scores.values()) for name in ("recall@1", "mrr")]

    def told(self, scores: dict[str, Any]) -> str:
        """Recall@1 of both directions."""
        both = (
            f"{direction.replace('_to_', ' -> ')} {metrics['recall@1']:.3f}" for direction, metrics in scores.items()
        )
        return f"recall@1 {', '.join(both)}"

    def export(self) -> tuple[Path, dict[str, Any]]:
        """model/ or adapter/, as transformers and PEFT load them."""
        between = self._interpolated()
        if not self.world.is_main:
            return self.run.folder, between
        exported = tuning.export(self.encoder, self.run.folder)
        if self.config.merge and self.encoder.peft is not None:
            tuning.export_merged(self.encoder, self.run.folder)
        return exported, between

    def describe(self) -> None:
        """The model card."""
        write_card(self.run)

    def _interpolated(self) -> dict[str, Any]:
        """Leave the weights where validation prefers them between untouched and tuned; say what is retained."""
        config = self.config
        if self.sweep is None:
            return {}
        guard = RetrievalTask.from_pairs(read_guard_rows(config.guard)) if config.guard else None
        guard_of = fill_cache.decoded(guard, self.encoder)
        points = self.sweep.points(
            (lambda: self._scores(self.validation, self.kept)) if config.interpolate else None,
            (lambda: self._scores(guard, guard_of)) if guard else None,
            STRENGTHS if config.interpolate else (0.0, 1.0),
        )
        chosen = best(points).strength if config.interpolate else 1.0
        self.sweep.move({name: p.detach().clone() for name, p in self.trainable.items()}, chosen)
        tell(points, chosen)
        self.run.write_json("interpolation.json", facts(points, chosen))
        kept = next(point for point in points if point.strength == chosen)
        self.best |= {"val": kept.val} if kept.val else {}
        return {"strength": chosen, "retained": kept.retained}

    def tell(self) -> None:
        """Sizes, what is trained, and the forecast of the data."""
        config, batch = self.config, self.config.batch_size
        work = f"{config.steps} steps of {batch} x {config.grad_accum}"
        console.say(
            f"{self.run.folder}: {len(self.dataset)} pairs, {work}, {config.precision} on {self.encoder.device}"
        )
        console.say(f"{config.model}, {config.tune}: {self.counts}")
        if self.table is not None:
            console.say(f"{self.table.told()}; the others only decay, and take neither gradient nor moments")
        for line in forecast(self.dataset, config, self.encoder):
            console.say(line)
