"""The rows a run trains on and validates with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlkit import console
from vlkit.config.base import require_resolved
from vlkit.config.fusion import TrainFusionConfig
from vlkit.config.presets import resolve_prep
from vlkit.config.training import TrainingConfig, TrainRetrievalConfig
from vlkit.data.pairs import TABLE_FILES, Pairs, read_pairs
from vlkit.data.prep.prepare import prepare
from vlkit.errors import DataError, UsageError
from vlkit.evaluation.captioning.image_reliance import one_caption_per_image
from vlkit.evaluation.retrieval.retention import read_guard_rows
from vlkit.storage import Location

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RetrievalRows:
    """Pairs for train-retrieval.

    Attributes:
        pairs: the whole prepared folder.
        negatives: rows that do not match, whose texts are contrasted with the images of `train`; None without any.
    """

    pairs: Pairs
    train: Pairs
    val: Pairs
    negatives: pd.DataFrame | None = None

    @classmethod
    def read(cls, config: TrainRetrievalConfig) -> RetrievalRows:
        """Read the training and validation rows of a prepared folder; test rows are not used.

        Raises:
            UsageError: a setting needs validation rows, and there are none.
            DataError: there are fewer than two training pairs, or --guard cannot be read.
        """
        pairs = read_pairs(require_resolved(config.data))
        matching = pairs.positives()
        train, val = (matching.split(split, limit=config.limit, seed=config.seed) for split in ("train", "val"))
        _check_patience(config, val)
        if config.interpolate and not len(val):
            raise UsageError("--interpolate chooses by validation, and there are no validation rows")
        if config.guard is not None:
            read_guard_rows(config.guard)  # Fails now rather than after training.
        if len(train) < 2:
            raise DataError(f"{pairs.folder}: {len(train)} training pairs; contrastive training needs at least 2")
        return cls(pairs, train, val, _negatives_of(pairs, train) if config.negatives else None)

    def to_dict(self) -> dict[str, Any]:
        """Return what environment.yaml records of the data."""
        path, fingerprint = str(self.pairs.folder.absolute), self.pairs.fingerprint
        augmentation = self.pairs.metadata.get("augmentation", {}).get("fingerprint")
        counts = {"train": len(self.train), "val": len(self.val), "negatives": self.negative_count}
        return {"path": path, "fingerprint": fingerprint, "augmentation": augmentation, **counts}

    @property
    def negative_count(self) -> int:
        """Number of rows that do not match."""
        return 0 if self.negatives is None else len(self.negatives)


@dataclass(frozen=True)
class CaptionRows:
    """Captions for train-fusion.

    Attributes:
        pairs: the whole prepared folder.
        val: one caption for each validation image; `val_all` has all of them.
        empty: training and validation captions without a word, which are left out.
    """

    pairs: Pairs
    train: Pairs
    val: Pairs
    val_all: Pairs
    empty: int

    @classmethod
    def read(cls, config: TrainFusionConfig) -> CaptionRows:
        """Read the training and validation rows of a prepared folder; test rows are not used.

        Raises:
            DataError: there are no training rows, or an image is missing.
            UsageError: --patience without validation rows.
        """
        pairs = read_pairs(require_resolved(config.data))
        captioned, _ = pairs.positives().with_text()
        train = captioned.split("train", limit=config.limit, seed=config.seed)
        val_all = captioned.split("val", limit=config.limit, seed=config.seed)
        if not len(train):
            raise DataError(f"{pairs.folder}: there are no training pairs")
        _check_patience(config, val_all)
        val = one_caption_per_image(val_all, config.val_limit, config.seed)
        frame = pairs.frame
        used = frame[(frame["match"] == 1) & frame["split"].isin(("train", "val"))]
        _, empty = Pairs(used, pairs.folder, pairs.metadata).with_text()
        _check_images_exist(train, val_all)
        return cls(pairs, train, val, val_all, empty)

    def to_dict(self) -> dict[str, Any]:
        """Return what environment.yaml records of the data."""
        path, fingerprint = str(self.pairs.folder.absolute), self.pairs.fingerprint
        return {"path": path, "fingerprint": fingerprint, "train": len(self.train), "val": len(self.val_all)}


def prepare_raw_coco(data: Location, *, dry_run: bool) -> Location:
    """Return the prepared folder of --data: a raw COCO folder is prepared inside itself, once.

    Raises:
        UsageError: a dry run of a raw folder, which must not write.
    """
    if data.is_remote or not data.path.is_dir() or any((data.path / name).is_file() for name in TABLE_FILES):
        return data
    if not any(data.path.glob("annotations/captions_*.json")):
        return data
    prepared = data / "prepared"
    if not (prepared.path / "pairs.parquet").is_file():
        command = f"vlkit prep --domain coco --source {data} --out {prepared}"
        if dry_run:
            raise UsageError(f"{data} is a raw COCO folder, which a dry run does not prepare", hint=command)
        console.say(f"{data} is a raw COCO folder: {command}")
        prepare(resolve_prep({"domain": "coco", "source": data, "out": prepared}))
    return prepared


def _negatives_of(pairs: Pairs, train: Pairs) -> pd.DataFrame | None:
    """Return the negative training rows of the images in `train`; None without any."""
    frame = pairs.frame
    negative = (frame["match"] == 0) & (frame["split"] == "train")
    rows = frame[negative & frame["image_id"].isin(set(train.frame["image_id"]))]
    return rows.reset_index(drop=True) if len(rows) else None


def _check_patience(config: TrainingConfig, val: Pairs) -> None:
    if config.patience is not None and not len(val):
        raise UsageError("--patience counts evaluations on validation, and there are no validation rows")


def _check_images_exist(*splits: Pairs) -> None:
    """Refuse rows whose images are missing, before a model is loaded; remote images are not checked.

    Raises:
        DataError: names the first missing image and counts the others.
    """
    for split in splits:
        locations = split.image_locations(split.unique_images())
        missing = [location for location in locations if not location.is_remote and not location.path.is_file()]
        if missing:
            others = f", and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise DataError(f"missing image: {missing[0]}{others}", hint="restore the images, or run prep again")
