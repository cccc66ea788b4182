"""`python -m bench.processes.follower URL`: a server that follows what others commit, and does nothing else.

It follows when it is told to, so that a process that is there already costs nobody anything before.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from typing import Final

from msgspec import Struct
from parlant.core.async_utils import Timeout
from parlant.core.sessions import SessionId

from bench.processes.child import carry_out
from pb_cached import Config, open_stores
from pb_cached.coherence import Follower
from pb_cached.config import CoherenceSettings, LoggingSettings
from pb_cached.stores import Stores

FOLLOWING: Final = Config(
    coherence=CoherenceSettings(mode="realtime", audit_interval=0), logging=LoggingSettings(level="error")
)
"""Without the audit, which reads now and then on its own account; and a stream that is cut off is no news here."""


class Follow(Struct, tag=True):
    """Follow, or not any more."""

    on: bool


class Watch(Struct, tag=True):
    """Wait for one event after the other, from this offset on, until none has come for some seconds."""

    session: SessionId
    offset: int
    patience: float


class Seen(Struct):
    """The moment at which each event was shown, on the machine's monotonic clock."""

    moments: list[float] = []


async def following(stores: Stores) -> Follower:
    """What follows for the stores, as soon as it does."""
    follower = stores.session_store._events._connection.follower
    assert follower is not None
    await asyncio.gather(*(follower.caught_up(log) for log in follower._logs))
    return follower


class Server:
    def __init__(self, url: str) -> None:
        self._url = url
        self._stores: Stores | None = None
        self._stack = AsyncExitStack()

    async def carry_out(self, order: Follow | Watch) -> Seen:
        if isinstance(order, Watch):
            return await self._watch(order)
        if order.on and self._stores is None:
            opening = open_stores(FOLLOWING, connection_params={"url": self._url})
            self._stores = await self._stack.enter_async_context(opening)
            await following(self._stores)
        elif not order.on:
            self._stores = None
            await self._stack.aclose()
        return Seen()

    async def _watch(self, order: Watch) -> Seen:
        assert self._stores is not None, "it must follow"
        wait = self._stores.session_listener.wait_for_more_events
        seen = Seen([])
        while await wait(
            order.session, min_offset=order.offset + len(seen.moments), timeout=Timeout(order.patience)
        ):
            seen.moments.append(time.monotonic())
        return seen

    async def aclose(self) -> None:
        await self._stack.aclose()


async def main() -> None:
    server = Server(sys.argv[1])
    try:
        await carry_out(Follow | Watch, server.carry_out)  # type: ignore[arg-type]
    finally:
        await server.aclose()


if __name__ == "__main__":
    asyncio.run(main())
