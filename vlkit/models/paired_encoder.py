"""A vision tower of CLIP or SigLIP beside a text encoder of any kind: XLM-R, BERT, M-CLIP, any `AutoModel`.

    pair.json           where the two parts are, and how texts are pooled
    pair.safetensors    the text's projection, logit scale and bias
    vision/  text/      what save_pretrained wrote; or pair.json names a model instead

The text encoder keeps its own tokenizer; its token states are pooled (mean, or the first token) and projected, without
bias, into the space of the images. Each part opens by itself in transformers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vlkit import console
from vlkit.errors import ArtifactError, UsageError
from vlkit.models.families import dual_family
from vlkit.models.hub import quiet_transformers
from vlkit.storage import json_text

PAIR, WEIGHTS = "pair.json", "pair.safetensors"
TINY_TEXT = "tiny-xlmr"
# What is in WEIGHTS; the bias only where the family has one.
JOINT_PARAMETERS = ("text_projection.weight", "logit_scale", "logit_bias")
Pooling = Literal["mean", "cls"]


@dataclass
class PairConfig:
    """What vlkit asks a dual encoder's configuration for.

    Attributes:
        model_type: the vision tower's family: it decides the loss and the kind of logits.
        projection_dim: width of the common space.
        pad_id: the token that pads texts and is masked.
    """

    vision_config: Any
    text_config: Any
    model_type: str
    projection_dim: int
    pooling: Pooling = "mean"
    pad_id: int = 0


class PairedEncoder(nn.Module):
    """A vision tower, a text encoder and what joins them."""

    base_model_prefix = ""  # PEFT asks for it.

    def __init__(self, config: PairConfig, vision: Any, projection: nn.Module | None, text: Any) -> None:
        """Join the two parts. Projection, scale and bias are untrained: `load` fills them in.

        Args:
            vision: of a CLIPModel or SiglipModel.
            projection: CLIP's, of its images.
            text: an AutoModel that gives `last_hidden_state`.
        """
        super().__init__()
        self.config = config
        self.vision_model: Any = vision
        self.text_model: Any = text
        if projection is not None:
            self.visual_projection = projection
        # A pooling layer of its own would get no gradient: the states are pooled here.
        if getattr(text, "pooler", None) is not None:
            text.pooler = None
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        for name, value in _initial_logits(config).items():
            self.register_parameter(name, nn.Parameter(value))

    def text_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map padded token ids [texts, length] to pooled states [texts, hidden size]."""
        mask = (input_ids != self.config.pad_id).long()
        states: torch.Tensor = self.text_model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        if self.config.pooling == "cls":
            return states[:, 0]
        weight = mask[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        """Compute activations again in the backward pass, as transformers' models do when asked by this name."""
        for part in (self.vision_model, self.text_model):
            part.gradient_checkpointing_enable(options)


def _initial_logits(config: PairConfig) -> dict[str, torch.Tensor]:
    """Return the logit scale, and the bias if any, that the vision tower's family was trained from."""
    family = dual_family(config.model_type)
    logits = {"logit_scale": torch.tensor(math.log(family.initial_logit_scale))}
    if family.initial_logit_bias is not None:
        logits["logit_bias"] = torch.tensor(family.initial_logit_bias)
    return logits


def text_pooling(name: str) -> Pooling:
    """Read how a model of sentence-transformers pools its token states; mean where its files do not say."""
    from transformers.utils import cached_file

    path = None
    if Path(name).exists() or name.count("/") == 1:
        path = cached_file(name, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return "mean"
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        modes = [mode for mode, on in settings.items() if mode.startswith("pooling_mode_") and on is True]
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    if modes and not {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} & set(modes):
        console.warn(f"{name} pools its tokens by {modes[0].removeprefix('pooling_mode_')}; vlkit takes their mean")
    return "cls" if "pooling_mode_cls_token" in modes else "mean"


def pair_config(vision: Any, text: Any, pooling: Pooling = "mean", pad_id: int = 0) -> PairConfig:
    """Return the configuration of a pair.

    Args:
        vision: configuration of a dual encoder, or of a vision tower that was saved alone.
        text: configuration of a text encoder.

    Raises:
        UsageError: one of them is of the wrong kind.
    """
    if not hasattr(text, "hidden_size") or getattr(text, "is_encoder_decoder", False):
        raise UsageError(
            f"a {text.model_type} model is no text encoder", hint="take one like xlm-roberta-base or a BERT"
        )
    family = dual_family(vision.model_type)
    tower = getattr(vision, "vision_config", vision)
    return PairConfig(tower, text, family.name, family.embedding_width(vision), pooling, pad_id)


def write_fresh(folder: Path, vision: str, text: str, config: PairConfig, *, seed: int) -> None:
    """Write a pair whose parts are elsewhere and whose projection is new.

    Args:
        vision, text: hub names, folders, or folders' names below `folder`.
        seed: of the projection.
    """
    hidden, generator = config.text_config.hidden_size, torch.Generator().manual_seed(seed)
    projection = torch.randn((config.projection_dim, hidden), generator=generator) * hidden**-0.5
    weights = {"text_projection.weight": projection, **_initial_logits(config)}
    _write_joint(folder, PairParts(vision, text, config.pooling), weights)


def save(pair: PairedEncoder, folder: Path) -> None:
    """Write both parts, as transformers saves them, and what joins them."""
    folder = Path(folder)
    pair.text_model.save_pretrained(folder / "text")
    _vision_alone(pair).save_pretrained(folder / "vision")
    parameters = {name: p for name, p in pair.named_parameters() if name in JOINT_PARAMETERS}
    weights = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    _write_joint(folder, PairParts("vision", "text", pair.config.pooling), weights)


def _write_joint(folder: Path, parts: PairParts, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / WEIGHTS)
    content = {"schema": 1, "vision": parts.vision, "text": parts.text, "pooling": parts.pooling}
    (folder / PAIR).write_text(json_text(content, indent=2) + "\n", encoding="utf-8")


def _vision_alone(pair: PairedEncoder) -> Any:
    """Return the vision tower in the class that transformers opens it with."""
    class_name = dual_family(pair.config.model_type).vision_projection_class
    if class_name is None:
        return pair.vision_model
    config = pair.vision_model.config
    config.projection_dim = pair.config.projection_dim
    with torch.device("meta"):
        alone = getattr(quiet_transformers(), class_name)(config)
    alone.vision_model, alone.visual_projection = pair.vision_model, pair.visual_projection
    return alone


@dataclass(frozen=True)
class PairParts:
    """Where the parts of a pair are: hub names, or whole paths."""

    vision: str
    text: str
    pooling: Pooling

    @classmethod
    def read(cls, folder: Path) -> PairParts:
        """Read pair.json."""
        try:
            content = json.loads((folder / PAIR).read_text(encoding="utf-8"))
            vision, text, pooling = content["vision"], content["text"], content["pooling"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder / PAIR} is damaged: {error}") from None
        vision, text = (str(folder / name) if (folder / name).is_dir() else name for name in (vision, text))
        return cls(vision, text, pooling)


def is_pair(name: str) -> bool:
    """Return whether a name is the folder of a pair."""
    return (Path(name) / PAIR).is_file()


def load(folder: Path) -> tuple[PairedEncoder, Any]:
    """Load the pair that `save` or `write_fresh` wrote, in float32, in eval mode; and its text encoder's tokenizer."""
    transformers = quiet_transformers()
    parts = PairParts.read(folder)
    vision, projection, family, width = _load_vision(parts.vision)
    text = transformers.AutoModel.from_pretrained(parts.text, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.text)
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer of {parts.text} has no padding token")
    config = PairConfig(vision.config, text.config, family, width, parts.pooling, tokenizer.pad_token_id)
    pair = PairedEncoder(config, vision, projection, text)
    try:
        mismatch = pair.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} does not fit: {str(error).splitlines()[0]}") from None
    if mismatch.unexpected_keys or set(JOINT_PARAMETERS) & set(mismatch.missing_keys):
        raise ArtifactError(f"{folder / WEIGHTS} is of another pair")
    return pair.eval(), tokenizer


def _load_vision(name: str) -> tuple[Any, nn.Module | None, str, int]:
    """Return vision tower, its projection or None, family's name, width of the common space."""
    transformers = quiet_transformers()
    config = transformers.AutoConfig.from_pretrained(name)
    family = dual_family(config.model_type, name)
    whole, projects = config.model_type == family.name, family.vision_projection_class is not None
    class_name = family.model_class if whole else family.vision_projection_class or family.vision_class
    model = getattr(transformers, class_name).from_pretrained(name, dtype=torch.float32)
    vision = model.vision_model if whole or projects else model
    if not projects:
        return vision, None, family.name, vision.config.hidden_size
    return vision, model.visual_projection, family.name, model.visual_projection.out_features


def pair_on_meta(config: PairConfig) -> PairedEncoder:
    """Return the pair of a configuration without its weights; call it under `torch.device("meta")`."""
    transformers, family = quiet_transformers(), dual_family(config.model_type)
    text = transformers.AutoModel.from_config(config.text_config)
    vision = getattr(transformers, family.vision_class)(config.vision_config)
    projection = None
    if family.vision_projection_class is not None:
        projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
    return PairedEncoder(config, vision, projection, text)
