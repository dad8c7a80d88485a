"""Between the untouched and the tuned weights (WiSE-FT, arXiv 2109.01903), and what each point has kept of the general.

Strength 0 is the untouched model, 1 the tuned one; of a LoRA it is the adapter's: its second matrices begin at zero,
so that shrinking them shrinks what it adds. Validation decides; a guard set, which nothing is chosen by, says beside it
how much of what the model could do before is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlkit import console
from vlkit.evaluation.retrieval.retention import Metrics, retained_share
from vlkit.metrics import DIRECTIONS

STRENGTHS = tuple(number / 10 for number in range(11))
# The first matrix of an adapter is random from the start: without the second one it adds nothing.
SPARED = "lora_A"
# Below this many queries one of them moves recall by more than neighbouring strengths do.
FEW = 500


@dataclass(frozen=True)
class Point:
    """One strength, and the model's metrics at it.

    Attributes:
        guard: metrics on the guard set; None: there is none.
        retained: mean recall@1 on the guard set, as a share of the untouched model's; None where that is 0.
    """

    strength: float
    val: Metrics | None
    guard: Metrics | None = None
    retained: float | None = None


class Sweep:
    """The line between the weights as they were and as they became."""

    def __init__(self, trained: Mapping[str, torch.nn.Parameter]) -> None:
        """Remember the untouched weights. Call it before the first step, and before a checkpoint is restored."""
        self.trained = trained
        self.untouched = {name: p.detach().clone() for name, p in trained.items() if SPARED not in name}

    def points(
        self,
        validation: Callable[[], Metrics] | None,
        guard: Callable[[], Metrics] | None,
        strengths: tuple[float, ...] = STRENGTHS,
    ) -> list[Point]:
        """The metrics at each strength, the weights being the tuned ones before and after.

        Args:
            validation, guard: measure the model as it is.
        """
        tuned = {name: self.trained[name].detach().clone() for name in self.untouched}
        found: list[Point] = []
        for strength in strengths:
            self.move(tuned, strength)
            at_guard = guard() if guard else None
            found.append(Point(strength, validation() if validation else None, at_guard))
        self.move(tuned, 1.0)
        before = found[0].guard
        return [
            Point(p.strength, p.val, p.guard, retained_share(p.guard, before) if p.guard and before else None) for p in found
        ]

    @torch.no_grad()
    def move(self, tuned: Mapping[str, torch.Tensor], strength: float) -> None:
        """Put the weights at a strength; 1 gives the tuned ones to the bit."""
        for name, was in self.untouched.items():
            self.trained[name].copy_(tuned[name] if strength == 1.0 else torch.lerp(was, tuned[name], strength))


def best(points: list[Point]) -> Point:
    """The point that validation prefers: recall@1 of both directions, MRR deciding ties.

    Of equals the nearest to the untouched model, which has forgotten least.
    """

    def key(point: Point) -> tuple[float, ...]:
        return (*(sum(m[name] for m in (point.val or {}).values()) for name in ("recall@1", "mrr")), -point.strength)

    return max(points, key=key)


def tell(points: list[Point], chosen: float) -> None:
    """The sweep as a table."""
    guarded, validated = points[0].guard is not None, points[0].val is not None
    columns = ["strength", *(f"{d.replace('_to_', ' -> ')} r@1" for d in DIRECTIONS if validated)]
    columns += [f"guard {d.replace('_to_', ' -> ')} r@1" for d in DIRECTIONS] + ["retained"] if guarded else []
    rows = []
    for point in points:
        mark = " *" if validated and point.strength == chosen else ""
        row = [f"{point.strength:.1f}{mark}"]
        for metrics in (point.val, point.guard):
            row += [f"{metrics[d]['recall@1']:.3f}" for d in DIRECTIONS] if metrics else []
        if guarded:
            row.append("" if point.retained is None else f"{point.retained:.0%}")
        rows.append(row)
    kept = "; * is what is kept" if validated else ""
    console.print_table(f"between the untouched (0) and the tuned weights (1){kept}", columns, rows)
    queries = min(int(each["queries"]) for each in points[0].val.values()) if points[0].val else 0
    if 0 < queries < FEW:
        console.say(f"validation has {queries} queries: neighbouring strengths may differ by luck alone")


def facts(points: list[Point], chosen: float) -> dict[str, Any]:
    """For interpolation.json."""
    return {"strength": chosen, "points": [asdict(point) for point in points]}
