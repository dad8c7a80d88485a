"""A step of a run again: the same pairs, the same loss, to see what happened there."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from vlkit import checkpoints, console
from vlkit.errors import UsageError
from vlkit.signals import StopRequest

if TYPE_CHECKING:
    from vlkit.training.run_state import Training


def replayed(training: Training, step: int) -> dict[str, Any]:
    """Step `step` again, from the newest whole checkpoint before it; nothing is written.

    Raises:
        UsageError: the run has not come so far.
    """
    if not 1 <= step <= training.run.last_step():
        raise UsageError(f"--replay {step}: {training.run.folder} has taken {training.run.last_step()} steps")
    checkpoint, start = checkpoints.newest(training.run.checkpoints, before=step), 0
    if checkpoint is not None:
        checkpoint.restore(training.trainable, training.optimizer)
        training.scaler.load_state_dict(checkpoint.state["scaler"])
        start = checkpoint.step
    console.say(f"from step {start} of {training.run.folder}, nothing is written")
    training.prepare()
    training.train_mode()
    for taken in training.steps_from(start, StopRequest(), max_bad_steps=step + 1):
        training.after_step()
        if taken.step == step:
            break
    recorded = next((line for line in training.run.metrics() if line["step"] == step and "loss" in line), {})
    facts = {"step": step, "pair_ids": list(chain(*training.window)), "loss": taken.loss, "grad_norm": taken.grad_norm}
    facts |= {"recorded": {name: recorded.get(name) for name in ("loss", "grad_norm")}, "skipped": taken.skipped}
    console.print_table(
        f"step {step}",
        ("", "again", "recorded"),
        [(name, f"{facts[name]!r}", f"{facts['recorded'][name]!r}") for name in ("loss", "grad_norm")],
    )
    console.print_result(f"pairs: {', '.join(facts['pair_ids'])}")
    if facts["recorded"]["loss"] not in (None, facts["loss"]):
        console.warn("this is not what was recorded: other data, another model, machine or number of threads")
    return facts
