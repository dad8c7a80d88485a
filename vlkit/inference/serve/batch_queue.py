"""A queue that answers waiting requests in batches: the more requests wait, the larger the next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class QueueFull(Exception):
    """The queue is full."""


class BatchQueue(Generic[Request, Result]):
    """A queue in front of a function that answers several requests at once.

    One batch is answered at a time, in a thread of `executor`; requests that arrive meanwhile form the next batch. No
    request waits for a batch to fill up.

    Attributes:
        batches: sizes of the latest 1000 batches.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], Sequence[Result]],
        executor: Executor,
        *,
        max_batch: int = 32,
        max_waiting: int = 512,
    ) -> None:
        """Answer requests with `answer`.

        Args:
            max_batch: requests per batch.
            max_waiting: requests that may wait; further ones are refused.
        """
        self._answer, self._executor, self._max_batch, self._max_waiting = answer, executor, max_batch, max_waiting
        self._waiting: deque[tuple[Request, asyncio.Future[Result]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self.batches: deque[int] = deque(maxlen=1000)

    async def submit(self, request: Request) -> Result:
        """Wait for the answer to one request.

        Raises:
            QueueFull: too many requests wait. Exception: whatever `answer` raises for this request.
        """
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        """Answer batches until no request waits."""
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
            # A client that disconnected needs no answer.
            batch = [(request, future) for request, future in batch if not future.done()]
            if batch:
                await self._answer_batch(batch)

    async def _answer_batch(self, batch: Sequence[tuple[Request, asyncio.Future[Result]]]) -> None:
        self.batches.append(len(batch))
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._executor, self._answer, [request for request, _ in batch])
        except Exception as error:
            # One request that fails must not fail the others: answer them one by one.
            if len(batch) > 1:
                for request in batch:
                    await self._answer_batch([request])
                return
            if not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
