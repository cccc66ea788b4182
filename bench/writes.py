"""What an acknowledged write costs, beside bare `/api/batch` requests and a plain adapter.

    python -m bench.writes

All of them write the same events, into collections with the same columns and indexes, of one embedded PocketBase
each. Ratios come from rounds in which all take turns.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final, cast

import click
import httpx
import msgspec
from parlant.core.agents import AgentId
from parlant.core.customers import CustomerId
from parlant.core.sessions import EventKind, EventSource, SessionId
from rich.console import Console
from rich.table import Table

from bench.plain import PlainSessions, record
from bench.quantiles import quantile
from bench.samples import event
from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.config import CoherenceSettings, LoggingSettings, PocketBaseSettings
from pb_cached.pocketbase.ids import new_id
from pb_cached.stores import Stores

SESSIONS: Final = 100
IN_FLIGHT: Final = 2
IN_A_BATCH: Final = 200
_DATA: Final[dict[str, Any]] = cast(dict[str, Any], event(0)["data"])

Work = Callable[[int], Awaitable[list[float]]]
"""Writes so many events, and returns the seconds that each caller waited."""


@dataclass
class Result:
    rates: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def quantile(self, share: float) -> float:
        return quantile(self.waits, share) * 1000


class Ours:
    """Our session store, by one of the commit paths."""

    def __init__(self, stores: Stores) -> None:
        self._store = stores.session_store
        self._sessions: list[SessionId] = []
        self._titles = itertools.count()
        self.written = 0

    async def prepare(self) -> None:
        made = await asyncio.gather(
            *(self._store.create_session(CustomerId("ida"), AgentId("robin")) for _ in range(SESSIONS))
        )
        self._sessions = [session.id for session in made]

    def spread(self, writers: int, sessions: int = SESSIONS) -> Work:
        async def work(events: int) -> list[float]:
            return await _writers(writers, events, lambda n: self._say(self._sessions[n % sessions]))

        return work

    async def updates(self, updates: int) -> list[float]:
        """One field of each session in turn."""
        return await _writers(SESSIONS, updates, lambda n: self._rename(self._sessions[n]))

    async def _rename(self, session: SessionId) -> None:
        await self._store.update_session(session, {"title": f"title {next(self._titles)}"})

    async def _say(self, session: SessionId) -> None:
        await self._store.create_event(session, EventSource.CUSTOMER, EventKind.MESSAGE, "f" * 32, _DATA)
        self.written += 1


async def _writers(writers: int, events: int, write: Callable[[int], Awaitable[None]]) -> list[float]:
    waits: list[float] = []

    async def writer(number: int) -> None:
        for _ in range(max(1, events // writers)):
            begun = time.perf_counter()
            await write(number)
            waits.append(time.perf_counter() - begun)

    await asyncio.gather(*(writer(number) for number in range(writers)))
    return waits


class Bare:
    """PocketBase's own requests, into a collection like ours."""

    def __init__(self, http: httpx.AsyncClient, like: str) -> None:
        self._http = http
        self._like = like
        self._number = 0
        self._updated: list[str] = []

    async def prepare(self) -> None:
        found = (await self._http.get(f"/api/collections/{self._like}")).raise_for_status().json()
        body = {
            "name": "bare",
            "type": "base",
            "fields": [{k: v for k, v in f.items() if k != "id"} for f in found["fields"] if not f["system"]],
            "indexes": [index.replace(self._like, "bare") for index in found["indexes"]],
        }
        (await self._http.post("/api/collections", json=body)).raise_for_status()
        batch = {"batch": {"enabled": True, "maxRequests": IN_A_BATCH + 2}}
        (await self._http.patch("/api/settings", json=batch)).raise_for_status()

    async def updates(self, updates: int) -> list[float]:
        """One field of each of some records in turn, in batches."""
        records = "/api/collections/bare/records"
        if not self._updated:
            found = await self._http.get(records, params={"perPage": SESSIONS, "fields": "id"})
            self._updated = [item["id"] for item in found.raise_for_status().json()["items"]]

        async def slot(number: int) -> None:
            for count in range(updates // SESSIONS // IN_FLIGHT):
                requests = [
                    {
                        "method": "PATCH",
                        "url": f"{records}/{id_}",
                        "body": {"trace_id": f"{number} {count}", "rev+": 1},
                    }
                    for id_ in self._updated
                ]
                body = msgspec.json.encode({"requests": requests})
                answer = await self._http.post(
                    "/api/batch", content=body, headers={"Content-Type": "application/json"}
                )
                answer.raise_for_status()

        await asyncio.gather(*(slot(number) for number in range(IN_FLIGHT)))
        return []

    def _body(self) -> dict[str, Any]:
        self._number += 1
        document = {**event(self._number), "data": msgspec.json.encode(_DATA).decode(), "metadata": "null"}
        return {"id": new_id(), **record(document)}

    async def batches(self, events: int) -> list[float]:
        async def slot() -> None:
            for _ in range(events // IN_A_BATCH // IN_FLIGHT):
                requests = [
                    {"method": "POST", "url": "/api/collections/bare/records", "body": self._body()}
                    for _ in range(IN_A_BATCH)
                ]
                body = msgspec.json.encode({"requests": requests})
                answer = await self._http.post(
                    "/api/batch", content=body, headers={"Content-Type": "application/json"}
                )
                answer.raise_for_status()

        await asyncio.gather(*(slot() for _ in range(IN_FLIGHT)))
        return []

    def singles(self, writers: int) -> Work:
        async def work(events: int) -> list[float]:
            return await _writers(writers, events, self._post)

        return work

    async def _post(self, _: int) -> None:
        body = msgspec.json.encode(self._body())
        answer = await self._http.post(
            "/api/collections/bare/records", content=body, headers={"Content-Type": "application/json"}
        )
        answer.raise_for_status()


async def _server(stack: AsyncExitStack) -> tuple[PocketBaseServer, httpx.AsyncClient]:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pb-cached-bench-"))
    server = await stack.enter_async_context(PocketBaseServer(folder))
    token = server.connection_params["admin_token"]
    http = await stack.enter_async_context(
        httpx.AsyncClient(base_url=server.url, headers={"Authorization": token}, timeout=60)
    )
    return server, http


def _config(commit: Any) -> Config:
    return Config(
        coherence=CoherenceSettings(mode="exclusive"),
        pocketbase=PocketBaseSettings(commit=commit),
        logging=LoggingSettings(level="warning"),
    )


async def measure(rounds: int, events: int) -> tuple[dict[str, Result], list[str]]:
    results: dict[str, Result] = {}
    async with AsyncExitStack() as stack:
        ours: dict[str, Ours] = {}
        opened: dict[str, Stores] = {}
        for path in ("log", "batch"):
            server, http = await _server(stack)
            stores = await stack.enter_async_context(
                open_stores(_config(path), connection_params=server.connection_params)
            )
            opened[path], ours[path] = stores, Ours(stores)
            await ours[path].prepare()
        bare = Bare(http, "parlant_sessions_events")  # the batch path's PocketBase, which has no triggers
        await bare.prepare()
        plain = PlainSessions(http, "parlant_sessions_sessions", "bare")
        for number in range(SESSIONS):
            await plain.create_session(f"plain{number}")

        async def plainly(count: int) -> list[float]:
            return await _writers(SESSIONS, count, lambda n: plain.create_event(f"plain{n}"))

        async def plainly_hot(count: int) -> list[float]:
            return await _writers(SESSIONS, count, lambda _: plain.create_event("plain0"))

        works: list[tuple[str, Work, int]] = [
            ("bare batches", bare.batches, events),
            ("log", ours["log"].spread(SESSIONS), events),
            ("batch", ours["batch"].spread(SESSIONS), events),
            ("plain", plainly, events // 20),
            ("bare batches of updates", bare.updates, events),
            ("log, updates", ours["log"].updates, events),
            ("batch, updates", ours["batch"].updates, events),
            ("bare single, 1 writer", bare.singles(1), events // 20),
            ("log, 1 writer", ours["log"].spread(1), events // 20),
            ("batch, 1 writer", ours["batch"].spread(1), events // 20),
            ("bare single, 100 writers", bare.singles(100), events // 4),
            ("plain, hot session", plainly_hot, events // 20),
            ("log, hot session", ours["log"].spread(SESSIONS, 1), events // 20),
            ("batch, hot session", ours["batch"].spread(SESSIONS, 1), events // 20),
        ]
        for round_ in range(rounds + 1):
            for name, work, count in works:
                begun = time.perf_counter()
                waits = await work(count if round_ else count // 4)
                seconds = time.perf_counter() - begun
                if round_:  # the first one warms up
                    result = results.setdefault(name, Result())
                    result.rates.append(count / seconds)
                    result.waits += waits
        written = [f"{path}: {stores.stats().sessions.writes}" for path, stores in opened.items()]
        for path, stores in opened.items():
            total = 0
            for session in ours[path]._sessions:
                total += len(await stores.session_store.list_events(session))
            assert total == ours[path].written, "nothing lost, nothing twice"
    return results, written


def rows(of: dict[str, Result]) -> list[tuple[str, float, str]]:
    """What is compared, the ratio, and what it has to be."""
    return [
        ("log path / bare batches", of["log"].rate / of["bare batches"].rate, ">= 1.0"),
        ("batch path / bare batches", of["batch"].rate / of["bare batches"].rate, ">= 0.45"),
        ("log path / plain adapter", of["log"].rate / of["plain"].rate, ">= 30"),
        ("batch path / plain adapter", of["batch"].rate / of["plain"].rate, ">= 15"),
        (
            "updates, log path / bare batches",
            of["log, updates"].rate / of["bare batches of updates"].rate,
            ">= 1.0",
        ),
        (
            "updates, batch path / bare batches",
            of["batch, updates"].rate / of["bare batches of updates"].rate,
            ">= 0.45",
        ),
        (
            "one writer's wait, log path / bare POST (p50)",
            of["log, 1 writer"].quantile(0.5) / of["bare single, 1 writer"].quantile(0.5),
            "<= 1.25",
        ),
        (
            "one writer's wait, batch path / bare POST (p50)",
            of["batch, 1 writer"].quantile(0.5) / of["bare single, 1 writer"].quantile(0.5),
            "<= 1.25",
        ),
        (
            "100 writers' p99, log path / bare POSTs",
            of["log"].quantile(0.99) / of["bare single, 100 writers"].quantile(0.99),
            "<= 0.33",
        ),
        (
            "100 writers of one session, log path / plain adapter",
            of["log, hot session"].rate / of["plain, hot session"].rate,
            ">= 3",
        ),
        (
            "100 writers of one session, batch path / plain adapter",
            of["batch, hot session"].rate / of["plain, hot session"].rate,
            ">= 3",
        ),
    ]


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 50))
@click.option("--events", default=4000, show_default=True, type=click.IntRange(800, 1_000_000), help="Per round.")
def main(rounds: int, events: int) -> None:
    """Compare writes with bare requests and with a plain adapter."""
    console = Console()
    results, written = asyncio.run(measure(rounds, events))
    table = Table("", "per second", "least", "most", "p50 ms", "p99 ms")
    for name, result in results.items():
        waits = [f"{result.quantile(share):.1f}" for share in (0.5, 0.99)] if result.waits else ["", ""]
        rates = (result.rate, min(result.rates), max(result.rates))
        table.add_row(name, *(f"{rate:,.0f}" for rate in rates), *waits)
    console.print(table)
    compared = Table("", "ratio", "wanted")
    for name, ratio, wanted in rows(results):
        compared.add_row(name, f"{ratio:.2f}", wanted)
    console.print(compared)
    for line in written:
        console.print(line, highlight=False)


if __name__ == "__main__":
    main()
