"""Turns of writes that rest on the same thing."""

from __future__ import annotations

import asyncio
import time

import pytest

from pb_cached.errors import QueueFull
from pb_cached.stores.turns import Turns

A, B = ("a",), ("b", "c")


@pytest.fixture
def turns() -> Turns:
    return Turns("store", 5.0)


async def begun(*tasks: asyncio.Task[None]) -> None:
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


async def test_a_turn_that_nobody_has_is_taken_at_once_and_others_do_not_wait_for_it(turns: Turns) -> None:
    assert turns.take_at_once(A)
    assert not turns.take_at_once(A)
    assert turns.take_at_once(B)
    turns.leave(A)
    assert turns.take_at_once(A)
    turns.leave(A)
    turns.leave(B)
    assert len(turns) == 0


async def test_who_waits_gets_it_in_the_order_of_waiting(turns: Turns) -> None:
    order: list[int] = []

    async def work(number: int) -> None:
        async with turns.of(A):
            order.append(number)
            await asyncio.sleep(0)
            assert not turns.take_at_once(A), "nobody gets in between"

    await asyncio.gather(*map(work, range(10)))
    assert order == list(range(10))
    assert len(turns) == 0


async def test_who_leaves_the_queue_is_passed_over(turns: Turns) -> None:
    assert turns.take_at_once(A)
    waiting = [asyncio.create_task(turns.take(A, None)) for _ in range(3)]
    await begun(*waiting)
    waiting[0].cancel()
    turns.leave(A)
    await waiting[1]
    await begun(waiting[2])
    turns.leave(A)
    await waiting[2]
    turns.leave(A)
    assert waiting[0].cancelled()
    assert len(turns) == 0


@pytest.mark.parametrize("is_next", [True, False])
async def test_who_is_cancelled_just_as_the_turn_comes_passes_it_on(turns: Turns, is_next: bool) -> None:
    assert turns.take_at_once(A)
    cancelled = asyncio.create_task(turns.take(A, None))
    later = asyncio.create_task(turns.take(A, None)) if is_next else None
    await begun(cancelled)
    turns.leave(A)  # to the first one, who hears of it when
    cancelled.cancel()  # nothing else counts for it any more
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    if later is not None:
        async with asyncio.timeout(1):
            await later
        turns.leave(A)
    assert len(turns) == 0


async def test_a_turn_that_does_not_come_in_time_is_no_longer_waited_for(turns: Turns) -> None:
    assert turns.take_at_once(A)
    began = time.monotonic()
    with pytest.raises(QueueFull, match="store: the writes before this one took longer than 5 s"):
        await turns.take(A, time.monotonic() + 0.1)
    assert time.monotonic() - began < 1
    with pytest.raises(QueueFull):
        await turns.take(A, time.monotonic() - 1)
    turns.leave(A)
    assert len(turns) == 0
    async with turns.of(A, time.monotonic() - 1):
        pass  # nobody has it, so there is nothing to wait for
