"""A frozen vision tower on its own: a picture becomes patches, for a language model to look at.

Of SigLIP and SigLIP 2 the last layer behind its norm, which its pooling head attends to. Of CLIP the layer before the
last, without the class token: the last one serves that token alone (as LLaVA does, arXiv 2304.08485).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vlkit.data.images.spec import RESAMPLING, PixelSpec
from vlkit.errors import UsageError
from vlkit.models import loading, paired_encoder, preprocessing, stages
from vlkit.models.dual_encoder import (
    FAMILIES,
    load,
    quiet_transformers,
    read_config,
    refuse_unknown,
    translate_hub_errors,
)
from vlkit.models.fast.layers import use_fast_layers
from vlkit.models.stages import PartialForward, Stage, run_stages
from vlkit.models.tiny import MAKERS
from vlkit.runs import Run

VISION_CLASSES = {
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2Model",
    "siglip2_vision_model": "Siglip2VisionModel",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
}


class VisionEncoder(torch.nn.Module):
    """A vision tower, never trained.

    Attributes:
        vision: transformers' vision model.
        family: siglip, siglip2 or clip.
        source: hub name, folder or run that it came from.
    """

    def __init__(self, vision: Any, family: str, pixel_spec: PixelSpec, source: str) -> None:
        super().__init__()
        use_fast_layers(vision)
        self.vision, self.family, self.pixel_spec, self.source = vision, family, pixel_spec, source
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pixel_spec.mean, pixel_spec.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.requires_grad_(False).eval()

    @property
    def image_chain(self) -> list[Stage]:
        """From normalised pixels to patches."""
        return _chain(self.vision, self.family)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @property
    def width(self) -> int:
        """Of a patch."""
        return self.vision.config.hidden_size

    @property
    def patches(self) -> int:
        """Of a picture."""
        return (self.pixel_spec.size // self.vision.config.patch_size) ** 2

    def tower_config(self, kind: str) -> Any:
        """The vision tower's configuration, as `Towers` have one for each half."""
        return self.vision.config

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [pictures, 3, size, size] -> normalised, on the tower's device."""
        # In place, as Towers do.
        return (pixels.to(self.device) / 255).sub_(self.mean).div_(self.std)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [pictures, 3, size, size] -> patches [pictures, patches, width]."""
        return run_stages(self.image_chain, PartialForward(self.normalize_pixels(pixels), 0)).values

    def blank(self) -> torch.Tensor:
        """A picture on which there is nothing, of the colour that becomes zero: uint8 [1, 3, size, size]."""
        size = self.pixel_spec.size
        return (self.mean.cpu() * 255).round().to(torch.uint8).expand(1, 3, size, size).contiguous()

    def train(self, mode: bool = True) -> VisionEncoder:
        """It stays in eval mode, whatever is asked for."""
        return super().train(False)


def load_vision_encoder(name: str, *, keep_in: Path | None = None, texts: tuple[str, ...] = (), seed: int = 0) -> VisionEncoder:
    """A vision tower by hub name, local folder, run, or tiny-siglip and tiny-clip; in float32, on the CPU.

    Args:
        keep_in: folder where a tiny model stays, and is found again.
        texts: for the tokenizer of a tiny model, which comes with it.
        seed: of a tiny model's weights.

    Raises:
        UsageError: no such model, or one without a vision tower that vlkit knows.
        NetworkError, ArtifactError: see `towers.load`.
    """
    if name in MAKERS:
        encoder = loading.load_or_create(name, texts, seed=seed, keep_in=keep_in)
        return _of_towers(encoder, name)
    if Run(Path(name)).started:
        encoder = loading.load_tuned(Run(Path(name)))
        if encoder.peft is not None:
            encoder.model, encoder.peft = encoder.peft.merge_and_unload(), None
        return _of_towers(encoder, name)
    if (Path(name) / paired_encoder.PAIR).is_file():
        return _of_towers(load(name), name)
    config = vision_config(name)
    model_type = config.model_type
    with translate_hub_errors(name):
        model_class = getattr(quiet_transformers(), VISION_CLASSES[model_type])
        model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        spec = _pixel_spec(name, config)
    missing = [key for key in report["missing_keys"] if ".head." not in key]
    if missing:
        raise UsageError(f"{name}: {len(missing)} weights are missing, for example {missing[0]}")
    vision = model if model_type.endswith("_vision_model") else model.vision_model
    return VisionEncoder(vision, _family(model_type), spec, name)


def vision_config(name: str) -> Any:
    """transformers' configuration of the model that a vision tower is taken from, refused where vlkit knows none."""
    if name in MAKERS:
        return loading.model_config(name)
    run = Run(Path(name))
    if run.started:
        return loading.tuned_config(run)
    if (Path(name) / paired_encoder.PAIR).is_file():
        return vision_config(paired_encoder.PairParts.of(Path(name)).vision)
    if not run.folder.exists() and run.folder.parent.name == "runs":
        run.config()  # Says that there is none, and which there are.
    refuse_unknown(name, tuple(MAKERS), "google/siglip-base-patch16-224")
    config = read_config(name)
    if config.model_type not in VISION_CLASSES:
        told = f"{name} is a {config.model_type} model, whose vision tower vlkit does not know"
        raise UsageError(told, hint="SigLIP, SigLIP 2 or CLIP; or a finished train-retrieval run")
    return config


def vision_encoder_on_meta(config: Any) -> VisionEncoder:
    """The tower of a configuration on the meta device: shapes and counts, without a byte of weights."""
    model_type = config.model_type
    family, half = _family(model_type), getattr(config, "vision_config", config)
    classes = {"siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel", "clip": "CLIPVisionModel"}
    with torch.device("meta"):
        vision = getattr(quiet_transformers(), classes[family])(half)
    size = half.image_size if family != "siglip2" else _naflex_size(half.num_patches, half.patch_size)
    return VisionEncoder(vision, family, PixelSpec(size), "meta")


def _of_towers(encoder: Any, source: str) -> VisionEncoder:
    family = "siglip" if encoder.family is FAMILIES["siglip"] else "clip"
    return VisionEncoder(encoder.model.vision_model, family, encoder.pixel_spec, source)


def _family(model_type: str) -> str:
    return model_type.removesuffix("_vision_model")


def _pixel_spec(name: str, config: Any) -> PixelSpec:
    family, half = _family(config.model_type), getattr(config, "vision_config", config)
    if family != "siglip2":
        return preprocessing.read(name, SimpleNamespace(model_type=family, vision_config=half))
    said = preprocessing.image_processor(name)
    size = _naflex_size(said.get("max_num_patches") or half.num_patches, half.patch_size)
    return PixelSpec(size, resample=said.get("resample", RESAMPLING["bilinear"]))


def _naflex_size(patches: int, patch: int) -> int:
    """Side of the square picture that has this many patches, or the next smaller one."""
    return int(patches**0.5) * patch


def _chain(vision: Any, family: str) -> list[Stage]:
    layers = [stages.layer(each) for each in vision.encoder.layers]
    if family == "clip":
        first = Stage((vision.embeddings, vision.pre_layrnorm), lambda x, _: vision.pre_layrnorm(vision.embeddings(x)))
        return [first, *layers[:-1], Stage((), lambda x, _: x[:, 1:])]
    embed: Callable[[torch.Tensor], torch.Tensor] = vision.embeddings
    if family == "siglip2":
        embed = _naflex(vision)
    return [
        Stage((vision.embeddings,), lambda x, _: embed(x)),
        *layers,
        Stage((vision.post_layernorm,), lambda x, _: vision.post_layernorm(x)),
    ]


def _naflex(vision: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """SigLIP 2 in its flexible variant takes patches that are cut already, and how many each way."""
    patch = vision.config.patch_size

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        cut = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [pictures, 3, rows, columns, patch, patch]
        rows, columns = cut.shape[2:4]
        flat = cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([[rows, columns]] * len(pixels))
        return vision.embeddings(flat, shapes)

    return embed
