"""Weights between the base and the tuned model (WiSE-FT, arXiv 2109.01903), and what each retains of the base model.

Strength 0 is the base model, 1 the tuned one. For a LoRA it scales the adapter: its second matrices start at zero, so
shrinking them shrinks what the adapter adds. Validation chooses the strength; a guard set, which chooses nothing, shows
how much of the base model's ability is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from vlkit import console
from vlkit.evaluation.retrieval.retention import Metrics, retained_share
from vlkit.evaluation.retrieval.task import RetrievalTask
from vlkit.metrics import DIRECTIONS, SELECTION
from vlkit.runs import Run
from vlkit.training.setup.fill_cache import uncached_inputs
from vlkit.training.validation import RetrievalValidation

STRENGTHS = tuple(number / 10 for number in range(11))
# The first matrix of an adapter is random from the start; without the second it adds nothing.
LORA_A = "lora_A"
# Below this many queries one of them moves recall by more than neighbouring strengths differ.
MIN_QUERIES = 500


@dataclass(frozen=True)
class InterpolationPoint:
    """One strength, and the model's metrics at it.

    Attributes:
        val, guard: metrics on validation and on the guard set; None where not measured.
        retained: mean recall@1 on the guard set, as a share of the base model's; None where that is 0.
    """

    strength: float
    val: Metrics | None
    guard: Metrics | None = None
    retained: float | None = None


class WeightInterpolation:
    """The line between the weights as they were and as they became."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Copy the base weights. Call it before the first step, and before a checkpoint is restored."""
        self.parameters = parameters
        self.base = {name: p.detach().clone() for name, p in parameters.items() if LORA_A not in name}

    def tuned(self) -> dict[str, torch.Tensor]:
        """Copy the weights as they are now."""
        return {name: self.parameters[name].detach().clone() for name in self.base}

    @torch.no_grad()
    def move(self, tuned: Mapping[str, torch.Tensor], strength: float) -> None:
        """Set the weights to a strength; 1 restores the tuned ones bit for bit."""
        for name, base in self.base.items():
            weights = tuned[name] if strength == 1.0 else torch.lerp(base, tuned[name], strength)
            self.parameters[name].copy_(weights)

    def measure(
        self,
        validate: Callable[[], Metrics] | None,
        guard: Callable[[], Metrics] | None,
        strengths: tuple[float, ...] = STRENGTHS,
    ) -> list[InterpolationPoint]:
        """Measure the model at each strength; afterwards the weights are the tuned ones again.

        Args:
            validate, guard: measure the model as it is; None: not measured.
        """
        tuned = self.tuned()
        points: list[InterpolationPoint] = []
        for strength in strengths:
            self.move(tuned, strength)
            at_guard = guard() if guard else None
            points.append(InterpolationPoint(strength, validate() if validate else None, at_guard))
        self.move(tuned, 1.0)
        base = points[0].guard
        return [
            InterpolationPoint(p.strength, p.val, p.guard, retained_share(p.guard, base) if p.guard and base else None)
            for p in points
        ]


def choose_strength(
    interpolation: WeightInterpolation, validation: RetrievalValidation, run: Run, guard: RetrievalTask | None
) -> InterpolationPoint:
    """Move the weights to the strength that validation prefers; print all of them and write interpolation.json.

    Without --interpolate the tuned weights stay, and only the two ends are measured.

    Args:
        guard: the task that shows what is retained.
    """
    chooses = validation.config.interpolate
    inputs = uncached_inputs(guard, validation.encoder)
    points = interpolation.measure(
        validation.metrics if chooses else None,
        (lambda: validation.metrics(guard, inputs)) if guard is not None else None,
        STRENGTHS if chooses else (0.0, 1.0),
    )
    strength = best_point(points).strength if chooses else 1.0
    interpolation.move(interpolation.tuned(), strength)
    print_sweep(points, strength)
    run.write_json("interpolation.json", {"strength": strength, "points": [asdict(point) for point in points]})
    return next(point for point in points if point.strength == strength)


def best_point(points: list[InterpolationPoint]) -> InterpolationPoint:
    """Return the point that validation prefers: recall@1 of both directions, then MRR.

    Of equal ones the nearest to the base model, which has forgotten least.
    """

    def key(point: InterpolationPoint) -> tuple[float, ...]:
        sums = (sum(m[name] for m in (point.val or {}).values()) for name in SELECTION)
        return (*sums, -point.strength)

    return max(points, key=key)


def print_sweep(points: list[InterpolationPoint], strength: float) -> None:
    """Print the points as a table, the chosen one marked."""
    has_guard, has_val = points[0].guard is not None, points[0].val is not None
    columns = ["strength", *(f"{d.replace('_to_', ' -> ')} r@1" for d in DIRECTIONS if has_val)]
    columns += [f"guard {d.replace('_to_', ' -> ')} r@1" for d in DIRECTIONS] + ["retained"] if has_guard else []
    rows = []
    for point in points:
        mark = " *" if has_val and point.strength == strength else ""
        row = [f"{point.strength:.1f}{mark}"]
        for metrics in (point.val, point.guard):
            row += [f"{metrics[d][SELECTION[0]]:.3f}" for d in DIRECTIONS] if metrics else []
        if has_guard:
            row.append("" if point.retained is None else f"{point.retained:.0%}")
        rows.append(row)
    choice = "; * is exported" if has_val else ""
    console.print_table(f"between the untouched (0) and the tuned weights (1){choice}", columns, rows)
    queries = min(int(metrics["queries"]) for metrics in points[0].val.values()) if points[0].val else 0
    if 0 < queries < MIN_QUERIES:
        console.say(f"validation has {queries} queries: neighbouring strengths may differ by chance")
