"""Parlant's stores on a real PocketBase: what they promise while they are open, and what is there when they are
opened again.

All tests share the collections, as making them takes a second; each has sessions, names and tags of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version as installed
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.agents import AgentId
from parlant.core.common import IdGenerator, ItemNotFoundError, Version
from parlant.core.context_variables import (
    ContextVariable,
    ContextVariableDocumentStore,
    ContextVariableStore,
    ContextVariableValue,
)
from parlant.core.customers import Customer, CustomerDocumentStore, CustomerId
from parlant.core.guidelines import GuidelineId
from parlant.core.journeys import JourneyId
from parlant.core.persistence.common import ServerOutdated, SortDirection
from parlant.core.persistence.document_database_helper import MetadataDocument, load_metadata_document
from parlant.core.sessions import AgentState, Event, EventKind, EventSource, Session, SessionDocumentStore
from parlant.core.tags import TagId
from parlant.core.tools import ToolId

from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.cache.rules import PARLANT
from pb_cached.config import CoherenceSettings, StoreSettings
from pb_cached.errors import PBCachedError
from pb_cached.stores import Stores
from tests.conftest import EXCLUSIVE, DatabaseMaker
from tests.faults import EVERY, FaultProxy, answer

pytestmark = pytest.mark.slow  # each opens stores of its own

AGENT = AgentId("robin")
VIP = TagId("vip")
MEBIBYTE = 1024 * 1024

OpenStores = Callable[..., AbstractAsyncContextManager[Stores]]


@pytest.fixture
def open_again(pocketbase: PocketBaseServer) -> OpenStores:
    """Opens the three stores; each opening after the first stands for a restart, or for a second server."""

    def open_them(**options: Any) -> AbstractAsyncContextManager[Stores]:
        settings = StoreSettings(
            session_prefix="stores_sessions",
            customer_prefix="stores_customers",
            variable_prefix="stores_variables",
            **options,
        )
        return open_stores(Config(stores=settings), connection_params=pocketbase.connection_params)

    return open_them


@pytest_asyncio.fixture
async def stores(open_again: OpenStores) -> AsyncIterator[Stores]:
    async with open_again() as opened:
        yield opened


@pytest.fixture
def tag(prefix: str) -> TagId:
    """A tag that no other test uses."""
    return TagId(prefix)


async def say(stores: Stores, session: Session, data: Any, **options: Any) -> Event:
    return await stores.session_store.create_event(
        session.id,
        options.pop("source", EventSource.CUSTOMER),
        options.pop("kind", EventKind.MESSAGE),
        "trace",
        data,
        **options,
    )


async def begin(stores: Stores, customer: str = "ida") -> Session:
    return await stores.session_store.create_session(CustomerId(customer), AGENT)


async def offsets(stores: Stores, session: Session) -> list[int]:
    return [event.offset for event in await stores.session_store.list_events(session.id, exclude_deleted=False)]


async def find_customer(open_again: OpenStores, id_: CustomerId) -> Customer:
    """As a server finds it that has just been started."""
    async with open_again() as stores:
        return await stores.customer_store.read_customer(id_)


async def define(
    stores: Stores, tag: TagId, name: str = "plan", description: str = "What is booked"
) -> ContextVariable:
    return await stores.variable_store.create_variable(name, description, tags=[tag, VIP])


async def documents(collection: Any, **owner: str) -> list[dict[str, Any]]:
    """What lies in a store's collection, also where the store would not look."""
    return list((await collection.find({field: {"$eq": id_} for field, id_ in owner.items()})).items)


async def everything(stores: Stores) -> dict[str, Any]:
    """All that Parlant can read from the stores."""
    sessions = (await stores.session_store.list_sessions()).items
    customers = (await stores.customer_store.list_customers()).items
    variables = await stores.variable_store.list_variables()
    return {
        "sessions": sessions,
        "events": [
            await stores.session_store.list_events(session.id, exclude_deleted=False) for session in sessions
        ],
        "customers": [customer for customer in customers if customer.name != "Guest"],  # made up at each call
        "variables": variables,
        "values": [await stores.variable_store.list_values(variable.id) for variable in variables],
    }


async def interrupted(write: Coroutine[Any, Any, Any], after: float = 0.0) -> bool:
    """Let a caller begin its write, cancel it, and tell whether that was in time."""
    caller = asyncio.create_task(write)
    await asyncio.sleep(after)
    caller.cancel()
    await asyncio.wait([caller])
    return caller.cancelled()


# What survives


async def test_everything_survives_closing_and_opening_again(open_again: OpenStores, tag: TagId) -> None:
    async with open_again() as stores:
        session = await stores.session_store.create_session(
            CustomerId("ida"),
            AGENT,
            title="A lost umbrella 🌂",
            mode="manual",
            metadata={"channel": "web", "nested": {"b": [1, 2.5, None], "a": ""}},
            labels={"lost", "train"},
        )
        await stores.session_store.update_session(
            session.id,
            {
                "consumption_offsets": {"client": 3},
                "agent_states": [AgentState("trace", [GuidelineId("g")], {JourneyId("j"): ["start", None]})],
            },
        )
        await begin(stores, "otto")
        for kind in EventKind:
            await say(stores, session, {"kind": kind.value, "big": 2**63}, kind=kind, metadata={"n": 1})
        deleted = await say(stores, session, "withdrawn")
        await stores.session_store.delete_event(deleted.id)
        ida = await stores.customer_store.create_customer("Ida", {"city": "Lindau"}, tags=[tag, VIP])
        await stores.customer_store.create_customer("Otto")
        plan = await stores.variable_store.create_variable(
            "plan",
            "What is booked",
            tool_id=ToolId("built-in", "plans"),
            freshness_rules="*/5 * * * *",
            tags=[tag],
        )
        await stores.variable_store.update_value(plan.id, ida.id, {"seat": 61, "price": 19.0})
        await stores.variable_store.update_value(plan.id, ContextVariableStore.GLOBAL_KEY, None)
        before = await everything(stores)

    assert all(before.values())
    async with open_again() as stores:
        after = await everything(stores)
    assert after == before
    assert repr(after["values"]) == repr(before["values"]), "19.0 is not 19"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({"message": "x" * 5 * MEBIBYTE}, id="5 MB"),
        pytest.param({"message": "🌂👩‍👩‍👧‍👦\u2028\x00\\", "": [[], {}, ""]}, id="hostile text"),
        pytest.param(None, id="None"),
        pytest.param(2**70, id="a huge integer"),
        pytest.param([{"z": 1, "a": {"y": 1.0, "b": -0.0}}], id="the order of keys"),
    ],
)
async def test_an_event_holds_any_json(open_again: OpenStores, data: Any) -> None:
    async with open_again() as stores:
        session = await begin(stores)
        written = await say(stores, session, data, metadata={})
        assert written == await stores.session_store.read_event(session.id, written.id)
    async with open_again() as stores:
        (read,) = await stores.session_store.list_events(session.id)
        assert read == written
        assert repr(read.data) == repr(data)
        assert read.metadata == {}
        await stores.session_store.delete_session(session.id)


# Sessions and events


async def test_many_writers_at_once_leave_each_session_with_dense_offsets(stores: Stores) -> None:
    sessions = [await begin(stores) for _ in range(8)]
    written = await asyncio.gather(*(say(stores, session, n) for n in range(6) for session in sessions))
    for session in sessions:
        assert await offsets(stores, session) == list(range(6))
    assert len({event.id for event in written}) == len(written)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
async def test_cancelled_writers_leave_offsets_dense(stores: Stores, seed: int) -> None:
    """Parlant cancels a running turn whenever the customer writes again, in the middle of any write."""
    chance = random.Random(seed)
    session = await begin(stores)
    long = "x" * MEBIBYTE  # its commit takes longer than the next writer takes to read the last offset

    async def turns() -> int:
        """How many of its writes were cancelled in time."""
        cancelled = 0
        for _ in range(6):
            cancelled += await interrupted(say(stores, session, long), after=chance.random() * 0.02)
        await say(stores, session, "the end")
        return cancelled

    cancelled = await turns() + await turns()
    found = await offsets(stores, session)
    assert cancelled, "nobody was cancelled in time: this proves nothing"
    assert found == list(range(14)), "each write is finished, whoever waits for it"


async def test_a_cancelled_caller_may_change_what_it_wanted_to_write(stores: Stores) -> None:
    """As one does that collects a streamed message's chunks in a list, and puts an end to it when cancelled."""
    session = await begin(stores)
    chunks: list[str | None] = ["Hel"]
    assert await interrupted(say(stores, session, {"chunks": chunks}))
    chunks.append(None)
    await say(stores, session, "next")
    first, _ = await stores.session_store.list_events(session.id)
    assert first.data == {"chunks": ["Hel"]}


async def test_closing_waits_for_writes_that_nobody_waits_for(open_again: OpenStores, tag: TagId) -> None:
    async with open_again() as stores:
        session = await begin(stores)
        assert await interrupted(say(stores, session, "said while the server went down"))
        assert await interrupted(stores.customer_store.create_customer("Ida", tags=[tag]))
        assert await interrupted(stores.variable_store.create_variable("plan", tags=[tag]))
    async with open_again() as stores:
        (event,) = await stores.session_store.list_events(session.id)
        (customer,) = (await stores.customer_store.list_customers(tags=[tag])).items
        (variable,) = await stores.variable_store.list_variables(tags=[tag])
    assert event.data == "said while the server went down"
    assert (customer.name, customer.tags) == ("Ida", [tag])
    assert (variable.name, variable.tags) == ("plan", [tag])


async def test_a_session_is_deleted_with_its_events_and_no_others(stores: Stores) -> None:
    gone, kept = await begin(stores), await begin(stores)
    for number in range(12):
        await asyncio.gather(say(stores, gone, number), say(stores, kept, number))
    await stores.session_store.delete_session(gone.id)
    with pytest.raises(ItemNotFoundError):
        await stores.session_store.list_events(gone.id)
    with pytest.raises(ItemNotFoundError):
        await say(stores, gone, "too late")
    assert await offsets(stores, kept) == list(range(12))
    assert await documents(stores.session_store._event_collection, session_id=gone.id) == []


async def test_changes_of_one_session_at_once_are_all_kept(stores: Stores) -> None:
    session = await begin(stores)
    store = stores.session_store
    await asyncio.gather(
        *(store.set_metadata(session.id, f"key{number}", number) for number in range(5)),
        *(store.upsert_labels(session.id, {f"label{number}"}) for number in range(5)),
        store.update_session(session.id, {"title": "renamed"}),
    )
    changed = await store.read_session(session.id)
    assert changed.metadata == {f"key{number}": number for number in range(5)}
    assert changed.labels == {f"label{number}" for number in range(5)}
    assert changed.title == "renamed"


# Customers


async def test_customers_of_one_name_are_different_people_across_restarts(
    open_again: OpenStores, tag: TagId
) -> None:
    ids = []
    for _ in range(2):
        async with open_again() as stores:
            ids += [(await stores.customer_store.create_customer("Ida", tags=[tag])).id for _ in range(3)]
    assert len(set(ids)) == 6
    async with open_again() as stores:
        await stores.customer_store.update_customer(ids[4], {"name": "Otto"})
        await stores.customer_store.delete_customer(ids[1])
        await stores.customer_store.remove_tag(ids[5], tag)
        left = {c.id: (c.name, c.tags) for c in (await stores.customer_store.list_customers()).items}
    assert {id_: left.get(id_) for id_ in ids} == {
        ids[0]: ("Ida", [tag]),
        ids[1]: None,
        ids[2]: ("Ida", [tag]),
        ids[3]: ("Ida", [tag]),
        ids[4]: ("Otto", [tag]),
        ids[5]: ("Ida", []),
    }


async def test_with_stable_ids_a_customer_created_again_is_the_same_one(
    open_again: OpenStores, tag: TagId
) -> None:
    runs = []
    for _ in range(2):
        async with open_again(customer_ids="stable") as stores:
            create = stores.customer_store.create_customer
            run = [
                await create("Ida", tags=[tag]),
                await create("Ida", tags=[tag]),
                await create("Ida", {"city": "Lindau"}, tags=[tag]),
            ]
            found = (await stores.customer_store.list_customers(tags=[tag])).items
            assert {customer.id for customer in found} == {customer.id for customer in run}
            runs.append(run)
    assert runs[0] == runs[1]
    assert len({customer.id for customer in runs[0]}) == 3


async def test_with_stable_ids_a_tag_that_is_missing_is_added_again(open_again: OpenStores, tag: TagId) -> None:
    for _ in range(2):
        async with open_again(customer_ids="stable") as stores:
            ida = await stores.customer_store.create_customer("Ida", tags=[tag, VIP])
            assert sorted(ida.tags) == sorted([tag, VIP])
            await stores.customer_store.remove_tag(ida.id, VIP)
    assert (await find_customer(open_again, ida.id)).tags == [tag]


@pytest.mark.parametrize("ids", ["unique", "stable"])
async def test_an_explicit_id_is_taken_once_for_good(open_again: OpenStores, prefix: str, ids: str) -> None:
    mine = CustomerId(f"crm/4711 🌂 {prefix}")
    async with open_again(customer_ids=ids) as stores:
        assert (await stores.customer_store.create_customer("Ida", id=mine)).id == mine
    async with open_again(customer_ids=ids) as stores:
        with pytest.raises(ValueError, match="already exists"):
            await stores.customer_store.create_customer("Otto", id=mine)
    assert (await find_customer(open_again, mine)).name == "Ida"


# Variables


async def test_a_variable_that_is_defined_again_keeps_its_values(open_again: OpenStores, tag: TagId) -> None:
    async with open_again() as stores:
        first = await define(stores, tag)
        await stores.variable_store.update_value(first.id, "ida", {"seat": 61})
    async with open_again() as stores:
        assert await define(stores, tag) == first
        assert await stores.variable_store.list_variables([tag]) == [first]
        value = await stores.variable_store.read_value(first.id, "ida")
        assert value is not None
        assert value.data == {"seat": 61}
        tags = await documents(stores.variable_store._variable_tag_association_collection, variable_id=first.id)
        assert sorted(association["tag_id"] for association in tags) == sorted([tag, VIP])


async def test_what_was_changed_about_a_variable_stays_changed_when_it_is_defined_again(
    open_again: OpenStores, tag: TagId
) -> None:
    async with open_again() as stores:
        first = await define(stores, tag)
        await stores.variable_store.update_variable(first.id, {"description": "What a person wrote"})
        await stores.variable_store.remove_variable_tag(first.id, VIP)
    async with open_again() as stores:
        again = await define(stores, tag)
    assert (again.id, again.description) == (first.id, "What a person wrote")
    assert sorted(again.tags) == sorted([tag, VIP]), "a tag that the definition names is there again"


async def test_two_equal_definitions_are_two_variables_in_the_same_order_after_a_restart(
    open_again: OpenStores, tag: TagId
) -> None:
    runs = []
    for _ in range(2):
        async with open_again() as stores:
            runs.append([await define(stores, tag), await define(stores, tag)])
            assert await stores.variable_store.list_variables([tag]) == runs[0]
    assert runs[0][0].id != runs[0][1].id
    assert runs[0] == runs[1]


async def test_two_definitions_that_parlant_takes_for_one_are_two(open_again: OpenStores, tag: TagId) -> None:
    """Parlant makes the id from name and description run together."""
    async with open_again() as stores:
        plan, planner = await define(stores, tag, "plan", "ner"), await define(stores, tag, "planner", "")
    async with open_again() as stores:
        assert await define(stores, tag, "planner", "") == planner
        assert await define(stores, tag, "plan", "ner") == plan
        assert await stores.variable_store.list_variables([tag]) == [plan, planner]


async def test_a_value_that_is_set_again_stays_one_document(stores: Stores, tag: TagId) -> None:
    plan = await define(stores, tag)
    values = [await stores.variable_store.update_value(plan.id, "ida", number) for number in range(3)]
    assert len({value.id for value in values}) == 3, "Parlant gives a value that is set again another id"
    await asyncio.gather(*(stores.variable_store.update_value(plan.id, "otto", n) for n in range(5)))
    assert await stores.variable_store.read_value(plan.id, "ida") == values[-1]
    stored = await documents(stores.variable_store._value_collection, variable_id=plan.id)
    assert sorted(value["key"] for value in stored) == ["ida", "otto"]


async def test_a_variable_is_deleted_with_its_values_and_tags(stores: Stores, tag: TagId) -> None:
    gone, kept = await define(stores, tag, "gone"), await define(stores, tag, "kept")
    for variable in (gone, kept):
        for key in ("ida", "otto"):
            await stores.variable_store.update_value(variable.id, key, key)
    await stores.variable_store.delete_variable(gone.id)
    assert await stores.variable_store.list_variables([tag]) == [kept]
    for collection in (
        stores.variable_store._value_collection,
        stores.variable_store._variable_tag_association_collection,
    ):
        assert await documents(collection, variable_id=gone.id) == []
        assert len(await documents(collection, variable_id=kept.id)) == 2


# The same calls on Parlant's own stores

Pair = tuple[str, str]
"""One thing's id in our store, and in Parlant's."""

texts = st.sampled_from(["", "a", "plan", "🌂", "it's", "\x00"])
label_sets = st.sets(st.sampled_from(["lost", "train", "🌂"]), max_size=2)
tags = st.sampled_from(["vip", "train"])
tag_lists = st.lists(tags, max_size=2, unique=True)
payloads = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**64) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(texts, payloads, max_size=2)
pages = st.fixed_dictionaries(
    {
        "limit": st.none() | st.integers(1, 3),
        "sort_direction": st.sampled_from([None, SortDirection.ASC, SortDirection.DESC]),
    }
)


class SameCalls(RuleBasedStateMachine):
    """Any calls on our stores and on Parlant's over its in-memory database: equal answers, but for the ids."""

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    open_ours: Callable[[], AbstractAsyncContextManager[Stores]]

    sessions, events, customers, variables = (Bundle(name) for name in ("s", "e", "c", "v"))

    @initialize()
    def open(self) -> None:
        async def enter(*contexts: Any) -> list[Any]:
            return [await self.stack.enter_async_context(context) for context in contexts]

        self.stack = AsyncExitStack()
        self.clock = datetime(2026, 1, 1, tzinfo=UTC)
        self.names: tuple[dict[str, str], dict[str, str]] = ({}, {})
        ours, *theirs = self.run(
            enter(
                self.open_ours(),
                SessionDocumentStore(TransientDocumentDatabase()),
                CustomerDocumentStore(IdGenerator(), TransientDocumentDatabase()),
                ContextVariableDocumentStore(IdGenerator(), TransientDocumentDatabase()),
            )
        )
        self.stores = ((ours.session_store, ours.customer_store, ours.variable_store), tuple(theirs))

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.run(self.stack.aclose())

    def both(self, method: str, *args: Any, **options: Any) -> list[Any]:
        """Call it on both sides, where a pair of ids becomes that side's own; the results must be equal."""
        results = []
        for side in (0, 1):
            (store,) = [store for store in self.stores[side] if hasattr(store, method)]
            own = [arg[side] if isinstance(arg, tuple) else arg for arg in args]
            try:
                results.append(self.run(getattr(store, method)(*own, **options)))
            except (ItemNotFoundError, ValueError) as error:
                results.append(type(error))
        if method.startswith("create") and not isinstance(results[0], type):
            for side in (0, 1):
                self.names[side][results[side].id] = f"{method} {len(self.names[side])}"
        assert self.told(results[0], self.names[0]) == self.told(results[1], self.names[1])
        return results

    def make(self, method: str, *args: Any, **options: Any) -> Pair:
        ours, theirs = self.both(method, *args, **options)
        return ("none", "none") if isinstance(ours, type) else (ours.id, theirs.id)

    def told(self, value: Any, names: Mapping[str, str]) -> Any:
        """A result without the ids and the times that each side makes up, and without the order of tags."""
        if isinstance(value, ContextVariableValue):
            return value.data
        if is_dataclass(value):
            told = {f.name: self.told(getattr(value, f.name), names) for f in fields(value)}
            if told.get("name") == "Guest":
                del told["creation_utc"]
            return told | ({"tags": sorted(told["tags"])} if "tags" in told else {})
        if isinstance(value, str):
            return names.get(value, value)
        if isinstance(value, list | tuple):
            return [self.told(of, names) for of in value]
        return value

    def later(self) -> datetime:
        """A time after all others, as ties would be decided by ids."""
        self.clock += timedelta(milliseconds=250)
        return self.clock

    @rule(target=sessions, title=st.none() | texts, labels=label_sets, metadata=objects)
    def create_session(self, **options: Any) -> Pair:
        return self.make("create_session", CustomerId("ida"), AGENT, self.later(), **options)

    @rule(session=sessions, params=st.fixed_dictionaries({}, optional={"title": texts, "metadata": objects}))
    def update_session(self, session: Pair, params: Any) -> None:
        self.both("update_session", session, {"customer_id": "otto", **params})
        self.both("update_session", session, {"agent_states": [AgentState("trace", [], {})]})

    @rule(session=sessions, key=texts, value=payloads, other=texts)
    def change_metadata(self, session: Pair, key: str, value: Any, other: str) -> None:
        self.both("set_metadata", session, key, value)
        self.both("unset_metadata", session, other)

    @rule(session=sessions, more=label_sets, fewer=label_sets)
    def change_labels(self, session: Pair, more: set[str], fewer: set[str]) -> None:
        self.both("upsert_labels", session, more)
        self.both("remove_labels", session, fewer)

    @rule(page=pages, who=st.sampled_from([None, "ida", "otto"]))
    def page_through_sessions(self, page: Any, who: str | None) -> None:
        ours, theirs = self.both("list_sessions", customer_id=who, **page)
        while ours.next_cursor is not None:
            cursors = (ours.next_cursor, theirs.next_cursor)
            ours, theirs = self.both("list_sessions", None, who, page["limit"], cursors, page["sort_direction"])

    @rule(session=sessions)
    def delete_session(self, session: Pair) -> None:
        self.both("delete_session", session)
        self.both("read_session", session)

    @rule(
        target=events,
        session=sessions,
        source=st.sampled_from(EventSource),
        kind=st.sampled_from(EventKind),
        trace=texts,
        data=payloads,
        metadata=objects,
    )
    def create_event(self, session: Pair, **of: Any) -> Pair:
        options = {"trace_id": of.pop("trace"), "creation_utc": self.later(), **of}
        return self.make("create_event", session, **options)

    @rule(
        session=sessions,
        event=events,
        params=st.fixed_dictionaries({}, optional={"data": payloads, "metadata": objects}),
    )
    def update_event(self, session: Pair, event: Pair, params: Any) -> None:
        self.both("update_event", session, event, params)
        self.both("read_event", session, event)

    @rule(event=events)
    def delete_event(self, event: Pair) -> None:
        self.both("delete_event", event)

    @rule(
        session=sessions,
        source=st.none() | st.sampled_from(EventSource),
        trace_id=st.none() | texts,
        kinds=st.lists(st.sampled_from(EventKind), max_size=2, unique=True),
        min_offset=st.none() | st.integers(0, 3),
        exclude_deleted=st.booleans(),
    )
    def list_events(self, session: Pair, **which: Any) -> None:
        self.both("list_events", session, **which)
        self.both("list_events", session)

    @rule(target=customers, name=texts, extra=st.dictionaries(texts, texts, max_size=2), tags=tag_lists)
    def create_customer(self, **of: Any) -> Pair:
        return self.make("create_customer", creation_utc=self.later(), **of)

    @rule(target=customers, name=texts, id=st.sampled_from(["one", "two"]))
    def create_customer_by_id(self, **of: Any) -> Pair:
        return self.make("create_customer", creation_utc=self.later(), **of)

    @rule(customer=customers, name=texts, tag=tags, other=tags, extra=texts)
    def change_customer(self, customer: Pair, name: str, tag: str, other: str, extra: str) -> None:
        self.both("update_customer", customer, {"name": name})
        self.both("upsert_tag", customer, tag)
        self.both("remove_tag", customer, other)
        self.both("upsert_extra", customer, {extra: name})
        self.both("remove_extra", customer, [name])
        self.both("read_customer", customer)

    @rule(page=pages, tags=st.none() | tag_lists)
    def list_customers(self, page: Any, tags: Any) -> None:
        self.both("list_customers", tags=tags, **page)

    @rule(customer=customers)
    def delete_customer(self, customer: Pair) -> None:
        self.both("delete_customer", customer)

    @rule(target=variables, name=texts, description=texts, tags=tag_lists)
    def create_variable(self, **of: Any) -> Pair:
        return self.make("create_variable", creation_utc=self.later(), **of)

    @rule(variable=variables, name=texts, tag=tags, other=tags)
    def change_variable(self, variable: Pair, name: str, tag: str, other: str) -> None:
        self.both("update_variable", variable, {"name": name, "freshness_rules": name})
        self.both("add_variable_tag", variable, tag)
        self.both("remove_variable_tag", variable, other)
        self.both("read_variable", variable)

    @rule(tags=st.none() | tag_lists)
    def list_variables(self, tags: Any) -> None:
        self.both("list_variables", tags=tags)

    @rule(variable=variables, key=texts, data=payloads, other=texts)
    def change_values(self, variable: Pair, key: str, data: Any, other: str) -> None:
        self.both("update_value", variable, key, data)
        self.both("list_values", variable)
        self.both("delete_value", variable, other)
        self.both("read_value", variable, key)

    @rule(variable=variables)
    def delete_variable(self, variable: Pair) -> None:
        self.both("delete_variable", variable)
        self.both("list_values", variable)


@pytest.mark.slow
def test_the_same_calls_answer_as_on_parlants_own_stores(
    pocketbase: PocketBaseServer, prefix: str, cache: Mapping[str, Any]
) -> None:
    numbers = itertools.count()

    def open_ours() -> AbstractAsyncContextManager[Stores]:
        name = f"{prefix}n{next(numbers)}"
        config = Config(stores=StoreSettings(f"{name}_s", f"{name}_c", f"{name}_v"), **cache)
        return open_stores(config, connection_params=pocketbase.connection_params)

    with asyncio.Runner() as runner:

        class Machine(SameCalls):
            run = staticmethod(runner.run)

        Machine.open_ours = staticmethod(open_ours)
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=3,
                stateful_step_count=30,
                deadline=None,
                phases=[Phase.generate],  # to shrink a failure takes minutes, and thirty steps can be read
                suppress_health_check=list(HealthCheck),
            ),
        )


async def test_the_stores_tell_what_their_caches_have_done(pocketbase: PocketBaseServer, prefix: str) -> None:
    settings = StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables")
    config = Config(stores=settings, coherence=EXCLUSIVE)
    async with open_stores(config, connection_params=pocketbase.connection_params) as stores:
        ida = await stores.customer_store.create_customer("Ida")
        before = stores.stats()
        for _ in range(3):
            await stores.customer_store.read_customer(ida.id)
        after = stores.stats()
    hits = [stats.customers.collections["customers"].hits for stats in (before, after)]
    assert hits[1] > hits[0]
    assert after.sessions.collections == before.sessions.collections
    assert {"sessions", "events"} < after.sessions.collections.keys()
    assert {"variables", "values"} < after.variables.collections.keys()
    with pytest.raises(PBCachedError, match="not open"):
        stores.stats()


async def test_the_collections_that_settings_may_name_are_those_of_the_stores(
    pocketbase: PocketBaseServer, prefix: str
) -> None:
    settings = StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables")
    config = Config(stores=settings, coherence=EXCLUSIVE)
    async with open_stores(config, connection_params=pocketbase.connection_params) as stores:
        told = stores.stats()
    assert {*told.sessions.collections, *told.customers.collections, *told.variables.collections} == {
        *PARLANT,
        "deletions",
    }


@pytest.mark.parametrize(
    ("store", "at", "knows"),
    [("sessions", "PocketBaseSessionStore", "0.9.0"), ("customers", "PocketBaseCustomerStore", "0.1.0"),
     ("variables", "PocketBaseContextVariableStore", "0.3.0")],
)  # fmt: skip
async def test_data_of_a_newer_parlant_is_refused_with_store_versions_and_a_way_out(
    pocketbase: PocketBaseServer, prefix: str, make_database: DatabaseMaker, store: str, at: str, knows: str
) -> None:
    settings = StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables")
    params = pocketbase.connection_params
    async with open_stores(Config(stores=settings), connection_params=params):
        pass
    async with make_database(collection_prefix=f"{prefix}_{store}") as database:
        metadata = await database.get_or_create_collection("metadata", MetadataDocument, load_metadata_document)
        await metadata.update_one({}, {"version": Version.String("99.1.0")})
    said = (
        f"{at}: a newer Parlant has written its data, of version 99.1.0; the installed Parlant "
        f"{installed('parlant')} knows them up to {knows}. Nothing was changed. Install a Parlant as new"
    )
    with pytest.raises(ServerOutdated, match="^" + re.escape(said)):
        async with open_stores(Config(stores=settings), connection_params=params):
            pass
    async with make_database(collection_prefix=f"{prefix}_{store}") as database:
        metadata = await database.get_or_create_collection("metadata", MetadataDocument, load_metadata_document)
        assert [document["version"] for document in await metadata.find({})] == ["99.1.0"]


@pytest.mark.parametrize(
    ("mode", "is_open", "lines"),
    [(None, False, 1), ("realtime", False, 1), (None, True, 0), ("off", False, 0), ("exclusive", False, 0)],
)
async def test_where_others_cannot_be_followed_it_is_logged_once_that_every_read_asks(
    pocketbase: PocketBaseServer,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
    mode: Any,
    is_open: bool,
    lines: int,
) -> None:
    """As there is no log: PocketBase lets us neither use SQL nor switch the batch API on."""
    caplog.set_level(logging.INFO)
    settings = StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables")
    config = Config(stores=settings, coherence=CoherenceSettings(mode=mode))
    logger = logging.getLogger("test")
    async with FaultProxy(pocketbase.url) as proxy:
        if not is_open:
            for method, path in (("POST", "/api/sql"), ("GET", "/api/settings"), ("PATCH", "/api/settings")):
                proxy.plan(method, path, answer(403), at=EVERY)
        params = pocketbase.connection_params | {"url": proxy.url}
        async with open_stores(config, logger=logger, connection_params=params):
            pass
    assert caplog.text.count("every read asks PocketBase") == lines
    assert caplog.text.count('`mode = "exclusive"` under [coherence]') == lines


async def test_without_a_cache_the_stores_have_nothing_to_tell(pocketbase: PocketBaseServer, prefix: str) -> None:
    settings = StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables")
    config = Config(stores=settings, coherence=CoherenceSettings(mode="off"))
    async with open_stores(config, connection_params=pocketbase.connection_params) as stores:
        told = stores.stats()
    for stats in (told.sessions, told.customers, told.variables):
        assert (stats.cache_bytes, stats.cache_max_bytes, stats.collections) == (0, 0, {})
