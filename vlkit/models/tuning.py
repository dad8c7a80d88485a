"""What is trained: everything, upper layers, adapters, one tower, the heads; logit scale and bias always.

`apply_tuning` decides it in place; everything after asks the parameters' `requires_grad`. `export` writes what other tools
load, `load_adapted` reads it back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlkit.errors import ArtifactError, UsageError
from vlkit.models import dual_encoder as towers_module
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.quantization import parameter_count
from vlkit.storage import atomic_folder

if TYPE_CHECKING:
    from vlkit.config.training import TrainRetrievalConfig

# Encoder layers only: SigLIP's pooling head has an out_proj too, whose forward goes round any adapter.
LAYER = re.compile(r"(vision_model|text_model)\.(?:encoder|transformer)\.layers?\.(\d+)\.")
# What stands behind the encoders: CLIP's projections, SigLIP's pooling head and text head.
HEAD = re.compile(r"(visual_projection|text_projection|(vision_model|text_model)\.head)\.")
TOWERS = {"image": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}
# Attention's projections, below an encoder layer, as CLIP and SigLIP, BERT and its kin, DistilBERT and MPNet say.
PROJECTIONS = {
    "q": r"self_attn\.q_proj|attention\.self\.query|attention\.q_lin|attention\.attn\.q",
    "k": r"self_attn\.k_proj|attention\.self\.key|attention\.k_lin|attention\.attn\.k",
    "v": r"self_attn\.v_proj|attention\.self\.value|attention\.v_lin|attention\.attn\.v",
    "out": r"self_attn\.out_proj|attention\.output\.dense|attention\.out_lin|attention\.attn\.o",
}
TOWER_NAMES = {"both": ("vision_model", "text_model"), "image": ("vision_model",), "text": ("text_model",)}
LOGITS = ("logit_scale", "logit_bias")
LOGIT_FILE = "logit_parameters.safetensors"


@dataclass(frozen=True)
class Counts:
    """Parameters that are trained, and all of them."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / self.total:.2%})"


def apply_tuning(encoder: DualEncoder, config: TrainRetrievalConfig, *, seed: int) -> Counts:
    """Freeze, unfreeze, or insert adapters, as the settings say.

    Args:
        seed: of the adapters' initial weights.

    Raises:
        UsageError: more layers to unfreeze than there are, or a name that no trained parameter has.
    """
    if config.tune == "lora":
        _insert_lora(encoder, config, seed)
    else:
        chosen = _chosen(encoder, config)
        for name, parameter in encoder.model.named_parameters():
            parameter.requires_grad_(name in chosen)
    _keep_only(encoder, config.trainable)
    for parameter in _always_trained(encoder).values():
        parameter.requires_grad_(True)
    if config.checkpoint_activations:
        # The inputs of a frozen layer need no gradient, which the older, reentrant way would take for nothing to do.
        encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
    return count_parameters(encoder)


def _always_trained(encoder: DualEncoder) -> dict[str, torch.nn.Parameter]:
    """Scale and bias, and of a pair the projection of its texts, which nobody has trained before.

    No PEFT adapter file holds them: they are kept beside it.
    """
    names = [*LOGITS, "text_projection.weight"] if encoder.is_paired else LOGITS
    return {name: p for name, p in encoder.model.named_parameters() if name in names}


def _chosen(encoder: DualEncoder, config: TrainRetrievalConfig) -> set[str]:
    """Names of the parameters that --tune and --towers choose."""
    names = {name for name, _ in encoder.model.named_parameters()}
    if config.tune == "last":
        depth = check_depth(encoder.model.config, config.unfreeze_layers)
        for tower in TOWER_NAMES[config.towers]:
            if len({m[2] for name in names if (m := LAYER.match(name)) and m[1] == tower}) != depth[tower]:
                kind = getattr(encoder.model, tower).config.model_type
                told = f"--tune last: vlkit does not know the layers of a {kind} model"
                raise UsageError(told, hint="--tune text, image, head and full work with any model")
        names = _upper(names, depth, config.unfreeze_layers)
    elif config.tune == "head":
        names = {name for name in names if is_head(name)}
    where = config.tune if config.tune in TOWERS else config.towers
    return names if where == "both" else {name for name in names if name.startswith(TOWERS[where])}


def is_head(name: str) -> bool:
    """Whether a parameter stands behind the encoders, between their last layer and the common space."""
    return HEAD.match(name) is not None


def _keep_only(encoder: DualEncoder, globs: Sequence[str]) -> None:
    """Freeze what is to be trained and bears none of these names."""
    trained = trainable(encoder)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in trained):
            told = f"--trainable {glob!r}: no parameter that --tune chose has such a name"
            raise UsageError(told, hint=f"they are called {', '.join(list(trained)[:3])}, ...")
    for name, parameter in trained.items():
        parameter.requires_grad_(not globs or any(fnmatchcase(name, glob) for glob in globs))


def count_parameters(encoder: DualEncoder) -> Counts:
    """How many parameters are trained."""
    sizes = [(parameter_count(p), p.requires_grad) for p in encoder.model.parameters()]
    return Counts(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def trainable(encoder: DualEncoder) -> dict[str, torch.nn.Parameter]:
    """name -> parameter, of what is trained, in the model's order."""
    return {name: p for name, p in encoder.model.named_parameters() if p.requires_grad}


def learning_rates(named: Iterable[str], *, head: float | None, logit: float | None) -> dict[str, float]:
    """name -> peak learning rate, of the parameters that have one of their own."""
    of_heads = {name: head for name in named if head is not None and is_head(name)}
    return of_heads | {name: logit for name in named if logit is not None and name in LOGITS}


def train_mode(model: torch.nn.Module) -> None:
    """Training mode for what is trained; what is frozen stays in eval mode, its dropout off.

    A module without parameters (a dropout) goes with the module that holds it.
    """

    def visit(module: torch.nn.Module, inherited: bool) -> None:
        own = [p.requires_grad for p in module.parameters()]
        module.training = any(own) if own else inherited
        for child in module.children():
            visit(child, module.training)

    visit(model, False)


def check_depth(config: Any, unfreeze: int) -> dict[str, int]:
    """Encoder layers of each tower, by the name of its module.

    Raises:
        UsageError: fewer than are to be unfrozen.
    """
    vision, text = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    if unfreeze > min(vision, text):
        raise UsageError(f"--unfreeze-layers {unfreeze}: the towers have {vision} and {text} layers")
    return {"vision_model": vision, "text_model": text}


def _upper(names: set[str], depth: dict[str, int], unfreeze: int) -> set[str]:
    """The upper `unfreeze` layers of each tower and what comes after them: final norm, pooling, projection."""
    found = set()
    for name in names:
        layer = LAYER.match(name)
        below = ".embeddings." in name or "pre_layrnorm" in name
        if int(layer[2]) >= depth[layer[1]] - unfreeze if layer else not below:
            found.add(name)
    return found


def lora_pattern(targets: tuple[str, ...], encoder: str = "both") -> str:
    """What PEFT matches module names against: attention projections of the encoder layers, and no others."""
    projections = "|".join(PROJECTIONS[target] for target in targets)
    return rf"({'|'.join(TOWER_NAMES[encoder])})\.(encoder|transformer)\.layers?\.\d+\.({projections})"


def _insert_lora(encoder: DualEncoder, config: TrainRetrievalConfig, seed: int) -> None:
    from peft import LoraConfig, get_peft_model

    pattern = lora_pattern(config.lora_targets, config.towers)
    for tower in TOWER_NAMES[config.towers]:
        if not any(re.fullmatch(pattern, n) and n.startswith(tower) for n, _ in encoder.model.named_modules()):
            kind = getattr(encoder.model, tower).config.model_type
            told = f"--tune lora: vlkit does not know the attention layers of a {kind} model"
            raise UsageError(told, hint="--towers image adapts the other one; --tune text or full trains all of it")
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=pattern,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder.peft = get_peft_model(encoder.model, lora)
    # PEFT wraps the model and puts its layers into it in place, so `towers.model` is the adapted one.


def export(encoder: DualEncoder, folder: Path) -> Path:
    """Write what other tools load, below `folder`: `adapter/` where there is a LoRA, else `model/`. Returns which."""
    if encoder.peft is None:
        with atomic_folder(folder / "model") as aside:
            encoder.save(aside)
        return folder / "model"
    with atomic_folder(folder / "adapter") as aside:
        # Embeddings are never adapted; asked to find out by itself, PEFT would ask the hub.
        encoder.peft.save_pretrained(aside, save_embedding_layers=False)
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in _always_trained(encoder).items()}, aside / LOGIT_FILE
        )
    return folder / "adapter"


def export_merged(encoder: DualEncoder, folder: Path) -> Path:
    """Merge the LoRA into the weights, in place, and write them below `folder` as `model/`."""
    encoder.model = encoder.peft.merge_and_unload()
    encoder.peft = None
    return export(encoder, folder)


def load_adapted(folder: Path, base: str, *, quantized: Precision | None = None) -> DualEncoder:
    """The tuned model that `export` wrote below `folder`; `base` is what an adapter belongs on.

    Args:
        quantized: the base in 4 bits, as it was when the adapter was trained.

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
    encoder = towers_module.load(base, quantized=quantized)
    from peft import PeftModel

    try:
        encoder.peft = PeftModel.from_pretrained(encoder.model, adapter)
        saved = load_file(adapter / LOGIT_FILE)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{adapter} does not fit {base}: {str(error).splitlines()[0]}") from None
    logit_parameters = _always_trained(encoder)
    if {name: p.shape for name, p in logit_parameters.items()} != {name: t.shape for name, t in saved.items()}:
        raise ArtifactError(f"{adapter} does not fit {base}: its logit parameters are another family's")
    with torch.no_grad():
        for name, parameter in logit_parameters.items():
            parameter.copy_(saved[name])
    return encoder
