"""eval: a run, or a model as it is, measured against the untouched model on the same rows."""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlkit import console
from vlkit.config import TINY_MODELS, EvalConfig
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.data.splits import draw
from vlkit.errors import DataError
from vlkit.evaluation.intervals import interval, p_value, resample
from vlkit.evaluation.scoring import DIRECTIONS, Scores, Task, score, summary
from vlkit.models import adapters, tiny
from vlkit.models import towers as towers_module
from vlkit.models.device import Precision, best_device, best_precision
from vlkit.models.encode import encode_texts
from vlkit.models.towers import Towers
from vlkit.runs import Run
from vlkit.settings import read_yaml

SCHEMA = 1
EXAMPLES = 20
SHOWN = ("recall@1", "recall@5", "recall@10", "mrr", "median_rank")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run `vlkit eval`: print a table, write results.json and examples_top5.json, return the results."""
    run = Run(config.run) if config.run else None
    settings = run.config() if run else {}
    data = config.data or Path(settings["data"])
    pairs = read_pairs(data)
    task = Task.of(pairs.of(config.split, limit=config.limit, seed=config.seed))
    if not len(task.pairs):
        raise DataError(
            f"{data}: the {config.split} split has no pairs",
            hint="choose another --split, or prep with a larger --test-share",
        )
    tuned = adapters.load_adapted(run.folder, base_of(run)) if run else _as_it_is(config, pairs)
    device = best_device()
    precision = config.precision or settings.get("precision") or best_precision(device, adapters.count(tuned).total)
    tuned_scores = _measured(tuned, task, config, precision)
    efficiency = _efficiency(tuned, tuned_scores, task, run, precision)
    base_scores = None
    if run:
        del tuned
        base_scores = _measured(towers_module.load(base_of(run)), task, config, precision)
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
    _tell(results, folder / f"results{suffix}.json")
    return results


def _as_it_is(config: EvalConfig, pairs: Pairs) -> Towers:
    """The model of --model; a tiny one has its tokenizer from the training texts, as in a run."""
    if config.model in TINY_MODELS:
        return tiny.fresh(config.model, list(pairs.of("train").frame["text"]), seed=config.seed)
    return towers_module.load(config.model)


def base_of(run: Run) -> str:
    """The untouched model of a run: where vlkit made it, or the name it was loaded by."""
    return str(run.base) if run.base.is_dir() else str(run.config()["model"])


def _measured(towers: Towers, task: Task, config: EvalConfig, precision: Precision) -> Scores:
    return score(towers.to(best_device()), task, batch_size=config.batch_size, precision=precision)


def _compared(tuned: Scores, base: Scores | None, task: Task, config: EvalConfig) -> dict[str, Any]:
    """metrics, intervals, baseline, difference and verdict of results.json."""
    compared: dict[str, Any] = {
        "metrics": tuned.metrics(),
        "intervals": {},
        "baseline": base.metrics() if base else {},
        "difference": {},
        "verdict": {},
    }
    for direction in DIRECTIONS:
        units = task.queries(direction)["unit"].to_numpy()[tuned.ranks[direction].query]
        values = {("tuned", metric): v for (d, metric), v in tuned.values().items() if d == direction}
        if base:
            values |= {("base", metric): v for (d, metric), v in base.values().items() if d == direction}
        medians = {key: v for key, v in values.items() if key[1] == "median_rank"}
        means = {key: v for key, v in values.items() if key not in medians}
        draws = resample(means, medians, units, draws=config.draws, seed=config.seed)
        names = [metric for who, metric in values if who == "tuned"]
        compared["intervals"][direction] = {metric: interval(draws["tuned", metric]) for metric in names}
        if base:
            compared["difference"][direction] = {metric: _difference(metric, values, draws) for metric in names}
            compared["verdict"][direction] = verdict(
                compared["difference"][direction]["recall@1"], len(np.unique(units))
            )
    return compared


def _difference(
    metric: str, values: dict[tuple[str, str], np.ndarray], draws: dict[tuple[str, str], np.ndarray]
) -> dict[str, float]:
    drawn = draws["tuned", metric] - draws["base", metric]
    low, high = interval(drawn)
    value = summary(metric, values["tuned", metric]) - summary(metric, values["base", metric])
    return {"value": value, "low": low, "high": high, "p_value": p_value(drawn)}


def verdict(difference: dict[str, float], units: int) -> str:
    """One plain sentence about recall@1."""
    told = f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}] over {units} units"
    if difference["low"] > 0:
        return f"better: recall@1 {told}"
    if difference["high"] < 0:
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
    if config.out is not None or run is None:
        return config.out or Path(), suffix
    trained_on = (
        read_yaml(run.folder / "environment.yaml").get("data", {})
        if (run.folder / "environment.yaml").is_file()
        else {}
    )
    if trained_on.get("fingerprint") == pairs.fingerprint:
        return run.folder, suffix
    if config.data is None:
        console.warn(f"{pairs.folder} has changed since {run.name} was trained: test rows may have been trained on")
    return run.folder, f"{suffix}-{pairs.folder.name}"


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
    tuned, base = results["metrics"], results["baseline"]
    for direction in DIRECTIONS:
        rows = []
        for metric in SHOWN:
            low, high = results["intervals"][direction][metric]
            row = [metric.replace("_", " "), f"{tuned[direction][metric]:.3f} [{low:.3f}, {high:.3f}]"]
            if base:
                change = results["difference"][direction][metric]
                row[1:1] = [f"{base[direction][metric]:.3f}"]
                row.append(
                    f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]  p {_p(change['p_value'])}"
                )
            rows.append(row)
        asked = tuned[direction]
        title = f"{direction.replace('_to_', ' -> ')}: {asked['queries']} queries, {asked['gallery']} in the gallery"
        console.table(title, ("", "untouched", "tuned", "difference") if base else ("", "value"), rows)
    for direction, sentence in results["verdict"].items():
        console.result(f"{direction.replace('_to_', ' -> ')}: {sentence}")
    console.hint(f"all numbers: {path}")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
