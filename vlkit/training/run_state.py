"""The state of a run, shared by both trainers: resume, best, patience, checkpoints, pointers, stop requests.

A trainer's loop asks it what is due after a step (`eval_due`, `save_due`, `stop_due`) and does it in plain sight.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from vlkit import checkpoints, console
from vlkit.config.base import require_resolved
from vlkit.config.training import TrainingConfig
from vlkit.distributed import World
from vlkit.errors import ArtifactError, NonFiniteError, Stopped
from vlkit.evaluation.efficiency import peak_memory_gb
from vlkit.models.device import Precision, best_device
from vlkit.models.tuning import ParameterCounts
from vlkit.runs import Run
from vlkit.signals import StopRequest, StopRequested, Terminated, catch_stop_signals
from vlkit.training.loop import Objective, Step
from vlkit.training.optimizer import adamw, new_scaler, segmented_schedule
from vlkit.training.setup.open_run import drop_later_records


class RunState:
    """What a run has reached, and what is saved of it.

    Attributes:
        step: steps taken.
        best: the best evaluation so far: its step, key and scores; empty before the first.
        last: the last step, as the loop returned it.
        window: pair ids of its batches.
        replaying: the step to repeat (--replay): nothing is written, evaluated or saved; None in training.
    """

    def __init__(
        self,
        config: TrainingConfig,
        run: Run,
        world: World,
        *,
        parameters: Mapping[str, torch.nn.Parameter],
        counts: ParameterCounts,
        rates: Mapping[str, float],
        batches_per_epoch: int,
        validates: bool,
        best_metric_name: str,
    ) -> None:
        """Make the optimizer; `resume` then restores the newest checkpoint.

        Args:
            parameters: name -> trained parameter.
            counts: of trained and of all parameters.
            rates: name -> peak rate, of parameters whose rate is not --lr.
            validates: whether there are rows to evaluate on.
            best_metric_name: what the best evaluation is the best in, for messages.
        """
        self.config, self.run, self.world = config, run, world
        self.parameters, self.counts = dict(parameters), counts
        self.batches_per_epoch, self.validates, self.best_metric_name = batches_per_epoch, validates, best_metric_name
        self.total_steps = require_resolved(config.steps)
        self.precision: Precision = require_resolved(config.precision)
        self.eval_every, self.save_every = require_resolved(config.eval_every), require_resolved(config.save_every)
        self.optimizer = adamw(
            self.parameters, lr=require_resolved(config.lr), weight_decay=config.weight_decay, rates=rates
        )
        self.scaler = new_scaler(best_device(), self.precision)
        self.step, self.best, self.replaying = 0, dict[str, Any](), config.replay
        self.window: deque[list[str]] = deque(maxlen=config.grad_accum)
        self.last: Step | None = None
        # `_unevaluated`: the run was stopped in the middle of this step's evaluation.
        self._evaluated_step, self._unevaluated = 0, False
        self._stop, self._stopping = StopRequest(), False
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self._peak_before: dict[str, float | None] = {}

    def resume(self) -> None:
        """Restore the newest whole checkpoint (of a replay: the newest before its step); without one start at step 0.

        Raises:
            ArtifactError: steps were taken, and none of their checkpoints is left.
        """
        checkpoint = checkpoints.newest(self.run.checkpoints, before=self.replaying)
        step = checkpoint.step if checkpoint else 0
        unevaluated = bool(checkpoint and checkpoint.state.get("evaluation_due"))
        if self.replaying is None:
            first_save = min(self.save_every, self.eval_every if self.validates else self.total_steps, self.total_steps)
            drop_later_records(self.run, self.world, step, first_save=first_save, evaluation=unevaluated)
        else:
            console.say(f"replaying from step {step} of {self.run.folder}; nothing is written")
        if checkpoint is None:
            return
        checkpoint.restore(self.parameters, self.optimizer)
        try:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
            self._seconds_before, self.best = checkpoint.state["train_seconds"], checkpoint.state["best"]
            self._peak_before = checkpoint.state.get("peak_memory_gb") or {}
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{checkpoint.folder / 'state.json'} lacks {error}") from None
        self.step, self._evaluated_step, self._unevaluated = step, step, unevaluated
        if self.replaying is None:
            self._point_at(step)
            console.say(f"resuming from step {step}")

    def record_pairs(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass batches on, remembering which pairs the current step sees."""
        for batch in batches:
            self.window.append(batch.pair_ids)
            yield batch

    def loop_settings(self, objective: Objective[Any]) -> dict[str, Any]:
        """Return the keyword arguments of `steps` that follow from the settings and the state."""
        config = self.config
        return {
            # Where patience was spent before, no step is taken.
            "total": self.step if self._patience_spent() else self.total_steps,
            "start": self.step,
            "accumulate": config.grad_accum,
            "schedule": segmented_schedule(self.total_steps, config.warmup, config.legs),
            "max_grad_norm": config.max_grad_norm,
            "precision": self.precision,
            "seed": config.seed,
            "scaler": self.scaler,
            "world": self.world,
            "on_out_of_memory": objective.reduce_micro_batch if config.micro_batch == "auto" else None,
            "max_bad_steps": config.max_bad_steps if self.replaying is None else self.replaying + 1,
            "should_stop": lambda: self._stop.interruptible and bool(self._stop),
            "describe_batch": lambda batch: ", ".join(batch.pair_ids),
        }

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within the block a first SIGTERM or Ctrl-C saves what is done and ends with `Stopped`.

        Raises:
            Stopped: names the step that is saved.
        """
        if self.replaying is not None:
            yield
            return
        with catch_stop_signals(interruptible=self.world.size == 1) as stop:
            self._stop = stop
            try:
                yield
            except StopRequested:
                raise self._stopped() from None
            except NonFiniteError as error:
                if not self.eval_due():
                    raise
                raise NonFiniteError(f"after step {self.step}: {error.message}", hint=error.hint) from None

    def log(self, step: Step, extra: Mapping[str, float]) -> None:
        """Count a step that was taken, and write it to metrics.jsonl.

        Args:
            extra: what to log beside the step.
        """
        self.step, self.last = step.step, step
        if self.replaying is None:
            self.run.log({**asdict(step), **extra})

    def sync_stop(self) -> None:
        """Learn whether a signal has arrived, on this rank or another. Call it once a step, on every rank."""
        self._stopping = self.world.sync_stop(bool(self._stop))

    def eval_due(self) -> bool:
        """Return whether this step is to be evaluated and is not yet."""
        due = self.step == self.total_steps or self.step % self.eval_every == 0
        due = self._unevaluated or (due and self._evaluated_step < self.step)
        return self.validates and self.replaying is None and due

    def record(self, scores: dict[str, Any], key: list[float], summary: str) -> None:
        """Log an evaluation of this step, and save a checkpoint if it is the best so far; the later of equals.

        Args:
            key: what evaluations are ordered by, larger is better.
            summary: the scores in one line, for the terminal.
        """
        # A checkpoint is written once: that of an interrupted evaluation still asks for it, in a later resume as well.
        self._evaluated_step, self._unevaluated = self.step, False
        self.run.log({"step": self.step, "val": scores})
        if not self.best or key >= self.best["key"]:
            # An equal evaluation is no improvement: patience goes on counting from the earlier one.
            improved = self.step if not self.best or key > self.best["key"] else self.best["improved"]
            self.best = {"step": self.step, "key": key, "val": scores, "improved": improved}
            self.save()
        console.say(f"step {self.step}: validation {summary}")

    def save_due(self) -> bool:
        """Return whether this step is to be saved: every --save-every, at the end of an epoch, and at the end."""
        if self.replaying is not None:
            return False
        before, after = ((n * self.config.grad_accum) // self.batches_per_epoch for n in (self.step - 1, self.step))
        return self.step % self.save_every == 0 or after > before or self.stop_due()

    def stop_due(self) -> bool:
        """Return whether the loop ends after this step: the last one, patience, a signal, or the step to replay."""
        if self.replaying is not None:
            return self.step == self.replaying
        return self.step == self.total_steps or self._stopping or self._patience_spent()

    def _patience_spent(self) -> bool:
        """Return whether --patience evaluations in a row, up to this step, brought no improvement."""
        config = self.config
        if config.patience is None or self.replaying is not None or not self.best or self.step % self.eval_every:
            return False
        # An extended run counts anew.
        since = max(self.best["improved"], *(segment for segment in config.legs if segment <= self.step), 0)
        return bool(self.step - since >= config.patience * self.eval_every)

    def save(self) -> None:
        """Write the checkpoint of this step, if it does not exist yet, and the pointers to it."""
        if not self.world.is_main:
            return
        if not (self.run.checkpoints / checkpoints.folder_name(self.step)).is_dir():
            state = {
                "scaler": self.scaler.state_dict(),
                "train_seconds": self.train_seconds(),
                "peak_memory_gb": self.peak_memory(),
                "best": self.best,
                "evaluation_due": self.eval_due(),
            }
            checkpoints.save(self.run.checkpoints, self.step, self.parameters, self.optimizer, state)
        self._point_at(self.step)
        checkpoints.prune(self.run.checkpoints, keep=self.config.keep, best=self.best.get("step"))
        self.run.mirror()

    def _point_at(self, step: int) -> None:
        """Write last.json and best.json."""
        self.run.write_json("last.json", {"step": step, "checkpoint": f"checkpoints/{checkpoints.folder_name(step)}"})
        if self.best:
            name = checkpoints.folder_name(self.best["step"])
            self.run.write_json("best.json", {"checkpoint": f"checkpoints/{name}", **self.best})

    def raise_if_stopped(self) -> None:
        """Raise after the loop where a signal ended it; say where patience did.

        Raises:
            Stopped: names the step that is saved.
        """
        if self._patience_spent():
            console.say(f"stopping: {self.config.patience} evaluations without a better {self.best_metric_name}")
        elif self.step < self.total_steps:
            raise self._stopped()

    def restore_best(self) -> None:
        """Restore the weights of the best checkpoint; of the last one where nothing validates."""
        self.world.barrier()
        folder = self.run.checkpoints / checkpoints.folder_name(self.exported_step())
        checkpoints.read_verified(folder).restore(self.parameters)

    def _stopped(self) -> BaseException:
        """Save the steps that are done, if any, and return the exception to end with."""
        if not self.step:
            return Terminated() if self._stop.signal is signal.SIGTERM else KeyboardInterrupt()
        self.save()
        sender = self._stop.signal.name if self._stop.signal else "another process"
        message = f"stopped by {sender} after step {self.step} of {self.total_steps}, which is saved"
        return Stopped(message, hint="run the same command again to resume")

    def exported_step(self) -> int:
        """Return the step whose weights are exported."""
        return int(self.best.get("step", self.step))

    def train_seconds(self) -> float:
        """Return the seconds spent in this run, by all its processes one after the other."""
        return self._seconds_before + time.perf_counter() - self._started

    def peak_memory(self) -> dict[str, float | None]:
        """Return the most memory that this process, or one before it, has used."""
        before = self._peak_before
        return {
            device: max(filter(None, (now, before.get(device))), default=None)
            for device, now in peak_memory_gb().items()
        }
