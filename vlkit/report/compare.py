"""Runs beside each other: on the same queries the paired difference, on other data none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vlkit.config.evaluation import EvalConfig, suffix_of
from vlkit.errors import UsageError
from vlkit.evaluation.captioning.score import (
    CaptionSet,
    References,
    ScoredCaptions,
    compare_captions,
    normalize_image_id,
    read_captions,
    read_other_captions,
)
from vlkit.evaluation.comparison import PerQueryMetrics, compare, format_p, verdict, verdict_label
from vlkit.metrics import DIRECTIONS
from vlkit.report.load_run import LoadedRun

METRICS = ("recall@1", "recall@5", "recall@10", "mrr")
OF_CAPTIONS = ("bleu_4", "rouge_l", "cider", "exact")


@dataclass(frozen=True)
class Comparison:
    """The first run against another one.

    Attributes:
        other: its name.
        apart: why nothing is subtracted; None: the queries are the same.
        difference: direction -> metric -> {"value", "low", "high", "p_value"}: the first less the other.
        verdict, judged: direction -> sentence, and better, worse or no difference.
    """

    other: str
    apart: str | None
    difference: dict[str, dict[str, Any]]
    verdict: dict[str, str]
    judged: dict[str, str]


def groups_of(run: LoadedRun) -> dict[str, tuple[str, ...]]:
    """What runs of this kind are compared in: group of results.json -> metrics."""
    return {"captions": OF_CAPTIONS} if run.captions else dict.fromkeys(DIRECTIONS, METRICS)


def compared(first: LoadedRun, others: Sequence[LoadedRun], *, across_data: bool) -> list[Comparison]:
    """Each of the others against the first.

    Args:
        across_data: show runs that were measured on other data, too.

    Raises:
        UsageError: one was not measured, or on other data and that was not asked for.
    """
    for run in (first, *others):
        if not run.results:
            told = f"{run.run.folder} was not measured, so there is nothing to compare"
            raise UsageError(told, hint=f"vlkit eval --run {run.run.folder}")
        if run.captions != first.captions:
            raise UsageError(f"{first.name} and {run.name} cannot be compared: only one of them writes captions")
    paired = _paired_captions if first.captions else _paired
    found = []
    for other in others:
        apart = _apart(first, other)
        if apart and not across_data:
            hint = "measure both on the same folder (vlkit eval --data), or --across-data shows them side by side"
            raise UsageError(f"{first.name} and {other.name} cannot be compared: {apart}", hint=hint)
        found.append(Comparison(other.name, apart, {}, {}, {}) if apart else paired(first, other))
    return found


def _apart(first: LoadedRun, other: LoadedRun) -> str | None:
    """Why two results are about different things; None: they are not."""
    one, two = first.results["data"], other.results["data"]
    for key, what in (("fingerprint", "different data"), ("split", "different splits"), ("limit", "another --limit")):
        if one.get(key) != two.get(key):
            return f"they were measured on {what} ({one.get(key)} and {two.get(key)})"
    if first.captions:
        return None
    if first.queries is None or other.queries is None:
        return "the file of the queries is gone for one of them"
    if _keys(first.queries) != _keys(other.queries):
        return "their queries are not the same"
    return None


def _keys(queries: pd.DataFrame) -> set[tuple[str, str]]:
    return set(zip(queries["direction"], queries["query_id"], strict=True))


def _paired(first: LoadedRun, other: LoadedRun) -> Comparison:
    differences, verdicts = {}, {}
    assert first.queries is not None and other.queries is not None
    for direction in DIRECTIONS:
        ours, theirs = (of[of["direction"] == direction].set_index("query_id") for of in (first.queries, other.queries))
        theirs = theirs.loc[ours.index]
        one, two = (PerQueryMetrics({name: of[name].to_numpy() for name in METRICS}) for of in (ours, theirs))
        how = {"draws": EvalConfig.draws, "seed": EvalConfig.seed}
        found = compare(one, two, list(ours["unit"]), **how)
        differences[direction] = found["difference"]
        smallest = found["smallest_difference"]["recall@1"]
        verdicts[direction] = verdict(found["difference"]["recall@1"], ours["unit"].nunique(), smallest)
    judgements = {direction: verdict_label(of["recall@1"]) for direction, of in differences.items()}
    return Comparison(other.name, None, differences, verdicts, judgements)


def _paired_captions(first: LoadedRun, other: LoadedRun) -> Comparison:
    """The captions that both wrote of the same pictures, scored anew."""
    data = first.results["data"]
    suffix = suffix_of(data["split"], data["limit"])
    if first.pairs is None:
        raise UsageError(f"the data that {first.name} was measured on is not to be read")
    asked, _ = first.pairs.positives().split(data["split"]).with_text()
    told = {normalize_image_id(image): texts for image, texts in References.from_pairs(asked).of_image.items()}
    written = dict(read_captions(first.run.folder / f"captions{suffix}.json"))
    images = [image for image in written if image in told]
    references = [told[image] for image in images]
    one, two = (
        ScoredCaptions.from_captions(CaptionSet.from_texts(images, texts, references))
        for texts in ([written[image] for image in images], read_other_captions(other.run.folder, images, suffix))
    )
    found = compare_captions(one, two, draws=EvalConfig.draws, seed=EvalConfig.seed)
    change = found["difference"]["captions"]["cider"]
    better = verdict_label(change)
    sentence = f"{better}: CIDEr {change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}], "
    sentence += f"p {format_p(change['p_value'])}, over {len(images)} pictures"
    return Comparison(other.name, None, found["difference"], {"captions": sentence}, {"captions": better})
