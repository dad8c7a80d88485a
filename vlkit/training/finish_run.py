"""The end of a run: what is written, uploaded and said; and the report of --replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

from vlkit import console
from vlkit.runs import Run
from vlkit.training.run_state import RunState


def finish_run(
    state: RunState, exported: Path, extra: Mapping[str, Any], write_card: Callable[[Run], Path]
) -> dict[str, Any]:
    """Write finished.json and the model card, upload to a remote --runs-dir, and say what was exported.

    Nothing trains into the run any more.

    Args:
        exported: folder of the exported weights.
        extra: facts to keep beside those of the training.

    Returns:
        What --json prints; of a rank that does not write, nothing.
    """
    if not state.world.is_main:
        return {}
    step, run = state.exported_step(), state.run
    facts = {
        "steps": state.step,
        "exported_step": step,
        "train_seconds": round(state.train_seconds(), 2),
        "peak_memory_gb": state.peak_memory(),
        "trainable_parameters": state.counts.trainable,
        "total_parameters": state.counts.total,
        **extra,
    }
    run.finish(facts)
    write_card(run)
    run.mirror(required=True)
    choice = f"step {step}, the best on validation" if state.best else "the last step: there is no validation split"
    console.say(f"{state.step} steps in {facts['train_seconds']:.0f} s; {exported} holds {choice}")
    console.hint(f"vlkit eval --run {quote(str(run.folder))}")
    return {"run": str(run.folder), **facts, "exported": str(exported), "validation": state.best.get("val", {})}


def report_replay(state: RunState) -> dict[str, Any]:
    """Print the repeated step beside what was recorded of it. Return what --json prints."""
    assert state.last is not None
    step = state.last
    recorded = next((line for line in state.run.metrics() if line["step"] == step.step and "loss" in line), {})
    pair_ids = list(chain(*state.window))
    facts = {"step": step.step, "pair_ids": pair_ids, "loss": step.loss, "grad_norm": step.grad_norm}
    facts |= {"recorded": {name: recorded.get(name) for name in ("loss", "grad_norm")}, "skipped": step.skipped}
    rows = [(name, repr(facts[name]), repr(recorded.get(name))) for name in ("loss", "grad_norm")]
    console.print_table(f"step {step.step}", ("", "again", "recorded"), rows)
    console.print_result(f"pairs: {', '.join(pair_ids)}")
    if recorded.get("loss") not in (None, step.loss):
        console.warn("the loss differs from the recorded one: other data, model, machine or number of threads")
    return facts
