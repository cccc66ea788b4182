"""What a read from memory costs, beside Parlant's in-memory database and the bare cost of decoding.

    python -m bench.reads

Our session store reads through the cache of an embedded PocketBase, Parlant's through its in-memory database; both
hold the same events. Ratios come from rounds in which both take turns, so that a drift of the machine meets both.
Memory is what a process of its own grows by.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import click
import msgspec
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.sessions import SessionDocumentStore, SessionStore, _EventDocument, _SessionDocument
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.samples import EVENTS_OF_A_SESSION, event, session, session_of
from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.cache.collection import CollectionCache
from pb_cached.cache.memory import Memory
from pb_cached.cache.rules import PARLANT
from pb_cached.config import CacheSettings, CoherenceSettings, LoggingSettings
from pb_cached.exact import dumps
from pb_cached.stores import PocketBaseSessionStore

AT_ONCE: Final = 2000
SAMPLE: Final = 20
"""Sessions that are read in turn."""
CACHED_DOCUMENTS: Final = 200_000
PAGE: Final = os.sysconf("SC_PAGE_SIZE")

_exclusive = Config(
    cache=CacheSettings(max_bytes=1 << 30),
    coherence=CoherenceSettings(mode="exclusive"),
    logging=LoggingSettings(level="warning"),
)

Read = Callable[[], Awaitable[Any] | Any]


@dataclass(frozen=True)
class Row:
    """A comparison: what it is, microseconds of ours and of the other's in each round, and what is wanted."""

    what: str
    ours: Sequence[float]
    other: Sequence[float]
    wanted: str
    passes: Callable[[float], bool]
    inverse: bool = False
    """The ratio is ours to the other's: the smaller, the better."""

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.ours, self.other, strict=True)
        return sorted(ours / other if self.inverse else other / ours for ours, other in pairs)

    def cells(self) -> tuple[str, ...]:
        low, middle, high = self.ratios[0], statistics.median(self.ratios), self.ratios[-1]
        verdict = "[green]pass" if self.passes(middle) else "[red]short"
        ours, other = statistics.median(self.ours), statistics.median(self.other)
        return (
            self.what, f"{ours:,.1f}", f"{other:,.1f}", f"{middle:,.2f}", f"{low:,.2f} to {high:,.2f}",
            self.wanted, verdict,
        )  # fmt: skip


@click.command()
@click.option("--events", multiple=True, default=(1_000, 10_000, 100_000), show_default=True, help="Store sizes.")
@click.option("--rounds", default=7, show_default=True, help="Rounds of each comparison.")
def main(events: tuple[int, ...], rounds: int) -> None:
    """Compare reads from memory with Parlant's in-memory database and with bare decoding."""
    rows = asyncio.run(compare(events, rounds))
    table = Table("", "µs", "other µs", "ratio", "spread", "wanted", "", title="Reads from memory")
    for row in rows:
        table.add_row(*row.cells())
    console = Console()
    console.print(table)
    table = Table("", "JSON bytes", "more than that", "wanted", "full collection ms", "wanted", title="Memory")
    for name in ("events", "sessions"):
        json, more, collection = _alone(measure_memory, name)
        table.add_row(
            f"{CACHED_DOCUMENTS:,} {name}", f"{json:,.0f}", f"{more:,.0f}", "at most 500",
            f"{collection:.1f}", "at most 10",
        )  # fmt: skip
    console.print(table)


# --- time ------------------------------------------------------------------------------------------------------


async def compare(sizes: Sequence[int], rounds: int) -> list[Row]:
    rows: list[Row] = []
    for size in sizes:
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pb-cached-bench-"))
            server = await stack.enter_async_context(PocketBaseServer(folder))
            database = await stack.enter_async_context(
                PocketBaseDocumentDatabase(None, server.connection_params, config=_exclusive)
            )
            ours = await stack.enter_async_context(PocketBaseSessionStore(database))
            memory = TransientDocumentDatabase()
            theirs = await stack.enter_async_context(SessionDocumentStore(memory))
            await _fill(database, memory, size)
            await database.warm()
            rows += await _against_parlant(ours, theirs, size, rounds)
            if size == sizes[0]:
                rows += await _against_decoding(database, rounds)
            assert database.stats().collections["events"].documents == size
    return rows


async def _fill(database: PocketBaseDocumentDatabase, memory: TransientDocumentDatabase, size: int) -> None:
    documents = [event(number) for number in range(size)]
    events = await database.get_or_create_collection("events", _EventDocument, identity_loader_for(_EventDocument))
    for start in track(range(0, size, AT_ONCE), f"storing {size:,} events"):
        await asyncio.gather(*map(events.insert_one, documents[start : start + AT_ONCE]))
    ours = await database.get_or_create_collection(
        "sessions", _SessionDocument, identity_loader_for(_SessionDocument)
    )
    for name in ("events", "sessions"):
        schema: Any = {"events": _EventDocument, "sessions": _SessionDocument}[name]
        collection: Any = await memory.get_collection(name, schema, identity_loader_for(schema))
        if name == "events":
            collection._documents.extend(documents)  # an insert takes 0.1 ms to look at its keys
            continue
        ids = sorted({session_of(number) for number in range(0, size, EVENTS_OF_A_SESSION)})
        for start in range(0, len(ids), AT_ONCE):
            some: list[Any] = [session(id_) for id_ in ids[start : start + AT_ONCE]]
            await asyncio.gather(*map(ours.insert_one, some))
            collection._documents.extend(some)


async def _against_parlant(ours: SessionStore, theirs: SessionStore, size: int, rounds: int) -> list[Row]:
    steps = range(0, size, max(EVENTS_OF_A_SESSION, size // SAMPLE))
    sessions = [session_of(number) for number in steps][:SAMPLE]
    wanted = {1_000: 8, 10_000: 80, 100_000: 800}.get(size)

    def everything(store: SessionStore) -> Read:
        async def read() -> None:
            for id_ in sessions:
                assert len(await store.list_events(id_)) == EVENTS_OF_A_SESSION

        return read

    def news(store: SessionStore) -> Read:
        async def read() -> None:
            for id_ in sessions:
                assert len(await store.list_events(id_, min_offset=15)) == EVENTS_OF_A_SESSION - 15

        return read

    def one(store: SessionStore) -> Read:
        async def read() -> None:
            for id_ in sessions:
                assert (await store.read_session(id_)).id == id_

        return read

    rows = []
    for what, kind, least in (
        (f"list_events of 20, {size:,} stored", everything, wanted),
        (f"list_events, 5 of them new, {size:,} stored", news, wanted),
        (f"read_session, {size // EVENTS_OF_A_SESSION:,} stored", one, None),
    ):
        repeats = max(1, 20_000 // size)
        mine, other = await _rounds(kind(ours), kind(theirs), rounds, 20, repeats, len(sessions))
        rows.append(
            Row(what, mine, other, f"at least {least}" if least else "",
                lambda ratio, least=least: least is None or ratio >= least)  # type: ignore[misc]
        )  # fmt: skip
    return rows


async def _against_decoding(database: PocketBaseDocumentDatabase, rounds: int) -> list[Row]:
    events: Any = await database.get_collection("events", _EventDocument, identity_loader_for(_EventDocument))
    sessions: Any = await database.get_collection(
        "sessions", _SessionDocument, identity_loader_for(_SessionDocument)
    )
    id_ = session_of(0)
    decode = msgspec.json.Decoder().decode
    found = [dict(document) for document in (await events.find({"session_id": {"$eq": id_}})).items]
    listed, held = dumps(found), {id_: dumps(dict(await sessions.find_one({"id": {"$eq": id_}})))}
    by_id: Any = {"id": {"$eq": id_}}
    by_session: Any = {"session_id": {"$eq": id_}}

    async def one() -> None:
        await sessions.find_one(by_id)

    async def twenty() -> None:
        await events.find(by_session)

    mine, other = await _rounds(one, lambda: decode(held[id_]), rounds, 3_000, 3_000, 1)
    single = Row("find_one{id}, to a look-up and decoding", mine, other, "at most 3", lambda r: r <= 3, True)
    mine, other = await _rounds(twenty, lambda: decode(listed), rounds, 1_000, 1_000, 1)
    many = Row("find of 20, to decoding them", mine, other, "at most 1.6", lambda r: r <= 1.6, True)
    return [single, many]


async def _rounds(
    ours: Read, other: Read, rounds: int, repeat_ours: int, repeat_other: int, reads: int
) -> tuple[list[float], list[float]]:
    """Microseconds a read of both, in turn; one round more than asked for warms up."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for read, repeats, into in ((ours, repeat_ours, taken[0]), (other, repeat_other, taken[1])):
            started = time.perf_counter()
            for _ in range(repeats):
                outcome = read()
                if outcome.__class__ not in (dict, list):
                    await outcome
            into.append((time.perf_counter() - started) / repeats / reads * 1e6)
    return taken[0][1:], taken[1][1:]


# --- memory ----------------------------------------------------------------------------------------------------


def measure_memory(name: str) -> tuple[float, float, float]:
    """The JSON bytes of a cached document, what it takes beyond them, and the milliseconds that all the documents
    add to a full garbage collection."""
    cache = CollectionCache(PARLANT[name], Memory(1 << 40))
    pause, before, json = _collection(), _resident(), 0
    for start in range(0, CACHED_DOCUMENTS, EVENTS_OF_A_SESSION):
        states = []
        for number in range(start, start + EVENTS_OF_A_SESSION):
            document: Any = event(number) if name == "events" else session(f"{number:010}")
            encoded = dumps(document)
            json += len(encoded)
            states.append(cache.state(f"{number:015}", 1, document, encoded))
        for key in {state.key for state in states}:
            assert key is not None
            cache.load(cache.begin(key), [state for state in states if state.key == key])
    del states, document, encoded
    added = _collection() - pause
    assert len(cache) == CACHED_DOCUMENTS
    return json / CACHED_DOCUMENTS, (_resident() - before - json) / CACHED_DOCUMENTS, added


def _collection() -> float:
    """The milliseconds of a full garbage collection, when there is nothing to collect."""
    pauses = []
    for _ in range(7):
        started = time.perf_counter()
        gc.collect()
        pauses.append((time.perf_counter() - started) * 1000)
    return statistics.median(pauses)


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE


def _alone(measure: Callable[[str], tuple[float, float, float]], name: str) -> tuple[float, float, float]:
    """Measure in a process of its own, whose memory nothing else has touched."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (name,))


if __name__ == "__main__":
    main()
