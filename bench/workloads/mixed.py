"""Mixed traffic of several server processes on one PocketBase, as a deployment behind a load balancer has it.

Each server of ours is a process of its own (log path, realtime: each follows what the others commit) with 20
customers, all at full speed, see `bench.processes.traffic`. One server of the plain adapter, on a PocketBase of
its own, tells the scale. Processes, clients and PocketBase share the machine's cores, so how operations add up
says as much about how many cores there are. Only those that take part are open: nobody follows who is not asked
to. In each round another cell begins, and the servers of a cell are others. Opening and closing is not measured.

When the rounds are over, PocketBase's own file is asked what it holds: each session as many events as its server
was acknowledged, their offsets 0, 1, 2 and so on.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from typing import Final, Self

import psutil
from parlant.core.sessions import SessionId

from bench.machine import Meter, resident_bytes
from bench.peers import embedded
from bench.peers.ours import name_of
from bench.peers.plain import NAME as PLAIN
from bench.processes.server import Server, Talked, Whose
from bench.results import Cell, at_shares
from bench.run import Run
from pb_cached import PocketBaseServer

CUSTOMERS: Final = 20
"""Of each server."""
OURS: Final = name_of("realtime", "log")


@dataclass
class Fleet:
    """Servers of a peer, on a PocketBase of theirs."""

    name: str
    pocketbase: PocketBaseServer
    servers: Sequence[Server]
    events: dict[SessionId, int] = field(default_factory=dict)
    """What sessions were given."""

    @classmethod
    async def start(cls, stack: AsyncExitStack, name: str, whose: Whose, servers: int) -> Self:
        pocketbase = await stack.enter_async_context(embedded.pocketbase())
        token = pocketbase.connection_params["admin_token"]
        starting = [Server.start(whose, pocketbase.url, token) for _ in range(servers)]
        started = await asyncio.gather(*map(stack.enter_async_context, starting))
        await started[0].open(settles=False)  # the collections are made by one
        await started[0].close()
        return cls(name, pocketbase, started)

    def check(self, table: str) -> None:
        """The sessions hold what they were given, in PocketBase's own file."""
        with closing(sqlite3.connect(self.pocketbase.data_dir / "pb_data" / "data.db")) as file:
            rows = file.execute(
                f'SELECT session_id, count(*), count(DISTINCT "offset"), min("offset"), max("offset") '
                f'FROM "{table}" GROUP BY session_id'
            ).fetchall()
        for session, number, different, first, last in rows:
            assert (different, first, last) == (number, 0, number - 1), f"{self.name}: offsets of {session}"
        held = {session: number for session, number, *_ in rows}
        given = {session: number for session, number in self.events.items() if number}
        assert held == given, f"{self.name}: {sum(held.values())} events of {sum(given.values())}"


@dataclass
class Mix:
    """So many servers of a fleet, and what the rounds have shown."""

    fleet: Fleet
    servers: int
    rates: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    client_cpu: list[float] = field(default_factory=list)
    server_cpu: list[float] = field(default_factory=list)
    client_bytes: int = 0

    async def take_turn(self, round_: int, seconds: float) -> None:
        """The first round warms up, and does not count."""
        fleet = self.fleet
        at_work = [fleet.servers[(round_ + number) % len(fleet.servers)] for number in range(self.servers)]
        await asyncio.gather(*(server.open(settles=True) for server in at_work))
        meter = Meter([psutil.Process(fleet.pocketbase.pid)])
        talked = await asyncio.gather(
            *(server.talk(self._names(round_, number), seconds) for number, server in enumerate(at_work))
        )
        used = meter.used()
        self.client_bytes = resident_bytes([server.process for server in at_work])
        await asyncio.gather(*(server.close() for server in at_work))
        for each in talked:
            fleet.events.update(each.events)
        if round_:
            self._add(talked, used.server)

    def _names(self, round_: int, server: int) -> list[str]:
        return [f"{self.servers} servers, round {round_}, {server}.{number}" for number in range(CUSTOMERS)]

    def _add(self, talked: Sequence[Talked], server_seconds: float) -> None:
        operations = sum(len(each.waits) for each in talked)
        self.rates.append(operations / max(each.seconds for each in talked))
        self.waits += [1000 * wait for each in talked for wait in each.waits]
        self.client_cpu.append(sum(each.cpu for each in talked) / operations * 1e6)
        self.server_cpu.append(server_seconds / operations * 1e6)

    def cell(self) -> Cell:
        return Cell(
            workload="mixed",
            peer=self.fleet.name,
            of="server processes",
            size=self.servers,
            unit="operation",
            rates=self.rates,
            waits=at_shares(self.waits),
            client_cpu=self.client_cpu,
            server_cpu=self.server_cpu,
            client_bytes=self.client_bytes,
            server_bytes=resident_bytes([psutil.Process(self.fleet.pocketbase.pid)]),
        )


async def measure(run: Run) -> None:
    seconds, rounds = run.scaled(40, 7) / 10, run.options.rounds
    sizes = run.sizes((1, 2, 4), (1,))
    async with AsyncExitStack() as stack:
        ours = await Fleet.start(stack, OURS, "ours", max(sizes))
        plain = await Fleet.start(stack, PLAIN, "plain", 1)
        mixes = [*(Mix(ours, servers) for servers in sizes), Mix(plain, 1)]
        with run.step("mixed", (rounds + 1) * len(mixes)) as done:
            for round_ in range(rounds + 1):
                first = round_ % len(mixes)
                for mix in (*mixes[first:], *mixes[:first]):
                    await mix.take_turn(round_, seconds if round_ else seconds / 4)
                    done()
        ours.check("parlant_sessions_events")
        plain.check("sessions_events")
        run.results.cells += [mix.cell() for mix in mixes]
