"""The settings of the commands that measure and show: eval, report, runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vlkit.config.base import REPEATED, Settings
from vlkit.config.checks import require_at_least, require_cache, require_known
from vlkit.config.data import Decode
from vlkit.errors import UsageError, suggest_name
from vlkit.storage import Location

# Of results.json: counts up when a section changes its meaning.
SCHEMA = 1
from vlkit.metrics import DIRECTIONS

# What eval measures, by the groups of results.json.
RANKED = (
    "recall@1",
    "recall@5",
    "recall@10",
    "mrr",
    "map",
    "fraction_recall@1",
    "fraction_recall@5",
    "fraction_recall@10",
)
CLASSIFIED = ("accuracy", "top1_of_10", "precision_macro", "recall_macro", "f1_macro", "average_precision_macro")
CAPTIONED = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "exact", "clipscore", "refclipscore")
MEASURES = {**dict.fromkeys(DIRECTIONS, RANKED), "classification": CLASSIFIED, "captions": CAPTIONED}
# Classes of fewer training pictures are rare.
RARE = 50
SHIFTS = ("low-light", "blur", "jpeg", "rotate")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings):
    """`vlkit eval`."""

    run: Annotated[Path | None, "run folder to measure"] = None
    model: Annotated[str | None, "instead of --run: a model as it is, with --data and --out"] = None
    captions: Annotated[
        Path | None, "instead of --run: captions of any captioner, a COCO results file, scored as COCO does"
    ] = None
    references: Annotated[Path | None, "with --captions: a COCO annotation file"] = None
    against: Annotated[
        Path | None, "of captions: another captioner's, a run that was measured or a COCO results file: the difference"
    ] = None
    clip_model: Annotated[
        str | None, "of captions: CLIPScore and RefCLIPScore by this model, such as openai/clip-vit-base-patch32"
    ] = None
    images: Annotated[Path | None, "with --captions and --clip-model: folder of the pictures"] = None
    num_beams: Annotated[int, "of captions that a run writes; 1: greedy"] = 1
    samples: Annotated[int, "of captions: how many to print"] = 8
    data: Annotated[Location | None, "prepared folder (default: the run's); s3:// too"] = None
    out: Annotated[Location | None, "folder for the results (default: the run's); s3:// too"] = None
    split: Annotated[Literal["train", "val", "test"], "rows to measure on"] = "test"
    limit: Annotated[int | None, "measure on about this many rows, drawn by the seed"] = None
    batch_size: Annotated[int, "pictures or texts encoded at a time"] = 64
    precision: Annotated[Literal["bf16", "fp16", "fp32"] | None, "of the encoders (default: the run's)"] = None
    decode: Annotated[Decode | None, "how pictures are read (default: as the run read them; of a model fast)"] = None
    slice_by: Annotated[tuple[str, ...], "columns of the table whose values are compared, beside the usual slices"] = ()
    shift: Annotated[tuple[str, ...], f"measure under corruptions, too: {', '.join(SHIFTS)}"] = ()
    guard: Annotated[Location | None, "prepared folder of a general kind: what has been forgotten of it"] = None
    templates: Annotated[
        tuple[str, ...],
        "prompts for the classes, {class_name} in each (default: prep's); give it again for more",
        REPEATED,
    ] = ()
    fold_size: Annotated[
        int | None,
        "pictures a fold: scores averaged over folds of this many, beside the whole (default: 1000 where there are "
        "2000 pictures or more of several captions each, as in COCO; 0: none)",
    ] = None
    fail_under: Annotated[
        tuple[str, ...],
        "exit with 8 where a metric is below: text_to_image.recall@5=0.6; give it again for more",
        REPEATED,
    ] = ()
    cache: Annotated[
        str,
        "keep the untouched model's embeddings, so that they are paid once: off, auto (~/.cache/vlkit), or a folder",
    ] = "auto"
    draws: Annotated[int, "bootstrap draws behind an interval"] = 2000
    seed: Annotated[int, "of the draws and of --limit"] = 42

    def __post_init__(self) -> None:
        require_at_least(self, 1, "limit", "batch_size", "num_beams")
        require_at_least(self, 0, "fold_size", "samples")
        require_at_least(self, 1000, "draws")
        require_cache(self.cache)
        require_known(self, "shift", SHIFTS)
        if (self.captions is None) != (self.references is None):
            raise UsageError("--captions and --references belong together: what was said, and what people say")
        if self.captions is not None:
            beside = {"captions", "references", "against", "clip_model", "images", "decode", "batch_size", "samples"}
            beside |= {"out", "fail_under", "draws", "seed"}
            if (self.clip_model is None) != (self.images is None):
                raise UsageError("--clip-model and --images belong together: who judges, and the pictures")
            for name in self.fields().keys() - beside:
                if self.was_given(name):
                    raise UsageError(f"--captions are scored by themselves: leave out {self.fields()[name].flag}")
        if self.captions is not None:
            self.refuse_unmeasured("captioning")
        if self.captions is None and (self.run is None) == (self.model is None):
            raise UsageError("eval measures a run or a model: give --run RUN, or --model M --data DIR --out DIR")
        if self.model is not None and (self.data is None or self.out is None):
            raise UsageError("eval --model needs --data DIR and --out DIR")

    def refuse_unmeasured(self, task: str) -> None:
        """Refuse what is asked for and is not measured of this kind of model.

        Args:
            task: retrieval or captioning.
        """
        for name in OF_CAPTIONS if task == "retrieval" else OF_RETRIEVAL:
            if self.was_given(name):
                raise UsageError(f"{self.fields()[name].flag} is not for a model of {task}")
        for group, metric, _ in demanded(self.fail_under):
            if (group == "captions") != (task == "captioning"):
                raise UsageError(f"--fail-under {group}.{metric}: this is not measured here")


# What of EvalConfig is about captions alone, and about retrieval alone.
OF_CAPTIONS = {"against", "clip_model", "images", "num_beams", "samples"}
OF_RETRIEVAL = {"slice_by", "shift", "guard", "templates", "fold_size", "cache"}


def suffix_of(split: str, limit: int | None) -> str:
    """What files of results end in: nothing for the whole test split; another, or a part, has files of its own."""
    return ("" if split == "test" else f"-{split}") + (f"-limit{limit}" if limit else "")


def demanded(lines: tuple[str, ...]) -> list[tuple[str, str, float]]:
    """`text_to_image.recall@5=0.6` -> ("text_to_image", "recall@5", 0.6).

    Raises:
        UsageError: no such metric, or no number.
    """
    found = []
    for line in lines:
        name, _, number = line.partition("=")
        group, _, metric = name.strip().partition(".")
        if group not in MEASURES:
            raise UsageError(f"--fail-under {line}: unknown {group!r}", hint=suggest_name(group, MEASURES))
        if metric not in MEASURES[group]:
            raise UsageError(f"--fail-under {line}: unknown {metric!r}", hint=suggest_name(metric, MEASURES[group]))
        try:
            least = float(number)
        except ValueError:
            raise UsageError(f"--fail-under {line}: after = stands the least value, such as 0.6") from None
        most = {"cider": 10, "clipscore": 2.5, "refclipscore": 2.5}.get(metric, 1)
        if not 0 <= least <= most:
            raise UsageError(f"--fail-under {line}: this metric lies between 0 and {most}")
        found.append((group, metric, least))
    return found


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
