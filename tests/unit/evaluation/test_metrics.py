"""Every metric is written once: its entry, where it is shown, and who may name it."""

import ast
import re

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
    # A template shows recall in tables of its own: folds, one-to-one pairs, classes.
    "report/templates/page.html.j2",
}
# Of an index, whose search is measured against an exact one; and "exact" is also a way of decoding.
OTHER_MEANINGS = {"recall@10": "inference/", "exact": ""}
PACKAGE = ROOT / "vlkit"
TEMPLATES = sorted(PACKAGE.glob("report/templates/*.j2"))


def pattern_of(node):
    """Return a regular expression of what a text is, whose unknown parts are numbers: f"recall@{k}", "bleu_" + n."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pattern_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern_of(node.left) + pattern_of(node.right)
    return r"\d*"


def metrics_in_python(source):
    """Return the metrics that strings, f-strings and sums of them name."""
    nodes = list(ast.walk(ast.parse(source)))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
    patterns = {pattern_of(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.BinOp)}
    return {metric for metric in METRICS if metric in texts or any(re.fullmatch(text, metric) for text in patterns)}


def subscripts(template):
    """Return the regular expressions of the names that a template looks up in metrics and intervals."""
    pairs = re.findall(r"""(?:metrics|intervals)\[(["'])(.*?)\1( *~)?""", template)
    return [re.escape(name) + (r"\d+" if sum_of_texts else "") for _, name, sum_of_texts in pairs]


def test_only_modules_that_compute_a_metric_name_it():
    naming = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        named = metrics_in_python(path.read_text(encoding="utf-8"))
        if {metric for metric in named if not name.startswith(OTHER_MEANINGS.get(metric, "/"))}:
            naming.add(name)
    naming |= {
        path.relative_to(PACKAGE).as_posix() for path in TEMPLATES if subscripts(path.read_text(encoding="utf-8"))
    }
    assert naming == COMPUTED_IN


def test_the_rule_sees_a_metric_that_is_put_together():
    assert metrics_in_python('a = f"recall@{k}"') == {"recall@1", "recall@5", "recall@10"}
    assert metrics_in_python('"bleu_" + str(n)') == {"bleu_1", "bleu_2", "bleu_3", "bleu_4"}
    assert metrics_in_python('f"{group}/{name}"; f"{count} of {total} exact"; "a" + b; 1 + 2') == set()
    assert subscripts("""{{ m.metrics["recall@" ~ k] + metrics['mrr'] + metrics[name] }}""") == [r"recall@\d+", "mrr"]


def test_a_template_looks_up_metrics_that_exist():
    for path in TEMPLATES:
        template = path.read_text(encoding="utf-8")
        for name in subscripts(template):
            assert any(re.fullmatch(name, metric) for metric in METRICS), f"{path.name}: {name}"
        assert set(re.findall(r"\w+@\d+", template)) <= METRICS.keys()


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
