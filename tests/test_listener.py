"""Waiting for events and for streamed messages: what Parlant's polling listener answers, as soon as it is so.

Where a test is about being woken, looks that nothing has woken are put off for an hour: they answer nobody.
"""

# The container's keys are Parlant's abstract classes.
# mypy: disable-error-code="type-abstract"

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.agents import AgentId
from parlant.core.async_utils import Timeout
from parlant.core.common import ItemNotFoundError
from parlant.core.customers import CustomerId
from parlant.core.sessions import (
    Event,
    EventId,
    EventKind,
    EventSource,
    PollingSessionListener,
    Session,
    SessionId,
    SessionListener,
    SessionStore,
)

from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.config import StoreSettings
from pb_cached.errors import ConfigError, PBCachedError
from pb_cached.stores import PocketBaseSessionStore, Stores
from pb_cached.stores import listener as listening
from tests.conftest import CACHES, EXCLUSIVE
from tests.parlant_server import parlant_server

pytestmark = pytest.mark.slow  # each opens stores of its own

if TYPE_CHECKING:
    import parlant.sdk as p
    from lagom import Container

SOON = 20.0
"""Seconds within which is answered what is answered at all."""


class Looks:
    """Counts how often a store's events are read, and has something happen between a read and its answer."""

    def __init__(self, store: PocketBaseSessionStore) -> None:
        self.count = self.under_way = 0
        self.begun = asyncio.Event()
        self.meanwhile: list[Callable[[], Awaitable[Any]]] = []
        for name in ("list_events", "read_event"):
            setattr(store, name, self._counted(getattr(store, name)))

    def _counted(self, read: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.begun.set()
            self.under_way += 1
            try:
                found = await read(*args, **kwargs)
                if self.meanwhile:
                    await self.meanwhile.pop()()
                return found
            finally:
                self.under_way -= 1

        return counted

    async def are_done(self) -> None:
        """Whoever was woken has looked, and whoever's mark was reached has been told."""
        still = 0
        while still < 10:
            still = 0 if self.under_way else still + 1
            await asyncio.sleep(0 if still else 0.001)


class Wait:
    """Waits that have looked, and seen nothing."""

    def __init__(self, stores: Stores) -> None:
        self.looks = Looks(stores.session_store)
        self.listener = stores.session_listener

    async def begun(self, *waits: Coroutine[Any, Any, bool]) -> list[asyncio.Task[bool]]:
        tasks = [asyncio.create_task(wait) for wait in waits]
        await self.looks.are_done()
        assert not any(task.done() for task in tasks), [task for task in tasks if task.done()]
        return tasks

    async def for_events(self, session: Session, **question: Any) -> asyncio.Task[bool]:
        (task,) = await self.begun(self.listener.wait_for_more_events(session.id, **question))
        return task


def opened(
    server: PocketBaseServer, /, http_client: httpx.AsyncClient | None = None, **sections: Any
) -> AbstractAsyncContextManager[Stores]:
    """Stores that all tests of this module share that commit by the same path, each with sessions of its own."""
    config = Config(**sections)
    name = f"listener_{config.pocketbase.commit}"
    named = StoreSettings(f"{name}_sessions", f"{name}_customers", f"{name}_variables")
    config = msgspec.structs.replace(config, stores=named)
    return open_stores(config, connection_params=server.connection_params, http_client=http_client)


@pytest_asyncio.fixture
async def stores(pocketbase: PocketBaseServer, cache: Mapping[str, Any]) -> AsyncIterator[Stores]:
    async with opened(pocketbase, **cache) as stores:
        yield stores


@pytest_asyncio.fixture
async def caching(pocketbase: PocketBaseServer) -> AsyncIterator[Stores]:
    async with opened(pocketbase, coherence=EXCLUSIVE) as stores:
        yield stores


@pytest.fixture
def unwoken_never_look(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAFETY_SECONDS", "EVENTS_SECONDS", "CHUNKS_SECONDS"):
        monkeypatch.setattr(listening, name, 3600.0)


async def begin(stores: Stores) -> Session:
    return await stores.session_store.create_session(CustomerId("ida"), AgentId("robin"))


async def say(stores: Stores, session: Session, data: Any = "hello", **options: Any) -> Event:
    return await stores.session_store.create_event(
        session.id,
        options.pop("source", EventSource.CUSTOMER),
        options.pop("kind", EventKind.MESSAGE),
        options.pop("trace_id", "trace"),
        data,
    )


async def soon(task: Awaitable[bool]) -> bool:
    async with asyncio.timeout(SOON):
        return await task


# --- woken -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unwoken_never_look")
async def test_an_event_wakes_who_waits_for_it_and_is_seen_by_him(stores: Stores) -> None:
    session = await begin(stores)
    wait = Wait(stores)
    for offset in range(10):
        task = await wait.for_events(session, min_offset=offset)
        saying = asyncio.create_task(say(stores, session, offset))
        assert await soon(task)
        (seen,) = await stores.session_store.list_events(session.id, min_offset=offset)
        assert (seen.offset, seen.data) == (offset, offset)
        await saying


@pytest.mark.usefixtures("unwoken_never_look")
async def test_chunks_and_the_last_one_wake_who_waits_for_them(stores: Stores) -> None:
    session = await begin(stores)
    event = await say(stores, session, {"chunks": []})
    wait = Wait(stores)
    whole, some = await wait.begun(
        wait.listener.wait_for_event_completion(session.id, event.id),
        wait.listener.wait_for_new_streaming_chunks(session.id, event.id, 0),
    )
    await stores.session_store.update_event(session.id, event.id, {"data": {"chunks": ["Hel"]}})
    assert await soon(some)
    assert not whole.done()
    (more,) = await wait.begun(wait.listener.wait_for_new_streaming_chunks(session.id, event.id, 1))
    await stores.session_store.update_event(session.id, event.id, {"data": {"chunks": ["Hel", "lo", None]}})
    assert await soon(whole)
    assert await soon(more)


@pytest.mark.usefixtures("unwoken_never_look")
@pytest.mark.parametrize("look", ["the first one", "a later one"])
async def test_an_event_that_comes_while_somebody_looks_is_not_lost(stores: Stores, look: str) -> None:
    """It is committed when the look has read and not yet answered: the look does not show it."""
    session = await begin(stores)
    wait = Wait(stores)
    if look == "the first one":
        wait.looks.meanwhile.append(lambda: say(stores, session))
        task = asyncio.create_task(wait.listener.wait_for_more_events(session.id, min_offset=0))
    else:
        task = await wait.for_events(session, min_offset=1)
        wait.looks.meanwhile.append(lambda: say(stores, session))
        await say(stores, session)
    assert await soon(task)
    assert wait.looks.meanwhile == []


@pytest.mark.usefixtures("unwoken_never_look")
async def test_a_partition_that_is_evicted_or_too_large_wakes_all_the_same(pocketbase: PocketBaseServer) -> None:
    """Nothing is cached at last, and so nothing changes there."""
    async with opened(pocketbase, **CACHES["tiny cache"]) as stores:
        session, other = await begin(stores), await begin(stores)
        for size in (0, 1, 5000):
            wait = Wait(stores)
            task = await wait.for_events(session, trace_id=f"trace {size}")
            for _ in range(3):
                await say(stores, other, "x" * 1000)
            await say(stores, session, "x" * size, trace_id=f"trace {size}")
            assert await soon(task)


@pytest.mark.usefixtures("unwoken_never_look")
async def test_the_end_of_a_session_is_an_error_to_who_waits_for_its_events(caching: Stores) -> None:
    session = await begin(caching)
    event = await say(caching, session, {"chunks": ["Hel"]})
    wait = Wait(caching)
    tasks = await wait.begun(
        wait.listener.wait_for_more_events(session.id, min_offset=1),
        wait.listener.wait_for_event_completion(session.id, event.id),
    )
    await caching.session_store.delete_session(session.id)
    for task in tasks:
        with pytest.raises(ItemNotFoundError):
            await soon(task)


@pytest.mark.usefixtures("unwoken_never_look")
async def test_closing_the_stores_ends_all_waits(pocketbase: PocketBaseServer, cache: Mapping[str, Any]) -> None:
    async with opened(pocketbase, **cache) as stores:
        session = await begin(stores)
        task = await Wait(stores).for_events(session)
    with pytest.raises(PBCachedError, match="closed"):
        await soon(task)


# --- and not woken for nothing ---------------------------------------------------------------------------------


async def test_events_of_other_sessions_make_nobody_look(caching: Stores) -> None:
    session, other = await begin(caching), await begin(caching)
    wait = Wait(caching)
    task = await wait.for_events(session)
    before = wait.looks.count
    for _ in range(5):
        await say(caching, other)
    await wait.looks.are_done()
    assert wait.looks.count == before
    task.cancel()


@pytest.mark.usefixtures("unwoken_never_look")
async def test_a_thousand_who_wait_for_the_events_of_one_session_share_one_look(stores: Stores) -> None:
    session = await begin(stores)
    await say(stores, session)
    wait = Wait(stores)
    tasks = await wait.begun(
        *(wait.listener.wait_for_more_events(session.id, min_offset=1 + n // 500) for n in range(1000))
    )
    before = wait.looks.count
    assert before <= 2, "all have come before it began; one more if the stream tells only now of what was said"
    await say(stores, session)
    await wait.looks.are_done()
    assert wait.looks.count <= before + 2, "one look at what the event has changed, and one if a load was news too"
    assert [task.done() for task in tasks] == [True] * 500 + [False] * 500
    await say(stores, session)
    async with asyncio.timeout(SOON):
        assert await asyncio.gather(*tasks) == [True] * 1000


@pytest.mark.usefixtures("unwoken_never_look")
async def test_who_gives_up_leaves_nothing_behind_and_the_others_waiting(stores: Stores) -> None:
    session = await begin(stores)
    wait = Wait(stores)
    one, other = await wait.begun(*(wait.listener.wait_for_more_events(session.id) for _ in range(2)))
    one.cancel()
    await asyncio.wait([one])
    await say(stores, session)
    assert await soon(other)
    assert wait.listener._lookouts == {}
    for collection in (stores.session_store._event_collection, stores.session_store._session_collection):
        watched: Any = collection
        cache = watched._cached.cache if watched._cached else watched._watched._cache
        assert not cache.watches
        followers = watched._committer._followers.get(watched._spec.name, [])
        assert watched._watched not in followers or watched._cached, "commits are followed while somebody waits"


# --- Parlant's semantics ---------------------------------------------------------------------------------------


def both(stores: Stores) -> tuple[SessionListener, SessionListener]:
    return stores.session_listener, PollingSessionListener(stores.session_store)


async def test_a_session_or_an_event_that_is_not_there_is_an_error(stores: Stores) -> None:
    session = await begin(stores)
    for listener in both(stores):
        for wait in (
            listener.wait_for_more_events(SessionId("nobody's")),
            listener.wait_for_event_completion(SessionId("nobody's"), EventId("none")),
            listener.wait_for_event_completion(session.id, EventId("none")),
            listener.wait_for_new_streaming_chunks(session.id, EventId("none"), 0),
        ):
            with pytest.raises(ItemNotFoundError):
                await wait


@pytest.mark.parametrize("seconds", [0, 0.05])
async def test_a_timeout_ends_a_wait_when_it_expires(stores: Stores, seconds: float) -> None:
    session = await begin(stores)
    event = await say(stores, session, {"chunks": ["Hel"]})
    for listener in both(stores):
        begun = time.monotonic()
        assert not await listener.wait_for_more_events(session.id, min_offset=1, timeout=Timeout(seconds))
        assert not await listener.wait_for_event_completion(session.id, event.id, Timeout(seconds))
        assert not await listener.wait_for_new_streaming_chunks(session.id, event.id, 1, Timeout(seconds))
        assert time.monotonic() - begun >= 3 * seconds - 0.001


@pytest.mark.usefixtures("unwoken_never_look")
async def test_what_was_not_heard_of_is_seen_when_the_timeout_expires(pocketbase: PocketBaseServer) -> None:
    """Another server's event: of those, a server without a cache hears nothing."""
    async with (
        httpx.AsyncClient() as http,
        opened(pocketbase) as stores,
        opened(pocketbase, http_client=http) as others,
    ):
        session = await begin(stores)
        task = await Wait(stores).for_events(session, timeout=Timeout(0.5))
        await say(others, session)
        assert await soon(task)


async def test_another_servers_event_is_seen_without_a_cache_by_looking_now_and_then(
    pocketbase: PocketBaseServer,
) -> None:
    async with (
        httpx.AsyncClient() as http,
        opened(pocketbase) as stores,
        opened(pocketbase, http_client=http) as others,
    ):
        session = await begin(stores)
        event = await say(stores, session, {"chunks": []})
        wait = Wait(stores)
        tasks = await wait.begun(
            wait.listener.wait_for_more_events(session.id, min_offset=1),
            wait.listener.wait_for_event_completion(session.id, event.id),
        )
        await others.session_store.update_event(session.id, event.id, {"data": {"chunks": [None]}})
        await say(others, session)
        for task in tasks:
            assert await soon(task)


async def test_a_look_that_fails_is_an_error_to_those_who_wait_and_to_nobody_else(stores: Stores) -> None:
    session = await begin(stores)
    wait = Wait(stores)
    task = await wait.for_events(session, min_offset=1)

    async def fail() -> None:
        raise PBCachedError("by order of the test")

    wait.looks.meanwhile.append(fail)
    await say(stores, session)
    with pytest.raises(PBCachedError, match="by order"):
        await soon(task)
    assert await wait.listener.wait_for_more_events(session.id)


def test_a_session_store_takes_no_other_database_than_ours() -> None:
    with pytest.raises(ConfigError, match="needs a PocketBaseDocumentDatabase, not a TransientDocumentDatabase"):
        PocketBaseSessionStore(TransientDocumentDatabase())  # type: ignore[arg-type]


questions = st.fixed_dictionaries(
    {},
    optional={
        "kinds": st.lists(st.sampled_from(EventKind), max_size=2),
        "min_offset": st.none() | st.integers(-1, 4),
        "source": st.none() | st.sampled_from([EventSource.CUSTOMER, EventSource.AI_AGENT]),
        "trace_id": st.sampled_from(["", "one", "two"]),
    },
)
chunks = st.lists(st.sampled_from(["Hel", "lo", None]), max_size=3)
contents = st.none() | st.text(max_size=3) | st.fixed_dictionaries({"chunks": st.none() | chunks})
events = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([EventKind.MESSAGE, EventKind.STATUS]),
        "source": st.sampled_from([EventSource.CUSTOMER, EventSource.AI_AGENT]),
        "trace_id": st.sampled_from(["one", "two"]),
        "data": contents,
    }
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("say"), events),
        st.tuples(st.just("change"), st.integers(0, 3), contents),
        st.tuples(st.just("withdraw"), st.integers(0, 3)),
    ),
    max_size=5,
)


async def answer(listener: SessionListener, name: str, *args: Any, **kwargs: Any) -> bool | type[Exception]:
    try:
        return bool(await getattr(listener, name)(*args, **kwargs))
    except (TypeError, ItemNotFoundError) as error:
        return type(error)


@pytest.mark.parametrize("mode", ["cache", "no cache"])
def test_waits_are_answered_as_by_parlants_listener_after_every_change(
    pocketbase: PocketBaseServer, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some wait from the beginning on: they are woken by just the change after which Parlant's listener would find
    something. All others ask anew after each change."""
    for name in ("SAFETY_SECONDS", "EVENTS_SECONDS", "CHUNKS_SECONDS"):
        monkeypatch.setattr(listening, name, 3600.0)

    async def compare(stores: Stores, asked: list[dict[str, Any]], changes: list[Any]) -> None:
        store = stores.session_store
        ours, parlants = both(stores)
        session = await begin(stores)
        said: list[Event] = []
        patient = [
            asyncio.create_task(answer(ours, "wait_for_more_events", session.id, **question)) for question in asked
        ]
        found = [False] * len(asked)
        for step, *args in changes:
            if step == "say":
                said.append(await say(stores, session, **args[0]))
            elif len(said) > args[0] and step == "withdraw":
                await store.delete_event(said[args[0]].id)
            elif len(said) > args[0] and not said[args[0]].deleted:
                try:
                    await store.update_event(session.id, said[args[0]].id, {"data": args[1]})
                except ItemNotFoundError:
                    continue  # withdrawn before
            for n, question in enumerate(asked):
                now = [
                    await answer(listener, "wait_for_more_events", session.id, timeout=Timeout(0), **question)
                    for listener in (ours, parlants)
                ]
                assert now[0] == now[1]
                found[n] = found[n] or now[0] is True
            await wait.looks.are_done()
            assert [task.done() for task in patient] == found
            for event in said:
                for name, count in [("wait_for_event_completion", ())] + [
                    ("wait_for_new_streaming_chunks", (count,)) for count in (0, 1, 2)
                ]:
                    of = (session.id, event.id, *count, Timeout(0))
                    assert await answer(ours, name, *of) == await answer(parlants, name, *of)
        for task in patient:
            task.cancel()
        await asyncio.gather(*patient, return_exceptions=True)
        assert stores.session_listener._lookouts == {}

    with asyncio.Runner() as runner:
        opening = opened(pocketbase, **CACHES[mode])
        stores = runner.run(opening.__aenter__())
        wait = runner.run(_wait(stores))

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(questions, max_size=5), steps)
        def test(asked: list[dict[str, Any]], changes: list[Any]) -> None:
            runner.run(compare(stores, asked, changes))

        try:
            test()
        finally:
            runner.run(opening.__aexit__(None, None, None))


async def _wait(stores: Stores) -> Wait:
    return Wait(stores)


# --- in a Parlant server ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("unwoken_never_look")
@pytest.mark.parametrize("mode", ["cache", "no cache"])
@pytest.mark.parametrize("wiring", ["server_args", "configure_container"])
async def test_a_long_poll_is_answered_by_the_event_itself(
    pocketbase: PocketBaseServer, mode: str, wiring: str
) -> None:
    configured: list[Container] = []

    async def mine(container: Container) -> Container:
        configured.append(container)
        return container

    async def script(server: p.Server) -> None:
        await server.create_agent("Robin", "Listens.")

    async with opened(pocketbase, **CACHES[mode]) as stores:
        arguments: dict[str, Any] = (
            stores.server_args(configure_container=mine)
            if wiring == "server_args"
            else {"configure_container": stores.configure_container}
        )
        async with parlant_server(script, **arguments) as server:
            assert server.container[SessionListener] is stores.session_listener
            assert [container[SessionListener] for container in configured] == (
                [stores.session_listener] if wiring == "server_args" else []
            )
            session = await begin(stores)
            wait = Wait(stores)
            for offset in range(5):
                poll = asyncio.create_task(
                    server.get(f"/sessions/{session.id}/events", wait_for_data=60, min_offset=offset)
                )
                await wait.looks.begun.wait()
                await wait.looks.are_done()
                await say(stores, session, {"n": offset}, kind=EventKind.CUSTOM)
                async with asyncio.timeout(SOON):
                    (event,) = await poll
                wait.looks.begun.clear()
                assert (event["offset"], event["data"]) == (offset, {"n": offset})


@pytest.mark.slow
async def test_a_configured_container_may_have_the_last_word(pocketbase: PocketBaseServer) -> None:
    async def mine(container: Container) -> Container:
        container[SessionListener] = PollingSessionListener(container[SessionStore])
        return container

    async def script(server: p.Server) -> None:
        await server.create_agent("Robin", "Listens.")

    async with (
        opened(pocketbase) as stores,
        parlant_server(script, **stores.server_args(configure_container=mine)) as server,
    ):
        assert isinstance(server.container[SessionListener], PollingSessionListener)
