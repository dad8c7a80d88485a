"""Queries that wait are encoded together: the more wait, the more go into one batch, and none waits for a full one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

Query, Answer = TypeVar("Query"), TypeVar("Answer")


class Full(Exception):
    """As many queries wait as may."""


class Waiting(Generic[Query, Answer]):
    """A queue in front of a function that answers several queries at once.

    One batch is answered at a time, in a thread of `executor`; what arrives meanwhile is the next batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Query]], Sequence[Answer]],
        executor: Executor,
        *,
        together: int = 32,
        at_most: int = 512,
    ) -> None:
        """Answer with `answer`.

        Args:
            together: queries a batch at most.
            at_most: queries that may wait; more are refused.
        """
        self._answer, self._executor, self._together, self._at_most = answer, executor, together, at_most
        self._waiting: deque[tuple[Query, asyncio.Future[Answer]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self.batches: deque[int] = deque(maxlen=1000)

    async def __call__(self, query: Query) -> Answer:
        """The answer to one query.

        Raises:
            Full: too many wait. Whatever answering it raises.
        """
        if len(self._waiting) >= self._at_most:
            raise Full
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        """Answer until nobody waits."""
        while self._waiting:
            some = [self._waiting.popleft() for _ in range(min(self._together, len(self._waiting)))]
            # Whoever has hung up needs no answer.
            some = [(query, future) for query, future in some if not future.done()]
            if some:
                await self._answered(some)

    async def _answered(self, some: Sequence[tuple[Query, asyncio.Future[Answer]]]) -> None:
        self.batches.append(len(some))
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._executor, self._answer, [query for query, _ in some])
        except Exception as error:
            # One that cannot be answered is no reason to refuse the others.
            if len(some) > 1:
                for each in some:
                    await self._answered([each])
                return
            if not some[0][1].done():
                some[0][1].set_exception(error)
            return
        for (_, future), answer in zip(some, answers, strict=True):
            if not future.done():
                future.set_result(answer)
