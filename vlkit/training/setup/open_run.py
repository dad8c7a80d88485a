"""Open a run: its folder and lock, several processes, --extend-to, --replay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vlkit import checkpoints
from vlkit.config.base import require_resolved
from vlkit.config.training import TrainingConfig
from vlkit.distributed import World
from vlkit.errors import ArtifactError, UsageError, VlkitError
from vlkit.run_status import record_failure
from vlkit.runs import Run, local_runs_dir, resolve_run

C = TypeVar("C", bound=TrainingConfig)
M = TypeVar("M")


@contextmanager
def open_run(config: C, data: dict[str, Any], world: World) -> Iterator[tuple[C, Run]]:
    """Open a run's folder, new, unfinished or to be extended, and hold its lock; record why the block fails.

    With --replay the folder is only read.

    Args:
        config: complete.
        data: facts of the rows, for environment.yaml.

    Yields:
        The settings (--extend-to changes them), the same on all ranks, and the run; only rank 0's run writes.

    Raises:
        UsageError: the run is finished, locked, of other settings or of other data.
    """
    if config.replay is not None:
        run = Run(local_runs_dir(config.runs_dir) / str(config.name), is_writer=False)
        _check_same_data(config, run, data)
        yield config, run
        return
    # The name may hold the time of day, which each process reads for itself.
    config = world.broadcast(config)
    if not world.is_main:
        config = world.broadcast(config)
        yield config, Run(local_runs_dir(config.runs_dir) / str(config.name), is_writer=False)
        return
    run = resolve_run(config.runs_dir, str(config.name), extending=config.extend_to is not None)
    with run.lock():
        config, before = _extend_config(config, run)
        run.begin(config, data, before)
        config = world.broadcast(config)
        with record_failure(run):
            yield config, run


def load_on_first_rank(run: Run, world: World, load: Callable[[], M]) -> M:
    """Load a run's model, on rank 0 before the others: it may write a tiny model that they read.

    A new run whose model cannot be loaded leaves no folder.
    """
    try:
        with world.main_first():
            return load()
    except VlkitError:
        if world.is_main and run.is_writer:
            run.discard()
        raise


def drop_later_records(run: Run, world: World, step: int, *, first_save: int, evaluation: bool) -> None:
    """Delete checkpoints and log lines after `step`, from which a run resumes: these steps will be taken again.

    Args:
        first_save: the step by which a checkpoint must exist.
        evaluation: `step` itself will be evaluated again.

    Raises:
        ArtifactError: the run has taken steps, and no checkpoint is left.
    """
    world.barrier()
    if world.is_main:
        checkpoints.remove_after(run.checkpoints, step)
    saved, logged = run.read_json("last.json").get("step", 0), run.last_step()
    if step == 0 and (saved or logged > first_save):
        message = f"{run.folder} has taken {max(saved, logged)} steps, and none of its checkpoints is left"
        raise ArtifactError(message, hint="restore its checkpoints/, or start anew under another --name")
    run.forget_after(step, evaluation=evaluation)


def config_to_replay(config: C) -> C:
    """Return the settings of the run that --replay names, with the step to repeat.

    Raises:
        UsageError: no run is named, or it has not taken this step.
    """
    if config.name is None:
        raise UsageError("--replay needs a run", hint="add --config runs/NAME/config.yaml")
    run = Run(local_runs_dir(config.runs_dir) / config.name, is_writer=False)
    last = run.last_step()
    if not 1 <= require_resolved(config.replay) <= last:
        raise UsageError(f"--replay {config.replay}: {run.folder} has taken {last} steps", hint=f"give 1 to {last}")
    return dataclasses.replace(type(config).from_layers(run.config()), replay=config.replay)


def check_micro_batch(config: TrainingConfig, world: World) -> None:
    """Refuse --micro-batch auto on several processes.

    Raises:
        UsageError: a rank that ran out of memory would repeat a step while the others go on.
    """
    if world.size > 1 and config.micro_batch == "auto":
        message = "--micro-batch auto works on one process: a rank out of memory would repeat a step alone"
        raise UsageError(message, hint="give a number, such as --micro-batch 32")


def _check_same_data(config: TrainingConfig, run: Run, data: dict[str, Any]) -> None:
    """Refuse rows that the run was not trained on.

    Raises:
        UsageError: names the fingerprint.
    """
    fingerprint = run.environment().get("data", {}).get("fingerprint")
    if fingerprint != data["fingerprint"]:
        message = f"{run.folder} was trained on other data than {config.data} holds now: fingerprint {fingerprint}, now"
        raise UsageError(f"{message} {data['fingerprint']}", hint="restore the data that the run was trained on")


def _extend_config(config: C, run: Run) -> tuple[C, C | None]:
    """Return the settings of a run that --extend-to continues: more steps, and a new segment of the schedule.

    Returns:
        The settings, and those of the finished run; None where there is nothing to reopen.

    Raises:
        UsageError: the run is not finished, or has as many steps already.
        ArtifactError: none of its checkpoints is whole.
    """
    target = config.extend_to
    if target is None:
        return config, None
    snapshot, done = run.config(), run.read_json("finished.json").get("steps")
    steps, segments = int(snapshot["steps"]), tuple(snapshot.get("legs") or ())
    config = dataclasses.replace(config, extend_to=None)
    if steps == target and segments and done != target:  # An earlier --extend-to was interrupted.
        return dataclasses.replace(config, steps=target, legs=segments), None
    subject = f"--extend-to {target}: the run {run.folder}"
    if done is None:
        command = f"--extend-to {steps}" if segments else "the same command without --extend-to"
        raise UsageError(f"{subject} is not finished", hint=f"{command} trains it to its end")
    if done != steps:
        hint = "start anew under another --name"
        raise UsageError(f"{subject} was ended by --patience after {done} of {steps} steps", hint=hint)
    if target <= steps:
        raise UsageError(f"{subject} has {steps} steps already", hint=f"give more than {steps}")
    if config.warmup >= target - steps:
        raise UsageError(f"{subject}: --warmup {config.warmup:g} is not below the {target - steps} steps to come")
    if checkpoints.newest(run.checkpoints) is None:
        raise ArtifactError(f"{subject}: none of its checkpoints is left", hint="start anew under another --name")
    before = dataclasses.replace(config, steps=steps, legs=segments)
    return dataclasses.replace(config, steps=target, legs=(*segments, steps)), before
