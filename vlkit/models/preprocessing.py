"""How a model wants its images: read from, and written to, the files that transformers' image processors read."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vlkit.config.data import Decode
from vlkit.data.images.spec import RESAMPLING, PixelSpec
from vlkit.errors import ArtifactError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class HasPixelSpec(Protocol):
    """A model of images."""

    pixel_spec: PixelSpec


M = TypeVar("M", bound=HasPixelSpec)


def with_decode(model: M, decode: Decode | None) -> M:
    """Return the model, its images decoded in this way from now on; None: as they are now."""
    if decode is not None:
        model.pixel_spec = replace(model.pixel_spec, decode=decode)
    return model


class Preprocessing(Protocol):
    """How a family prepares images."""

    def image_size(self, vision_config: Any) -> int:
        """Return the side of the square that a vision tower takes."""

    def read(self, name: str, vision_config: Any) -> PixelSpec:
        """Read the preprocessing of a model, by hub name or folder."""


@dataclass(frozen=True)
class FixedSize:
    """Images of one size, as a family was published with: what its models' files do not say.

    Attributes:
        crop: cut the middle out of the image, its shorter side resized; else squash it to a square.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: bool

    def image_size(self, vision_config: Any) -> int:
        """Return the side of the square that a vision tower takes."""
        return int(vision_config.image_size)

    def read(self, name: str, vision_config: Any) -> PixelSpec:
        """Read the preprocessing of a model, by hub name or folder.

        Raises:
            ArtifactError: it makes images of another size than the model takes.
        """
        processor, target = image_processor(name), self.image_size(vision_config)
        size, crop_size = processor.get("size"), processor.get("crop_size")
        crops = processor.get("do_center_crop", self.crop)
        short = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
        result = (crop_size.get("height") if isinstance(crop_size, dict) else crop_size) if crops else short
        if result not in (None, target):
            raise ArtifactError(
                f"{name}: its preprocessing makes images of {result} pixels, its config.json expects {target}"
            )
        return PixelSpec(
            size=target,
            fit="crop" if crops else "squash",
            resize=(short or target) if crops else None,
            resample=processor.get("resample", RESAMPLING["bicubic"]),
            mean=tuple(processor.get("image_mean") or self.mean),
            std=tuple(processor.get("image_std") or self.std),
        )


class NaFlex:
    """Square images of as many patches as a SigLIP 2 of flexible resolution takes, or a few less."""

    def image_size(self, vision_config: Any) -> int:
        """Return the side of the square that a vision tower takes."""
        return _square(vision_config.num_patches, vision_config.patch_size)

    def read(self, name: str, vision_config: Any) -> PixelSpec:
        """Read the preprocessing of a model, by hub name or folder."""
        processor = image_processor(name)
        patches = processor.get("max_num_patches") or vision_config.num_patches
        resample = processor.get("resample", RESAMPLING["bilinear"])
        return PixelSpec(_square(patches, vision_config.patch_size), resample=resample)


def _square(patches: int, patch_size: int) -> int:
    """Return the side of the square image that has this many patches, or the next smaller one's."""
    return int(patches**0.5) * patch_size


def image_processor(name: str) -> dict[str, Any]:
    """Read a preprocessing's settings, from the file that older versions of transformers write or the newer ones'."""
    from transformers.utils import cached_file

    for file, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            if section is None:
                return settings
            if section in settings:
                return dict(settings[section])
    return {}


def processor_dict(spec: PixelSpec) -> dict[str, Any]:
    """Return a preprocessing's settings as transformers' image processors read them."""
    crops = spec.fit == "crop"
    square = {"height": spec.size, "width": spec.size}
    return {
        "image_processor_type": "CLIPImageProcessor" if crops else "SiglipImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": spec.resize} if crops else square,
        **({"do_center_crop": True, "crop_size": square} if crops else {}),
        "resample": int(spec.resample),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "do_convert_rgb": True,
    }
