"""What it costs to follow other servers, and how soon they are seen.

    python -m bench.coherence

One server of ours is in this process; others are processes of their own.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import click
import httpx
import msgspec
from parlant.core.agents import AgentId
from parlant.core.async_utils import Timeout
from parlant.core.customers import CustomerId
from parlant.core.sessions import EventKind, EventSource, SessionId
from rich.console import Console
from rich.table import Table

from bench.quantiles import quantile
from bench.samples import event
from bench.writes import Ours
from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.coherence import Follower
from pb_cached.coherence.entries import Entry, Payload
from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.config import CoherenceSettings, LoggingSettings
from pb_cached.pocketbase.ids import new_id
from pb_cached.stores import Stores

FOLLOWERS: Final = (0, 1, 4)
CACHED: Final = 100_000
CHANGED: Final = 1_000
GAP_SECONDS: Final = 10.0

FOLLOWING: Final = Config(
    coherence=CoherenceSettings(mode="realtime", audit_interval=0), logging=LoggingSettings(level="error")
)


@asynccontextmanager
async def server_of_ours(pocketbase: PocketBaseServer) -> AsyncIterator[Stores]:
    async with (
        httpx.AsyncClient(timeout=30) as http,
        open_stores(FOLLOWING, connection_params=pocketbase.connection_params, http_client=http) as stores,
    ):
        await following(stores)
        yield stores


async def following(stores: Stores) -> Follower:
    """What follows, when it does."""
    follower = stores.session_store._events._connection.follower
    assert follower is not None
    await asyncio.gather(*(follower.caught_up(log) for log in follower._logs))
    return follower


@asynccontextmanager
async def other_servers(pocketbase: PocketBaseServer, number: int) -> AsyncIterator[None]:
    """So many processes that follow, and do nothing else."""
    params = pocketbase.connection_params
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bench.coherence",
            "--follow",
            params["url"],
            params["admin_token"],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(number)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert (await process.stdout.readline()).strip() == b"following"
        yield
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        await asyncio.gather(*(process.wait() for process in processes))


async def follow(url: str, token: str) -> None:
    """What such a process does: until its input ends."""
    async with open_stores(FOLLOWING, connection_params={"url": url, "admin_token": token}) as stores:
        await following(stores)
        print("following", flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def wakes(writer: Stores, waiter: Stores, rounds: int) -> list[float]:
    """Milliseconds from the acknowledgement of an event until who waits for it is woken; 0 where that was
    earlier."""
    store = writer.session_store
    session = await store.create_session(CustomerId("ida"), AgentId("robin"))
    await store.create_event(session.id, EventSource.CUSTOMER, EventKind.MESSAGE, "f" * 32, {"message": "a"})
    await _woken(waiter, session.id, 0)
    waits = []
    for offset in range(1, rounds + 1):
        waiting = asyncio.create_task(_woken(waiter, session.id, offset))
        await asyncio.sleep(0.01)
        await store.create_event(session.id, EventSource.CUSTOMER, EventKind.MESSAGE, "f" * 32, {"message": "a"})
        acknowledged = time.perf_counter()
        waits.append(max(0.0, await waiting - acknowledged) * 1000)
    return waits


async def _woken(stores: Stores, session: SessionId, offset: int) -> float:
    assert await stores.session_listener.wait_for_more_events(session, min_offset=offset, timeout=Timeout(10))
    return time.perf_counter()


def microseconds_for_a_change(
    stores: Stores, follower: Follower, sessions: Sequence[SessionId], commits: range
) -> float:
    """CPU that it takes to follow one insert into a session that is cached, in commits of 100.

    Args:
        commits: their numbers, which follow those of the call before, from 0.
    """
    codec = stores.session_store._events.codec
    messages = []
    for n in commits:
        bodies = []
        for each in range(100):
            session = sessions[each % len(sessions)]
            document: dict[str, Any] = {**event(n), "session_id": session, "offset": n}
            bodies.append(msgspec.json.decode(codec.insert(document).body))
        entry = Entry(
            new_id(), "another", n + 1, codec.commit_layout, _json(Payload(c=bodies)), "2026-11-25 00:00:00.000Z"
        )
        messages.append(msgspec.json.encode({"action": "create", "record": entry}))
    begun = time.process_time()
    for message in messages:
        follower.received(f"{codec.collection}_log/*", message)
    return (time.process_time() - begun) / len(commits) / 100 * 1e6


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


async def rates(pocketbase: PocketBaseServer, rounds: int, events: int) -> dict[int, list[float]]:
    """Events per second of one writer process, with so many others that follow."""
    result: dict[int, list[float]] = {number: [] for number in FOLLOWERS}
    async with server_of_ours(pocketbase) as stores:
        ours = Ours(stores)
        await ours.prepare()
        work = ours.spread(100)
        await work(events)
        for _ in range(rounds):
            for number in FOLLOWERS:
                async with other_servers(pocketbase, number):
                    begun = time.perf_counter()
                    await work(events)
                    result[number].append(events / (time.perf_counter() - begun))
    return result


async def catch_up(pocketbase: PocketBaseServer, writer: Stores) -> tuple[int, float]:
    """Documents that are cached, and the seconds until answers are good again after a gap in which some were
    changed."""
    async with server_of_ours(pocketbase) as stores:
        customers = stores.customer_store._customers_collection
        assert isinstance(customers, PocketBaseDocumentCollection)
        await customers.warm()
        cached = stores.stats().customers.collections["customers"].documents
        follower = await following(stores)
        listed = (await writer.customer_store.list_customers(limit=CHANGED + 1)).items
        some = [customer for customer in listed if customer.id != "guest"][
            :CHANGED
        ]  # Parlant's own, without a record
        follower.lost("benchmark")
        await asyncio.gather(*(writer.customer_store.upsert_extra(each.id, {"city": "Lindau"}) for each in some))
        await asyncio.sleep(GAP_SECONDS)
        begun = time.perf_counter()
        follower._stream.replace("benchmark")
        await following(stores)
        seconds = time.perf_counter() - begun
        for each in some[:: CHANGED // 10]:
            assert (await stores.customer_store.read_customer(each.id)).extra == {"city": "Lindau"}
        return cached, seconds


async def measure(rounds: int, events: int) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pb-cached-bench-"))
        pocketbase = await stack.enter_async_context(PocketBaseServer(folder))
        one = await stack.enter_async_context(server_of_ours(pocketbase))
        other = await stack.enter_async_context(server_of_ours(pocketbase))
        for name, waiter, wanted in (("same", one, "<= 2 / 0.5"), ("another", other, "<= 10 / 3")):
            waits = await wakes(one, waiter, 200)
            told = f"{quantile(waits, 0.5):.2f} ms, p99 {quantile(waits, 0.99):.2f}"
            rows.append((f"commit to waking on the {name} server, p50", told, f"{wanted} ms"))
        ours = Ours(one)
        await ours.prepare()
        await asyncio.gather(*(one.session_store.list_events(session) for session in ours._sessions))
        follower = await following(one)
        some = [range(start, start + 50) for start in range(0, 50 * rounds, 50)]
        costs = [microseconds_for_a_change(one, follower, ours._sessions, commits) for commits in some]
        rows.append(("10,000 changes a second", f"{statistics.median(costs) / 100:.1%} of a core", "<= 25 %"))
        made = 0
        while made < CACHED:
            await asyncio.gather(*(one.customer_store.create_customer(f"c{n}") for n in range(1000)))
            made += 1000
        cached, seconds = await catch_up(pocketbase, one)
        rows.append((f"after a gap, {cached:,} cached, {CHANGED:,} changed", f"{seconds:.2f} s", "<= 1 s"))
    with tempfile.TemporaryDirectory(prefix="pb-cached-bench-") as folder:
        async with PocketBaseServer(folder) as pocketbase:
            found = await rates(pocketbase, rounds, events)
    alone = statistics.median(found[0])
    for number in FOLLOWERS[1:]:
        cost = (1 - statistics.median(found[number]) / alone) / number
        spread = f"{min(found[number]):,.0f} to {max(found[number]):,.0f} of {alone:,.0f} events/s"
        rows.append(
            (f"{number} servers that follow: cost of each to the writer", f"{cost:.1%} ({spread})", "<= 5 %")
        )
    return rows


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 50))
@click.option("--events", default=4000, show_default=True, type=click.IntRange(800, 1_000_000), help="Per round.")
@click.option("--follow", "where", nargs=2, hidden=True)
def main(rounds: int, events: int, where: tuple[str, str] | None) -> None:
    """Measure what following costs."""
    if where:
        asyncio.run(follow(*where))
        return
    table = Table("", "measured", "wanted")
    for row in asyncio.run(measure(rounds, events)):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
