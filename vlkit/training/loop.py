"""The training loop, all of it.

`steps` is a generator. It owns autocast, loss scaling, accumulation, clipping, the optimizer step and the schedule, and
hands control back after each step: evaluating, saving and logging are plain statements in the caller's `for`. It
knows no model and no data: `loss_fn(batch)` returns the mean loss over the batch's items, `count_fn(batch)` their
number. Every model in vlkit is trained by it, and nothing else calls backward.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import torch

from vlkit.distributed import SINGLE, World
from vlkit.errors import NonFiniteError
from vlkit.models.device import Precision, autocast
from vlkit.models.fast.memory import keep_freed_memory
from vlkit.training.optimizer import new_scaler

B = TypeVar("B")
BatchT = TypeVar("BatchT", contravariant=True)


@dataclass(frozen=True)
class Part:
    """A piece of a batch's loss. `surrogate` is what is differentiated, `loss` what is reported."""

    surrogate: torch.Tensor
    loss: torch.Tensor


class Objective(Protocol[BatchT]):
    """A loss that can be computed in smaller pieces when memory runs out."""

    def __call__(self, batch: BatchT) -> torch.Tensor | Iterator[Part]:
        """Return the mean loss over a batch's items, or parts whose losses and gradients add up to it."""

    def reduce_micro_batch(self) -> bool:
        """Halve the micro-batch. Return False where it cannot be smaller."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `step` counts from 1. `skipped`: the weights did not change."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    items: int
    skipped: bool


def steps(
    batches: Iterable[B],
    loss_fn: Callable[[B], torch.Tensor | Iterator[Part]],
    count_fn: Callable[[B], int],
    optimizer: torch.optim.Optimizer,
    *,
    total: int,
    start: int = 0,
    accumulate: int = 1,
    schedule: Callable[[int], float] = lambda step: 1.0,
    max_grad_norm: float = 1.0,
    precision: Precision = "fp32",
    seed: int = 0,
    scaler: torch.amp.GradScaler | None = None,
    max_bad_steps: int = 3,
    on_out_of_memory: Callable[[], bool] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    world: World = SINGLE,
    describe_batch: Callable[[B], str] = repr,
) -> Iterator[Step]:
    """Train from step `start` to step `total`, yielding after each.

    Args:
        batches: endless; the first one is the first of step `start`.
        loss_fn: batch -> mean loss over its items, or parts whose losses and gradients add up to it.
        count_fn: batch -> number of items. A step without items is skipped.
        optimizer: its groups carry "peak_lr" and "param_names", as `adamw` makes them.
        accumulate: batches per step, weighted by their items: 1 x 16 equals 4 x 4 where the loss is a mean over items.
        schedule: step (from 0) -> factor on each group's "peak_lr".
        seed: dropout's randomness is a function of (seed, step, batch within the step) alone.
        scaler: for fp16; `new_scaler` makes one. Its state belongs in the checkpoint.
        max_bad_steps: raise after this many steps in a row without a finite loss and gradient.
        on_out_of_memory: reduces the work done at once; True means: try the same step again. None: raise.
        should_stop: asked after each part of a step. True drops the step: no weight changes, and the generator ends.
        world: processes whose gradients and losses add up to the batch's; each takes the same step.
        describe_batch: names a batch for the error message.

    Raises:
        NonFiniteError: `max_bad_steps` steps in a row were not finite. It names step and batch.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    scaler = scaler or new_scaler(device, precision)
    if device.type == "cpu":
        keep_freed_memory()
    stream, bad_steps = iter(batches), 0
    for number in range(start, total):
        window = list(islice(stream, accumulate))
        if len(window) < accumulate:
            raise RuntimeError(f"the batches ended before step {number + 1} of {total}")
        counts = [count_fn(batch) for batch in window]
        items = sum(counts)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(number)
        lr = optimizer.param_groups[0]["lr"]
        if items == 0:
            yield Step(number + 1, 0.0, 0.0, lr, 0, skipped=True)
            continue
        seeds = (_dropout_seed(seed, number, position, world) for position in range(accumulate))
        weighted = list(zip(window, (count / items for count in counts), seeds, strict=True))
        loss = _backward(weighted, loss_fn, optimizer, scaler, precision, on_out_of_memory, should_stop)
        if loss is None:
            return
        _all_reduce(parameters, loss, world)
        if number == start:
            _check_gradients_exist(optimizer)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if finite:
            _clip(parameters, grad_norm, max_grad_norm)
            scaler.step(optimizer)
        # A gradient that overflows under a loss scale is normal, as long as the scaler can still lower the scale.
        overflow = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1
        bad_steps = 0 if finite or overflow else bad_steps + 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if bad_steps >= max_bad_steps:
            raise _non_finite(number + 1, loss, grad_norm, bad_steps, "; ".join(map(describe_batch, window)))
        yield Step(number + 1, loss.item(), grad_norm.item(), lr, items, skipped=not finite)


def _backward(
    window: Sequence[tuple[B, float, int]],
    loss_fn: Callable[[B], torch.Tensor | Iterator[Part]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    on_out_of_memory: Callable[[], bool] | None,
    should_stop: Callable[[], bool],
) -> torch.Tensor | None:
    """Differentiate the weighted batches of a step; gradients add up in `.grad`.

    Args:
        window: (batch, weight, dropout seed).

    Returns:
        The weighted loss, a scalar; None where training is to stop, with all gradients cleared.
    """
    device = optimizer.param_groups[0]["params"][0].device
    while True:
        loss = torch.zeros((), device=device)
        try:
            for batch, weight, seed in window:
                torch.manual_seed(seed)
                for part in _iter_parts(loss_fn, batch, lambda: autocast(device, precision)):
                    scaler.scale(part.surrogate * weight).backward()  # type: ignore[no-untyped-call]
                    loss += part.loss.detach() * weight
                    if should_stop():
                        optimizer.zero_grad(set_to_none=True)
                        return None
            return loss
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            if on_out_of_memory is None or not on_out_of_memory():
                raise


def _iter_parts(
    loss_fn: Callable[[B], torch.Tensor | Iterator[Part]], batch: B, cast: Callable[[], AbstractContextManager[None]]
) -> Iterator[Part]:
    """Yield the parts of a batch's loss. Each is computed under autocast; the caller receives it outside."""
    with cast():
        result = loss_fn(batch)
    if isinstance(result, torch.Tensor):
        yield Part(result, result)
        return
    while True:
        with cast():
            part = next(result, None)
        if part is None:
            return
        yield part


def _all_reduce(parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor, world: World) -> None:
    """Sum gradients and losses over all processes; a process without a share of the batch contributes zeros."""
    if world.size > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        world.all_reduce([*(parameter.grad for parameter in parameters if parameter.grad is not None), loss])


def _non_finite(step: int, loss: torch.Tensor, grad_norm: torch.Tensor, bad_steps: int, batch: str) -> NonFiniteError:
    numbers = f"loss {loss.item()}, gradient norm {grad_norm.item()}, {bad_steps} steps in a row"
    hint = "no weight was changed by it; try a lower --lr, a longer --warmup or --precision fp32"
    return NonFiniteError(f"step {step}: {numbers}; its batch: {batch}", hint=hint)


def _clip(parameters: Sequence[torch.nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Clip as clip_grad_norm_ does, but do not multiply gradients by 1 where they are short enough."""
    if max_norm / (norm + 1e-6) < 1:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def _check_gradients_exist(optimizer: torch.optim.Optimizer) -> None:
    """Raise where the loss does not reach a parameter: it would never change, and would hang distributed training."""
    for group in optimizer.param_groups:
        unreached = [name for name, p in zip(group["param_names"], group["params"], strict=True) if p.grad is None]
        if unreached:
            raise RuntimeError(f"{len(unreached)} trained parameters get no gradient, for example {unreached[0]}")


def _dropout_seed(seed: int, step: int, batch: int, world: World) -> int:
    """Return the seed of a batch's dropout. Ranks draw differently; rank 0 draws as a single process does."""
    numbers = (seed, step, batch, world.rank) if world.rank else (seed, step, batch)
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1
