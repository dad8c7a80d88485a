"""The processes of torchrun: which one this is, and the few messages that they exchange.

Every process knows the rows of the whole batch, so only embeddings, gradients and a request to stop are exchanged. In a
single process all of it is free.
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
        rank: number of this process; only 0 writes files and messages.
        size: number of processes.
        stop_wanted: this process asks to stop. The request travels with the next sum of gradients.
        any_stop_wanted: one of them had asked by then.
    """

    rank: int = 0
    size: int = 1
    stop_wanted: bool = False
    any_stop_wanted: bool = False

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and messages."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """Return this process' part of `count` items; the parts differ by one item at most, and may be empty."""
        return _shards(count, self.size)[self.rank]

    def all_gather(self, mine: torch.Tensor, count: int) -> torch.Tensor:
        """Return the rows of all processes, [count, ...], in the order of their shards. Gradients do not pass through.

        Args:
            mine: rows of this process, as many as `shard(count)` has.
        """
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return mine.detach()
        shards = _shards(count, self.size)
        # Messages of equal length, which is all that gloo has.
        longest = max(part.stop - part.start for part in shards)
        padded = mine.new_zeros((longest, *mine.shape[1:]))
        padded[: len(mine)] = mine.detach()
        received = [torch.empty_like(padded) for _ in shards]
        dist.all_gather(received, padded)
        return torch.cat([rows[: part.stop - part.start] for rows, part in zip(received, shards, strict=True)])

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes; requests to stop travel in the same message."""
        import torch
        import torch.distributed as dist

        if self.size == 1 or not tensors:
            return
        request = tensors[0].new_full((1,), float(self.stop_wanted))
        flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), request])
        dist.all_reduce(flat)
        self.any_stop_wanted = bool(flat[-1] > 0)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def sync_stop(self, stop_wanted: bool) -> bool:
        """Return whether all processes stop now; a request reaches the others one step later."""
        self.stop_wanted = stop_wanted
        return stop_wanted if self.size == 1 else self.any_stop_wanted

    def broadcast(self, value: Any) -> Any:
        """Return the value of process 0, in every process."""
        import torch.distributed as dist

        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=_device())
        return values[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on the others: they find what rank 0 wrote."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        import torch.distributed as dist

        if self.size > 1:
            dist.barrier()


SINGLE = World()


@contextmanager
def init_distributed() -> Iterator[World]:
    """Join the processes that torchrun started while the block runs; without torchrun, yield a world of one."""
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
    # A process that leaves while others still send to it would stop them too. After an error there is no order.
    world.barrier()
    dist.destroy_process_group()


def _shards(count: int, size: int) -> list[slice]:
    whole, more = divmod(count, size)
    starts = [rank * whole + min(rank, more) for rank in range(size + 1)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def _device() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
