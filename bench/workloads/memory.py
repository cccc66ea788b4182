"""What a cached document takes beyond its JSON, and what a full cache adds to a garbage collection.

Beside it: the same documents as Parlant's in-memory database holds them, a dict each in a list. Each measurement
has a process of its own, whose memory nothing else has touched, and weighs what that process grows by; peers take
turns. Parlant's is filled by appending to its list, as its own file database does, since each insert of it takes
0.1 ms to look at the document's keys. The rates are the documents a second that were taken in.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final

import psutil
from msgspec import Struct
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.sessions import _EventDocument, _SessionDocument

from bench.machine import resident_bytes
from bench.results import Cell
from bench.run import Run
from bench.samples import EVENTS_OF_A_SESSION, event, session
from pb_cached.cache.collection import CollectionCache
from pb_cached.cache.memory import Memory
from pb_cached.cache.rules import PARLANT
from pb_cached.exact import dumps

DOCUMENTS: Final = 200_000
"""So many the target for the pause of a collection speaks of."""
FEW: Final = 20_000
REPEATS: Final = 3
OURS: Final = "pb_cached"
PARLANTS: Final = "Parlant in memory"
SCHEMAS: Final[dict[str, Any]] = {"events": _EventDocument, "sessions": _SessionDocument}


class Weight(Struct, frozen=True):
    """Of one process."""

    resident: float
    """Bytes that it has grown by, for each document."""
    json: float
    """Bytes of a document's JSON."""
    pause: float
    """Milliseconds that the documents add to a full garbage collection."""
    seconds: float
    cpu: float
    """To take them in; making them is left out."""

    @property
    def beyond(self) -> float:
        return self.resident - self.json


async def measure(run: Run) -> None:
    documents = run.scaled(DOCUMENTS, FEW)
    repeats = min(run.scaled(REPEATS, 1), run.options.rounds)
    weights: dict[tuple[str, str], list[Weight]] = {}
    with run.step(f"memory of {documents:,} documents", repeats * len(SCHEMAS) * len(WEIGH)) as done:
        for _ in range(repeats):
            for name in SCHEMAS:
                for peer in WEIGH:
                    weights.setdefault((name, peer), []).append(await _alone(peer, name, documents))
                    done()
    for (name, peer), found in weights.items():
        run.results.cells.append(_cell(name, peer, documents, found))
    for name in SCHEMAS:
        run.judge(f"memory.{name}", [weight.beyond for weight in weights[name, OURS]])
    if documents == DOCUMENTS:  # fewer do not add what the target speaks of
        pauses = zip(*([weight.pause for weight in weights[name, OURS]] for name in SCHEMAS), strict=True)
        run.judge("memory.pause", [max(pair) for pair in pauses])


def _cell(name: str, peer: str, documents: int, weights: list[Weight]) -> Cell:
    return Cell(
        workload="memory",
        peer=peer,
        of=f"{name} held",
        size=documents,
        unit="document taken in",
        rates=[documents / weight.seconds for weight in weights],
        waits=[],
        client_cpu=[weight.cpu / documents * 1e6 for weight in weights],
        server_cpu=[],
        client_bytes=round(documents * statistics.median(weight.resident for weight in weights)),
        server_bytes=0,
    )


async def _alone(peer: str, name: str, documents: int) -> Weight:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        return await asyncio.get_running_loop().run_in_executor(processes, weigh, peer, name, documents)


def weigh(peer: str, name: str, documents: int) -> Weight:
    """Hold so many documents, and tell what they take."""
    hold = WEIGH[peer](name)
    pause, before, json, seconds, cpu = _collection(), _resident(), 0, 0.0, 0.0
    for some in _made(name, documents):
        encoded = [dumps(document) for document in some]
        json += sum(map(len, encoded))
        begun, used = time.perf_counter(), time.process_time()
        hold(some, encoded)
        seconds += time.perf_counter() - begun
        cpu += time.process_time() - used
    del some, encoded
    added = _collection() - pause
    assert len(hold.holder()) == documents, "all are held"
    return Weight((_resident() - before) / documents, json / documents, added, seconds, cpu)


def _made(name: str, documents: int) -> Iterator[list[Any]]:
    """So many documents, a session's events at a time."""
    for start in range(0, documents, EVENTS_OF_A_SESSION):
        numbers = range(start, start + EVENTS_OF_A_SESSION)
        yield [event(number) if name == "events" else session(f"{number:010}") for number in numbers]


class _Cached:
    """Takes documents into our cache, as a load of theirs from PocketBase does."""

    def __init__(self, name: str) -> None:
        self._cache = CollectionCache(PARLANT[name], Memory(1 << 40))
        self._number = 0

    def __call__(self, documents: list[Any], encoded: list[bytes]) -> None:
        states = []
        for document, json in zip(documents, encoded, strict=True):
            states.append(self._cache.state(f"{self._number:015}", 1, document, json))
            self._number += 1
        for key in {state.key for state in states}:
            assert key is not None
            self._cache.load(self._cache.begin(key), [state for state in states if state.key == key])

    def holder(self) -> CollectionCache:
        return self._cache


class _InMemory:
    """Takes documents into Parlant's in-memory database."""

    def __init__(self, name: str) -> None:
        database = TransientDocumentDatabase()
        opening = database.get_or_create_collection(name, SCHEMAS[name], identity_loader_for(SCHEMAS[name]))
        self._documents: list[Any] = asyncio.run(opening)._documents

    def __call__(self, documents: list[Any], encoded: list[bytes]) -> None:
        self._documents.extend(documents)

    def holder(self) -> list[Any]:
        return self._documents


WEIGH: Final[dict[str, Callable[[str], _Cached | _InMemory]]] = {OURS: _Cached, PARLANTS: _InMemory}


def _collection() -> float:
    """The milliseconds of a full garbage collection, when there is nothing to collect."""
    pauses = []
    for _ in range(7):
        started = time.perf_counter()
        gc.collect()
        pauses.append((time.perf_counter() - started) * 1000)
    return statistics.median(pauses)


def _resident() -> int:
    return resident_bytes([psutil.Process()])
