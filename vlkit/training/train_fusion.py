"""train-fusion: teach a frozen language model to describe images, through a fusion with a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vlkit import console
from vlkit.config.base import require_resolved
from vlkit.config.data import TINY_LLM, TINY_MODELS
from vlkit.config.fusion import TrainFusionConfig
from vlkit.data.loading.caption_batches import CaptionBatch, CaptionDataset
from vlkit.data.loading.epoch_sampler import EpochSampler, batch_stream
from vlkit.distributed import SINGLE, World, init_distributed
from vlkit.errors import ArtifactError
from vlkit.evaluation.captioning.image_reliance import caption_dataset
from vlkit.evaluation.model_card import write_fusion_card
from vlkit.models.cache.feature_cache import image_keys
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.save_load import frozen_hashes, load_run_llm, load_run_vision, save_captioner
from vlkit.models.device import Precision, best_device, use_deterministic_algorithms
from vlkit.models.quantization import parameter_count
from vlkit.models.tuning import ParameterCounts
from vlkit.runs import Run
from vlkit.training.caption_loss import CaptionLoss
from vlkit.training.finish_run import finish_run, report_replay
from vlkit.training.loop import steps
from vlkit.training.pretrain_tiny_llm import write_tiny_llm
from vlkit.training.run_state import RunState
from vlkit.training.setup.estimates import MetaModels, estimate_fusion, fixed_micro_batch, fusion_memory_hints
from vlkit.training.setup.open_run import check_micro_batch, config_to_replay, load_on_first_rank, open_run
from vlkit.training.setup.plan import plan_patch_cache, print_fusion_dry_run, resolve_fusion
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
        print_start(state, captioner, rows, len(dataset), truncated)
        if state.eval_due():  # Stopped in the middle of an evaluation.
            state.record(*validation.scores())
        captioner.train()
        sampler = replace(sampler, first_batch=state.step * config.grad_accum)
        batches = state.record_pairs(batch_stream(dataset, sampler, workers=config.workers))
        with console.progress("training", state.total_steps) as bar:
            for step in steps(batches, objective, count_tokens, state.optimizer, **state.loop_settings(objective)):
                state.log(step, objective.pop(world))
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
        state.restore_best()
        exported, extra = run.folder, {}
        if world.is_main:
            exported = save_captioner(captioner, dict(frozen), run)
            extra = {"captions": validation.caption_scores()} if len(rows.val) else {}
        return finish_run(state, exported, extra, write_fusion_card)


def count_tokens(batch: CaptionBatch) -> int:
    """Return what the loss is a mean over: the tokens of all processes' captions."""
    return batch.token_count


def load_captioner(
    config: TrainFusionConfig, run: Run, rows: CaptionRows, models: MetaModels
) -> tuple[Captioner, dict[str, str]]:
    """Load encoder and language model, and make a new fusion between them.

    Returns:
        The captioner, and hashes that identify its frozen parts.

    Raises:
        ResourceError: the models do not fit into memory, or the checkpoints on the disk.
        ArtifactError: the run's checkpoints belong to another encoder or language model.
    """
    # Before anything is loaded: loading uses the memory that is measured.
    estimate = estimate_fusion(config, models)
    estimate.check_memory(best_device(), fusion_memory_hints(config))
    estimate.check_disk(config)
    if config.deterministic:
        use_deterministic_algorithms()
    if config.llm == TINY_LLM and run.is_writer and not (run.base / "llm").is_dir():
        write_tiny_llm(rows.train, config.prompt, run.base / "llm", seed=config.seed, total=config.teach_steps)
    settings = config.to_dict()
    precision: Precision = require_resolved(config.precision)
    vision = load_run_vision(run, settings, tuple(rows.train.frame["text"]))
    language = load_run_llm(run, settings, precision)
    frozen = frozen_hashes(vision, language)
    check_frozen_parts(run, frozen)
    if config.llm_lora is not None:
        language.insert_lora(
            rank=config.llm_lora, alpha=config.lora_alpha, dropout=config.lora_dropout, seed=config.seed
        )
    if config.checkpoint_activations:
        language.checkpoint_activations()
    shape = {"kind": config.fusion, "queries": config.queries, "layers": config.fusion_layers}
    captioner = Captioner.fresh(vision, language, config.prompt, precision, seed=config.seed, **shape)
    hint = "fewer --queries, a shorter --prompt, a smaller --max-length or --max-new-tokens"
    captioner.check_context_length(max(config.max_length, config.max_new_tokens), hint)
    return captioner.to(best_device()), frozen


def check_frozen_parts(run: Run, frozen: Mapping[str, str]) -> None:
    """Check that a run with checkpoints still has the encoder and language model it started with; record a new run's.

    Raises:
        ArtifactError: names the part that changed.
    """
    recorded = run.read_json("frozen.json") if any(run.checkpoints.glob("step-*")) else {}
    for part, content_hash in frozen.items():
        if recorded and recorded.get(part) != content_hash:
            name = "encoder" if part == "vision" else "language model"
            message = f"{run.folder} was started with another {name} than this one"
            raise ArtifactError(message, hint="restore it, or start anew under another --name")
    if not recorded:
        run.write_json("frozen.json", dict(frozen))


def fill_patches(
    config: TrainFusionConfig,
    rows: CaptionRows,
    captioner: Captioner,
    datasets: Sequence[CaptionDataset],
    world: World,
) -> None:
    """Cache the patches of every image; batches then hold these, and the frozen encoder leaves memory."""
    plan = plan_patch_cache(config, captioner.vision, rows)
    if plan is None:
        return
    # Free disks change from one look to the next: one process decides.
    plan = replace(plan, refused=world.broadcast(plan.refused))
    train, *others = datasets
    features = plan.fill(config.cache, train.pixels, image_keys(train.pixels.paths, train.image_ids), world)
    if features is None:
        return
    train.images = features
    for dataset in others:
        keys = image_keys(dataset.pixels.paths, dataset.image_ids)
        dataset.images = plan.prefix.features(features.store, dataset.pixels, keys, world)
    captioner.vision.release()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def count_parameters(captioner: Captioner) -> ParameterCounts:
    """Count trained and all parameters, those of quantised matrices as they were."""
    modules = (captioner.vision, captioner.language, captioner.fusion)
    total = sum(parameter_count(p) for module in modules if module is not None for p in module.parameters())
    return ParameterCounts(sum(p.numel() for p in captioner.trainable().values()), total)


def learning_rates(parameters: Mapping[str, torch.nn.Parameter], config: TrainFusionConfig) -> dict[str, float]:
    """Return name -> peak rate, for the adapter and the cross-attention where they have their own."""
    rates = {}
    for name in parameters:
        rate = config.adapter_lr if name.startswith("fusion.adapter.") else config.fusion_lr
        if name.startswith("fusion.") and rate is not None:
            rates[name] = rate
    return rates


def print_start(state: RunState, captioner: Captioner, rows: CaptionRows, captions: int, truncated: int) -> None:
    """Print sizes, what is trained, and what the user should know of the captions."""
    config = state.config
    assert isinstance(config, TrainFusionConfig)
    work = f"{config.steps} steps of {config.batch_size} x {config.grad_accum}"
    console.say(f"{state.run.folder}: {captions} captions, {work}, {config.precision} on {captioner.device}")
    console.say(f"{config.vision} and {config.llm} ({config.quantize}): {state.counts}")
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
