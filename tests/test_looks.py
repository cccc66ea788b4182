"""A refused commit whose reason cannot be looked at: nobody else's write fails for that (design: rule 11)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, TypedDict

import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId
from parlant.core.persistence.document_database import DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.config import PocketBaseSettings, WriteSettings
from pb_cached.errors import RequestRejected
from tests.conftest import EXCLUSIVE, DatabaseMaker
from tests.faults import EVERY, Fault, FaultProxy, Gate, answer

pytestmark = pytest.mark.slow

DEADLINE = 6.0


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    text: str


Notes = DocumentCollection[Note]


def note(id_: str) -> Note:
    return Note(id=ObjectId(id_), creation_utc="2026", version=Version.String("1.0.0"), text="")


def by_id(id_: str) -> Any:
    return {"id": {"$eq": id_}}


async def open_notes(database: PocketBaseDocumentDatabase) -> Notes:
    return await database.get_or_create_collection("notes", Note, identity_loader_for(Note))


@pytest_asyncio.fixture
async def others(make_database: DatabaseMaker) -> AsyncIterator[Notes]:
    """Another server's."""
    async with make_database() as database:
        yield await open_notes(database)


@pytest_asyncio.fixture
async def ours(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy, others: Notes
) -> AsyncIterator[Notes]:
    """A server whose cache has a note "gone" that is there no more, as only a look can tell."""
    config = Config(
        coherence=EXCLUSIVE,
        writes=WriteSettings(deadline=DEADLINE),
        pocketbase=PocketBaseSettings(commit="log"),
    )
    async with make_database(
        connection_params={**pocketbase.connection_params, "url": proxy.url}, config=config
    ) as database:
        notes = await open_notes(database)
        await notes.insert_one(note("gone"))
        assert await notes.find_one(by_id("gone"))
        await others.delete_one(by_id("gone"))
        yield notes


async def one_bad_write_among_good_ones(notes: Notes) -> list[Any]:
    """Their outcomes, the bad one's first. All share a commit."""
    return await asyncio.gather(
        notes.update_one(by_id("gone"), Note(text="new")),
        *(notes.insert_one(note(f"good{number}")) for number in range(5)),
        return_exceptions=True,
    )


async def good_ones(notes: Notes) -> set[str]:
    return {document["id"] for document in (await notes.find({})).items}


GOOD = {f"good{number}" for number in range(5)}


async def test_a_look_that_fails_at_first_is_tried_again(
    ours: Notes, others: Notes, proxy: FaultProxy, prefix: str
) -> None:
    proxy.plan("GET", f"/api/collections/{prefix}_notes/records", answer(500), at=(1, 2))
    bad, *good = await one_bad_write_among_good_ones(ours)
    assert bad.matched_count == 0
    assert all(outcome.acknowledged for outcome in good)
    assert await good_ones(others) == GOOD
    commits = proxy.count("POST", f"/api/collections/{prefix}_log/records?commit")
    assert commits == 3, "the note's own, the refused one, and one without what was refused"


@pytest.mark.parametrize("silent", [False, True], ids=["fail", "hang"])
async def test_where_all_looks_fail_the_good_writes_are_committed_in_time(
    ours: Notes, others: Notes, proxy: FaultProxy, prefix: str, silent: bool
) -> None:
    gate = Gate()
    fault: Fault = gate if silent else answer(500)
    proxy.plan("GET", f"/api/collections/{prefix}_notes/records", fault, at=EVERY)
    begun = time.monotonic()
    bad, *good = await one_bad_write_among_good_ones(ours)
    assert time.monotonic() - begun < DEADLINE + 4
    gate.open()
    assert isinstance(bad, RequestRejected)
    assert "could not be looked at" in str(bad)
    assert all(outcome.acknowledged for outcome in good), good
    assert await good_ones(others) == GOOD


async def test_where_sql_fails_too_the_good_writes_are_committed(
    ours: Notes, others: Notes, proxy: FaultProxy
) -> None:
    """By it unique indexes and the installation are looked at."""
    for method in ("GET", "POST"):
        path = "/api/sql" if method == "POST" else "/api/collections/"
        proxy.plan(method, path, answer(500), at=EVERY)
    bad, *good = await one_bad_write_among_good_ones(ours)
    assert isinstance(bad, RequestRejected)
    assert all(outcome.acknowledged for outcome in good), good
    assert await good_ones(others) == GOOD
