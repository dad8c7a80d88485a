"""What is trained: everything, upper layers, adapters, one tower, the heads; logit scale and bias always.

`apply_tuning` decides it in place; everything after asks the parameters' `requires_grad`. `export` writes what other
tools load, `loading.load_exported` reads it back. Where layers and projections are: see `families.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from vlkit.errors import UsageError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.families import FAMILIES, Family
from vlkit.models.quantization import parameter_count
from vlkit.storage import atomic_folder

if TYPE_CHECKING:
    from vlkit.config.training import TrainRetrievalConfig

# The values of --towers, and of --tune if it names a tower: beginnings of parameters' names.
PREFIXES = {"image": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}
TOWER_MODULES = {"both": ("vision_model", "text_model"), "image": ("vision_model",), "text": ("text_model",)}
LOGITS = ("logit_scale", "logit_bias")
LOGIT_FILE = "logit_parameters.safetensors"


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters that are trained, and all of them."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / self.total:.2%})"


def apply_tuning(encoder: DualEncoder, config: TrainRetrievalConfig, *, seed: int) -> ParameterCounts:
    """Freeze, unfreeze, or insert adapters, as the settings say.

    Args:
        seed: of the adapters' initial weights.

    Raises:
        UsageError: more layers to unfreeze than there are, or a name that no trained parameter has.
    """
    if config.tune == "lora":
        _insert_lora(encoder, config, seed)
    else:
        chosen = _chosen_parameters(encoder, config)
        for name, parameter in encoder.model.named_parameters():
            parameter.requires_grad_(name in chosen)
    _freeze_all_but(encoder, config.trainable)
    for parameter in always_trained(encoder).values():
        parameter.requires_grad_(True)
    if config.checkpoint_activations:
        # The inputs of a frozen layer need no gradient: the older, reentrant way would not train what is above.
        encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
    return count_parameters(encoder)


def always_trained(encoder: DualEncoder) -> dict[str, torch.nn.Parameter]:
    """Return scale and bias, and of a pair the new projection of its texts.

    No PEFT adapter file holds them: they are saved beside it.
    """
    return {name: p for name, p in encoder.model.named_parameters() if name in encoder.family.always_trained}


def _chosen_parameters(encoder: DualEncoder, config: TrainRetrievalConfig) -> set[str]:
    """Return names of the parameters that --tune and --towers choose."""
    names, family = {name for name, _ in encoder.model.named_parameters()}, encoder.family
    if config.tune == "last":
        depth, layer = check_depth(encoder.model.config, config.unfreeze_layers), _layer_pattern(family)
        matches = [match for name in names if (match := layer.match(name))]
        for tower in TOWER_MODULES[config.towers]:
            if len({match["number"] for match in matches if match["tower"] == tower}) != depth[tower]:
                raise UsageError(
                    f"--tune last: vlkit does not know the layers of a {_model_type(encoder, tower)} model",
                    hint="--tune text, image, head and full work with any model",
                )
        names = _upper_parameters(names, layer, depth, config.unfreeze_layers)
    elif config.tune == "head":
        names = {name for name in names if re.match(family.head, name)}
    tower_choice = config.tune if config.tune in PREFIXES else config.towers
    return names if tower_choice == "both" else {name for name in names if name.startswith(PREFIXES[tower_choice])}


def _layer_pattern(family: Family) -> re.Pattern[str]:
    """Return what the names of parameters in encoder layers begin with; groups `tower` and `number`."""
    return re.compile(rf"(?P<tower>vision_model|text_model)\.{family.encoder_layers}\.(?P<number>\d+)\.")


def _model_type(encoder: DualEncoder, tower: str) -> str:
    return str(getattr(encoder.model, tower).config.model_type)


def is_head(name: str) -> bool:
    """Return whether a parameter comes after the encoders: between their last layer and the common space."""
    return any(re.match(family.head, name) for family in FAMILIES.values() if isinstance(family, Family))


def _freeze_all_but(encoder: DualEncoder, globs: Sequence[str]) -> None:
    """Freeze what is to be trained and matches none of these globs; none: freeze nothing."""
    trained = trainable(encoder)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in trained):
            raise UsageError(
                f"--trainable {glob!r}: no parameter that --tune chose has such a name",
                hint=f"they are called {', '.join(list(trained)[:3])}, ...",
            )
    for name, parameter in trained.items():
        parameter.requires_grad_(not globs or any(fnmatchcase(name, glob) for glob in globs))


def count_parameters(encoder: DualEncoder) -> ParameterCounts:
    """Count parameters that are trained, and all of them."""
    sizes = [(parameter_count(p), p.requires_grad) for p in encoder.model.parameters()]
    return ParameterCounts(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def trainable(encoder: DualEncoder) -> dict[str, torch.nn.Parameter]:
    """Return name -> parameter, of what is trained, in the model's order."""
    return {name: p for name, p in encoder.model.named_parameters() if p.requires_grad}


def learning_rates(names: Iterable[str], *, head: float | None, logit: float | None) -> dict[str, float]:
    """Return name -> peak learning rate, of the parameters that have one of their own."""
    rates: dict[str, float] = {}
    for name in names:
        if logit is not None and name in LOGITS:
            rates[name] = logit
        elif head is not None and is_head(name):
            rates[name] = head
    return rates


def train_mode(model: torch.nn.Module) -> None:
    """Put what is trained into training mode; what is frozen stays in eval mode, its dropout off.

    A module without parameters (a dropout) goes with the module that holds it.
    """

    def visit(module: torch.nn.Module, inherited: bool) -> None:
        own = [p.requires_grad for p in module.parameters()]
        module.training = any(own) if own else inherited
        for child in module.children():
            visit(child, module.training)

    visit(model, False)


def check_depth(config: Any, unfreeze: int) -> dict[str, int]:
    """Return the number of encoder layers of each tower, by the name of its module.

    Raises:
        UsageError: fewer than are to be unfrozen.
    """
    vision, text = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    if unfreeze > min(vision, text):
        raise UsageError(f"--unfreeze-layers {unfreeze}: the towers have {vision} and {text} layers")
    return {"vision_model": vision, "text_model": text}


def _upper_parameters(names: set[str], layer: re.Pattern[str], depth: dict[str, int], unfreeze: int) -> set[str]:
    """Return the upper `unfreeze` layers of each tower and what comes after them: final norm, pooling, projection."""
    upper = set()
    for name in names:
        match = layer.match(name)
        is_below = ".embeddings." in name or "pre_layrnorm" in name
        if int(match["number"]) >= depth[match["tower"]] - unfreeze if match else not is_below:
            upper.add(name)
    return upper


def lora_pattern(family: Family, targets: Sequence[str], towers: str = "both") -> str:
    """Return what PEFT matches module names against: attention projections of the encoder layers, and no others."""
    projections = "|".join(family.projections[target] for target in targets)
    return rf"({'|'.join(TOWER_MODULES[towers])})\.{family.encoder_layers}\.\d+\.({projections})"


def _insert_lora(encoder: DualEncoder, config: TrainRetrievalConfig, seed: int) -> None:
    from peft import LoraConfig, get_peft_model

    pattern = lora_pattern(encoder.family, config.lora_targets, config.towers)
    for tower in TOWER_MODULES[config.towers]:
        if not any(re.fullmatch(pattern, n) and n.startswith(tower) for n, _ in encoder.model.named_modules()):
            raise UsageError(
                f"--tune lora: vlkit does not know the attention layers of a {_model_type(encoder, tower)} model",
                hint="--towers image adapts the other one; --tune text or full trains all of it",
            )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=pattern,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # PEFT wraps the model and puts its layers into it in place, so `encoder.model` is the adapted one.
        encoder.peft = get_peft_model(encoder.model, lora)


def export(encoder: DualEncoder, folder: Path) -> Path:
    """Write what other tools load, below `folder`: `adapter/` with a LoRA, else `model/`. Return which."""
    if encoder.peft is None:
        with atomic_folder(folder / "model") as aside:
            encoder.save(aside)
        return folder / "model"
    with atomic_folder(folder / "adapter") as aside:
        # Embeddings are never adapted; asked to find out by itself, PEFT would ask the hub.
        encoder.peft.save_pretrained(aside, save_embedding_layers=False)
        parameters = {name: p.detach().cpu().contiguous() for name, p in always_trained(encoder).items()}
        save_file(parameters, aside / LOGIT_FILE)
    return folder / "adapter"


def export_merged(encoder: DualEncoder, folder: Path) -> Path:
    """Merge the LoRA into the weights, in place, and write them below `folder` as `model/`."""
    encoder.model = encoder.peft.merge_and_unload()
    encoder.peft = None
    return export(encoder, folder)
