"""train-retrieval: adapt a dual encoder to a prepared folder."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from shlex import quote
from typing import Any

from vlkit import checkpoints, console
from vlkit.config import TrainRetrievalConfig
from vlkit.data.batches import Batch, BatchOrder, stream
from vlkit.distributed import ALONE, World, joined
from vlkit.errors import ArtifactError, NonFiniteError, Stopped, UsageError, VlkitError
from vlkit.evaluation.card import write_card
from vlkit.evaluation.efficiency import peak_memory_gb
from vlkit.evaluation.retention import guard_rows
from vlkit.evaluation.scoring import Task, score
from vlkit.interrupts import Asked, StopRequest, Terminated, stop_request
from vlkit.models import adapters, opening
from vlkit.models.device import best_device, use_deterministic_algorithms
from vlkit.models.towers import Towers
from vlkit.runs import Run, local_runs, open_run
from vlkit.standing import noting_why
from vlkit.training import caching
from vlkit.training.contrast import Contrast
from vlkit.training.interpolation import STRENGTHS, Sweep, best, facts, tell
from vlkit.training.loop import Step, adamw, legs_schedule, new_scaler, steps
from vlkit.training.planning import Rows, complete, dataset_of, dry_run_of, extended, forecast, refuse_small_disk
from vlkit.training.replay import replayed

EVALUATED_AT_ONCE = 256


def train_retrieval(config: TrainRetrievalConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Run `vlkit train-retrieval`.

    Returns:
        The run's folder, steps, best validation scores and parameter counts, as --json prints them.
    """
    with joined() as world:
        if world.size > 1 and config.micro_batch == "auto":
            told = "--micro-batch auto: a process that runs out of memory would try again while the others go on"
            raise UsageError(told, hint="on several processes give a number")
        if config.replay is not None:
            return _replayed(config)
        rows = Rows.of(config)
        config = complete(config, rows.train)
        if dry_run:
            return dry_run_of(config, rows)
        # The name may hold the time of day, which each process reads for itself.
        config = world.from_first(config)
        if world.first:
            run = open_run(config.runs_dir, config.name, extending=config.extend_to is not None)
            with run.locked():
                config, before = extended(config, run)
                run.begin(config, rows.facts(), before)
                config = world.from_first(config)
                with noting_why(run):
                    return _trained(config, run, rows, world)
        config = world.from_first(config)
        return _trained(config, Run(local_runs(config.runs_dir) / config.name, writes=False), rows, world)


def _replayed(config: TrainRetrievalConfig) -> dict[str, Any]:
    """--replay: a step of a run again, from what its folder holds."""
    if config.name is None:
        raise UsageError("--replay needs to know the run", hint="--config runs/NAME/config.yaml, or --name NAME")
    run = Run(local_runs(config.runs_dir) / config.name, writes=False)
    settings = TrainRetrievalConfig.from_layers(run.config())
    rows = Rows.of(settings)
    found = run.environment().get("data", {}).get("fingerprint")
    if found != rows.facts()["fingerprint"]:
        raise UsageError(f"{settings.data} is not what {run.folder} was trained on: its fingerprint was {found}")
    return _trained(settings, run, rows, ALONE, replay=config.replay)


def _trained(
    config: TrainRetrievalConfig, run: Run, rows: Rows, world: World, *, replay: int | None = None
) -> dict[str, Any]:
    """The run, from a model as it is to what it became; or one step of it again."""
    texts = list(rows.train.frame["text"])
    try:
        if not world.first:
            world.wait()  # A tiny model is made by the first.
        towers = opening.open_model(
            config.model,
            texts,
            seed=config.seed,
            text_model=config.text_model,
            keep_in=run.base,
            merged_from=Run(config.init_from) if config.init_from else None,
            quantized=config.precision if config.quantize else None,
        )
        if world.first:
            world.wait()
    except VlkitError:
        if world.first and run.writes:
            run.discard()
        raise
    training = Training(config, run, rows, towers, world)
    return training.run_to_the_end() if replay is None else replayed(training, replay)


class Training:
    """One training run: the model, its data, its optimizer, and where they are written."""

    def __init__(self, config: TrainRetrievalConfig, run: Run, rows: Rows, towers: Towers, world: World) -> None:
        self.config, self.run, self.towers, self.world = config, run, towers, world
        if config.deterministic:
            use_deterministic_algorithms()
        self.counts = adapters.adapt(towers, config, seed=config.seed)
        towers.to(best_device())
        self.dataset = dataset_of(rows, towers, config, world)
        self.trainable = adapters.trainable(towers)
        self.sweep = Sweep(self.trainable) if config.interpolate or config.guard else None
        refuse_small_disk(config, self.counts, towers)
        rates = adapters.rates(self.trainable, head=config.head_lr, logit=config.logit_lr)
        self.optimizer = adamw(self.trainable, lr=config.lr, weight_decay=config.weight_decay, rates=rates)
        self.scaler = new_scaler(towers.device, config.precision)
        self.validation = Task.of(rows.val) if len(rows.val) else None
        self.kept = caching.Sources()
        self.per_epoch = BatchOrder.over(self.dataset, config.batch_size, config.seed).per_epoch
        self.at_once = None if config.micro_batch in (None, "auto") else int(config.micro_batch)
        self.best: dict[str, Any] = {}
        self.done, self.evaluation_due = 0, False
        self.window: deque[list[str]] = deque(maxlen=config.grad_accum)
        self.began, self.seconds_before = time.perf_counter(), 0.0
        self.peak_before: dict[str, float | None] = {}

    def run_to_the_end(self) -> dict[str, Any]:
        """Train from the newest checkpoint, or from the start; then write what other tools load."""
        with stop_request(droppable=self.world.size == 1) as asked:
            try:
                self.kept = caching.cached(self.config, self.towers, self.dataset, self.validation, self.world)
                self.done = self._resume()
                self._tell()
                self._train(asked)
                return self._finish(self.done)
            except Asked:
                raise self._stopped(asked) from None

    def _items(self, batch: Batch) -> int:
        """How many pairs a batch has; the window of a step remembers which."""
        self.window.append(batch.pair_ids)
        return len(batch)

    def _train(self, asked: StopRequest) -> None:
        """Take the steps that are left, or as many as --patience or a signal leave."""
        config = self.config
        if self.evaluation_due:
            self._evaluate(self.done)
        if self._waited_enough(self.done):
            return
        adapters.train_mode(self.towers)
        with console.progress("training", config.steps) as bar:
            for step in self.steps_from(self.done, asked):
                self.done = step.step
                self.towers.clamp_scale()
                self.run.log({**asdict(step), **self._logit_values()})
                bar.update(step.step, loss=step.loss, lr=step.lr, grad_norm=step.grad_norm)
                last, stopped = step.step == config.steps, self.world.stops(bool(asked))
                if self.validation and (last or step.step % config.eval_every == 0):
                    self._evaluate(step.step)
                waited = self._waited_enough(step.step)
                due = step.step % config.save_every == 0 or self._epoch_ends(step.step)
                if stopped or last or waited or due:
                    self._save(step.step)
                if waited:
                    console.say(f"the end: {config.patience} evaluations without a better recall")
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
        before, after = ((number * self.config.grad_accum) // self.per_epoch for number in (step - 1, step))
        return after > before

    def steps_from(self, start: int, asked: StopRequest, max_bad_steps: int | None = None) -> Iterator[Step]:
        """The loop over this run's batches, from step `start` on."""
        config = self.config
        contrast = Contrast(self.towers, config.loss, self.at_once, self.world)
        order = BatchOrder.over(self.dataset, config.batch_size, config.seed, first=start * config.grad_accum)
        return steps(
            stream(self.dataset, order, workers=config.workers),
            contrast,
            self._items,
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
            smaller=contrast.halve if config.micro_batch == "auto" else None,
            max_bad_steps=max_bad_steps or config.max_bad_steps,
            stopped=lambda: asked.droppable and bool(asked),
            names_of=lambda batch: ", ".join(batch.pair_ids),
        )

    def _resume(self) -> int:
        """Restore the newest whole checkpoint. Returns the number of steps that are done."""
        checkpoint = checkpoints.newest(self.run.checkpoints)
        done = checkpoint.step if checkpoint else 0
        self.world.wait()
        if self.world.first:
            checkpoints.forget_after(self.run.checkpoints, done)
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
        return min(config.save_every, config.steps, config.eval_every if self.validation else config.steps)

    def _evaluate(self, step: int) -> None:
        """Score validation, log it, and keep the checkpoint if it is the best so far."""
        self.evaluation_due = True
        try:
            scores = self._scores(self.validation, self.kept)
        except NonFiniteError as error:
            raise NonFiniteError(f"after step {step}: {error.message}", hint=error.hint) from None
        self.evaluation_due = False
        adapters.train_mode(self.towers)
        self.run.log({"step": step, "val": scores})
        if self._remember(step, scores):
            self._save(step)
        told = (
            f"{direction.replace('_to_', ' -> ')} {metrics['recall@1']:.3f}" for direction, metrics in scores.items()
        )
        console.say(f"step {step}: validation recall@1 {', '.join(told)}")

    def _scores(self, task: Task, sources: caching.Sources) -> dict[str, Any]:
        config = self.config
        return score(
            self.towers,
            task,
            batch_size=min(config.batch_size, self.at_once or EVALUATED_AT_ONCE),
            precision=config.precision,
            pictures=sources.pictures,
            captions=sources.captions,
            world=self.world,
        ).metrics()

    def _remember(self, step: int, scores: dict[str, Any]) -> bool:
        """Whether this step is the best so far: by recall@1 of both directions, MRR deciding ties; the later of equals.

        Equals are no improvement, though: the step of the last one is remembered beside.
        """
        key = [sum(metrics[name] for metrics in scores.values()) for name in ("recall@1", "mrr")]
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
        if not self.world.first:
            return
        name = checkpoints.name_of(step)
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
        self.run.write_json("last.json", {"step": step, "checkpoint": f"checkpoints/{checkpoints.name_of(step)}"})
        if self.best:
            best = checkpoints.name_of(self.best["step"])
            self.run.write_json("best.json", {"checkpoint": f"checkpoints/{best}", **self.best})

    def _finish(self, taken: int) -> dict[str, Any]:
        """Export the best of the steps `taken` (the last where there is no validation); mark the run as finished."""
        step = self.best.get("step", taken)
        self.world.wait()
        checkpoints.verified(self.run.checkpoints / checkpoints.name_of(step)).restore(self.trainable)
        between = self._interpolated()
        if not self.world.first:
            return {}
        exported = adapters.export(self.towers, self.run.folder)
        if self.config.merge and self.towers.peft is not None:
            adapters.export_merged(self.towers, self.run.folder)
        facts = {
            "steps": taken,
            "exported_step": step,
            "train_seconds": round(self._train_seconds(), 2),
            "peak_memory_gb": self._peak_memory(),
            "trainable_parameters": self.counts.trainable,
            "total_parameters": self.counts.total,
            **between,
        }
        self.run.finish(facts)
        write_card(self.run)
        self.run.mirror(must=True)
        chosen = f"step {step}, the best on validation" if self.best else "the last step: there is no validation split"
        console.say(f"{taken} steps in {facts['train_seconds']:.0f} s; {exported} holds {chosen}")
        console.hint(f"vlkit eval --run {quote(str(self.run.folder))}")
        return {"run": str(self.run.folder), **facts, "exported": str(exported), "validation": self.best.get("val", {})}

    def _interpolated(self) -> dict[str, Any]:
        """Leave the weights where validation prefers them between untouched and tuned; say what is retained."""
        config = self.config
        if self.sweep is None:
            return {}
        guard = Task.of(guard_rows(config.guard)) if config.guard else None
        guard_of = caching.decoded(guard, self.towers)
        points = self.sweep.points(
            (lambda: self._scores(self.validation, self.kept)) if config.interpolate else None,
            (lambda: self._scores(guard, guard_of)) if guard else None,
            STRENGTHS if config.interpolate else (0.0, 1.0),
        )
        chosen = best(points).strength if config.interpolate else 1.0
        self.sweep.move({name: p.detach().clone() for name, p in self.trainable.items()}, chosen)
        tell(points, chosen)
        self.run.write_json("interpolation.json", facts(points, chosen))
        kept = next(point for point in points if point.strength == chosen)
        self.best |= {"val": kept.val} if kept.val else {}
        return {"strength": chosen, "retained": kept.retained}

    def _train_seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _peak_memory(self) -> dict[str, float | None]:
        """The most that this process, or one before it, has held."""
        now = peak_memory_gb()
        return {of: max(filter(None, (held, self.peak_before.get(of))), default=None) for of, held in now.items()}

    def _logit_values(self) -> dict[str, float]:
        return {name: p.detach().float().item() for name, p in self.towers.logit_parameters().items()}

    def _tell(self) -> None:
        config, batch = self.config, self.config.batch_size
        work = f"{config.steps} steps of {batch} x {config.grad_accum}"
        console.say(f"{self.run.folder}: {len(self.dataset)} pairs, {work}, {config.precision} on {self.towers.device}")
        console.say(f"{config.model}, {config.tune}: {self.counts}")
        for line in forecast(self.dataset, config, self.towers):
            console.say(line)
