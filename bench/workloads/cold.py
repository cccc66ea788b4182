"""What a reader waits for the first time, when nothing of it is in memory.

`cold, list of 20` and `cold, list of 500`: the events of a session that is not cached, beside the plain adapter,
where every read is that, and a bare GET of the same records with the answer decoded. Ours forgets all sessions and
events before each turn, and reads each session of 20 once in it; of 500 there is one, before each read of which it
is forgotten anew. PocketBase keeps what it likes: its pages are as warm for one as for the others.

`start, ...`: a server process that begins, as a restart has it: from its start until what it needs is imported,
then until the stores are open, then until all is read that the first turn reads. Parlant is the larger part of
what is imported, for both alike.

Sizes are events stored, in sessions of 20; the session of 500 comes on top.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import httpx
from parlant.core.sessions import SessionDocumentStore, SessionId

from bench.peers import Peer
from bench.peers.contents import Contents
from bench.peers.ours import OurPeer, ours
from bench.peers.plain import plain
from bench.peers.plain_database import PlainDatabase
from bench.processes.server import Server, Whose
from bench.results import Cell, at_shares
from bench.rounds import Contender
from bench.run import Run
from bench.samples import EVENTS_OF_A_SESSION, LONG_SESSION, stored_session

LONG: Final = 500
_EVENTS: Final = "/api/collections/parlant_sessions_events/records"


async def measure(run: Run) -> None:
    for size in run.sizes([1_000, 100_000], [1_000]):
        contents = Contents(size, long=LONG)
        async with AsyncExitStack() as stack:
            mine = await stack.enter_async_context(ours(contents, mode="realtime", commit="log"))
            theirs = await stack.enter_async_context(plain(contents))
            http = await stack.enter_async_context(_bare(mine))
            numbers = random.Random(size).sample(range(contents.sessions), contents.sessions)
            some = [stored_session(number) for number in numbers]
            for events, sessions, reads in (
                (EVENTS_OF_A_SESSION, some, min(run.scaled(200, 20), contents.sessions)),
                (LONG, [LONG_SESSION], run.scaled(40, 8)),
            ):
                await run.take_turns(
                    f"cold, list of {events}",
                    [
                        Contender(mine.name, Listing(mine, sessions, events).work, reads, mine.servers),
                        Contender(theirs.name, Listing(theirs, sessions, events).work, reads, theirs.servers),
                        Contender("bare GET", Gets(http, sessions, events).work, reads, mine.servers),
                    ],
                    of="events stored",
                    size=size,
                    unit="read",
                )
            await _measure_starts(run, size, [Starts("ours", mine), Starts("plain", theirs)], some)


def forget(peer: Peer) -> None:
    """What it has read of sessions and events is not in its memory any more."""
    if isinstance(peer, OurPeer):
        store = peer.stores.session_store
        for collection in (store._sessions, store._events):
            collection._connection.forget(collection.codec.collection)


class Listing:
    """Lists the events of session after session."""

    def __init__(self, peer: Peer, sessions: Sequence[SessionId], events: int) -> None:
        self._peer = peer
        self._sessions = itertools.cycle(sessions)
        self._is_one = len(sessions) == 1
        self._events = events

    async def work(self, reads: int) -> list[float]:
        waits = []
        forget(self._peer)
        for _ in range(reads):
            session = next(self._sessions)
            if self._is_one:
                forget(self._peer)
            begun = time.perf_counter()
            found = await self._peer.session_store.list_events(session)
            waits.append(time.perf_counter() - begun)
            assert [event.offset for event in found] == list(range(self._events)), f"{self._peer.name}: {session}"
        return waits


class Gets:
    """Asks PocketBase for the same records, as little as can be."""

    def __init__(self, http: httpx.AsyncClient, sessions: Sequence[SessionId], events: int) -> None:
        self._http = http
        self._sessions = itertools.cycle(sessions)
        self._events = events

    async def work(self, reads: int) -> list[float]:
        waits = []
        for _ in range(reads):
            asked: dict[str, str | int] = {
                "filter": f"session_id='{next(self._sessions)}'",
                "perPage": LONG,
                "skipTotal": 1,
            }
            begun = time.perf_counter()
            found = (await self._http.get(_EVENTS, params=asked)).raise_for_status().json()["items"]
            waits.append(time.perf_counter() - begun)
            assert len(found) == self._events
        return waits


def _bare(peer: OurPeer) -> httpx.AsyncClient:
    url, token = peer.connection_params["url"], peer.connection_params["admin_token"]
    return httpx.AsyncClient(base_url=url, headers={"Authorization": token}, trust_env=False)


# --- a process that starts ---------------------------------------------------------------------------------------

PHASES: Final = ("import", "open", "first reads")


@dataclass
class Starts:
    """Servers of a peer, one after the other."""

    whose: Whose
    peer: Peer
    seconds: list[list[float]] = field(default_factory=list)
    """Of each phase, by the start."""
    cpu: list[list[float]] = field(default_factory=list)
    """The same of the process's CPU."""
    bytes: int = 0

    async def take_turn(self, session: SessionId) -> None:
        moments, used = [time.perf_counter()], [0.0]
        async with Server.start(self.whose, *_address(self.peer)) as server:

            def note() -> None:
                moments.append(time.perf_counter())
                used.append(sum(server.process.cpu_times()[:2]))

            note()
            await server.open(settles=False)
            note()
            events = await server.read(session)
            note()
            assert events == EVENTS_OF_A_SESSION
            self.bytes = server.process.memory_info().rss
        self.seconds.append(_steps(moments))
        self.cpu.append(_steps(used))

    def cell(self, phase: int, size: int) -> Cell:
        seconds = [each[phase] for each in self.seconds[1:]]
        return Cell(
            workload=f"start, {PHASES[phase]}",
            peer=self.peer.name,
            of="events stored",
            size=size,
            unit="start",
            rates=[1 / each for each in seconds],
            waits=at_shares([1000 * each for each in seconds]),
            client_cpu=[1e6 * each[phase] for each in self.cpu[1:]],
            server_cpu=[],
            client_bytes=self.bytes,
            server_bytes=0,
        )


async def _measure_starts(run: Run, size: int, starts: Sequence[Starts], sessions: Sequence[SessionId]) -> None:
    """The first start of each warms up."""
    rounds = run.options.rounds
    with run.step(f"start, {size:,} events stored", (rounds + 1) * len(starts)) as done:
        for round_, session in zip(range(rounds + 1), itertools.cycle(sessions), strict=False):
            for each in starts if round_ % 2 else reversed(starts):
                await each.take_turn(session)
                done()
    run.results.cells += [each.cell(phase, size) for phase in range(len(PHASES)) for each in starts]


def _steps(readings: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(readings)]


def _address(peer: Peer) -> tuple[str, str]:
    """Where its PocketBase is, and a token for it."""
    if isinstance(peer, OurPeer):
        return peer.connection_params["url"], peer.connection_params["admin_token"]
    store = peer.session_store
    assert isinstance(store, SessionDocumentStore) and isinstance(store._database, PlainDatabase)
    http = store._database._http
    return str(http.base_url), http.headers["Authorization"]
