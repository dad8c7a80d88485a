"""Prep: turn a raw folder into a prepared folder.

Read the rows of the layout, verify every image once, keep copies of an image in one unit, split by unit, write. The
prepared folder appears whole or not at all; rejects.csv lists what was left out, each with its reason.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from vlkit import console
from vlkit.config.base import read_yaml, yaml_text
from vlkit.config.data import PrepConfig
from vlkit.data import pairs, splits
from vlkit.data.images import phash
from vlkit.data.pairs import COPIED_IMAGE
from vlkit.data.prep import summary
from vlkit.data.prep.assign_splits import assign_splits
from vlkit.data.prep.collect import CollectedRows, collect
from vlkit.data.prep.raw_folder import RawRow, Reject
from vlkit.data.prep.summary import TokenCounter
from vlkit.errors import DataError, UsageError
from vlkit.remote import MANIFEST, VERSIONS, Remote, tables_location
from vlkit.storage import Location, atomic_folder, refuse_unwritable

if TYPE_CHECKING:
    import pandas as pd


# The names that prep writes. A folder that holds any other belongs to somebody else and is not replaced.
OUTPUT_NAMES = {
    "pairs.parquet",
    "docstore.parquet",
    "rejects.csv",
    "data.yaml",
    "images",
    pairs.PREVIEW_FILE,
    *(f"{split}_pairs_positive.csv" for split in splits.SPLITS),
}


class PairsTable(NamedTuple):
    """The pairs table, and what happened on the way to it.

    Attributes:
        frame: the validated table.
        rejects: everything that was left out, from the first file to the last row, each once.
        notes: what the split did otherwise than the user may expect.
    """

    frame: pd.DataFrame
    rejects: list[Reject]
    notes: list[str]


def prepare(
    config: PrepConfig, *, dry_run: bool = False, load_token_counter: Callable[[str], TokenCounter | None] | None = None
) -> dict[str, Any]:
    """Run `vlkit prep`.

    Args:
        load_token_counter: model name -> what counts tokens as that model does; None without a local tokenizer.

    Returns:
        Counts, warnings and the prepared folder, as --json prints them.

    Raises:
        DataError: the source is missing, empty, or gives no pair.
        UsageError: the output folder holds something else.
    """
    _refuse_overwriting_source(config)
    previous = _read_previous(config)
    collected = collect(config)
    table = build_table(collected, config)
    collected.release_rows()
    token_counter = load_token_counter(config.model) if load_token_counter and config.model else None
    metadata = summary.describe(table.frame, collected, table.rejects, table.notes, config, token_counter)
    if not dry_run:
        write_folder(table, collected, metadata, config)
    summary.print_summary(metadata, config, dry_run)
    if previous.get("augmentation"):
        lost = "would be lost" if dry_run else "were lost"
        console.warn(f"the rows that vlkit augment added to {config.out} {lost} with the earlier folder: run it again")
    disk = _estimate_disk_gb(table.frame, collected, config)
    if dry_run:
        console.say(f"disk about {disk:.2f} GB")
    return {
        "data": str(config.out),
        "disk_gb": round(disk, 4),
        **{key: value for key, value in metadata.items() if key != "settings" or dry_run},
        "pictures_read": collected.images_read,
        "dry_run": dry_run,
    }


def _refuse_overwriting_source(config: PrepConfig) -> None:
    """Refuse an output folder that contains what prep reads."""
    out = _output(config)
    for source in (config.source, config.image_root):
        if source is not None:
            path = str(source.absolute).rstrip("/") + "/"
            if path.startswith(str(out.absolute).rstrip("/") + "/"):
                raise UsageError(f"--out {out} would replace the source {source}", hint="choose another --out")


def _read_previous(config: PrepConfig) -> dict[str, Any]:
    """Return the data.yaml of the folder that will be replaced, if there is one.

    Raises:
        UsageError: the folder cannot be written, or holds something that prep did not write.
    """
    out = _output(config)
    names, metadata = _list_remote_output(out) if out.is_remote else _list_local_output(out)
    views = {config.training_view} if config.training_view else set()
    own_names = OUTPUT_NAMES | views | _further_output_names(metadata)
    if foreign := sorted(names - own_names):
        message = f"{out} holds {foreign[0]}, which prep did not write and would remove"
        raise UsageError(message, hint="choose another --out, or move it away")
    if "images" in names and "data.yaml" not in names:
        raise UsageError(f"{out} holds images/ but no data.yaml: prep did not write it", hint="choose another --out")
    return metadata


def _list_remote_output(out: Location) -> tuple[set[str], dict[str, Any]]:
    """Return the names in a remote output folder, and its data.yaml."""
    remote = Remote(tables_location(out))
    listing = remote.listing()
    names = {name.split("/")[0] for name in listing} - {MANIFEST, VERSIONS}
    for folder in ("images", pairs.AUGMENTED_FOLDER):
        if all(COPIED_IMAGE.fullmatch(name) for name in listing if name.startswith(f"{folder}/")):
            # An interrupted upload leaves copied images and nothing else.
            names -= {folder}
    metadata: dict[str, Any] = {}
    if "data.yaml" in listing:
        metadata = read_yaml(remote.fetch({"data.yaml": listing["data.yaml"]})["data.yaml"])
    return names, metadata


def _list_local_output(out: Location) -> tuple[set[str], dict[str, Any]]:
    """Return the names in a local output folder, and its data.yaml."""
    refuse_unwritable(out.path, "--out")
    names = {path.name for path in out.path.iterdir()} - {".DS_Store"} if out.path.exists() else set()
    return names, read_yaml(out.path / "data.yaml") if "data.yaml" in names else {}


def _output(config: PrepConfig) -> Location:
    assert config.out is not None  # Set by resolve_prep.
    return config.out


def _further_output_names(metadata: Mapping[str, Any]) -> set[str]:
    """Return the further files that a data.yaml speaks of: a training view, and what augment added."""
    names = {pairs.AUGMENTED_FOLDER, pairs.NEGATIVES_VIEW} if metadata.get("augmentation") else set()
    view = (metadata.get("settings") or {}).get("training_view")
    return names | ({view} if view else set())


def build_table(collected: CollectedRows, config: PrepConfig) -> PairsTable:
    """Build the pairs table: units that share an image become one, units are split, equal rows become one."""
    unit_of = splits.connected_components(collected.unit_links())
    units = assign_splits(collected.rows, unit_of, config)
    columns, duplicates = _fill_columns(collected, unit_of, units.split)
    _add_image_columns(columns, collected)
    if config.oversample_below is not None:
        columns["weight"] = _oversampling_weights(columns, collected.classes, config.oversample_below)
    rejects = list(dict.fromkeys([*collected.rejects, *units.rejects, *duplicates]))
    return PairsTable(pairs.make_frame(columns), rejects, units.notes)


def _fill_columns(
    collected: CollectedRows, unit_of: Mapping[str, str], split: Mapping[str, str]
) -> tuple[dict[str, list[Any]], list[Reject]]:
    """Return the columns of the table, and a reject for every row that equals an earlier one.

    Args:
        unit_of: a row's unit -> the unit it was merged into.
        split: merged unit -> split; rows of other units are left out.
    """
    row_of: dict[tuple[str, str], int] = {}
    columns: dict[str, list[Any]] = defaultdict(list)
    groups: list[tuple[str, ...]] = []
    duplicates: list[Reject] = []
    for row in collected.rows:
        unit, image_id = unit_of[row.unit], collected.image_id(row.image)
        if unit not in split:
            continue
        index = row_of.setdefault((image_id, row.text), len(groups))
        if index < len(groups):
            duplicates.append(_duplicate(row, groups[index], columns["image_key"][index]))
            groups[index] = tuple(dict.fromkeys((*groups[index], *row.groups)))
            continue
        groups.append(row.groups)
        columns["image"].append(collected.raw.image_source.address(row.image))
        columns["image_id"].append(image_id)
        columns["text"].append(row.text)
        columns["unit"].append(unit)
        classes = row.classes or collected.classes.get(image_id, ())
        columns["class_name"].append(classes[0] if classes else None)
        columns["split"].append(split[unit])
        columns["image_key"].append(row.image)
        extra = row.extra or {}
        for name, value in extra.items():
            column = columns[_unreserved_name(name, extra)]
            column.extend([None] * (len(groups) - 1 - len(column)))
            column.append(value)
    several = any(len(names) > 1 for names in groups)
    columns["image_group"] = [list(names) if several else names[0] for names in groups]
    for column in columns.values():
        column.extend([None] * (len(groups) - len(column)))
    return columns, duplicates


def _duplicate(row: RawRow, groups: Sequence[str], image_key: str) -> Reject:
    """Return the reject for a row whose image and text an earlier row of these groups has."""
    merged = "" if set(row.groups) <= set(groups) else ": they became one row of both groups"
    return Reject(row.where, row.image, f"the same image and text as an earlier row{merged}", image_key)


def _unreserved_name(name: str, names: Collection[str]) -> str:
    """Return a name for a source's column that no column of prep, and no other of the source, has."""
    while name in pairs.RESERVED_COLUMNS:
        name = f"source_{name}"
        while name in names:
            name = f"source_{name}"
    return name


def _add_image_columns(columns: dict[str, list[Any]], collected: CollectedRows) -> None:
    """Add width, height and perceptual hash, so that lookalikes can be found in the table alone."""
    if not collected.images:
        return
    images = [collected.images[name] for name in columns["image_key"]]
    columns["width"], columns["height"] = [image.width for image in images], [image.height for image in images]
    columns["image_looks"] = [phash.to_hex(image.perceptual_hash) for image in images]


def _oversampling_weights(
    columns: dict[str, list[Any]], classes: dict[str, tuple[str, ...]], below: int
) -> list[float]:
    """Return below / n for training rows of an image whose rarest class has n < below training images, else 1."""
    rows = list(zip(columns["image_id"], columns["split"], strict=True))
    training = {image_id for image_id, split in rows if split == "train"}
    sizes = Counter(name for image_id in training for name in classes.get(image_id, ()))
    rarest = {image_id: min(sizes[name] for name in classes[image_id]) for image_id in training & classes.keys()}
    return [
        max(1.0, below / rarest[image_id]) if split == "train" and image_id in rarest else 1.0
        for image_id, split in rows
    ]


def write_folder(table: PairsTable, collected: CollectedRows, metadata: dict[str, Any], config: PrepConfig) -> None:
    """Write the prepared folder, whole or not at all; in a bucket the old one stays readable until the new is complete.

    Raises:
        DataError: the written table leaks between splits, or an image to copy is gone. Nothing is put in place.
    """
    out = _output(config)
    copies = _images_to_copy(table.frame, collected) if copies_images(config) else {}
    if not out.is_remote:
        with atomic_folder(out.path) as folder:
            _write_tables(folder, table, metadata, config)
            for name, path in copies.items():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name)
        return
    with tempfile.TemporaryDirectory() as aside:
        _write_tables(Path(aside), table, metadata, config)
        files = {path.name: path for path in sorted(Path(aside).iterdir())}
        images = Remote(out)
        images.upload(copies)
        Remote(tables_location(out)).replace(files, MANIFEST)
        # Names follow from the content: the upload overwrote no image of the old table, whose own images go last.
        images.remove([name for name in images.listing() if COPIED_IMAGE.fullmatch(name) and name not in copies])


def _estimate_disk_gb(frame: pd.DataFrame, collected: CollectedRows, config: PrepConfig) -> float:
    """Estimate the prepared folder's size in GB: three times the table (views and docstore), and image copies."""
    files = collected.raw.image_source.files if copies_images(config) else {}
    copied = sum(files[key].size for key in set(frame["image_key"]) if key in files)
    return (3 * int(frame.memory_usage(deep=False).sum()) + copied) / 2**30


def copies_images(config: PrepConfig) -> bool:
    """Return whether images are copied: as --copy-images says; by default into a bucket, if they were opened."""
    if config.copy_images is not None:
        return config.copy_images
    return config.out is not None and config.out.is_bucket and config.check_images


def copied_image_name(image_id: str, image_key: str) -> str:
    """Return the name of a copied image in the prepared folder, which follows from its content."""
    return f"images/{image_id}{PurePosixPath(image_key).suffix.lower()}"


def _images_to_copy(frame: pd.DataFrame, collected: CollectedRows) -> dict[str, Path]:
    """Return name in the prepared folder -> local file of every image to copy; remote ones are fetched."""
    first = frame.drop_duplicates("image_id")
    source = collected.raw.image_source
    paths: dict[str, Path] = {}
    if source.remote is not None:
        source.fetch([key for key in first["image_key"] if key in source.files])
    for image_id, key in zip(first["image_id"], first["image_key"], strict=True):
        path = source.local_path(key)
        if not path.is_file():
            message = f"no such image: {source.address(key)}"
            raise DataError(message, hint="without --no-check-images its rows are left out")
        paths[copied_image_name(image_id, key)] = path
    return paths


def _write_tables(folder: Path, table: PairsTable, metadata: dict[str, Any], config: PrepConfig) -> None:
    import pandas as pd

    frame = table.frame
    if copies_images(config):
        names = dict(zip(frame["image_id"], map(copied_image_name, frame["image_id"], frame["image_key"]), strict=True))
        frame = frame.assign(image=[names[image_id] for image_id in frame["image_id"]])
    frame.to_parquet(folder / "pairs.parquet", index=False)
    pairs.docstore(frame).to_parquet(folder / "docstore.parquet", index=False)
    group = pairs.group_name(frame, config.group_column)
    for split in splits.SPLITS:
        view = pairs.view(frame[frame["split"] == split], group)
        view.to_csv(folder / f"{split}_pairs_positive.csv", index=False)
        if split == "train" and config.training_view is not None:
            view.to_csv(folder / config.training_view, index=False)
    rejects = pd.DataFrame(table.rejects, columns=list(Reject._fields))
    rejects.to_csv(folder / "rejects.csv", index=False, errors="backslashreplace")
    (folder / "data.yaml").write_text(yaml_text(metadata), encoding="utf-8")
    pairs.read_pairs(folder)  # Refuses a table that leaks between splits.
