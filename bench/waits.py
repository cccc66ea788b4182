"""What waiting for events costs, and how late a wait ends, beside Parlant's polling listener.

    python -m bench.waits

Both listeners wait on the same store, whose cache serves an embedded PocketBase. In each round both take turns: a
thousand waits that nothing ends, and among them one whose events are committed now and then.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final, cast

import click
from parlant.core.agents import AgentId
from parlant.core.customers import CustomerId
from parlant.core.sessions import EventKind, EventSource, PollingSessionListener, SessionId, SessionListener
from rich.console import Console
from rich.table import Table

from bench.quantiles import quantile
from bench.samples import event
from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.config import CoherenceSettings, LoggingSettings
from pb_cached.stores import PocketBaseSessionListener, Stores
from pb_cached.stores.listener import SAFETY_SECONDS

SETTLING: Final = 1.5
"""Seconds until a thousand waits have begun."""
PAUSE: Final = 0.25
"""Events come at a random moment of so many seconds, which is a period of the polling listener."""
_DATA: Final = cast(dict[str, Any], event(0)["data"])
_exclusive: Final = Config(coherence=CoherenceSettings(mode="exclusive"), logging=LoggingSettings(level="warning"))


@dataclass
class Result:
    shares: list[float] = field(default_factory=list)
    """Of a core, in each round."""
    delays: list[float] = field(default_factory=list)
    """Milliseconds from a commit to the end of the wait for it."""

    def quantile(self, share: float) -> float:
        return quantile(self.delays, share)


class Waits:
    """Many sessions that somebody waits for, and one among them in which something happens."""

    def __init__(self, stores: Stores) -> None:
        self._store = stores.session_store
        self._sessions: list[SessionId] = []
        self._busy = SessionId("")
        self._offset = 0
        self._committed = 0.0
        self.listeners: dict[str, SessionListener] = {
            "woken": stores.session_listener,
            "polling": PollingSessionListener(self._store),
        }

    async def prepare(self, waits: int) -> None:
        made = await asyncio.gather(
            *(self._store.create_session(CustomerId("ida"), AgentId("robin")) for _ in range(waits + 1))
        )
        self._busy, *self._sessions = [session.id for session in made]
        for id_ in self._sessions:  # what is read from now on is in memory
            await self._store.list_events(id_)
        # The moment at which a commit becomes known is the moment at which all who watch are woken.
        self._store.watch(self._busy, self._note_commit)

    def _note_commit(self) -> None:
        self._committed = time.perf_counter()

    async def take_turn(self, listener: SessionListener, result: Result, seconds: float, events: int) -> None:
        idle = [asyncio.create_task(listener.wait_for_more_events(id_)) for id_ in self._sessions]
        await asyncio.sleep(SETTLING)
        begun, used = time.perf_counter(), time.process_time()
        await asyncio.sleep(seconds)
        result.shares.append((time.process_time() - used) / (time.perf_counter() - begun))
        for _ in range(events):
            result.delays.append(1000 * await self._delay(listener))
        assert not any(wait.done() for wait in idle)
        for wait in idle:
            wait.cancel()
        await asyncio.gather(*idle, return_exceptions=True)

    async def _delay(self, listener: SessionListener) -> float:
        wait = asyncio.create_task(listener.wait_for_more_events(self._busy, min_offset=self._offset or None))
        await asyncio.sleep(random.uniform(0.01, PAUSE))
        kind, source = EventKind.MESSAGE, EventSource.CUSTOMER
        said = asyncio.create_task(self._store.create_event(self._busy, source, kind, "f" * 32, _DATA))
        assert await wait
        delay = time.perf_counter() - self._committed
        self._offset = (await said).offset + 1
        return delay

    async def look_seconds(self, listener: PocketBaseSessionListener) -> float:
        """What a look costs that nothing has asked for."""
        idle = [asyncio.create_task(listener.wait_for_more_events(id_)) for id_ in self._sessions]
        await asyncio.sleep(SETTLING)
        begun = time.process_time()
        for lookout in listener._lookouts.values():
            lookout.wake()
        await asyncio.wait([lookout.look() for lookout in listener._lookouts.values()])
        spent = time.process_time() - begun
        for wait in idle:
            wait.cancel()
        await asyncio.gather(*idle, return_exceptions=True)
        return spent / len(idle)


async def measure(rounds: int, waits: int, seconds: float, events: int) -> tuple[dict[str, Result], float]:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pb-cached-bench-"))
        server = await stack.enter_async_context(PocketBaseServer(folder))
        stores = await stack.enter_async_context(
            open_stores(_exclusive, connection_params=server.connection_params)
        )
        of = Waits(stores)
        await of.prepare(waits)
        results: dict[str, Result] = {name: Result() for name in of.listeners}
        for _ in range(rounds):
            for name, listener in of.listeners.items():
                await of.take_turn(listener, results[name], seconds, events)
        return results, await of.look_seconds(stores.session_listener)


def rows(of: dict[str, Result], look: float, waits: int) -> Sequence[tuple[str, str, str, str]]:
    """What is compared, ours, the polling listener's, and what ours has to be."""
    woken, polling = of["woken"], of["polling"]

    def share(result: Result) -> str:
        least, most = min(result.shares), max(result.shares)
        return f"{statistics.median(result.shares):.2%} ({least:.2%} to {most:.2%})"

    return [
        (f"{waits:,} idle waits, of a core", share(woken), share(polling), "<= 1 %"),
        (
            f"and a look of each in {SAFETY_SECONDS:g} s, calculated",
            f"{waits * look / SAFETY_SECONDS:.2%}",
            "",
            "",
        ),
        *(
            (
                f"from a commit to the end of the wait, ms (p{share_:.0%})".replace("%", ""),
                f"{woken.quantile(share_):.2f}",
                f"{polling.quantile(share_):.2f}",
                "<= 2" if share_ == 0.5 else "",
            )
            for share_ in (0.5, 0.99)
        ),
    ]


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 50))
@click.option("--waits", default=1000, show_default=True, type=click.IntRange(1, 100_000))
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(0.5), help="Idle, per round.")
@click.option("--events", default=40, show_default=True, type=click.IntRange(1, 10_000), help="Per round.")
def main(rounds: int, waits: int, seconds: float, events: int) -> None:
    """Compare waits that are woken with waits that poll."""
    results, look = asyncio.run(measure(rounds, waits, seconds, events))
    table = Table("", "woken", "polling", "wanted")
    for row in rows(results, look, waits):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
