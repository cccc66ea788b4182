"""What waiting for events costs, and how late a wait ends, beside Parlant's polling listener.

Both listeners wait on the same store, whose cache serves an embedded PocketBase.

`idle waits`: a thousand waits that nothing ends, for some seconds. What is counted is the second of one wait, so
the rate says nothing, and the CPU of a thousand such seconds is the share of a core that the waits take. Ours
looks once a minute though nothing was heard of, and a few seconds may not show that: such a look is measured
apart, and its share is added before it is judged.

`waits`: among as many idle ones a wait whose event is committed at a random moment, the same moments for both.
What is taken is the time from the moment at which the commit is known in this process until the wait has ended.
Rate and CPU are those of the pauses between the events, so they say nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, cast

import psutil
from parlant.core.agents import AgentId
from parlant.core.customers import CustomerId
from parlant.core.sessions import EventKind, EventSource, PollingSessionListener, SessionId, SessionListener

from bench.peers.embedded import pocketbase
from bench.peers.ours import config_of, name_of
from bench.rounds import Contender, Turns
from bench.run import Run
from bench.samples import event
from pb_cached import open_stores
from pb_cached.stores import PocketBaseSessionListener, Stores
from pb_cached.stores.listener import SAFETY_SECONDS

WOKEN: Final = name_of("exclusive", "log")
POLLING: Final = "Parlant's polling listener"
JUDGED: Final = 1000
"""Idle waits that the target speaks of."""
PAUSE: Final = 0.25
"""Events come at a random moment of so many seconds, which is a period of the polling listener."""
_DATA: Final = cast(dict[str, Any], event(0)["data"])

Prepare = Callable[[], Coroutine[Any, Any, None]]


async def measure(run: Run) -> None:
    waits = run.scaled(JUDGED, 200)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(pocketbase())
        stores = await stack.enter_async_context(
            open_stores(config_of("exclusive", "log"), connection_params=server.connection_params)
        )
        of = await stack.enter_async_context(Waits(stores, waits, settling=run.scaled(1000, 150) / 1000))
        listeners = {WOKEN: stores.session_listener, POLLING: PollingSessionListener(stores.session_store)}
        servers = [psutil.Process(server.pid)]

        def contenders(work: str, operations: int) -> list[Contender]:
            return [
                Contender(name, of.idle if work == "idle" else of.ended_by(listener), operations, servers,
                          of.begun_anew(listener))
                for name, listener in listeners.items()
            ]  # fmt: skip

        seconds_of_waits = waits * run.scaled(3000, 300) // 1000
        idle = await run.take_turns(
            "idle waits", contenders("idle", seconds_of_waits), of="waits", size=waits, unit="second of a wait"
        )
        turns = await run.take_turns(
            "waits", contenders("ended", run.scaled(25, 2)), of="idle waits beside", size=waits, unit="event"
        )
        look = await of.look_seconds(stores.session_listener)
        await of.check()
    run.judge("waits.idle", shares(idle, look))
    run.judge("waits.same", [turns.cells[WOKEN].wait(0.5)])


def shares(idle: Turns, look_seconds: float) -> list[float]:
    """Of a core, in percent, that so many idle waits take as are judged."""
    looks = JUDGED * look_seconds / SAFETY_SECONDS
    return [100 * (JUDGED * microseconds / 1e6 + looks) for microseconds in idle.cells[WOKEN].client_cpu]


class Waits:
    """Many sessions that somebody waits for, and one among them in which something happens."""

    def __init__(self, stores: Stores, waits: int, *, settling: float) -> None:
        """
        Args:
            settling: seconds until all waits have begun.
        """
        self._store = stores.session_store
        self._waits = waits
        self._settling = settling
        self._sessions: list[SessionId] = []
        self._busy = SessionId("")
        self._idle: list[asyncio.Task[bool]] = []
        self._offset = 0
        self._committed = 0.0

    async def __aenter__(self) -> Waits:
        made = await asyncio.gather(
            *(self._store.create_session(CustomerId("ida"), AgentId("robin")) for _ in range(self._waits + 1))
        )
        self._busy, *self._sessions = [session.id for session in made]
        for id_ in self._sessions:  # what is read from now on is in memory
            await self._store.list_events(id_)
        # The moment at which a commit becomes known is the moment at which all who watch are woken.
        self._store.watch(self._busy, self._note_commit)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    def _note_commit(self) -> None:
        self._committed = time.perf_counter()

    def begun_anew(self, listener: SessionListener) -> Prepare:
        """Ends the idle waits of the turn before, and begins those of this listener."""

        async def begin() -> None:
            await self._end()
            self._idle = [asyncio.create_task(listener.wait_for_more_events(id_)) for id_ in self._sessions]
            await asyncio.sleep(self._settling)

        return begin

    async def _end(self) -> None:
        assert not any(wait.done() for wait in self._idle), "nothing has ended an idle wait"
        for wait in self._idle:
            wait.cancel()
        await asyncio.gather(*self._idle, return_exceptions=True)
        self._idle = []

    async def idle(self, seconds_of_waits: int) -> Sequence[float]:
        await asyncio.sleep(seconds_of_waits / self._waits)
        return []

    def ended_by(self, listener: SessionListener) -> Callable[[int], Coroutine[Any, Any, Sequence[float]]]:
        moments = random.Random(0)

        async def work(events: int) -> Sequence[float]:
            return [await self._delay(listener, moments.uniform(0.01, PAUSE)) for _ in range(events)]

        return work

    async def _delay(self, listener: SessionListener, pause: float) -> float:
        wait = asyncio.create_task(listener.wait_for_more_events(self._busy, min_offset=self._offset or None))
        await asyncio.sleep(pause)
        kind, source = EventKind.MESSAGE, EventSource.CUSTOMER
        said = asyncio.create_task(self._store.create_event(self._busy, source, kind, "f" * 32, _DATA))
        assert await wait, "the wait was ended by the event"
        delay = time.perf_counter() - self._committed
        assert (await said).offset == self._offset, "events follow each other"
        self._offset += 1
        return delay

    async def look_seconds(self, listener: PocketBaseSessionListener) -> float:
        """The CPU that a look takes that nothing has asked for."""
        await self.begun_anew(listener)()
        begun = time.process_time()
        for lookout in listener._lookouts.values():
            lookout.wake()
        await asyncio.wait([lookout.look() for lookout in listener._lookouts.values()])
        return (time.process_time() - begun) / len(self._idle)

    async def check(self) -> None:
        """Is there every event that was waited for, and no other?"""
        found = [each.offset for each in await self._store.list_events(self._busy)]
        assert found == list(range(self._offset)), f"{found}, not {self._offset} events"
