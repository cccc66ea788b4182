"""The write path under faults: what is acknowledged is committed once, what fails fails alone, and nothing is ever
half there (design: section 6, rules 1, 2 and 11)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

import httpx
import msgspec
import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId, SortDirection
from parlant.core.persistence.document_database import CollectionIndex, DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.config import PocketBaseSettings, WriteSettings, find_address
from pb_cached.connection import Connection, connection_to
from pb_cached.errors import (
    AuthenticationFailed,
    CollectionNotFound,
    DocumentTooLarge,
    NotCommitted,
    OutcomeUnknown,
    PBCachedError,
    PocketBaseUnavailable,
    QueueFull,
    RecordNotFound,
    RequestRejected,
    SchemaError,
    UniqueViolation,
)
from pb_cached.pocketbase.commit import BatchPath, Operation, SinglePath
from pb_cached.pocketbase.ids import first_id_at, new_id
from pb_cached.pocketbase.schema import log_collection
from pb_cached.telemetry import log_through
from pb_cached.writes import Committer
from tests.conftest import DatabaseMaker
from tests.faults import (
    EVERY,
    Exchange,
    Fault,
    FaultProxy,
    Gate,
    answer,
    at_most,
    cut_after,
    cut_before,
    cut_in_request,
    cut_in_response,
    lost_by_gateway,
    twice,
)

TOO_LARGE = b'{"data":{},"message":"Request entity too large.","status":413}'

pytestmark = pytest.mark.slow

COMMIT = ""
"""What the path of a request that is a commit begins with. Set by `way`."""
WAY: Literal["log", "batch"] = "log"
PATIENCE = 20.0
"""Seconds; no test waits for its end where all is well."""

LOG = log_through(None)


@pytest.fixture(autouse=True, params=["log", "batch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """Both commit paths give the same answers."""
    log = f"/api/collections/{prefix}_log/records?commit"
    monkeypatch.setattr(sys.modules[__name__], "WAY", request.param)
    monkeypatch.setattr(sys.modules[__name__], "COMMIT", log if request.param == "log" else "/api/batch")


batch_only = pytest.mark.parametrize("way", ["batch"], indirect=True)


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    text: str
    extra_text: str


def note(id_: str, text: str = "") -> Note:
    return Note(id=ObjectId(id_), creation_utc="2026", version=Version.String("1.0.0"), text=text, extra_text=text)


def by_id(id_: str) -> dict[str, Any]:
    return {"id": {"$eq": id_}}


class Records:
    """PocketBase's own view, past proxy and database."""

    def __init__(self, http: httpx.AsyncClient, prefix: str) -> None:
        self.http = http
        self._prefix = prefix

    async def of(self, name: str) -> list[dict[str, Any]]:
        found = await self.http.get(
            f"/api/collections/{self._prefix}_{name}/records", params={"perPage": 1000, "sort": "id"}
        )
        records = found.raise_for_status().json()["items"]
        return [record for record in records if not record["id"].startswith("z")]  # which are no commits

    async def notes(self) -> dict[str, int]:
        """Each document's `rev`, which counts its writes."""
        return {record["doc_id"]: record["rev"] for record in await self.of("notes")}

    async def numbers(self) -> list[int]:
        """The `n` of the log, in the order of the commits."""
        return [record["n"] for record in await self.of("log")]


@pytest_asyncio.fixture
async def records(pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[Records]:
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers, verify=False, timeout=30) as http:
        yield Records(http, prefix)


def writes(**settings: Any) -> Config:
    patient = {"deadline": PATIENCE, "close_timeout": PATIENCE, "max_commit_seconds": PATIENCE}
    return Config(writes=WriteSettings(**patient | settings), pocketbase=PocketBaseSettings(commit=WAY))


Through = Callable[..., PocketBaseDocumentDatabase]


@pytest.fixture
def through(make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy, prefix: str) -> Through:
    """Makes databases that speak through the proxy."""
    params = {**pocketbase.connection_params, "url": proxy.url}

    def make(collection_prefix: str = prefix, **settings: Any) -> PocketBaseDocumentDatabase:
        return make_database(
            connection_params=params, collection_prefix=collection_prefix, config=writes(**settings)
        )

    return make


async def open_notes(database: PocketBaseDocumentDatabase) -> DocumentCollection[Note]:
    return await database.get_or_create_collection("notes", Note, identity_loader_for(Note))


@pytest_asyncio.fixture
async def database(through: Through) -> AsyncIterator[PocketBaseDocumentDatabase]:
    async with through() as opened:
        yield opened


@pytest_asyncio.fixture
async def notes(database: PocketBaseDocumentDatabase) -> DocumentCollection[Note]:
    return await open_notes(database)


async def blocked(proxy: FaultProxy, notes: DocumentCollection[Note]) -> tuple[Gate, asyncio.Task[Any]]:
    """A gate that holds a commit, that of the document "first". What is written now has to wait for it."""
    gate = Gate()
    proxy.plan("POST", COMMIT, gate)
    first = asyncio.create_task(notes.insert_one(note("first")))
    await gate.reached.wait()
    return gate, first


async def started(*coroutines: Awaitable[Any]) -> list[asyncio.Task[Any]]:
    """Tasks that have run as far as they can."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


# group commit


async def test_what_is_ready_at_once_shares_a_commit(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records
) -> None:
    await asyncio.gather(*(notes.insert_one(note(str(number))) for number in range(500)))
    assert proxy.count("POST", COMMIT) == 3  # of at most 200 records
    assert len(await records.notes()) == 500


async def test_what_arrives_during_a_commit_becomes_the_next_one(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records
) -> None:
    gate, first = await blocked(proxy, notes)
    others = await started(*(notes.insert_one(note(str(number))) for number in range(50)))
    assert proxy.count("POST", COMMIT) == 1
    gate.open()
    await asyncio.gather(first, *others)
    assert proxy.count("POST", COMMIT) == 2
    assert list(await records.notes()) == ["first", *map(str, range(50))]


async def test_a_lone_write_is_sent_at_once(notes: DocumentCollection[Note], proxy: FaultProxy) -> None:
    for number in range(5):
        await notes.insert_one(note(str(number)))
        assert proxy.count("POST", COMMIT) == number + 1


async def test_a_commit_holds_no_more_than_is_set(through: Through, proxy: FaultProxy, records: Records) -> None:
    async with through(max_commit_records=7, max_commit_bytes=10_000) as database:
        notes = await open_notes(database)
        await asyncio.gather(*(notes.insert_one(note(f"s{number}")) for number in range(14)))
        assert proxy.count("POST", COMMIT) == 2
        await asyncio.gather(*(notes.insert_one(note(f"l{number}", "x" * 2_000)) for number in range(8)))
        assert proxy.count("POST", COMMIT) == 6  # a text stands twice in a note
        assert all(len(exchange.body) < 11_000 for exchange in proxy.matching("POST", COMMIT))


# exactly once


@pytest.mark.parametrize(
    "fault",
    [
        cut_before, cut_in_request, cut_after, cut_in_response, twice, lost_by_gateway,
        answer(429), answer(502), answer(503), answer(200, b"<html>"),
    ],
)  # fmt: skip
async def test_whatever_becomes_of_a_commit_it_is_applied_once(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records, fault: Fault
) -> None:
    proxy.plan("POST", COMMIT, fault)
    await asyncio.gather(notes.insert_one(note("a", "old")), notes.insert_one(note("b", "old")))
    assert await records.notes() == {"a": 1, "b": 1}
    proxy.plan("POST", COMMIT, fault)
    updated, deleted = await asyncio.gather(
        notes.update_one(by_id("a"), Note(text="new")), notes.delete_one(by_id("b"))
    )
    assert updated.updated_document == {**note("a", "old"), "text": "new"}
    assert deleted.deleted_count == 1
    assert await records.notes() == {"a": 2}
    assert await records.numbers() in ([1, 2], [1, 2, 3])  # the second two may share a commit


@batch_only
async def test_a_batch_that_pocketbase_gave_up_is_sent_again(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records
) -> None:
    proxy.plan("POST", COMMIT, answer(400, b'{"data":{},"message":"Batch transaction failed.","status":400}'))
    await notes.insert_one(note("a"))
    assert await records.notes() == {"a": 1}
    assert await records.numbers() == [1]


async def test_an_attempt_that_arrives_late_is_not_applied_a_second_time(
    through: Through, proxy: FaultProxy, records: Records, make_database: DatabaseMaker
) -> None:
    gate = Gate()
    async with impatient(make_database, proxy, records) as notes:
        await notes.insert_one(note("a"))
        proxy.plan("POST", COMMIT, gate)
        await notes.update_one(by_id("a"), Note(text="new"))
        gate.open()
        await proxy.matching("POST", COMMIT)[1].finished.wait()
    assert proxy.matching("POST", COMMIT)[1].status == 400
    assert await records.notes() == {"a": 2}


async def test_an_attempt_that_arrives_after_its_refusal_is_not_applied_at_all(
    proxy: FaultProxy, records: Records, make_database: DatabaseMaker
) -> None:
    """What a commit was refused for may be gone by then."""
    gate = Gate()
    async with impatient(make_database, proxy, records) as notes:
        await notes.ensure_indexes([CollectionIndex((("text", SortDirection.ASC),), unique=True)])
        await notes.insert_one(note("a", "taken"))
        proxy.plan("POST", COMMIT, gate)
        with pytest.raises(UniqueViolation):
            await notes.insert_one(note("b", "taken"))
        await notes.delete_one(by_id("a"))
        gate.open()
        await proxy.matching("POST", COMMIT)[1].finished.wait()
    assert await records.notes() == {}
    assert await records.numbers() == [1, 0, 2]


@asynccontextmanager
async def impatient(
    make_database: DatabaseMaker, proxy: FaultProxy, records: Records
) -> AsyncIterator[DocumentCollection[Note]]:
    """Notes over an HTTP client that gives up on a request after a third of a second, so that it is sent again."""
    params = {"url": proxy.url, "admin_token": records.http.headers["Authorization"]}
    timeout = httpx.Timeout(PATIENCE, read=0.3)
    async with (
        httpx.AsyncClient(timeout=timeout, verify=False) as http,
        make_database(connection_params=params, http_client=http, config=writes()) as database,
    ):
        yield await open_notes(database)


# an outcome that stays unknown


@pytest.mark.parametrize(
    ("fault", "applied"),
    [
        (cut_after, True),
        (lost_by_gateway, True),
        (cut_before, False),
        (cut_in_request, False),
        (answer(504), False),
    ],
)
async def test_what_stays_unknown_is_said_to_be_unknown_and_is_whole_or_not_there(
    through: Through, proxy: FaultProxy, records: Records, fault: Fault, applied: bool
) -> None:
    async with through(deadline=0.3) as database:
        notes = await open_notes(database)
        proxy.plan("POST", COMMIT, fault, at=EVERY)
        before = time.monotonic()
        outcomes = await asyncio.gather(
            *(notes.insert_one(note(id_)) for id_ in ("a", "b")), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown, OutcomeUnknown]
        assert time.monotonic() - before < PATIENCE
        assert proxy.count("POST", COMMIT) > 1
        assert await records.notes() == ({"a": 1, "b": 1} if applied else {})
        proxy.forget_plans()
        await notes.insert_one(note("c"))
        assert await records.numbers() == ([1, 2] if applied else [2])


async def test_a_silent_pocketbase_cannot_hold_a_write_beyond_its_deadline(
    through: Through, proxy: FaultProxy
) -> None:
    async with through(deadline=0.3) as database:
        notes = await open_notes(database)
        proxy.plan("POST", COMMIT, Gate(), at=EVERY)
        before = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            await notes.insert_one(note("a"))
        assert time.monotonic() - before < PATIENCE


async def test_where_nothing_was_sent_nothing_is_unknown(
    through: Through, proxy: FaultProxy, records: Records
) -> None:
    async with through(deadline=0.3) as database:
        notes = await open_notes(database)
        async with proxy.down():
            with pytest.raises((PocketBaseUnavailable, OutcomeUnknown)):
                await notes.insert_one(note("a"))  # over connections that were cut
            with pytest.raises(PocketBaseUnavailable, match=proxy.url):
                await notes.insert_one(note("b"))
        await notes.insert_one(note("c"))
    assert list(await records.notes()) == ["c"]


@pytest.mark.parametrize("path", ["log", "notes"])
async def test_a_commit_that_was_applied_is_never_reported_as_not_applied(
    through: Through, proxy: FaultProxy, records: Records, prefix: str, path: str
) -> None:
    """Its answer is lost, and then also what would prove that it happened."""
    async with through(deadline=0.5) as database:
        notes = await open_notes(database)
        proxy.plan("POST", COMMIT, cut_after)
        proxy.plan("GET", f"/api/collections/{prefix}_{path}/records/", answer(503), at=EVERY)
        reads_back = (WAY, path) != ("log", "notes")  # there the log alone tells all
        with pytest.raises(OutcomeUnknown) if reads_back else contextlib.nullcontext():
            await notes.insert_one(note("a"))
        proxy.forget_plans()
        await notes.insert_one(note("b"))
    assert await records.notes() == {"a": 1, "b": 1}
    assert await records.numbers() == [1, 2]


async def test_a_commit_that_arrived_twice_is_not_taken_for_refused_when_its_receipt_cannot_be_read(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records, prefix: str
) -> None:
    proxy.plan("POST", COMMIT, twice)
    proxy.plan("GET", f"/api/collections/{prefix}_log/records/", answer(500))
    with pytest.raises(OutcomeUnknown):
        await notes.insert_one(note("a"))
    assert await records.notes() == {"a": 1}


async def test_a_token_that_dies_between_two_attempts_leaves_the_outcome_unknown(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records
) -> None:
    refused = {"data": {"requests": {"0": {"response": {"status": 403, "message": "Only superusers."}}}}}
    proxy.plan("POST", COMMIT, cut_after)
    proxy.plan("POST", COMMIT, answer(400, msgspec.json.encode(refused)), at=EVERY)
    proxy.plan("POST", "/api/collections/", answer(403), at=EVERY)
    proxy.plan("GET", "/api/collections/", answer(403), at=EVERY)
    with pytest.raises(OutcomeUnknown):
        await notes.insert_one(note("a"))
    assert await records.notes() == {"a": 1}


async def test_updates_that_share_a_record_share_an_unknown_outcome(
    through: Through, proxy: FaultProxy, records: Records, prefix: str
) -> None:
    """They were not refused, so none of them is to blame, and none is tried again by itself: it may be there."""
    async with through(deadline=1.0) as database:
        notes = await open_notes(database)
        await notes.insert_one(note("a"))
        gate = Gate()
        proxy.plan("POST", COMMIT, gate)
        proxy.plan("POST", COMMIT, cut_after, at=EVERY)
        (first,) = await started(notes.update_one(by_id("a"), Note(extra_text="first")))
        await gate.reached.wait()
        reads = f"/api/collections/{prefix}_notes/records"
        before = proxy.count("GET", reads)
        conditional: Any = {**by_id("a"), "text": {"$eq": ""}}
        others = await started(
            notes.update_one(by_id("a"), Note(extra_text="new")),
            notes.update_one(conditional, Note(text="second")),
        )
        while proxy.count("GET", reads) < before + 2:
            await asyncio.wait(others, timeout=0.001)
        await asyncio.gather(*(exchange.finished.wait() for exchange in proxy.matching("GET", reads)))
        gate.open()
        await first
        for other in others:
            with pytest.raises(OutcomeUnknown):
                await other
        proxy.forget_plans()
        assert await records.notes() == {"a": 3}
        assert await notes.find_one(by_id("a")) == {**note("a"), "text": "second", "extra_text": "new"}


# a bad write fails alone


async def test_a_unique_index_refuses_only_the_write_that_violates_it(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records
) -> None:
    await notes.ensure_indexes([CollectionIndex((("text", SortDirection.ASC),), unique=True)])
    texts = ["a", "b", "a", "c", "b", "d"]
    outcomes = await asyncio.gather(
        *(notes.insert_one(note(str(number), text)) for number, text in enumerate(texts)), return_exceptions=True
    )
    failed = {number for number, outcome in enumerate(outcomes) if isinstance(outcome, UniqueViolation)}
    assert failed == {2, 4}
    assert isinstance(outcomes[2], UniqueViolation) and outcomes[2].fields == ("text",)
    assert set(await records.notes()) == {"0", "1", "3", "5"}
    assert proxy.count("POST", COMMIT) == {"log": 2, "batch": 3}[WAY]
    assert await records.numbers() == [1]


@batch_only
async def test_a_vanished_record_fails_only_the_writes_to_it(committer: Committer, table: str) -> None:
    here, gone = new_id(), new_id()
    await committer.write(*(create(table, id_) for id_ in (here, gone)))
    await committer.write(Operation("DELETE", table, gone))
    outcomes = await asyncio.gather(
        committer.write(change(table, here)),
        committer.write(change(table, gone)),
        committer.write(change(table, here), change(table, gone)),
        committer.write(Operation("DELETE", table, gone)),
        committer.write(change(table, here)),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [list, RecordNotFound, RecordNotFound, RecordNotFound, list]
    assert isinstance(outcomes[4], list) and msgspec.json.decode(outcomes[4][0].record or b"")["rev"] == 3


@batch_only
async def test_the_operations_of_one_write_succeed_or_fail_together(
    committer: Committer, table: str, records: Records
) -> None:
    one, other = new_id(), new_id()
    with pytest.raises(RequestRejected):
        await committer.write(create(table, one), create(table, other), create(table, one))
    assert await records.notes() == {}


async def test_a_document_that_pocketbase_finds_too_large_fails_alone(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records
) -> None:
    proxy.plan("POST", COMMIT, at_most(20_000, TOO_LARGE), at=EVERY)
    texts = ["s" * 100] * 3 + ["l" * 20_000] + ["s" * 100] * 3
    outcomes = await asyncio.gather(
        *(notes.insert_one(note(str(number), text)) for number, text in enumerate(texts)), return_exceptions=True
    )
    assert [number for number, o in enumerate(outcomes) if isinstance(o, DocumentTooLarge)] == [3]
    assert set(await records.notes()) == {"0", "1", "2", "4", "5", "6"}


async def test_a_commit_that_pocketbase_finds_too_large_is_halved(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records
) -> None:
    proxy.plan("POST", COMMIT, at_most(20_000, TOO_LARGE), at=EVERY)
    await asyncio.gather(*(notes.insert_one(note(str(number), "x" * 1_000)) for number in range(40)))
    assert list(await records.notes()) == list(map(str, range(40)))
    assert await records.numbers() == list(range(1, len(await records.numbers()) + 1))


async def test_a_commit_of_more_requests_than_pocketbase_allows_is_halved(
    notes: DocumentCollection[Note], records: Records
) -> None:
    """Somebody has lowered the number in the dashboard since we asked for it."""
    async with batch_settings(records, maxRequests=5):
        await asyncio.gather(*(notes.insert_one(note(str(number))) for number in range(20)))
    assert list(await records.notes()) == list(map(str, range(20)))


@batch_only
async def test_how_many_requests_pocketbase_allows_is_learned_once(
    notes: DocumentCollection[Note], records: Records, proxy: FaultProxy
) -> None:
    async with batch_settings(records, maxRequests=5):
        await asyncio.gather(*(notes.insert_one(note(str(number))) for number in range(20)))
        before = proxy.count("POST", COMMIT)
        await asyncio.gather(*(notes.insert_one(note(str(number))) for number in range(20, 40)))
        assert proxy.count("POST", COMMIT) == before + 5
    assert list(await records.notes()) == list(map(str, range(40)))


@batch_only
async def test_a_number_of_requests_that_leaves_no_room_is_raised_again(
    make_database: DatabaseMaker, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_database(config=writes(), logger=logging.getLogger("test")) as database:
        notes = await open_notes(database)
        async with batch_settings(records, maxRequests=1):
            await asyncio.gather(*(notes.insert_one(note(str(number))) for number in range(8)))
            assert (await records.http.get("/api/settings")).json()["batch"]["maxRequests"] >= 202
    assert list(await records.notes()) == list(map(str, range(8)))
    assert caplog.text.count("the batch API was limited to 1 requests; it is on again") == 1


@batch_only
@pytest.mark.parametrize("most", [1, 2])
async def test_where_we_may_not_raise_the_number_of_requests_what_fits_is_committed(
    make_database: DatabaseMaker, records: Records, most: int
) -> None:
    settings = PocketBaseSettings(commit="batch", manage_settings=False)
    async with (
        batch_settings(records, enabled=True, maxRequests=202),
        make_database(config=Config(pocketbase=settings)) as database,
    ):
        notes = await open_notes(database)
        (committer,) = set(database._committers.values())
        async with batch_settings(records, maxRequests=most):
            outcomes = await asyncio.gather(
                *(notes.insert_one(note(str(number))) for number in range(4)), return_exceptions=True
            )
            table, one, other = notes.codec.collection, new_id(), new_id()  # type: ignore[attr-defined]
            with pytest.raises(RequestRejected, match=r"requests.*nothing was written") as pair:
                await committer.write(create(table, one), create(table, other))
            assert "allow" in str(pair.value).lower() or "switch it on" in str(pair.value).lower()
        if most == 1:
            assert all(isinstance(outcome, RequestRejected) for outcome in outcomes)
            assert "limited to 1 requests" in str(outcomes[0])
        assert len(await records.notes()) == {1: 0, 2: 4}[most]
        await notes.insert_one(note("last"))


@batch_only
async def test_a_commit_in_doubt_is_not_made_in_parts_when_the_number_is_lowered(
    notes: DocumentCollection[Note], records: Records, proxy: FaultProxy
) -> None:
    """(1) The commit is applied, (2) its answer is lost, (3) the number is lowered, (4) it is sent again."""
    async with batch_settings(records, enabled=True):

        async def applied_and_lowered(exchange: Exchange) -> None:
            await exchange.ask_in_vain()
            await records.http.patch("/api/settings", json={"batch": {"maxRequests": 5}})
            exchange.hang_up()

        proxy.plan("POST", COMMIT, applied_and_lowered)
        await asyncio.gather(*(notes.insert_one(note(str(number))) for number in range(20)))
    assert await records.notes() == {str(number): 1 for number in range(20)}
    assert len(await records.of("notes")) == 20


@pytest.mark.parametrize("way", ["log"], indirect=True)
async def test_where_batches_are_too_small_to_mix_collections_the_log_path_learns_it_once(
    make_database: DatabaseMaker, records: Records, proxy: FaultProxy, pocketbase: PocketBaseServer
) -> None:
    settings = PocketBaseSettings(commit="log", manage_settings=False)
    params = {**pocketbase.connection_params, "url": proxy.url}
    async with (
        batch_settings(records, enabled=True, maxRequests=202),
        make_database(config=Config(pocketbase=settings), connection_params=params) as database,
    ):
        notes = await open_notes(database)
        others = await database.get_or_create_collection("others", Note, identity_loader_for(Note))
        async with batch_settings(records, maxRequests=1):
            for round_ in range(2):
                before = proxy.count("POST", "/api/batch")
                await asyncio.gather(
                    *(each.insert_one(note(f"{n}{round_}")) for n in range(4) for each in (notes, others))
                )
                assert proxy.count("POST", "/api/batch") == before + (1 - round_)
    expected = {f"{n}{round_}": 1 for round_ in range(2) for n in range(4)}
    assert await records.notes() == expected
    assert len(await records.of("others")) == 8


async def test_a_pocketbase_that_takes_one_request_at_a_time_is_written_to_all_the_same(
    make_database: DatabaseMaker, records: Records
) -> None:
    """And we may not change that. By the batch path each write is then a request of its own."""
    settings = PocketBaseSettings(commit=WAY, manage_settings=False)
    async with (
        batch_settings(records, enabled=True, maxRequests=1),
        make_database(config=Config(pocketbase=settings)) as database,
    ):
        assert database.stats().writes.path == {"log": "log", "batch": "single"}[WAY]
        notes = await open_notes(database)
        others = await database.get_or_create_collection("others", Note, identity_loader_for(Note))
        await asyncio.gather(*(each.insert_one(note(str(n))) for n in range(5) for each in (notes, others)))
    assert await records.notes() == {str(number): 1 for number in range(5)}
    assert len(await records.of("others")) == 5


async def test_a_batch_api_that_was_switched_off_is_switched_on_again(
    make_database: DatabaseMaker, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_database(config=writes(), logger=logging.getLogger("test")) as database:
        notes = await open_notes(database)
        others = await database.get_or_create_collection("others", Note, identity_loader_for(Note))
        async with batch_settings(records, enabled=False):
            await asyncio.gather(*(each.insert_one(note("a")) for each in (notes, others)))
            assert (await records.http.get("/api/settings")).json()["batch"]["enabled"]
    assert await records.notes() == {"a": 1}
    assert [record["doc_id"] for record in await records.of("others")] == ["a"]
    assert caplog.text.count("the batch API was switched off; it is on again") == 1


@batch_only
async def test_where_we_may_not_switch_the_batch_api_on_again_the_error_says_what_to_do(
    make_database: DatabaseMaker, records: Records
) -> None:
    settings = PocketBaseSettings(commit="batch", manage_settings=False)
    async with (
        batch_settings(records, enabled=True),
        make_database(config=Config(pocketbase=settings)) as database,
    ):
        notes = await open_notes(database)
        async with batch_settings(records, enabled=False):
            with pytest.raises(RequestRejected, match=r"manage_settings is false\); nothing was written\. Switch"):
                await notes.insert_one(note("a"))
        await notes.insert_one(note("b"))
        assert await records.notes() == {"b": 1}


@pytest.mark.parametrize("way", ["log"], indirect=True)
async def test_the_log_path_goes_on_without_the_batch_api(make_database: DatabaseMaker, records: Records) -> None:
    settings = PocketBaseSettings(commit="log", manage_settings=False)
    async with (
        batch_settings(records, enabled=True),
        make_database(config=Config(pocketbase=settings)) as database,
    ):
        notes = await open_notes(database)
        others = await database.get_or_create_collection("others", Note, identity_loader_for(Note))
        async with batch_settings(records, enabled=False):
            for round_ in range(2):
                await asyncio.gather(
                    *(each.insert_one(note(f"{n}{round_}")) for n in range(5) for each in (notes, others))
                )
    expected = [f"{n}{round_}" for round_ in range(2) for n in range(5)]
    assert sorted(await records.notes()) == sorted(expected)
    assert sorted(record["doc_id"] for record in await records.of("others")) == sorted(expected)


@asynccontextmanager
async def batch_settings(records: Records, **changes: Any) -> AsyncIterator[None]:
    before = (await records.http.get("/api/settings")).json()["batch"]
    await records.http.patch("/api/settings", json={"batch": changes})
    try:
        yield
    finally:
        await records.http.patch("/api/settings", json={"batch": before})


async def test_a_log_that_was_deleted_is_said_to_be_missing(
    notes: DocumentCollection[Note], records: Records, prefix: str
) -> None:
    await notes.insert_one(note("a"))
    await records.http.delete(f"/api/collections/{prefix}_log")
    with pytest.raises(SchemaError, match=f"{prefix}_log"):
        await notes.update_one(by_id("a"), Note(text="new"))


async def test_a_log_that_was_deleted_is_back_when_its_database_opens_again(
    through: Through, records: Records, prefix: str
) -> None:
    """Also where other databases have kept the connection open."""
    async with through(f"{prefix}_another"):
        async with through() as database:
            await (await open_notes(database)).insert_one(note("a"))
        await records.http.delete(f"/api/collections/{prefix}_log")
        async with through() as database:
            await (await open_notes(database)).insert_one(note("b"))
        assert await records.notes() == {"a": 1, "b": 1}
        assert len(await records.numbers()) == 1


@batch_only
async def test_a_collection_that_was_deleted_fails_only_the_writes_to_it(
    committer: Committer, table: str, records: Records, prefix: str
) -> None:
    gone = new_id()
    outcomes = await asyncio.gather(
        committer.write(create(table, new_id())),
        committer.write(create(f"{prefix}_gone", gone)),
        committer.write(change(f"{prefix}_gone", gone)),
        committer.write(Operation("DELETE", f"{prefix}_gone", gone)),
        committer.write(create(table, new_id())),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [list, CollectionNotFound, CollectionNotFound, CollectionNotFound, list]


async def test_a_refused_token_is_an_authentication_failure(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records
) -> None:
    async def as_guest(exchange: Exchange) -> None:
        exchange.replace(records.http.headers["Authorization"].encode(), b"not.a.token")
        await exchange.forward()

    for method in ("GET", "POST"):
        proxy.plan(method, "/", as_guest, at=EVERY)
    with pytest.raises(AuthenticationFailed):
        await notes.insert_one(note("a"))
    proxy.forget_plans()
    await notes.insert_one(note("b"))
    assert await records.notes() == {"b": 1}
    assert await records.numbers() == [1]


# the log


async def test_each_commit_leaves_one_record_in_the_log(notes: DocumentCollection[Note], records: Records) -> None:
    await notes.insert_one(note("a"))
    await asyncio.gather(*(notes.insert_one(note(str(number))) for number in range(9)))
    await notes.update_one(by_id("a"), Note(text="new"))
    await notes.delete_one(by_id("a"))
    log = await records.of("log")
    assert [entry["n"] for entry in log] == [1, 2, 3, 4]
    assert len({entry["server"] for entry in log}) == 1
    assert all(entry["created"] for entry in log)


@batch_only
@pytest.mark.parametrize("sql", [True, False], ids=["by SQL", "by REST"])
async def test_trimming_removes_what_is_old_and_nothing_else(
    connection: Connection, records: Records, prefix: str, sql: bool
) -> None:
    now = time.time()
    old = [first_id_at(now - 7_200 + second) for second in range(12)]
    new = [first_id_at(now - 60 + second) for second in range(3)]
    assert connection.dialect.batch is not None
    limits = msgspec.structs.replace(connection.dialect.batch, max_requests=6)
    dialect = msgspec.structs.replace(connection.dialect, sql=sql, batch=limits)
    path = BatchPath(connection.client, dialect, connection.schema, log_collection(f"{prefix}_log"), "server")
    for id_ in (*old, *new):
        await records.http.post(f"/api/collections/{prefix}_log/records", json={"id": id_, "n": 1, "guard": id_})
    async for _ in path.trim(now - 3_600, None):
        pass
    assert [entry["id"] for entry in await records.of("log")] == new
    async for _ in path.trim(now - 3_600, None):
        pass
    assert len(await records.of("log")) == 3


async def test_a_log_is_trimmed_when_it_is_opened(
    make_database: DatabaseMaker, records: Records, prefix: str
) -> None:
    async with make_database(config=writes()):
        pass  # and has trimmed what there is
    id_ = first_id_at(time.time() - 7_200)
    old = {"id": id_, "n": 0, "guard": id_}
    await records.http.post(f"/api/collections/{prefix}_log/records", json=old)
    async with make_database(config=writes(log_retention=60.0, deadline=7_000.0)):
        pass
    assert len(await records.of("log")) == 1, "a commit may be sent again until its deadline"
    async with make_database(config=writes()):
        pass
    assert await records.of("log") == []


@batch_only
async def test_a_log_that_cannot_be_trimmed_is_no_reason_to_stop(through: Through, proxy: FaultProxy) -> None:
    proxy.plan("POST", "/api/sql", answer(500), at=(3,))
    async with through() as database:
        await (await open_notes(database)).insert_one(note("a"))
    assert proxy.count("POST", "/api/sql") == 3


# the caller


async def test_a_write_goes_on_when_its_caller_leaves(
    notes: DocumentCollection[Note], database: PocketBaseDocumentDatabase, proxy: FaultProxy, records: Records
) -> None:
    gate, first = await blocked(proxy, notes)
    (second,) = await started(notes.insert_one(note("second")))
    first.cancel()
    second.cancel()
    await asyncio.wait([first, second])
    gate.open()
    await database.flush()
    assert await records.notes() == {"first": 1, "second": 1}


async def test_a_document_that_is_changed_after_the_call_is_written_as_it_was(
    notes: DocumentCollection[Note], proxy: FaultProxy
) -> None:
    gate, first = await blocked(proxy, notes)
    mine, change_ = note("mine", "before"), Note(text="before")
    (write,) = await started(notes.insert_one(mine))
    mine["text"] = mine["extra_text"] = "after"
    (update,) = await started(notes.update_one(by_id("first"), change_))
    change_["text"] = "after"
    gate.open()
    await asyncio.gather(first, write, update)
    assert await notes.find_one(by_id("mine")) == note("mine", "before")
    assert "after" not in str((await notes.find({})).items)


async def test_flush_waits_for_every_write_that_was_submitted(
    notes: DocumentCollection[Note], database: PocketBaseDocumentDatabase, proxy: FaultProxy, records: Records
) -> None:
    gate, _ = await blocked(proxy, notes)
    await started(*(notes.insert_one(note(str(number))) for number in range(300)))
    (flush,) = await started(database.flush())
    assert not flush.done()
    gate.open()
    await flush
    assert len(await records.notes()) == 301


async def test_flush_waits_for_every_write_that_was_called_wherever_it_waits(
    through: Through, proxy: FaultProxy
) -> None:
    async with through(max_queued_records=2) as database:
        notes = await open_notes(database)
        await notes.insert_one(note("one"))
        gate, _ = await blocked(proxy, notes)
        waiting = await started(
            notes.update_one(by_id("one"), Note(text="a")),
            notes.update_one(by_id("one"), Note(extra_text="b")),  # behind the other, whichever is read first
            notes.insert_one(note("for which there is no room")),
            notes.update_one(by_id("none"), note("none"), upsert=True),
            notes.delete_one(by_id("first")),
        )
        (flush,) = await started(database.flush())
        later = await started(notes.insert_one(note("later")))
        assert not flush.done()
        gate.open()
        await flush
        assert all(write.done() for write in waiting)
        await asyncio.gather(*waiting, *later)
        found = await notes.find_one(by_id("one"))
        assert found is not None
        assert (found["text"], found["extra_text"]) == ("a", "b")


async def test_flush_does_not_tell_whose_write_failed(
    notes: DocumentCollection[Note], database: PocketBaseDocumentDatabase, proxy: FaultProxy
) -> None:
    proxy.plan("POST", COMMIT, answer(500))
    (write,) = await started(notes.insert_one(note("a")))
    await database.flush()
    with pytest.raises(RequestRejected):
        await write


# backpressure


async def test_beyond_its_bounds_the_queue_lets_callers_wait_in_their_order(
    through: Through, proxy: FaultProxy, records: Records
) -> None:
    async with through(max_queued_records=5) as database:
        notes = await open_notes(database)
        gate, first = await blocked(proxy, notes)
        others = await started(*(notes.insert_one(note(f"{number:02}")) for number in range(20)))
        assert database.stats().writes.queued == 5
        gate.open()
        await asyncio.gather(first, *others)
        assert list(await records.notes()) == ["first", *(f"{number:02}" for number in range(20))]
        stats = database.stats().writes
        assert (stats.queued, stats.queued_bytes) == (0, 0)


async def test_bytes_are_bounded_too_and_one_write_always_has_room(
    through: Through, proxy: FaultProxy, records: Records
) -> None:
    async with through(max_queued_bytes=2_000) as database:
        notes = await open_notes(database)
        gate, first = await blocked(proxy, notes)
        others = await started(*(notes.insert_one(note(str(number), "x" * 5_000)) for number in range(3)))
        assert database.stats().writes.queued == 2
        gate.open()
        await asyncio.gather(first, *others)
        assert len(await records.notes()) == 4


async def test_who_finds_no_room_until_the_deadline_gets_an_error_and_nothing_is_written(
    through: Through, proxy: FaultProxy, records: Records
) -> None:
    async with through(max_queued_records=1, deadline=0.4) as database:
        notes = await open_notes(database)
        proxy.plan("POST", COMMIT, Gate(), at=EVERY)
        first, second, third = await started(*(notes.insert_one(note(id_)) for id_ in ("a", "b", "c")))
        third.cancel()
        await asyncio.wait([first, second, third])
        assert third.cancelled()
        assert isinstance(first.exception(), OutcomeUnknown)
        assert isinstance(second.exception(), QueueFull | OutcomeUnknown)
        proxy.forget_plans()
        await notes.insert_one(note("d"))
    assert {"b", "c"}.isdisjoint(await records.notes())


async def test_closing_commits_what_waits_for_room(through: Through, proxy: FaultProxy, records: Records) -> None:
    database = await through(max_queued_records=1).__aenter__()
    notes = await open_notes(database)
    gate, first = await blocked(proxy, notes)
    (waiting,) = await started(notes.insert_one(note("late")))
    (closing,) = await started(database.__aexit__(None, None, None))
    gate.open()
    await asyncio.gather(closing, first, waiting)
    assert list(await records.notes()) == ["first", "late"]


async def test_closing_in_vain_tells_those_who_wait_for_room(
    through: Through, proxy: FaultProxy, records: Records
) -> None:
    database = await through(max_queued_records=1, close_timeout=0.3).__aenter__()
    notes = await open_notes(database)
    gate, first = await blocked(proxy, notes)
    (waiting,) = await started(notes.insert_one(note("late")))
    with pytest.raises(NotCommitted, match="longer than"):
        await database.__aexit__(None, None, None)
    with pytest.raises(NotCommitted):
        await waiting
    await asyncio.wait([first])
    gate.open()
    await proxy.matching("POST", COMMIT)[0].finished.wait()
    assert set(await records.notes()) <= {"first"}


async def test_stats_tell_what_was_committed(
    notes: DocumentCollection[Note], database: PocketBaseDocumentDatabase
) -> None:
    await notes.ensure_indexes([CollectionIndex((("text", SortDirection.ASC),), unique=True)])
    await asyncio.gather(*(notes.insert_one(note(str(number), str(number))) for number in range(30)))
    await asyncio.gather(
        *(notes.insert_one(note(f"a{number}", str(number))) for number in range(28, 32)), return_exceptions=True
    )
    stats = database.stats().writes
    assert (stats.path, stats.writes, stats.records, stats.commits) == (WAY, 32, 32, 2)
    assert (stats.commit_records_max, stats.refused, stats.unknown) == (30, 2, 0)
    assert 0 < stats.commit_seconds_p50 <= stats.write_seconds_p99
    assert stats.bytes > 32 * 50


@pytest.mark.parametrize("fault", [answer(429), answer(503), cut_before, cut_after, lost_by_gateway])
async def test_stats_count_what_was_sent_again(
    notes: DocumentCollection[Note], database: PocketBaseDocumentDatabase, proxy: FaultProxy, fault: Fault
) -> None:
    await notes.insert_one(note("a"))
    assert database.stats().writes.retries == 0
    proxy.plan("POST", COMMIT, fault, at=(1, 2))
    await notes.insert_one(note("b"))
    stats = database.stats().writes
    assert (stats.retries, stats.commits, stats.attempts_more) == (2, 2, 0)


async def test_stats_count_the_commits_that_were_made_anew(
    notes: DocumentCollection[Note], database: PocketBaseDocumentDatabase, proxy: FaultProxy
) -> None:
    proxy.plan("POST", COMMIT, answer(413))
    await asyncio.gather(*(notes.insert_one(note(str(number))) for number in range(4)))
    stats = database.stats().writes
    assert (stats.retries, stats.commits, stats.attempts_more) == (0, 2, 1)


# closing


async def test_closing_commits_what_is_queued(through: Through, proxy: FaultProxy, records: Records) -> None:
    database = await through().__aenter__()
    gate, _ = await blocked(proxy, await open_notes(database))
    notes = await open_notes(database)
    queued = await started(*(notes.insert_one(note(str(number))) for number in range(300)))
    (closing,) = await started(database.__aexit__(None, None, None))
    assert not closing.done()
    gate.open()
    await closing
    assert len(await records.notes()) == 301
    await asyncio.gather(*queued)
    with pytest.raises(PBCachedError, match="closed"):
        await notes.insert_one(note("late"))


async def test_closing_commits_what_waits_behind_another_change_of_its_record(
    through: Through, proxy: FaultProxy, records: Records
) -> None:
    database = await through().__aenter__()
    notes = await open_notes(database)
    await notes.insert_one(note("one"))
    await notes.insert_one(note("two"))
    gate = Gate()
    proxy.plan("POST", COMMIT, gate)
    first = asyncio.create_task(notes.update_one(by_id("one"), Note(text="a")))
    await gate.reached.wait()
    waiting = await started(
        notes.update_one(by_id("one"), Note(text="b")),
        notes.delete_one(by_id("two")),
        notes.update_one(by_id("none"), note("none"), upsert=True),
    )
    (closing,) = await started(database.__aexit__(None, None, None))
    gate.open()
    await closing
    await asyncio.gather(first, *waiting)
    assert set(await records.notes()) == {"one", "none"}


async def test_closing_in_vain_says_what_was_not_committed(
    through: Through, proxy: FaultProxy, records: Records, prefix: str
) -> None:
    database = await through(close_timeout=0.2).__aenter__()
    notes = await open_notes(database)
    gate, first = await blocked(proxy, notes)
    queued = await started(*(notes.insert_one(note(str(number))) for number in range(5)))
    with pytest.raises(
        NotCommitted, match=rf"5 writes were never sent \({prefix}_notes\), and of 1 it is unknown.*{prefix}_notes"
    ):
        await database.__aexit__(None, None, None)
    for write in (first, *queued):
        with pytest.raises((NotCommitted, OutcomeUnknown)):
            await write
    gate.open()
    await proxy.matching("POST", COMMIT)[0].finished.wait()
    assert set(await records.notes()) <= {"first"}


async def test_closing_the_last_database_waits_for_its_timeout_once(through: Through, proxy: FaultProxy) -> None:
    database = await through(close_timeout=1.5).__aenter__()
    gate, _ = await blocked(proxy, await open_notes(database))
    before = time.monotonic()
    with pytest.raises(NotCommitted):
        await database.__aexit__(None, None, None)
    assert 1.5 <= time.monotonic() - before < 2.9
    gate.open()


async def test_closing_one_of_several_databases_commits_what_is_queued(
    through: Through, records: Records, prefix: str
) -> None:
    async with through():
        database = await through(f"{prefix}_another").__aenter__()
        notes = await open_notes(database)
        queued = await started(*(notes.insert_one(note(str(number))) for number in range(500)))
        await database.__aexit__(None, None, None)
        assert len(await Records(records.http, f"{prefix}_another").notes()) == 500
        await asyncio.gather(*queued)


@batch_only
async def test_closing_one_of_several_databases_in_vain_says_how_much_is_on_its_way(
    through: Through, records: Records, prefix: str, proxy: FaultProxy
) -> None:
    async with through(close_timeout=0.2):
        database = await through(f"{prefix}_another", close_timeout=0.2).__aenter__()
        notes = await open_notes(database)
        gate, first = await blocked(proxy, notes)
        queued = await started(*(notes.insert_one(note(str(number))) for number in range(5)))
        before = time.monotonic()
        with pytest.raises(NotCommitted, match=r"longer than 0\.2 s: 6 writes are still on their way"):
            await database.__aexit__(None, None, None)
        assert time.monotonic() - before < PATIENCE / 2
        with pytest.raises(PBCachedError, match="use it inside"):
            await database.flush()
        gate.open()
        await asyncio.gather(first, *queued)
        assert len(await Records(records.http, f"{prefix}_another").notes()) == 6


# the committer by itself


@pytest_asyncio.fixture
async def connection(
    database: PocketBaseDocumentDatabase, through: Through, pocketbase: PocketBaseServer, proxy: FaultProxy
) -> AsyncIterator[Connection]:
    """The one that `database` has."""
    address = find_address(Config(), {**pocketbase.connection_params, "url": proxy.url})
    async with connection_to(address, writes(), None, LOG) as opened:
        yield opened


@pytest_asyncio.fixture
async def committer(connection: Connection, prefix: str) -> Committer:
    return await connection.committer(prefix)


@pytest_asyncio.fixture
async def table(notes: DocumentCollection[Note], prefix: str) -> str:
    return f"{prefix}_notes"


def create(table: str, id_: str) -> Operation:
    return Operation("POST", table, id_, msgspec.json.encode({"id": id_, "doc_id": id_, "rev": 1}))


def change(table: str, id_: str) -> Operation:
    return Operation("PATCH", table, id_, b'{"rev+":1}')


@batch_only
async def test_replies_are_in_the_order_of_the_operations(committer: Committer, table: str) -> None:
    ids = [new_id() for _ in range(4)]
    replies = await asyncio.gather(
        committer.write(create(table, ids[0]), create(table, ids[1]), change(table, ids[0])),
        committer.write(create(table, ids[2])),
        committer.write(change(table, ids[1]), Operation("DELETE", table, ids[1]), create(table, ids[3])),
    )
    seen = [
        (found["id"], found["rev"]) if (found := msgspec.json.decode(reply.record or b"null")) else None
        for write in replies
        for reply in write
    ]
    assert seen == [(ids[0], 1), (ids[1], 1), (ids[0], 2), (ids[2], 1), (ids[1], 2), None, (ids[3], 1)]


@pytest.mark.parametrize("fault", [cut_before, cut_after, cut_in_response, twice, answer(503)])
async def test_before_batches_a_create_is_repeated_too(
    connection: Connection, proxy: FaultProxy, table: str, records: Records, fault: Fault
) -> None:
    path = SinglePath(connection.client)
    id_ = new_id()
    proxy.plan("POST", f"/api/collections/{table}/", fault)
    (reply,) = await path.commit([create(table, id_)], deadline=PATIENCE)
    assert msgspec.json.decode(reply.record or b"")["id"] == id_
    assert await records.notes() == {id_: 1}


@pytest.mark.parametrize("fault", [cut_before, cut_after, lost_by_gateway])
async def test_before_batches_an_update_without_an_answer_is_unknown(
    connection: Connection, proxy: FaultProxy, table: str, records: Records, fault: Fault
) -> None:
    path = SinglePath(connection.client)
    id_ = new_id()
    await path.commit([create(table, id_)], deadline=PATIENCE)
    proxy.plan("PATCH", f"/api/collections/{table}/", fault)
    with pytest.raises(OutcomeUnknown):
        await path.commit([change(table, id_)], deadline=PATIENCE)
    assert proxy.count("PATCH", f"/api/collections/{table}/") == 1


# everything at once


@pytest.mark.parametrize("seed", range(3))
async def test_on_a_bad_day_every_acknowledged_write_happens_once(
    notes: DocumentCollection[Note], proxy: FaultProxy, records: Records, seed: int
) -> None:
    chance = random.Random(seed)
    troubles: Sequence[Fault] = (
        cut_before, cut_in_request, cut_after, cut_in_response, twice, lost_by_gateway, answer(503), answer(429),
    )  # fmt: skip

    async def bad_day(exchange: Exchange) -> None:
        await (chance.choice(troubles) if chance.random() < 0.5 else Exchange.forward)(exchange)

    for method in ("GET", "POST"):
        proxy.plan(method, "/api/", bad_day, at=EVERY)

    async def life(id_: str) -> None:
        await notes.insert_one(note(id_))
        for number in range(4):
            await notes.update_one(by_id(id_), Note(text=str(number)))

    await asyncio.gather(*(life(str(number)) for number in range(10)))
    proxy.forget_plans()
    assert await records.notes() == {str(number): 5 for number in range(10)}
    assert {found["text"] for found in (await notes.find({})).items} == {"3"}
    numbers = [number for number in await records.numbers() if number]
    assert numbers == list(range(1, len(numbers) + 1))


WRITER = textwrap.dedent("""
    import asyncio, sys
    from parlant.core.persistence.document_database import identity_loader_for
    from pb_cached import Config
    from pb_cached.config import PocketBaseSettings, find_address
    from pb_cached.connection import connection_to
    from pb_cached.pocketbase.ids import new_id
    from tests.test_commits import LOG, change, create

    async def main(url, token, prefix):
        address = find_address(Config(), {"url": url, "admin_token": token})
        config = Config(pocketbase=PocketBaseSettings(commit="batch"))
        async with connection_to(address, config, None, LOG) as connection:
            committer = await connection.committer(prefix)

            async def write_pairs():
                while True:
                    one, other = new_id(), new_id()
                    await committer.write(*(create(f"{prefix}_notes", id_) for id_ in (one, other)))
                    print(one, other, flush=True)
                    await committer.write(change(f"{prefix}_notes", one), change(f"{prefix}_notes", other))

            await asyncio.gather(*(write_pairs() for _ in range(20)))

    asyncio.run(main(*sys.argv[1:]))
""")


@pytest.mark.slow
@batch_only
async def test_a_writer_that_is_killed_loses_nothing_acknowledged_and_leaves_nothing_half(
    notes: DocumentCollection[Note], pocketbase: PocketBaseServer, records: Records, prefix: str
) -> None:
    acknowledged: set[tuple[str, ...]] = set()
    for pairs in (1, 50, 200):
        writer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WRITER, pocketbase.url, pocketbase.connection_params["admin_token"], prefix),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        assert writer.stdout is not None
        for _ in range(pairs):
            line = await writer.stdout.readline()
            assert line, "the writer ended by itself"
            acknowledged.add(tuple(line.decode().split()))
        writer.kill()
        rest, _ = await writer.communicate()
        acknowledged |= {tuple(line.split()) for line in rest.decode().splitlines(keepends=True) if "\n" in line}
    await until_nobody_writes(records)
    revisions: dict[str, int] = {}
    for page in range(1, 100):
        params: dict[str, str | int] = {"perPage": 1000, "page": page, "sort": "id"}
        found = (await records.http.get(f"/api/collections/{prefix}_notes/records", params=params)).json()
        revisions |= {item["id"]: item["rev"] for item in found["items"]}
        if page >= found["totalPages"]:
            break
    assert acknowledged
    for one, other in acknowledged:
        assert revisions.pop(one) == revisions.pop(other)
    unacknowledged = sorted(revisions)
    assert len(unacknowledged) % 2 == 0 and set(revisions.values()) <= {1}


async def until_nobody_writes(records: Records) -> None:
    """A commit that was under way may be applied after its sender's death, but not after a later one's."""
    await records.http.post(
        "/api/batch", json={"requests": [{"method": "DELETE", "url": "/api/collections/x/records/y"}]}
    )


@pytest.mark.slow
async def test_a_pocketbase_that_is_killed_loses_nothing_acknowledged(folder: Path, prefix: str) -> None:
    async with FaultProxy("") as proxy:
        acknowledged: list[str] = []

        async def write(notes: DocumentCollection[Note], worker: int) -> None:
            for number in range(60):
                id_ = f"{worker}-{number}"
                await notes.insert_one(note(id_))
                await notes.update_one(by_id(id_), Note(text="new"))
                acknowledged.append(id_)

        async with PocketBaseServer(folder) as server:
            proxy.server = server.url
            params = {**server.connection_params, "url": proxy.url}
            database = PocketBaseDocumentDatabase(
                None, params, collection_prefix=prefix, config=writes(deadline=60.0)
            )
            await database.__aenter__()
            notes = await open_notes(database)
            workers = [asyncio.create_task(write(notes, worker)) for worker in range(10)]
            while len(acknowledged) < 100:
                await asyncio.wait(workers, timeout=0.01)
            os.kill(server.pid, signal.SIGKILL)
        async with PocketBaseServer(folder) as server:
            proxy.server = server.url
            await asyncio.gather(*workers)
            assert len(acknowledged) == 600
            async with httpx.AsyncClient(
                base_url=server.url, headers={"Authorization": server.connection_params["admin_token"]}
            ) as http:
                revisions = await Records(http, prefix).notes()
            assert revisions == dict.fromkeys(acknowledged, 2)
            await database.__aexit__(None, None, None)
