"""The audit finds what is not as PocketBase has it, and nothing else (design: section 8)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio
from parlant.core.persistence.document_database import DocumentCollection, identity_loader_for

from pb_cached import Config
from pb_cached.cache.partition import Key
from pb_cached.coherence import Follower, audit
from pb_cached.coherence.audit import Audited
from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.config import CoherenceSettings
from pb_cached.exact import dumps
from tests.conftest import DatabaseMaker
from tests.test_log_path import Note, by_id, note

FOLLOWING = Config(coherence=CoherenceSettings(mode="realtime", audit_interval=0))

Notes = PocketBaseDocumentCollection[Note]


@pytest_asyncio.fixture
async def servers(make_database: DatabaseMaker) -> AsyncIterator[list[Notes]]:
    """The same notes, as two servers have them."""
    async with (
        httpx.AsyncClient() as one,
        httpx.AsyncClient() as other,
        make_database(config=FOLLOWING, http_client=one) as first,
        make_database(config=FOLLOWING, http_client=other) as second,
    ):
        found = []
        for database in (first, second):
            opened: DocumentCollection[Note] = await database.get_or_create_collection(
                "notes", Note, identity_loader_for(Note)
            )
            notes = cast(Notes, opened)
            found.append(notes)
            follower = follower_of(notes)
            await asyncio.gather(*(follower.caught_up(log) for log in follower._logs))
        yield found


def follower_of(notes: Notes) -> Follower:
    follower = notes._connection.follower
    assert follower is not None
    return follower


def sample_of(follower: Follower) -> tuple[Audited, Key]:
    """What the audit may look at: the one cache there is, and a partition of it."""
    (audited,) = follower.audit._audited
    key = audited.sample()
    assert key is not None
    return audited, key


def falsified(notes: Notes, number: int, **fields: Any) -> None:
    """The cache believes in a change that PocketBase has never seen."""
    assert notes._cached is not None
    cache = notes._cached.cache
    place = next(record for record, _ in cache._records.items())
    entry = cache.entry(place)
    assert entry is not None
    document: Any = note(number, **fields)
    cache.apply(cache.state(place, entry.rev + 1, document, dumps(document)))


async def test_what_is_right_is_found_right_also_while_it_changes(servers: list[Notes]) -> None:
    writer, reader = servers
    await asyncio.gather(*(writer.insert_one(note(number)) for number in range(10)))
    for number in range(10):
        await reader.find_one(by_id(number))
    follower = follower_of(reader)

    async def write() -> None:
        for number in range(60):
            await writer.update_one(by_id(number % 10), cast(Note, {"stars": number}))

    async def look() -> None:
        for _ in range(40):
            await follower.audit.look_at(*sample_of(follower))

    await asyncio.gather(write(), look())
    stats = follower.stats()
    assert stats.audits > 0
    assert stats.mismatches == 0


async def test_a_change_that_never_was_is_found_and_dropped(
    servers: list[Notes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "ON_ITS_WAY", 0.05)
    _, notes = servers
    await notes.insert_one(note(1))
    await notes.find_one(by_id(1))
    falsified(notes, 1, text="never written")
    assert cast(Any, await notes.find_one(by_id(1)))["text"] == "never written"
    follower = follower_of(notes)
    await follower.audit.look_at(*sample_of(follower))
    assert (follower.stats().audits, follower.stats().mismatches) == (1, 1)
    assert await notes.find_one(by_id(1)) == note(1)


async def test_what_is_not_answered_from_is_not_judged(
    servers: list[Notes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "ON_ITS_WAY", 0.01)
    _, notes = servers
    await notes.insert_one(note(1))
    await notes.find_one(by_id(1))
    falsified(notes, 1, text="never written")
    follower = follower_of(notes)
    sample = sample_of(follower)
    follower.lost("a test")
    await follower.audit.look_at(*sample)
    assert follower.stats().audits == 0


async def test_it_is_made_again_and_again(servers: list[Notes]) -> None:
    random.seed(1)
    _, notes = servers
    await notes.insert_one(note(1))
    await notes.find_one(by_id(1))
    follower = follower_of(notes)
    follower.audit._interval = 0.01
    running = asyncio.create_task(follower.audit.run())
    async with asyncio.timeout(20):
        while follower.stats().audits < 3:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    running.cancel()
    assert follower.stats().mismatches == 0
