"""The model of an index: opened by what index.yaml says, and refused where it is another one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from vlkit.config.data import Decode
from vlkit.config.search import IndexConfig
from vlkit.data.captions import clean
from vlkit.data.images import decode
from vlkit.data.loading.retrieval_batches import TokenStore
from vlkit.errors import ArtifactError, UsageError
from vlkit.inference.index.documents import Modality
from vlkit.models.cache.feature_cache import Modality as TowerKind
from vlkit.models.cache.feature_cache import weights_hash
from vlkit.models.device import Precision, autocast, best_device, best_precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.encode import encode_captions
from vlkit.models.loading import load_model, load_tuned, load_base
from vlkit.runs import Run
from vlkit.storage import json_text

# A tokenizer is known by what it makes of these.
PROBES = (
    "A Photo of 2 plum tarts, No. 10; crème brûlée — isn't it? (3.5 € / #1)",
    "maize leaf with grey rectangular lesions",
    "قورمه‌سبزی با لوبیا و لیموی عمانی",
    "红烧肉 ブリ大根 Борщ",
)
# Queries that are encoded at once.
TOGETHER = 64
TOWERS: dict[Modality, TowerKind] = {"texts": "texts", "images": "pictures"}


def named(config: IndexConfig) -> dict[str, Any]:
    """Which model a command asks for, as index.yaml says it."""
    if config.run is not None:
        return {"name": config.run.resolve().name, "run": str(config.run.resolve()), "untouched": config.untouched}
    assert config.model is not None
    folder = Path(config.model)
    return {"name": str(folder.resolve()) if folder.exists() else config.model, "run": None, "untouched": False}


def decode_of(about: dict[str, Any]) -> Decode:
    """How the pictures of an index were read, and those that it is asked with are."""
    return about["preprocessing"]["images"].get("decode", "exact")


def open_towers(said: dict[str, Any], elsewhere: str | None = None, decode: Decode | None = None) -> DualEncoder:
    """The model that index.yaml names.

    Args:
        elsewhere: the run, or the model, where it lies now.
        decode: see `load_model`.

    Raises:
        ArtifactError: it is gone, or not trained to its end.
    """
    if said["run"] is None:
        try:
            return load_model(elsewhere or said["name"], decode)
        except UsageError as error:
            hint = "a run's folder, a model's, or a hub name such as openai/clip-vit-base-patch32"
            raise UsageError(error.message, hint=hint) from None
    run = Run(Path(elsewhere or said["run"]))
    if not run.started:
        if elsewhere is not None:
            return load_model(elsewhere, decode)
        told = f"the index was made with the run {run.folder}, which is not there"
        raise ArtifactError(told, hint="--model RUN says where it lies now")
    return load_base(run, decode) if said["untouched"] else load_tuned(run, decode)


@dataclass
class QueryEncoder:
    """Queries -> unit vectors.

    Attributes:
        persian: texts are cleaned as those of a Persian docstore were.
    """

    encoder: DualEncoder
    precision: Precision
    persian: bool = False
    _agreed: set[Modality] = field(default_factory=set)

    @classmethod
    def of(cls, encoder: DualEncoder, precision: Precision | None, *, persian: bool) -> QueryEncoder:
        """On the best device, in the precision that it is best at unless told otherwise."""
        encoder.to(best_device()).eval().requires_grad_(False)
        count = sum(p.numel() for p in encoder.model.parameters())
        return cls(encoder, precision or best_precision(encoder.device, count), persian)

    def identity(self) -> dict[str, Any]:
        """What an index says of it: hashes of both towers, and the preprocessing."""
        return {
            "weights": {kind: weights_hash(self.encoder, tower) for kind, tower in TOWERS.items()},
            "preprocessing": {"images": self.encoder.pixel_spec.identity(), "texts": self._text_settings()},
        }

    def _text_settings(self) -> dict[str, Any]:
        pooling = getattr(self.encoder.model.config, "pooling", None)
        tokens = json_text(self.encoder.tokenize(PROBES)[0])
        return {
            "limit": self.encoder.text_limit,
            "pad": self.encoder.pad_id,
            "pooling": pooling,
            "tokens": hashlib.sha256(tokens.encode()).hexdigest()[:20],
        }

    def agree(self, about: dict[str, Any], kind: Modality) -> None:
        """Check, once, that queries of this kind are embedded as the index was.

        Raises:
            ArtifactError: by other weights, or another preprocessing.
        """
        if kind in self._agreed:
            return
        own = self.encoder.pixel_spec.identity() if kind == "images" else self._text_settings()
        stated = about.get("preprocessing", {}).get(kind, {})
        same = all(_plain(stated.get(name)) == _plain(own.get(name)) for name in {**own, **stated})
        if not same or about.get("weights", {}).get(kind) != weights_hash(self.encoder, TOWERS[kind]):
            what = "weights" if same else "preprocessing"
            told = f"the index was made with another model: {self.encoder.source} has other {what}"
            raise ArtifactError(told, hint="build it again: vlkit index; or name the model that made it: --model")
        self._agreed.add(kind)

    def clean(self, text: str) -> str:
        """As prep cleaned the docstore's texts."""
        return clean(text, persian=self.persian)

    def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, list[bool]]:
        """float32 unit rows [texts, width]; and of each whether it was longer than the model's limit, and was cut."""
        tokens, cut = [], []
        for text in texts:
            (ids,), over = self.encoder.tokenize([text])
            tokens.append(ids)
            cut.append(over > 0)
        captions = TokenStore(tokens, self.encoder.pad)
        rows = encode_captions(self.encoder, captions, batch_size=TOGETHER, precision=self.precision)
        return rows.float().cpu().numpy(), cut

    def pixels(self, file: Path | IO[bytes], most_pixels: int | None = None) -> np.ndarray:
        """A picture as the model sees it, and saw those of the index: see `images.seen`."""
        return decode.decode_pixels(file, self.encoder.pixel_spec, most_pixels)

    @torch.inference_mode()
    def pictures(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """The same of pictures that `load_pixels` has made."""
        made = []
        for start in range(0, len(pixels), TOGETHER):
            with autocast(self.encoder.device, self.precision):
                rows = self.encoder.embed_images(torch.from_numpy(np.stack(list(pixels[start : start + TOGETHER]))))
            made.append(rows.float().cpu().numpy())
        return np.concatenate(made)


def _plain(value: Any) -> Any:
    """As YAML gives it back."""
    return list(value) if isinstance(value, tuple) else value
