"""train-retrieval: adapt a dual encoder to a prepared folder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlkit import console
from vlkit.config.base import require_resolved
from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.loading.epoch_sampler import EpochSampler, batch_stream
from vlkit.data.loading.retrieval_batches import PairDataset
from vlkit.distributed import SINGLE, World, init_distributed
from vlkit.evaluation.model_card import write_card
from vlkit.evaluation.retrieval.retention import read_guard_rows
from vlkit.evaluation.retrieval.task import RetrievalTask
from vlkit.models import tuning
from vlkit.models.device import best_device
from vlkit.models.dual_encoder import DualEncoder
from vlkit.runs import Run
from vlkit.training.finish_run import finish_run, report_replay
from vlkit.training.gradient_cache import ContrastiveLoss
from vlkit.training.loop import steps
from vlkit.training.run_state import RunState
from vlkit.training.setup.estimates import estimate_retrieval, fixed_micro_batch
from vlkit.training.setup.fill_cache import fill_cache
from vlkit.training.setup.load_models import load_base_encoder
from vlkit.training.setup.open_run import check_micro_batch, config_to_replay, load_on_first_rank, open_run
from vlkit.training.setup.plan import print_retrieval_dry_run, print_retrieval_start, resolve_retrieval
from vlkit.training.setup.rows import RetrievalRows
from vlkit.training.validation import RetrievalValidation
from vlkit.training.wise_ft import WeightInterpolation, choose_strength


def train_retrieval(config: TrainRetrievalConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Run `vlkit train-retrieval`.

    Returns:
        The run's folder, steps, best validation scores and parameter counts, as --json prints them.
    """
    with init_distributed() as world:
        check_micro_batch(config, world)
        if config.replay is not None:
            config, world = config_to_replay(config), SINGLE
        rows = RetrievalRows.read(config)
        if config.replay is None:
            config = resolve_retrieval(config, rows)
        if dry_run:
            return print_retrieval_dry_run(config, rows)
        with open_run(config, rows.to_dict(), world) as (config, run):
            encoder = load_on_first_rank(run, world, lambda: load_base_encoder(config, run, rows))
            return train(config, run, rows, encoder, world)


def train(
    config: TrainRetrievalConfig, run: Run, rows: RetrievalRows, encoder: DualEncoder, world: World
) -> dict[str, Any]:
    """Train in an open run, from its newest checkpoint or from the base model; then export the best weights."""
    counts = tuning.apply_tuning(encoder, config, seed=config.seed)
    encoder.to(best_device())
    dataset = build_dataset(rows, encoder, config, world)
    sampler = EpochSampler.from_rows(dataset, require_resolved(config.batch_size), config.seed)
    objective = ContrastiveLoss(encoder, require_resolved(config.loss), fixed_micro_batch(config), world)
    validation = RetrievalValidation(
        encoder, config, objective, world, RetrievalTask.from_pairs(rows.val) if len(rows.val) else None
    )
    parameters = tuning.trainable(encoder)
    interpolation = WeightInterpolation(parameters) if config.interpolate or config.guard else None
    estimate_retrieval(config, counts, encoder).check_disk(config)
    state = RunState(
        config,
        run,
        world,
        parameters=parameters,
        counts=counts,
        rates=tuning.learning_rates(parameters, head=config.head_lr, logit=config.logit_lr),
        batches_per_epoch=sampler.batches_per_epoch,
        validates=validation.task is not None,
        best_metric_name="recall",
    )
    with state.stoppable():
        validation.inputs = fill_cache(config, encoder, dataset, validation.task, world)
        state.resume()
        print_retrieval_start(state.counts, run, dataset, config, encoder)
        if state.eval_due():  # Stopped in the middle of an evaluation.
            state.record(*validation.scores())
        tuning.train_mode(encoder)
        sampler = replace(sampler, first_batch=state.step * config.grad_accum)
        batches = state.record_pairs(batch_stream(dataset, sampler, workers=config.workers))
        with console.progress("training", state.total_steps) as bar:
            for step in steps(batches, objective, len, state.optimizer, **state.loop_settings(objective)):
                encoder.clamp_logit_scale()
                state.log(step, encoder.logit_values())
                state.sync_stop()
                bar.update(step.step, loss=step.loss, lr=step.lr, grad_norm=step.grad_norm)
                if state.eval_due():
                    state.record(*validation.scores())
                    tuning.train_mode(encoder)
                if state.save_due():
                    state.save()
                if state.stop_due():
                    break
        if config.replay is not None:
            return report_replay(state)
        state.raise_if_stopped()
        state.restore_best()
        extra: dict[str, Any] = {}
        if interpolation is not None:
            guard = RetrievalTask.from_pairs(read_guard_rows(config.guard)) if config.guard else None
            point = choose_strength(interpolation, validation, run, guard)
            extra = {"strength": point.strength, "retained": point.retained}
            state.best |= {"val": point.val} if point.val else {}
        exported = tuning.export(encoder, run.folder) if world.is_main else run.folder
        if world.is_main and config.merge and encoder.peft is not None:
            tuning.export_merged(encoder, run.folder)
        return finish_run(state, exported, extra, write_card)


def build_dataset(rows: RetrievalRows, encoder: DualEncoder, config: TrainRetrievalConfig, world: World) -> PairDataset:
    """Build the training rows as this model reads them, this process' share of every batch."""
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
