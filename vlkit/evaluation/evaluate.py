"""eval: a run, or a model as it is, measured against the untouched model on the same rows."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.config.evaluation import SCHEMA, EvalConfig, suffix_of
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.distributed import World, init_distributed
from vlkit.errors import DataError
from vlkit.evaluation import summary
from vlkit.evaluation.efficiency import measure_efficiency
from vlkit.evaluation.model_card import write_card
from vlkit.evaluation.results import refuse_foreign, refuse_missed
from vlkit.evaluation.retrieval import per_query
from vlkit.evaluation.retrieval.evaluate_retrieval import RetrievalEvaluation
from vlkit.evaluation.retrieval.task import RetrievalTask
from vlkit.models import tuning
from vlkit.models.device import best_device, best_precision
from vlkit.models.loading import load_base, load_or_create, load_tuned
from vlkit.models.preprocessing import with_decode
from vlkit.remote import Remote, file_sha256
from vlkit.runs import Run, mirror_location, zone_path
from vlkit.storage import Location


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run `vlkit eval`: print a table, write results.json, queries.parquet and examples_top5.json, return the results.

    Raises:
        QualityError: a metric is below --fail-under; everything is written.
    """
    with init_distributed() as world:
        if config.out is not None and config.out.is_remote:
            return _evaluated_to_remote(config, config.out, world)
        return _evaluated(config, world)


def _evaluated(config: EvalConfig, world: World) -> dict[str, Any]:
    run = Run(config.run) if config.run else None
    if config.out is not None:
        refuse_foreign(config.out.path, run)
    settings = run.config() if run else {}
    data = config.data if run is None else config.data or run.data_location()
    assert data is not None  # With --model it is given.
    pairs = read_pairs(data)
    # What augment has written is no test of anything, also where the training rows are asked for.
    own = pairs.positives()
    own = replace(own, frame=own.frame[own.frame["origin"] != "augmented"].reset_index(drop=True))
    task = RetrievalTask.from_pairs(own.split(config.split, limit=config.limit, seed=config.seed))
    if not len(task.pairs):
        raise DataError(
            f"{data}: the {config.split} split has no pairs",
            hint="choose another --split, or prep with a larger --test-share",
        )
    texts = list(pairs.split("train").frame["text"])
    if run:
        tuned = load_tuned(run, config.decode)
    else:
        tuned = with_decode(load_or_create(str(config.model), texts, seed=config.seed), config.decode)
    counted = tuning.count_parameters(tuned).total
    precision = config.precision or settings.get("precision") or best_precision(best_device(), counted)
    evaluation = RetrievalEvaluation(config, pairs, task, precision, world)
    seen = evaluation.seen(tuned.to(best_device()), cache="off")
    cost = measure_efficiency(tuned, seen.own, task, run, precision)
    del tuned
    untouched = load_base(run, config.decode).to(best_device()) if run else None
    before = evaluation.seen(untouched, cache=config.cache) if untouched else None
    results = {
        "schema": SCHEMA,
        "task": "retrieval",
        "model": run.name if run else config.model,
        "data": {
            "path": str(data.absolute),
            "split": config.split,
            "fingerprint": pairs.fingerprint,
            "limit": config.limit,
            "rows": len(task.pairs),
        },
        **evaluation.compared(seen, before),
        "efficiency": cost,
    }
    if world.is_main:
        _write(results, evaluation, config, run)
    # A process that fails is the end of the others, too: first everything is written.
    world.barrier()
    refuse_missed(results, config.fail_under)
    return results


def _write(results: dict[str, Any], evaluation: RetrievalEvaluation, config: EvalConfig, run: Run | None) -> None:
    """The files, results.json last; then the table that people read."""
    folder, suffix = _place(config, run, evaluation.pairs)
    target = Run(folder)
    # Another folder of the same name, or one called like a split: beside what is there, not over it.
    there = target.read_json(f"results{suffix}.json").get("data") or results["data"]
    if any(there.get(key) != results["data"][key] for key in ("fingerprint", "split")):
        suffix += f"-{evaluation.pairs.fingerprint[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    frame = per_query.query_table(evaluation.tuned, evaluation.base, evaluation.task)
    per_query.write_table(folder / f"queries{suffix}.parquet", frame)
    results["queries"] = {"file": f"queries{suffix}.parquet", "hash": file_sha256(folder / f"queries{suffix}.parquet")}
    examples = per_query.example_queries(frame, evaluation.task, config.seed)
    target.write_json(f"examples_top5{suffix}.json", examples)
    target.write_json(f"results{suffix}.json", results)
    if run and config.out is None:
        if suffix == "":
            write_card(run)
        run.mirror(required=True)
    summary.print_summary(results, folder / f"results{suffix}.json")


def _evaluated_to_remote(config: EvalConfig, out: Location, world: World) -> dict[str, Any]:
    """The same into a folder that is then uploaded; in a lake's zone, the untouched model's is a run of its own."""
    kind, name = ("run", Path(config.run).name) if config.run else ("baseline", str(config.model).replace("/", "--"))
    with tempfile.TemporaryDirectory() as aside:
        demands, here = config.fail_under, replace(config, out=Location(aside), fail_under=())
        results = _evaluated(here, world)
        if world.is_main:
            files = {path.name: path for path in sorted(Path(aside).iterdir())}
            remote = Remote(mirror_location(out, name, kind) if out.is_bucket else out)
            remote.upload({(zone_path(file) if out.is_bucket else file): path for file, path in files.items()})
            console.say(f"uploaded to {remote.location}")
        world.barrier()
    refuse_missed(results, demands)
    return results


def _place(config: EvalConfig, run: Run | None, pairs: Pairs) -> tuple[Path, str]:
    """Folder and file suffix: another split, or other data than the run's, gets files of its own beside the first."""
    suffix = suffix_of(config.split, config.limit)
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
    trained, asked = read_pairs(where).split("train").frame, pairs.split("test").frame
    return sum(len(set(trained[key]) & set(asked[key])) for key in ("image_id", "text_id"))
