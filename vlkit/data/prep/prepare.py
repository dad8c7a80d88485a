"""prep: a raw folder becomes a prepared folder.

Read the layout's rows, check every picture once, keep copies of a picture in one unit, split by unit, write. The
prepared folder appears whole; what was left out stands in rejects.csv with its reason.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vlkit import console
from vlkit.config.base import read_yaml, yaml_text
from vlkit.config.data import PrepConfig
from vlkit.data import pairs, splits
from vlkit.data.images import phash
from vlkit.data.pairs import COPIED_IMAGE
from vlkit.data.prep import summary
from vlkit.data.prep.collect import CollectedRows, collect
from vlkit.data.prep.raw_folder import Reject
from vlkit.data.prep.summary import TokenCounter
from vlkit.errors import DataError, UsageError
from vlkit.remote import MANIFEST, VERSIONS, Remote, tables_location
from vlkit.storage import atomic_folder, refuse_unwritable

if TYPE_CHECKING:
    import pandas as pd


# What prep writes; a folder with anything else in it is somebody's, and is not replaced.
WRITTEN = {
    "pairs.parquet",
    "docstore.parquet",
    "rejects.csv",
    "data.yaml",
    "images",
    pairs.PREVIEW_FILE,
    *(f"{split}_pairs_positive.csv" for split in splits.SPLITS),
}


def prepare(
    config: PrepConfig, *, dry_run: bool = False, tokens_of: Callable[[str], TokenCounter | None] | None = None
) -> dict[str, Any]:
    """Run `vlkit prep`.

    Args:
        tokens_of: model name -> what counts tokens as that model does; None where its tokenizer is not at hand.

    Returns:
        Counts, warnings and the prepared folder, as --json prints them.

    Raises:
        DataError: the source is missing, empty, or gives no pair.
        UsageError: the output folder holds something else.
    """
    before = _refuse_foreign(config)
    gathered = collect(config)
    frame = build_table(gathered, config)
    gathered.rejects = list(dict.fromkeys(gathered.rejects))
    gathered.rows.clear()  # They are in the table now; of a million, twice is too much.
    count_tokens = tokens_of(config.model) if tokens_of and config.model else None
    described = summary.describe(frame, gathered, config, count_tokens)
    if not dry_run:
        write(frame, gathered, described, config)
    summary.print_summary(described, config, dry_run)
    if before.get("augmentation"):
        goes = "would go" if dry_run else "has gone"
        console.warn(f"what vlkit augment had added to {config.out} {goes} with the earlier folder: run it again")
    disk = _disk_gb(frame, gathered, config)
    if dry_run:
        console.say(f"disk about {disk:.2f} GB")
    return {
        "data": str(config.out),
        "disk_gb": round(disk, 4),
        **{key: value for key, value in described.items() if key != "settings" or dry_run},
        "pictures_read": gathered.read,
        "dry_run": dry_run,
    }


def _refuse_foreign(config: PrepConfig) -> dict[str, Any]:
    """What would be lost or cannot be written is refused before a picture is read.

    Returns:
        The data.yaml of the folder that will be replaced, if there is one.
    """
    out = config.out
    assert out is not None
    read = [each for each in (config.source, config.image_root) if each is not None]
    for source in read:
        above = str(source.absolute).rstrip("/") + "/"
        if above.startswith(str(out.absolute).rstrip("/") + "/"):
            raise UsageError(f"--out {out} would replace {source}, which is read", hint="choose another --out")
    written = WRITTEN | ({config.training_view} if config.training_view else set())
    before: dict[str, Any] = {}
    if out.is_remote:
        remote = Remote(tables_location(out))
        listing = remote.listing()
        held = {name.split("/")[0] for name in listing} - {MANIFEST, VERSIONS}
        for folder in ("images", pairs.AUGMENTED_FOLDER):
            if all(COPIED_IMAGE.fullmatch(name) for name in listing if name.startswith(f"{folder}/")):
                # Copies alone are what an upload that broke off has left.
                held -= {folder}
        if "data.yaml" in listing:
            before = read_yaml(remote.fetch({"data.yaml": listing["data.yaml"]})["data.yaml"])
    else:
        refuse_unwritable(out.path, "--out")
        path = out.path
        held = {each.name for each in path.iterdir()} - {".DS_Store"} if path.exists() else set()
        before = read_yaml(path / "data.yaml") if "data.yaml" in held else {}
    written |= _also_written(before)
    if foreign := sorted(held - written):
        told = f"{out} holds {foreign[0]}, which prep did not write and would remove"
        raise UsageError(told, hint="choose another --out, or move it away")
    if "images" in held and "data.yaml" not in held:
        raise UsageError(f"{out} holds images/ but no data.yaml: prep did not write it", hint="choose another --out")
    return before


def _also_written(before: Mapping[str, Any]) -> set[str]:
    """What the data.yaml of a prepared folder says of further files: a training view, an augmentation's."""
    augmented = {pairs.AUGMENTED_FOLDER, pairs.NEGATIVES_VIEW} if before.get("augmentation") else set()
    return {(before.get("settings") or {}).get("training_view")} | augmented


def build_table(gathered: CollectedRows, config: PrepConfig) -> pd.DataFrame:
    """Rows -> pairs table: what looks the same shares a unit, equal rows become one, units are split."""
    together = splits.connected_components(gathered.links())
    split = _split(gathered, together, config)
    place: dict[tuple[str, str], int] = {}
    columns: dict[str, list[Any]] = defaultdict(list)
    groups: list[tuple[str, ...]] = []
    for row in gathered.rows:
        unit, image_id = together[row.unit], gathered.image_id(row.image)
        if unit not in split:
            continue
        at = place.setdefault((image_id, row.text), len(groups))
        if at < len(groups):
            more = "" if set(row.groups) <= set(groups[at]) else ": they are one row of both groups"
            reason = f"the same picture and text as an earlier row{more}"
            gathered.rejects.append(Reject(row.where, row.image, reason, columns["image_key"][at]))
            groups[at] = tuple(dict.fromkeys((*groups[at], *row.groups)))
            continue
        groups.append(row.groups)
        columns["image"].append(gathered.raw.pictures.address(row.image))
        columns["image_id"].append(image_id)
        columns["text"].append(row.text)
        columns["unit"].append(unit)
        classes = row.classes or gathered.classes.get(image_id, ())
        columns["class_name"].append(classes[0] if classes else None)
        columns["split"].append(split[unit])
        columns["image_key"].append(row.image)
        extra = row.extra or {}
        for name, value in extra.items():
            further = columns[_free_name(name, extra)]
            further.extend([None] * (len(groups) - 1 - len(further)))
            further.append(value)
    several = any(len(of) > 1 for of in groups)
    columns["image_group"] = [list(of) if several else of[0] for of in groups]
    for name in columns:
        columns[name].extend([None] * (len(groups) - len(columns[name])))
    _add_looks(columns, gathered)
    if config.oversample_below is not None:
        columns["weight"] = _weights(columns, gathered.classes, config.oversample_below)
    return pairs.make_frame(columns)


def _free_name(name: str, names: Collection[str]) -> str:
    """A source's column that bears a name of prep's own gets another, which no other column of its has."""
    while name in pairs.RESERVED_COLUMNS:
        name = f"source_{name}"
        while name in names:
            name = f"source_{name}"
    return name


def _add_looks(columns: dict[str, list[Any]], gathered: CollectedRows) -> None:
    """Size and looks of each picture, so that the table alone can be checked for near-identical ones."""
    if not gathered.checked:
        return
    found = [gathered.checked[name] for name in columns["image_key"]]
    columns["width"], columns["height"] = [each.width for each in found], [each.height for each in found]
    columns["image_looks"] = [phash.to_hex(each.perceptual_hash) for each in found]


def _weights(columns: dict[str, list[Any]], classes: dict[str, tuple[str, ...]], below: int) -> list[float]:
    """below / n for training rows of a picture whose rarest class has n < below training pictures, else 1."""
    rows = list(zip(columns["image_id"], columns["split"], strict=True))
    training = {image_id for image_id, split in rows if split == "train"}
    sizes = Counter(name for image_id in training for name in classes.get(image_id, ()))
    rarest = {image_id: min(sizes[name] for name in classes[image_id]) for image_id in training & classes.keys()}
    return [
        max(1.0, below / rarest[image_id]) if split == "train" and image_id in rarest else 1.0
        for image_id, split in rows
    ]


def _split(gathered: CollectedRows, together: dict[str, str], config: PrepConfig) -> dict[str, str]:
    """unit -> split, for the units that stay under --limit and that the source puts somewhere, if it decides."""
    sizes = Counter(together[row.unit] for row in gathered.rows)
    named: dict[str, set[str]] = defaultdict(set)
    for row in gathered.rows:
        if row.split and config.split_by == "source":
            named[together[row.unit]].add(row.split)
    kept = _kept(sizes, named, config)
    strata: dict[str, Collection[str]] = dict.fromkeys((unit for unit in sizes if unit in kept), ())
    if config.stratify:
        found: dict[str, set[str]] = defaultdict(set)
        repeated = _repeated(gathered, together, config)
        for row in gathered.rows:
            found[together[row.unit]].update(row.classes or ((row.text,) if row.text in repeated else ()))
        strata |= {unit: sorted(found[unit]) for unit in strata if found[unit]}
    drawn = splits.split_units(strata, test_share=config.test_share, val_share=config.val_share, seed=config.seed)
    if config.split_by == "seed":
        return drawn
    split = _as_in_source(gathered, {unit: named[unit] for unit in named if unit in kept}, strata, drawn, config)
    told: set[str] = set()
    for row in gathered.rows:
        unit = together[row.unit]
        if unit in kept and unit not in split and row.where not in told:
            told.add(row.where)
            gathered.rejects.append(Reject(row.where, row.image, "the source puts it in no split"))
    return split


def _kept(sizes: Mapping[str, int], named: Mapping[str, Collection[str]], config: PrepConfig) -> Collection[str]:
    """The units that stay under --limit; of every split of the source's own its share."""
    if config.limit is None:
        return sizes.keys()
    of_split: dict[str | None, dict[str, int]] = defaultdict(dict)
    split, _ = splits.splits_from_source(named)
    for unit, size in sizes.items():
        of_split[split.get(unit)][unit] = size
    total, kept = sum(sizes.values()), set()
    for members in of_split.values():
        share = max(1, round(config.limit * sum(members.values()) / total))
        kept.update(splits.subsample_units(members, share, config.seed))
    return kept


def _repeated(gathered: CollectedRows, together: dict[str, str], config: PrepConfig) -> set[str]:
    """Texts that stand in so many units that each can give a share of them: without classes, they are stratified."""
    least = 1 / min((share for share in (config.test_share, config.val_share) if share > 0), default=1.0)
    units: dict[str, set[str]] = defaultdict(set)
    for row in gathered.rows:
        if len(units[row.text]) < least:
            units[row.text].add(together[row.unit])
    return {text for text, of in units.items() if len(of) >= max(2, least)}


def _as_in_source(
    gathered: CollectedRows,
    named: Mapping[str, Collection[str]],
    strata: Mapping[str, Collection[str]],
    drawn: dict[str, str],
    config: PrepConfig,
) -> dict[str, str]:
    """The source's own splits; what it lacks is drawn from its training units.

    Where it has no test but a val split, as COCO has, that is the test: what selects must not measure.
    """
    split, torn = splits.splits_from_source(named)
    have = set(split.values())
    if "train" not in have:
        lacking = f"only {', '.join(sorted(have))}" if have else "none at all"
        gathered.notes.append(f"the source names no split to train on, {lacking}: splits are drawn")
        return drawn
    if torn:
        told = f"{len(torn)} {'unit stands' if len(torn) == 1 else 'units stand'} in several of the source's splits"
        gathered.notes.append(f"{told}, by copies: each went to the one that is held out most")
    if "test" not in have and "val" in have:
        gathered.notes.append("the source has no test split: its val is the test, and validation is drawn from train")
        split = {unit: "test" if name == "val" else name for unit, name in split.items()}
        have = set(split.values())
    lacks = [name for name in ("test", "val") if name not in have]
    if lacks == ["test", "val"]:
        gathered.notes.append("the source has neither a test nor a validation split: both are drawn from train")
    training = {unit: strata[unit] for unit, name in split.items() if name == "train"}
    shares = {name: getattr(config, f"{name}_share") if name in lacks else 0.0 for name in ("test", "val")}
    return split | splits.split_units(training, test_share=shares["test"], val_share=shares["val"], seed=config.seed)


def write(frame: pd.DataFrame, gathered: CollectedRows, described: dict[str, Any], config: PrepConfig) -> None:
    """The prepared folder, whole or not at all; in a bucket the old one stays readable until the new manifest stands.

    Raises:
        DataError: what was written holds a leak, or a picture to copy is gone. It is not put in place.
    """
    out = config.out
    assert out is not None
    copies = _copies(frame, gathered) if copies_pictures(config) else {}
    if not out.is_remote:
        with atomic_folder(out.path) as folder:
            _write_tables(folder, frame, gathered, described, config)
            for name, path in copies.items():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name)
        return
    with tempfile.TemporaryDirectory() as aside:
        _write_tables(Path(aside), frame, gathered, described, config)
        files = {path.name: path for path in sorted(Path(aside).iterdir())}
        pictures = Remote(out)
        pictures.upload(copies)
        Remote(tables_location(out)).replace(files, MANIFEST)
        # Pictures are named by their content, so the old table needed none that the new one has changed.
        pictures.remove([name for name in pictures.listing() if COPIED_IMAGE.fullmatch(name) and name not in copies])


def _disk_gb(frame: pd.DataFrame, gathered: CollectedRows, config: PrepConfig) -> float:
    """What the prepared folder takes, about: the table three times over (its views, the docstore), and copies."""
    files = gathered.raw.pictures.files if copies_pictures(config) else {}
    copied = sum(files[key].size for key in set(frame["image_key"]) if key in files)
    return (3 * int(frame.memory_usage(deep=False).sum()) + copied) / 2**30


def copies_pictures(config: PrepConfig) -> bool:
    """Whether pictures are copied: as told; else into a lake's zone, if they were looked at."""
    if config.copy_images is not None:
        return config.copy_images
    return config.out is not None and config.out.is_bucket and config.check_images


def copied_name(image_id: str, image_key: str) -> str:
    """Where a copied picture lies in the prepared folder: by its content."""
    return f"images/{image_id}{PurePosixPath(image_key).suffix.lower()}"


def _copies(frame: pd.DataFrame, gathered: CollectedRows) -> dict[str, Path]:
    """Name in the prepared folder -> the picture to copy there."""
    first = frame.drop_duplicates("image_id")
    source, found = gathered.raw.pictures, {}
    if source.remote is not None:
        source.fetch([key for key in first["image_key"] if key in source.files])
    for image_id, key in zip(first["image_id"], first["image_key"], strict=True):
        path = source.path(key)
        if not path.is_file():
            raise DataError(f"no such image: {source.address(key)}", hint="without --no-check-images it is left out")
        found[copied_name(image_id, key)] = path
    return found


def _write_tables(
    folder: Path, frame: pd.DataFrame, gathered: CollectedRows, described: dict[str, Any], config: PrepConfig
) -> None:
    import pandas as pd

    if copies_pictures(config):
        names = dict(zip(frame["image_id"], map(copied_name, frame["image_id"], frame["image_key"]), strict=True))
        frame = frame.assign(image=[names[image_id] for image_id in frame["image_id"]])
    frame.to_parquet(folder / "pairs.parquet", index=False)
    pairs.docstore(frame).to_parquet(folder / "docstore.parquet", index=False)
    group = pairs.group_name(frame, config.group_column)
    for split in splits.SPLITS:
        view = pairs.view(frame[frame["split"] == split], group)
        view.to_csv(folder / f"{split}_pairs_positive.csv", index=False)
        if split == "train" and config.training_view is not None:
            view.to_csv(folder / config.training_view, index=False)
    rejects = pd.DataFrame(gathered.rejects, columns=list(Reject._fields))
    rejects.to_csv(folder / "rejects.csv", index=False, errors="backslashreplace")
    (folder / "data.yaml").write_text(yaml_text(described), encoding="utf-8")
    pairs.read_pairs(folder)  # Refuses a leak in what was really written.
