"""The model of an index: loaded as index.yaml says, and refused if it is another one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import torch

from vlkit.config.data import Decode
from vlkit.config.search import IndexConfig
from vlkit.data.captions import clean
from vlkit.data.images import decode
from vlkit.data.loading.stores import TokenStore
from vlkit.errors import ArtifactError, DataError, UsageError
from vlkit.inference.index.documents import MODALITIES
from vlkit.models.cache.feature_cache import weights_hash
from vlkit.models.device import Precision, autocast, best_device, best_precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.encode import encode_text_inputs
from vlkit.models.loading import load_base, load_model, load_tuned
from vlkit.models.stages import Modality
from vlkit.runs import Run
from vlkit.storage import json_text

if TYPE_CHECKING:
    from PIL import Image

# A tokenizer is identified by the tokens of these texts.
PROBES = (
    "A Photo of 2 plum tarts, No. 10; crème brûlée — isn't it? (3.5 € / #1)",
    "maize leaf with grey rectangular lesions",
    "قورمه‌سبزی با لوبیا و لیموی عمانی",
    "红烧肉 ブリ大根 Борщ",
)
QUERY_BATCH = 64


def model_reference(config: IndexConfig) -> dict[str, Any]:
    """Return the model that a command names, as index.yaml stores it."""
    if config.run is not None:
        return {"name": config.run.resolve().name, "run": str(config.run.resolve()), "untouched": config.untouched}
    assert config.model is not None
    folder = Path(config.model)
    return {"name": str(folder.resolve()) if folder.exists() else config.model, "run": None, "untouched": False}


def image_decode(about: dict[str, Any]) -> Decode:
    """Return how the images of an index were decoded; query images are decoded alike."""
    return cast(Decode, about["preprocessing"]["images"].get("decode", "exact"))


def load_encoder(reference: dict[str, Any], moved_to: str | None = None, decode: Decode | None = None) -> DualEncoder:
    """Load the model that index.yaml names.

    Args:
        moved_to: where the run or the model is now, if it was moved.
        decode: see `load_model`.

    Raises:
        ArtifactError: it is gone, or its training is not finished.
    """
    if reference["run"] is None:
        try:
            return load_model(moved_to or reference["name"], decode)
        except UsageError as error:
            hint = "give a run's folder, a model's folder, or a hub name such as openai/clip-vit-base-patch32"
            raise UsageError(error.message, hint=hint) from None
    run = Run(Path(moved_to or reference["run"]))
    if not run.started:
        if moved_to is not None:
            return load_model(moved_to, decode)
        message = f"no such run: {run.folder}; the index was built with its model"
        raise ArtifactError(message, hint="if the run was moved, give its new folder: --model RUN")
    return load_base(run, decode) if reference["untouched"] else load_tuned(run, decode)


@dataclass
class QueryEncoder:
    """A dual encoder that turns queries into unit vectors.

    Attributes:
        persian: clean texts as those of a Persian docstore.
    """

    encoder: DualEncoder
    precision: Precision
    persian: bool = False
    _checked: set[Modality] = field(default_factory=set)

    @classmethod
    def from_encoder(cls, encoder: DualEncoder, precision: Precision | None, *, persian: bool) -> QueryEncoder:
        """Move the encoder to the best device; without a precision, take the best one there."""
        encoder.to(best_device()).eval().requires_grad_(False)
        count = sum(p.numel() for p in encoder.model.parameters())
        return cls(encoder, precision or best_precision(encoder.device, count), persian)

    def identity(self) -> dict[str, Any]:
        """Return what index.yaml stores of the model: hashes of both towers, and the preprocessing."""
        return {
            "weights": {modality: weights_hash(self.encoder.chain(modality)) for modality in MODALITIES},
            "preprocessing": {"images": self.encoder.pixel_spec.identity(), "texts": self._text_settings()},
        }

    def _text_settings(self) -> dict[str, Any]:
        tokens = json_text(self.encoder.tokenize(PROBES)[0])
        return {
            "limit": self.encoder.text_limit,
            "pad": self.encoder.pad_id,
            "pooling": self.encoder.text_pooling,
            "tokens": hashlib.sha256(tokens.encode()).hexdigest()[:20],
        }

    def check_index(self, about: dict[str, Any], modality: Modality) -> None:
        """Check, once per modality, that queries are embedded as the index was.

        Raises:
            ArtifactError: the weights or the preprocessing differ.
        """
        if modality in self._checked:
            return
        own = self.encoder.pixel_spec.identity() if modality == "images" else self._text_settings()
        stored = about.get("preprocessing", {}).get(modality, {})
        same = all(_as_yaml(stored.get(name)) == _as_yaml(own.get(name)) for name in {**own, **stored})
        if not same or about.get("weights", {}).get(modality) != weights_hash(self.encoder.chain(modality)):
            difference = "weights" if same else "preprocessing"
            message = f"the index was built with another model: {self.encoder.source} has other {difference}"
            raise ArtifactError(
                message, hint="build it again with vlkit index, or name the model that built it with --model"
            )
        self._checked.add(modality)

    def clean(self, text: str) -> str:
        """Clean a text as prep cleaned the docstore's."""
        return clean(text, persian=self.persian)

    def embed_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, list[bool]]:
        """Return float32 unit rows [texts, width], and for each text whether it was cut at the model's limit."""
        tokens, cut = [], []
        for text in texts:
            (ids,), over = self.encoder.tokenize([text])
            tokens.append(ids)
            cut.append(over > 0)
        rows = encode_text_inputs(
            self.encoder, TokenStore(tokens, self.encoder.pad), batch_size=QUERY_BATCH, precision=self.precision
        )
        return rows.float().cpu().numpy(), cut

    def load_pixels(self, file: Path | IO[bytes], max_pixels: int | None = None) -> np.ndarray:
        """Decode an image as the model sees it: uint8 [3, size, size]; see `decode.decode_pixels`."""
        return decode.decode_pixels(file, self.encoder.pixel_spec, max_pixels)

    def image_pixels(self, image: Path | Image.Image) -> np.ndarray:
        """Return the same for a path, named in errors, or an image of Pillow."""
        spec = self.encoder.pixel_spec
        if not isinstance(image, Path):
            return decode.image_pixels(image, spec)
        try:
            return decode.load_pixels(image, spec)
        except DataError as error:
            # Its hint belongs to the rows of a prepared folder.
            raise DataError(error.message) from None

    @torch.inference_mode()
    def embed_images(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 unit rows [images, width] of what `load_pixels` returned."""
        batches = []
        for start in range(0, len(pixels), QUERY_BATCH):
            with autocast(self.encoder.device, self.precision):
                rows = self.encoder.embed_images(torch.from_numpy(np.stack(list(pixels[start : start + QUERY_BATCH]))))
            batches.append(rows.float().cpu().numpy())
        return np.concatenate(batches)


def _as_yaml(value: Any) -> Any:
    """Return a value as YAML reads it back: tuples become lists."""
    return list(value) if isinstance(value, tuple) else value
