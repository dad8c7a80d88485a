"""A vision tower of CLIP or SigLIP beside a text encoder of any kind: XLM-R, BERT, M-CLIP, any `AutoModel`.

    pair.json           where the halves are, and how texts are pooled
    pair.safetensors    the text's projection, logit scale and bias
    vision/  text/      what save_pretrained wrote; or pair.json names a model instead

The text encoder keeps its own tokenizer; its token states are pooled (mean, or the first token) and projected, without
bias, into the space of the pictures. Each half opens by itself in transformers.
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
from vlkit.storage import json_text

PAIR, WEIGHTS = "pair.json", "pair.safetensors"
TINY_TEXT = "tiny-xlmr"
Pooling = Literal["mean", "cls"]
# What the logits of a fresh projection begin with, as the two families were trained from.
SCALES = {"clip": 1 / 0.07, "siglip": 10.0}
BIAS = -10.0


@dataclass
class PairConfig:
    """What vlkit asks a dual encoder's configuration for.

    Attributes:
        model_type: the vision tower's family: it decides the loss and the kind of logits.
        projection_dim: width of the common space.
        pad_token: what fills texts up and is not looked at.
    """

    vision_config: Any
    text_config: Any
    model_type: str
    projection_dim: int
    pooling: Pooling = "mean"
    pad_id: int = 0


class PairedEncoder(nn.Module):
    """The two halves and what joins them."""

    base_model_prefix = ""  # PEFT asks for it.

    def __init__(self, config: PairConfig, vision: nn.Module, projection: nn.Module | None, text: nn.Module) -> None:
        """Join them. What joins them is not yet anything: `load` fills it in.

        Args:
            vision: of a CLIPModel or SiglipModel.
            projection: CLIP's, of its pictures.
            text: an AutoModel that gives `last_hidden_state`.
        """
        super().__init__()
        self.config, self.vision_model, self.text_model = config, vision, text
        if projection is not None:
            self.visual_projection = projection
        # A pooling layer of its own would get no gradient: the states are pooled here.
        if getattr(text, "pooler", None) is not None:
            text.pooler = None
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(SCALES[config.model_type])))
        if config.model_type == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor(BIAS))

    def text_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Padded token ids [texts, length] -> pooled states [texts, hidden size]."""
        mask = (input_ids != self.config.pad_id).long()
        states = self.text_model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        if self.config.pooling == "cls":
            return states[:, 0]
        weight = mask[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

    def gradient_checkpointing_enable(self, how: dict[str, Any]) -> None:
        """As transformers' models have it."""
        for half in (self.vision_model, self.text_model):
            half.gradient_checkpointing_enable(how)


def text_limit(config: Any, tokenizer: Any) -> int:
    """Tokens that a text encoder takes: its positions, and no more than its tokenizer was made for."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    # RoBERTa and its kin count positions from behind the padding's number on.
    if "roberta" in config.model_type or config.model_type in ("camembert", "mpnet"):
        positions -= config.pad_token_id + 1
    return min(positions, tokenizer.model_max_length if tokenizer is not None else positions)


def text_pooling(name: str) -> Pooling:
    """How a model of sentence-transformers says that its token states are pooled; mean where nothing is said."""
    from transformers.utils import cached_file

    path = None
    if Path(name).exists() or name.count("/") == 1:
        path = cached_file(name, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return "mean"
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
        modes = [mode for mode, on in told.items() if mode.startswith("pooling_mode_") and on is True]
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    if modes and not {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} & set(modes):
        console.warn(f"{name} pools its tokens by {modes[0].removeprefix('pooling_mode_')}; here their mean is taken")
    return "cls" if "pooling_mode_cls_token" in modes else "mean"


def pair_config(vision: Any, text: Any, pooling: Pooling = "mean", pad_token: int = 0) -> PairConfig:
    """Of the configurations of a dual encoder, whose vision tower is taken, and of a text encoder."""
    if not hasattr(text, "hidden_size") or getattr(text, "is_encoder_decoder", False):
        raise UsageError(
            f"a {text.model_type} model is no text encoder", hint="take one like xlm-roberta-base or a BERT"
        )
    # Of a whole dual encoder, or of a vision tower that was saved alone.
    tower, family = getattr(vision, "vision_config", vision), vision.model_type.removesuffix("_vision_model")
    if family not in SCALES:
        raise UsageError(f"a {vision.model_type} model has no vision tower that vlkit knows")
    width = tower.hidden_size if family == "siglip" else vision.projection_dim
    return PairConfig(tower, text, family, width, pooling, pad_token)


def write_fresh(folder: Path, vision: str, text: str, config: PairConfig, *, seed: int) -> None:
    """A pair whose halves are elsewhere and whose projection is new.

    Args:
        vision, text: hub names, folders, or folders' names below `folder`.
        seed: of the projection.
    """
    hidden, generator = config.text_config.hidden_size, torch.Generator().manual_seed(seed)
    weights = {
        "text_projection.weight": torch.randn((config.projection_dim, hidden), generator=generator) * hidden**-0.5,
        "logit_scale": torch.tensor(math.log(SCALES[config.model_type])),
    }
    if config.model_type == "siglip":
        weights["logit_bias"] = torch.tensor(BIAS)
    _write_joint(folder, {"vision": vision, "text": text, "pooling": config.pooling}, weights)


def save(pair: PairedEncoder, folder: Path) -> None:
    """Both halves, as transformers saves them, and what joins them."""
    folder = Path(folder)
    pair.text_model.save_pretrained(folder / "text")
    _vision_alone(pair).save_pretrained(folder / "vision")
    names = ("text_projection.weight", "logit_scale", "logit_bias")
    weights = {name: p.detach().cpu().contiguous() for name, p in pair.named_parameters() if name in names}
    _write_joint(folder, {"vision": "vision", "text": "text", "pooling": pair.config.pooling}, weights)


def _write_joint(folder: Path, told: dict[str, str], weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / WEIGHTS)
    (folder / PAIR).write_text(json_text({"schema": 1, **told}, indent=2) + "\n", encoding="utf-8")


def _vision_alone(pair: PairedEncoder) -> Any:
    """The vision half as the class that transformers opens it with."""
    if pair.config.model_type == "siglip":
        return pair.vision_model
    from transformers import CLIPVisionModelWithProjection

    config = pair.vision_model.config
    config.projection_dim = pair.config.projection_dim
    with torch.device("meta"):
        alone = CLIPVisionModelWithProjection(config)
    alone.vision_model, alone.visual_projection = pair.vision_model, pair.visual_projection
    return alone


@dataclass(frozen=True)
class PairParts:
    """Where the halves of a pair are: hub names, or whole paths."""

    vision: str
    text: str
    pooling: Pooling

    @classmethod
    def of(cls, folder: Path) -> PairParts:
        """Read pair.json."""
        try:
            told = json.loads((folder / PAIR).read_text(encoding="utf-8"))
            vision, text, pooling = told["vision"], told["text"], told["pooling"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder / PAIR} is damaged: {error}") from None
        below = [str(folder / name) if (folder / name).is_dir() else name for name in (vision, text)]
        return cls(*below, pooling)


def load(folder: Path) -> tuple[PairedEncoder, Any]:
    """The pair of a folder that `save` or `write_fresh` wrote, in float32, in eval mode; and its text's tokenizer."""
    import transformers

    halves = PairParts.of(folder)
    vision, projection, family, width = _vision_half(halves.vision)
    text = transformers.AutoModel.from_pretrained(halves.text, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(halves.text)
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer of {halves.text} has no padding token")
    config = PairConfig(vision.config, text.config, family, width, halves.pooling, tokenizer.pad_token_id)
    pair = PairedEncoder(config, vision, projection, text)
    try:
        wrong = pair.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} does not fit: {str(error).splitlines()[0]}") from None
    joint = {"text_projection.weight", "logit_scale", "logit_bias"}
    if wrong.unexpected_keys or joint & set(wrong.missing_keys):
        raise ArtifactError(f"{folder / WEIGHTS} is of another pair")
    return pair.eval(), tokenizer


def _vision_half(name: str) -> tuple[Any, Any, str, int]:
    """Vision tower, its projection or None, family, width of the common space."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    alone = {"clip_vision_model": "CLIPVisionModelWithProjection", "siglip_vision_model": "SiglipVisionModel"}
    whole = {"clip": "CLIPModel", "siglip": "SiglipModel"}
    kinds = alone | whole
    if config.model_type not in kinds:
        raise UsageError(f"{name} is a {config.model_type} model, whose vision tower vlkit does not know")
    model = getattr(transformers, kinds[config.model_type]).from_pretrained(name, dtype=torch.float32)
    if config.model_type.startswith("siglip"):
        vision = model.vision_model if config.model_type in whole else model
        return vision, None, "siglip", vision.config.hidden_size
    return model.vision_model, model.visual_projection, "clip", model.visual_projection.out_features
