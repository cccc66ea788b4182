"""Who is told of a commit, and when: one half of many works while PocketBase does."""

from __future__ import annotations

import asyncio

import pytest
from parlant.core.agents import AgentId
from parlant.core.customers import CustomerId
from parlant.core.sessions import EventKind, EventSource, Session

from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.config import PocketBaseSettings, StoreSettings
from pb_cached.pocketbase.commit import Reply
from pb_cached.writes.telling import LEAST, PASSES, Outcome, Telling
from tests.conftest import EXCLUSIVE


def outcomes(telling: Telling, count: int) -> list[Outcome]:
    made: list[Outcome] = [asyncio.get_running_loop().create_future() for _ in range(count)]
    for number, outcome in enumerate(made):
        telling.add(outcome, [Reply(str(number).encode())])
    return made


def told(made: list[Outcome]) -> list[bytes | None]:
    """What those know who were told."""
    return [outcome.result()[0].record for outcome in made if outcome.done() and not outcome.cancelled()]


def all_of(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]


async def test_few_are_told_at_once() -> None:
    telling = Telling()
    made = outcomes(telling, LEAST - 1)
    telling_them = asyncio.ensure_future(telling.by_halves(lambda: False))
    await asyncio.sleep(0)
    assert telling_them.done()
    assert told(made) == all_of(LEAST - 1)


@pytest.mark.parametrize("count", [LEAST, LEAST + 1, 1000])
async def test_of_many_who_write_nothing_more_all_are_told_soon(count: int) -> None:
    telling = Telling()
    made = outcomes(telling, count)
    telling_them = asyncio.ensure_future(telling.by_halves(lambda: False))
    await asyncio.sleep(0)
    assert told(made) == all_of(count)[: count - count // 2], "in their order"
    for _ in range(PASSES):
        await asyncio.sleep(0)
    assert telling_them.done()
    assert told(made) == all_of(count)


async def test_the_second_half_is_told_when_what_the_first_one_writes_is_on_its_way() -> None:
    telling, queue = Telling(), list[int]()
    made = outcomes(telling, 100)
    made[0].add_done_callback(lambda _: queue.append(1))
    await telling.by_halves(lambda: bool(queue))
    assert len(told(made)) == 50
    telling.soon()
    assert len(told(made)) == 50, "first that is sent"
    await asyncio.sleep(0)
    assert told(made) == all_of(100)


async def test_where_something_is_queued_already_it_goes_first() -> None:
    telling = Telling()
    made = outcomes(telling, 100)
    await telling.by_halves(lambda: True)
    assert told(made) == []
    telling.soon()
    telling.soon()
    await asyncio.sleep(0)
    assert told(made) == all_of(100)


async def test_who_has_left_is_told_nothing() -> None:
    telling = Telling()
    made = outcomes(telling, 40)
    for outcome in made[::2]:
        outcome.cancel()
    telling.all()
    assert told(made) == all_of(40)[1::2]


@pytest.mark.slow
@pytest.mark.parametrize("commit", ["log", "batch"])
async def test_a_hundred_callers_and_pocketbase_work_at_the_same_time(
    pocketbase: PocketBaseServer, prefix: str, commit: str
) -> None:
    config = Config(
        stores=StoreSettings(f"{prefix}_s", f"{prefix}_c", f"{prefix}_v"),
        pocketbase=PocketBaseSettings(commit=commit),  # type: ignore[arg-type]
        coherence=EXCLUSIVE,
    )
    async with open_stores(config, connection_params=pocketbase.connection_params) as stores:
        store = stores.session_store

        async def write(session: Session, events: int) -> None:
            for _ in range(events):
                await store.create_event(session.id, EventSource.CUSTOMER, EventKind.MESSAGE, "trace", "hello")

        sessions = [await store.create_session(CustomerId("ida"), AgentId("robin")) for _ in range(100)]
        await asyncio.gather(*(write(session, 1) for session in sessions))
        before = stores.stats().sessions.writes
        await asyncio.gather(*(write(session, 10) for session in sessions))
        after = stores.stats().sessions.writes
        assert after.records - before.records == 1000
        assert 15 <= after.commits - before.commits <= 40, "two halves; ten commits of all, or a thousand of one"
