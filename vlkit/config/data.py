"""The settings of the commands that make and change data: quickstart, sample, download-coco, prep, augment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from vlkit.config.base import POSITIONAL, REPEATED, Settings
from vlkit.config.checks import require_above, require_at_least, require_between, require_known, require_range
from vlkit.errors import UsageError
from vlkit.storage import Location

# Models that vlkit makes itself.
TINY_MODELS = ("tiny-siglip", "tiny-clip")
TINY_LLM = "tiny-qwen"
# Rules for texts, in the order in which they are tried. The last three are off: CLIP and SigLIP read no case.
TEXT_RULES = (
    *("synonyms", "add-prefix", "remove-prefix", "add-suffix", "reorder", "simplify"),
    *("title-case", "lower-case", "upper-case"),
)
# Operations on pictures whose amount has a range, and what that must lie within; and those that have none.
IMAGE_OPERATION_RANGES = {
    "rotate": (-180.0, 180.0),
    "crop": (0.05, 1.0),
    "brightness": (0.0, 10.0),
    "contrast": (0.0, 10.0),
    "saturation": (0.0, 10.0),
    "low_light": (0.01, 1.0),
    "blur": (0.0, 100.0),
    "noise": (0.0, 255.0),
}
IMAGE_OPERATIONS = ("flip_horizontal", "flip_vertical", "turn", *IMAGE_OPERATION_RANGES)
RAW = Location("raw")
# How a model's pictures are made of their files; `data/images.py` says what each is worth.
Decode = Literal["exact", "fast", "reduced"]
COCO_URL = "http://images.cocodataset.org"


class CocoSplit(NamedTuple):
    """What COCO has published of one split; sizes in bytes.

    Attributes:
        archive: of the ZIP file of its pictures; unpacked they take about the same.
        captions, instances: of its annotation files, unpacked.
    """

    pictures: int
    archive: int
    captions: int
    instances: int


COCO_SPLITS = {
    "val2017": CocoSplit(5_000, 815_585_330, 3_900_000, 20_000_000),
    "train2017": CocoSplit(118_287, 19_336_861_798, 91_900_000, 449_000_000),
    "val2014": CocoSplit(40_504, 6_645_013_297, 32_500_000, 161_000_000),
    "train2014": CocoSplit(82_783, 13_510_573_713, 66_800_000, 333_000_000),
}
# One archive a year, for both splits.
COCO_ANNOTATION_BYTES = {"2017": 252_907_541, "2014": 252_872_794}


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Settings):
    """`vlkit quickstart`."""

    out: Annotated[Path, "folder for the tour"] = Path("quickstart")
    steps: Annotated[int | None, "optimizer steps (default: the tiny model's)"] = None
    seed: Annotated[int, "decides split, initial weights and order"] = 42

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps")
        require_at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """`vlkit sample`."""

    layout: Annotated[
        Literal["recipes", "agriculture", "dermatology", "persian-food", "coco"], "raw layout to write", POSITIONAL
    ]
    out: Annotated[Path, "folder to write to", POSITIONAL]
    ugly: Annotated[bool, "with what real folders have: broken, odd and misleading files and rows"] = False
    seed: Annotated[int, "same seed, same bytes"] = 42

    def __post_init__(self) -> None:
        require_at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class DownloadCocoConfig(Settings):
    """`vlkit download-coco`."""

    root: Annotated[Path, "folder that coco/ is made in"] = Path("data")
    split: Annotated[tuple[str, ...], f"what to fetch, of {', '.join(COCO_SPLITS)}"] = ("val2017",)
    instances: Annotated[bool, "the objects' annotations too: instances_<split>.json"] = False
    limit: Annotated[
        int | None, "only this many pictures of each split, fetched singly; the annotations still come whole"
    ] = None
    seed: Annotated[int, "draws the pictures of --limit; a larger limit has those of a smaller one"] = 42
    from_archive: Annotated[Path | None, "folder with the ZIP files; nothing is fetched, and they stay"] = None
    keep_archives: Annotated[bool, "keep the ZIP files, in coco/archives, after they are unpacked"] = False
    workers: Annotated[int, "pictures fetched at once where they are fetched singly"] = 8
    retries: Annotated[int, "times that a broken connection is tried again without a byte of progress"] = 5
    timeout: Annotated[float, "seconds without an answer after which a connection counts as broken"] = 30.0
    url: Annotated[str, "server, or a mirror of it"] = COCO_URL

    def __post_init__(self) -> None:
        require_known(self, "split", tuple(COCO_SPLITS))
        if not self.split:
            raise UsageError("--split is empty", hint=f"known: {', '.join(COCO_SPLITS)}")
        require_at_least(self, 1, "limit")
        require_at_least(self, 0, "seed", "retries")
        require_between(self, 1, 64, "workers")
        require_above(self, 0, "timeout")
        if not self.url.lower().startswith(("http://", "https://")) or len(self.url.split("://", 1)[1]) == 0:
            raise UsageError(f"--url {self.url!r} is not http:// or https://", hint=f"COCO's own is {COCO_URL}")
        if self.from_archive is not None and self.was_given("url"):
            raise UsageError("--from-archive fetches nothing, so --url has no use", hint="give one of them")


@dataclass(frozen=True, kw_only=True)
class PrepConfig(Settings):
    """`vlkit prep`."""

    domain: Annotated[
        str | None,
        "a shipped domain (recipes, agriculture, dermatology, persian-food, coco), or a YAML file of your own",
    ] = None
    source: Annotated[Location, "raw folder or its table; s3://bucket/prefix too"] = RAW
    out: Annotated[Location | None, "prepared folder (default: data/<domain, else source>); s3:// too"] = None
    layout: Annotated[
        Literal["auto", "table", "class-folders", "json-folders", "text-files", "coco"],
        "how the raw folder is laid out; auto: by what is in it",
    ] = "auto"
    table: Annotated[str | None, "name of the table in the raw folder (default: the only one)"] = None
    image_root: Annotated[Location | None, "folder that picture names are relative to (default: the source)"] = None
    image_column: Annotated[str | None, "column that names the pictures (default: image, file_name, ...)"] = None
    text_column: Annotated[
        tuple[str, ...], "columns that become texts, each value a text of its own (default: caption, text, ...)"
    ] = ()
    group_column: Annotated[str | None, "column whose equal values match: recipe, product (default: classes)"] = None
    label_column: Annotated[
        tuple[str, ...], "column of classes, a|b for several; or several columns of 0 and 1 (default: label, ...)"
    ] = ()
    unit_column: Annotated[
        str | None, "column whose equal values stay in one split: patient, plant (default: the group, else picture)"
    ] = None
    templates: Annotated[
        tuple[str, ...], "captions made from {class_name} and other columns; give it again for more", REPEATED
    ] = ("a photo of {class_name}",)
    templates_for: Annotated[Literal["missing", "all"], "which rows get them: those without a text, or all"] = "missing"
    script: Annotated[Literal["any", "persian"], "persian: unify letters that are written in two ways"] = "any"
    min_words: Annotated[int | None, "leave out texts of fewer words"] = None
    max_words: Annotated[int | None, "leave out texts of more words"] = None
    min_side: Annotated[int, "leave out pictures whose shorter side has fewer pixels"] = 8
    near_duplicates: Annotated[
        int, "pictures whose perceptual hashes differ in at most this many of 256 bits stay in one split; -1: off"
    ] = 28
    on_conflict: Annotated[
        Literal["keep", "drop", "first"], "one picture under two classes: has both, is left out, or has the first"
    ] = "keep"
    split_by: Annotated[Literal["seed", "source"], "draw the splits, or keep the source's own"] = "seed"
    test_share: Annotated[float, "share of the units held out for the test"] = 0.1
    val_share: Annotated[float, "share of the units that remain after the test, held out for validation"] = 0.1
    stratify: Annotated[bool, "split every class in the same shares; without classes, every repeated text"] = True
    oversample_below: Annotated[int | None, "classes of fewer training pictures get a weight that lifts them"] = None
    check_images: Annotated[bool, "read every picture; without, ids are hashes of names, and copies are not found"] = (
        True
    )
    rehash: Annotated[bool, "read pictures again that have not changed since the last time"] = False
    copy_images: Annotated[bool | None, "copy the pictures into the prepared folder (default: into a bucket only)"] = (
        None
    )
    training_view: Annotated[str | None, "name of one more CSV, of the training rows only"] = None
    model: Annotated[str | None, "whose tokenizer counts texts that are too long (default: the domain's model)"] = None
    workers: Annotated[int | None, "processes that read pictures (default: one a core)"] = None
    limit: Annotated[int | None, "keep about this many pairs (whole units, drawn by the seed)"] = None
    seed: Annotated[int, "decides the split"] = 42

    def __post_init__(self) -> None:
        require_between(self, 0.0, 0.9, "test_share", "val_share")
        require_at_least(self, 0, "seed")
        require_between(self, -1, 64, "near_duplicates")
        require_at_least(self, 1, "limit", "min_words", "max_words", "min_side", "oversample_below", "workers")
        for template in self.templates:
            if not re.search(r"\{\w+\}", template):
                told = f"the template {template!r} would caption every class alike: it has no {{class_name}}"
                raise UsageError(told, hint='for example: --templates "a photo of {class_name}, a type of leaf"')
        if self.min_words and self.max_words and self.min_words > self.max_words:
            raise UsageError(f"--min-words {self.min_words} is more than --max-words {self.max_words}")
        view = self.training_view
        if view is not None and (Path(view).name != view or not view.endswith(".csv") or "pairs_positive" in view):
            raise UsageError(f"--training-view {view!r}: give the name of a CSV file of its own, such as mine.csv")


@dataclass(frozen=True, kw_only=True)
class AugmentRows(Settings):
    """What augment adds: how many rows, and how texts and negatives come about."""

    data: Annotated[Location | None, "prepared folder (default: the only one under data/); s3:// too"] = None
    pictures: Annotated[int, "variants of each training picture: as epochs 0, 1, ... of training see it"] = 1
    texts: Annotated[int, "variants of the text of each training pair, at most"] = 1
    negatives_per_positive: Annotated[int, "texts that do not match, for the picture of every training row"] = 1
    hard: Annotated[
        str | None, "model or run whose text embeddings choose the nearest wrong texts (default: at random)"
    ] = None
    preview: Annotated[int | None, "only draw this many originals with their variants: augment_preview.png"] = None
    format: Annotated[
        Literal["png", "jpeg", "webp"], "of the pictures that are written; jpeg loses a little and takes a fifth"
    ] = "png"
    text_rules: Annotated[tuple[str, ...], f"rules that are on, of {', '.join(TEXT_RULES)}"] = TEXT_RULES[:6]
    synonyms: Annotated[
        tuple[str, ...], "what may stand for a word: 'crispy = crunchy, crackling'; give it again for more", REPEATED
    ] = ()
    prefixes: Annotated[tuple[str, ...], "what may stand before a title"] = ()
    suffixes: Annotated[tuple[str, ...], "what may stand after a title"] = ()
    leading: Annotated[
        tuple[str, ...], "first words of a title that may follow it: banana, of Banana French Toast"
    ] = ()
    compounds: Annotated[tuple[str, ...], "second words that belong to the first: bread, of Banana Bread Pudding"] = ()
    workers: Annotated[int | None, "processes that draw pictures (default: one a core)"] = None


@dataclass(frozen=True, kw_only=True)
class ImageAugmentSettings(Settings):
    """How pictures are varied, written (augment) or during training (train-retrieval --augment).

    Each operation has a probability, and most a range that its amount is drawn from.
    """

    forbid: Annotated[tuple[str, ...], "operations that would lie here, as the domain says"] = ()
    flip_horizontal: Annotated[float, "probability that left and right change places"] = 0.5
    flip_vertical: Annotated[float, "probability that a picture is turned upside down, as in a mirror"] = 0.05
    turn: Annotated[float, "probability of a turn by 90, 180 or 270 degrees"] = 0.05
    rotate: Annotated[float, "probability of a rotation"] = 0.3
    rotate_range: Annotated[tuple[float, float], "degrees, counter-clockwise"] = (-25.0, 25.0)
    crop: Annotated[float, "probability of a crop, brought back to the size of the whole"] = 0.3
    crop_range: Annotated[tuple[float, float], "share of both sides that stays"] = (0.7, 0.9)
    brightness: Annotated[float, "probability of another brightness"] = 0.3
    brightness_range: Annotated[tuple[float, float], "factor"] = (0.7, 1.3)
    contrast: Annotated[float, "probability of another contrast"] = 0.3
    contrast_range: Annotated[tuple[float, float], "factor"] = (0.7, 1.3)
    saturation: Annotated[float, "probability of other colours' strength"] = 0.3
    saturation_range: Annotated[tuple[float, float], "factor"] = (0.6, 1.4)
    low_light: Annotated[float, "probability of a picture as in the dusk"] = 0.0
    low_light_range: Annotated[tuple[float, float], "share of the light that is left"] = (0.25, 0.55)
    blur: Annotated[float, "probability of Gaussian blur"] = 0.1
    blur_range: Annotated[tuple[float, float], "radius (standard deviation) in pixels"] = (0.5, 2.0)
    noise: Annotated[float, "probability of Gaussian noise"] = 0.1
    noise_range: Annotated[tuple[float, float], "standard deviation, of 255"] = (15.0, 35.0)
    max_side: Annotated[int, "longer pictures are brought to this many pixels first"] = 640
    seed: Annotated[int, "decides every variation and every choice"] = 42

    def __post_init__(self) -> None:
        require_between(self, 0.0, 1.0, *IMAGE_OPERATIONS)
        require_at_least(self, 0, "seed")
        require_at_least(self, 16, "max_side")
        for name, (low, high) in IMAGE_OPERATION_RANGES.items():
            require_range(self, low, high, f"{name}_range")
        require_known(self, "forbid", IMAGE_OPERATIONS)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(ImageAugmentSettings, AugmentRows):
    """`vlkit augment`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "pictures", "texts", "negatives_per_positive")
        require_at_least(self, 1, "workers")
        require_between(self, 1, 100, "preview")
        require_known(self, "text_rules", TEXT_RULES)
        if self.hard in TINY_MODELS:
            told = f"--hard {self.hard}: an untrained model does not know what is near"
            raise UsageError(told, hint="a run that trained it does: --hard runs/NAME")
        parse_synonyms(self.synonyms)


def parse_synonyms(lines: tuple[str, ...]) -> dict[str, list[str]]:
    """`crispy = crunchy, crackling` -> {"crispy": ["crunchy", "crackling"]}, in lower case on the left.

    Raises:
        UsageError: a line is not of this form.
    """
    found: dict[str, list[str]] = {}
    for line in lines:
        word, _, others = line.partition("=")
        listed = [other.strip() for other in others.split(",") if other.strip()]
        if not word.strip() or not listed:
            raise UsageError(f"the synonym {line!r} is not of the form: crispy = crunchy, crackling")
        found.setdefault(word.strip().lower(), []).extend(listed)
    return found
