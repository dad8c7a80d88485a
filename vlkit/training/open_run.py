"""How a run begins, whatever is trained: its folder, the lock, several processes, --extend-to, --replay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from vlkit import checkpoints
from vlkit.config.training import TrainingConfig
from vlkit.distributed import World
from vlkit.errors import ArtifactError, UsageError, VlkitError
from vlkit.run_status import record_failure
from vlkit.runs import Run, local_runs_dir, resolve_run

C = TypeVar("C", bound=TrainingConfig)
M = TypeVar("M")


def refuse_auto(config: TrainingConfig, world: World) -> None:
    """Refuse --micro-batch auto among several processes.

    Raises:
        UsageError: always, there.
    """
    if world.size > 1 and config.micro_batch == "auto":
        told = "--micro-batch auto: a process that runs out of memory would try again while the others go on"
        raise UsageError(told, hint="on several processes give a number")


def begun(config: C, facts: dict[str, Any], world: World, work: Callable[[C, Run], dict[str, Any]]) -> dict[str, Any]:
    """Open the run's folder, new, unfinished or to be extended, and work in it under its lock.

    Args:
        config: complete.
        facts: of the data, for environment.yaml.
        work: (settings, run) -> what the command returns. Of several processes the first has a run that writes.
    """
    # The name may hold the time of day, which each process reads for itself.
    config = world.broadcast(config)
    if not world.is_main:
        config = world.broadcast(config)
        return work(config, Run(local_runs_dir(config.runs_dir) / str(config.name), is_writer=False))
    run = resolve_run(config.runs_dir, str(config.name), extending=config.extend_to is not None)
    with run.lock():
        config, before = extended(config, run)
        run.begin(config, facts, before)
        config = world.broadcast(config)
        with record_failure(run):
            return work(config, run)


def opened(run: Run, world: World, make: Callable[[], M]) -> M:
    """The model of a run; what is tiny is made by the first process. A run that cannot begin leaves no folder."""
    try:
        if not world.is_main:
            world.barrier()
        model = make()
        if world.is_main:
            world.barrier()
        return model
    except VlkitError:
        if world.is_main and run.is_writer:
            run.discard()
        raise


def replayed_run(config: C) -> tuple[C, Run]:
    """--replay: the settings of a run, and its folder, which stays as it is.

    Raises:
        UsageError: the run is not named.
    """
    if config.name is None:
        raise UsageError("--replay needs to know the run", hint="--config runs/NAME/config.yaml, or --name NAME")
    run = Run(local_runs_dir(config.runs_dir) / config.name, is_writer=False)
    return type(config).from_layers(run.config()), run


def refuse_other_data(settings: TrainingConfig, run: Run, facts: dict[str, Any]) -> None:
    """Refuse rows that are not those that a run was trained on.

    Raises:
        UsageError: names the fingerprint.
    """
    found = run.environment().get("data", {}).get("fingerprint")
    if found != facts["fingerprint"]:
        raise UsageError(f"{settings.data} is not what {run.folder} was trained on: its fingerprint was {found}")


def extended(config: C, run: Run) -> tuple[C, C | None]:
    """The settings of a run that --extend-to goes on with: more steps, and where it had ended before.

    Returns:
        The settings, and those that the run had; None where it is not, or no longer, to be reopened.

    Raises:
        UsageError: there is no finished run of fewer steps.
        ArtifactError: none of its checkpoints is whole.
    """
    wanted = config.extend_to
    if wanted is None:
        return config, None
    snapshot, done = run.config(), run.read_json("finished.json").get("steps")
    had, legs = int(snapshot["steps"]), tuple(snapshot.get("legs") or ())
    config = dataclasses.replace(config, extend_to=None)
    if had == wanted and legs and done != wanted:  # It was being extended, and did not get there.
        return dataclasses.replace(config, steps=wanted, legs=legs), None
    told = f"--extend-to {wanted}: the run {run.folder}"
    if done is None:
        end = f"--extend-to {had}" if legs else "the same command without --extend-to"
        raise UsageError(f"{told} is not finished", hint=f"{end} trains it to its end")
    if done != had:
        hint = "start anew under another --name"
        raise UsageError(f"{told} was ended by --patience after {done} of {had} steps", hint=hint)
    if wanted <= had:
        raise UsageError(f"{told} has {had} steps already", hint="give it more")
    if config.warmup >= wanted - had:
        raise UsageError(f"{told}: --warmup {config.warmup:g} is not below the {wanted - had} steps to come")
    if checkpoints.newest(run.checkpoints) is None:
        raise ArtifactError(f"{told}: none of its checkpoints is left", hint="start anew under another --name")
    before = dataclasses.replace(config, steps=had, legs=legs)
    return dataclasses.replace(config, steps=wanted, legs=(*legs, had)), before
