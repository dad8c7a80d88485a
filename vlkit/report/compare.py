"""Compare runs: paired differences on the same queries, no difference on other data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from vlkit.config.evaluation import EvalConfig
from vlkit.errors import UsageError
from vlkit.evaluation.captioning.caption_files import normalize_image_id, read_captions, read_other_captions
from vlkit.evaluation.captioning.score import CaptionSet, References, ScoredCaptions, compare_captions
from vlkit.evaluation.comparison import PerQueryMetrics, compare, verdict_label
from vlkit.evaluation.formatting import format_difference, format_p, metric_label
from vlkit.evaluation.results import Difference, Results, result_suffix
from vlkit.metrics import DIRECTIONS, headline_of, metric_names
from vlkit.report.load_run import LoadedRun


@dataclass(frozen=True)
class Comparison:
    """The first run compared with another one.

    Attributes:
        other: name of the other run.
        obstacle: why the two are not compared; None: they have the same queries.
        difference: group -> metric -> the first run minus the other.
        verdict, labels: group -> sentence; group -> better, worse or no difference.
    """

    other: str
    obstacle: str | None
    difference: dict[str, dict[str, Difference]]
    verdict: dict[str, str]
    labels: dict[str, str]


def compared_metrics(run: LoadedRun) -> dict[str, tuple[str, ...]]:
    """Return group of results.json -> metrics by which runs of this kind are compared."""
    groups = ("captions",) if run.is_captioner else DIRECTIONS
    return {group: metric_names(group, "comparison") for group in groups}


def compare_runs(first: LoadedRun, others: Sequence[LoadedRun], *, across_data: bool) -> list[Comparison]:
    """Compare the first run with each of the others.

    Args:
        across_data: accept runs that were evaluated on other data; they are not compared.

    Raises:
        UsageError: a run is not evaluated, or was evaluated on other data without `across_data`.
    """
    for run in (first, *others):
        if run.results is None:
            message = f"{run.run.folder} is not evaluated yet, so it cannot be compared"
            raise UsageError(message, hint=f"vlkit eval --run {run.run.folder}")
        if run.is_captioner != first.is_captioner:
            raise UsageError(f"{first.name} and {run.name} cannot be compared: only one of them writes captions")
    compare_pair = _compare_captions if first.is_captioner else _compare_queries
    comparisons = []
    for other in others:
        obstacle = _find_obstacle(first, other)
        if obstacle and not across_data:
            hint = (
                "evaluate both on the same folder with vlkit eval --data, or show them side by side with --across-data"
            )
            raise UsageError(f"{first.name} and {other.name} cannot be compared: {obstacle}", hint=hint)
        comparisons.append(Comparison(other.name, obstacle, {}, {}, {}) if obstacle else compare_pair(first, other))
    return comparisons


def _find_obstacle(first: LoadedRun, other: LoadedRun) -> str | None:
    """Return why two results cannot be compared; None: they can."""
    one, two = _results(first).data, _results(other).data
    for key, difference in (
        ("fingerprint", "different data"),
        ("split", "different splits"),
        ("limit", "different values of --limit"),
    ):
        if one.get(key) != two.get(key):
            return f"they were evaluated on {difference} ({one.get(key)} and {two.get(key)})"
    if first.is_captioner:
        return None
    if first.queries is None or other.queries is None:
        return "one of them has lost its file of queries"
    if _query_keys(first.queries) != _query_keys(other.queries):
        return "they have different queries"
    return None


def _query_keys(queries: pd.DataFrame) -> set[tuple[str, str]]:
    return set(zip(queries["direction"], queries["query_id"], strict=True))


def _compare_queries(first: LoadedRun, other: LoadedRun) -> Comparison:
    """Compare two retrieval runs query by query."""
    differences, verdicts, labels = {}, {}, {}
    assert first.queries is not None and other.queries is not None
    for direction in DIRECTIONS:
        ours, theirs = (
            queries[queries["direction"] == direction].set_index("query_id")
            for queries in (first.queries, other.queries)
        )
        theirs = theirs.loc[ours.index]
        names, headline = metric_names(direction, "comparison"), headline_of(direction)
        one, two = (PerQueryMetrics({name: rows[name].to_numpy() for name in names}) for rows in (ours, theirs))
        draws, seed = EvalConfig.draws, EvalConfig.seed
        group = compare(one, two, list(ours["unit"]), draws=draws, seed=seed, headline=headline)
        differences[direction] = group.difference
        verdicts[direction], labels[direction] = str(group.verdict), str(group.judged)
    return Comparison(other.name, None, differences, verdicts, labels)


def _compare_captions(first: LoadedRun, other: LoadedRun) -> Comparison:
    """Score again, on the same images, the captions that both runs wrote."""
    data = _results(first).data
    suffix = result_suffix(data["split"], data["limit"])
    if first.pairs is None:
        raise UsageError(f"the data that {first.name} was evaluated on cannot be read")
    rows, _ = first.pairs.positives().split(data["split"]).with_text()
    references = {normalize_image_id(image): texts for image, texts in References.from_pairs(rows).by_image.items()}
    captions = dict(read_captions(first.run.folder / f"captions{suffix}.json"))
    images = [image for image in captions if image in references]
    one, two = (
        ScoredCaptions.from_captions(CaptionSet.from_texts(images, texts, [references[image] for image in images]))
        for texts in ([captions[image] for image in images], read_other_captions(other.run.folder, images, suffix))
    )
    group = compare_captions(one, two, draws=EvalConfig.draws, seed=EvalConfig.seed)
    headline = headline_of("captions")
    change = group.difference[headline]
    label = verdict_label(change, headline)
    sentence = f"{label}: {metric_label(headline)} {format_difference(headline, change)}"
    sentence += f", p {format_p(change.p_value)}, over {len(images)} images"
    return Comparison(other.name, None, {"captions": group.difference}, {"captions": sentence}, {"captions": label})


def _results(run: LoadedRun) -> Results:
    assert run.results is not None  # `compare_runs` refuses others.
    return run.results
