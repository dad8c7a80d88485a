"""How a model wants its pictures: from and to the files that transformers' image processors read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vlkit.config.data import Decode
from vlkit.data.images.decode import RESAMPLING, PixelSpec
from vlkit.errors import ArtifactError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Sees(Protocol):
    """A model of pictures."""

    pixel_spec: PixelSpec


M = TypeVar("M", bound=Sees)


def with_decode(model: M, decode: Decode | None) -> M:
    """The model, its pictures read in this way from now on; None: as they are now."""
    if decode is not None:
        model.pixel_spec = replace(model.pixel_spec, decode=decode)
    return model


def read(name: str, config: Any) -> PixelSpec:
    """A model's preprocessing; what its files do not say is what its family was published with.

    Args:
        name: hub name or folder.
        config: its configuration, for the family and the size.

    Raises:
        ArtifactError: it makes pictures of another size than the model takes.
    """
    return _pixel_spec(image_processor(name), config, name)


def image_processor(name: str) -> dict[str, Any]:
    """The preprocessing's settings, from the file that older versions of transformers write or the newer ones'."""
    from transformers.utils import cached_file

    for file, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            settings = json.loads(Path(found).read_text(encoding="utf-8"))
            if section is None or section in settings:
                return settings if section is None else settings[section]
    return {}


def _pixel_spec(processor: dict[str, Any], config: Any, name: str) -> PixelSpec:
    """The settings as a PixelSpec. What they do not say is what the family was published with."""
    size, crop = processor.get("size"), processor.get("crop_size")
    target = config.vision_config.image_size
    crops = processor.get("do_center_crop", config.model_type == "clip")
    published = (CLIP_MEAN, CLIP_STD) if config.model_type == "clip" else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    short = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
    wanted = (crop.get("height") if isinstance(crop, dict) else crop) if crops else short
    if wanted not in (None, target):
        told = f"its preprocessing makes pictures of {wanted} pixels, its config.json wants {target}"
        raise ArtifactError(f"{name}: {told}")
    return PixelSpec(
        size=target,
        fit="crop" if crops else "squash",
        resize=(short or target) if crops else None,
        resample=processor.get("resample", RESAMPLING["bicubic"]),
        mean=tuple(processor.get("image_mean") or published[0]),
        std=tuple(processor.get("image_std") or published[1]),
    )


def processor_dict(spec: PixelSpec) -> dict[str, Any]:
    """The inverse: what transformers' image processors read."""
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
