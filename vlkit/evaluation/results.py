"""results.json as objects: what eval measured of a model, written and read in one place.

The keys of the file are a contract; `Results.to_dict` is their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlkit.errors import ArtifactError, QualityError, UsageError
from vlkit.evaluation.json_codec import WrongKeyError, decode, encode
from vlkit.metrics import DIRECTIONS, HEADLINES
from vlkit.runs import Run
from vlkit.storage import json_text, refuse_unwritable, write_text

# Counts up when a section of results.json changes its meaning.
SCHEMA = 1
# The parts of a group, as results.json has them: part -> group -> metric.
PARTS = ("metrics", "intervals", "units", "baseline", "baseline_intervals", "difference", "smallest_difference")
MEASURE_AGAIN = "measure again: vlkit eval"
RECALL = {"key": HEADLINES["retrieval"]}

Interval = tuple[float, float]
Values = dict[str, float]


@dataclass(frozen=True)
class Difference:
    """A number less another one, with its interval.

    Attributes:
        p_value: of a paired test; None: no test is made of it.
    """

    value: float
    low: float
    high: float
    p_value: float | None = None

    @property
    def interval(self) -> Interval:
        """Its ends."""
        return self.low, self.high

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Group:
    """The numbers of one direction, of the classes, or of captions.

    Attributes:
        metrics: metric -> value; and counts, such as queries and gallery.
        intervals: metric -> 95 % interval.
        units: metric -> how many units it is a mean of.
        baseline, baseline_intervals: the same of the other model; empty without one.
        difference: metric -> the first model less the other.
        smallest_difference: metric -> about the smallest difference that the units could have shown.
        judged: better, worse or no difference, by the headline metric.
        verdict: the same as a sentence with its numbers.
    """

    metrics: Values
    intervals: dict[str, Interval]
    units: dict[str, int] = field(default_factory=dict)
    baseline: Values = field(default_factory=dict)
    baseline_intervals: dict[str, Interval] = field(default_factory=dict)
    difference: dict[str, Difference] = field(default_factory=dict)
    smallest_difference: Values = field(default_factory=dict)
    judged: str | None = None
    verdict: str | None = None

    @property
    def names(self) -> list[str]:
        """The metrics that have an interval, in their order; counts have none."""
        return [name for name in self.metrics if name in self.intervals]


@dataclass(frozen=True)
class Slice:
    """Recall on a part of the queries.

    Attributes:
        gap: to the rest of the queries; None where either side has too few units.
    """

    queries: int
    units: int
    gap: Difference | None
    recall: float = field(metadata=RECALL)
    interval: Interval
    baseline: float | None = None
    baseline_interval: Interval | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class CorruptedRecall:
    """Recall of one direction under a corruption of the images; `change` is its difference to the plain images."""

    recall: float = field(metadata=RECALL)
    interval: Interval
    change: Difference
    baseline: float | None = None
    baseline_interval: Interval | None = None
    baseline_change: Difference | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class Corruption:
    """A corruption: what it does, and recall under it."""

    stated: str
    text_to_image: CorruptedRecall
    image_to_text: CorruptedRecall

    def of_direction(self, direction: str) -> CorruptedRecall:
        """Return the recall of a direction."""
        return self.text_to_image if direction == "text_to_image" else self.image_to_text


@dataclass(frozen=True)
class OneToOne:
    """Scores that count only a row's own partner: direction -> metric -> value.

    Attributes:
        rows, total: rows that were scored, of how many.
        ceiling: direction -> recall@1 of a perfect model.
    """

    rows: int
    total: int | None = field(metadata={"key": "of"})
    ceiling: Values
    metrics: dict[str, Values]
    baseline: dict[str, Values] | None = None


@dataclass(frozen=True)
class Folds:
    """Means over folds of `size` images: direction -> metric -> value."""

    size: int
    folds: int
    metrics: dict[str, Values]
    baseline: dict[str, Values] | None = None


@dataclass(frozen=True)
class ClassRow:
    """A class: training and test images; and of each model precision, recall, f1, average precision and recall@1."""

    training: int
    images: int = field(metadata={"key": "pictures"})
    tuned: dict[str, float | None]
    base: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Retention:
    """The guard set's numbers.

    Attributes:
        data: path and fingerprint of the guard set.
        retained: share of the untouched model's recall@1 that the tuned one has; None if unknown.
    """

    data: dict[str, Any]
    retained: float | None
    groups: dict[str, Group]


@dataclass(frozen=True)
class Efficiency:
    """The cost of a dual encoder: speeds and latency on this machine, time and memory of its training."""

    images_per_second: float | None
    texts_per_second: float | None
    latency_ms: float | None
    latency_ms_p95: float | None
    peak_memory_gb: float | None
    peak_memory_process_gb: float | None
    peak_memory_gpu_gb: float | None
    train_seconds: float | None
    train_peak_memory_process_gb: float | None
    train_peak_memory_gpu_gb: float | None
    trainable_parameters: int | None
    total_parameters: int | None


@dataclass(frozen=True)
class CaptioningEfficiency:
    """The cost of a captioner."""

    captions_per_second: float | None
    peak_memory_gb: float | None
    train_seconds: float | None
    trainable_parameters: int | None
    total_parameters: int | None


@dataclass(frozen=True)
class ImageReliance:
    """Loss of captions in nats a token, with their own image, another one, and a blank one.

    Attributes:
        shuffled: None with fewer than two images.
    """

    right: float
    shuffled: float | None
    blank: float

    def to_dict(self) -> dict[str, float | None]:
        """Return it as JSON has it."""
        return {"right": self.right, "shuffled": self.shuffled, "blank": self.blank}


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that eval measured of a model.

    Attributes:
        task: retrieval or captioning.
        data: path, split, fingerprint, limit and rows; of captions from files their paths.
        groups: name of the group (see `metrics.GROUPS`) -> its numbers.
        classes, prompts: class -> its row, its prompts. confusion: "classes", "tuned", "base".
        curves: direction -> model -> recall at k, and how many queries have which rank.
        slices: slicing -> slice -> direction -> recall.
        queries: file and hash of the table of all queries.
        compared_with: the captions of the baseline; blank_caption: the caption of a blank image.
        examples: worst and best captions.
    """

    task: str
    model: str
    data: dict[str, Any]
    groups: dict[str, Group]
    image_reliance: ImageReliance | None = None
    classes: dict[str, ClassRow] | None = None
    confusion: dict[str, Any] | None = None
    prompts: dict[str, list[str]] | None = None
    one_to_one: OneToOne | None = None
    folds: Folds | None = None
    curves: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    slices: dict[str, dict[str, dict[str, Slice]]] = field(default_factory=dict)
    shifts: dict[str, Corruption] = field(default_factory=dict)
    retention: Retention | None = None
    compared_with: str | None = None
    clip_model: str | None = None
    blank_caption: str | None = None
    diversity: dict[str, float] | None = None
    examples: dict[str, list[dict[str, Any]]] | None = None
    efficiency: Efficiency | CaptioningEfficiency | None = None
    queries: dict[str, str] | None = None

    @classmethod
    def read(cls, path: Path) -> Results | None:
        """Read results.json; None if absent or empty.

        Raises:
            ArtifactError: it is damaged or of another schema; names the file and the key.
        """
        raw = Run(path.parent).read_json(path.name)
        return cls.from_dict(raw, path) if raw else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], path: Path) -> Results:
        """Build from JSON.

        Args:
            path: of the file, for messages.

        Raises:
            ArtifactError: see `read`.
        """
        if raw.get("schema") != SCHEMA:
            message = f"{path} has schema {raw.get('schema')!r}; this vlkit reads {SCHEMA}"
            raise ArtifactError(message, hint="measure again with this version: vlkit eval")
        try:
            return cls(**_sections(raw))
        except WrongKeyError as error:
            raise ArtifactError(f"{path} is damaged: {error.problem}", hint=MEASURE_AGAIN) from None

    def to_dict(self) -> dict[str, Any]:
        """Return results.json, its keys in order."""
        retrieval = self.task == "retrieval"
        parts = _encode_groups(self.groups, verdicts=retrieval)
        if self.image_reliance is not None:
            parts["metrics"]["looking"] = self.image_reliance.to_dict()
        sections = {name: encode(getattr(self, name)) for name in ("classes", "confusion", "prompts")}
        if retrieval:
            retention = self.retention
            sections |= {
                **{name: encode(getattr(self, name)) or {} for name in ("one_to_one", "folds", "curves", "slices")},
                "shifts": encode(self.shifts),
                "retention": {}
                if retention is None
                else {
                    "data": retention.data,
                    "retained": retention.retained,
                    **_encode_groups(retention.groups, verdicts=True),
                },
            }
        last = ("compared_with", "clip_model", "blank_caption", "diversity", "examples", "efficiency", "queries")
        sections |= {name: encode(getattr(self, name)) for name in last}
        return {
            "schema": SCHEMA,
            "task": self.task,
            "model": self.model,
            "data": self.data,
            **parts,
            **{name: section for name, section in sections.items() if section is not None},
        }

    def write(self, path: Path) -> None:
        """Write results.json, whole or not at all."""
        write_text(path, json_text(self.to_dict(), indent=2) + "\n")

    def check_fail_under(self, demands: Iterable[tuple[str, str, float]]) -> None:
        """Compare with what --fail-under demands.

        Args:
            demands: group, metric and the least value.

        Raises:
            QualityError: names what is below.
        """
        missed = []
        for group, metric, least in demands:
            value = self.groups[group].metrics.get(metric) if group in self.groups else None
            if value is None or not value >= least:
                missed.append(f"{group}.{metric} is {_describe(value, group)}, {least:g} was demanded")
        if missed:
            raise QualityError("; ".join(missed))


def _describe(value: float | None, group: str) -> str:
    if value is not None and value == value:
        return f"{value:.4f}"
    return "not measured: too few of these rows have classes" if group == "classification" else "not measured"


def _encode_groups(groups: Mapping[str, Group], *, verdicts: bool) -> dict[str, Any]:
    """Return part -> group -> metric -> number; with verdicts every part, else those that are not empty."""
    parts: dict[str, Any] = {
        part: {name: encode(getattr(group, part)) for name, group in groups.items() if getattr(group, part)}
        for part in PARTS
    }
    if not verdicts:
        return {part: values for part, values in parts.items() if values}
    parts["judged"] = {name: group.judged for name, group in groups.items() if group.judged is not None}
    parts["verdict"] = {name: group.verdict for name, group in groups.items() if group.verdict is not None}
    return parts


def _decode_groups(raw: Mapping[str, Any], names: Iterable[str], key: str = "") -> dict[str, Group]:
    """Build the groups of these names, and of the others that there are.

    Raises:
        WrongKeyError: one has no metrics or no intervals.
    """
    for part in (*PARTS, "judged", "verdict"):
        decode(dict[str, Any] | None, raw.get(part), f"{key}{part}")
    metrics = decode(dict[str, Any], raw.get("metrics"), f"{key}metrics")
    groups = {}
    for name in dict.fromkeys((*names, *(name for name in metrics if name != "looking"))):
        group = {part: (raw.get(part) or {}).get(name) for part in (*PARTS, "judged", "verdict")}
        for part in ("metrics", "intervals"):
            if not isinstance(group[part], dict):
                raise WrongKeyError(f"it has no {key}{part}.{name}")
        known = {part: values for part, values in group.items() if values is not None}
        try:
            groups[name] = decode(Group, known)
        except WrongKeyError as error:
            raise WrongKeyError(f"{key}{error.problem} (in {name})") from None
    return groups


def _sections(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Decode the fields of `Results`."""
    for name in ("metrics", "intervals", "data"):
        if not isinstance(raw.get(name), dict):
            raise WrongKeyError(f"it has no {name}")
    captioning = raw.get("task") == "captioning"
    groups = _decode_groups(raw, ("captions",) if captioning else DIRECTIONS)
    for name in ("task", "model"):
        if not raw.get(name):
            raise WrongKeyError(f"it has no {name}")
    retention = None
    if raw.get("retention"):
        guard = raw["retention"]
        data = decode(dict[str, Any], guard.get("data"), "retention.data")
        retained = decode(float | None, guard.get("retained"), "retention.retained")
        retention = Retention(data, retained, _decode_groups(guard, DIRECTIONS, "retention."))
    kinds: dict[str, Any] = {
        "classes": dict[str, ClassRow] | None,
        "confusion": dict[str, Any] | None,
        "prompts": dict[str, list[str]] | None,
        "one_to_one": OneToOne | None,
        "folds": Folds | None,
        "curves": dict[str, dict[str, dict[str, Any]]],
        "slices": dict[str, dict[str, dict[str, Slice]]],
        "shifts": dict[str, Corruption],
        "compared_with": str | None,
        "clip_model": str | None,
        "blank_caption": str | None,
        "diversity": dict[str, float] | None,
        "examples": dict[str, list[dict[str, Any]]] | None,
        "efficiency": (CaptioningEfficiency if captioning else Efficiency) | None,
        "queries": dict[str, str] | None,
    }
    return {
        "task": raw["task"],
        "model": raw["model"],
        "data": raw["data"],
        "groups": groups,
        "image_reliance": decode(ImageReliance | None, raw["metrics"].get("looking"), "metrics.looking"),
        "retention": retention,
        **{name: decode(kind, raw[name], name) for name, kind in kinds.items() if name in raw},
    }


def result_suffix(split: str, limit: int | None) -> str:
    """Return what files of results end in: nothing for the whole test split; another, or a part, has its own files."""
    return ("" if split == "test" else f"-{split}") + (f"-limit{limit}" if limit else "")


def check_out_folder(out: Path, run: Run | None) -> None:
    """Refuse, before any work is done, a folder that cannot be written, and the folder of another run.

    Raises:
        UsageError: names the folder.
    """
    refuse_unwritable(out, "--out")
    if Run(out).started and not (run and out.resolve() == run.folder.resolve()):
        raise UsageError(f"--out {out} is the folder of a run, which keeps its own results", hint="give another folder")
