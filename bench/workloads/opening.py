"""How long opening the session store takes, by how many events it holds.

Each opening is a connection of its own: the token is looked at, PocketBase is probed, the collections with their
indexes and triggers are checked, and it is looked for documents of older versions. Stores of all sizes are in one
PocketBase, each under a prefix of its own, and take turns. Each is closed before the next is opened, as stores
that are open at the same time share their connection. The rate counts that, too; what is judged, and what is shown
as the wait, is the time until the store is open.

At the end each store is opened once more, and must hold what it was filled with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final

import psutil

from bench.peers.contents import Contents, Part
from bench.peers.embedded import QUIET, pocketbase
from bench.peers.filling import fill
from bench.peers.ours import name_of
from bench.rounds import Contender
from bench.run import Run
from bench.samples import stored_session
from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.stores import PocketBaseSessionStore

MILLION: Final = 1_000_000
FEW: Final = 10
OPENINGS: Final = 4
"""Of each store in a round."""
PEER: Final = name_of("realtime", "log")
AS_IT_COMES: Final = Config(logging=QUIET)
"""Which is the realtime mode; that the log path can be taken is found out at each opening."""
VARYING: Final = ("id", "creation_utc", "session_id", "offset", "trace_id")


async def measure(run: Run) -> None:
    sizes = run.sizes((FEW, 1000, 100_000, MILLION), (FEW, 1000))
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(pocketbase())
        stores = [Store(server, size) for size in sizes]
        with run.step("filling stores", len(stores)) as done:
            for store in stores:
                await store.fill()
                done()
        servers = [psutil.Process(server.pid)]
        contenders = {
            store.size: Contender(PEER, store.openings, run.scaled(OPENINGS, 3), servers, size=store.size)
            for store in stores
        }
        await run.take_turns(
            "opening", list(contenders.values()), of="events stored", size=0, unit="opening and closing"
        )
        for store in stores:
            await store.check()
    taken = {store.size: store.rounds[1:] for store in stores}  # the first round warms up
    if MILLION in taken:
        run.judge("opening.million", [1000 * seconds for seconds in taken[MILLION]])
    pairs = zip(taken[max(taken)], taken[FEW], strict=True)
    run.judge("opening.growth", [largest / smallest for largest, smallest in pairs])


class Store:
    """A session store of some size, which is closed."""

    def __init__(self, server: PocketBaseServer, size: int) -> None:
        self.size = size
        self.rounds: list[float] = []
        """Seconds that an opening took, the median of each turn."""
        self._server = server
        self._prefix = f"with_{size}"
        self._contents = Contents(size)

    async def openings(self, openings: int) -> Sequence[float]:
        taken = []
        for _ in range(openings):
            begun = time.perf_counter()
            async with self._database() as database, PocketBaseSessionStore(database):
                taken.append(time.perf_counter() - begun)
        self.rounds.append(statistics.median(taken))
        return taken

    def _database(self) -> PocketBaseDocumentDatabase:
        params = self._server.connection_params
        return PocketBaseDocumentDatabase(None, params, collection_prefix=self._prefix, config=AS_IT_COMES)

    async def fill(self) -> None:
        async with self._database() as database, PocketBaseSessionStore(database) as store:
            events = Part("sessions", "events", store._events, self._contents.event_documents(), VARYING)
            sessions = Part(
                "sessions", "sessions", store._sessions, self._contents.session_documents(), ("id", "creation_utc")
            )
            for part in (events, sessions):
                await fill(self._server.data_dir, f"{self._prefix}_{part.name}", part)

    async def check(self) -> None:
        """Are the last session's events there?"""
        last = self._contents.sessions - 1
        async with self._database() as database, PocketBaseSessionStore(database) as store:
            found = [event.offset for event in await store.list_events(stored_session(last))]
        expected = self._contents.events_of(last)
        assert found == list(range(expected)), f"{found}, not {expected} events"
