"""eval: a run, or a model as it is, measured against the untouched model on the same rows."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.config.evaluation import EvalRetrievalConfig
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.distributed import World, init_distributed
from vlkit.errors import DataError
from vlkit.evaluation import summary
from vlkit.evaluation.efficiency import measure_efficiency
from vlkit.evaluation.model_card import write_card
from vlkit.evaluation.results import Results, check_out_folder, result_suffix
from vlkit.evaluation.retrieval import per_query
from vlkit.evaluation.retrieval.evaluate_retrieval import Models, RetrievalEvaluation
from vlkit.evaluation.retrieval.task import RetrievalScores, RetrievalTask
from vlkit.models import tuning
from vlkit.models.device import best_device, best_precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.loading import load_base, load_or_create, load_tuned
from vlkit.models.preprocessing import with_decode
from vlkit.remote import Remote, file_sha256
from vlkit.runs import Run, mirror_location, zone_path
from vlkit.storage import Location


def evaluate(config: EvalRetrievalConfig) -> dict[str, Any]:
    """Run `vlkit eval`: print a table, write results.json, queries.parquet and examples_top5.json, return the results.

    Raises:
        QualityError: a metric is below --fail-under; everything is written.
    """
    with init_distributed() as world:
        if config.out is not None and config.out.is_remote:
            results = _evaluate_to_remote(config, config.out, world)
        else:
            results = _evaluate(config, world)
        results.check_fail_under(config.demands)
        return results.to_dict()


def _evaluate(config: EvalRetrievalConfig, world: World) -> Results:
    """Measure, compare and write; return the results when all processes are done."""
    run = Run(config.run) if config.run else None
    if config.out is not None:
        check_out_folder(config.out.path, run)
    data = config.data if run is None else config.data or run.data_location()
    assert data is not None  # --model requires it.
    pairs = read_pairs(data)
    task = _make_task(config, pairs, data)
    tuned = _load_model(config, run, pairs)
    precision = config.precision or (run.config() if run else {}).get("precision")
    precision = precision or best_precision(best_device(), tuning.count_parameters(tuned).total)
    evaluation = RetrievalEvaluation(config, pairs, task, precision, world)
    tuned_embeddings = evaluation.embed_all(tuned.to(best_device()), cache="off")
    efficiency = measure_efficiency(tuned, tuned_embeddings.rows, task, run, precision)
    del tuned
    base = load_base(run, config.decode).to(best_device()) if run else None
    base_embeddings = evaluation.embed_all(base, cache=config.cache) if base else None
    embeddings = Models(tuned_embeddings, base_embeddings)
    scores = evaluation.rank_models(embeddings)
    results = evaluation.compare_models(
        embeddings,
        scores,
        name=run.name if run else str(config.model),
        data={
            "path": str(data.absolute),
            "split": config.split,
            "fingerprint": pairs.fingerprint,
            "limit": config.limit,
            "rows": len(task.pairs),
        },
        efficiency=efficiency,
    )
    if world.is_main:
        results = _write(results, scores, evaluation, run)
    # A process that fails ends the others, too: wait until everything is written.
    world.barrier()
    return results


def _make_task(config: EvalRetrievalConfig, pairs: Pairs, data: Location) -> RetrievalTask:
    """Return the task of the rows to measure on; rows that augment wrote are no test, in no split.

    Raises:
        DataError: the split is empty.
    """
    rows = pairs.positives()
    rows = rows.with_rows(rows.frame[rows.frame["origin"] != "augmented"])
    task = RetrievalTask.from_pairs(rows.split(config.split, limit=config.limit, seed=config.seed))
    if not len(task.pairs):
        raise DataError(
            f"{data}: the {config.split} split has no pairs",
            hint="choose another --split, or prep with a larger --test-share",
        )
    return task


def _load_model(config: EvalRetrievalConfig, run: Run | None, pairs: Pairs) -> DualEncoder:
    """Load the run's tuned model, or the one that --model names."""
    if run:
        return load_tuned(run, config.decode)
    texts = list(pairs.split("train").frame["text"])
    return with_decode(load_or_create(str(config.model), texts, seed=config.seed), config.decode)


def _write(
    results: Results, scores: Models[RetrievalScores], evaluation: RetrievalEvaluation, run: Run | None
) -> Results:
    """Write the files, results.json last, and print the summary; return the results with their queries file."""
    config, task = evaluation.config, evaluation.task
    folder, suffix = _output_folder(config, run, evaluation.pairs)
    # Results of another folder of the same name, or of one that is called like a split, are not overwritten.
    earlier = Run(folder).read_json(f"results{suffix}.json").get("data") or results.data
    if any(earlier.get(key) != results.data[key] for key in ("fingerprint", "split")):
        suffix += f"-{evaluation.pairs.fingerprint[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    queries = per_query.query_table(scores.tuned, scores.base, task)
    path = folder / f"queries{suffix}.parquet"
    per_query.write_table(path, queries)
    results = replace(results, queries={"file": path.name, "hash": file_sha256(path)})
    examples = per_query.example_queries(queries, task, config.seed)
    Run(folder).write_json(f"examples_top5{suffix}.json", examples)
    results.write(folder / f"results{suffix}.json")
    if run and config.out is None:
        if suffix == "":
            write_card(run)
        run.mirror(required=True)
    summary.print_summary(results, folder / f"results{suffix}.json")
    return results


def _evaluate_to_remote(config: EvalRetrievalConfig, out: Location, world: World) -> Results:
    """Evaluate into a temporary folder and upload it; in a lake's zone an untouched model gets a run of its own."""
    kind, name = ("run", Path(config.run).name) if config.run else ("baseline", str(config.model).replace("/", "--"))
    with tempfile.TemporaryDirectory() as folder:
        results = _evaluate(replace(config, out=Location(folder)), world)
        if world.is_main:
            files = {path.name: path for path in sorted(Path(folder).iterdir())}
            remote = Remote(mirror_location(out, name, kind) if out.is_bucket else out)
            remote.upload({(zone_path(file) if out.is_bucket else file): path for file, path in files.items()})
            console.say(f"uploaded to {remote.location}")
        world.barrier()
    return results


def _output_folder(config: EvalRetrievalConfig, run: Run | None, pairs: Pairs) -> tuple[Path, str]:
    """Return folder and file suffix: another split, or other data than the run's, gets its own files there."""
    suffix = result_suffix(config.split, config.limit)
    if config.out is not None:
        return config.out.path, suffix
    assert run is not None
    trained_on = run.environment().get("data", {})
    if trained_on.get("fingerprint") == pairs.fingerprint:
        return run.folder, suffix
    if count := _count_trained_on(run, pairs):
        console.warn(f"{run.name} was trained on {count} of these images or texts: its scores are too high")
    if config.data is None:
        console.warn(f"{pairs.folder} has changed since {run.name} was trained: test rows may have been trained on")
    return run.folder, f"{suffix}-{pairs.folder.name}"


def _count_trained_on(run: Run, pairs: Pairs) -> int:
    """Count the test images and texts that the run was trained on, as far as its data still exists."""
    folder = Location(run.environment().get("data", {}).get("path", ""))
    if folder == pairs.folder.absolute or not (folder.is_remote or folder.path.is_dir()):
        return 0
    train, test = read_pairs(folder).split("train").frame, pairs.split("test").frame
    return sum(len(set(train[key]) & set(test[key])) for key in ("image_id", "text_id"))
