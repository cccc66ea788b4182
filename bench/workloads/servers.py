"""How writing adds up where several server processes share one PocketBase, by the log path.

Each server is a process of its own with 20 writers, all at full speed for the same time: 1, 2 and 4 of them,
beside one alone. Which of them are at work changes with each round. There are three kinds of work: documents
straight into the database; events, each server in sessions of its own; and events of all servers in the same
sessions, whose offsets they contend for. Nothing is cached, as more than one server writes: so an event takes two
reads, too.

The client's CPU is that of all server processes. Shown apart is the share of the slowest server, which says
whether anybody starves: 1 would be as much as everybody else.

At the end the offsets of all sessions must follow each other, and be as many as were acknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final, Literal

import psutil
from parlant.core.agents import AgentId
from parlant.core.customers import CustomerId
from parlant.core.sessions import SessionId

from bench.machine import Meter, Used, resident_bytes
from bench.peers.embedded import pocketbase
from bench.peers.ours import config_of, name_of
from bench.processes.child import Child, child
from bench.processes.writer import Write, Written
from bench.results import Cell, Series, at_shares
from bench.run import Run
from pb_cached import open_stores
from pb_cached.stores import Stores

SERVERS: Final = (1, 2, 4)
WRITERS: Final = 20
"""Of each server."""
PEER: Final = name_of("off", "log")

Work = Literal["documents", "own sessions", "same sessions"]
WORKS: Final[dict[Work, str]] = {
    "documents": "servers, documents",
    "own sessions": "servers, events in sessions of their own",
    "same sessions": "servers, events in the same sessions",
}


@dataclass
class Server:
    """A process, and the sessions that are its own."""

    child: Child
    sessions: list[SessionId]


@dataclass
class Found:
    """What the rounds have shown of one kind of work and number of servers."""

    rates: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    client_cpu: list[float] = field(default_factory=list)
    server_cpu: list[float] = field(default_factory=list)
    slowest: list[float] = field(default_factory=list)
    client_bytes: int = 0

    def add(self, written: Sequence[Written], database: Used, servers: Used) -> None:
        each = [len(one.waits) for one in written]
        total = sum(each)
        self.rates.append(total / database.wall)
        self.client_cpu.append(servers.server / total * 1e6)
        self.server_cpu.append(database.server / total * 1e6)
        self.slowest.append(min(each) * len(each) / total)
        for one in written:
            self.waits += [1000 * wait for wait in one.waits]


async def measure(run: Run) -> None:
    found = {(work, count): Found() for work in WORKS for count in SERVERS[: run.scaled(3, 2)]}
    seconds = run.scaled(1500, 200) / 1000
    said = 0
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(pocketbase())
        database = psutil.Process(server.pid)
        stores = await stack.enter_async_context(
            open_stores(config_of("off", "log"), connection_params=server.connection_params)
        )
        same = await _sessions(stores)
        most = max(count for _, count in found)
        token = server.connection_params["admin_token"]
        starting = [child("bench.processes.writer", server.url, token=token) for _ in range(most)]
        children = await asyncio.gather(*map(stack.enter_async_context, starting))
        servers = [Server(one, await _sessions(stores)) for one in children]
        with run.step("servers", (run.options.rounds + 1) * len(found)) as done:
            for round_ in range(run.options.rounds + 1):
                for (work, count), cell in found.items():
                    at_work = [servers[(round_ + number) % len(servers)] for number in range(count)]
                    meters = Meter([database]), Meter([each.child.process for each in at_work])
                    written = await asyncio.gather(
                        *(_work(each, work, same, seconds if round_ else seconds / 4) for each in at_work)
                    )
                    used = meters[0].used(), meters[1].used()
                    if round_:  # the first one warms up
                        cell.add(written, *used)
                        cell.client_bytes = resident_bytes([each.child.process for each in at_work])
                    if work != "documents":
                        said += sum(len(one.waits) for one in written)
                    done()
        await _check(stores, [*same, *itertools.chain.from_iterable(each.sessions for each in servers)], said)
        server_bytes = resident_bytes([database])
    for (work, count), cell in found.items():
        run.results.cells.append(_cell(WORKS[work], count, cell, server_bytes))
    for work, title in WORKS.items():
        run.add_series(
            Series(
                workload="servers",
                name=title.removeprefix("servers, "),
                x="servers",
                y="share of the slowest",
                points=[
                    (float(count), statistics.median(cell.slowest))
                    for (done_, count), cell in found.items()
                    if done_ == work
                ],
            )
        )


async def _sessions(stores: Stores) -> list[SessionId]:
    made = await asyncio.gather(
        *(stores.session_store.create_session(CustomerId("ida"), AgentId("robin")) for _ in range(WRITERS))
    )
    return [session.id for session in made]


async def _work(server: Server, work: Work, same: list[SessionId], seconds: float) -> Written:
    sessions = same if work == "same sessions" else server.sessions
    order = Write("documents" if work == "documents" else "events", seconds, sessions)
    written = await server.child.ask(order, Written)
    assert written.waits, "every server has written something"
    return written


async def _check(stores: Stores, sessions: Sequence[SessionId], said: int) -> None:
    """Is there every event that was acknowledged, each with an offset of its own and none left out?"""
    found = 0
    for session in sessions:
        offsets = sorted(event.offset for event in await stores.session_store.list_events(session))
        assert offsets == list(range(len(offsets))), "no offset twice, none left out"
        found += len(offsets)
    assert found == said, f"{found} events are there, {said} were acknowledged"


def _cell(workload: str, count: int, found: Found, server_bytes: int) -> Cell:
    return Cell(
        workload=workload,
        peer=PEER,
        of="servers",
        size=count,
        unit="document" if workload == WORKS["documents"] else "event",
        rates=found.rates,
        waits=at_shares(found.waits),
        client_cpu=found.client_cpu,
        server_cpu=found.server_cpu,
        client_bytes=found.client_bytes,
        server_bytes=server_bytes,
    )
