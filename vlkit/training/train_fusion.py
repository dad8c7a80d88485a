"""train-fusion: teach a frozen language model to describe images, through a fusion with a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlkit import console
from vlkit.config.base import require_resolved
from vlkit.config.fusion import TrainFusionConfig
from vlkit.data.loading.caption_batches import CaptionBatch
from vlkit.data.loading.epoch_sampler import EpochSampler, batch_stream
from vlkit.distributed import SINGLE, World, init_distributed
from vlkit.evaluation.captioning.image_reliance import caption_dataset
from vlkit.evaluation.model_card import write_fusion_card
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.save_load import save_captioner
from vlkit.runs import Run
from vlkit.training.caption_loss import CaptionLoss
from vlkit.training.finish_run import finish_run, report_replay
from vlkit.training.loop import steps
from vlkit.training.run_state import RunState
from vlkit.training.setup.estimates import MetaModels, fixed_micro_batch
from vlkit.training.setup.load_models import count_parameters, fill_patches, learning_rates, load_captioner
from vlkit.training.setup.open_run import check_micro_batch, config_to_replay, load_on_first_rank, open_run
from vlkit.training.setup.plan import print_fusion_dry_run, print_fusion_start, resolve_fusion
from vlkit.training.setup.rows import CaptionRows, prepare_raw_coco
from vlkit.training.validation import CaptionValidation


def train_fusion(config: TrainFusionConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Run `vlkit train-fusion`.

    Returns:
        The run's folder, steps, the last validation and parameter counts, as --json prints them.
    """
    with init_distributed() as world:
        check_micro_batch(config, world)
        if config.replay is not None:
            config, world = config_to_replay(config), SINGLE
        with world.main_first():  # Rank 0 prepares a raw COCO folder.
            config = replace(config, data=prepare_raw_coco(require_resolved(config.data), dry_run=dry_run))
            rows = CaptionRows.read(config)
        models = MetaModels.from_config(config)
        if config.replay is None:
            config = resolve_fusion(config, rows, models)
        if dry_run:
            return print_fusion_dry_run(config, rows, models)
        with open_run(config, rows.to_dict(), world) as (config, run):
            captioner, frozen = load_on_first_rank(run, world, lambda: load_captioner(config, run, rows, models))
            return train(config, run, rows, captioner, frozen, world)


def train(
    config: TrainFusionConfig,
    run: Run,
    rows: CaptionRows,
    captioner: Captioner,
    frozen: Mapping[str, str],
    world: World,
) -> dict[str, Any]:
    """Train in an open run, from its newest checkpoint or from a new fusion; then export the best weights."""
    dataset, truncated = caption_dataset(rows.train, captioner, config.max_length, world)
    sampler = EpochSampler.from_rows(dataset, config.batch_size, config.seed, min_rows=1)
    objective = CaptionLoss(captioner, config.alpha_align, fixed_micro_batch(config))
    parameters = captioner.trainable()
    state = RunState(
        config,
        run,
        world,
        parameters=parameters,
        counts=count_parameters(captioner),
        rates=learning_rates(parameters, config),
        batches_per_epoch=sampler.batches_per_epoch,
        validates=len(rows.val) > 0,
        best_metric_name="loss",
    )
    validation = CaptionValidation(captioner, config, rows, world)
    with state.stoppable():
        fill_patches(config, rows, captioner, (dataset, validation.dataset), world)
        state.resume()
        print_fusion_start(state.counts, run, rows, config, captioner, truncated)
        if state.eval_due():  # Stopped in the middle of an evaluation.
            state.record(*validation.scores())
        captioner.train()
        sampler = replace(sampler, first_batch=state.step * config.grad_accum)
        batches = state.record_pairs(batch_stream(dataset, sampler, workers=config.workers))
        with console.progress("training", state.total_steps) as bar:
            for step in steps(batches, objective, count_tokens, state.optimizer, **state.loop_settings(objective)):
                state.log(step, objective.pop(world))
                state.sync_stop()
                bar.update(step.step, loss=step.loss, lr=step.lr, grad_norm=step.grad_norm)
                if state.eval_due():
                    state.record(*validation.scores())
                    captioner.train()
                if state.save_due():
                    state.save()
                if state.stop_due():
                    break
        if config.replay is not None:
            return report_replay(state)
        state.raise_if_stopped()
        state.restore_best()
        exported, extra = run.folder, {}
        if world.is_main:
            exported = save_captioner(captioner, dict(frozen), run)
            extra = {"captions": validation.caption_scores()} if len(rows.val) else {}
        return finish_run(state, exported, extra, write_fusion_card)


def count_tokens(batch: CaptionBatch) -> int:
    """Return what the loss is a mean over: the tokens of all processes' captions."""
    return batch.token_count
