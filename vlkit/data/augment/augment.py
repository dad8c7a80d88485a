"""augment: more images, text variants and negatives for the training rows of a prepared folder.

New rows follow the old ones, which stay as they are. The rows of an earlier augmentation are removed first: running it
twice changes nothing, and asking for no rows at all undoes it. Validation and test rows stay as they are; they are read
so that no text variant equals one of theirs and no negative matches by them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, NamedTuple

from vlkit import console
from vlkit.config.base import yaml_text
from vlkit.config.data import AugmentConfig
from vlkit.data import captions, pairs, splits
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.augment.negatives import EmbedTexts, NegativeSampler
from vlkit.data.augment.render import RenderJob, WrittenImage, encode_image, render_images
from vlkit.data.augment.text_variants import TextVariants
from vlkit.data.pairs import AUGMENTED_FOLDER, COPIED_IMAGE, NEGATIVES_VIEW, PREVIEW_FILE, Pairs, read_pairs
from vlkit.errors import DataError, ResourceError, UsageError
from vlkit.remote import MANIFEST, ZONE_TABLES, Remote, local_folder, tables_location
from vlkit.storage import Location, atomic_file, atomic_update, refuse_unwritable

if TYPE_CHECKING:
    import pandas as pd

ROW_KINDS = ("augmented images", "augmented texts", "negatives")
REPLACED_FILES = ("pairs.parquet", "data.yaml", AUGMENTED_FOLDER, NEGATIVES_VIEW)
WORD_LISTS = ("synonyms", "prefixes", "suffixes", "leading", "compounds")
ESTIMATE_SAMPLES = 12  # images that are drawn to estimate the size of all
MAX_DISK_SHARE = 0.95


class ImageVariant(NamedTuple):
    """An image as an epoch of training would see it."""

    image_id: str
    epoch: int


def augment(
    config: AugmentConfig, *, dry_run: bool = False, embed_of: Callable[[str], EmbedTexts] | None = None
) -> dict[str, Any]:
    """Run `vlkit augment`.

    Args:
        embed_of: model or run -> function that embeds texts; needed for --hard alone.

    Returns:
        Counts of the new rows and of everything left out, as --json prints them.

    Raises:
        DataError: the folder has no training rows, or an image is gone.
        ResourceError: the images would not fit on the disk.
    """
    work = Augmentation(config)
    if config.preview is not None:
        return _write_preview(work, config.preview, None if dry_run else _embedder(config, embed_of), dry_run=dry_run)
    variants = work.image_variants()
    disk_gb, embed = _estimate_disk_gb(variants, work), _embedder(config, embed_of)
    if dry_run:
        return _print_summary(work.count_rows(variants, embed), work, disk_gb, dry_run=True)
    if work.data.is_remote:
        counts = _write_remote(work, variants, embed)
    else:
        with atomic_update(work.data.path, without=REPLACED_FILES) as folder:
            counts = _write(folder, folder / AUGMENTED_FOLDER, work, variants, embed)
    return _print_summary(counts, work, disk_gb)


def _embedder(config: AugmentConfig, embed_of: Callable[[str], EmbedTexts] | None) -> EmbedTexts | None:
    if config.hard is None or config.negatives_per_positive == 0:
        return None
    assert embed_of is not None, "--hard needs a model"
    return embed_of(config.hard)


class Augmentation:
    """The rows of a prepared folder, and the rows that are added to them.

    Attributes:
        prepared: the folder as it is, rows of an earlier augmentation included.
        old: its rows without those.
        training: the matching rows of the training split.
        short_rows: how many rows got fewer negatives than asked for; see `NegativeSampler`.
        positive_rows: how many rows got negatives, new ones included.
    """

    def __init__(self, config: AugmentConfig) -> None:
        assert config.data is not None, "the command line has chosen a folder"
        self.config, self.data = config, config.data
        self.prepared = _read_prepared(self.data)
        self.old = _without_earlier_rows(self.prepared)
        self.group = pairs.group_name(self.old, self.prepared.metadata.get("settings", {}).get("group_column"))
        self.matching = self.old[self.old["match"] == 1]
        self.training = self.matching[self.matching["split"] == "train"].reset_index(drop=True)
        if not len(self.training):
            raise DataError(f"{self.data} has no training rows", hint="prep with smaller --test-share and --val-share")
        held_out = self.old.loc[self.old["split"] != "train", "text"]
        self.augmenter = ImageAugmenter.from_settings(config)
        self.text_variants = TextVariants(self.matching, config, held_out)
        self.short_rows = self.positive_rows = 0

    def image_paths(self, rows: pd.DataFrame) -> list[Path]:
        """Return the paths of these rows' images; remote ones are fetched."""
        return self.prepared.with_rows(rows).image_paths(rows)

    def image_variants(self) -> list[ImageVariant]:
        """Return the images to draw: epoch 0, 1, ... of each, without epochs that leave the image as it is."""
        epochs = range(self.config.pictures)
        ids = self.training["image_id"].unique().tolist()
        return [
            ImageVariant(image_id, epoch)
            for image_id in ids
            for epoch in epochs
            if self.augmenter.chosen_operations(epoch, image_id)
        ]

    def render_jobs(self, variants: Sequence[ImageVariant]) -> list[RenderJob]:
        """Return the images to draw with the files to draw from; remote ones are fetched."""
        unique = self.training.drop_duplicates("image_id")
        unique = unique[unique["image_id"].isin({image_id for image_id, _ in variants})]
        path_of = dict(zip(unique["image_id"], self.image_paths(unique), strict=True))
        return [RenderJob(path_of[image_id], image_id, epoch) for image_id, epoch in variants]

    def new_rows(
        self, written: Mapping[ImageVariant, WrittenImage], embed: EmbedTexts | None
    ) -> dict[str, pd.DataFrame]:
        """Return the new rows by kind, in the order of ROW_KINDS.

        Args:
            written: the image that was written for each variant.
        """
        import pandas as pd

        known = set(self.old["pair_id"])
        new = [_drop_known(self._image_rows(written), known), _drop_known(self._text_rows(), known)]
        positives = pd.concat([self.training.assign(source_pair_id=None), *new], ignore_index=True)
        new.append(_drop_known(self._negative_rows(positives, embed), known))
        return dict(zip(ROW_KINDS, new, strict=True))

    def count_rows(self, variants: Sequence[ImageVariant], embed: EmbedTexts | None) -> dict[str, int]:
        """Count the new rows of each kind without drawing an image, as if no two drawn images were equal."""
        placeholders = {
            variant: WrittenImage(name="", image_id="-".join(map(str, variant)), width=0, height=0)
            for variant in variants
        }
        return {kind: len(rows) for kind, rows in self.new_rows(placeholders, embed).items()}

    def _image_rows(self, written: Mapping[ImageVariant, WrittenImage]) -> pd.DataFrame:
        """Return every training row with each variant of its image."""
        chosen = [
            (row, written[ImageVariant(image_id, epoch)])
            for row, image_id in enumerate(self.training["image_id"])
            for epoch in range(self.config.pictures)
            if (image_id, epoch) in written
        ]
        names = [f"{AUGMENTED_FOLDER}/{image.name}" for _, image in chosen]
        changed: dict[str, list[Any]] = {
            "image": names,
            "image_id": [image.image_id for _, image in chosen],
            "image_key": names,
            "width": [image.width for _, image in chosen],
            "height": [image.height for _, image in chosen],
            "image_looks": [""] * len(chosen),  # Not compared: it looks like its original on purpose.
        }
        return self._copy_rows([row for row, _ in chosen], "augmented", changed)

    def _text_rows(self) -> pd.DataFrame:
        """Return every training row with variants of its text."""
        keys = zip(self.training["pair_id"], self.training["text_id"], strict=True)
        chosen = [(row, text) for row, key in enumerate(keys) for text in self.text_variants.for_pair(*key)]
        texts = [text for _, text in chosen]
        changed = {"text": texts, "text_id": [captions.text_id(text) for text in texts]}
        return self._copy_rows([row for row, _ in chosen], "augmented", changed)

    def negative_sampler(self, positives: pd.DataFrame, embed: EmbedTexts | None) -> NegativeSampler:
        """Return the sampler of negatives for these training rows."""
        import pandas as pd

        rows = pd.concat([self.matching[self.matching["split"] != "train"], positives], ignore_index=True)
        return NegativeSampler(rows, self.text_variants.folded, self.config.seed, embed)

    def _negative_rows(self, positives: pd.DataFrame, embed: EmbedTexts | None) -> pd.DataFrame:
        """Return the image of every positive row with texts that do not match it."""
        count, sampler = self.config.negatives_per_positive, self.negative_sampler(positives, embed)
        text_of = dict(zip(self.training["pair_id"], self.training["text_id"], strict=True))
        originals = positives["source_pair_id"].where(positives["source_pair_id"].notna(), positives["pair_id"])
        keys = zip(positives["pair_id"], positives["image_id"], originals, strict=True)
        chosen = [
            (row, negative)
            for row, (pair_id, image_id, original) in enumerate(keys)
            for negative in sampler.choose(pair_id, image_id, text_of[original], count)
        ]
        self.short_rows, self.positive_rows = sampler.short_rows, len(positives)
        first = self.training.drop_duplicates("text_id")
        group_of = dict(zip(first["text_id"], first["text_group"], strict=True))
        changed: dict[str, list[Any]] = {
            "text": [negative.text for _, negative in chosen],
            "text_id": [negative.text_id for _, negative in chosen],
            "text_group": [group_of[negative.text_id] for _, negative in chosen],
            "match": [0] * len(chosen),
        }
        return self._copy_rows([row for row, _ in chosen], "negative", changed, positives)

    def _copy_rows(
        self, rows: list[int], origin: str, changed: Mapping[str, list[Any]], source: pd.DataFrame | None = None
    ) -> pd.DataFrame:
        """Copy rows, change some columns, and give each copy its own id and the id of its source."""
        source = self.training if source is None else source
        copies = source.iloc[rows].reset_index(drop=True)
        copies["source_pair_id"] = copies["pair_id"]
        for name, values in changed.items():
            if name in copies:
                copies[name] = values
        copies["origin"] = origin
        identifying = ("image_id", "text_id", "image_group", "text_group", "unit")
        keys = zip(*(copies[name] for name in identifying), strict=True)
        copies["pair_id"] = [pairs.pair_id(*key) for key in keys]
        return copies


def _drop_known(rows: pd.DataFrame, known: set[str]) -> pd.DataFrame:
    """Return the rows whose pair id is not in `known`, and add their ids to it."""
    is_new = []
    for pair_id in rows["pair_id"]:
        is_new.append(pair_id not in known)
        known.add(pair_id)
    return rows[is_new].reset_index(drop=True)


def _read_prepared(data: Location) -> Pairs:
    """Read a prepared folder; a plain table of pairs has no room for new images and rows.

    Raises:
        UsageError: there is none, it cannot be written, or it holds somebody else's files under augment's names.
    """
    if data.is_remote:
        names = [name for name in Remote(data).listing() if name.startswith(f"{AUGMENTED_FOLDER}/")]
        return _refuse_foreign_files(read_pairs(data), data, names)
    if not data.path.exists():
        return read_pairs(data)
    if not (data.path / "pairs.parquet").is_file():
        message = f"{data} holds no pairs.parquet: augment adds to a folder that prep wrote"
        raise UsageError(message, hint="turn a raw folder into one: vlkit prep --source RAW --out data/NAME")
    refuse_unwritable(data.path.resolve().parent, "--data")
    prepared = read_pairs(data)
    names = [path.relative_to(data.path).as_posix() for path in sorted((data.path / AUGMENTED_FOLDER).rglob("*"))]
    if (data.path / NEGATIVES_VIEW).exists() and not prepared.metadata.get("augmentation"):
        names.append(NEGATIVES_VIEW)
    return _refuse_foreign_files(prepared, data, names)


def _refuse_foreign_files(prepared: Pairs, data: Location, names: list[str]) -> Pairs:
    """Return the folder; refuse it where files that augment did not write have names that augment replaces."""
    if foreign := [name for name in names if not COPIED_IMAGE.fullmatch(name)]:
        message = f"{data / foreign[0]} was not written by augment, which would replace it"
        raise UsageError(message, hint="move it out of the way")
    return prepared


def _without_earlier_rows(prepared: Pairs) -> pd.DataFrame:
    """Return the rows of a prepared folder without those that an earlier augmentation added."""
    frame = prepared.frame
    if prepared.metadata.get("augmentation"):
        added = frame["origin"].isin(["augmented", "negative"]) & frame["source_pair_id"].notna()
        frame = frame[~added].drop(columns="source_pair_id")
    return frame.reset_index(drop=True)


def _estimate_disk_gb(variants: Sequence[ImageVariant], work: Augmentation) -> float:
    """Estimate the gigabytes of all images from a few of them.

    Raises:
        ResourceError: they would not fit.
    """
    config = work.config
    order = sorted(variants, key=lambda variant: splits.hash_order(config.seed, f"{variant.image_id} {variant.epoch}"))
    samples = order[:ESTIMATE_SAMPLES]
    if not samples:
        return 0.0
    sizes = [len(encode_image(job, work.augmenter, config.format)[0]) for job in work.render_jobs(samples)]
    needed = len(variants) * sum(sizes) / len(sizes)
    folder = Path(tempfile.gettempdir()) if work.data.is_remote else work.data.path
    free = shutil.disk_usage(folder).free
    if needed > MAX_DISK_SHARE * free:
        message = (
            f"{len(variants)} images need about {needed / 2**30:.1f} GB, {free / 2**30:.1f} GB are free under {folder}"
        )
        raise ResourceError(message, hint="a smaller --pictures or --max-side, or train-retrieval --augment")
    return needed / 2**30


def _write(
    folder: Path, image_folder: Path, work: Augmentation, variants: Sequence[ImageVariant], embed: EmbedTexts | None
) -> dict[str, int]:
    """Write the new tables into `folder` and the images into `image_folder`; return how many rows each kind has."""
    import pandas as pd

    config, jobs = work.config, work.render_jobs(variants)
    written: dict[ImageVariant, WrittenImage] = {}
    if jobs:
        image_folder.mkdir()
    with console.progress("drawing images", len(jobs)) as bar:
        images = render_images(jobs, work.augmenter, image_folder, image_format=config.format, workers=config.workers)
        for job, image in images:
            written[ImageVariant(job.image_id, job.epoch)] = image
            bar.update(len(written))
    rows = work.new_rows(written, embed)
    added = [frame for frame in rows.values() if len(frame)]
    old = work.old.assign(source_pair_id=None) if added else work.old
    frame = pairs.validate_rows(pd.concat([old, *added], ignore_index=True), str(work.data))
    splits.refuse_leaks(frame, str(work.data))
    frame.to_parquet(folder / "pairs.parquet", index=False)
    counts = {kind: len(new) for kind, new in rows.items()}
    metadata = {key: value for key, value in work.prepared.metadata.items() if key != "augmentation"}
    if added:
        training = pairs.view(frame[frame["split"] == "train"], work.group, label=True)
        training.to_csv(folder / NEGATIVES_VIEW, index=False)
        metadata["augmentation"] = {
            "rows": counts,
            "left_out": dict(work.text_variants.dropped),
            "fingerprint": pairs.fingerprint(pd.concat(added, ignore_index=True)),
            "settings": {
                key: value for key, value in config.to_dict().items() if key not in ("data", "preview", "workers")
            },
        }
    (folder / "data.yaml").write_text(yaml_text(metadata), encoding="utf-8")
    return counts


def _write_remote(work: Augmentation, variants: Sequence[ImageVariant], embed: EmbedTexts | None) -> dict[str, int]:
    """Write to a folder behind a URL: readers see the old rows and images until the new manifest is there."""
    with tempfile.TemporaryDirectory() as temporary:
        tables, image_folder = Path(temporary) / "tables", Path(temporary) / AUGMENTED_FOLDER
        tables.mkdir()
        counts = _write(tables, image_folder, work, variants, embed)
        mirrored = local_folder(work.data)
        old_tables = mirrored / ZONE_TABLES if work.data.is_bucket else mirrored
        files = {path.name: path for path in sorted(old_tables.iterdir()) if path.name not in REPLACED_FILES}
        files |= {path.name: path for path in sorted(tables.iterdir())}
        new = {f"{AUGMENTED_FOLDER}/{path.name}": path for path in sorted(image_folder.glob("*"))}
        images = Remote(work.data)
        images.upload(new)
        Remote(tables_location(work.data)).replace(files, MANIFEST)
        listing = images.listing()
        stale = [name for name in listing if name.startswith(f"{AUGMENTED_FOLDER}/") and name not in new]
        images.remove([name for name in stale if COPIED_IMAGE.fullmatch(name)])
    return counts


def _write_preview(work: Augmentation, count: int, embed: EmbedTexts | None, *, dry_run: bool) -> dict[str, Any]:
    """Write the preview of `count` images: into the prepared folder, or the working directory for one behind a URL."""
    from vlkit.data.augment.preview import choose_preview_rows, preview_cells, write_contact_sheet

    path = Path(PREVIEW_FILE) if work.data.is_remote else work.data.path / PREVIEW_FILE
    rows = choose_preview_rows(work.training, count, work.config.seed)
    result = {"data": str(work.data), "preview": str(path), "pictures": len(rows), "dry_run": dry_run}
    if dry_run:
        console.print_result(f"{path} would show {len(rows)} images with their variants")
        return result
    sampler = work.negative_sampler(work.training, embed)
    records = zip(rows.to_dict("records"), work.image_paths(rows), strict=True)
    cells = [
        list(preview_cells(row, image_path, work.config, work.augmenter, work.text_variants, sampler))
        for row, image_path in records
    ]
    with atomic_file(path) as temporary:
        write_contact_sheet(temporary, cells)
    console.print_result(f"{path}: {len(rows)} training images with their variants and negatives")
    return result


def _print_summary(
    counts: Mapping[str, int], work: Augmentation, disk_gb: float, *, dry_run: bool = False
) -> dict[str, Any]:
    """Print what was added and what was left out; return the same for --json."""
    config, dropped = work.config, dict(work.text_variants.dropped)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    console.print_result(f"{len(work.training)} training rows {'would get' if dry_run else 'and'} {kinds}: {work.data}")
    for reason, count in dropped.items():
        console.say(f"{count} text variants left out: {reason}")
    if config.texts and config.text_rules and not counts["augmented texts"]:
        lists = ", ".join(name for name in WORD_LISTS if getattr(config, name)) or "none"
        console.say(f"no rule changed any of these texts; word lists: {lists}")
    if work.short_rows:
        console.warn(
            f"{work.short_rows} of {work.positive_rows} rows, new ones included, got fewer negatives than "
            "--negatives-per-positive: every other text matches their images"
        )
    if dry_run:
        console.say(f"disk about {disk_gb:.2f} GB")
    elif any(counts.values()):
        console.hint(f"vlkit train-retrieval --data {quote(str(work.data))}")
    return {
        "data": str(work.data),
        "training_rows": len(work.training),
        "added": dict(counts),
        "left_out": dropped,
        "short_of_negatives": work.short_rows,
        "disk_gb": round(disk_gb, 4),
        "dry_run": dry_run,
        **({"settings": config.to_dict()} if dry_run else {}),
    }
