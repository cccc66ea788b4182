"""One of several servers that share sessions: does seeded random work through the stores, and keeps its history.

    python -m tests.coherent_server '{"name": "s0", ...}'

It goes through its life by lines on its standard input. At the first, the sessions to share, it opens its stores
and says `ready` when its caches answer; from the second on it works. At the third it stops, and says which
sessions have come and gone. When it is told all of those, it waits for as long as an answer may be stale, reads
everything for the last time, and writes what it did to a file.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal, cast
from unittest import mock

import httpx
import msgspec
from msgspec import Struct
from parlant.core.agents import AgentId
from parlant.core.common import ItemNotFoundError
from parlant.core.customers import CustomerId
from parlant.core.sessions import (
    Event,
    EventKind,
    EventSource,
    Session,
    SessionId,
    SessionUpdateParams,
)

from pb_cached import Config, open_stores
from pb_cached.cache.collection import CollectionCache
from pb_cached.coherence import Follower, follower
from pb_cached.coherence.entries import Entry
from pb_cached.coherence.feed import Feed
from pb_cached.config import CoherenceSettings, LoggingSettings, PocketBaseSettings, StoreSettings, WriteSettings
from pb_cached.errors import OutcomeUnknown, PBCachedError, PocketBaseUnavailable
from pb_cached.pocketbase.realtime import RealtimeStream, Timing
from pb_cached.stores import Stores
from tests.checker import ANYWHERE, NEVER, Op, Value, key_of

MAX_STALENESS: Final = 1.2
HEARTBEAT: Final = 0.3
PREFIX: Final = "coherent"
TAIL: Final = 8
"""Events that most reads of a list look at."""

Commit = Literal["auto", "log", "batch"]


class Work(Struct):
    """What a server is to do."""

    name: str
    seed: int
    params: dict[str, str]
    passing: str
    """The customer of sessions that come and go."""
    own: str
    """The field of sessions that it alone writes."""
    bound: float
    """Seconds that an answer may be stale."""
    history: str
    """The file that its history goes to."""
    diary: str = ""
    """Likewise, of one that may be killed at any time: what it writes, when it begins and when it ends."""
    broken: Literal["", "drops commits", "swaps commits"] = ""
    commit: Commit = "auto"


class Done(Struct):
    """What a server did."""

    history: list[Op]
    hits: int
    through: int
    """Reads that were answered by the cache, and by PocketBase."""
    state: str
    refused: int


def now() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def settings(mode: Literal["realtime", "off"] = "realtime", commit: Commit = "auto") -> Config:
    return Config(
        stores=StoreSettings(f"{PREFIX}_sessions", f"{PREFIX}_customers", f"{PREFIX}_variables"),
        coherence=CoherenceSettings(mode, max_staleness=MAX_STALENESS, heartbeat=HEARTBEAT, audit_interval=0),
        pocketbase=PocketBaseSettings(commit=commit, retry_for=10.0),
        writes=WriteSettings(deadline=10.0),
        logging=LoggingSettings(level="error"),
    )


# what sessions and events say, by the checker's keys

FIELDS: Final = ("title", "note", "customer_id", "agent_id", "consumption_offsets")


def session_key(session: str, field: str) -> str:
    return f"{session}.{field}"


def note_key(session: str, offset: int) -> str:
    return f"{session}.note {offset}"


def shown(session: Session) -> dict[str, Value]:
    values: dict[str, Any] = {
        "title": session.title,
        "note": session.metadata.get("note"),
        "customer_id": session.customer_id,
        "agent_id": session.agent_id,
        "consumption_offsets": next(iter(session.consumption_offsets), None),
    }
    return {session_key(session.id, field): values[field] for field in FIELDS}


def nothing(session: str) -> dict[str, Value]:
    return {session_key(session, field): None for field in FIELDS}


def listed(session: str, events: Sequence[Event]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for event in events:
        values[key_of(session, event.offset)] = cast(dict[str, str], event.data)["text"]
        values[note_key(session, event.offset)] = cast(Value, event.metadata.get("note"))
    return values


class Diary:
    """A file that holds what a process has done, however it ends."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if path else None

    def note(self, number: int, op: Op | None) -> None:
        """What a write is by now; None where it was refused."""
        if self._file is not None:
            os.write(self._file, msgspec.json.encode((number, op)) + b"\n")

    @staticmethod
    def read(path: Path) -> list[Op]:
        """The writes that were begun. Of those that had not ended, it is unknown whether they were applied."""
        lines = path.read_bytes().split(b"\n")[:-1]
        last = dict(msgspec.json.decode(line, type=tuple[int, Op | None]) for line in lines)
        return [op for op in last.values() if op is not None]


class Historian:
    """Does operations on stores, and notes what they did."""

    def __init__(self, name: str, passing: str, stores: Stores, diary: str = "") -> None:
        self.name = name
        self._diary = Diary(diary)
        self._writes = count()
        self.customer = CustomerId(passing)
        self.store = stores.session_store
        self.history: list[Op] = []
        self.refused = 0
        self._numbers = count()

    def value(self) -> str:
        return f"{self.name}-{next(self._numbers)}"

    async def write(
        self,
        work: Awaitable[Any],
        values: dict[str, Value] | Callable[[Any], dict[str, Value]],
        value: Value = None,
        beside: dict[str, Value] | None = None,
    ) -> Any:
        """Note a write of this value. Where it goes, and what it writes beside, may depend on what it returns."""
        begin, done, end = now(), None, NEVER
        number = next(self._writes)
        unknown = {ANYWHERE: value} | (beside or {}) if callable(values) else values
        self._diary.note(number, Op(self.name, "write", begin, end, unknown))
        try:
            done = await work
            end = now()
        except (OutcomeUnknown, PocketBaseUnavailable):
            if callable(values):  # nobody knows where it is, if it is
                values = unknown
        except (PBCachedError, ItemNotFoundError, AssertionError):  # Parlant asserts that what it found stays
            self.refused += 1
            self._diary.note(number, None)
            return None
        made = values(done) if callable(values) else values
        self.history.append(Op(self.name, "write", begin, end, made))
        self._diary.note(number, self.history[-1])
        return done

    async def read(self, session: str, kind: Literal["read", "last read"] = "read") -> None:
        begin = now()
        try:
            values = shown(await self.store.read_session(SessionId(session)))
        except ItemNotFoundError:
            values = nothing(session)
        except PBCachedError:
            return
        self.history.append(Op(self.name, kind, begin, now(), values))

    async def list(self, session: str, since: int, kind: Literal["read", "last read"] = "read") -> Sequence[Event]:
        begin = now()
        try:
            events = await self.store.list_events(SessionId(session), min_offset=since)
        except PBCachedError:
            return ()
        self.history.append(Op(self.name, kind, begin, now(), listed(session, events), session, since))
        return events

    async def create(self) -> Session | None:
        """A session, with a value of its own in every field that it can begin with."""
        value = self.value()
        made = self.store.create_session(self.customer, AgentId(value), title=value, metadata={"note": value})
        return cast(
            Session | None,
            await self.write(
                made,
                lambda session: begun(session.id, self.customer, value),
                value,
                begun(ANYWHERE, self.customer, value),
            ),
        )


async def read_all(historian: Historian, sessions: Sequence[str], passing: Sequence[str]) -> None:
    for session in sessions:
        await historian.list(session, 0, "last read")
    for session in (*sessions, *passing):
        await historian.read(session, "last read")


def begun(session: str, customer: str, value: str) -> dict[str, Value]:
    values: dict[str, Value] = {"title": value, "note": value, "customer_id": customer, "agent_id": value}
    return {session_key(session, field): values.get(field, "client") for field in FIELDS}


class Server(Historian):
    """One that works."""

    def __init__(self, work: Work, sessions: Sequence[str], stores: Stores) -> None:
        super().__init__(work.name, work.passing, stores, work.diary)
        self._work = work
        self._sessions = sessions
        self._chance = random.Random(work.seed)
        self._mine: list[str] = []
        self.passing: list[str] = []
        self._seen: dict[str, Sequence[Event]] = dict.fromkeys(sessions, ())
        self._over = False

    async def work(self) -> None:
        await asyncio.gather(self._keep_writing(), self._keep_reading(), self._keep_reading())

    def stop(self) -> None:
        self._over = True

    async def _keep_writing(self) -> None:
        writes = (self._append, self._update, self._rename, self._annotate, self._hide, self._come_and_go)
        weights = (8, 4, 4, 4, 1, 2)
        while not self._over:
            (write,) = self._chance.choices(writes, weights)
            await write(self._chance.choice(self._sessions))
            await asyncio.sleep(self._chance.uniform(0, 0.02))

    async def _keep_reading(self) -> None:
        while not self._over:
            session = self._chance.choice(self._sessions)
            since = 0 if self._chance.random() < 0.05 else max(0, self._highest(session) - TAIL)
            if self._chance.random() < 0.6:
                events = await self.list(session, since)
                if events and events[-1].offset >= self._highest(session):
                    self._seen[session] = events
            elif self.passing and self._chance.random() < 0.3:
                await self.read(self._chance.choice(self.passing[-5:]))
            else:
                await self.read(session)
            await asyncio.sleep(self._chance.uniform(0, 0.01))

    def _highest(self, session: str) -> int:
        return max((event.offset for event in self._seen[session]), default=0)

    async def _append(self, session: str) -> None:
        value = self.value()
        made = self.store.create_event(
            SessionId(session), EventSource.CUSTOMER, EventKind.MESSAGE, "trace", {"text": value}, {"note": value}
        )
        await self.write(
            made,
            lambda event: {key_of(session, event.offset): value, note_key(session, event.offset): value},
            value,
        )

    async def _update(self, session: str) -> None:
        value = self.value()
        own: Any = {value: 0} if self._work.own == "consumption_offsets" else value
        params = cast(SessionUpdateParams, {self._work.own: own})
        await self.write(
            self.store.update_session(SessionId(session), params), {session_key(session, self._work.own): value}
        )

    async def _rename(self, session: str) -> None:
        """What all of them write, two fields in one."""
        value = self.value()
        params: SessionUpdateParams = {"title": value, "metadata": {"note": value}}
        await self.write(
            self.store.update_session(SessionId(session), params),
            {session_key(session, "title"): value, session_key(session, "note"): value},
        )

    async def _annotate(self, session: str) -> None:
        """Change an event, whoever has made it."""
        if events := self._seen[session]:
            event, value = self._chance.choice(events[-TAIL:]), self.value()
            await self.write(
                self.store.update_event(SessionId(session), event.id, {"metadata": {"note": value}}),
                {note_key(session, event.offset): value},
            )

    async def _hide(self, session: str) -> None:
        if events := self._seen[session]:
            event = self._chance.choice(events[-TAIL:])
            await self.write(self.store.delete_event(event.id), {key_of(session, event.offset): None})

    async def _come_and_go(self, _: str) -> None:
        if len(self._mine) > 2:
            session = self._mine.pop(0)
            await self.write(self.store.delete_session(SessionId(session)), nothing(session))
        elif made := await self.create():
            self._mine.append(made.id)
        with suppress(PBCachedError):
            found = await self.store.list_sessions(customer_id=self.customer)
            self.passing += [each.id for each in found.items if each.id not in self.passing]


# servers that are broken on purpose


def drop_commits() -> None:
    """Every other commit of others is forgotten."""
    apply, number = Follower._apply, count()

    def dropping(self: Follower, feed: Feed, entry: Entry) -> None:
        if next(number) % 2:
            apply(self, feed, entry)

    Follower._apply = dropping  # type: ignore[method-assign]


def swap_commits() -> None:
    """Every other commit of others is handed on after the next one, and the cache does not look for holes."""
    arrived, kept, known, number = Feed.arrived, dict[str, list[Entry]](), set[str](), count()

    def swapping(self: Feed, entry: Entry) -> list[Entry]:
        handed, late = list[Entry](), kept.setdefault(self.log, [])
        for due in arrived(self, entry):
            if due.id in known:
                continue
            known.add(due.id)
            if next(number) % 2:
                handed.append(due)
            else:
                handed += late
                late[:] = [due]
        return handed

    Feed.arrived = swapping  # type: ignore[method-assign]
    CollectionCache._look_for_holes = lambda self, partition, new: None  # type: ignore[method-assign]


async def main(work: Work) -> None:
    if work.broken == "drops commits":
        drop_commits()
    elif work.broken == "swaps commits":
        swap_commits()
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)

    async def order() -> list[str]:
        return msgspec.json.decode(await orders.readline(), type=list[str])

    sessions = await order()
    async with (
        httpx.AsyncClient(timeout=30) as http,
        open_stores(settings(commit=work.commit), connection_params=work.params, http_client=http) as stores,
    ):
        server = Server(work, sessions, stores)
        await caught_up(stores)
        say(["ready"])
        await order()
        working = asyncio.create_task(server.work())
        await order()
        server.stop()
        await working
        say(server.passing)
        passing = await order()
        await asyncio.sleep(work.bound)
        await read_all(server, sessions, passing)
        stats = stores.stats().sessions
    assert stats.coherence is not None
    done = Done(
        server.history,
        hits=sum(each.hits + each.negative_hits for each in stats.collections.values()),
        through=sum(each.through for each in stats.collections.values()),
        state=stats.coherence.state,
        refused=server.refused,
    )
    Path(work.history).write_bytes(msgspec.json.encode(done))


def say(words: Sequence[str]) -> None:
    print(msgspec.json.encode(words).decode(), flush=True)


async def caught_up(stores: Stores) -> Follower:
    """What follows for these stores, when it does."""
    following = stores.session_store._events._connection.follower
    assert following is not None
    for log in list(following._logs):
        await following.caught_up(log)
    return following


if __name__ == "__main__":
    # While two streams overlap everything comes twice, and one of them makes up for what is done to the other.
    with mock.patch.object(follower, "RealtimeStream", partial(RealtimeStream, timing=Timing(overlap=0.1))):
        asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Work)))
