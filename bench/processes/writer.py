"""`python -m bench.processes.writer URL`: a server that writes what it is told to, by the log path.

Nothing is cached, as more than one server writes and none reads: so an event takes two reads, too.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, cast

from msgspec import Struct
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.sessions import EventKind, EventSource, SessionId, _EventDocument

from bench.peers.ours import config_of
from bench.processes.child import carry_out
from bench.samples import event
from pb_cached import PocketBaseDocumentDatabase, open_stores

CONFIG: Final = config_of("off", "log")
DATA: Final[dict[str, Any]] = cast(dict[str, Any], event(0)["data"])

Work = Literal["documents", "events"]


class Write(Struct):
    """A writer for each of these sessions."""

    work: Work
    """`documents`: straight into the database, not into the sessions."""
    seconds: float
    sessions: list[SessionId]
    every: float = 0.0
    """Seconds from one write to the next; 0 to begin the next when the last is acknowledged."""


class Written(Struct):
    """What was done, write by write in the order in which they were acknowledged."""

    waits: list[float]
    """Seconds that each took."""
    moments: list[float]
    """Of the acknowledgement, on the machine's monotonic clock."""


async def write(order: Write, one: Callable[[SessionId], Awaitable[None]]) -> Written:
    written = Written([], [])
    began = time.monotonic()

    async def writer(session: SessionId) -> None:
        due = began
        while (begun := time.monotonic()) < began + order.seconds:
            await one(session)
            moment = time.monotonic()
            written.waits.append(moment - begun)
            written.moments.append(moment)
            due += order.every
            if due > moment:
                await asyncio.sleep(due - moment)

    await asyncio.gather(*map(writer, order.sessions))
    return written


async def main() -> None:
    params = {"url": sys.argv[1]}
    async with (
        open_stores(CONFIG, connection_params=params) as stores,
        PocketBaseDocumentDatabase(None, params, collection_prefix="bench", config=CONFIG) as database,
    ):
        loader = identity_loader_for(_EventDocument)
        documents = await database.get_or_create_collection("events", _EventDocument, loader)
        numbers = itertools.count()

        async def insert(_: SessionId) -> None:
            await documents.insert_one(event(next(numbers)))

        async def say(session: SessionId) -> None:
            await stores.session_store.create_event(
                session, EventSource.CUSTOMER, EventKind.MESSAGE, "f" * 32, DATA
            )

        async def do(order: Write) -> Written:
            return await write(order, insert if order.work == "documents" else say)

        await carry_out(Write, do)


if __name__ == "__main__":
    asyncio.run(main())
