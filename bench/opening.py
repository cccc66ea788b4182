"""How long opening the session store takes, with few and with many events in it.

    python -m bench.opening

Each opening is a new connection: sign-in, probing, the collections with their indexes, the search for old
documents. The sizes take turns, so that a drift of the machine meets all of them.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from datetime import UTC, datetime

import click
from parlant.core.common import Version, generate_id
from parlant.core.persistence.common import ObjectId
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.sessions import SessionId, _EventDocument
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.config import LoggingSettings
from pb_cached.stores import PocketBaseSessionStore

EVENTS_OF_A_SESSION = 50
AT_ONCE = 2000

_quiet = Config(logging=LoggingSettings(level="warning"))


@click.command()
@click.option("--events", multiple=True, default=(10, 100_000), show_default=True, help="Sizes to compare.")
@click.option("--runs", default=15, show_default=True, help="Openings of each size.")
def main(events: tuple[int, ...], runs: int) -> None:
    """Compare the time to open a session store of different sizes."""
    asyncio.run(compare(events, runs))


async def compare(sizes: tuple[int, ...], runs: int) -> None:
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as folder:
        async with PocketBaseServer(folder) as server:
            for size in sizes:
                await opened(server, size)
                await fill(server, size)
                await opened(server, size)
            for _ in track(range(runs), "opening"):
                for size in sizes:
                    seconds[size].append(await opened(server, size))
    show(seconds)


def database(server: PocketBaseServer, size: int) -> PocketBaseDocumentDatabase:
    prefix = f"with_{size}"
    return PocketBaseDocumentDatabase(None, server.connection_params, collection_prefix=prefix, config=_quiet)


async def opened(server: PocketBaseServer, size: int) -> float:
    """Open the store of this size, close it, and return the seconds until it was open."""
    started = time.perf_counter()
    async with database(server, size) as opening, PocketBaseSessionStore(opening):
        return time.perf_counter() - started


async def fill(server: PocketBaseServer, size: int) -> None:
    async with database(server, size) as filled:
        events = await filled.get_or_create_collection(
            "events", _EventDocument, identity_loader_for(_EventDocument)
        )
        for start in track(range(0, size, AT_ONCE), f"filling with {size:,} events"):
            numbers = range(start, min(start + AT_ONCE, size))
            await asyncio.gather(*(events.insert_one(event(number)) for number in numbers))


def event(number: int) -> _EventDocument:
    session, offset = divmod(number, EVENTS_OF_A_SESSION)
    return _EventDocument(
        id=ObjectId(generate_id()),
        version=Version.String("0.9.0"),
        creation_utc=datetime.now(UTC).isoformat(),
        session_id=SessionId(f"session{session}"),
        source="customer",
        kind="message",
        offset=offset,
        trace_id=f"{number:032x}",
        data={"message": "a message of usual length, as customers write them", "participant": {"id": "x"}},
        metadata=None,
        deleted=False,
    )


def show(seconds: dict[int, list[float]]) -> None:
    table = Table("events", "min ms", "median ms", "max ms", "ratio of medians", title="Opening the session store")
    base = statistics.median(next(iter(seconds.values())))
    for size, taken in seconds.items():
        median = statistics.median(taken)
        row = (min(taken), median, max(taken))
        table.add_row(f"{size:,}", *(f"{second * 1000:.1f}" for second in row), f"{median / base:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
