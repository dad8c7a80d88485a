"""What is trained: everything, the upper layers, or low-rank adapters; logit scale and bias always.

`adapt` decides it in place; everything after asks the parameters' `requires_grad`. `export` writes what other tools
load, `load_adapted` reads it back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlkit.errors import ArtifactError, UsageError
from vlkit.models import towers as towers_module
from vlkit.models.towers import Towers
from vlkit.storage import folder_written_whole

if TYPE_CHECKING:
    from vlkit.config import TrainRetrievalConfig

# Encoder layers only: SigLIP's pooling head has an out_proj too, whose forward goes round any adapter.
LAYER = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.")
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
LOGIT_FILE = "logit_parameters.safetensors"


@dataclass(frozen=True)
class Counts:
    """Parameters that are trained, and all of them."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / self.total:.2%})"


def adapt(towers: Towers, config: TrainRetrievalConfig, *, seed: int) -> Counts:
    """Freeze, unfreeze, or insert adapters, as `config.tune` says.

    Args:
        seed: of the adapters' initial weights.

    Raises:
        UsageError: more layers to unfreeze than there are.
    """
    if config.tune == "lora":
        _insert_lora(towers, config, seed)
    elif config.tune == "last":
        _freeze_lower_layers(towers, config.unfreeze_layers)
    else:
        towers.model.requires_grad_(True)
    for parameter in towers.logit_parameters().values():
        parameter.requires_grad_(True)
    return count(towers)


def count(towers: Towers) -> Counts:
    """How many parameters are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in towers.model.parameters()]
    return Counts(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def trainable(towers: Towers) -> dict[str, torch.nn.Parameter]:
    """name -> parameter, of what is trained, in the model's order."""
    return {name: p for name, p in towers.model.named_parameters() if p.requires_grad}


def train_mode(towers: Towers) -> None:
    """Training mode for what is trained; what is frozen stays in eval mode, its dropout off.

    A module without parameters (a dropout) goes with the module that holds it.
    """

    def visit(module: torch.nn.Module, inherited: bool) -> None:
        own = [p.requires_grad for p in module.parameters()]
        module.training = any(own) if own else inherited
        for child in module.children():
            visit(child, module.training)

    visit(towers.model, False)


def check_depth(config: Any, unfreeze: int) -> dict[str, int]:
    """Encoder layers of each tower, by the name of its module.

    Raises:
        UsageError: fewer than are to be unfrozen.
    """
    vision, text = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    if unfreeze > min(vision, text):
        raise UsageError(f"--unfreeze-layers {unfreeze}: the towers have {vision} and {text} layers")
    return {"vision_model": vision, "text_model": text}


def _freeze_lower_layers(towers: Towers, unfreeze: int) -> None:
    """Train the upper `unfreeze` layers of each tower and what comes after them: final norm, pooling, projection."""
    depth = check_depth(towers.model.config, unfreeze)
    for name, parameter in towers.model.named_parameters():
        layer = LAYER.match(name)
        below = ".embeddings." in name or "pre_layrnorm" in name
        parameter.requires_grad_(int(layer[2]) >= depth[layer[1]] - unfreeze if layer else not below)


def lora_pattern(targets: tuple[str, ...]) -> str:
    """What PEFT matches module names against: attention projections of the encoder layers, and no others."""
    projections = "|".join(PROJECTIONS[target] for target in targets)
    return rf"(vision_model|text_model)\.encoder\.layers\.\d+\.self_attn\.({projections})"


def _insert_lora(towers: Towers, config: TrainRetrievalConfig, seed: int) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_pattern(config.lora_targets),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        towers.peft = get_peft_model(towers.model, lora)
    # PEFT wraps the model and puts its layers into it in place, so `towers.model` is the adapted one.


def export(towers: Towers, folder: Path) -> Path:
    """Write what other tools load, below `folder`: `adapter/` where there is a LoRA, else `model/`. Returns which."""
    if towers.peft is None:
        with folder_written_whole(folder / "model") as aside:
            towers.save(aside)
        return folder / "model"
    with folder_written_whole(folder / "adapter") as aside:
        # Embeddings are never adapted; asked to find out by itself, PEFT would ask the hub.
        towers.peft.save_pretrained(aside, save_embedding_layers=False)
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in towers.logit_parameters().items()}, aside / LOGIT_FILE
        )
    return folder / "adapter"


def load_adapted(folder: Path, base: str) -> Towers:
    """The tuned model that `export` wrote below `folder`; `base` is what an adapter belongs on.

    Raises:
        ArtifactError: neither model/ nor adapter/ is there, or the adapter does not fit the base.
    """
    if (folder / "model").is_dir():
        return towers_module.load(str(folder / "model"))
    adapter = folder / "adapter"
    if not adapter.is_dir():
        raise ArtifactError(
            f"{folder} holds no trained model",
            hint="train it to its end: run the same vlkit train-retrieval command again",
        )
    towers = towers_module.load(base)
    from peft import PeftModel

    try:
        towers.peft = PeftModel.from_pretrained(towers.model, adapter)
        saved = load_file(adapter / LOGIT_FILE)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{adapter} does not fit {base}: {str(error).splitlines()[0]}") from None
    logit_parameters = towers.logit_parameters()
    if {name: p.shape for name, p in logit_parameters.items()} != {name: t.shape for name, t in saved.items()}:
        raise ArtifactError(f"{adapter} does not fit {base}: its logit parameters are another family's")
    with torch.no_grad():
        for name, parameter in logit_parameters.items():
            parameter.copy_(saved[name])
    return towers
