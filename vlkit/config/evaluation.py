"""The settings of the commands that measure and show: eval, report, runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from vlkit.config.base import REPEATED, Field, Settings
from vlkit.config.checks import require_at_least, require_cache, require_known
from vlkit.config.data import Decode
from vlkit.errors import UsageError, suggest_name
from vlkit.metrics import DIRECTIONS, GROUPS, METRICS, demandable_names
from vlkit.storage import Location

# Classes of fewer training images are rare.
RARE = 50
SHIFTS = ("low-light", "blur", "jpeg", "rotate")


@dataclass(frozen=True, kw_only=True)
class ResultSettings(Settings):
    """The settings of every kind of evaluation.

    Attributes:
        groups: the groups of results.json that this kind measures.
        subject: what it measures, for messages.
    """

    groups: ClassVar[tuple[str, ...]] = tuple(GROUPS)
    subject: ClassVar[str] = ""

    out: Annotated[Location | None, "folder for the results (default: the run's); s3:// too"] = None
    batch_size: Annotated[int, "images or texts encoded at a time"] = 64
    decode: Annotated[Decode | None, "how images are read (default: as the run read them; of a model fast)"] = None
    fail_under: Annotated[
        tuple[str, ...],
        "exit with 8 where a metric is below: text_to_image.recall@5=0.6; give it again for more",
        REPEATED,
    ] = ()
    draws: Annotated[int, "bootstrap draws for each interval"] = 2000
    seed: Annotated[int, "of the draws and of --limit"] = 42

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 1000, "draws")

    @property
    def demands(self) -> list[tuple[str, str, float]]:
        """Group, metric and least value of each --fail-under."""
        return [parse_demand(line) for line in self.fail_under]


@dataclass(frozen=True, kw_only=True)
class RunSettings(ResultSettings):
    """The settings of whatever measures a run on rows of a prepared folder."""

    run: Annotated[Path | None, "run folder to measure"] = None
    data: Annotated[Location | None, "prepared folder (default: the run's); s3:// too"] = None
    split: Annotated[Literal["train", "val", "test"], "rows to measure on"] = "test"
    limit: Annotated[int | None, "measure on about this many rows, drawn by the seed"] = None
    precision: Annotated[Literal["bf16", "fp16", "fp32"] | None, "of the encoders (default: the run's)"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "limit")


@dataclass(frozen=True, kw_only=True)
class EvalRetrievalConfig(RunSettings):
    """`vlkit eval` of a dual encoder: of a run, or of a model as it is."""

    groups: ClassVar[tuple[str, ...]] = (*DIRECTIONS, "classification")
    subject: ClassVar[str] = "a dual encoder"

    model: Annotated[str | None, "instead of --run: a model as it is, with --data and --out"] = None
    slice_by: Annotated[tuple[str, ...], "columns of the table to slice by, beside the usual slices"] = ()
    shift: Annotated[tuple[str, ...], f"measure under corruptions, too: {', '.join(SHIFTS)}"] = ()
    guard: Annotated[Location | None, "prepared folder of a general kind: measure what was forgotten of it"] = None
    templates: Annotated[
        tuple[str, ...],
        "prompts for the classes, {class_name} in each (default: prep's); give it again for more",
        REPEATED,
    ] = ()
    fold_size: Annotated[
        int | None,
        "images a fold: mean scores over folds of this many, beside the whole (default: 1000 from 2000 images of "
        "several captions each on, as in COCO; 0: none)",
    ] = None
    cache: Annotated[
        str, "keep the untouched model's embeddings for the next evaluation: off, auto (~/.cache/vlkit), or a folder"
    ] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "fold_size")
        require_cache(self.cache)
        require_known(self, "shift", SHIFTS)
        if self.model is not None and (self.data is None or self.out is None):
            raise UsageError("eval --model needs --data DIR and --out DIR")


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(ResultSettings):
    """The settings of whatever scores captions."""

    groups: ClassVar[tuple[str, ...]] = ("captions",)

    against: Annotated[
        Path | None, "of captions: a measured run or a COCO results file, whose captions are the baseline"
    ] = None
    clip_model: Annotated[
        str | None, "of captions: CLIPScore and RefCLIPScore by this model, such as openai/clip-vit-base-patch32"
    ] = None
    samples: Annotated[int, "of captions: how many to print"] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "samples")


@dataclass(frozen=True, kw_only=True)
class EvalCaptionerConfig(CaptionSettings, RunSettings):
    """`vlkit eval` of a run that writes captions."""

    subject: ClassVar[str] = "a captioner"

    num_beams: Annotated[int, "of captions that a run writes; 1: greedy"] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "num_beams")


@dataclass(frozen=True, kw_only=True)
class EvalCaptionsConfig(CaptionSettings):
    """`vlkit eval` of captions from a file, whoever wrote them."""

    subject: ClassVar[str] = "captions from a file"

    captions: Annotated[
        Path | None, "instead of --run: captions of any captioner, a COCO results file, scored as COCO does"
    ] = None
    references: Annotated[Path | None, "with --captions: a COCO annotation file"] = None
    images: Annotated[Path | None, "with --captions and --clip-model: folder of the images"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.captions is not None and self.references is None:
            raise UsageError("--captions needs --references FILE", hint="give the COCO annotation file of the images")
        if self.references is not None and self.captions is None:
            raise UsageError("--references needs --captions FILE", hint="give the COCO results file to score")
        if self.captions is not None and self.clip_model is not None and self.images is None:
            raise UsageError("--clip-model needs --images DIR", hint="give the folder of the captioned images")
        if self.captions is not None and self.images is not None and self.clip_model is None:
            hint = "for example --clip-model openai/clip-vit-base-patch32"
            raise UsageError("--images needs --clip-model MODEL, which scores them", hint=hint)


C = TypeVar("C", bound=ResultSettings)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EvalCaptionsConfig, EvalCaptionerConfig, EvalRetrievalConfig):
    """`vlkit eval`: every flag of the command. `narrow` gives the settings of what is measured."""

    groups: ClassVar[tuple[str, ...]] = tuple(GROUPS)
    subject: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.captions is None and (self.run is None) == (self.model is None):
            raise UsageError("eval measures a run or a model: give --run RUN, or --model M --data DIR --out DIR")

    @classmethod
    def fields(cls) -> dict[str, Field]:
        """Return name -> Field: the settings of one kind first, those of every kind last."""
        shared, declared = ResultSettings.fields(), super().fields()
        return {name: field for name, field in declared.items() if name not in shared} | shared

    def narrow(self, kind: type[C]) -> C:
        """Return the settings of one kind of evaluation.

        Raises:
            UsageError: a setting was given that this kind does not have, or a metric demanded that it does not measure.
        """
        own = kind.fields()
        for name, field in self.fields().items():
            if name not in own and self.was_given(name):
                hint = f"leave out {field.flag}"
                if name == "against":
                    hint = f"compare runs with: vlkit report --run {self.run or 'RUN'} --against {self.against}"
                raise UsageError(f"{field.flag} does not apply to {kind.subject}", hint=hint)
        for group, metric, _ in self.demands:
            if group not in kind.groups:
                raise UsageError(f"--fail-under {group}.{metric}: this is not measured here")
        given = None if self.given is None else self.given & own.keys()
        return kind(given=given, **{name: getattr(self, name) for name in own})


def parse_demand(line: str) -> tuple[str, str, float]:
    """Parse a value of --fail-under: text_to_image.recall@5=0.6 -> ("text_to_image", "recall@5", 0.6).

    Raises:
        UsageError: no such metric, or no number in its range.
    """
    name, _, number = line.partition("=")
    group, _, metric = name.strip().partition(".")
    if group not in GROUPS:
        raise UsageError(f"--fail-under {line}: unknown {group!r}", hint=suggest_name(group, GROUPS))
    known = demandable_names(group)
    if metric not in known:
        raise UsageError(f"--fail-under {line}: unknown {metric!r}", hint=suggest_name(metric, known))
    try:
        least = float(number)
    except ValueError:
        raise UsageError(f"--fail-under {line}: a number must follow the =, such as 0.6") from None
    low, high = METRICS[metric].low, METRICS[metric].high
    if not (low <= least and (high is None or least <= high)):
        raise UsageError(f"--fail-under {line}: this metric lies between {low:g} and {high:g}")
    return group, metric, least


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """`vlkit report`."""

    run: Annotated[Path, "run folder, or the folder of the results of eval --model"]
    against: Annotated[
        tuple[str, ...], "another run, compared on the same queries; give it again for more", REPEATED
    ] = ()
    across_data: Annotated[bool, "show runs that were measured on other data, too; nothing is subtracted then"] = False
    out: Annotated[Path | None, "folder for report.html and plots/ (default: the run's)"] = None
    queries: Annotated[int, "queries in each gallery"] = 4

    def __post_init__(self) -> None:
        require_at_least(self, 0, "queries")


@dataclass(frozen=True, kw_only=True)
class RunsConfig(Settings):
    """`vlkit runs`."""

    runs_dir: Annotated[Path, "folder of the runs"] = Path("runs")
