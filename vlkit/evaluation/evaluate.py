"""eval: a run, or a model as it is, measured against the untouched model on the same rows."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlkit import console
from vlkit.config import EvalConfig
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.data.splits import draw
from vlkit.errors import DataError
from vlkit.evaluation.card import write_card
from vlkit.evaluation.intervals import interval, p_value, resample, units_that_differ
from vlkit.evaluation.scoring import DIRECTIONS, Scores, Task, score, summary
from vlkit.models import adapters
from vlkit.models.device import Precision, best_device, best_precision
from vlkit.models.encode import encode_texts
from vlkit.models.opening import open_model, open_tuned, open_untouched
from vlkit.models.towers import Towers
from vlkit.remote import Remote
from vlkit.runs import Run, in_zone, mirror_of
from vlkit.storage import Location

SCHEMA = 1
EXAMPLES = 20
SHOWN = ("recall@1", "recall@5", "recall@10", "mrr", "median_rank")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run `vlkit eval`: print a table, write results.json and examples_top5.json, return the results."""
    if config.out is not None and config.out.is_remote:
        return _evaluated_to_remote(config, config.out)
    run = Run(config.run) if config.run else None
    settings = run.config() if run else {}
    data = config.data or _data_of(run, settings)
    pairs = read_pairs(data)
    task = Task.of(pairs.of(config.split, limit=config.limit, seed=config.seed))
    if not len(task.pairs):
        raise DataError(
            f"{data}: the {config.split} split has no pairs",
            hint="choose another --split, or prep with a larger --test-share",
        )
    texts = list(pairs.of("train").frame["text"])
    tuned = open_tuned(run) if run else open_model(config.model, texts, seed=config.seed)
    device = best_device()
    precision = config.precision or settings.get("precision") or best_precision(device, adapters.count(tuned).total)
    tuned_scores = _measured(tuned, task, config, precision)
    efficiency = _efficiency(tuned, tuned_scores, task, run, precision)
    base_scores = None
    if run:
        del tuned
        base_scores = _measured(open_untouched(run), task, config, precision)
    results = {
        "schema": SCHEMA,
        "task": "retrieval",
        "model": run.name if run else config.model,
        "data": {"path": str(data), "split": config.split, "fingerprint": pairs.fingerprint, "limit": config.limit},
        **_compared(tuned_scores, base_scores, task, config),
        "slices": {},
        "efficiency": efficiency,
    }
    folder, suffix = _place(config, run, pairs)
    target = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target.write_json(f"results{suffix}.json", results)
    target.write_json(f"examples_top5{suffix}.json", _examples(tuned_scores, base_scores, task, config.seed))
    if run and config.out is None:
        if suffix == "":
            write_card(run)
        run.mirror(must=True)
    _tell(results, folder / f"results{suffix}.json")
    return results


def _evaluated_to_remote(config: EvalConfig, out: Location) -> dict[str, Any]:
    """The same into a folder that is then uploaded; in a lake's zone, the untouched model's is a run of its own."""
    kind, name = ("run", Path(config.run).name) if config.run else ("baseline", str(config.model).replace("/", "--"))
    with tempfile.TemporaryDirectory() as aside:
        results = evaluate(dataclasses.replace(config, out=Location(aside)))
        files = {path.name: path for path in sorted(Path(aside).iterdir())}
        remote = Remote(mirror_of(out, name, kind) if out.is_bucket else out)
        remote.upload({(in_zone(file) if out.is_bucket else file): path for file, path in files.items()})
    console.say(f"uploaded to {remote.location}")
    return results


def _data_of(run: Run, settings: dict[str, Any]) -> Location:
    """The run's prepared folder: as the command named it, or, called from elsewhere, where it was."""
    named = Location(settings["data"])
    there = named.is_remote or named.path.exists()
    return named if there else Location(run.environment().get("data", {}).get("path", named))


def _measured(towers: Towers, task: Task, config: EvalConfig, precision: Precision) -> Scores:
    return score(towers.to(best_device()), task, batch_size=config.batch_size, precision=precision)


def _compared(tuned: Scores, base: Scores | None, task: Task, config: EvalConfig) -> dict[str, Any]:
    """metrics, intervals, baseline, difference and verdict of results.json."""
    compared: dict[str, Any] = {
        "metrics": tuned.metrics(),
        "intervals": {},
        "baseline": base.metrics() if base else {},
        "baseline_intervals": {},
        "difference": {},
        "verdict": {},
    }
    of_tuned, of_base = tuned.values(), base.values() if base else {}
    for direction in DIRECTIONS:
        units = task.queries(direction)["unit"].to_numpy()[tuned.ranks[direction].query]
        values = {("tuned", metric): v for (d, metric), v in of_tuned.items() if d == direction}
        values |= {("base", metric): v for (d, metric), v in of_base.items() if d == direction}
        medians = {key: v for key, v in values.items() if key[1] == "median_rank"}
        means = {key: v for key, v in values.items() if key not in medians}
        draws = resample(means, medians, units, draws=config.draws, seed=config.seed)
        count = len(np.unique(units))
        for who, place in (("tuned", "intervals"), ("base", "baseline_intervals")):
            found = {m: interval(draws[w, m], units=count, bounds=_bounds(m, 0)) for w, m in values if w == who}
            if found:
                compared[place][direction] = found
        if base:
            names = [metric for who, metric in values if who == "tuned"]
            compared["difference"][direction] = {name: _difference(name, values, draws, units) for name in names}
            compared["verdict"][direction] = verdict(compared["difference"][direction]["recall@1"], count)
    return compared


def _bounds(metric: str, low: int) -> tuple[float, float] | None:
    """Between which numbers a metric (low 0) or its difference (low -1) must lie; ranks have no upper end."""
    return None if metric.endswith("rank") else (low, 1)


def _difference(
    metric: str, values: dict[tuple[str, str], np.ndarray], draws: dict[tuple[str, str], np.ndarray], units: np.ndarray
) -> dict[str, float]:
    """Tuned less untouched: value, interval and p-value of one metric."""
    drawn = draws["tuned", metric] - draws["base", metric]
    low, high = interval(drawn, units=len(np.unique(units)), bounds=_bounds(metric, -1))
    value = summary(metric, values["tuned", metric]) - summary(metric, values["base", metric])
    changed = units_that_differ(values["tuned", metric], values["base", metric], units)
    return {"value": value, "low": low, "high": high, "p_value": p_value(drawn, changed)}


def verdict(difference: dict[str, float], units: int) -> str:
    """One plain sentence about recall@1: a difference is one where the interval and the p-value agree."""
    told = f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    told += f", p {_p(difference['p_value'])}, over {units} units"
    if difference["p_value"] < 0.05 and difference["low"] > 0:
        return f"better: recall@1 {told}"
    if difference["p_value"] < 0.05 and difference["high"] < 0:
        return f"worse: recall@1 {told}"
    return f"no difference that this test set can show: recall@1 {told}"


def _efficiency(towers: Towers, scores: Scores, task: Task, run: Run | None, precision: Precision) -> dict[str, Any]:
    counts = run.read_json("finished.json") if run else {}
    cuda = torch.cuda.is_available()
    return {
        "images_per_second": scores.images_per_second,
        "texts_per_second": scores.texts_per_second,
        "latency_ms": _query_latency(towers, str(task.texts["text"].iloc[0]), precision) * 1000,
        "peak_memory_gb": (
            torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        / 2**30,
        "train_seconds": counts.get("train_seconds"),
        "trainable_parameters": counts.get("trainable_parameters", 0),
        "total_parameters": adapters.count(towers).total,
    }


def _query_latency(towers: Towers, text: str, precision: Precision) -> float:
    """Median seconds to encode one text."""
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        encode_texts(towers, [text], batch_size=1, precision=precision).cpu()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _place(config: EvalConfig, run: Run | None, pairs: Pairs) -> tuple[Path, str]:
    """Folder and file suffix: another split, or other data than the run's, gets files of its own beside the first."""
    suffix = "" if config.split == "test" else f"-{config.split}"
    suffix += f"-limit{config.limit}" if config.limit else ""
    if config.out is not None:
        return config.out.path, suffix
    assert run is not None
    trained_on = run.environment().get("data", {})
    if trained_on.get("fingerprint") == pairs.fingerprint:
        return run.folder, suffix
    if seen := _trained_on(run, pairs):
        console.warn(f"{seen} of these pictures or texts stood in {run.name}'s training rows: such scores flatter it")
    if config.data is None:
        console.warn(f"{pairs.folder} has changed since {run.name} was trained: test rows may have been trained on")
    return run.folder, f"{suffix}-{pairs.folder.name}"


def _trained_on(run: Run, pairs: Pairs) -> int:
    """Pictures and texts of these rows that the run was trained on, as far as its data is still there."""
    described = run.environment().get("data", {})
    where = Location(described.get("path", ""))
    if where == pairs.folder.absolute or not (where.is_remote or where.path.is_dir()):
        return 0
    trained, asked = read_pairs(where).of("train").frame, pairs.of("test").frame
    return sum(len(set(trained[key]) & set(asked[key])) for key in ("image_id", "text_id"))


def _examples(tuned: Scores, base: Scores | None, task: Task, seed: int) -> dict[str, Any]:
    """A seeded handful of queries a direction, with the five items that either model ranks first."""
    found: dict[str, Any] = {}
    image_sets, text_sets = task.pairs.match_sets()
    for direction in DIRECTIONS:
        asked = tuned.ranks[direction].query
        chosen = sorted(range(len(asked)), key=lambda place: draw(seed, f"{direction}:{asked[place]}"))[:EXAMPLES]
        found[direction] = [_example(direction, place, tuned, base, task, image_sets, text_sets) for place in chosen]
    return found


def _example(
    direction: str, place: int, tuned: Scores, base: Scores | None, task: Task, image_sets: Any, text_sets: Any
) -> dict[str, Any]:
    forward = direction == "text_to_image"
    key, sets, shown = ("text_id", text_sets, "text") if forward else ("image_id", image_sets, "image")
    item_key, item_sets, item_shown = ("image_id", image_sets, "image") if forward else ("text_id", text_sets, "text")
    items = task.pictures if forward else task.texts
    asked = task.queries(direction).iloc[tuned.ranks[direction].query[place]]

    def top(scores: Scores) -> list[dict[str, Any]]:
        listed = items.iloc[scores.ranks[direction].top[place]]
        return [
            {
                item_key: row[item_key],
                item_shown: row[item_shown],
                "hit": bool(item_sets[row[item_key]] & sets[asked[key]]),
            }
            for _, row in listed.iterrows()
        ]

    example = {
        key: asked[key],
        shown: asked[shown],
        "rank": float(tuned.ranks[direction].expected_rank()[place]),
        "top5": top(tuned),
    }
    if base:
        example |= {"baseline_rank": float(base.ranks[direction].expected_rank()[place]), "baseline_top5": top(base)}
    return example


def _tell(results: dict[str, Any], path: Path) -> None:
    """The table that people read."""
    tuned, base, compared = results["metrics"], results["baseline"], bool(results["baseline"])
    for direction in DIRECTIONS:
        rows = []
        for metric in SHOWN:
            row = [metric.replace("_", " ")]
            if compared:
                row.append(_cell(metric, base[direction][metric], *results["baseline_intervals"][direction][metric]))
            row.append(_cell(metric, tuned[direction][metric], *results["intervals"][direction][metric]))
            if compared:
                change = results["difference"][direction][metric]
                row.append(_cell(metric, change["value"], change["low"], change["high"], sign="+"))
            rows.append(row)
        asked = tuned[direction]
        title = f"{direction.replace('_to_', ' -> ')}: {asked['queries']} queries, {asked['gallery']} in the gallery"
        console.table(title, ("", "untouched", "tuned", "difference") if compared else ("", "value"), rows)
    for direction, sentence in results["verdict"].items():
        console.result(f"{direction.replace('_to_', ' -> ')}: {sentence}")
    console.hint(f"all numbers: {path}")


def _cell(metric: str, value: float, low: float, high: float, *, sign: str = "") -> str:
    """A number with its interval: ranks with one decimal, shares with three."""
    form = f"{sign}.1f" if metric.endswith("rank") else f"{sign}.3f"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
