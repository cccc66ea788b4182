"""Keeps the caches of one connection up with what others commit, and knows until when they may answer.

Every log is followed by PocketBase's realtime stream. Of each log it is known whether it is

    behind     its topic is not subscribed, or what was missed before is not read yet. Nothing is answered from its
               collections' caches;
    read       what was missed has been read, and a beat of ours is on its way through log and stream;
    proven     that beat has come, so the stream brings what the log holds. From now on any beat of ours that comes
               proves that the stream lived when it was sent, and answers are good for `max_staleness` from then
               on.

A lost stream puts all of them behind. What foreign hands change comes by the stream too, and with each beat it is
looked whether all of it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final

import msgspec
from msgspec import Struct

from pb_cached.coherence import entries
from pb_cached.coherence.audit import Audit
from pb_cached.coherence.changes import FollowedCollection
from pb_cached.coherence.entries import BEAT, Entry, Gap
from pb_cached.coherence.feed import PATIENCE, Feed, now
from pb_cached.coherence.logs import Logs, beat_id
from pb_cached.coherence.stats import CoherenceCounters, CoherenceStats
from pb_cached.config import CoherenceSettings
from pb_cached.errors import PBCachedError, SchemaError
from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.realtime import RealtimeStream
from pb_cached.pocketbase.records import RecordReader
from pb_cached.telemetry import Log

GATHERING: Final = 0.02
"""Seconds for which topics are gathered before the stream is asked for them: the collections of a store are opened
one after the other, and other topics mean another stream."""
_PAUSE: Final = 0.5
"""Seconds between attempts to read what PocketBase does not give, at most."""


TRIM_EVERY: Final = 1000
"""Beats between two trims of the logs: those that nothing else is committed to fill with beats alone."""


class _Log(Struct, frozen=True):
    """A log that is followed: see `follow_log`."""

    feed: Feed
    home: str
    last: Callable[[], int]
    retained: float
    trim: Callable[[], Awaitable[None]]


class _Followed(Struct, frozen=True):
    collection: FollowedCollection
    reader: RecordReader
    feed: Feed


class Follower:
    """Mutable state, changed between awaits only: `_logs` and `_collections`, what is followed, and `_homes`,
    the collection that commits of a layout are for; `_covered`, the topics that the stream brings, and
    `_lost_at`, since when it brought none; `_read`, the logs that are not behind; `_sent`, our beats that have
    not come yet, and `_receipts`, the last of each log that PocketBase has; `_unclear`, records that must be
    read, and `_strangers`, commits of layouts that we do not know; `_ids`, of collections, and `_last_edit`,
    which show what was made anew.
    """

    def __init__(
        self, client: PocketBaseClient, server: str, settings: CoherenceSettings, sql: bool, log: Log
    ) -> None:
        """
        Args:
            server: what our commits are signed with.
            sql: may we use the SQL endpoint?
        """
        self.server = server
        self._settings = settings
        self._sql = sql
        self._log = log
        self._pocketbase = Logs(client, server)
        self._stream = RealtimeStream(client, self, log)
        self._counters = CoherenceCounters()
        self.audit = Audit(settings.audit_interval, self._is_current, self._counters, log)
        self._logs: dict[str, _Log] = {}
        self._collections: dict[str, list[_Followed]] = {}
        self._homes: dict[str, str] = {}
        self._covered: frozenset[str] = frozenset()
        self._lost_at = now()
        self._losses = 0
        self._read: set[str] = set()
        self._sent: dict[str, tuple[str, float]] = {}
        self._receipts: dict[str, str] = {}
        self._unclear: dict[str, set[str]] = {}
        self._strangers: list[tuple[Feed, Entry]] = []
        self._ids: dict[str, str] = {}
        self._last_edit: int | None = None
        self._changed = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._gathering: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # what is followed

    def follow_log(
        self,
        log: str,
        home: str,
        last: Callable[[], int],
        retained: float,
        trim: Callable[[], Awaitable[None]],
    ) -> None:
        """Follow a log, if it is not followed already.

        Args:
            home: the log by which its database's beats go.
            last: tells the number that we have taken last.
            retained: how long its entries are there, in seconds.
            trim: forgets those that are older.
        """
        if log not in self._logs:
            self._logs[log] = _Log(Feed(log, self._settings.max_staleness), home, last, retained, trim)
            self._topics_changed()

    def follow(self, log: str, collection: FollowedCollection, reader: RecordReader) -> Callable[[], bool]:
        """Keep a collection's cache up with its log. What is returned tells whether it may answer now."""
        feed = self._logs[log].feed
        name = collection.codec.collection
        self._collections.setdefault(name, []).append(_Followed(collection, reader, feed))
        self._homes[collection.codec.commit_layout] = name
        self._topics_changed()
        return lambda: now() < feed.good_until

    async def caught_up(self, log: str) -> None:
        """Return when answers from the caches of this log's collections are good."""
        while not self._logs[log].feed.is_proven:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting

    def _is_current(self) -> bool:
        return all(now() < log.feed.good_until for log in self._logs.values())

    def stats(self) -> CoherenceStats:
        """How well it goes."""
        good = [log.feed.good_until - self._settings.max_staleness for log in self._logs.values()]
        is_proven = bool(good) and all(log.feed.is_proven for log in self._logs.values())
        state = "following" if is_proven else "catching up" if self._covered else "lost"
        return self._counters.snapshot(state, max(0.0, now() - min(good)) if is_proven else None)

    def _topics_changed(self) -> None:
        if self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(GATHERING, self._subscribe)

    def _subscribe(self) -> None:
        self._gathering = None
        self._stream.subscribe(f"{name}/*" for name in (*self._logs, *self._collections))

    # life

    async def start(self) -> None:
        await self._stream.__aenter__()
        works = [self._keep_up(), self._keep_beating()]
        if self._settings.audit_interval:
            works.append(self.audit.run())
        self._tasks += map(asyncio.create_task, works)

    async def aclose(self) -> None:
        """Follow nothing any more."""
        if self._gathering is not None:
            self._gathering.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stream.aclose()
        for waiting in self._waiting:
            waiting.cancel()

    # what the stream tells

    def connected(self, topics: frozenset[str]) -> None:
        self._covered = topics
        self._changed.set()

    def lost(self, reason: str) -> None:
        self._counters.losses += bool(self._covered)
        if self._covered:
            self._lost_at = now()
        self._losses += 1
        self._covered = frozenset()
        self._read.clear()
        self._sent.clear()
        for log in self._logs.values():
            log.feed.lost()

    def received(self, topic: str, data: bytes) -> None:
        name = topic.removesuffix("/*")
        message = entries.message.decode(data)
        log = self._logs.get(name)
        if log is None:
            self._edited(name, message)
        elif message.action == "create":
            self._arrived(log.feed, entries.entry.decode(message.record))

    def _edited(self, name: str, message: entries.Message) -> None:
        """A foreign hand has written to a collection."""
        self._counters.edits += 1
        record = msgspec.json.decode(message.record, type=Entry).id
        for followed in self._collections.get(name, ()):
            if message.action == "delete":
                followed.collection.deleted(record)
                continue
            try:
                followed.collection.edited(followed.collection.codec.row(message.record))
            except SchemaError:  # there is no telling what it holds
                self._doubt(name, [record])

    def _arrived(self, feed: Feed, entry: Entry) -> None:
        if entry.layout == BEAT:
            self._beat_arrived(feed, entry)
        elif entry.n > 0 and entry.server != self.server:  # of ours, the caches were told with the answer
            for due in feed.arrived(entry):
                self._apply(feed, due)
            if feed.is_waiting:
                self._changed.set()

    def _beat_arrived(self, feed: Feed, entry: Entry) -> None:
        feed.newest = max(feed.newest, entry.created)
        if entry.server != self.server:
            for name, last in entries.beat.decode(entry.payload).last.items():
                if name in self._logs and self._logs[name].feed.beat(entry.server, last):
                    self._changed.set()
            return
        log, sent = self._sent.pop(entry.id, ("", 0.0))
        if log not in self._read:
            return
        self._counters.lag(now() - sent)
        for other in self._logs.values():
            if other.feed is feed or other.feed.is_proven:
                other.feed.proven(sent)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _apply(self, feed: Feed, entry: Entry) -> None:
        name = self._homes.get(entry.layout)
        if name is None:
            self._strangers.append((feed, entry))
            feed.doubt()
            self._changed.set()
            return
        following = self._collections.get(name, ())
        if not following:
            return
        self._counters.commits += 1
        try:
            payload = entries.payload.decode(entry.payload)
        except msgspec.DecodeError:  # somebody has had a hand in the log
            self._clear(following)
            return
        self._counters.changes += len(payload.c) + len(payload.u) + len(payload.d)
        for followed in following:
            if unclear := followed.collection.apply(entry.layout, payload):
                self._doubt(name, unclear)

    def _doubt(self, name: str, records: Iterable[str]) -> None:
        """Somebody has changed these records, and what they hold now must be read."""
        self._unclear.setdefault(name, set()).update(records)
        for followed in self._collections.get(name, ()):
            followed.feed.doubt()
        self._changed.set()

    def _clear(self, following: Iterable[_Followed]) -> None:
        """Nothing that is cached of these can be relied on."""
        for followed in following:
            followed.collection.cache.clear()

    # the task that reads what the stream did not bring

    async def _keep_up(self) -> None:
        while True:
            self._changed.clear()
            try:
                if (work := self._due()) is not None:
                    await work
                    continue
                is_waiting = any(log.feed.is_waiting for log in self._logs.values())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE if is_waiting else None):
                        await self._changed.wait()
            except PBCachedError as error:
                self._log.debug("cannot catch up", reason=str(error))
                await asyncio.sleep(random.uniform(_PAUSE / 5, _PAUSE))

    def _due(self) -> Coroutine[Any, Any, None] | None:
        """The next thing to be read."""
        for name, log in self._logs.items():
            if name not in self._read and f"{name}/*" in self._covered:
                return self._catch_up(log)
        if self._strangers:
            return self._learn(*self._strangers[0])
        if self._unclear:
            return self._clear_up(next(iter(self._unclear)))
        for log in self._logs.values():
            for gap in log.feed.overdue():
                return self._look_up(log.feed, gap)
        return None

    async def _catch_up(self, log: _Log) -> None:
        """Read what was missed of a log, then prove that nothing is any more."""
        feed, losses = log.feed, self._losses
        if feed.newest and await self._is_another(log):
            self._counters.epochs += 1
            self._log.warning("the log is not what it was; what was cached is dropped", log=feed.log)
            feed.forget()
        if not feed.newest:
            self._clear(self._of(feed))
        else:
            self._counters.catch_ups += 1
            async for entry in self._pocketbase.since(feed.log, feed.newest):
                if losses != self._losses:
                    return
                self._arrived(feed, entry)
        await self._look()
        if losses == self._losses:
            self._read.add(feed.log)
            await self._beat([feed.log])

    async def _is_another(self, log: _Log) -> bool:
        """Was the log restored from a backup, or is what was missed forgotten already?"""
        if now() - self._lost_at > log.retained:
            return True
        receipt = self._receipts.get(log.feed.log)
        return receipt is not None and not await self._pocketbase.has(log.feed.log, receipt)

    def _of(self, feed: Feed) -> list[_Followed]:
        return [each for following in self._collections.values() for each in following if each.feed is feed]

    async def _learn(self, feed: Feed, entry: Entry) -> None:
        """Another version of the application has written by a layout of its own."""
        name = await self._pocketbase.collection_of(entry.layout) if self._sql else ""
        if name:
            self._homes[entry.layout] = name
            self._apply(feed, entry)
        else:
            self._clear(self._of(feed))
        self._strangers.pop(0)
        self._settle_doubts()

    async def _clear_up(self, name: str) -> None:
        records = self._unclear.pop(name)
        try:
            for followed in self._collections.get(name, ()):
                rows = await followed.reader.by_ids(sorted(records))
                for record in records:
                    if record in rows:
                        followed.collection.edited(rows[record])
                    else:
                        followed.collection.deleted(record)
        except BaseException:
            self._unclear.setdefault(name, set()).update(records)
            raise
        self._settle_doubts()

    def _settle_doubts(self) -> None:
        if not self._unclear and not self._strangers:
            for log in self._logs.values():
                log.feed.doubt(False)

    async def _look_up(self, feed: Feed, gap: Gap) -> None:
        """Numbers are missing: read them, or learn that there are no such commits."""
        self._counters.gaps += 1
        found = await self._pocketbase.numbered(feed.log, gap, feed.newest)
        for entry in found:
            self._arrived(feed, entry)
        for due in feed.settle(gap):
            self._apply(feed, due)

    # the task that beats

    async def _keep_beating(self) -> None:
        for beats in itertools.count(1):
            await asyncio.sleep(self._settings.heartbeat)
            homes = {log.home for log in self._logs.values() if log.home in self._read}
            try:
                if homes:
                    await asyncio.gather(self._beat(homes), self._look())
                self._watch_over()
                if beats % TRIM_EVERY == 0:
                    await asyncio.gather(*(self._logs[home].trim() for home in homes))
            except PBCachedError as error:
                self._log.debug("no beat", reason=str(error))

    def _watch_over(self) -> None:
        """Where PocketBase takes our beats, and the stream does not bring them, the stream is dead."""
        limit = self._settings.max_staleness
        if self._sent and now() - min(sent for _, sent in self._sent.values()) > limit:
            reason = f"what we commit does not come by the realtime stream within {limit:g} s"
            self._log.warning("realtime stream is dead, replacing it", reason=reason)
            self.lost(reason)
            self._stream.replace(reason)

    async def _beat(self, logs: Iterable[str]) -> None:
        await asyncio.gather(*(self._beat_by(log) for log in logs))

    async def _beat_by(self, log: str) -> None:
        id_, losses = beat_id(), self._losses
        last = {name: each.last() for name, each in self._logs.items() if each.home == self._logs[log].home}
        self._sent[id_] = (log, now())
        is_taken = False
        try:
            is_taken = await self._pocketbase.beat(log, id_, last)
        finally:
            if is_taken and losses == self._losses:
                self._receipts[log] = id_
            else:
                self._sent.pop(id_, None)

    async def _look(self) -> None:
        """Has a foreign hand changed records, or made collections anew?"""
        if not self._sql:
            return
        names = [*self._logs, *self._collections]
        sight = await self._pocketbase.look(names, self._last_edit)
        self._last_edit = sight.last_edit
        for name, record in sight.edits:
            if name in self._collections:
                self._doubt(name, [record])
        for name in names:
            if self._ids.setdefault(name, sight.collections.get(name, "")) != sight.collections.get(name, ""):
                self._ids[name] = sight.collections.get(name, "")
                self._counters.epochs += 1
                self._log.warning("a collection was made anew; what was cached of it is dropped", collection=name)
                if name in self._logs:
                    self._logs[name].feed.forget()
                    self._read.discard(name)
                    self._changed.set()
                self._clear(self._collections.get(name, ()))
