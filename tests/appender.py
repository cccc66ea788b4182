"""A server that does nothing but append events at full speed, for tests that need several, or one to kill.

    python -m tests.appender URL PREFIX log|batch SESSION...          POCKETBASE_ADMIN_TOKEN in the environment

It says "ready", begins at the first line of its standard input, and ends at the end of it. Each session has a few
callers. What has been acknowledged is said: session, offset and id of the event.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, cast

from parlant.core.sessions import Event, EventKind, EventSource, SessionId

from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.config import CoherenceSettings, LoggingSettings, PocketBaseSettings, StoreSettings
from pb_cached.stores import Stores

CALLERS = 2
"""Of each session."""


Way = Literal["log", "batch"]


def config(prefix: str, path: Way = "log") -> Config:
    """Each of several servers that commit by this path, under a prefix that they share."""
    return Config(
        stores=StoreSettings(f"{prefix}_sessions", f"{prefix}_customers", f"{prefix}_variables"),
        coherence=CoherenceSettings(mode="off"),
        pocketbase=PocketBaseSettings(commit=path),
        logging=LoggingSettings(level="warning"),
    )


async def append(stores: Stores, session: SessionId, number: int) -> Event:
    """An event that says its number wherever it can, so that half of one can be told."""
    return await stores.session_store.create_event(
        session, EventSource.CUSTOMER, EventKind.MESSAGE, str(number), number, {"number": number}
    )


def is_whole(event: Event) -> bool:
    return event.trace_id == str(event.data) and event.metadata == {"number": event.data}


async def main(url: str, prefix: str, path: str, *sessions: str) -> None:
    async with open_stores(config(prefix, cast(Way, path)), connection_params={"url": url}) as stores:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        ending = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        numbers = itertools.count()

        async def caller(session: SessionId) -> None:
            while not ending.done():
                event = await append(stores, session, next(numbers))
                print(session, event.offset, event.id, flush=True)

        await asyncio.gather(*(caller(SessionId(session)) for session in sessions for _ in range(CALLERS)))


class Appender:
    """Such a process, as a test has it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.acknowledged: list[tuple[str, int, str]] = []

    @classmethod
    @asynccontextmanager
    async def ready(
        cls, server: PocketBaseServer, prefix: str, *sessions: str, path: Way = "log"
    ) -> AsyncIterator[Appender]:
        """One that can begin. It is killed at the end, if it has not ended by then."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.appender", server.url, prefix, path, *sessions),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "POCKETBASE_ADMIN_TOKEN": server.connection_params["admin_token"]},
            cwd=Path(__file__).parent.parent,
        )
        try:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
            yield cls(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    async def until(self, acknowledged: int) -> None:
        """Return when so many of its events have been acknowledged."""
        assert self._process.stdout is not None
        while len(self.acknowledged) < acknowledged:
            line = await self._process.stdout.readline()
            assert line, "it ended by itself"
            self._note(line)

    async def kill(self) -> None:
        """In the middle of whatever it is doing."""
        self._process.kill()
        await self._rest()

    async def during(self, seconds: float) -> None:
        """Return after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.until(sys.maxsize)

    async def end(self) -> None:
        """It finishes what it has begun."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._rest()
        assert self._process.returncode == 0

    async def _rest(self) -> None:
        rest, _ = await self._process.communicate()
        for line in rest.splitlines(keepends=True):
            self._note(line)

    def _note(self, line: bytes) -> None:
        if line.endswith(b"\n"):
            session, offset, id_ = line.decode().split()
            self.acknowledged.append((session, int(offset), id_))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
