"""Room for what waits to be written, and the order in which callers get it."""

from __future__ import annotations

import asyncio
import time

import pytest

from pb_cached.config import WriteSettings
from pb_cached.errors import QueueFull
from pb_cached.writes.room import Room


@pytest.fixture
def room() -> Room:
    """It is full."""
    made = Room(WriteSettings(max_queued_records=2, max_queued_bytes=1000))
    made.enter(10, 2)
    return made


def soon() -> float:
    return time.monotonic() + 5


async def waiting(room: Room, *sizes: int, until: float | None = None) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(room.wait_and_enter(size, until or soon())) for size in sizes]
    await asyncio.sleep(0)
    assert room.is_full
    assert not any(task.done() for task in tasks)
    return tasks


async def test_room_is_bounded_by_records_and_by_bytes_and_one_has_it_however_large_it_is() -> None:
    room = Room(WriteSettings(max_queued_records=2, max_queued_bytes=1000))
    room.enter(5000)
    assert room.is_full
    room.leave(5000)
    room.enter(10)
    assert not room.is_full
    room.enter(10)
    assert room.is_full


async def test_who_waits_gets_in_in_the_order_of_coming_and_before_who_comes_later(room: Room) -> None:
    first, second, third = await waiting(room, 1, 2, 3)
    room.leave(10, 2)
    assert room.is_full, "two of those who wait have entered, and nobody else can"
    await asyncio.gather(first, second)
    assert not third.done()
    room.leave(1)
    await third
    assert (room.records, room.bytes) == (2, 5)


async def test_who_is_cancelled_just_as_he_is_let_in_leaves_again(room: Room) -> None:
    first, second = await waiting(room, 1, 2)
    room.leave(5)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert (room.records, room.bytes) == (2, 7)


async def test_who_waits_for_too_long_is_told_and_the_next_one_is_none_the_worse(room: Room) -> None:
    (late,) = await waiting(room, 1, until=time.monotonic() + 0.05)
    (patient,) = await waiting(room, 2)
    with pytest.raises(QueueFull, match=r"2 records of about 10 bytes .*max_queued_records, max_queued_bytes"):
        await late
    room.leave(10, 2)
    await patient
    assert (room.records, room.bytes) == (1, 2)


async def test_nobody_waits_for_a_room_that_is_closed(room: Room) -> None:
    tasks = await waiting(room, 1, 2, 3)
    room.close()
    await asyncio.gather(*tasks)
    await room.wait_and_enter(4, time.monotonic() - 1)
    assert room.bytes == 20
