"""prep: a raw folder becomes a prepared folder.

Read the layout's rows, check every picture once, keep copies of a picture in one unit, split by unit, write. The
prepared folder appears whole; what was left out stands in rejects.csv with its reason.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vlkit.config import PrepConfig
from vlkit.data import labels, pairs, preflight, splits
from vlkit.data.gathering import Gathered, gather
from vlkit.data.preflight import CountTokens
from vlkit.data.raw import Reject
from vlkit.errors import UsageError
from vlkit.remote import MANIFEST, ZONE_TABLES, Remote
from vlkit.settings import yaml_text
from vlkit.storage import folder_written_whole

if TYPE_CHECKING:
    import pandas as pd


# What prep writes; a folder with anything else in it is somebody's, and is not replaced.
WRITTEN = {
    "pairs.parquet",
    "docstore.parquet",
    "rejects.csv",
    "data.yaml",
    "images",
    *(f"{split}_pairs_positive.csv" for split in splits.SPLITS),
}
NOTHING: frozenset[str] = frozenset()


def prepare(
    config: PrepConfig, *, dry_run: bool = False, tokens_of: Callable[[str], CountTokens | None] | None = None
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
    _refuse_foreign(config)
    gathered = gather(config)
    frame = table(gathered, config)
    gathered.rows.clear()  # They are in the table now; of a million, twice is too much.
    count_tokens = tokens_of(config.model) if tokens_of and config.model else None
    described = preflight.describe(frame, gathered, config, count_tokens)
    if not dry_run:
        write(frame, gathered, described, config)
    preflight.tell(described, config, dry_run)
    return {
        "data": str(config.out),
        **{key: value for key, value in described.items() if key != "settings"},
        "pictures_read": gathered.read,
        "dry_run": dry_run,
    }


def _refuse_foreign(config: PrepConfig) -> None:
    source, out = config.source, config.out
    assert out is not None
    if out.is_remote:
        if out.rstrip("/") == source.rstrip("/"):
            raise UsageError(f"--out {out} is the source", hint="choose another --out")
        return
    path = out.path
    if path.exists() and not path.is_dir():
        raise UsageError(f"{out} is a file", hint="choose another --out")
    if not source.is_remote and (
        path.resolve() == source.path.resolve() or path.resolve() in source.path.resolve().parents
    ):
        raise UsageError(f"--out {out} would replace the source {source}", hint="choose another --out")
    held = {each.name for each in path.iterdir()} if path.exists() else set()
    written = WRITTEN | ({config.training_view} if config.training_view else set())
    if foreign := sorted(held - written):
        told = f"{out} holds {foreign[0]}, which prep did not write and would remove"
        raise UsageError(told, hint="choose another --out, or move it away")
    if "images" in held and not (path / "data.yaml").is_file():
        raise UsageError(f"{out} holds images/ but no data.yaml: prep did not write it", hint="choose another --out")


def table(gathered: Gathered, config: PrepConfig) -> pd.DataFrame:
    """Rows -> pairs table: what looks the same shares a unit, equal rows become one, units are split."""
    together = splits.connected(gathered.links())
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
            same = set(row.groups) <= set(groups[at])
            reason = f"the same picture and text as {columns['image_key'][at]}"
            gathered.rejects.append(
                Reject(row.where, row.image, reason if same else f"{reason}: their groups are one row")
            )
            groups[at] = tuple(dict.fromkeys((*groups[at], *row.groups)))
            continue
        groups.append(row.groups)
        classes = gathered.classes.get(image_id, row.classes) if config.on_conflict == "keep" else row.classes
        columns["image"].append(gathered.raw.pictures.address(row.image))
        columns["image_id"].append(image_id)
        columns["text"].append(row.text)
        columns["unit"].append(unit)
        columns["class_name"].append(classes[0] if classes else None)
        columns["split"].append(split[unit])
        columns["image_key"].append(row.image)
        for name, value in (row.extra or {}).items():
            further = columns[name]
            further.extend([None] * (len(groups) - 1 - len(further)))
            further.append(value)
    several = any(len(of) > 1 for of in groups)
    columns["image_group"] = [list(of) if several else of[0] for of in groups]
    for name in columns:
        columns[name].extend([None] * (len(groups) - len(columns[name])))
    _add_looks(columns, gathered)
    frame = pairs.make_frame(columns)
    if config.oversample_below is not None:
        frame["weight"] = _weights(frame, config.oversample_below)
    return frame


def _add_looks(columns: dict[str, list[Any]], gathered: Gathered) -> None:
    """Size and looks of each picture, so that the table alone can be checked for near-identical ones."""
    if not gathered.checked:
        return
    found = [gathered.checked[name] for name in columns["image_key"]]
    columns["width"], columns["height"] = [each.width for each in found], [each.height for each in found]
    columns["image_looks"] = [each.looks[:35].hex() for each in found]


def _split(gathered: Gathered, together: dict[str, str], config: PrepConfig) -> dict[str, str]:
    """unit -> split, for the units that stay under --limit and that the source puts somewhere, if it decides."""
    sizes = Counter(together[row.unit] for row in gathered.rows)
    kept = sizes.keys() if config.limit is None else set(splits.limited(sizes, config.limit, config.seed))
    strata: dict[str, frozenset[str]] = dict.fromkeys((unit for unit in sizes if unit in kept), NOTHING)
    named: dict[str, frozenset[str]] = {}
    repeated = _repeated(gathered, together) if config.stratify else {}
    for row in gathered.rows:
        unit = together[row.unit]
        if unit in kept:
            if row.split:
                named[unit] = named.get(unit, NOTHING) | {row.split}
            classes = row.classes or ((row.text,) if row.text in repeated else ())
            if config.stratify and classes:
                strata[unit] = strata[unit].union(classes)
    drawn = splits.split_units(strata, test_share=config.test_share, val_share=config.val_share, seed=config.seed)
    if config.split_by == "seed":
        return drawn
    return _as_in_source(named, strata, drawn, config)


def _repeated(gathered: Gathered, together: dict[str, str]) -> set[str]:
    """Texts that stand in several units: where there are no classes, they are what is stratified."""
    first: dict[str, str] = {}
    several: set[str] = set()
    for row in gathered.rows:
        if first.setdefault(row.text, together[row.unit]) != together[row.unit]:
            several.add(row.text)
    return several


def _as_in_source(
    named: dict[str, frozenset[str]], strata: dict[str, frozenset[str]], drawn: dict[str, str], config: PrepConfig
) -> dict[str, str]:
    """The source's own splits; what it lacks is drawn from its training units.

    Where it has no test but a val split, as COCO has, that is the test: what selects must not measure.
    """
    split, _ = splits.as_in_source(named)
    have = set(split.values())
    if "train" not in have:
        return drawn
    if "test" not in have:
        split = {unit: "test" if name == "val" else name for unit, name in split.items()}
        have = set(split.values())
    training = {unit: strata[unit] for unit, name in split.items() if name == "train"}
    shares = {
        "test_share": 0.0 if "test" in have else config.test_share,
        "val_share": 0.0 if "val" in have else config.val_share,
    }
    return split | splits.split_units(training, seed=config.seed, **shares)


def _weights(frame: pd.DataFrame, below: int) -> list[float]:
    """below / n for training rows of a class of n < below pictures, else 1: how often a row is drawn."""
    training = frame[frame["split"] == "train"]
    sizes: Counter[str] = Counter()
    for _, picture in training.drop_duplicates("image_id").iterrows():
        sizes.update(labels.as_set(picture["image_group"]))
    rarest = (min((sizes[g] for g in labels.as_set(groups)), default=0) for groups in frame["image_group"])
    return [
        below / size if split == "train" and 0 < size < below else 1.0
        for size, split in zip(rarest, frame["split"], strict=True)
    ]


def write(frame: pd.DataFrame, gathered: Gathered, described: dict[str, Any], config: PrepConfig) -> None:
    """The prepared folder, whole or not at all; to a bucket, with its manifest last.

    Raises:
        DataError: what was written holds a leak. It is not put in place.
    """
    out = config.out
    assert out is not None
    if not out.is_remote:
        with folder_written_whole(out.path) as folder:
            _write_tables(folder, frame, gathered, described, config)
            if config.copy_images:
                (folder / "images").mkdir()
                for name, path in _copies(frame, gathered).items():
                    shutil.copyfile(path, folder / name)
        return
    remote = Remote(out)
    with tempfile.TemporaryDirectory() as aside:
        _write_tables(Path(aside), frame, gathered, described, config)
        if config.copy_images is not False and (config.copy_images or out.is_bucket):
            remote.upload(_copies(frame, gathered))
        prefix = f"{ZONE_TABLES}/" if out.is_bucket else ""
        files = {path.name: path for path in sorted(Path(aside).iterdir())}
        Remote(out / ZONE_TABLES if prefix else out).upload(files, manifest=MANIFEST)


def copied_name(image_id: str, image_key: str) -> str:
    """Where a copied picture lies in the prepared folder: by its content."""
    return f"images/{image_id}{PurePosixPath(image_key).suffix.lower()}"


def _copies(frame: pd.DataFrame, gathered: Gathered) -> dict[str, Path]:
    first = frame.drop_duplicates("image_id")
    source = gathered.raw.pictures
    source.fetch(list(first["image_key"]))
    return {
        copied_name(image_id, key): source.path(key)
        for image_id, key in zip(first["image_id"], first["image_key"], strict=True)
    }


def _write_tables(
    folder: Path, frame: pd.DataFrame, gathered: Gathered, described: dict[str, Any], config: PrepConfig
) -> None:
    import pandas as pd

    out = config.out
    if config.copy_images or (config.copy_images is None and out is not None and out.is_bucket):
        first = frame.drop_duplicates("image_id")
        names = {i: copied_name(i, key) for i, key in zip(first["image_id"], first["image_key"], strict=True)}
        frame = frame.assign(image=[names[image_id] for image_id in frame["image_id"]])
    frame.to_parquet(folder / "pairs.parquet", index=False)
    pairs.docstore(frame).to_parquet(folder / "docstore.parquet", index=False)
    group = config.group_column or ("class_name" if frame["class_name"].notna().any() else "group")
    for split in splits.SPLITS:
        _view(frame[frame["split"] == split], group).to_csv(folder / f"{split}_pairs_positive.csv", index=False)
    if config.training_view is not None:
        _view(frame[frame["split"] == "train"], group).to_csv(folder / config.training_view, index=False)
    rejects = pd.DataFrame(gathered.rejects, columns=["where", "item", "reason"])
    rejects.to_csv(folder / "rejects.csv", index=False, errors="backslashreplace")
    (folder / "data.yaml").write_text(yaml_text(described), encoding="utf-8")
    pairs.read_pairs(folder)  # Refuses a leak in what was really written.


def _view(rows: pd.DataFrame, group: str) -> pd.DataFrame:
    """A split for people: group, picture, caption. Several groups have a | between them."""
    import pandas as pd

    groups = ["|".join(sorted(labels.as_set(each))) for each in rows["image_group"]]
    return pd.DataFrame({group: groups, "image_key": list(rows["image_key"]), "caption": list(rows["text"])})
