"""Where the time of a workload goes: `python -m bench profile WORKLOAD`.

Everything runs in this process but PocketBase. What the event loop does while it waits for PocketBase is shown as
the wait it is, so that a share of the tree is a share of the time. Rates are taken before the profiler is at work,
which slows Python down.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from parlant.core.persistence.common import Cursor
from parlant.core.sessions import EventKind, EventSource, SessionId
from pyinstrument import Profiler
from rich.console import Console

from bench.peers.contents import Contents
from bench.peers.ours import Commit, OurPeer, ours
from bench.processes.traffic import Customer
from bench.samples import EVENTS_OF_A_SESSION, customer_id, event, stored_session
from bench.workloads.cold import forget
from bench.workloads.turns import TURNS_OF_A_SESSION, Conversations
from pb_cached import open_stores
from pb_cached.coherence.entries import Entry, Payload
from pb_cached.pocketbase.ids import new_id

SESSIONS: Final = 100
"""That are read or written; there are ten times as many."""
INTERVAL: Final = 0.0002
"""Seconds between two samples."""
SHOWN: Final = r".*[/\\](pb_cached[/\\].*|selectors\.py)"
"""Among libraries, whose functions are folded: this one, where it is installed as they are, and the event loop's
wait for what PocketBase answers."""
LEAST_SHARE: Final = 0.01
"""Of the CPU's time: what takes less is not shown. Of all time it may be less, where most of it is waiting."""
UNPROFILED: Final = 0.25
"""So long, of the seconds that are asked for, it is run before without the profiler, for the rates."""
_CONTENTS: Final = Contents(10 * SESSIONS * EVENTS_OF_A_SESSION, customers=20)
_SOME: Final[Sequence[SessionId]] = [stored_session(number) for number in range(SESSIONS)]
_DATA: Final = event(0)["data"]

Work = Callable[[], Awaitable[int]]
"""Does some operations, and returns how many."""
Ready = Callable[[], Work]
"""Makes ready for one piece of work, which is no part of what is profiled."""
Load = Callable[[OurPeer], AbstractAsyncContextManager[Ready]]


@dataclass(frozen=True)
class Profiled:
    """What can be profiled."""

    what: str
    load: Load
    commit: Commit = "log"


# --- what can be profiled ----------------------------------------------------------------------------------------


def _repeated(
    load: Callable[[OurPeer], Awaitable[Work]],
) -> Load:
    """One that needs nothing but to be done again."""

    @asynccontextmanager
    async def opened(peer: OurPeer) -> AsyncIterator[Ready]:
        work = await load(peer)
        yield lambda: work

    return opened


@_repeated
async def _reads(peer: OurPeer) -> Work:
    async def work() -> int:
        for session in _SOME:
            await peer.session_store.list_events(session)
        return SESSIONS

    return work


def _writes(writers: int, events: int) -> Load:
    """So many writers of sessions of their own, and the events of each in a piece of work."""

    @_repeated
    async def writes(peer: OurPeer) -> Work:
        async def write(session: SessionId) -> None:
            for _ in range(events):
                await peer.session_store.create_event(
                    session, EventSource.CUSTOMER, EventKind.MESSAGE, "f" * 32, _DATA
                )

        async def work() -> int:
            await asyncio.gather(*map(write, _SOME[:writers]))
            return writers * events

        return work

    return writes


@_repeated
async def _turns(peer: OurPeer) -> Work:
    conversations = Conversations(peer, _CONTENTS.sessions)

    async def work() -> int:
        await asyncio.gather(*(conversations.take(TURNS_OF_A_SESSION) for _ in range(20)))
        return 20 * TURNS_OF_A_SESSION

    return work


@_repeated
async def _mixed(peer: OurPeer) -> Work:
    waits: list[float] = []
    customers = [Customer(peer.session_store, f"customer {number}", waits, {}) for number in range(20)]

    async def go_on(customer: Customer) -> None:
        for _ in range(5):
            await customer.act()

    async def work() -> int:
        before = len(waits)
        await asyncio.gather(*map(go_on, customers))
        return len(waits) - before

    return work


@asynccontextmanager
async def _cold(peer: OurPeer) -> AsyncIterator[Ready]:
    async def work() -> int:
        for session in _SOME:
            await peer.session_store.list_events(session)
        return SESSIONS

    def ready() -> Work:
        forget(peer)
        return work

    yield ready


@_repeated
async def _listing(peer: OurPeer) -> Work:
    async def work() -> int:
        cursor: Cursor | None = None
        for pages in itertools.count(1):
            page = await peer.session_store.list_sessions(customer_id=customer_id(0), limit=20, cursor=cursor)
            cursor = page.next_cursor
            if cursor is None:
                await peer.customer_store.list_customers(limit=20)
                return pages + 1
        raise AssertionError

    return work


@_repeated
async def _opening(peer: OurPeer) -> Work:
    async def work() -> int:
        # By an HTTP client of its own it is a server of its own, which shares nothing with the other one.
        async with (
            httpx.AsyncClient() as http,
            open_stores(peer.config, connection_params=peer.connection_params, http_client=http),
        ):
            return 1

    return work


@asynccontextmanager
async def _following(peer: OurPeer) -> AsyncIterator[Ready]:
    """Commits of another server that append to sessions which are in memory, a hundred events in each."""
    events = peer.stores.session_store._events
    follower = events._connection.follower
    assert follower is not None
    await asyncio.gather(*map(follower.caught_up, follower._logs))
    for session in _SOME:
        await peer.session_store.list_events(session)
    numbers = itertools.count(1)

    def message() -> bytes:
        number = next(numbers)
        bodies = []
        for session in _SOME:
            document: dict[str, Any] = {**event(0), "session_id": session}
            document["offset"] = EVENTS_OF_A_SESSION - 1 + number
            bodies.append(msgspec.json.decode(events.codec.insert(document).body))
        payload = msgspec.json.encode(Payload(c=bodies)).decode()
        layout = events.codec.commit_layout
        entry = Entry(new_id(), "another", number, layout, payload, "2026-11-25 00:00:00.000Z")
        return msgspec.json.encode({"action": "create", "record": entry})

    def ready() -> Work:
        messages = [message() for _ in range(20)]

        async def work() -> int:
            for each in messages:
                follower.received(f"{events.codec.collection}_log/*", each)
            return len(messages) * SESSIONS

        return work

    yield ready


WORKLOADS: Final[Mapping[str, Profiled]] = {
    "reads": Profiled("list_events of 20, from memory", _reads),
    "writes": Profiled("create_event by 100 writers, log path", _writes(SESSIONS, 10)),
    "writes-batch": Profiled("the same by the batch path", _writes(SESSIONS, 10), "batch"),
    "lone": Profiled("create_event by one writer, log path", _writes(1, 100)),
    "turns": Profiled("turns of 20 conversations, as Parlant's engine takes them", _turns),
    "mixed": Profiled("turns, polls and pages of 20 customers", _mixed),
    "cold": Profiled("list_events of 20, not in memory", _cold),
    "listing": Profiled("pages of sessions and customers", _listing),
    "opening": Profiled("opening the stores", _opening),
    "following": Profiled("taking in what another server has committed", _following),
}


# --- profiling ---------------------------------------------------------------------------------------------------


def profiled(workload: str, seconds: float, html: Path | None, console: Console) -> None:
    """Run a workload of `WORKLOADS` under pyinstrument for so many seconds, and show where they went.

    Args:
        html: a file for the profile as a page.
    """
    asyncio.run(_profiled(WORKLOADS[workload], seconds, html, console))


async def _profiled(profiled: Profiled, seconds: float, html: Path | None, console: Console) -> None:
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(ours(_CONTENTS, mode="realtime", commit=profiled.commit))
        ready = await stack.enter_async_context(profiled.load(peer))
        await ready()()  # warms up
        spent = await _repeat(ready, seconds * UNPROFILED)
        console.print(
            f"{profiled.what}: {spent.operations / spent.wall:,.0f} operations a second, "
            f"{spent.cpu / spent.operations * 1e6:,.0f} microseconds of CPU each",
            highlight=False,
            soft_wrap=True,
        )
        # Tasks are frames of the event loop's, so that what runs in any of them is seen. A thread that tells the
        # time, as pyinstrument has one, would cost less than to ask for it with each call. But it may sleep for a
        # second first (its wake-up can be lost while it starts), and much that is profiled is over by then.
        profiler = Profiler(interval=INTERVAL, async_mode="disabled")
        shown = await _repeat(ready, seconds, profiler)
    tree = profiler.output_text(
        unicode=True,
        color=console.is_terminal,
        processor_options={
            "show_regex": SHOWN,
            "filter_threshold": LEAST_SHARE * min(1.0, shown.cpu / shown.wall),
        },
    )
    console.out(tree, highlight=False)
    if html is not None:
        profiler.write_html(html)


@dataclass
class _Spent:
    """What was done, and the seconds that it took."""

    operations: int = 0
    wall: float = 0.0
    cpu: float = 0.0


async def _repeat(ready: Ready, seconds: float, profiler: Profiler | None = None) -> _Spent:
    """Work for so many seconds, once at least."""
    spent = _Spent()
    while not spent.operations or spent.wall < seconds:
        work = ready()
        begun, used = time.perf_counter(), time.process_time()
        if profiler is not None:
            profiler.start()
        spent.operations += await work()
        if profiler is not None:
            profiler.stop()
        spent.wall += time.perf_counter() - begun
        spent.cpu += time.process_time() - used
    return spent
