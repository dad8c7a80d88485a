"""Queries that wait together are answered together, each with its own answer."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="needs vlkit[serve]")


from vlkit.inference.serve.batch_queue import BatchQueue, QueueFull


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=60), st.integers(1, 9), st.sets(st.integers(0, 99), max_size=3)
)
def test_each_who_waits_gets_the_own_answer(queries, together, broken):
    """Whatever comes together; one that fails, fails alone."""
    sizes = []

    def answer(part):
        sizes.append(len(part))
        if broken & set(part):
            raise ValueError("broken")
        return [10 * item for item in part]

    async def all_of_them():
        with ThreadPoolExecutor(1) as executor:
            waiting = BatchQueue(answer, executor, max_batch=together)
            return await asyncio.gather(*(waiting.submit(item) for item in queries), return_exceptions=True)

    for query, actual in zip(queries, asyncio.run(all_of_them()), strict=True):
        assert isinstance(actual, ValueError) if query in broken else actual == 10 * query
    assert max(sizes) <= together
    assert broken & set(queries) or len(sizes) <= -(-len(queries) // together) + 1


def test_more_than_may_wait_are_refused():
    async def many():
        with ThreadPoolExecutor(1) as executor:
            waiting = BatchQueue(lambda part: part, executor, max_batch=1, max_waiting=3)
            return await asyncio.gather(*(waiting.submit(item) for item in range(9)), return_exceptions=True)

    actual = asyncio.run(many())
    assert actual[:3] == [0, 1, 2] and all(isinstance(item, QueueFull) for item in actual[3:])
