"""How writing adds up where several server processes share one PocketBase, by the log path.

    python -m bench.servers

Each server is a process of its own with 20 writers, all at full speed: 1, 2 and 4 of them, in rounds in which all
cells take turns. Ratios are to one server alone. The share of the slowest says whether anybody starves: 1.00 would
be as much as everybody else. Nothing is cached (`mode = "off"`), as more than one server writes: so an event takes
two reads, too.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

import click
import msgspec
from msgspec import Struct
from parlant.core.agents import AgentId
from parlant.core.customers import CustomerId
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.sessions import EventKind, EventSource, SessionId, _EventDocument
from rich.console import Console
from rich.table import Table

from bench.samples import event
from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer, open_stores
from pb_cached.config import CoherenceSettings, LoggingSettings, PocketBaseSettings
from pb_cached.stores import Stores

SERVERS: Final = (1, 2, 4)
WRITERS: Final = 20
"""Of each server."""
_DATA: Final[dict[str, Any]] = cast(dict[str, Any], event(0)["data"])
_CONFIG: Final = Config(
    coherence=CoherenceSettings(mode="off"),
    pocketbase=PocketBaseSettings(commit="log"),
    logging=LoggingSettings(level="warning"),
)

Work = Literal["documents", "own sessions", "same sessions"]
WORKS: Final[dict[Work, str]] = {
    "documents": "documents, straight into the database",
    "own sessions": "events, each server in sessions of its own",
    "same sessions": "events, all servers in the same sessions",
}


class Order(Struct):
    """What a server is to do."""

    work: Work
    seconds: float
    sessions: list[SessionId]


class Report(Struct):
    """What it has done: how many writes, and the milliseconds that each caller waited."""

    written: int
    p50: float
    p99: float


# --- a server ----------------------------------------------------------------------------------------------------


async def serve(url: str) -> None:
    """Carries out orders, a line each, until there are no more."""
    params = {"url": url}
    async with (
        open_stores(_CONFIG, connection_params=params) as stores,
        PocketBaseDocumentDatabase(None, params, collection_prefix="bench", config=_CONFIG) as database,
    ):
        loader = identity_loader_for(_EventDocument)
        documents = await database.get_or_create_collection("events", _EventDocument, loader)
        numbers = itertools.count()

        async def insert(_: SessionId) -> None:
            await documents.insert_one(event(next(numbers)))

        async def say(session: SessionId) -> None:
            await stores.session_store.create_event(
                session, EventSource.CUSTOMER, EventKind.MESSAGE, "f" * 32, _DATA
            )

        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = msgspec.json.decode(line, type=Order)
            report = await _carry_out(order, insert if order.work == "documents" else say)
            print(msgspec.json.encode(report).decode(), flush=True)


async def _carry_out(order: Order, write: Callable[[SessionId], Awaitable[None]]) -> Report:
    waits: list[float] = []
    end = time.monotonic() + order.seconds

    async def writer(session: SessionId) -> None:
        while (begun := time.monotonic()) < end:
            await write(session)
            waits.append(1000 * (time.monotonic() - begun))

    await asyncio.gather(*map(writer, order.sessions))
    ordered = sorted(waits)
    return Report(len(waits), ordered[len(waits) // 2], ordered[len(waits) * 99 // 100])


class Server:
    """Such a process, as the benchmark has it."""

    def __init__(self, process: asyncio.subprocess.Process, sessions: list[SessionId]) -> None:
        self._process = process
        self.sessions = sessions

    @classmethod
    async def start(cls, stack: AsyncExitStack, pocketbase: PocketBaseServer, sessions: list[SessionId]) -> Server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.servers", "--serve", pocketbase.url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "POCKETBASE_ADMIN_TOKEN": pocketbase.connection_params["admin_token"]},
            cwd=Path(__file__).parent.parent,
        )
        server = cls(process, sessions)
        stack.push_async_callback(server._end)
        assert await server._line() == b"ready\n"
        return server

    async def carry_out(self, order: Order) -> Report:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        return msgspec.json.decode(await self._line(), type=Report)

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        return await self._process.stdout.readline()

    async def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


# --- the benchmark -----------------------------------------------------------------------------------------------


@dataclass
class Result:
    rates: list[float] = field(default_factory=list)
    slowest_shares: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)

    def add(self, reports: list[Report], seconds: float) -> None:
        written = [report.written for report in reports]
        self.rates.append(sum(written) / seconds)
        self.slowest_shares.append(min(written) * len(written) / sum(written))
        self.p50.append(statistics.median(report.p50 for report in reports))
        self.p99.append(max(report.p99 for report in reports))


async def _begin(stores: Stores) -> list[SessionId]:
    made = await asyncio.gather(
        *(stores.session_store.create_session(CustomerId("ida"), AgentId("robin")) for _ in range(WRITERS))
    )
    return [session.id for session in made]


async def measure(rounds: int, seconds: float) -> dict[tuple[Work, int], Result]:
    results = {(work, servers): Result() for work in WORKS for servers in SERVERS}
    said = 0
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pb-cached-bench-"))
        pocketbase = await stack.enter_async_context(PocketBaseServer(folder))
        stores = await stack.enter_async_context(
            open_stores(_CONFIG, connection_params=pocketbase.connection_params)
        )
        same = await _begin(stores)
        servers = [await Server.start(stack, pocketbase, await _begin(stores)) for _ in range(max(SERVERS))]
        for round_ in range(rounds + 1):
            for (work, count), result in results.items():
                at_work = [servers[(round_ + number) % len(servers)] for number in range(count)]
                begun = time.monotonic()
                reports = await asyncio.gather(
                    *(
                        server.carry_out(
                            Order(work, seconds, same if work == "same sessions" else server.sessions)
                        )
                        for server in at_work
                    )
                )
                if round_:  # the first one warms up
                    result.add(reports, time.monotonic() - begun)
                said += sum(report.written for report in reports) if work != "documents" else 0
        found = 0
        for session in (*same, *itertools.chain.from_iterable(server.sessions for server in servers)):
            offsets = sorted(event.offset for event in await stores.session_store.list_events(session))
            assert offsets == list(range(len(offsets))), "no offset twice, none left out"
            found += len(offsets)
        assert found == said, f"{found} of {said}: nothing lost, nothing twice"
    return results


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 50))
@click.option("--seconds", default=2.0, show_default=True, type=click.FloatRange(0.2, 60.0), help="Of each cell.")
@click.option("--serve", "serve_url", hidden=True)
def main(rounds: int, seconds: float, serve_url: str | None) -> None:
    """Measure how the writes of several servers add up."""
    if serve_url is not None:
        asyncio.run(serve(serve_url))
        return
    console = Console()
    results = asyncio.run(measure(rounds, seconds))
    for work, title in WORKS.items():
        alone = statistics.median(results[work, 1].rates)
        table = Table(
            "servers", "per second", "least", "most", "to one", "slowest's share", "p50 ms", "p99 ms", title=title
        )
        for servers in SERVERS:
            result = results[work, servers]
            rate = statistics.median(result.rates)
            rates = [f"{each:,.0f}" for each in (rate, min(result.rates), max(result.rates))]
            share = f"{statistics.median(result.slowest_shares):.2f} ({min(result.slowest_shares):.2f})"
            waits = [f"{statistics.median(each):.1f}" for each in (result.p50, result.p99)]
            table.add_row(str(servers), *rates, f"{rate / alone:.2f}", share, *waits)
        console.print(table)


if __name__ == "__main__":
    main()
