"""The peers of the benchmarks hold and answer the same, and a replayed turn asks for what a real one does."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import replace
from typing import Any, Final, TypedDict, cast

import pytest
import pytest_asyncio
from parlant.adapters.db.transient import TransientDocumentCollection, TransientDocumentDatabase
from parlant.core.common import Version
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection, Where
from parlant.core.persistence.document_database import (
    BaseDocument,
    CollectionIndex,
    CollectionSort,
    DeleteResult,
    DocumentCollection,
    DocumentDatabase,
    FindResult,
    InsertResult,
    TDocument,
    UpdateResult,
    identity_loader_for,
)
from parlant.core.tags import Tag
from typing_extensions import override

from bench.peers import Peer
from bench.peers.contents import Contents, StockStores, add_variables, parts
from bench.peers.embedded import pocketbase
from bench.peers.filling import fill
from bench.peers.json_file import json_file
from bench.peers.memory import memory
from bench.peers.ours import OurPeer, config_of, ours, reopened
from bench.peers.plain import connected, plain
from bench.peers.plain_database import PlainCollection, PlainDatabase
from bench.peers.stock import stock_peer, stock_stores
from bench.samples import AGENT, EVENTS_OF_A_SESSION, LONG_SESSION, TAG, customer_id, stored_session
from bench.workloads.listing import PAGE, Lists
from bench.workloads.turns import Conversations, turn
from pb_cached import PocketBaseServer, open_stores
from pb_cached.pocketbase.commit.triggers import EDITS, LOGS
from tests.parlant_server import TURN_SECONDS, parlant_server

# --- what a turn asks for -------------------------------------------------------------------------------------

Calls = Counter[tuple[str, str]]
"""How often each method of each collection was called."""

TURN: Final = Calls(
    {
        ("sessions", "find_one"): 12,
        ("sessions", "update_one"): 1,
        ("events", "find_one"): 7,
        ("events", "find"): 1,
        ("events", "insert_one"): 7,
        ("customers", "find_one"): 2,
        ("customer_tag_associations", "find"): 2,
        ("variable_tag_associations", "find"): 8,
        ("variables", "find"): 3,
        ("values", "find_one"): 10,
    }
)
"""Facts: parlant, section 2."""


class CountingCollection(TransientDocumentCollection[TDocument]):
    calls: Calls

    @override
    async def find(
        self,
        filters: Where,
        limit: int | None = None,
        cursor: Cursor | None = None,
        sort_direction: SortDirection | None = None,
    ) -> FindResult[TDocument]:
        self.calls[self._name, "find"] += 1
        return await super().find(filters, limit, cursor, sort_direction)

    @override
    async def find_one(self, filters: Where, sort: CollectionSort | None = None) -> TDocument | None:
        self.calls[self._name, "find_one"] += 1
        return await super().find_one(filters, sort)

    @override
    async def insert_one(self, document: TDocument) -> InsertResult:
        self.calls[self._name, "insert_one"] += 1
        return await super().insert_one(document)

    @override
    async def update_one(self, filters: Where, params: TDocument, upsert: bool = False) -> UpdateResult[TDocument]:
        self.calls[self._name, "update_one"] += 1
        return await super().update_one(filters, params, upsert)

    @override
    async def delete_one(self, filters: Where) -> DeleteResult[TDocument]:
        self.calls[self._name, "delete_one"] += 1
        return await super().delete_one(filters)


class CountingDatabase(TransientDocumentDatabase):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    @override
    async def create_collection(self, name: str, schema: type[TDocument]) -> CountingCollection[TDocument]:
        created = CountingCollection(name, schema)
        created.calls = self._calls
        self._collections[name] = cast(CountingCollection[BaseDocument], created)
        return created


async def test_a_replayed_turn_makes_the_calls_that_were_counted_of_a_real_one() -> None:
    calls = Calls()
    contents = Contents(2 * EVENTS_OF_A_SESSION)
    async with stock_stores(lambda _: CountingDatabase(calls)) as stores:
        for part in parts(contents, stores):
            cast(CountingCollection[Any], part.collection)._documents.extend(part.documents)
        await add_variables(stores)
        calls.clear()
        await turn(stock_peer("counted", stores), stored_session(0), "f" * 32)
    assert calls == TURN


@pytest.mark.slow
async def test_a_turn_of_a_real_server_makes_these_calls() -> None:
    calls = Calls()
    async with stock_stores(lambda _: CountingDatabase(calls)) as stores:
        agents: list[Any] = []

        async def script(server: Any) -> None:
            import parlant.sdk as p

            policy = p.NullPerceivedPerformancePolicy()
            agents.append(await server.create_agent("Robin", "answers", perceived_performance_policy=policy))

        customer = await stores.customers.create_customer("Ida", tags=[TAG])
        stock = {
            "session_store": stores.sessions,
            "customer_store": stores.customers,
            "variable_store": stores.variables,
        }
        async with parlant_server(script, **stock) as server:
            await add_variables(stores)
            (agent,) = agents
            for variable in await stores.variables.list_variables():
                await stores.variables.add_variable_tag(variable.id, Tag.for_agent_id(agent.id).id)
            asked = {"agent_id": agent.id, "customer_id": customer.id}
            session = await server.send("POST", "/sessions", asked)
            calls.clear()
            body = {"kind": "message", "source": "customer", "message": "hello"}
            await server.send("POST", f"/sessions/{session['id']}/events", body)
            collection = cast(CountingCollection[Any], stores.sessions._session_collection)
            async with asyncio.timeout(TURN_SECONDS):
                # Past the store, whose calls are counted.
                while not collection._documents[0]["agent_states"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    assert calls == TURN


# --- the same answers -----------------------------------------------------------------------------------------

HELD: Final = Contents((2 * PAGE + 20) * EVENTS_OF_A_SESSION - 7, customers=PAGE + 5, long=PAGE)
MAKERS: Final[dict[str, Callable[[], AbstractAsyncContextManager[Peer]]]] = {
    "JSON file": lambda: json_file(HELD),
    "plain": lambda: plain(HELD),
    "log": lambda: ours(HELD, mode="realtime", commit="log"),
    "batch": lambda: ours(HELD, mode="exclusive", commit="batch"),
    "off": lambda: ours(HELD, mode="off", commit="log"),
}


async def answers(peer: Peer) -> dict[str, Any]:
    """To what a turn reads, before and after one, and to lists. Without what differs between any two openings."""
    told: dict[str, Any] = {}
    for number in (0, 7, HELD.sessions - 1):
        for turns in range(3):
            if turns:
                await turn(peer, stored_session(number), f"{number:031x}{turns}")
            told[f"session {number}, {turns} turns"] = await peer.session_store.read_session(
                stored_session(number)
            )
            events = await peer.session_store.list_events(stored_session(number))
            told[f"events of {number}, {turns} turns"] = [
                (each.offset, each.source, each.kind, each.trace_id, each.data, each.metadata, each.deleted)
                for each in events
            ]
    told["customers"] = [await peer.customer_store.read_customer(customer_id(number)) for number in range(3)]
    for tags in ([Tag.for_agent_id(AGENT).id], [], [TAG]):
        found = await peer.variable_store.list_variables(tags=tags)
        told[f"variables of {tags}"] = sorted((each.name, each.description, tuple(each.tags)) for each in found)
        for each in found:
            values = [await peer.variable_store.read_value(each.id, key) for key in (f"tag:{TAG}", "DEFAULT")]
            told[f"values of {each.name}"] = [value and value.data for value in values]
    lists = Lists(peer, HELD)
    told["pages of sessions"] = [await lists.read_sessions() for _ in range(3)]
    told["page of customers"] = await lists.read_customers()
    return told


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
async def test_all_peers_answer_as_the_memory_does(maker: str) -> None:
    async with memory(HELD) as expected, MAKERS[maker]() as peer:
        assert await answers(peer) == await answers(expected)


async def test_what_turns_leave_behind_is_compared_with_what_was_done() -> None:
    async with memory(HELD) as peer:
        done = Conversations(peer, HELD.sessions - 1)
        assert len(await done.take(4)) == 4
        assert len(await done.take_at_once(7)) == 7
        await done.check()
        done.turns[stored_session(0)] += 1
        with pytest.raises(AssertionError, match="after 4 turns"):
            await done.check()


@pytest.mark.slow
async def test_ours_are_compared_by_what_pocketbase_holds() -> None:
    async with ours(HELD, mode="exclusive", commit="log") as peer:
        done = Conversations(peer, HELD.sessions - 1)
        await done.take_at_once(3)
        await done.check()
        assert isinstance(peer, OurPeer)
        async with reopened(peer) as stores:
            events = await stores.session_store.list_events(stored_session(0))
        await peer.session_store.delete_event(events[0].id)
        with pytest.raises(AssertionError, match="offsets"):
            await done.check()


@pytest.mark.slow
async def test_filling_is_not_taken_for_a_foreign_hand() -> None:
    """Else every follower would read all of it again."""
    config = config_of("off", "log")
    async with pocketbase() as server, open_stores(config, connection_params=server.connection_params) as stores:
        known = StockStores(stores.session_store, stores.customer_store, stores.variable_store)
        for part in parts(HELD, known)[:2]:
            await fill(server.data_dir, f"{config.stores.session_prefix}_{part.name}", part)
        with closing(sqlite3.connect(server.data_dir / "pb_data" / "data.db")) as database:
            assert database.execute(f"SELECT count(*) FROM {EDITS}").fetchone() == (0,)
            assert database.execute(f"SELECT sum(applying) FROM {LOGS}").fetchone() == (0,)
        last = stored_session(HELD.sessions - 1)
        offsets = [event.offset for event in await stores.session_store.list_events(last)]
        assert offsets == list(range(HELD.events_of(HELD.sessions - 1)))
        assert len(await stores.session_store.list_events(LONG_SESSION)) == HELD.long


async def test_a_list_that_lacks_something_is_noticed() -> None:
    contents = replace(HELD, long=500)
    async with memory(contents) as peer:
        await Lists(peer, contents).check()
        with pytest.raises(AssertionError):
            await Lists(peer, replace(contents, events=contents.events + 2 * EVENTS_OF_A_SESSION)).check()


# --- the plain adapter ----------------------------------------------------------------------------------------


class Thing(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    name: str
    number: int
    is_big: bool
    title: str | None
    parts: list[int]


def thing(number: int) -> Thing:
    return Thing(
        id=ObjectId(f"thing{number % 7}"),
        creation_utc=f"2026-01-0{1 + number % 3}",
        version=Version.String("1.0.0"),
        name=f'it\'s "{number % 4}"',
        number=number,
        is_big=number > 5,
        title=None if number % 2 else "a title",
        parts=[number, 1],
    )


FILTERS: Final[Sequence[Where]] = [
    {},
    {"name": {"$eq": 'it\'s "1"'}},
    {"number": {"$gte": 4}, "is_big": {"$eq": False}},
    {"number": {"$in": [1, 3, 11]}},
    {"number": {"$nin": [1, 3, 11]}},
    {"number": {"$in": []}},
    {"number": {"$nin": []}},
    {"$or": [{"number": {"$lt": 2}}, {"name": {"$ne": 'it\'s "2"'}, "number": {"$gt": 9}}]},
    {"$and": [{"number": {"$lte": 8}}, {"$or": [{"is_big": {"$eq": True}}, {"id": {"$eq": "thing3"}}]}]},
    {"$or": []},
    {"$and": []},
    {"id": {"$eq": "nowhere"}},
]
SORTS: Final[Sequence[CollectionSort]] = [
    (("number", SortDirection.DESC),),
    (("name", SortDirection.ASC), ("number", SortDirection.DESC)),
]


@pytest_asyncio.fixture
async def both(pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[list[DocumentCollection[Thing]]]:
    """The same twelve things by the plain adapter and in memory."""
    async with connected(pocketbase) as http:
        collections: list[DocumentCollection[Thing]] = []
        databases: list[DocumentDatabase] = [PlainDatabase(http, prefix), TransientDocumentDatabase()]
        for database in databases:
            collections.append(
                await database.get_or_create_collection("things", Thing, identity_loader_for(Thing))
            )
            await collections[-1].ensure_indexes([CollectionIndex((("number", SortDirection.DESC),))])
            for number in range(12):
                await collections[-1].insert_one(thing(number))
        yield collections


async def both_answers(
    both: Sequence[DocumentCollection[Thing]], ask: Callable[[DocumentCollection[Thing]], Awaitable[Any]]
) -> Any:
    plain_answer, expected = [await ask(collection) for collection in both]
    assert plain_answer == expected
    return expected


async def test_the_plain_adapter_finds_what_the_memory_finds(both: list[DocumentCollection[Thing]]) -> None:
    for filters in FILTERS:
        for sort in SORTS:
            await both_answers(both, lambda each, f=filters, s=sort: each.find_one(f, s))  # type: ignore[misc]
        for direction in (None, SortDirection.DESC):
            for limit in (None, 0, 1, 3, 50):
                cursor: Cursor | None = None
                for _ in range(13):
                    found = await both_answers(
                        both,
                        lambda each, f=filters, n=limit, c=cursor, d=direction: each.find(f, n, c, d),  # type: ignore[misc]
                    )
                    cursor = found.next_cursor
                    if cursor is None:
                        break


async def test_the_plain_adapter_changes_what_the_memory_changes(both: list[DocumentCollection[Thing]]) -> None:
    async def change(each: DocumentCollection[Thing]) -> list[Any]:
        nowhere: Where = {"number": {"$eq": 99}}
        return [
            await each.find_one({"id": {"$eq": "thing3"}}),
            await each.update_one({"id": {"$eq": "thing3"}}, Thing(name="new", parts=[])),
            await each.update_one({"number": {"$eq": 5}}, Thing(number=55)),
            await each.update_one(nowhere, Thing(name="nobody")),
            await each.update_one(nowhere, thing(13), upsert=True),
            await each.delete_one({"name": {"$eq": "new"}}),
            await each.delete_one(nowhere),
            await each.find({}),
        ]

    await both_answers(both, change)


async def test_the_plain_adapter_refuses_what_lacks_a_field(both: list[DocumentCollection[Thing]]) -> None:
    for each in both:
        with pytest.raises(TypeError, match="missing required keys"):
            await each.insert_one(Thing(name="alone"))


async def test_the_plain_adapter_opens_and_deletes_collections(pocketbase: PocketBaseServer, prefix: str) -> None:
    loader = identity_loader_for(Thing)
    async with connected(pocketbase) as http:
        database = PlainDatabase(http, prefix)
        with pytest.raises(ValueError, match="does not exist"):
            await database.get_collection("things", Thing, loader)
        created = await database.get_or_create_collection("things", Thing, loader)
        await created.insert_one(thing(1))
        again = await database.get_collection("things", Thing, loader)
        assert (await again.find({})).items == [thing(1)]
        await database.delete_collection("things")
        with pytest.raises(ValueError, match="does not exist"):
            await database.delete_collection("things")


async def test_the_plain_adapter_reads_on_where_pocketbase_ends_a_page(
    pocketbase: PocketBaseServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.peers.plain_database.PAGE", 5)
    async with connected(pocketbase) as http:
        collection: PlainCollection[Thing] = await PlainDatabase(http, prefix).create_collection("things", Thing)
        for number in range(12):
            await collection.insert_one(thing(number))
        assert len((await collection.find({})).items) == 12
        found = await collection.find({}, limit=11)
        assert (len(found.items), found.total_count, found.has_more) == (11, 12, True)
