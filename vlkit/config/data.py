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
# Tokens that published models of a family read, by a part of their name: for `prep`, which loads no model.
TEXT_LIMITS = {"siglip": 64, "clip": 77}
# Rules that vary texts, in the order in which they are tried. The last three are off: CLIP and SigLIP ignore case.
TEXT_RULES = (
    *("synonyms", "add-prefix", "remove-prefix", "add-suffix", "reorder", "simplify"),
    *("title-case", "lower-case", "upper-case"),
)
# Operations on images whose amount has a range, and the limits of that range; then all operations. Append only: an
# operation draws random numbers by its index (`data/augment/image_ops.py`).
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
# How image files are decoded for a model; see `data/images/decode.py`.
Decode = Literal["exact", "fast", "reduced"]
COCO_URL = "http://images.cocodataset.org"


class CocoSplit(NamedTuple):
    """What COCO has published of one split; sizes in bytes.

    Attributes:
        images: number of images.
        archive: size of the ZIP file of the images; unpacked they take about as much.
        captions, instances: sizes of the annotation files, unpacked.
    """

    images: int
    archive: int
    captions: int
    instances: int


COCO_SPLITS = {
    "val2017": CocoSplit(5_000, 815_585_330, 3_900_000, 20_000_000),
    "train2017": CocoSplit(118_287, 19_336_861_798, 91_900_000, 449_000_000),
    "val2014": CocoSplit(40_504, 6_645_013_297, 32_500_000, 161_000_000),
    "train2014": CocoSplit(82_783, 13_510_573_713, 66_800_000, 333_000_000),
}
# One archive per year, for both splits.
COCO_ANNOTATION_BYTES = {"2017": 252_907_541, "2014": 252_872_794}


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Settings):
    """`vlkit quickstart`."""

    out: Annotated[Path, "folder to write to"] = Path("quickstart")
    steps: Annotated[int | None, "optimizer steps (default: the tiny model's)"] = None
    seed: Annotated[int, "seed of split, initial weights and order"] = 42

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
    ugly: Annotated[bool, "add what real folders have: broken, odd and misleading files and rows"] = False
    seed: Annotated[int, "seed of the data: the same seed writes the same bytes"] = 42

    def __post_init__(self) -> None:
        require_at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class DownloadCocoConfig(Settings):
    """`vlkit download-coco`."""

    root: Annotated[Path, "folder that gets coco/"] = Path("data")
    split: Annotated[tuple[str, ...], f"splits to download: {', '.join(COCO_SPLITS)}"] = ("val2017",)
    instances: Annotated[bool, "also download the objects' annotations: instances_<split>.json"] = False
    limit: Annotated[
        int | None, "only this many images of each split, one by one; the annotations are always complete"
    ] = None
    seed: Annotated[int, "seed that draws the images of --limit; a larger limit includes those of a smaller one"] = 42
    from_archive: Annotated[Path | None, "folder with the ZIP files: read them, download nothing"] = None
    keep_archives: Annotated[bool, "keep the ZIP files in coco/archives after unpacking"] = False
    workers: Annotated[int, "images downloaded at once with --limit"] = 8
    retries: Annotated[int, "attempts to reconnect without a byte of progress"] = 5
    timeout: Annotated[float, "seconds without an answer after which a connection is broken"] = 30.0
    url: Annotated[str, "server: COCO's, or a mirror"] = COCO_URL

    def __post_init__(self) -> None:
        require_known(self, "split", tuple(COCO_SPLITS))
        if not self.split:
            raise UsageError("--split is empty", hint=f"choose from {', '.join(COCO_SPLITS)}")
        require_at_least(self, 1, "limit")
        require_at_least(self, 0, "seed", "retries")
        require_between(self, 1, 64, "workers")
        require_above(self, 0, "timeout")
        if not self.url.lower().startswith(("http://", "https://")) or len(self.url.split("://", 1)[1]) == 0:
            raise UsageError(f"--url {self.url!r} is not http:// or https://", hint=f"COCO's server is {COCO_URL}")
        if self.from_archive is not None and self.was_given("url"):
            raise UsageError(
                "--url has no effect with --from-archive, which downloads nothing", hint="give one of them"
            )


@dataclass(frozen=True, kw_only=True)
class PrepConfig(Settings):
    """`vlkit prep`."""

    domain: Annotated[
        str | None,
        "preset: recipes, agriculture, dermatology, persian-food, coco, or a YAML file of your own",
    ] = None
    source: Annotated[Location, "raw folder or its table; s3://bucket/prefix too"] = RAW
    out: Annotated[Location | None, "prepared folder (default: data/<domain, else source>); s3:// too"] = None
    layout: Annotated[
        Literal["auto", "table", "class-folders", "json-folders", "text-files", "coco"],
        "layout of the raw folder; auto: detect it",
    ] = "auto"
    table: Annotated[str | None, "table in the raw folder (default: the only one)"] = None
    image_root: Annotated[Location | None, "folder that image names are relative to (default: the source)"] = None
    image_column: Annotated[str | None, "column of image names (default: image, file_name, ...)"] = None
    text_column: Annotated[
        tuple[str, ...], "columns of texts; every value becomes one text (default: caption, text, ...)"
    ] = ()
    group_column: Annotated[str | None, "column whose equal values match: recipe, product (default: classes)"] = None
    label_column: Annotated[
        tuple[str, ...], "column of classes, a|b for several; or several 0/1 columns (default: label, ...)"
    ] = ()
    unit_column: Annotated[
        str | None, "column whose equal values stay in one split: patient, plant (default: group, else image)"
    ] = None
    templates: Annotated[
        tuple[str, ...], "captions built from {class_name} and other columns; repeat for more", REPEATED
    ] = ("a photo of {class_name}",)
    templates_for: Annotated[
        Literal["missing", "all"], "rows that get template captions: those without a text, or all"
    ] = "missing"
    script: Annotated[Literal["any", "persian"], "persian: unify letters with two spellings"] = "any"
    min_words: Annotated[int | None, "reject texts of fewer words"] = None
    max_words: Annotated[int | None, "reject texts of more words"] = None
    min_side: Annotated[int, "reject images whose shorter side has fewer pixels"] = 8
    near_duplicates: Annotated[
        int, "keep images in one split if their perceptual hashes differ in at most this many of 256 bits; -1: off"
    ] = 28
    on_conflict: Annotated[
        Literal["keep", "drop", "first"], "an image with two classes: keep both, reject the image, or keep the first"
    ] = "keep"
    split_by: Annotated[Literal["seed", "source"], "draw the splits by the seed, or keep the source's"] = "seed"
    test_share: Annotated[float, "share of the units held out for test"] = 0.1
    val_share: Annotated[float, "share of the remaining units held out for validation"] = 0.1
    stratify: Annotated[bool, "split every class by the same shares; without classes, every repeated text"] = True
    oversample_below: Annotated[int | None, "give rows of classes with fewer training images a higher weight"] = None
    check_images: Annotated[bool, "read every image; without, ids are hashes of names, and copies stay undetected"] = (
        True
    )
    rehash: Annotated[bool, "read images again that have not changed since the last prep"] = False
    copy_images: Annotated[bool | None, "copy the images into the prepared folder (default: only into a bucket)"] = None
    training_view: Annotated[str | None, "also write the training rows to a CSV of this name"] = None
    model: Annotated[str | None, "model whose tokenizer counts texts that are too long (default: the domain's)"] = None
    workers: Annotated[int | None, "processes that read images (default: one per core)"] = None
    limit: Annotated[int | None, "keep about this many pairs (whole units, drawn by the seed)"] = None
    seed: Annotated[int, "seed of the split"] = 42

    def __post_init__(self) -> None:
        require_between(self, 0.0, 0.9, "test_share", "val_share")
        require_at_least(self, 0, "seed")
        require_between(self, -1, 64, "near_duplicates")
        require_at_least(self, 1, "limit", "min_words", "max_words", "min_side", "oversample_below", "workers")
        for template in self.templates:
            if not re.search(r"\{\w+\}", template):
                message = f"the template {template!r} names no column, so all its captions would be equal"
                raise UsageError(message, hint='for example: --templates "a photo of {class_name}, a type of leaf"')
        if self.min_words and self.max_words and self.min_words > self.max_words:
            raise UsageError(f"--min-words {self.min_words} is more than --max-words {self.max_words}")
        view = self.training_view
        if view is not None and (Path(view).name != view or not view.endswith(".csv") or "pairs_positive" in view):
            raise UsageError(
                f"--training-view {view!r} is not the name of a new CSV file", hint="for example: mine.csv"
            )


@dataclass(frozen=True, kw_only=True)
class AugmentRows(Settings):
    """How many rows augment adds, and how it makes texts and negatives."""

    data: Annotated[Location | None, "prepared folder (default: the only one under data/); s3:// too"] = None
    pictures: Annotated[int, "variants of each training image: the ones of epochs 0, 1, ... of training"] = 1
    texts: Annotated[int, "maximum variants of the text of each training pair"] = 1
    negatives_per_positive: Annotated[int, "non-matching texts for the image of every training row"] = 1
    hard: Annotated[
        str | None, "model or run whose embeddings choose the nearest non-matching texts (default: random ones)"
    ] = None
    preview: Annotated[int | None, "only draw this many images with their variants: augment_preview.png"] = None
    format: Annotated[
        Literal["png", "jpeg", "webp"], "format of the written images; jpeg is lossy and a fifth of the size"
    ] = "png"
    text_rules: Annotated[tuple[str, ...], f"rules that vary texts: {', '.join(TEXT_RULES)}"] = TEXT_RULES[:6]
    synonyms: Annotated[
        tuple[str, ...], "replacements of a word: 'crispy = crunchy, crackling'; repeat for more", REPEATED
    ] = ()
    prefixes: Annotated[tuple[str, ...], "phrases to put before a title"] = ()
    suffixes: Annotated[tuple[str, ...], "phrases to put after a title"] = ()
    leading: Annotated[
        tuple[str, ...], "first words that may move to a title's end: banana, of Banana French Toast"
    ] = ()
    compounds: Annotated[tuple[str, ...], "second words that move with the first: bread, of Banana Bread Pudding"] = ()
    workers: Annotated[int | None, "processes that render images (default: one per core)"] = None


@dataclass(frozen=True, kw_only=True)
class ImageAugmentSettings(Settings):
    """How images are varied, by augment or during training (train-retrieval --augment).

    Every operation has a probability, and most have a range that their amount is drawn from.
    """

    forbid: Annotated[tuple[str, ...], "operations that would falsify the images, as the domain says"] = ()
    flip_horizontal: Annotated[float, "probability of a left-right flip"] = 0.5
    flip_vertical: Annotated[float, "probability of an upside-down flip"] = 0.05
    turn: Annotated[float, "probability of a turn by 90, 180 or 270 degrees"] = 0.05
    rotate: Annotated[float, "probability of a rotation"] = 0.3
    rotate_range: Annotated[tuple[float, float], "degrees, counter-clockwise"] = (-25.0, 25.0)
    crop: Annotated[float, "probability of a crop, resized to the original size"] = 0.3
    crop_range: Annotated[tuple[float, float], "share of both sides that is kept"] = (0.7, 0.9)
    brightness: Annotated[float, "probability of a change of brightness"] = 0.3
    brightness_range: Annotated[tuple[float, float], "factor"] = (0.7, 1.3)
    contrast: Annotated[float, "probability of a change of contrast"] = 0.3
    contrast_range: Annotated[tuple[float, float], "factor"] = (0.7, 1.3)
    saturation: Annotated[float, "probability of a change of saturation"] = 0.3
    saturation_range: Annotated[tuple[float, float], "factor"] = (0.6, 1.4)
    low_light: Annotated[float, "probability of low light, as at dusk"] = 0.0
    low_light_range: Annotated[tuple[float, float], "share of the light that remains"] = (0.25, 0.55)
    blur: Annotated[float, "probability of Gaussian blur"] = 0.1
    blur_range: Annotated[tuple[float, float], "radius (standard deviation) in pixels"] = (0.5, 2.0)
    noise: Annotated[float, "probability of Gaussian noise"] = 0.1
    noise_range: Annotated[tuple[float, float], "standard deviation, on a scale of 255"] = (15.0, 35.0)
    max_side: Annotated[int, "first shrink larger images to this many pixels on the longer side"] = 640
    seed: Annotated[int, "seed of all variations and choices"] = 42

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
            message = f"--hard {self.hard}: the embeddings of an untrained model say nothing"
            raise UsageError(message, hint="give a run that trained it: --hard runs/NAME")
        parse_synonyms(self.synonyms)


def parse_synonyms(lines: tuple[str, ...]) -> dict[str, list[str]]:
    """Parse `crispy = crunchy, crackling` into {"crispy": ["crunchy", "crackling"]}, the word in lower case.

    Raises:
        UsageError: a line is not of this form.
    """
    synonyms: dict[str, list[str]] = {}
    for line in lines:
        word, _, others = line.partition("=")
        replacements = [other.strip() for other in others.split(",") if other.strip()]
        if not word.strip() or not replacements:
            raise UsageError(f"the synonym {line!r} is not of the form: crispy = crunchy, crackling")
        synonyms.setdefault(word.strip().lower(), []).extend(replacements)
    return synonyms
