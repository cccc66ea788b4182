"""Writes are committed in the order in which they were submitted, whatever becomes of their commits: a reader
never sees event n+1 before n (design: section 6, rule 3)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any, TypedDict, cast

import httpx
import msgspec
import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId
from parlant.core.persistence.document_database import DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.config import CoherenceSettings, PocketBaseSettings, WriteSettings
from tests.conftest import EXCLUSIVE, DatabaseMaker
from tests.faults import EVERY, Exchange, FaultProxy, Gate, answer, cut_after, delay

pytestmark = pytest.mark.slow

WRITES = 450
SOON = 30.0


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String


Notes = DocumentCollection[Note]


def note(id_: str) -> Note:
    return Note(id=ObjectId(id_), creation_utc="2026", version=Version.String("1.0.0"))


@pytest.fixture(params=["log", "batch"])
def path(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def commits(path: str, prefix: str) -> str:
    """What the path of a commit's request begins with."""
    return f"/api/collections/{prefix}_log/records?commit" if path == "log" else "/api/batch"


@pytest_asyncio.fixture
async def notes(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy, path: Any
) -> AsyncIterator[Notes]:
    config = Config(
        pocketbase=PocketBaseSettings(commit=path),
        coherence=EXCLUSIVE,
        writes=WriteSettings(max_commit_seconds=SOON),
    )
    params = {**pocketbase.connection_params, "url": proxy.url}
    async with make_database(config=config, connection_params=params) as database:
        yield await open_notes(database)


async def open_notes(database: PocketBaseDocumentDatabase) -> Notes:
    return await database.get_or_create_collection("notes", Note, identity_loader_for(Note))


class Table:
    """The notes in PocketBase, past us, in the order in which it has inserted them."""

    def __init__(self, http: httpx.AsyncClient, name: str) -> None:
        self._http = http
        self._name = name

    async def numbers(self) -> list[int]:
        query = f"SELECT doc_id FROM `{self._name}` ORDER BY rowid"
        answered = (await self._http.post("/api/sql", json={"query": query})).raise_for_status()
        return [int(id_) for (id_,) in answered.json()["rows"] if id_ != "first"]


@pytest_asyncio.fixture
async def table(pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[Table]:
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers, timeout=30) as http:
        yield Table(http, f"{prefix}_notes")


async def burst(notes: Notes, proxy: FaultProxy, commits: str, fault: Any, at: Any) -> list[Any]:
    """More writes than a commit may hold, all of them queued before the first of them is sent."""
    gate = Gate()
    proxy.plan("POST", commits, gate)
    first = asyncio.create_task(notes.insert_one(note("first")))
    await asyncio.wait_for(gate.reached.wait(), SOON)
    proxy.plan("POST", commits, fault, at=at)
    writes = [asyncio.create_task(notes.insert_one(note(str(number)))) for number in range(WRITES)]
    for _ in range(3):
        await asyncio.sleep(0)
    gate.open()
    await first
    return await asyncio.gather(*writes, return_exceptions=True)


async def too_large_for_ten(exchange: Exchange) -> None:
    if exchange.body.count(b"2026") > 10:
        await exchange.reply(413, b'{"data":{},"message":"Request entity too large.","status":413}')
    else:
        await exchange.forward()


@pytest.mark.parametrize(
    ("fault", "at"),
    [(Exchange.forward, ()), (answer(413), (1,)), (answer(429), (1, 3)), (cut_after, (1, 2, 4)),
     (too_large_for_ten, EVERY)],
    ids=["well", "halved", "busy", "lost", "halved again and again"],
)  # fmt: skip
async def test_writes_are_committed_in_the_order_in_which_they_were_submitted(
    notes: Notes, proxy: FaultProxy, table: Table, commits: str, fault: Any, at: Any
) -> None:
    outcomes = await burst(notes, proxy, commits, fault, at)
    assert all(outcome.acknowledged for outcome in outcomes)
    assert await table.numbers() == list(range(WRITES))


async def test_a_reader_during_a_burst_never_sees_a_later_write_without_an_earlier_one(
    notes: Notes, proxy: FaultProxy, table: Table, commits: str
) -> None:
    """It asks PocketBase each time that a commit has been answered, and nothing is committed meanwhile."""
    seen: list[list[int]] = []

    async def looked_at(exchange: Exchange) -> None:
        await exchange.ask_in_vain()
        seen.append(await table.numbers())
        exchange.hang_up()  # it is sent again, and its receipt is found

    await burst(notes, proxy, commits, looked_at, (1, 3, 5))
    assert [sorted(numbers) for numbers in seen] == [list(range(len(numbers))) for numbers in seen]
    assert len({len(numbers) for numbers in seen} - {0, WRITES}) >= 2, "it was looked in between"
    assert await table.numbers() == list(range(WRITES))


async def test_the_log_tells_of_the_writes_in_their_order(
    notes: Notes, proxy: FaultProxy, pocketbase: PocketBaseServer, prefix: str, commits: str, path: str
) -> None:
    """By it other servers follow."""
    await burst(notes, proxy, commits, answer(413), (1,))
    payload = "payload" if path == "log" else "''"
    query = f"SELECT n, {payload} FROM `{prefix}_log` WHERE n>0 AND id<'z' ORDER BY n"
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers, timeout=30) as http:
        rows = (await http.post("/api/sql", json={"query": query})).raise_for_status().json()["rows"]
    assert [int(n) for n, _ in rows] == list(range(1, len(rows) + 1))
    if path == "log":
        told = [row for _, payload in rows for row in msgspec.json.decode(payload)["c"]][1:]
        assert [str(number) in row for number, row in zip(range(WRITES), told, strict=True)] == [True] * WRITES


# --- two at once -----------------------------------------------------------------------------------------------


async def commit(notes: Notes, *ids: str) -> None:
    """As a store does that sees to the order itself."""
    collection = cast(PocketBaseDocumentCollection[Note], notes)
    await collection.commit([collection.codec.insert(note(id_)) for id_ in ids])


async def until_it_follows(database: PocketBaseDocumentDatabase) -> None:
    """What was committed before that counts as missing, and is looked up."""
    async with asyncio.timeout(SOON):
        while (coherence := database.stats().coherence) is None or coherence.state != "following":  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def is_over(call: asyncio.Task[Any]) -> bool:
    done, _ = await asyncio.wait([call], timeout=0.3)
    return bool(done)


@pytest.mark.parametrize("path", ["batch"], indirect=True)
async def test_what_stands_apart_does_not_wait_for_the_commit_under_way_and_what_does_not_waits(
    notes: Notes, proxy: FaultProxy, table: Table, commits: str, pocketbase: PocketBaseServer, prefix: str
) -> None:
    gate = Gate()
    proxy.plan("POST", commits, gate)
    plain = asyncio.create_task(notes.insert_one(note("1")))
    await asyncio.wait_for(gate.reached.wait(), SOON)
    await asyncio.wait_for(commit(notes, "2", "3"), SOON)
    assert await table.numbers() == [2, 3]
    next_plain = asyncio.create_task(notes.insert_one(note("4")))
    apart = asyncio.create_task(commit(notes, "5"))
    assert not await is_over(next_plain), "it comes after the first one"
    assert not await is_over(apart), "and keeps its place in the queue"
    gate.open()
    await asyncio.wait_for(asyncio.gather(plain, next_plain, apart), SOON)
    assert (await table.numbers())[:3] == [2, 3, 1]
    query = f"SELECT server, n FROM `{prefix}_log` WHERE n>0 AND id<'z' ORDER BY server, n"
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers, timeout=30) as http:
        rows = (await http.post("/api/sql", json={"query": query})).raise_for_status().json()["rows"]
    lanes = [[int(n) for _, n in some] for _, some in itertools.groupby(rows, key=lambda row: row[0])]
    assert len(lanes) == 2
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in lanes), "each lane leaves no number out"


@pytest.mark.parametrize("path", ["batch"], indirect=True)
async def test_there_are_never_more_than_two_and_closing_waits_for_both(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy, table: Table, commits: str
) -> None:
    config = Config(pocketbase=PocketBaseSettings(commit="batch"), coherence=EXCLUSIVE)
    params = {**pocketbase.connection_params, "url": proxy.url}
    async with make_database(config=config, connection_params=params) as database:
        notes = await open_notes(database)
        gates = [Gate(), Gate()]
        for time, gate in enumerate(gates, 1):
            proxy.plan("POST", commits, gate, at=(time,))
        before = proxy.count("POST", commits)
        calls = []
        for number in range(6):
            calls.append(asyncio.create_task(commit(notes, str(number))))
            await asyncio.sleep(0.05)
        assert proxy.count("POST", commits) - before == 2
        for call in calls:
            call.cancel()
        for gate in gates:
            asyncio.get_running_loop().call_later(0.3, gate.open)
    assert sorted(await table.numbers()) == list(range(6))


async def test_what_stands_apart_is_told_apart_by_those_who_follow(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy, commits: str, path: Any
) -> None:
    """Its commits overtake each other on their way, and none of them is missing."""
    config = Config(
        pocketbase=PocketBaseSettings(commit=path),
        coherence=CoherenceSettings(mode="realtime"),
        writes=WriteSettings(max_commit_records=5),
    )
    params = {**pocketbase.connection_params, "url": proxy.url}
    async with (
        make_database(config=config, connection_params=params) as database,
        httpx.AsyncClient() as http,
        make_database(config=config, http_client=http) as other,
    ):
        notes, followed = await open_notes(database), await open_notes(other)
        await until_it_follows(other)
        assert (await followed.find({})).total_count == 0
        proxy.plan("POST", commits, delay(0.05), at=range(1, 40, 3))
        writing = [asyncio.create_task(commit(notes, str(number))) for number in range(120)]
        async with asyncio.timeout(SOON):
            await asyncio.gather(*writing)
            while (await followed.find({})).total_count < 120:  # noqa: ASYNC110 - nothing tells when
                await asyncio.sleep(0.01)
        coherence = other.stats().coherence
        assert coherence is not None
        assert coherence.gaps == 0, "no number was missing for long"
