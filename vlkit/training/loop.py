"""The training loop, all of it.

`steps` is a generator. It owns autocast, loss scaling, accumulation, clipping, the optimizer step and the schedule, and
hands control back after each step: evaluating, saving and logging are plain statements in the caller's `for`. It
knows no model and no data: `loss_of(batch)` gives the mean loss over the batch's items, `items_of(batch)` their
number. Every model in vlkit is trained by it, and nothing else calls backward.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TypeVar

import torch

from vlkit.distributed import SINGLE, World
from vlkit.errors import NonFiniteError
from vlkit.models.device import Precision, autocast, keep_freed_memory

B = TypeVar("B")


@dataclass(frozen=True)
class Part:
    """A piece of a batch's work: its gradient is what counts, and its share of the loss what is reported."""

    surrogate: torch.Tensor
    loss: torch.Tensor


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `step` counts from 1. `skipped`: the weights were not touched."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    items: int
    skipped: bool


def steps(
    batches: Iterable[B],
    loss_of: Callable[[B], torch.Tensor | Iterator[Part]],
    items_of: Callable[[B], int],
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
    smaller: Callable[[], bool] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    world: World = SINGLE,
    names_of: Callable[[B], str] = repr,
) -> Iterator[Step]:
    """Train from step `start` to step `total`, yielding after each.

    Args:
        batches: endless, beginning with the batch that step `start` begins with.
        loss_of, items_of: the mean loss over a batch's items, and their number; a step without items is skipped. Where
            a batch is too much to be differentiated at once, parts whose gradients, and losses, add up to it.
        optimizer: its groups carry "peak_lr" and "param_names", as `adamw` makes them.
        accumulate: batches a step. Each weighs by its items: 1 x 16 equals 4 x 4 where the loss is a mean over items.
        schedule: step (from 0) -> factor on each group's peak rate, `group["peak_lr"]`.
        seed: dropout's randomness is a function of (seed, step, batch within the step) and of nothing before it.
        scaler: for fp16; `new_scaler` makes one. Its state belongs in the checkpoint.
        max_bad_steps: this many steps in a row without a finite loss and gradient, and NonFiniteError is raised.
        smaller: called when memory runs out; whether the same step may be tried again, with less of it at a time. None:
            it may not.
        stopped: asked after each part of a step; then the step is dropped, no weight touched, and the generator ends.
        world: processes whose gradients, and losses, add up to the batch's; every one then takes the same step.
        names_of: names a batch for that message.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    scaler = scaler or new_scaler(device, precision)
    if device.type == "cpu":
        keep_freed_memory()
    stream, bad = iter(batches), 0
    for number in range(start, total):
        window = list(islice(stream, accumulate))
        if len(window) < accumulate:
            raise RuntimeError(f"the batches ended before step {number + 1} of {total}")
        items = sum(map(items_of, window))
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(number)
        lr = optimizer.param_groups[0]["lr"]
        if items == 0:
            yield Step(number + 1, 0.0, 0.0, lr, 0, skipped=True)
            continue
        weighted = [(b, items_of(b) / items, _drawn(seed, number, at, world)) for at, b in enumerate(window)]
        loss = _differentiated(weighted, loss_of, optimizer, scaler, precision, smaller, stopped)
        if loss is None:
            return
        _add_up(parameters, loss, world)
        if number == start:
            _refuse_unreached(optimizer)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if finite:
            _clip(parameters, grad_norm, max_grad_norm)
            scaler.step(optimizer)
        # A gradient that overflows under a loss scale is the scaler's everyday business, while there is scale to give.
        overflow = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1
        bad = 0 if finite or overflow else bad + 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if bad >= max_bad_steps:
            told = f"loss {loss.item()}, gradient norm {grad_norm.item()}, {bad} steps in a row"
            raise NonFiniteError(
                f"step {number + 1}: {told}; its batch: {'; '.join(map(names_of, window))}",
                hint="no weight was touched by it; a lower --lr, a longer --warmup or --precision fp32 may help",
            )
        yield Step(number + 1, loss.item(), grad_norm.item(), lr, items, skipped=not finite)


def _differentiated(
    window: Sequence[tuple[B, float, int]],
    loss_of: Callable[[B], torch.Tensor | Iterator[Part]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    smaller: Callable[[], bool] | None,
    stopped: Callable[[], bool],
) -> torch.Tensor | None:
    """The loss of some batches, each with its weight and its seed; its gradient is then at the parameters.

    None: the work was to stop, and the gradients are gone.
    """
    device = optimizer.param_groups[0]["params"][0].device
    while True:
        loss = torch.zeros((), device=device)
        try:
            for batch, weight, seed in window:
                torch.manual_seed(seed)
                for part in _parts(loss_of, batch, lambda: autocast(device, precision)):
                    scaler.scale(part.surrogate * weight).backward()
                    loss += part.loss.detach() * weight
                    if stopped():
                        optimizer.zero_grad(set_to_none=True)
                        return None
            return loss
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            if smaller is None or not smaller():
                raise


def _add_up(parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor, world: World) -> None:
    """Give every process the sum of the gradients, and of the losses; one without a share of the batch brings zeros."""
    if world.size > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        world.all_reduce([*(parameter.grad for parameter in parameters), loss])


def _parts(
    loss_of: Callable[[B], torch.Tensor | Iterator[Part]], batch: B, cast: Callable[[], AbstractContextManager[None]]
) -> Iterator[Part]:
    """The parts of a batch, each computed under autocast, which the caller is outside of when it gets one."""
    with cast():
        work = loss_of(batch)
    if isinstance(work, torch.Tensor):
        yield Part(work, work)
        return
    while True:
        with cast():
            part = next(work, None)
        if part is None:
            return
        yield part


def _clip(parameters: Sequence[torch.nn.Parameter], norm: torch.Tensor, most: float) -> None:
    """As clip_grad_norm_, but that gradients which are short enough are not multiplied by 1, all of them."""
    if most / (norm + 1e-6) < 1:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)


def _refuse_unreached(optimizer: torch.optim.Optimizer) -> None:
    """A parameter that the loss does not reach would stay as it is without a word, and hang distributed training."""
    for group in optimizer.param_groups:
        unreached = [name for name, p in zip(group["param_names"], group["params"], strict=True) if p.grad is None]
        if unreached:
            raise RuntimeError(f"{len(unreached)} trained parameters get no gradient, for example {unreached[0]}")


def new_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """A loss scaler; at work for fp16 only, elsewhere it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def cosine_schedule(total: int, warmup: float) -> Callable[[int], float]:
    """Linear warm-up, then a half cosine to zero: step (from 0) -> factor, with no state.

    Args:
        warmup: steps; below 1, a share of `total`.
    """
    rising = round(warmup * total) if warmup < 1 else int(warmup)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))

    return factor


def legs_schedule(total: int, warmup: float, legs: Sequence[int] = ()) -> Callable[[int], float]:
    """A `cosine_schedule` for each leg of a run that was extended: up to each of `legs`, then to `total`."""
    bounds = [0, *legs, total]
    factors = [cosine_schedule(stop - start, warmup) for start, stop in pairwise(bounds)]

    def factor(step: int) -> float:
        leg = bisect_right(bounds, step, hi=len(bounds) - 1) - 1
        return factors[leg](step - bounds[leg])

    return factor


def adamw(
    named: Mapping[str, torch.nn.Parameter], *, lr: float, weight_decay: float, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW that decays matrices, and neither biases, norms nor logit parameters (all have at most one dimension).

    Its second moment remembers 50 steps (beta 0.98, as CLIP was trained): contrastive gradients change quickly.

    Args:
        lr: peak rate.
        rates: name -> peak rate, of parameters that have another.
    """
    members: dict[tuple[float, float], list[tuple[str, torch.nn.Parameter]]] = defaultdict(list)
    for name, parameter in named.items():
        members[(rates or {}).get(name, lr), weight_decay if parameter.ndim > 1 else 0.0].append((name, parameter))
    # Groups at the common rate come first: the first one's rate is what a step reports.
    order = sorted(members, key=lambda key: (key[0] != lr, -key[1], key[0]))
    groups = [{"params": members[key], "weight_decay": key[1], "peak_lr": key[0]} for key in order]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def _drawn(seed: int, step: int, batch: int, world: World = SINGLE) -> int:
    """The seed of a batch's dropout. Processes draw apart from each other; the first one as if it were alone."""
    numbers = (seed, step, batch, world.rank) if world.rank else (seed, step, batch)
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1
