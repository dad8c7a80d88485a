"""A frozen vision tower on its own: an image becomes patches, for a language model to look at.

Of SigLIP and SigLIP 2 the last layer behind its norm, which its pooling head attends to; of CLIP the layer before the
last, without the class token. See `patch_chain` in `families.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch

from vlkit.data.images.spec import PixelSpec
from vlkit.errors import UsageError
from vlkit.models import families, loading
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.families import VisionFamily, is_vision_alone, vision_family
from vlkit.models.fast.layers import use_fast_layers
from vlkit.models.hub import quiet_transformers, read_config, refuse_unknown, translate_hub_errors
from vlkit.models.paired_encoder import PairParts, is_pair
from vlkit.models.stages import Modality, PartialForward, Stage, run_stages
from vlkit.models.tiny import MAKERS
from vlkit.runs import Run


class VisionEncoder(torch.nn.Module):
    """A vision tower, never trained.

    Attributes:
        vision: transformers' vision model.
        family: what is particular to its kind.
        source: hub name, folder or run that it came from.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, vision: Any, family: VisionFamily, pixel_spec: PixelSpec, source: str) -> None:
        super().__init__()
        use_fast_layers(vision, families.attention_classes())
        self.vision, self.family, self.pixel_spec, self.source = vision, family, pixel_spec, source
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pixel_spec.mean, pixel_spec.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.requires_grad_(False).eval()

    @property
    def image_chain(self) -> list[Stage]:
        """From normalised pixels to patches."""
        return self.family.patch_chain(self.vision)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @property
    def width(self) -> int:
        """Width of a patch."""
        return int(self.vision.config.hidden_size)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return int(self.pixel_spec.size // self.vision.config.patch_size) ** 2

    def tower_config(self, modality: Modality) -> Any:
        """Return the vision tower's configuration, as a DualEncoder returns one for each tower."""
        return self.vision.config

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 [images, 3, size, size] into what the chain begins with, on the encoder's device."""
        # In place, as a DualEncoder does.
        return (pixels.to(self.device) / 255).sub_(self.mean).div_(self.std)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map uint8 [images, 3, size, size] to patches [images, patches, width]."""
        return run_stages(self.image_chain, PartialForward(self.normalize_pixels(pixels), 0)).values

    def blank(self) -> torch.Tensor:
        """Return an image without content, of the colour that becomes zero: uint8 [1, 3, size, size]."""
        size = self.pixel_spec.size
        return (self.mean.cpu() * 255).round().to(torch.uint8).expand(1, 3, size, size).contiguous()

    def release(self) -> None:
        """Free the weights, once the patches of all images are cached; the encoder then encodes no more images."""
        self.vision.to("meta")

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the mode."""
        return super().train(False)


def load_vision_encoder(
    name: str, *, keep_in: Path | None = None, texts: tuple[str, ...] = (), seed: int = 0
) -> VisionEncoder:
    """Load a vision tower by hub name, local folder, run, or tiny-siglip and tiny-clip; in float32, on the CPU.

    Args:
        keep_in: folder where a tiny model is written, and found again.
        texts: for the tokenizer of a tiny model, which comes with it.
        seed: of a tiny model's weights.

    Raises:
        UsageError: no such model, or one without a vision tower that vlkit knows.
        NetworkError, ArtifactError: see `loading.load_dual_encoder`.
    """
    if name in MAKERS:
        return _from_dual_encoder(loading.load_or_create(name, texts, seed=seed, keep_in=keep_in), name)
    if Run(Path(name)).started:
        encoder = loading.load_tuned(Run(Path(name)))
        if encoder.peft is not None:
            encoder.model, encoder.peft = encoder.peft.merge_and_unload(), None
        return _from_dual_encoder(encoder, name)
    if is_pair(name):
        return _from_dual_encoder(loading.load_dual_encoder(name), name)
    config = vision_config(name)
    family, alone = vision_family(config.model_type, name), is_vision_alone(config.model_type)
    with translate_hub_errors(name):
        model_class = getattr(quiet_transformers(), family.vision_class if alone else family.model_class)
        model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        pixel_spec = family.preprocessing.read(name, _tower_config(config))
    missing = [key for key in report["missing_keys"] if ".head." not in key]
    if missing:
        raise UsageError(f"{name}: {len(missing)} weights are missing, for example {missing[0]}")
    return VisionEncoder(model if alone else model.vision_model, family, pixel_spec, name)


def vision_config(name: str) -> Any:
    """Read transformers' configuration of the model that a vision tower is taken from; refuse unknown families."""
    if name in MAKERS:
        return loading.model_config(name)
    run = Run(Path(name))
    if run.started:
        return loading.tuned_config(run)
    if is_pair(name):
        return vision_config(PairParts.read(Path(name)).vision)
    if not run.folder.exists() and run.folder.parent.name == "runs":
        run.config()  # Raises, and lists the runs that exist.
    refuse_unknown(name, tuple(MAKERS), "google/siglip-base-patch16-224")
    config = read_config(name)
    vision_family(config.model_type, name)
    return config


def vision_encoder_on_meta(config: Any) -> VisionEncoder:
    """Return the tower of a configuration on the meta device: shapes and counts, without a byte of weights."""
    family, tower = vision_family(config.model_type), _tower_config(config)
    with torch.device("meta"):
        vision = getattr(quiet_transformers(), family.vision_class)(tower)
    return VisionEncoder(vision, family, PixelSpec(family.preprocessing.image_size(tower)), "meta")


def _from_dual_encoder(encoder: DualEncoder, source: str) -> VisionEncoder:
    return VisionEncoder(encoder.model.vision_model, encoder.family, encoder.pixel_spec, source)


def _tower_config(config: Any) -> Any:
    return getattr(config, "vision_config", config)
