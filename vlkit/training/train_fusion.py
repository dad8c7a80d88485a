"""train-fusion: a frozen language model learns to describe pictures, by what stands between it and a frozen encoder."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlkit import console
from vlkit.config.data import TINY_LLM, TINY_MODELS
from vlkit.config.fusion import TrainFusionConfig
from vlkit.data.loading.caption_batches import CaptionBatch
from vlkit.data.loading.epoch_sampler import EpochSampler, batch_stream
from vlkit.distributed import SINGLE, World, init_distributed
from vlkit.errors import ArtifactError
from vlkit.evaluation.captioning.evaluate_captions import caption_metrics
from vlkit.evaluation.captioning.image_reliance import caption_dataset, generate_captions, image_reliance
from vlkit.evaluation.captioning.score import References
from vlkit.evaluation.fusion_card import write_fusion_card
from vlkit.models.cache.feature_cache import image_keys
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.save_load import frozen_hashes, load_run_llm, load_run_vision, save_captioner
from vlkit.models.device import best_device, use_deterministic_algorithms
from vlkit.models.quantization import parameter_count
from vlkit.models.tuning import ParameterCounts
from vlkit.runs import Run
from vlkit.training.caption_loss import CaptionLoss
from vlkit.training.fill_cache import filled
from vlkit.training.fusion_plan import (
    CaptionRows,
    Parts,
    cache_plan,
    complete,
    dry_run_of,
    memory_parts,
    refuse_what_cannot_fit,
)
from vlkit.training.open_run import begun, opened, refuse_auto, refuse_other_data, replayed_run
from vlkit.training.pretrain_tiny_llm import write_tiny_llm
from vlkit.training.replay import replayed
from vlkit.training.run_state import Training


def train_fusion(config: TrainFusionConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Run `vlkit train-fusion`.

    Returns:
        The run's folder, steps, the last validation and parameter counts, as --json prints them.
    """
    with init_distributed() as world:
        refuse_auto(config, world)
        if config.replay is not None:
            settings, run = replayed_run(config)
            rows = CaptionRows.of(settings)
            refuse_other_data(settings, run, rows.facts())
            return replayed(_training(settings, run, rows, Parts.of(settings), SINGLE), config.replay)
        if not world.is_main:
            world.barrier()  # A raw COCO folder is prepared by the first.
        rows = CaptionRows.of(config, dry_run=dry_run)
        if world.is_main:
            world.barrier()
        parts = Parts.of(config)
        config = complete(config, rows, parts)
        if dry_run:
            return dry_run_of(config, rows, parts)
        return begun(
            config,
            rows.facts(),
            world,
            lambda config, run: _training(config, run, rows, parts, world).run_to_the_end(),
        )


def _training(config: TrainFusionConfig, run: Run, rows: CaptionRows, parts: Parts, world: World) -> CaptionTraining:
    """The run, with a fusion that nobody has trained."""

    def made() -> tuple[Captioner, dict[str, str]]:
        # Before anything is loaded: what is loaded takes from what is there.
        refuse_what_cannot_fit(config, memory_parts(config, parts))
        return _opened(config, run, rows)

    captioner, frozen = opened(run, world, made)
    return CaptionTraining(config, run, rows, captioner, frozen, world)


def _opened(config: TrainFusionConfig, run: Run, rows: CaptionRows) -> tuple[Captioner, dict[str, str]]:
    """The captioner as it is before the first step, and what tells its frozen parts from others."""
    settings = config.to_dict()
    if config.llm == TINY_LLM and run.is_writer and not (run.base / "llm").is_dir():
        folder, total = run.base / "llm", config.teach_steps
        write_tiny_llm(rows.train, config.prompt, folder, seed=config.seed, total=total)
    vision = load_run_vision(run, settings, tuple(rows.train.frame["text"]))
    language = load_run_llm(run, settings, config.precision)
    frozen = frozen_hashes(vision, language)
    _refuse_changed(run, frozen)
    if config.llm_lora is not None:
        language.insert_lora(
            rank=config.llm_lora, alpha=config.lora_alpha, dropout=config.lora_dropout, seed=config.seed
        )
    if config.checkpoint_activations:
        language.checkpoint_activations()
    shape = {"kind": config.fusion, "queries": config.queries, "layers": config.fusion_layers}
    captioner = Captioner.fresh(vision, language, config.prompt, config.precision, seed=config.seed, **shape)
    hint = "fewer --queries, a shorter --prompt, a smaller --max-length or --max-new-tokens"
    captioner.refuse_small_window(max(config.max_length, config.max_new_tokens), hint)
    return captioner.to(best_device()), frozen


def _refuse_changed(run: Run, frozen: dict[str, str]) -> None:
    """A run that goes on from a checkpoint needs the encoder and the language model that it began with."""
    before = run.read_json("frozen.json") if any(run.checkpoints.glob("step-*")) else {}
    for part in frozen:
        if before and before.get(part) != frozen[part]:
            told = (
                f"{run.folder} began with another {'encoder' if part == 'vision' else 'language model'} than this one"
            )
            raise ArtifactError(told, hint="bring it back, or start anew under another --name")
    if not before:
        run.write_json("frozen.json", frozen)


class CaptionTraining(Training):
    """A captioner's training.

    Attributes:
        dataset, looked: training rows, and one caption of each validation picture.
        blank: patches of a picture with nothing on it.
    """

    better = "loss"

    def __init__(
        self,
        config: TrainFusionConfig,
        run: Run,
        rows: CaptionRows,
        captioner: Captioner,
        frozen: dict[str, str],
        world: World,
    ) -> None:
        if config.deterministic:
            use_deterministic_algorithms()
        self.captioner, self.rows, self.frozen = captioner, rows, frozen
        self.dataset, self.cut = caption_dataset(rows.train, captioner, config.max_length, world)
        self.looked, _ = caption_dataset(rows.val, captioner, config.max_length, world)
        self.blank: torch.Tensor | None = None
        trainable = captioner.trainable()
        frozen_too = (captioner.vision, captioner.language)
        total = sum(parameter_count(p) for module in (*frozen_too, captioner.fusion) for p in module.parameters())
        super().__init__(
            config,
            run,
            world,
            trainable=trainable,
            counts=ParameterCounts(sum(p.numel() for p in trainable.values()), total),
            rates=_rates(trainable, config),
            order=EpochSampler.from_rows(self.dataset, config.batch_size, config.seed, min_rows=1),
            validates=len(rows.val) > 0,
        )
        self.config: TrainFusionConfig = config
        self.caption_loss = CaptionLoss(captioner, config.alpha_align, self.at_once)

    def prepare(self) -> None:
        """Keep the patches of every picture; with all of them kept, the encoder leaves memory."""
        vision, config = self.captioner.vision, self.config
        assert vision is not None
        self.blank = self.captioner.patches(vision.blank())
        if (plan := cache_plan(config, vision, self.rows)) is None:
            return
        decided = self.world.broadcast(plan.refused)
        store = filled(
            replace(plan, refused=decided), config.cache, self.dataset.pixels, self._keys(self.dataset), self.world
        )
        if store is None:
            return
        for dataset in (self.dataset, self.looked):
            dataset.images = plan.frozen.features(store, dataset.pixels, self._keys(dataset), self.world)
        self.captioner.vision = None
        del plan, vision
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @staticmethod
    def _keys(dataset: Any) -> list[str]:
        return image_keys(dataset.pixels.paths, dataset.image_ids)

    def tell(self) -> None:
        """Sizes, what is trained, and what the user should know of the captions."""
        config, captioner = self.config, self.captioner
        work = f"{config.steps} steps of {config.batch_size} x {config.grad_accum}"
        console.say(f"{self.run.folder}: {len(self.dataset)} captions, {work}, {config.precision} on {self.device}")
        console.say(f"{config.vision} and {config.llm} ({config.quantize}): {self.counts}")
        seen = captioner.fusion.shape.tokens
        console.say(f"the language model reads {seen} tokens of picture among {captioner.overhead} before a caption")
        if not captioner.language.has_chat:
            console.warn(f"{config.llm} has no chat template: picture and prompt stand as they are")
        if config.vision in TINY_MODELS:
            console.warn(
                f"{config.vision} knows no pictures yet: --vision RUN takes one that train-retrieval has taught"
            )
        if self.rows.empty:
            console.warn(f"{self.rows.empty} captions without a word are left out")
        if self.cut:
            told = f"{self.cut} of {len(self.dataset)} captions are longer than {config.max_length} tokens and are cut"
            console.warn(f"{told}: they teach no end; --max-length takes more")

    def train_mode(self) -> None:
        """The fusion, and the dropout of a LoRA; nothing that is frozen."""
        self.captioner.train()

    def loss(self) -> CaptionLoss:
        """Cross-entropy and alignment."""
        return self.caption_loss

    def batches(self, first: int) -> Iterator[CaptionBatch]:
        """Captions and their pictures."""
        return batch_stream(self.dataset, replace(self.order, first_batch=first), workers=self.config.workers)

    def items(self, batch: CaptionBatch) -> int:
        """The captions' words."""
        return batch.token_count

    def after_step(self) -> dict[str, float]:
        """Both losses of the step."""
        return self.caption_loss.taken(self.world)

    def scores(self) -> dict[str, Any]:
        """Is it looking? And some captions, to be read."""
        assert self.blank is not None
        found = image_reliance(self.captioner, self.looked, self.blank, seed=self.config.seed)
        return {"looking": found.to_dict(), "samples": self._samples()}

    def _samples(self) -> list[dict[str, str]]:
        """A few captions of validation pictures, always the same ones; of several processes the first writes them."""
        config, frame = self.config, self.rows.val.frame
        places = list(range(min(config.samples, len(self.looked))))
        if not self.world.is_main or not places:
            return []
        pictures = self.looked.image_of[places].tolist()
        texts = generate_captions(self.captioner, self.looked.images, pictures, num_beams=1, max_new_tokens=config.max_new_tokens)
        return [
            {"image": str(frame["image"].iloc[row]), "caption": text, "reference": str(frame["text"].iloc[row])}
            for row, text in zip(places, texts, strict=True)
        ]

    def key_of(self, scores: dict[str, Any]) -> list[float]:
        """The loss with the right picture, the lower the better."""
        return [-scores["looking"]["right"]]

    def told(self, scores: dict[str, Any]) -> str:
        """The three losses, and a caption."""
        looking = scores["looking"]
        shuffled = "-" if looking["shuffled"] is None else f"{looking['shuffled']:.3f}"
        told = f"loss {looking['right']:.3f} nats a token, shuffled picture {shuffled}, blank {looking['blank']:.3f}"
        return told + (f'; "{scores["samples"][0]["caption"]}"' if scores["samples"] else "")

    def export(self) -> tuple[Path, dict[str, Any]]:
        """fusion/, and the scores of validation captions that it writes now."""
        if not self.world.is_main:
            return self.run.folder, {}
        written = save_captioner(self.captioner, self.frozen, self.run)
        return written, {"captions": self._held_out()} if len(self.rows.val) else {}

    def _held_out(self) -> dict[str, float]:
        """BLEU, ROUGE_L and CIDEr of the validation pictures' captions."""
        config = self.config
        with console.progress("writing captions", len(self.looked)) as bar:
            texts = generate_captions(
                self.captioner,
                self.looked.images,
                self.looked.image_of.tolist(),
                num_beams=config.num_beams,
                max_new_tokens=config.max_new_tokens,
                watch=bar.update,
            )
        references = References.from_pairs(self.rows.val_all)
        found = caption_metrics(list(self.rows.val.frame["image_id"]), texts, references)
        told = ", ".join(f"{name} {found[name]:.3f}" for name in ("bleu_4", "rouge_l", "cider", "exact"))
        console.say(f"validation captions of {len(texts)} pictures: {told}")
        return found

    def describe(self) -> None:
        """The model card."""
        write_fusion_card(self.run)


def _rates(trainable: dict[str, torch.nn.Parameter], config: TrainFusionConfig) -> dict[str, float]:
    """name -> peak rate, of adapter and cross-attention where they have one of their own."""
    rates = {}
    for name in trainable:
        own = config.adapter_lr if name.startswith("fusion.adapter.") else config.fusion_lr
        if name.startswith("fusion.") and own is not None:
            rates[name] = own
    return rates
