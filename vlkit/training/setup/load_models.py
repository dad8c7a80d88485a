"""Load the models that training starts from; cache what a captioner's frozen encoder makes of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from vlkit.config.base import require_resolved
from vlkit.config.data import TINY_LLM
from vlkit.config.fusion import TrainFusionConfig
from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.loading.caption_batches import CaptionDataset
from vlkit.distributed import World
from vlkit.errors import ArtifactError
from vlkit.models import loading
from vlkit.models.cache.feature_cache import image_keys
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.save_load import frozen_hashes, load_run_llm, load_run_vision
from vlkit.models.device import Precision, best_device, use_deterministic_algorithms
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.preprocessing import with_decode
from vlkit.models.quantization import parameter_count
from vlkit.models.tuning import ParameterCounts
from vlkit.runs import Run
from vlkit.training.pretrain_tiny_llm import write_tiny_llm
from vlkit.training.setup.estimates import MetaModels, estimate_fusion, fusion_memory_hints
from vlkit.training.setup.plan import plan_patch_cache
from vlkit.training.setup.rows import CaptionRows, RetrievalRows


def load_base_encoder(config: TrainRetrievalConfig, run: Run, rows: RetrievalRows) -> DualEncoder:
    """Load the model as it is before the first step; a tiny one is made from the training texts."""
    encoder = loading.load_or_create(
        config.model,
        list(rows.train.frame["text"]),
        seed=config.seed,
        text_model=config.text_model,
        keep_in=run.base,
        merged_from=Run(config.init_from) if config.init_from else None,
        quantized=config.precision if config.quantize else None,
    )
    if config.deterministic:
        use_deterministic_algorithms()
    return with_decode(encoder, config.decode)


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
    settings = config.to_dict()
    precision: Precision = require_resolved(config.precision)
    vision = load_run_vision(run, settings, tuple(rows.train.frame["text"]))
    if config.llm == TINY_LLM and run.is_writer and not (run.base / "llm").is_dir():
        write_tiny_llm(rows.train, config.prompt, run.base / "llm", seed=config.seed, total=config.teach_steps)
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
