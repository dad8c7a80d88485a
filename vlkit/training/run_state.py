"""The course of a run, whatever is trained: from the newest checkpoint, or from nothing, to its end.

Steps, evaluations, checkpoints, signals, patience and the run folder are the same for every trainer and stand here,
once. What is trained, on which batches, how it is scored and what is written for others stands in `retrieval.py` and
`captioning.py`, as the methods that are abstract here.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from vlkit import checkpoints, console
from vlkit.config.training import TrainingConfig
from vlkit.data.loading.epoch_sampler import EpochSampler
from vlkit.distributed import World
from vlkit.errors import ArtifactError, NonFiniteError, Stopped
from vlkit.evaluation.efficiency import peak_memory_gb
from vlkit.models.device import best_device
from vlkit.models.tuning import ParameterCounts
from vlkit.runs import Run
from vlkit.signals import StopRequest, StopRequested, Terminated, catch_stop_signals
from vlkit.training.loop import Step, adamw, legs_schedule, new_scaler, steps


class Training(ABC):
    """One training run: what is trained, its optimizer, and where it is written.

    Attributes:
        trainable: name -> parameter, of what is trained.
        window: pair ids of the batches of the step at hand.
        done: steps that are taken.
        best: the best evaluation so far: its step, key and scores; empty before the first.
        evaluation_due: the evaluation of this very step was begun, and is not done.
    """

    # What the best evaluation is the best in, for the user.
    better = "score"

    def __init__(
        self,
        config: TrainingConfig,
        run: Run,
        world: World,
        *,
        trainable: Mapping[str, torch.nn.Parameter],
        counts: ParameterCounts,
        rates: Mapping[str, float],
        order: EpochSampler,
        validates: bool,
    ) -> None:
        """Set up the optimizer.

        Args:
            counts: parameters, trained and all.
            rates: name -> peak rate, of the parameters that have another than --lr.
            order: of the batches, from the first on.
            validates: there are rows to evaluate on.
        """
        self.config, self.run, self.world = config, run, world
        self.trainable, self.counts, self.order, self.validates = dict(trainable), counts, order, validates
        self.device = best_device()
        self.optimizer = adamw(self.trainable, lr=config.lr, weight_decay=config.weight_decay, rates=rates)
        self.scaler = new_scaler(self.device, config.precision)
        self.at_once = None if config.micro_batch in (None, "auto") else int(config.micro_batch)
        self.best: dict[str, Any] = {}
        self.done, self.evaluation_due = 0, False
        self.window: deque[list[str]] = deque(maxlen=config.grad_accum)
        self.began, self.seconds_before = time.perf_counter(), 0.0
        self.peak_before: dict[str, float | None] = {}

    @abstractmethod
    def prepare(self) -> None:
        """Before the first step: fill the caches."""

    @abstractmethod
    def tell(self) -> None:
        """Say what is about to be trained, and what the user should know of it."""

    @abstractmethod
    def train_mode(self) -> None:
        """What is trained into training mode; what is frozen stays in eval mode."""

    @abstractmethod
    def loss(self) -> Callable[[Any], torch.Tensor | Iterator[Any]]:
        """What the loop calls with every batch; with a method `halve` where less may be tried at a time."""

    @abstractmethod
    def batches(self, first: int) -> Iterator[Any]:
        """Batches without end, from number `first` on."""

    @abstractmethod
    def items(self, batch: Any) -> int:
        """How many items the loss of a batch is a mean over."""

    @abstractmethod
    def after_step(self) -> dict[str, float]:
        """After each step: what else to do to the weights. Returns what to log beside the step."""

    @abstractmethod
    def scores(self) -> dict[str, Any]:
        """Score validation, as metrics.jsonl keeps it."""

    @abstractmethod
    def key_of(self, scores: dict[str, Any]) -> list[float]:
        """By what evaluations are ordered: the larger the better."""

    @abstractmethod
    def told(self, scores: dict[str, Any]) -> str:
        """The scores in a line."""

    @abstractmethod
    def export(self) -> tuple[Path, dict[str, Any]]:
        """With the best weights in place: write what is used afterwards. Returns where, and facts for finished.json."""

    def run_to_the_end(self) -> dict[str, Any]:
        """Train from the newest checkpoint, or from the start; then write what other tools load."""
        with catch_stop_signals(droppable=self.world.size == 1) as asked:
            try:
                self.prepare()
                self.done = self._resume()
                self.tell()
                self._train(asked)
                return self._finish(self.done)
            except StopRequested:
                raise self._stopped(asked) from None

    def _train(self, asked: StopRequest) -> None:
        """Take the steps that are left, or as many as --patience or a signal leave."""
        config = self.config
        if self.evaluation_due:
            self._evaluate(self.done)
        if self._waited_enough(self.done):
            return
        self.train_mode()
        with console.progress("training", config.steps) as bar:
            for step in self.steps_from(self.done, asked):
                self.done = step.step
                self.run.log({**asdict(step), **self.after_step()})
                bar.update(step.step, loss=step.loss, lr=step.lr, grad_norm=step.grad_norm)
                last, stopped = step.step == config.steps, self.world.sync_stop(bool(asked))
                if self.validates and (last or step.step % config.eval_every == 0):
                    self._evaluate(step.step)
                waited = self._waited_enough(step.step)
                due = step.step % config.save_every == 0 or self._epoch_ends(step.step)
                if stopped or last or waited or due:
                    self._save(step.step)
                if waited:
                    console.say(f"the end: {config.patience} evaluations without a better {self.better}")
                    return
                if stopped and not last:
                    raise self._stopped(asked)
        if self.done < config.steps:
            raise self._stopped(asked)

    def _stopped(self, asked: StopRequest) -> BaseException:
        """What to end with: the steps that are done are saved, if there are any."""
        if not self.done:
            return Terminated() if asked.signal is signal.SIGTERM else KeyboardInterrupt()
        self._save(self.done)
        by = asked.signal.name if asked.signal else "another process"
        told = f"stopped by {by} after step {self.done} of {self.config.steps}, which is saved"
        return Stopped(told, hint="the same command goes on from there")

    def _epoch_ends(self, step: int) -> bool:
        """Whether an epoch's last batch was in this step."""
        before, after = ((number * self.config.grad_accum) // self.order.batches_per_epoch for number in (step - 1, step))
        return after > before

    def steps_from(self, start: int, asked: StopRequest, max_bad_steps: int | None = None) -> Iterator[Step]:
        """The loop over this run's batches, from step `start` on."""
        config, loss = self.config, self.loss()
        return steps(
            self.batches(start * config.grad_accum),
            loss,
            self._counted,
            self.optimizer,
            total=config.steps,
            start=start,
            accumulate=config.grad_accum,
            schedule=legs_schedule(config.steps, config.warmup, config.legs),
            max_grad_norm=config.max_grad_norm,
            precision=config.precision,
            seed=config.seed,
            scaler=self.scaler,
            world=self.world,
            smaller=loss.halve if config.micro_batch == "auto" else None,  # type: ignore[attr-defined]
            max_bad_steps=max_bad_steps or config.max_bad_steps,
            stopped=lambda: asked.droppable and bool(asked),
            names_of=lambda batch: ", ".join(batch.pair_ids),
        )

    def _counted(self, batch: Any) -> int:
        """How many items a batch has; the window of a step remembers which pairs."""
        self.window.append(batch.pair_ids)
        return self.items(batch)

    def _resume(self) -> int:
        """Restore the newest whole checkpoint. Returns the number of steps that are done."""
        checkpoint = checkpoints.newest(self.run.checkpoints)
        done = checkpoint.step if checkpoint else 0
        self.world.barrier()
        if self.world.is_main:
            checkpoints.remove_after(self.run.checkpoints, done)
        self.evaluation_due = bool(checkpoint and checkpoint.state.get("evaluation_due"))
        saved = self.run.read_json("last.json").get("step", 0)
        if checkpoint is None and (saved or self.run.last_step() > self._first_save()):
            told = f"{self.run.folder} has taken {max(saved, self.run.last_step())} steps, and none of its"
            told += " checkpoints is left"
            raise ArtifactError(told, hint="bring back its checkpoints/, or start anew under another --name")
        self.run.forget_after(done, evaluation=self.evaluation_due)
        if checkpoint is None:
            return 0
        checkpoint.restore(self.trainable, self.optimizer)
        try:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
            self.seconds_before, self.best = checkpoint.state["train_seconds"], checkpoint.state["best"]
            self.peak_before = checkpoint.state.get("peak_memory_gb") or {}
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{checkpoint.folder / 'state.json'} lacks {error}") from None
        self._point_at(checkpoint.step)
        console.say(f"going on from step {checkpoint.step}")
        return checkpoint.step

    def _first_save(self) -> int:
        """The step by which a checkpoint is there for sure: the first evaluation is always the best so far."""
        config = self.config
        return min(config.save_every, config.steps, config.eval_every if self.validates else config.steps)

    def _evaluate(self, step: int) -> None:
        """Score validation, log it, and keep the checkpoint if it is the best so far."""
        self.evaluation_due = True
        try:
            scores = self.scores()
        except NonFiniteError as error:
            raise NonFiniteError(f"after step {step}: {error.message}", hint=error.hint) from None
        self.evaluation_due = False
        self.train_mode()
        self.run.log({"step": step, "val": scores})
        if self._remember(step, scores):
            self._save(step)
        console.say(f"step {step}: validation {self.told(scores)}")

    def _remember(self, step: int, scores: dict[str, Any]) -> bool:
        """Whether this step is the best so far; the later of equals.

        Equals are no improvement, though: the step of the last one is remembered beside.
        """
        key = self.key_of(scores)
        if self.best and key < self.best["key"]:
            return False
        better = not self.best or key > self.best["key"]
        self.best = {"step": step, "key": key, "val": scores, "improved": step if better else self.best["improved"]}
        return True

    def _waited_enough(self, step: int) -> bool:
        """Whether --patience evaluations in a row, up to this step, have found nothing better."""
        config = self.config
        if config.patience is None or not self.best or step % config.eval_every:
            return False
        # Extended, a run waits anew.
        since = max(self.best["improved"], *(leg for leg in config.legs if leg <= step), 0)
        return step - since >= config.patience * config.eval_every

    def _save(self, step: int) -> None:
        """Write the checkpoint of this step, if it is not yet there, and the pointers to it."""
        if not self.world.is_main:
            return
        name = checkpoints.folder_name(step)
        if not (self.run.checkpoints / name).is_dir():
            state = {
                "scaler": self.scaler.state_dict(),
                "train_seconds": self._train_seconds(),
                "peak_memory_gb": self._peak_memory(),
                "best": self.best,
                "evaluation_due": self.evaluation_due,
            }
            checkpoints.save(self.run.checkpoints, step, self.trainable, self.optimizer, state)
        self._point_at(step)
        checkpoints.prune(self.run.checkpoints, keep=self.config.keep, best=self.best.get("step"))
        self.run.mirror()

    def _point_at(self, step: int) -> None:
        """Write where the newest checkpoint is, and the best."""
        self.run.write_json("last.json", {"step": step, "checkpoint": f"checkpoints/{checkpoints.folder_name(step)}"})
        if self.best:
            best = checkpoints.folder_name(self.best["step"])
            self.run.write_json("best.json", {"checkpoint": f"checkpoints/{best}", **self.best})

    def _finish(self, taken: int) -> dict[str, Any]:
        """Export the best of the steps `taken` (the last where there is no validation); mark the run as finished."""
        step = self.best.get("step", taken)
        self.world.barrier()
        checkpoints.read_verified(self.run.checkpoints / checkpoints.folder_name(step)).restore(self.trainable)
        exported, more = self.export()
        if not self.world.is_main:
            return {}
        facts = {
            "steps": taken,
            "exported_step": step,
            "train_seconds": round(self._train_seconds(), 2),
            "peak_memory_gb": self._peak_memory(),
            "trainable_parameters": self.counts.trainable,
            "total_parameters": self.counts.total,
            **more,
        }
        self.run.finish(facts)
        self.describe()
        self.run.mirror(required=True)
        chosen = f"step {step}, the best on validation" if self.best else "the last step: there is no validation split"
        console.say(f"{taken} steps in {facts['train_seconds']:.0f} s; {exported} holds {chosen}")
        console.hint(f"vlkit eval --run {quote(str(self.run.folder))}")
        return {"run": str(self.run.folder), **facts, "exported": str(exported), "validation": self.best.get("val", {})}

    @abstractmethod
    def describe(self) -> None:
        """The run is finished: write its model card."""

    def _train_seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _peak_memory(self) -> dict[str, float | None]:
        """The most that this process, or one before it, has held."""
        now = peak_memory_gb()
        return {of: max(filter(None, (held, self.peak_before.get(of))), default=None) for of, held in now.items()}
