"""AdamW, the learning-rate schedules, and the loss scaler."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch

from vlkit.models.device import Precision


def adamw(
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """Make an AdamW that decays matrices, but not biases, norms and logit parameters (one dimension at most).

    Its second moment averages over about 50 steps (beta 0.98, as CLIP was trained): contrastive gradients change
    quickly.

    Args:
        parameters: name -> parameter.
        lr: peak rate.
        rates: name -> peak rate, for parameters that have their own.

    Returns:
        An optimizer whose groups carry "peak_lr"; the first group has the common rate, which a step reports.
    """
    members: dict[tuple[float, float], list[tuple[str, torch.nn.Parameter]]] = defaultdict(list)
    for name, parameter in parameters.items():
        rate, decay = (rates or {}).get(name, lr), weight_decay if parameter.ndim > 1 else 0.0
        members[rate, decay].append((name, parameter))
    order = sorted(members, key=lambda key: (key[0] != lr, -key[1], key[0]))
    groups = [{"params": members[key], "weight_decay": key[1], "peak_lr": key[0]} for key in order]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def cosine_schedule(total: int, warmup: float) -> Callable[[int], float]:
    """Return a linear warm-up followed by a half cosine to zero, as a pure function: step (from 0) -> factor.

    Args:
        warmup: steps; below 1, a share of `total`.
    """
    warmup_steps = round(warmup * total) if warmup < 1 else int(warmup)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps)))

    return factor


def segmented_schedule(total: int, warmup: float, segments: Sequence[int] = ()) -> Callable[[int], float]:
    """Return one `cosine_schedule` per segment of an extended run: up to each of `segments`, then to `total`."""
    bounds = [0, *segments, total]
    factors = [cosine_schedule(stop - start, warmup) for start, stop in pairwise(bounds)]

    def factor(step: int) -> float:
        index = bisect_right(bounds, step, hi=len(bounds) - 1) - 1
        return factors[index](step - bounds[index])

    return factor


def new_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Make a loss scaler: active for fp16, a no-op otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
