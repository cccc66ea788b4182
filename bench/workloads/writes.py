"""What an acknowledged write costs, beside PocketBase's own requests, a plain adapter, and SQLite itself.

All write the same events, an operation being one of them:

* our session store, by both commit paths, in the modes that cache;
* a plain adapter under Parlant's session store;
* bare requests into a collection that has the columns and indexes of ours: single POSTs, and `/api/batch` with
  200 events each, two in flight, which is the most that PocketBase takes by its own API. They know the offsets
  before, read nothing, and do not look whether somebody else has written;
* SQLite in a file of its own with the same table and indexes, WAL and `synchronous=NORMAL` as in PocketBase, and
  200 events in a transaction: the limit that none can pass.

Each peer has a PocketBase of its own, which has nothing to do while it is another's turn; the bare requests go to
that of the batch path, which has no triggers. All begin with nothing, and keep what they have written.

`writes` is by 1, 10 and 100 writers, each in a session of its own: the next event when the last is acknowledged.
`updates` sets one field of each of 100 sessions in turn. In `writes to one session` 100 writers share one, whose
events get their offsets one after the other. Batches and SQLite have no callers that wait.

At the end PocketBase and SQLite are asked how many rows they hold, every session is read back, and so is the last
value of whatever was updated.
"""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import httpx
import msgspec
import psutil
from parlant.core.agents import AgentId
from parlant.core.customers import CustomerId
from parlant.core.sessions import EventKind, EventSource, SessionId, SessionStore

from bench.peers.embedded import pocketbase
from bench.peers.ours import Commit, Mode, config_of, name_of
from bench.peers.plain import NAME as PLAIN
from bench.peers.plain import connected, plain
from bench.rounds import Contender, Work
from bench.run import Run
from bench.samples import EVENTS_OF_A_SESSION, event
from pb_cached import PocketBaseServer, open_stores
from pb_cached.pocketbase.ids import new_id

SESSIONS: Final = 100
WRITERS: Final = (1, 10, 100)
IN_FLIGHT: Final = 2
IN_A_BATCH: Final = 200
BATCHES: Final = "bare /api/batch"
SINGLES: Final = "bare POST"
SQLITE: Final = "plain SQLite"
JUDGED: Final[Mode] = "realtime"
"""The mode that users get who do not ask for another."""
OTHERS: Final[tuple[Mode, ...]] = ("exclusive",)
"""They are shown beside it, for 100 writers."""
COMMITS: Final[tuple[Commit, ...]] = ("log", "batch")
_EVENTS: Final = "parlant_sessions_events"
_DATA: Final[dict[str, Any]] = cast(dict[str, Any], event(0)["data"])


async def measure(run: Run) -> None:
    async with AsyncExitStack() as stack:
        modes = (JUDGED, *(() if run.options.is_quick else OTHERS))
        ours = [Ours(commit, mode) for commit in COMMITS for mode in modes]
        peer, _ = await asyncio.gather(
            stack.enter_async_context(plain(EVENTS_OF_A_SESSION)),
            asyncio.gather(*map(stack.enter_async_context, ours)),
        )
        stored = {each.name: Stored(each.sessions, each.servers) for each in ours}
        stored[PLAIN] = Stored(Sessions(peer.session_store), peer.servers)
        await asyncio.gather(*(each.sessions.prepare() for each in stored.values()))
        home = next(each for each in ours if each.name == name_of(JUDGED, "batch"))
        bare = Bare(home.http, _EVENTS)
        await bare.prepare()
        limit = stack.enter_context(closing(Sqlite(home.server.data_dir, Bare.TABLE)))

        for writers in WRITERS[:: run.scaled(1, 2)]:
            await _writes(run, writers, stored, bare, home.servers, limit)
        judged = {name: each for name, each in stored.items() if name not in _others()}
        await _updates(run, judged, bare, home.servers)
        await _hot(run, judged)

        for stores in stored.values():
            await stores.sessions.check()
        for our in ours:
            await our.check()
        await bare.check()
        limit.check()


@dataclass(frozen=True)
class Stored:
    """What is written by a session store, and where to."""

    sessions: Sessions
    servers: Sequence[psutil.Process]


def _others() -> set[str]:
    return {name_of(mode, commit) for mode in OTHERS for commit in COMMITS}


def _events(run: Run, name: str, writers: int) -> int:
    """How many a peer writes in a round: what takes it about a second."""
    if name == PLAIN:
        return run.scaled(min(300, 100 * writers), 30)
    return run.scaled(min(4000, 400 * writers), min(1000, 40 * writers))


async def _writes(
    run: Run,
    writers: int,
    stored: Mapping[str, Stored],
    bare: Bare,
    bare_servers: Sequence[psutil.Process],
    limit: Sqlite,
) -> None:
    contenders = [
        Contender(name, each.sessions.spread(writers), _events(run, name, writers), each.servers)
        for name, each in stored.items()
        if writers == max(WRITERS) or name not in _others()
    ]
    posts = run.scaled(min(1000, 400 * writers), min(200, 40 * writers))
    contenders.append(Contender(SINGLES, bare.singles(writers), posts, bare_servers))
    if writers == max(WRITERS):
        contenders.append(Contender(BATCHES, bare.batches, run.scaled(4000, 1600), bare_servers))
        contenders.append(Contender(SQLITE, limit.transactions, run.scaled(20_000, 4000)))
    turns = await run.take_turns("writes", contenders, of="writers", size=writers, unit="event")
    for commit in COMMITS:
        name = name_of(JUDGED, commit)
        if writers == min(WRITERS):
            run.judge(f"lone.{commit}", [turns.slower(name, SINGLES, 0.5)])
        if writers == max(WRITERS):
            run.judge(f"writes.{commit}.bare", [100 * share for share in turns.faster(name, BATCHES)])
            run.judge(f"writes.{commit}.plain", turns.faster(name, PLAIN))
    if writers == max(WRITERS):
        run.judge("crowd.p99", [turns.slower(name_of(JUDGED, "log"), SINGLES, 0.99)])


async def _updates(
    run: Run, stored: Mapping[str, Stored], bare: Bare, bare_servers: Sequence[psutil.Process]
) -> None:
    contenders = [
        Contender(name, each.sessions.updates, _events(run, name, SESSIONS), each.servers)
        for name, each in stored.items()
    ]
    contenders.append(Contender(BATCHES, bare.updates, run.scaled(4000, 800), bare_servers))
    turns = await run.take_turns("updates", contenders, of="sessions", size=SESSIONS, unit="update")
    for commit in COMMITS:
        shares = turns.faster(name_of(JUDGED, commit), BATCHES)
        run.judge(f"updates.{commit}.bare", [100 * share for share in shares])


async def _hot(run: Run, stored: Mapping[str, Stored]) -> None:
    contenders = [
        Contender(
            name, each.sessions.hot, _events(run, name, max(WRITERS)) // (1 if name == PLAIN else 2), each.servers
        )
        for name, each in stored.items()
    ]
    turns = await run.take_turns(
        "writes to one session", contenders, of="writers", size=max(WRITERS), unit="event"
    )
    for commit in COMMITS:
        run.judge(f"hot.{commit}", turns.faster(name_of(JUDGED, commit), PLAIN))


async def by_writers(writers: int, operations: int, write: Callable[[int], Awaitable[None]]) -> list[float]:
    """The seconds that each of so many operations took its writer, who begins the next when one has ended.

    Args:
        write: is given the writer's number.
    """
    waits: list[float] = []

    async def writer(number: int) -> None:
        for _ in range(number, operations, writers):
            begun = time.perf_counter()
            await write(number)
            waits.append(time.perf_counter() - begun)

    await asyncio.gather(*(writer(number) for number in range(writers)))
    return waits


class Sessions:
    """What writers do with a session store, and what must be in it then."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._numbers = itertools.count()
        self._titles: dict[SessionId, str] = {}
        self.ids: list[SessionId] = []
        self.written: Counter[SessionId] = Counter()

    async def prepare(self) -> None:
        made = await asyncio.gather(
            *(self._store.create_session(CustomerId("ida"), AgentId("robin")) for _ in range(SESSIONS + 1))
        )
        self.hot_id, *self.ids = [session.id for session in made]

    def spread(self, writers: int) -> Work:
        """Each writer in a session of its own."""

        async def work(events: int) -> Sequence[float]:
            return await by_writers(writers, events, lambda writer: self._say(self.ids[writer]))

        return work

    async def hot(self, events: int) -> Sequence[float]:
        """All writers in one session."""
        return await by_writers(max(WRITERS), events, lambda _: self._say(self.hot_id))

    async def updates(self, updates: int) -> Sequence[float]:
        """One field of each session in turn."""
        return await by_writers(SESSIONS, updates, lambda writer: self._rename(self.ids[writer]))

    async def _rename(self, session: SessionId) -> None:
        title = f"title {next(self._numbers)}"
        await self._store.update_session(session, {"title": title})
        self._titles[session] = title

    async def _say(self, session: SessionId) -> None:
        await self._store.create_event(session, EventSource.CUSTOMER, EventKind.MESSAGE, "f" * 32, _DATA)
        self.written[session] += 1

    async def check(self) -> None:
        """Is there every event once, as it was written, and the last title of each session?"""
        for id_, events in self.written.items():
            found = await self._store.list_events(id_)
            assert [each.offset for each in found] == list(range(events)), f"{len(found)} events, not {events}"
            assert all(each.data == _DATA for each in found), "events are as they were written"
        for id_, title in self._titles.items():
            assert (await self._store.read_session(id_)).title == title, "the last update is what is there"


class Ours:
    """Our stores, on a PocketBase of their own."""

    http: httpx.AsyncClient
    server: PocketBaseServer
    servers: Sequence[psutil.Process]
    sessions: Sessions

    def __init__(self, commit: Commit, mode: Mode) -> None:
        self.name = name_of(mode, commit)
        self._config = config_of(mode, commit)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Ours:
        async with AsyncExitStack() as stack:
            self.server = await stack.enter_async_context(pocketbase())
            self.servers = [psutil.Process(self.server.pid)]
            self.http = await stack.enter_async_context(connected(self.server))
            stores = await stack.enter_async_context(
                open_stores(self._config, connection_params=self.server.connection_params)
            )
            self.sessions = Sessions(stores.session_store)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def check(self) -> None:
        """Does PocketBase hold as many events as were acknowledged?"""
        found, written = await total(self.http, _EVENTS), self.sessions.written.total()
        assert found == written, f"{found} events are in PocketBase, {written} were acknowledged"


async def total(http: httpx.AsyncClient, table: str) -> int:
    """How many records PocketBase holds."""
    found = await http.get(f"/api/collections/{table}/records", params={"perPage": 1, "fields": "id"})
    return int(found.raise_for_status().json()["totalItems"])


def record(number: int) -> dict[str, Any]:
    """An event as a record with a column for each field."""
    document = {**event(number), "data": msgspec.json.encode(_DATA).decode(), "metadata": "null"}
    fields = {name: value for name, value in document.items() if name != "id"}
    return {"id": new_id(), **fields, "doc_id": document["id"], "rev": 1}


class Bare:
    """PocketBase's own requests, into a collection like ours."""

    TABLE: Final = "bare"
    _RECORDS: Final = f"/api/collections/{TABLE}/records"

    def __init__(self, http: httpx.AsyncClient, like: str) -> None:
        self._http = http
        self._like = like
        self._numbers = itertools.count()
        self._written = 0
        self._updated: dict[str, set[str]] = {}
        """Records, and what may be the last value of each: two batches at once may come in either order."""

    async def prepare(self) -> None:
        found = (await self._http.get(f"/api/collections/{self._like}")).raise_for_status().json()
        body = {
            "name": self.TABLE,
            "type": "base",
            "fields": [{k: v for k, v in f.items() if k != "id"} for f in found["fields"] if not f["system"]],
            "indexes": [index.replace(self._like, self.TABLE) for index in found["indexes"]],
        }
        (await self._http.post("/api/collections", json=body)).raise_for_status()
        batch = {"batch": {"enabled": True, "maxRequests": IN_A_BATCH + 2}}
        (await self._http.patch("/api/settings", json=batch)).raise_for_status()

    def singles(self, writers: int) -> Work:
        async def work(events: int) -> Sequence[float]:
            return await by_writers(writers, events, self._single)

        return work

    async def _single(self, _: int) -> None:
        await self._post(self._RECORDS, record(next(self._numbers)))
        self._written += 1

    async def batches(self, events: int) -> Sequence[float]:
        await _in_flight(events, IN_A_BATCH, self._batch)
        return []

    async def _batch(self, size: int) -> None:
        requests = [
            {"method": "POST", "url": self._RECORDS, "body": record(next(self._numbers))} for _ in range(size)
        ]
        await self._post("/api/batch", {"requests": requests})
        self._written += size

    async def updates(self, updates: int) -> Sequence[float]:
        """One field of each of some records in turn, in batches of as many."""
        if not self._updated:
            found = await self._http.get(self._RECORDS, params={"perPage": SESSIONS, "fields": "id"})
            self._updated = {item["id"]: set() for item in found.raise_for_status().json()["items"]}
            assert len(self._updated) == SESSIONS
        await _in_flight(updates, SESSIONS, self._update)
        return []

    async def _update(self, size: int) -> None:
        value = f"value {next(self._numbers)}"
        some = list(itertools.islice(self._updated, size))
        requests = [
            {"method": "PATCH", "url": f"{self._RECORDS}/{id_}", "body": {"trace_id": value, "rev+": 1}}
            for id_ in some
        ]
        await self._post("/api/batch", {"requests": requests})
        for id_ in some:
            self._updated[id_].add(value)

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        json = {"Content-Type": "application/json"}
        (await self._http.post(path, content=msgspec.json.encode(body), headers=json)).raise_for_status()

    async def check(self) -> None:
        """Is there every event, and one of the values given to each that was updated?"""
        found = await total(self._http, self.TABLE)
        assert found == self._written, f"{found} events are in PocketBase, {self._written} were acknowledged"
        for id_, values in self._updated.items():
            there = (await self._http.get(f"{self._RECORDS}/{id_}")).raise_for_status().json()
            assert there["trace_id"] in values and there["rev"] == 1 + len(values), "every update was made once"


async def _in_flight(operations: int, in_a_batch: int, send: Callable[[int], Awaitable[None]]) -> None:
    """Send so many operations in batches, some of them at once."""
    sizes = [min(in_a_batch, operations - start) for start in range(0, operations, in_a_batch)]
    batches = iter(sizes)

    async def slot() -> None:
        for size in batches:
            await send(size)

    await asyncio.gather(*(slot() for _ in range(IN_FLIGHT)))


class Sqlite:
    """SQLite alone, in a file beside PocketBase's, with a table and indexes as they are there."""

    def __init__(self, data_dir: Path, table: str) -> None:
        """
        Args:
            data_dir: of the PocketBase that has the table.
        """
        with closing(sqlite3.connect(data_dir / "pb_data" / "data.db")) as theirs:
            made = theirs.execute("SELECT sql FROM sqlite_master WHERE tbl_name=? AND sql NOT NULL", (table,))
            statements = [sql for (sql,) in made]
            columns = [name for _, name, *_ in theirs.execute(f"PRAGMA table_info(`{table}`)")]
        self._columns = columns
        self._insert = f"INSERT INTO `{table}`({','.join(columns)}) VALUES({','.join('?' * len(columns))})"
        self._count = f"SELECT count(*) FROM `{table}`"
        self._numbers = itertools.count()
        self._written = 0
        self._file = sqlite3.connect(
            data_dir / "plain.db", isolation_level=None, check_same_thread=False, cached_statements=8
        )
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "temp_store=MEMORY", "cache_size=-32000"):
            self._file.execute(f"PRAGMA {pragma}")
        for statement in statements:
            self._file.execute(statement)

    async def transactions(self, events: int) -> Sequence[float]:
        await asyncio.to_thread(self._write, events)
        return []

    def _write(self, events: int) -> None:
        for start in range(0, events, IN_A_BATCH):
            some = min(IN_A_BATCH, events - start)
            self._file.execute("BEGIN IMMEDIATE")
            self._file.executemany(self._insert, self._rows(some))
            self._file.execute("COMMIT")
            self._written += some

    def _rows(self, events: int) -> Iterator[list[Any]]:
        for number in itertools.islice(self._numbers, events):
            row = record(number)
            row["updated"] = row["creation_utc"]
            yield [row.get(column, "") for column in self._columns]

    def check(self) -> None:
        """Is there every event?"""
        (found,) = self._file.execute(self._count).fetchone()
        assert found == self._written, f"{found} events are in SQLite, {self._written} were committed"

    def close(self) -> None:
        self._file.close()
