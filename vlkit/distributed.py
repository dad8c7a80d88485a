"""torchrun: which of several processes this is, and the few things that they tell each other.

Every process knows the whole batch's rows, so nothing is told but embeddings, gradients and a wish to stop. Alone, all
of it costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from vlkit import console

if TYPE_CHECKING:
    import torch


@dataclass
class World:
    """The processes of a run.

    Attributes:
        rank: which one this is; 0 alone writes and talks.
        size: how many there are.
        wish: whether this process would like to stop. It travels with the next sum of gradients.
        heard: whether any of them wished it by then.
    """

    rank: int = 0
    size: int = 1
    stop_wanted: bool = False
    any_stop_wanted: bool = False

    @property
    def is_main(self) -> bool:
        """This one writes and talks."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """This process' part of `count` items; the parts differ by one item at most, and may be empty."""
        return _shares(count, self.size)[self.rank]

    def all_gather(self, mine: torch.Tensor, count: int) -> torch.Tensor:
        """The rows of all processes, [count, ...], in the order of their shares. Gradients do not pass through.

        Args:
            mine: rows of this process, as many as `shard(count)` has.
        """
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return mine.detach()
        shares = _shares(count, self.size)
        # Messages of equal length: gloo has no other.
        longest = max(part.stop - part.start for part in shares)
        padded = mine.new_zeros((longest, *mine.shape[1:]))
        padded[: len(mine)] = mine.detach()
        received = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(received, padded)
        return torch.cat([rows[: part.stop - part.start] for rows, part in zip(received, shares, strict=True)])

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes, and hear of wishes, all in one message."""
        import torch
        import torch.distributed as dist

        if self.size == 1 or not tensors:
            return
        wish = tensors[0].new_full((1,), float(self.stop_wanted))
        flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), wish])
        dist.all_reduce(flat)
        self.any_stop_wanted = bool(flat[-1] > 0)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def sync_stop(self, wish: bool) -> bool:
        """Whether all stop now: alone, as wished; else when a wish has gone round, which takes a step more."""
        self.stop_wanted = wish
        return wish if self.size == 1 else self.any_stop_wanted

    def broadcast(self, value: Any) -> Any:
        """What process 0 has."""
        import torch.distributed as dist

        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, device=_device())
        return told[0]

    def barrier(self) -> None:
        """Until all processes are here."""
        import torch.distributed as dist

        if self.size > 1:
            dist.barrier()


SINGLE = World()


@contextmanager
def init_distributed() -> Iterator[World]:
    """Among the processes that torchrun started, for as long as the block runs; without torchrun, alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    if not world.is_main:
        console.silence()
    yield world
    # In order: a process that goes while others still talk to it takes them along. After an error there is no order.
    world.barrier()
    dist.destroy_process_group()


def _shares(count: int, size: int) -> list[slice]:
    whole, more = divmod(count, size)
    starts = [rank * whole + min(rank, more) for rank in range(size + 1)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def _device() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
