"""Save and load a trained captioner: fusion/ in its run's folder, a few megabytes; frozen parts are only named.

    fusion/fusion.safetensors   adapter and cross-attention
    fusion/fusion.json          their shape, the prompt, and the frozen parts that they belong to, with hashes
    adapter/                    the language model's LoRA, if any, as PEFT writes it
    base/vision  base/llm       where vlkit made these models itself (tiny ones)

Queries that were trained for one encoder and one language model mean nothing to others: both are hashed when the folder
is written and compared when it is read.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlkit.config.data import TINY_LLM, Decode
from vlkit.errors import ArtifactError
from vlkit.models.cache.feature_cache import weights_hash
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.fusion import Fusion, FusionShape
from vlkit.models.captioner.language_model import LanguageModel, load_llm
from vlkit.models.captioner.vision_encoder import VisionEncoder, load_vision_encoder
from vlkit.models.device import Precision, best_device
from vlkit.models.preprocessing import with_decode
from vlkit.models.tiny import MAKERS
from vlkit.runs import Run
from vlkit.storage import atomic_folder, json_text

SCHEMA = 1
WEIGHTS, ABOUT = "fusion.safetensors", "fusion.json"


def load_run_vision(run: Run, settings: dict[str, Any], texts: tuple[str, ...] = ()) -> VisionEncoder:
    """Load the vision tower that a run names; create a tiny one in the run's own folder, unless it is there.

    Args:
        texts: for the tokenizer of a tiny one.
    """
    name = str(settings["vision"])
    vision = load_vision_encoder(name, keep_in=run.base / "vision", texts=texts, seed=int(settings["seed"]))
    return with_decode(vision, settings["decode"])


def load_run_llm(run: Run, settings: dict[str, Any], precision: Precision) -> LanguageModel:
    """Load the language model that a run names; a tiny one from its own folder."""
    name = str(run.base / "llm") if settings["llm"] == TINY_LLM else str(settings["llm"])
    return load_llm(name, quantize=settings["quantize"], precision=precision)


def frozen_hashes(vision: VisionEncoder, language: LanguageModel) -> dict[str, str]:
    """Return hashes of the frozen parts."""
    return {"vision": weights_hash(vision.image_chain), "llm": language.identity()}


def save_captioner(captioner: Captioner, frozen: dict[str, str], run: Run) -> Path:
    """Write fusion/ and, with a LoRA, adapter/; each appears whole. Return fusion/.

    Args:
        frozen: from `frozen_hashes`, taken before a LoRA was put in.
    """
    fusion, language = captioner.fusion, captioner.language
    about = {
        "schema": SCHEMA,
        "shape": asdict(fusion.shape),
        "prompt": captioner.prompt,
        # As they were: a chat template may have the date in it.
        "prompt_ids": {"before": captioner.prefix, "after": captioner.suffix},
        "frozen": frozen,
        "lora": language.peft is not None,
    }
    if language.peft is not None:
        with atomic_folder(run.folder / "adapter") as aside:
            language.peft.save_pretrained(aside, save_embedding_layers=False)
    with atomic_folder(run.folder / "fusion") as aside:
        save_file({name: p.detach().cpu().contiguous() for name, p in fusion.named_parameters()}, aside / WEIGHTS)
        (aside / ABOUT).write_text(json_text(about, indent=2) + "\n", encoding="utf-8")
    return run.folder / "fusion"


def load_captioner(
    run: Run, *, prompt: str | None = None, precision: Precision | None = None, decode: Decode | None = None
) -> Captioner:
    """Load the captioner of a finished run, on the device that it is used on.

    Args:
        prompt: another one than it was trained with.
        precision: another one than it was trained in.
        decode: another way to decode images than it was trained with.

    Raises:
        ArtifactError: not finished, damaged, or its frozen parts are others than in training.
    """
    settings = run.config()
    if run.task != "captioning":
        raise ArtifactError(
            f"{run.folder} is a run of train-retrieval, which writes no captions",
            hint=f"vlkit train-fusion --vision {run.folder} teaches a model to describe images",
        )
    if not run.finished:
        raise ArtifactError(f"the run {run.folder} is not finished", hint=f"train it to its end: {run.resume_command}")
    about, weights = _read(run.folder / "fusion")
    precision = precision or settings["precision"]
    _refuse_missing_base(run, settings)
    vision, language = with_decode(load_run_vision(run, settings), decode), load_run_llm(run, settings, precision)
    _refuse_other_parts(about["frozen"], frozen_hashes(vision, language), settings, run)
    if about["lora"]:
        language.load_lora(run.folder / "adapter")
    fusion = _build_fusion(about, weights, run)
    captioner = Captioner(vision, fusion, language, prompt or about["prompt"], precision)
    if captioner.prompt == about["prompt"]:
        captioner.prefix, captioner.suffix = about["prompt_ids"]["before"], about["prompt_ids"]["after"]
    return captioner.to(best_device()).eval()


def _refuse_missing_base(run: Run, settings: dict[str, Any]) -> None:
    """Refuse a run without the tiny models that were made for it alone."""
    for part, tiny in (("vision", settings["vision"] in MAKERS), ("llm", settings["llm"] == TINY_LLM)):
        if tiny and not (run.base / part).is_dir():
            raise ArtifactError(
                f"{run.folder} is damaged: base/{part} is gone, which was made for this run alone",
                hint="restore it from a copy, or train again",
            )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["schema"] != SCHEMA:
            raise ArtifactError(f"{folder} has schema {about['schema']}; this vlkit reads {SCHEMA}")
        _ = about["shape"], about["prompt"], about["frozen"], about["lora"], about["prompt_ids"]["before"]
        return about, load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"{folder} is damaged: {error}", hint="restore it from a copy, or train again") from None


def _build_fusion(about: dict[str, Any], weights: dict[str, torch.Tensor], run: Run) -> Fusion:
    try:
        fusion = Fusion(FusionShape(**about["shape"]))
        fusion.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(f"{run.folder / 'fusion'} does not hold together: {reason}") from None
    return fusion


def _refuse_other_parts(before: dict[str, str], now: dict[str, str], settings: dict[str, Any], run: Run) -> None:
    """Refuse frozen parts whose hashes are not those of the training."""
    for part in ("vision", "llm"):
        if before.get(part) != now[part]:
            raise ArtifactError(
                f"{run.folder / 'fusion'} was trained with another {settings[part]} than the one there is now",
                hint="restore the model that it was trained with, or train again",
            )
