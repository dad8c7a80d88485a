"""prep: a raw folder becomes a prepared folder.

Read the layout's rows, check every picture once, keep copies of a picture in one unit, split by unit, write. The
prepared folder appears whole; what was left out stands in rejects.csv with its reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from vlkit import console
from vlkit.config import PrepConfig
from vlkit.data import images, pairs, splits
from vlkit.data.layouts import LAYOUTS, RawRow, Reject
from vlkit.errors import DataError, UsageError
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
    *(f"{split}_pairs_positive.csv" for split in splits.SPLITS),
}


@dataclass
class Gathered:
    """What was read from a raw folder: usable rows with their checked pictures, and what was left out."""

    rows: list[RawRow] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    checked: dict[str, images.Checked] = field(default_factory=dict)


def prepare(config: PrepConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Run `vlkit prep`.

    Returns:
        Counts, warnings and the prepared folder, as --json prints them.

    Raises:
        DataError: the source is missing, empty, or gives no pair.
        UsageError: the output folder holds something else.
    """
    out = config.out or Path("data") / Path(config.domain).stem
    _refuse_foreign(out, config.source)
    gathered = gather(config)
    frame = table(gathered, config)
    described = describe(frame, gathered, config)
    if not dry_run:
        write(out, frame, gathered, described, config)
        pairs.read_pairs(out)  # Refuses a leak in what was really written.
    _summary(described, out, dry_run)
    return {
        "data": str(out),
        **{key: value for key, value in described.items() if key != "settings"},
        "dry_run": dry_run,
    }


def _refuse_foreign(out: Path, source: Path) -> None:
    if not source.exists():
        raise DataError(
            f"no such folder: {source}",
            hint="--source DIR names the raw folder; vlkit sample recipes raw/ makes one to try",
        )
    if not source.is_dir():
        raise DataError(f"{source} is a file; --source wants the folder it lies in")
    if not any(source.iterdir()):
        raise DataError(f"{source} is empty")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", hint="choose another --out")
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    if foreign := sorted(held - WRITTEN):
        told = f"{out} holds {foreign[0]}, which prep did not write and would remove"
        raise UsageError(told, hint="choose another --out, or move it away")
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise UsageError(f"--out {out} would replace the source {source}", hint="choose another --out")


def gather(config: PrepConfig) -> Gathered:
    """Read the layout and check each picture once."""
    found = Gathered()
    broken: dict[str, str] = {}
    listed = list(LAYOUTS[config.layout](config))
    with console.progress("checking pictures", len(listed)) as bar:
        for done, item in enumerate(listed, start=1):
            bar.update(done)
            if isinstance(item, Reject):
                found.rejects.append(item)
                continue
            if item.image_key not in found.checked and item.image_key not in broken:
                try:
                    found.checked[item.image_key] = images.check(item.image)
                except DataError as error:
                    broken[item.image_key] = error.message
                    found.rejects.append(Reject(item.where, item.image_key, error.message))
            if item.image_key in found.checked:
                found.rows.append(item)
    if not found.rows:
        reasons = Counter(reject.reason for reject in found.rejects).most_common(3)
        raise DataError(
            f"{config.source}: no pair of a picture and a text (layout {config.layout})",
            hint="; ".join(f"{count} x {reason}" for reason, count in reasons) or f"expected {_expected(config)}",
        )
    return found


def _expected(config: PrepConfig) -> str:
    if config.layout == "recipes":
        return f"{config.table} with {config.group_column}, {', '.join(config.text_column)} and {config.image_column}"
    return "class folders with pictures in them"


def table(gathered: Gathered, config: PrepConfig) -> pd.DataFrame:
    """Rows -> pairs table: identical pictures share a unit, identical rows are dropped, units are split."""
    links = [(row.unit, gathered.checked[row.image_key].image_id) for row in gathered.rows]
    together = splits.connected(links)
    units: dict[str, str | None] = {}
    for row in gathered.rows:
        units.setdefault(together[row.unit], row.class_name if config.stratify else None)
    if config.limit is not None:
        units = _limited(units, Counter(together[row.unit] for row in gathered.rows), config)
    split = splits.split_units(units, test_share=config.test_share, val_share=config.val_share, seed=config.seed)
    records: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in gathered.rows:
        unit, image_id = together[row.unit], gathered.checked[row.image_key].image_id
        if unit not in split:
            continue
        key = (image_id, row.text, row.group)
        if key in records:
            gathered.rejects.append(
                Reject(row.where, row.image_key, f"the same picture, text and group as {records[key]['image_key']}")
            )
            continue
        records[key] = {
            "image": row.image.absolute().as_posix(),
            "image_id": image_id,
            "text": row.text,
            "image_group": row.group,
            "unit": unit,
            "class_name": row.class_name,
            "split": split[unit],
            "image_key": row.image_key,
        }
    return pairs.make_frame(list(records.values()))


def _limited(units: dict[str, str | None], rows: Counter[str], config: PrepConfig) -> dict[str, str | None]:
    """Whole units in the order of their draw until there are about `limit` rows."""
    kept: dict[str, str | None] = {}
    total = 0
    for unit in sorted(units, key=lambda unit: (splits.draw(config.seed, "limit:" + unit), unit)):
        if total >= (config.limit or 0):
            break
        kept[unit] = units[unit]
        total += rows[unit]
    return kept


def describe(frame: pd.DataFrame, gathered: Gathered, config: PrepConfig) -> dict[str, Any]:
    """The content of data.yaml."""
    counts = {split: _counts(frame[frame["split"] == split]) for split in splits.SPLITS}
    warnings = []
    for split, of_split in counts.items():
        if not of_split["pairs"]:
            warnings.append(f"the {split} split is empty: there are too few units to share")
        elif split == "test" and of_split["units"] < 50:
            warnings.append(f"the test split has {of_split['units']} units: expect wide intervals")
    if small := _missing_classes(frame):
        warnings.append(f"{len(small)} classes do not stand in every split, for example {small[0]}: too few pictures")
    if config.layout == "class-folders" and frame["class_name"].nunique() == 1:
        warnings.append(
            f"there is one class, {frame['class_name'].iloc[0]}: is {config.source} laid out in class folders?"
        )
    if shared := _shared_texts(frame):
        warnings.append(
            f"{shared} texts of the test split also stand in training rows: known words, not known pictures"
        )
    if gathered.rejects:
        warnings.append(f"{len(gathered.rejects)} rows or files were left out: see rejects.csv")
    return {
        "domain": config.domain,
        "counts": {**_counts(frame), "rejects": len(gathered.rejects)},
        "splits": counts,
        "fingerprint": pairs.fingerprint(frame),
        "warnings": warnings,
        "rejects": dict(Counter(reject.reason for reject in gathered.rejects).most_common()),
        # The folder's own place is left out, so that the same input gives the same bytes anywhere.
        "settings": {key: value for key, value in config.to_dict().items() if key != "out"},
    }


def _counts(frame: pd.DataFrame) -> dict[str, int]:
    return {
        "pairs": len(frame),
        "pictures": int(frame["image_id"].nunique()),
        "texts": int(frame["text_id"].nunique()),
        "units": int(frame["unit"].nunique()),
        "classes": int(frame["class_name"].nunique()),
    }


def _shared_texts(frame: pd.DataFrame) -> int:
    """Texts of the test that training has too; none are counted where classes share captions by design."""
    if frame["class_name"].notna().any():
        return 0
    in_split = {split: set(frame.loc[frame["split"] == split, "text_id"]) for split in ("train", "test")}
    return len(in_split["train"] & in_split["test"])


def _missing_classes(frame: pd.DataFrame) -> list[str]:
    in_splits = frame.dropna(subset="class_name").groupby("class_name")["split"].nunique()
    return sorted(in_splits[in_splits < frame["split"].nunique()].index)


def write(out: Path, frame: pd.DataFrame, gathered: Gathered, described: dict[str, Any], config: PrepConfig) -> None:
    """The prepared folder, whole or not at all."""
    import pandas as pd

    with folder_written_whole(out) as folder:
        frame.to_parquet(folder / "pairs.parquet", index=False)
        pairs.docstore(frame).to_parquet(folder / "docstore.parquet", index=False)
        for split in splits.SPLITS:
            view = frame[frame["split"] == split]
            named = {config.group_column: view["image_group"], "image_key": view["image_key"], "caption": view["text"]}
            pd.DataFrame(named).to_csv(folder / f"{split}_pairs_positive.csv", index=False)
        rejects = [(reject.where, reject.item, reject.reason) for reject in gathered.rejects]
        pd.DataFrame(rejects, columns=["where", "item", "reason"]).to_csv(folder / "rejects.csv", index=False)
        (folder / "data.yaml").write_text(yaml_text(described), encoding="utf-8")


def _summary(described: dict[str, Any], out: Path, dry_run: bool) -> None:
    columns = ("pairs", "pictures", "texts", "units", "classes")
    rows = [(split, *(str(described["splits"][split][column]) for column in columns)) for split in splits.SPLITS]
    rows.append(("all", *(str(described["counts"][column]) for column in columns)))
    console.table(f"{out}{' (dry run: nothing written)' if dry_run else ''}", ("split", *columns), rows)
    for warning in described["warnings"]:
        console.warn(warning)
    for reason, count in list(described["rejects"].items())[:5]:
        console.say(f"         {count} x {reason}")
    if not dry_run and described["splits"]["train"]["pairs"] > 1:
        console.hint(f"vlkit train-retrieval --data {quote(str(out))}")
