"""What it costs to follow other servers, and how soon they are seen.

`waking`: from the acknowledgement of an event until who waits for it is woken, by the server that wrote it and by
another one in this process; 0 where that was earlier. Judged is what another process sees: a server of its own
that waits for an event every 20 ms of a third one, both on the machine's one monotonic clock; nothing else is on.
It is shown over time, too, and so is the same while a hundred writers of this process are at work.

`following`: the CPU of taking a change of another server into the cache, in commits of 100, of which each finds
its session cached. The commits are made up, and given to what follows as the stream gives them.

`followed writes`: events of a hundred writers here, with 0, 1 and 4 servers that follow, in processes of their
own; the size counts the writing one, too. All of them share this machine's cores, so that their own CPU is in the
rate, by which is judged what each costs the writers. PocketBase's CPU for an event stands apart: that is what a
follower costs where it has a machine of its own.

`after a gap`: the stream is lost for ten seconds, in which another server changes some of the cached documents.
What is taken is the time until answers are good again; and some of them are read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import httpx
import msgspec
import psutil
from parlant.core.agents import AgentId
from parlant.core.async_utils import Timeout
from parlant.core.customers import CustomerId
from parlant.core.sessions import EventKind, EventSource, SessionId

from bench.peers.contents import Contents
from bench.peers.embedded import pocketbase
from bench.peers.filling import fill_collection
from bench.peers.ours import name_of
from bench.processes.child import Child, child
from bench.processes.follower import FOLLOWING, Follow, Seen, Watch, following
from bench.processes.writer import Write, Written
from bench.quantiles import quantile
from bench.results import Series
from bench.rounds import Contender, Work
from bench.run import Run
from bench.samples import customer_id, event
from bench.workloads.writes import Sessions
from pb_cached import PocketBaseServer, open_stores
from pb_cached.coherence.entries import Entry, Payload
from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.pocketbase.ids import new_id
from pb_cached.stores import Stores

PEER: Final = name_of("realtime", "log")
FOLLOWERS: Final = (0, 1, 4)
WRITERS: Final = 100
EVERY: Final = 0.02
"""Seconds from one event to the next whose staleness is taken."""
PATIENCE: Final = 1.0
"""Seconds without an event after which there are no more."""
JUDGED_RATE: Final = 10_000
"""Changes a second that the target speaks of."""
IN_A_COMMIT: Final = 100
COMMITS: Final = 50
"""That are followed in a round."""


async def measure(run: Run) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(pocketbase())
        one = await stack.enter_async_context(server_of_ours(server))
        async with server_of_ours(server) as other:
            await _waking(run, one, other, server)
            await _gap(run, server, one, other)
        token = server.connection_params["admin_token"]
        writer, *followers = await asyncio.gather(
            *(
                stack.enter_async_context(child(f"bench.processes.{module}", server.url, token=token))
                for module in ("writer", *("follower" for _ in range(max(_numbers(run)))))
            )
        )
        sessions = Sessions(one.session_store)
        await sessions.prepare()
        await _staleness(run, sessions, writer, followers[0])
        await _followed_writes(run, sessions, followers, server)
        await sessions.check()
        await _following(run, one)


@asynccontextmanager
async def server_of_ours(server: PocketBaseServer) -> AsyncIterator[Stores]:
    """With a client of its own, as servers that share one share their cache."""
    async with (
        httpx.AsyncClient(timeout=30) as http,
        open_stores(FOLLOWING, connection_params=server.connection_params, http_client=http) as stores,
    ):
        await following(stores)
        yield stores


# how soon


async def _waking(run: Run, one: Stores, other: Stores, server: PocketBaseServer) -> None:
    servers = [psutil.Process(server.pid)]
    contenders = [
        Contender(f"{PEER}, {which} server", await _woken_by(one, waiter), run.scaled(100, 20), servers)
        for which, waiter in (("same", one), ("another", other))
    ]
    await run.take_turns("waking", contenders, of="waits", size=1, unit="event")


async def _woken_by(writer: Stores, waiter: Stores) -> Work:
    store = writer.session_store
    session = (await store.create_session(CustomerId("ida"), AgentId("robin"))).id
    offset = 0

    async def work(events: int) -> Sequence[float]:
        nonlocal offset
        waits = []
        for _ in range(events):
            waiting = asyncio.create_task(_woken(waiter, session, offset))
            await asyncio.sleep(0.01)
            await store.create_event(session, EventSource.CUSTOMER, EventKind.MESSAGE, "f" * 32, {"message": "a"})
            acknowledged = time.perf_counter()
            waits.append(max(0.0, await waiting - acknowledged))
            offset += 1
        return waits

    return work


async def _woken(stores: Stores, session: SessionId, offset: int) -> float:
    assert await stores.session_listener.wait_for_more_events(session, min_offset=offset, timeout=Timeout(10))
    return time.perf_counter()


async def _staleness(run: Run, sessions: Sessions, writer: Child, follower: Child) -> None:
    """Of what one process writes and another one shows."""
    seconds = run.scaled(8000, 800) / 1000
    await follower.ask(Follow(True), Seen)
    session = sessions.hot_id
    is_over = asyncio.Event()

    async def burst() -> None:
        while not is_over.is_set():
            await sessions.spread(WRITERS)(5 * WRITERS)

    with run.step("staleness", 2) as done:
        quiet = await _stale(session, 0, seconds, writer, follower)
        done()
        busy = asyncio.create_task(burst())
        besieged = await _stale(session, len(quiet), seconds, writer, follower)
        is_over.set()
        await busy
        done()
    await follower.ask(Follow(False), Seen)
    sessions.written[session] += len(quiet) + len(besieged)
    y = "ms until another server shows it"
    for name, points in (("quiet", quiet), (f"while {WRITERS} others write", besieged)):
        run.add_series(Series(workload="coherence", name=name, x="seconds", y=y, points=points))
    run.judge("waits.other", [quantile([milliseconds for _, milliseconds in quiet], 0.5)])


async def _stale(
    session: SessionId, offset: int, seconds: float, writer: Child, follower: Child
) -> list[tuple[float, float]]:
    """When each event was acknowledged, in seconds, and in how many milliseconds it was seen then.

    Args:
        offset: of the first.
    """
    watching = asyncio.create_task(follower.ask(Watch(session, offset, PATIENCE), Seen))
    written = await writer.ask(Write("events", seconds, [session], EVERY), Written)
    seen = await watching
    assert len(seen.moments) == len(written.moments), "every event was seen once"
    began = written.moments[0] - written.waits[0]
    return [
        (acknowledged - began, max(0.0, shown - acknowledged) * 1000)
        for acknowledged, shown in zip(written.moments, seen.moments, strict=True)
    ]


# what it costs


async def _followed_writes(
    run: Run, sessions: Sessions, followers: Sequence[Child], server: PocketBaseServer
) -> None:
    def prepared(number: int) -> Callable[[], Coroutine[Any, Any, None]]:
        async def prepare() -> None:
            for index, follower in enumerate(followers):
                await follower.ask(Follow(index < number), Seen)

        return prepare

    events, servers = run.scaled(4000, 1500), [psutil.Process(server.pid)]
    contenders = {
        number: Contender(PEER, sessions.spread(WRITERS), events, servers, prepared(number), 1 + number)
        for number in _numbers(run)
    }
    turns = await run.take_turns(
        "followed writes", list(contenders.values()), of="servers, one of which writes", size=1, unit="event"
    )
    alone = contenders[0].name
    for key, number in (("following.one", 1), ("following.four", 4)):
        if number in contenders:
            slowed = turns.faster(contenders[number].name, alone)
            run.judge(key, [100 * (1 - rate) / number for rate in slowed])
    await prepared(0)()


def _numbers(run: Run) -> Sequence[int]:
    """Of servers that follow; few in a quick run, as each takes a second to start."""
    return FOLLOWERS[: run.scaled(3, 2)]


async def _following(run: Run, stores: Stores) -> None:
    """Changes of another server, which are made up."""
    sessions = Sessions(stores.session_store)
    await sessions.prepare()
    await asyncio.gather(*(stores.session_store.list_events(session) for session in sessions.ids))
    follower = await following(stores)
    codec = stores.session_store._events.codec
    most = COMMITS * (run.options.rounds + 1)
    messages = iter([_commit(stores, sessions.ids, number) for number in range(most)])
    topic = f"{codec.collection}_log/*"
    followed = 0

    async def work(changes: int) -> Sequence[float]:
        nonlocal followed
        for _ in range(changes // IN_A_COMMIT):
            follower.received(topic, next(messages))
            followed += 1
        return []

    turns = await run.take_turns(
        "following",
        [Contender(PEER, work, COMMITS * IN_A_COMMIT)],
        of="changes in a commit",
        size=IN_A_COMMIT,
        unit="change",
    )
    for id_ in sessions.ids:
        shown = [each.offset for each in await stores.session_store.list_events(id_)]
        assert shown == list(range(followed)), f"{len(shown)} events are shown of {followed} that were followed"
    run.judge("following.share", [100 * JUDGED_RATE * cpu / 1e6 for cpu in turns.cells[PEER].client_cpu])


def _commit(stores: Stores, sessions: Sequence[SessionId], number: int) -> bytes:
    """What the stream would bring of another server's commit: one more event in each session."""
    codec = stores.session_store._events.codec
    bodies = []
    for session in sessions:
        document: dict[str, Any] = {**event(number), "session_id": session, "offset": number}
        bodies.append(msgspec.json.decode(codec.insert(document).body))
    payload = msgspec.json.encode(Payload(c=bodies)).decode()
    entry = Entry(new_id(), "another", number + 1, codec.commit_layout, payload, "2026-11-25 00:00:00.000Z")
    return msgspec.json.encode({"action": "create", "record": entry})


# after a gap


async def _gap(run: Run, server: PocketBaseServer, writer: Stores, stores: Stores) -> None:
    cached, changed = run.scaled(100_000, 2000), run.scaled(1000, 100)
    customers = writer.customer_store._customers_collection
    documents = Contents(1, customers=cached).customer_documents()
    table = f"{FOLLOWING.stores.customer_prefix}_customers"
    gap = Gap(writer, stores, changed, run.scaled(10, 4))
    with run.step(f"storing {cached:,} customers"):
        await fill_collection(server.data_dir, table, customers, documents, ("id", "creation_utc", "name"))
        await gap.prepare(cached)
    if run.options.is_quick:  # the next gap would have to wait until the two streams of this one overlap no more
        with run.step("a gap"):
            await gap.lost()
            taken = await gap.caught_up(1)
    else:
        turns = await run.take_turns(
            "after a gap",
            [Contender(PEER, gap.caught_up, 1, [psutil.Process(server.pid)], gap.lost)],
            of="documents cached",
            size=cached,
            unit="gap",
        )
        taken = [1 / rate for rate in turns.cells[PEER].rates]
    await gap.check()
    run.judge("following.gap", taken)


class Gap:
    """A server of ours that is cut off while another one writes."""

    def __init__(self, writer: Stores, stores: Stores, changed: int, seconds: float) -> None:
        self._writer = writer.customer_store
        self._stores = stores
        self._seconds = seconds
        self._some = [customer_id(number) for number in range(changed)]
        self._city = "Lindau"

    async def prepare(self, cached: int) -> None:
        collection = self._stores.customer_store._customers_collection
        assert isinstance(collection, PocketBaseDocumentCollection)
        await collection.warm()
        documents = self._stores.stats().customers.collections["customers"].documents
        assert documents == cached, f"{documents} are cached, not {cached}"
        self._follower = await following(self._stores)

    async def lost(self) -> None:
        await self.check()
        self._follower.lost("benchmark")
        self._city += "g"
        await asyncio.gather(*(self._writer.upsert_extra(id_, {"city": self._city}) for id_ in self._some))
        await asyncio.sleep(self._seconds)

    async def caught_up(self, gaps: int) -> Sequence[float]:
        assert gaps == 1
        begun = time.perf_counter()
        self._follower._stream.replace("benchmark")
        await following(self._stores)
        return [time.perf_counter() - begun]

    async def check(self) -> None:
        """Is what was written last in the cut-off server's answers?"""
        if self._city == "Lindau":
            return
        for id_ in self._some[:: len(self._some) // 10]:
            city = (await self._stores.customer_store.read_customer(id_)).extra["city"]
            assert city == self._city, f"{city} is shown where {self._city} was written"
