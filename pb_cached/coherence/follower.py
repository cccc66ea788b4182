"""Keeps the caches of one connection up with what others commit, and knows until when they may answer.

Every log is followed by PocketBase's realtime stream. Of each log it is known whether it is

    behind     its topic is not subscribed, or what was missed before is not read yet. Nothing is answered from its
               collections' caches;
    read       what was missed has been read, and a beat of ours is on its way through this log and the stream;
    proven     that beat has come, so the stream brings what the log holds. From now on any beat of ours that comes
               proves that the stream lived when it was sent, and answers are good for `max_staleness` from then
               on.

A lost stream puts all of them behind. What foreign hands change comes by the stream too, and before each beat it
is looked whether all of it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final

import msgspec
from msgspec import Struct

from pb_cached.coherence import entries
from pb_cached.coherence.audit import Audit
from pb_cached.coherence.changes import FollowedCollection
from pb_cached.coherence.entries import BEAT, Beat, Entry, Gap
from pb_cached.coherence.feed import PATIENCE, Feed, now
from pb_cached.coherence.logs import Logs, Seen
from pb_cached.coherence.stats import CoherenceCounters, CoherenceStats
from pb_cached.config import CoherenceSettings
from pb_cached.errors import PBCachedError, SchemaError
from pb_cached.outcomes import succeed
from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.commit import triggers
from pb_cached.pocketbase.commit.receipt import Receipts, lane_of
from pb_cached.pocketbase.ids import new_id
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
    lanes: Sequence[Receipts]
    retained: float
    trim: Callable[[], None]
    repair: Callable[[], Awaitable[bool]] | None

    @property
    def is_whole(self) -> bool:
        """Do its entries hold what they have changed, and do triggers note what foreign hands change? If not,
        PocketBase's own events tell of both."""
        return self.repair is not None


class _Beat(Struct):
    """One of ours that the stream has not brought yet."""

    log: str
    sent: float
    taken: float | None = None
    """Since when PocketBase has it."""


class _Identified(Struct):
    id: str


class _Followed(Struct, frozen=True):
    collection: FollowedCollection
    reader: RecordReader
    feed: Feed


class Follower:
    """Mutable state, changed between awaits only: `_logs` and `_collections`, what is followed, and `_homes`,
    the collection that commits of a layout are for; `_covered`, the topics that the stream brings; `_sent`, our
    beats that have not come yet, and `_receipts`, for each log the last that PocketBase has, and in which log;
    `_seen`, for each log the last commit that has come, and when, and `_witnesses`, what was known to be there
    when the stream was lost; `_unclear`, records that must be read, `_clearing`, those that are being read, and
    `_strangers`, commits of layouts that we do not know, each with the time since when; `_as_seen`, the
    collections, and `_last_edit`, which show what was made anew; `_is_dead`, is the stream believed to be,
    `_good_at`, when was last seen that all caches may answer, and `_is_said`, was it said that they may not?
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
        self._url = client.url
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
        self._sent: dict[str, _Beat] = {}
        self._receipts: dict[str, tuple[str, str]] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        self._witnesses: dict[str, list[tuple[str, str]]] = {}
        self._unclear: dict[str, dict[str, float]] = {}
        self._clearing: dict[str, dict[str, float]] = {}
        self._strangers: list[tuple[Feed, Entry, float]] = []
        self._as_seen: dict[str, Seen] = {}
        self._last_edit: int | None = None
        self._is_dead = False
        self._good_at = now()
        self._is_said = False
        self._changed = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._gathering: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # what is followed

    def follow_log(
        self,
        log: str,
        home: str,
        lanes: Sequence[Receipts],
        retained: float,
        trim: Callable[[], None],
        repair: Callable[[], Awaitable[bool]] | None,
    ) -> None:
        """Follow a log, if it is not followed already.

        Args:
            home: the log by which its database's beats go.
            lanes: by which our own commits go.
            retained: how long its entries are there, in seconds.
            trim: forgets those that are older.
            repair: has the triggers back that commits go by; None where they go by none.
        """
        if log not in self._logs:
            feed = Feed(log, self._settings.max_staleness)
            self._logs[log] = _Log(feed, home, lanes, retained, trim, repair)
            self._topics_changed()

    def follow(self, log: str, collection: FollowedCollection, reader: RecordReader) -> Callable[[], bool]:
        """Keep a collection's cache up with its log. What is returned tells whether it may answer now."""
        feed = self._logs[log].feed
        name = collection.codec.collection
        self._collections.setdefault(name, []).append(_Followed(collection, reader, feed))
        if layout := collection.codec.commit_layout:
            self._homes[layout] = name
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
        good = min((log.feed.good_until for log in self._logs.values()), default=0.0)
        state = "following" if now() < good else "catching up" if self._covered else "lost"
        staleness = now() - (good - self._settings.max_staleness) if good else None
        return self._counters.snapshot(state, None if staleness is None else max(0.0, staleness))

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
        for name, log in self._logs.items():
            if f"{name}/*" in topics:
                log.feed.subscribed()
        self._changed.set()

    def lost(self, reason: str) -> None:
        self._counters.losses += bool(self._covered)
        self._covered = frozenset()
        self._sent.clear()
        for name, log in self._logs.items():
            if log.feed.behind_since is None:
                self._witnesses[name] = list(self._known(log))
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
        """A foreign hand has written to a collection; where logs do not hold what commits have changed, anybody
        has, and who does so by us raises the revision."""
        following = self._collections.get(name, ())
        is_foreign = all(self._logs[followed.feed.log].is_whole for followed in following)
        self._counters.edits += is_foreign
        self._counters.changes += not is_foreign
        record = msgspec.json.decode(message.record, type=_Identified).id
        for followed in following:
            if message.action == "delete":
                followed.collection.deleted(record)
                continue
            try:
                row = followed.collection.codec.row(message.record)
                if is_foreign:
                    followed.collection.edited(row)
                else:
                    followed.collection.changed(row)
            except SchemaError:  # there is no telling what it holds
                self._doubt(name, [record], now())

    def _arrived(self, feed: Feed, entry: Entry) -> None:
        if entry.layout == BEAT:
            self._beat_arrived(feed, entry)
            return
        if entry.n <= 0:
            return
        self._seen[feed.log] = entry.id, time.monotonic()
        for lane in self._logs[feed.log].lanes:
            if entry.server == lane.server:
                self._own_arrived(feed, entry, lane)
                return
        for due in feed.arrived(entry):
            self._apply(feed, due)
        if feed.is_waiting or feed.behind_since is not None:
            self._changed.set()

    def _own_arrived(self, feed: Feed, entry: Entry, lane: Receipts) -> None:
        """Mostly the answer is as good as here, and tells the caches. It may be lost though, be asked for until
        the deadline, and be given up: then our commit is to us what another server's is."""
        if lane.is_known(entry.n):
            return
        if entry.n > lane.last and feed.behind_since is None:
            asyncio.get_running_loop().call_later(PATIENCE, self._apply_untold, feed, entry, lane)
        else:  # late: it was given up; or read back after a gap, when nothing may be answered without it
            self._apply(feed, entry)

    def _apply_untold(self, feed: Feed, entry: Entry, lane: Receipts) -> None:
        """PocketBase has a commit of ours. Has its answer still not come?"""
        if not lane.is_known(entry.n):
            self._apply(feed, entry)

    def _beat_arrived(self, feed: Feed, entry: Entry) -> None:
        feed.came(entry.created)
        if entry.server != self.server:
            try:
                theirs = entries.beat.decode(entry.payload)
            except msgspec.DecodeError:  # somebody has had a hand in the log
                return
            for name, lasts in theirs.last.items():
                if (log := self._logs.get(name)) is None:
                    continue
                for number, (last, after) in enumerate(zip(lasts, theirs.after.get(name, ()), strict=False)):
                    if log.feed.beat(lane_of(entry.server, number), entry.created, last, after):
                        self._changed.set()
            return
        for log in self._logs.values():
            for lane in log.lanes:
                lane.heard = entry.created
        beat = self._sent.pop(entry.id, None)
        if beat is None or feed.behind_since is not None:
            return
        self._is_dead = False
        self._counters.lag(now() - beat.sent)
        for other in self._logs.values():
            if other.feed is feed or other.feed.is_proven:
                other.feed.proven(beat.sent, entry.created)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            succeed(future, None)

    def _apply(self, feed: Feed, entry: Entry) -> None:
        if not self._logs[feed.log].is_whole:  # PocketBase's own events tell
            self._counters.commits += 1
            return
        name = self._homes.get(entry.layout)
        if name is None:
            self._strangers.append((feed, entry, feed.date(entry.created)))
            self._settle_doubts()
            self._changed.set()
            return
        following = self._collections.get(name, ())
        if not following:
            return
        self._counters.commits += 1
        if not entry.payload:  # its log was full
            self._clear(following)
            return
        try:
            payload = entries.payload.decode(entry.payload)
            self._counters.changes += len(payload.c) + len(payload.u) + len(payload.d)
            for followed in following:
                if unclear := followed.collection.apply(entry.layout, payload):
                    self._doubt(name, unclear, feed.date(entry.created))
        except (msgspec.DecodeError, LookupError, TypeError, ValueError):  # somebody has had a hand in the log
            self._log.warning("a commit cannot be read; what was cached is dropped", collection=name, id=entry.id)
            self._clear(following)

    def _doubt(self, name: str, records: Iterable[str], since: float) -> None:
        """Somebody has changed these records, and what they hold now must be read."""
        unclear = self._unclear.setdefault(name, {})
        for record in records:
            unclear.setdefault(record, since)
        self._settle_doubts()
        self._changed.set()

    def _settle_doubts(self) -> None:
        """Tell the feeds since when there is what could not be applied."""
        since: dict[str, float] = {feed.log: at for feed, _, at in reversed(self._strangers)}
        for name, records in (*self._unclear.items(), *self._clearing.items()):
            oldest = next(iter(records.values()))  # they are in the order in which they came
            for followed in self._collections.get(name, ()):
                since[followed.feed.log] = min(oldest, since.get(followed.feed.log, oldest))
        for log in self._logs.values():
            log.feed.doubt(since.get(log.feed.log))

    def _clear(self, following: Iterable[_Followed]) -> None:
        """Nothing that is cached of these can be relied on."""
        for followed in following:
            followed.collection.cache.clear()

    # the task that reads what the stream did not bring

    async def _keep_up(self) -> None:
        while True:
            self._changed.clear()
            has_failed = has_read = False
            for work in list(self._due()):
                try:
                    await work()
                    has_read = True
                except Exception as error:  # one log that is not there must not hold up the others
                    has_failed = True
                    tell = self._log.debug if isinstance(error, PBCachedError) else self._log.error
                    tell("cannot catch up", reason=str(error) or repr(error))
            if has_failed:
                await asyncio.sleep(random.uniform(_PAUSE / 5, _PAUSE))
            elif not has_read:
                is_waiting = any(log.feed.is_waiting for log in self._logs.values())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE if is_waiting else None):
                        await self._changed.wait()

    def _due(self) -> Iterator[Callable[[], Awaitable[None]]]:
        """What is to be read."""
        for name, log in self._logs.items():
            if log.feed.behind_since is not None and f"{name}/*" in self._covered:
                yield partial(self._catch_up, log)
        for stranger in self._strangers:
            yield partial(self._learn, *stranger)
        for name in self._unclear:
            yield partial(self._clear_up, name)
        for log in self._logs.values():
            for gap in log.feed.overdue():
                yield partial(self._look_up, log.feed, gap)

    async def _catch_up(self, log: _Log) -> None:
        """Read what was missed of a log, then prove that nothing is any more."""
        feed = log.feed
        if feed.newest and await self._is_another(log):
            self._log.warning("the log is not what it was; what was cached is dropped", log=feed.log)
            self._begin_anew(feed)
        losses = feed.losses
        if not (feed.newest and log.is_whole and self._sql):
            self._clear(self._of(feed))
        if feed.newest:
            self._counters.catch_ups += 1
            async for entry in self._pocketbase.since(feed.log, feed.newest):
                if losses != feed.losses:
                    return
                self._arrived(feed, entry)
        await self._look()
        if losses == feed.losses:
            feed.caught_up()
            await self._beat([feed.log])

    async def _is_another(self, log: _Log) -> bool:
        """Was the log restored from a backup, or is what was missed forgotten already?"""
        feed = log.feed
        if feed.behind_since is not None and now() - feed.behind_since > log.retained:
            return True
        for of, id_ in self._witnesses.get(feed.log, ()):
            if not await self._pocketbase.has(of, id_):
                return True
        return False

    def _known(self, log: _Log) -> Iterator[tuple[str, str]]:
        """Entries of which we know that they are there, the last ones of ours and of others, and their logs."""
        name = log.feed.log
        if name in self._receipts:
            yield self._receipts[name]
        for entry, at in filter(None, (*(lane.acknowledged for lane in log.lanes), self._seen.get(name))):
            if time.monotonic() - at < log.retained:
                yield name, entry

    def _begin_anew(self, feed: Feed) -> None:
        """Nothing holds that was known by this log."""
        self._counters.epochs += 1
        self._receipts.pop(feed.log, None)
        self._seen.pop(feed.log, None)
        self._witnesses.pop(feed.log, None)
        for lane in self._logs[feed.log].lanes:
            lane.acknowledged = None
        feed.forget()
        for followed in self._of(feed):
            followed.collection.restored()
        self._changed.set()

    def _of(self, feed: Feed) -> list[_Followed]:
        return [each for following in self._collections.values() for each in following if each.feed is feed]

    async def _learn(self, feed: Feed, entry: Entry, since: float) -> None:
        """Another version of the application has written by a layout of its own."""
        name = self._homes.get(entry.layout, "")
        if not name and self._sql:
            name = await self._pocketbase.collection_of(entry.layout)
        self._strangers.remove((feed, entry, since))
        if name:
            self._homes[entry.layout] = name
            self._apply(feed, entry)
        else:
            self._clear(self._of(feed))
        self._settle_doubts()

    async def _clear_up(self, name: str) -> None:
        records = self._clearing[name] = self._unclear.pop(name)  # what comes from now on is read once more
        try:
            for followed in self._collections.get(name, ()):
                try:
                    rows = await followed.reader.by_ids(sorted(records))
                    for record in records:
                        if record in rows:
                            followed.collection.edited(rows[record])
                        else:
                            followed.collection.deleted(record)
                except SchemaError:  # whoever reads them is told
                    followed.collection.cache.clear()
        except BaseException:
            later = self._unclear.get(name, {})
            self._unclear[name] = records | {record: at for record, at in later.items() if record not in records}
            raise
        finally:
            del self._clearing[name]
            self._settle_doubts()

    async def _look_up(self, feed: Feed, gap: Gap) -> None:
        """Numbers are missing: read them, or learn that there are no such commits."""
        self._counters.gaps += 1
        losses = feed.losses
        if feed.began is None:  # the log was made anew meanwhile
            return
        first = gap.first
        async for entry in self._pocketbase.numbered(feed.log, gap, feed.began):
            if losses != feed.losses:
                return
            if not self._logs[feed.log].is_whole:  # so what else has not come?
                self._clear(self._of(feed))
            # Nothing is between it and the one before: else ever more would have to wait for their turn.
            self._settle(feed, Gap(gap.server, first, entry.n - 1))
            self._arrived(feed, entry)
            first = entry.n + 1
        if losses == feed.losses:
            self._settle(feed, gap)

    def _settle(self, feed: Feed, gap: Gap) -> None:
        for due in feed.settle(gap):
            self._apply(feed, due)

    # the task that beats

    async def _keep_beating(self) -> None:
        limit = self._settings.max_staleness
        for beats in itertools.count(1):
            await asyncio.sleep(self._settings.heartbeat)
            read = {name: log for name, log in self._logs.items() if log.feed.behind_since is None}
            logs = {log.home for log in read.values() if log.home in read}
            logs.update(name for name, log in read.items() if not log.feed.is_proven)
            try:
                if logs:
                    async with asyncio.timeout(limit):  # what is later proves nothing
                        # Looked first: what foreign hands change after it may be as old as the last beat.
                        await self._look()
                        await self._beat(logs)
                if beats % TRIM_EVERY == 0:
                    for log in read.values():
                        if log.home == log.feed.log:
                            log.trim()
            except (PBCachedError, TimeoutError) as error:
                self._log.debug("no beat", reason=str(error) or f"no answer within {limit:g} s")
            except Exception as error:
                self._log.error("no beat", reason=repr(error))
            self._watch_over()

    def _watch_over(self) -> None:
        """Where PocketBase takes our beats, and the stream does not bring them, the stream is dead. Tells the log
        when caches cease to answer, and when they answer again."""
        limit = self._settings.max_staleness
        if any(beat.taken is not None and now() - beat.taken > limit for beat in self._sent.values()):
            reason = f"what we commit does not come by the realtime stream within {limit:g} s"
            tell = self._log.debug if self._is_dead else self._log.warning
            tell("realtime stream is dead, replacing it", reason=reason)
            self._is_dead = True
            self.lost(reason)
            self._stream.replace(reason)
        if self._is_current():
            self._good_at = now()
            if self._is_said:
                self._is_said = False
                self._log.info("caches answer again")
        elif not self._is_said and now() - self._good_at > limit:
            self._is_said = True
            self._log.warning("reads go to PocketBase: nothing proves that the caches are fresh", url=self._url)

    async def _beat(self, logs: Iterable[str]) -> None:
        await asyncio.gather(*(self._beat_by(log) for log in logs))

    async def _beat_by(self, log: str) -> None:
        feed, id_ = self._logs[log].feed, new_id()
        losses = feed.losses
        told = {name: each.lanes for name, each in self._logs.items() if each.home == self._logs[log].home}
        content = Beat(
            {name: [lane.last for lane in lanes] for name, lanes in told.items()},
            {name: [lane.after for lane in lanes] for name, lanes in told.items()},
        )
        beat = self._sent[id_] = _Beat(log, now())
        try:
            if await self._pocketbase.beat(log, id_, content) and losses == feed.losses:
                beat.taken = now()
                for name, each in self._logs.items():
                    if log in (name, each.home) and each.feed.behind_since is None:
                        self._receipts[name] = log, id_
        finally:
            if beat.taken is None:
                self._sent.pop(id_, None)

    async def _look(self) -> None:
        """Has a foreign hand changed records, or made collections anew?"""
        if not (self._sql and any(log.is_whole for log in self._logs.values())):
            return
        names = [*self._logs, *self._collections]
        sight = await self._pocketbase.look(names, self._last_edit)
        self._last_edit = sight.last_edit
        for name, record in sight.edits:
            if name in self._collections:
                self._doubt(name, [record], now())
        for name in names:
            seen, before = sight.collections.get(name, Seen()), self._as_seen.get(name)
            if seen == before:
                continue
            if name not in self._logs:
                await self._mend(name, seen)
            self._as_seen[name] = seen
            if before is None:
                continue
            is_another = seen.identity != before.identity
            if is_another:
                self._log.warning("a collection was made anew; what was cached of it is dropped", collection=name)
            if name not in self._logs:
                self._counters.epochs += is_another
                if is_another or seen.triggers < before.triggers:
                    self._clear(self._collections.get(name, ()))
            elif is_another:
                self._begin_anew(self._logs[name].feed)

    async def _mend(self, name: str, seen: Seen) -> None:
        """Where a collection has lost the triggers that look after it, have them back. Until then nobody notes
        what foreign hands change, nor raises its revision."""
        for log in {followed.feed.log for followed in self._collections.get(name, ())}:
            repair = self._logs[log].repair
            if repair is None or not seen.identity or seen.triggers >= len(triggers.watch(log, name)):
                continue
            self._log.warning("a collection has lost its triggers; they are made anew", collection=name)
            try:
                await repair()
            except SchemaError as error:
                self._log.warning("the triggers are not there", collection=name, reason=str(error))
