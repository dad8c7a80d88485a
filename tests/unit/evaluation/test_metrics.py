"""Every metric is written once: its entry, where it is shown, and who may name it."""

import ast

from helpers import ROOT

from vlkit.metrics import DIRECTIONS, GROUPS, HEADLINES, METRICS, demandable_names, headline_of, metric_names

# The modules that compute a metric, and metrics.py. A module that shows one asks `vlkit.metrics`.
COMPUTED_IN = {
    "metrics.py",
    "evaluation/retrieval/ranking.py",
    "evaluation/retrieval/per_query.py",
    "evaluation/retrieval/classification.py",
    "evaluation/captioning/metrics.py",
    "evaluation/captioning/score.py",
    "evaluation/captioning/clipscore.py",
}
# Of an index, whose search is measured against an exact one; and "exact" is also a way of decoding.
OTHER_MEANINGS = {"recall@10": "inference/", "exact": ""}


def literals(tree):
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_only_modules_that_compute_a_metric_name_it():
    package = ROOT / "vlkit"
    naming = set()
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        named = literals(ast.parse(path.read_text(encoding="utf-8"))) & METRICS.keys()
        if {metric for metric in named if not name.startswith(OTHER_MEANINGS.get(metric, "/"))}:
            naming.add(name)
    assert naming == COMPUTED_IN


def test_every_group_has_metrics_and_one_headline():
    assert set(HEADLINES) == set(GROUPS.values())
    for group in GROUPS:
        names = metric_names(group)
        assert headline_of(group) in names and set(metric_names(group, "summary")) <= set(names)
    assert sum(metric.headline for metric in METRICS.values()) == len(HEADLINES)


def test_ranks_cannot_be_demanded():
    """The lower the better: --fail-under has no meaning for them."""
    for direction in DIRECTIONS:
        assert {"median_rank", "mean_rank"} == set(metric_names(direction)) - set(demandable_names(direction))


def test_a_share_lies_between_0_and_1():
    assert all((metric.low, metric.high) == (0, 1) for metric in METRICS.values() if metric.is_share)
