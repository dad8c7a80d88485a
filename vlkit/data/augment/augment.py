"""augment: more pictures, more phrasings and honest negatives for the training rows of a prepared folder.

New rows stand behind the old ones, which stay as they are. What an earlier augmentation added goes first: running it
twice changes nothing, and asking for no row at all undoes it. Validation and test rows stay as they are; they are
looked at, so that no new phrasing equals one of theirs and no negative matches by them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from vlkit import console
from vlkit.config.base import yaml_text
from vlkit.config.data import AugmentConfig
from vlkit.data import captions, pairs, splits
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.augment.negatives import EmbedTexts, NegativeSampler
from vlkit.data.augment.render import RenderJob, WrittenImage, encode_image, render_images
from vlkit.data.augment.text_variants import TextVariants
from vlkit.data.pairs import AUGMENTED_FOLDER, COPIED_IMAGE, NEGATIVES_VIEW, Pairs, read_pairs
from vlkit.errors import DataError, ResourceError, UsageError
from vlkit.remote import MANIFEST, ZONE_TABLES, Remote, local_folder, tables_location
from vlkit.storage import Location, atomic_update, refuse_unwritable

if TYPE_CHECKING:
    import pandas as pd

NEW = ("augmented pictures", "augmented texts", "negatives")
WRITTEN = ("pairs.parquet", "data.yaml", AUGMENTED_FOLDER, NEGATIVES_VIEW)
WORD_LISTS = ("synonyms", "prefixes", "suffixes", "leading", "compounds")
TRIED = 12  # pictures that are drawn to forecast the size of all


def augment(
    config: AugmentConfig, *, dry_run: bool = False, embed_of: Callable[[str], EmbedTexts] | None = None
) -> dict[str, Any]:
    """Run `vlkit augment`.

    Args:
        embed_of: model or run -> how it embeds texts; needed for --hard alone.

    Returns:
        Counts of the new rows and of what was left out, as --json prints them.

    Raises:
        DataError: the folder has no training rows, or a picture is gone.
        ResourceError: the pictures would not fit on the disk.
    """
    work = Augmentation(config)
    if config.preview is not None:
        from vlkit.data.augment.preview import write_preview

        return write_preview(work, None if dry_run else _embed(config, embed_of), dry_run=dry_run)
    wanted = work.wanted()
    disk_gb, embed = _forecast(wanted, work), _embed(config, embed_of)
    if dry_run:
        return _tell(work.counts(wanted, embed), work, config, disk_gb, dry_run=True)
    if config.data.is_remote:
        counts = _write_remote(work, wanted, embed)
    else:
        with atomic_update(config.data.path, without=WRITTEN) as folder:
            counts = _write(folder, folder / AUGMENTED_FOLDER, work, wanted, embed)
    return _tell(counts, work, config, disk_gb)


def _embed(config: AugmentConfig, embed_of: Callable[[str], EmbedTexts] | None) -> EmbedTexts | None:
    if config.hard is None or config.negatives_per_positive == 0:
        return None
    assert embed_of is not None, "--hard needs a model"
    return embed_of(config.hard)


class Augmentation:
    """The rows of a prepared folder, and those that are added to them.

    Attributes:
        prepared: the folder as it is read, an earlier augmentation included.
        old: its rows without that.
        training: the matching ones of them that are trained on.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self.prepared = _read(config.data)
        self.old = _without_earlier(self.prepared)
        self.group = pairs.group_name(self.old, self.prepared.metadata.get("settings", {}).get("group_column"))
        self.matching = self.old[self.old["match"] == 1]
        self.training = self.matching[self.matching["split"] == "train"].reset_index(drop=True)
        if not len(self.training):
            raise DataError(
                f"{config.data} has no training rows", hint="prep with smaller --test-share and --val-share"
            )
        held_out = self.old.loc[self.old["split"] != "train", "text"]
        self.augmenter, self.phrasings = ImageAugmenter.from_settings(config), TextVariants(self.matching, config, held_out)
        self.short = self.asked = 0

    def paths(self, rows: pd.DataFrame) -> list[Path]:
        """Where the pictures of these rows lie."""
        return Pairs(rows, self.prepared.folder, self.prepared.metadata).image_paths(rows)

    def wanted(self) -> list[tuple[str, int]]:
        """The pictures to draw, (image id, epoch): epoch 0, 1, ... of each, but for those that leave it as it is."""
        epochs = range(self.config.pictures)
        ids = self.training["image_id"].unique().tolist()
        return [(image_id, epoch) for image_id in ids for epoch in epochs if self.augmenter.chosen_operations(epoch, image_id)]

    def jobs(self, wanted: Sequence[tuple[str, int]]) -> list[RenderJob]:
        """The same with the files to draw from; remote ones are fetched."""
        needed = self.training.drop_duplicates("image_id")
        needed = needed[needed["image_id"].isin({image_id for image_id, _ in wanted})]
        path_of = dict(zip(needed["image_id"], self.paths(needed), strict=True))
        return [RenderJob(path_of[image_id], image_id, epoch) for image_id, epoch in wanted]

    def new_rows(self, drawn: Mapping[tuple[str, int], WrittenImage], embed: EmbedTexts | None) -> dict[str, pd.DataFrame]:
        """The new rows by kind, in the order of NEW.

        Args:
            drawn: (image id, epoch) -> the picture that was written.
        """
        import pandas as pd

        taken = set(self.old["pair_id"])
        found = [_unseen(self._picture_rows(drawn), taken), _unseen(self._text_rows(), taken)]
        positives = pd.concat([self.training.assign(source_pair_id=None), *found], ignore_index=True)
        found.append(_unseen(self._negative_rows(positives, embed), taken))
        return dict(zip(NEW, found, strict=True))

    def counts(self, wanted: Sequence[tuple[str, int]], embed: EmbedTexts | None) -> dict[str, int]:
        """How many rows of each kind there would be, without drawing a picture: as if no two came out the same."""
        drawn = {each: WrittenImage(name="", image_id="-".join(map(str, each)), width=0, height=0) for each in wanted}
        return {kind: len(rows) for kind, rows in self.new_rows(drawn, embed).items()}

    def _picture_rows(self, drawn: Mapping[tuple[str, int], WrittenImage]) -> pd.DataFrame:
        """Every training row with each variant of its picture."""
        chosen = [
            (row, drawn[image_id, epoch])
            for row, image_id in enumerate(self.training["image_id"])
            for epoch in range(self.config.pictures)
            if (image_id, epoch) in drawn
        ]
        names = [f"{AUGMENTED_FOLDER}/{each.name}" for _, each in chosen]
        changed = {"image": names, "image_id": [each.image_id for _, each in chosen], "image_key": names}
        changed |= {"width": [each.width for _, each in chosen], "height": [each.height for _, each in chosen]}
        changed["image_looks"] = [""] * len(chosen)  # Not compared: it looks like its original on purpose.
        return self._made([row for row, _ in chosen], "augmented", changed)

    def _text_rows(self) -> pd.DataFrame:
        """Every training row with variants of its text."""
        named = zip(self.training["pair_id"], self.training["text_id"], strict=True)
        chosen = [(row, text) for row, pair in enumerate(named) for text in self.phrasings.of_pair(*pair)]
        texts = [text for _, text in chosen]
        changed = {"text": texts, "text_id": [captions.text_id(text) for text in texts]}
        return self._made([row for row, _ in chosen], "augmented", changed)

    def negatives(self, positives: pd.DataFrame, embed: EmbedTexts | None) -> NegativeSampler:
        """What chooses wrong texts for the pictures of these training rows."""
        import pandas as pd

        rows = pd.concat([self.matching[self.matching["split"] != "train"], positives], ignore_index=True)
        return NegativeSampler(rows, self.phrasings.folded, self.config.seed, embed)

    def _negative_rows(self, positives: pd.DataFrame, embed: EmbedTexts | None) -> pd.DataFrame:
        """Every positive row's picture with texts that do not match it."""
        count, negatives = self.config.negatives_per_positive, self.negatives(positives, embed)
        text_of = dict(zip(self.training["pair_id"], self.training["text_id"], strict=True))
        original = positives["source_pair_id"].where(positives["source_pair_id"].notna(), positives["pair_id"])
        asked = zip(positives["pair_id"], positives["image_id"], original, strict=True)
        chosen = [
            (row, wrong)
            for row, (pair, image_id, source) in enumerate(asked)
            for wrong in negatives.choose(pair, image_id, text_of[source], count)
        ]
        self.short, self.asked = negatives.short, len(positives)
        first = self.training.drop_duplicates("text_id")
        group_of = dict(zip(first["text_id"], first["text_group"], strict=True))
        changed = {name: [getattr(wrong, name) for _, wrong in chosen] for name in ("text", "text_id")}
        changed["text_group"] = [group_of[wrong.text_id] for _, wrong in chosen]
        changed["match"] = [0] * len(chosen)
        return self._made([row for row, _ in chosen], "negative", changed, positives)

    def _made(
        self, rows: list[int], origin: str, changed: Mapping[str, list[Any]], source: pd.DataFrame | None = None
    ) -> pd.DataFrame:
        """Copies of rows with some columns changed, an id of their own, and the id of what they were made from."""
        source = self.training if source is None else source
        made = source.iloc[rows].reset_index(drop=True)
        made["source_pair_id"] = made["pair_id"]
        for name, values in changed.items():
            if name in made:
                made[name] = values
        made["origin"] = origin
        named = ("image_id", "text_id", "image_group", "text_group", "unit")
        made["pair_id"] = [pairs.pair_id(*row) for row in zip(*(made[name] for name in named), strict=True)]
        return made


def _unseen(rows: pd.DataFrame, taken: set[str]) -> pd.DataFrame:
    """The rows that are not there yet; they are from now on."""
    fresh = []
    for pair in rows["pair_id"]:
        fresh.append(pair not in taken)
        taken.add(pair)
    return rows[fresh].reset_index(drop=True)


def _read(data: Location) -> Pairs:
    """A prepared folder; another table of pairs has no place for new pictures and rows.

    Raises:
        UsageError: there is none, it cannot be written, or it holds files of somebody else's under augment's names.
    """
    if data.is_remote:
        names = [name for name in Remote(data).listing() if name.startswith(f"{AUGMENTED_FOLDER}/")]
        return _refuse_foreign(read_pairs(data), data, names)
    if not data.path.exists():
        return read_pairs(data)
    if not (data.path / "pairs.parquet").is_file():
        told = f"{data} holds no pairs.parquet: augment adds to a folder that prep wrote"
        raise UsageError(told, hint="turn a raw folder into one: vlkit prep --source RAW --out data/NAME")
    refuse_unwritable(data.path.resolve().parent, "--data")
    found = read_pairs(data)
    names = [path.relative_to(data.path).as_posix() for path in sorted((data.path / AUGMENTED_FOLDER).rglob("*"))]
    if (data.path / NEGATIVES_VIEW).exists() and not found.metadata.get("augmentation"):
        names.append(NEGATIVES_VIEW)
    return _refuse_foreign(found, data, names)


def _refuse_foreign(found: Pairs, data: Location, names: list[str]) -> Pairs:
    """Refuse files of somebody else's where augment's are replaced. Returns the folder."""
    if odd := [name for name in names if not COPIED_IMAGE.fullmatch(name)]:
        told = f"{data / odd[0]} is not augment's, which would replace it"
        raise UsageError(told, hint="move it out of the way")
    return found


def _without_earlier(prepared: Pairs) -> pd.DataFrame:
    """The rows of a prepared folder but for those that an earlier augmentation added."""
    frame = prepared.frame
    if prepared.metadata.get("augmentation"):
        added = frame["origin"].isin(["augmented", "negative"]) & frame["source_pair_id"].notna()
        frame = frame[~added].drop(columns="source_pair_id")
    return frame.reset_index(drop=True)


def _forecast(wanted: Sequence[tuple[str, int]], work: Augmentation) -> float:
    """Gigabytes of the pictures, from a few of them.

    Raises:
        ResourceError: they would not fit.
    """
    config = work.config
    tried = sorted(wanted, key=lambda each: splits.hash_order(config.seed, f"{each[0]} {each[1]}"))[:TRIED]
    if not tried:
        return 0.0
    sizes = [len(encode_image(job, work.augmenter, config.format)[0]) for job in work.jobs(tried)]
    needed = len(wanted) * sum(sizes) / len(sizes)
    where = Path(tempfile.gettempdir()) if config.data.is_remote else config.data.path
    free = shutil.disk_usage(where).free
    if needed > 0.95 * free:
        told = (
            f"{len(wanted)} pictures need about {needed / 2**30:.1f} GB, {free / 2**30:.1f} GB are free under {where}"
        )
        raise ResourceError(told, hint="a smaller --pictures or --max-side, or train-retrieval --augment")
    return needed / 2**30


def _write(
    folder: Path, drawings: Path, work: Augmentation, wanted: Sequence[tuple[str, int]], embed: EmbedTexts | None
) -> dict[str, int]:
    """The new tables into `folder`, the pictures into `drawings`. Returns the number of rows of each kind."""
    import pandas as pd

    config, jobs = work.config, work.jobs(wanted)
    drawn: dict[tuple[str, int], WrittenImage] = {}
    if jobs:
        drawings.mkdir()
    with console.progress("drawing pictures", len(jobs)) as bar:
        for job, written in render_images(jobs, work.augmenter, drawings, form=config.format, workers=config.workers):
            drawn[job.image_id, job.epoch] = written
            bar.update(len(drawn))
    rows = work.new_rows(drawn, embed)
    added = [each for each in rows.values() if len(each)]
    old = work.old.assign(source_pair_id=None) if added else work.old
    frame = pairs.validate_rows(pd.concat([old, *added], ignore_index=True), str(config.data))
    splits.refuse_leaks(frame, str(config.data))
    frame.to_parquet(folder / "pairs.parquet", index=False)
    counts = {kind: len(each) for kind, each in rows.items()}
    described = {key: value for key, value in work.prepared.metadata.items() if key != "augmentation"}
    if added:
        pairs.view(frame[frame["split"] == "train"], work.group, label=True).to_csv(
            folder / NEGATIVES_VIEW, index=False
        )
        described["augmentation"] = {
            "rows": counts,
            "left_out": dict(work.phrasings.dropped),
            "fingerprint": pairs.fingerprint(pd.concat(added, ignore_index=True)),
            "settings": {
                key: value for key, value in config.to_dict().items() if key not in ("data", "preview", "workers")
            },
        }
    (folder / "data.yaml").write_text(yaml_text(described), encoding="utf-8")
    return counts


def _write_remote(work: Augmentation, wanted: Sequence[tuple[str, int]], embed: EmbedTexts | None) -> dict[str, int]:
    """The same for a folder behind a URL: readers have the old rows and pictures until the new manifest stands."""
    config = work.config
    with tempfile.TemporaryDirectory() as aside:
        tables, drawings = Path(aside) / "tables", Path(aside) / AUGMENTED_FOLDER
        tables.mkdir()
        counts = _write(tables, drawings, work, wanted, embed)
        mirrored = local_folder(config.data)
        before = mirrored / ZONE_TABLES if config.data.is_bucket else mirrored
        files = {path.name: path for path in sorted(before.iterdir()) if path.name not in WRITTEN}
        files |= {path.name: path for path in sorted(tables.iterdir())}
        new = {f"{AUGMENTED_FOLDER}/{path.name}": path for path in sorted(drawings.glob("*"))}
        pictures = Remote(config.data)
        pictures.upload(new)
        Remote(tables_location(config.data)).replace(files, MANIFEST)
        there = pictures.listing()
        stale = [name for name in there if name.startswith(f"{AUGMENTED_FOLDER}/") and name not in new]
        pictures.remove([name for name in stale if COPIED_IMAGE.fullmatch(name)])
    return counts


def _tell(
    counts: Mapping[str, int], work: Augmentation, config: AugmentConfig, disk_gb: float, *, dry_run: bool = False
) -> dict[str, Any]:
    """Say what was added and what was left out. Returns the same for --json."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    console.print_result(f"{len(work.training)} training rows {'would get' if dry_run else 'and'} {kinds}: {config.data}")
    for reason, count in work.phrasings.dropped.items():
        console.say(f"{count} phrasings left out: {reason}")
    if config.texts and config.text_rules and not counts["augmented texts"]:
        lists = ", ".join(name for name in WORD_LISTS if getattr(config, name)) or "none at all"
        console.say(f"no rule gave another phrasing of these texts; word lists: {lists}")
    if work.short:
        told = f"{work.short} of {work.asked} rows, new ones included, got fewer negatives than asked for"
        console.warn(f"{told}: no other text is wrong for their pictures")
    if dry_run:
        console.say(f"disk about {disk_gb:.2f} GB")
    elif any(counts.values()):
        console.hint(f"vlkit train-retrieval --data {quote(str(config.data))}")
    return {
        "data": str(config.data),
        "training_rows": len(work.training),
        "added": dict(counts),
        "left_out": dict(work.phrasings.dropped),
        "short_of_negatives": work.short,
        "disk_gb": round(disk_gb, 4),
        "dry_run": dry_run,
        **({"settings": config.to_dict()} if dry_run else {}),
    }
