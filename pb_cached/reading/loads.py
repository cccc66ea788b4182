"""Bringing partitions of one collection into its cache: each once, however many wait for it.

What is missing is asked for together: keys that are wanted in the same moment share a request. Who is cancelled
leaves the load to the others; a load that fails is nobody's answer but theirs who waited for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from pb_cached.cache.collection import CollectionCache, Reading, State
from pb_cached.cache.partition import Key
from pb_cached.cache.predicate import compile_where
from pb_cached.errors import PBCachedError
from pb_cached.exact import dumps, loads
from pb_cached.outcomes import fail, succeed
from pb_cached.pocketbase.codec import RecordCodec, Row
from pb_cached.pocketbase.filters import FilterWriter
from pb_cached.pocketbase.records import RecordReader
from pb_cached.telemetry import Log

KEYS_AT_ONCE: Final = 20
"""Partitions that one request asks for. More are hardly cheaper each, and the first waits for the last."""
IDS_AT_ONCE: Final = 100
"""Ids whose partitions one request asks for."""
WARM_SHARE: Final = 0.9
"""How full warming makes the memory: beyond, it would evict what it has just brought."""
WARM_REPORTS: Final = 5.0
"""Seconds between two lines about the progress of warming."""


class _TooMany(Exception):
    """More documents than a partition may have."""


class Loader:
    """Loads of one collection.

    Mutable state, changed between awaits only: `_wanted`, the keys that the next round of requests asks for;
    `_pending`, what whoever waits for a key waits for, from the moment it is wanted until its request has ended;
    `_tasks`, the rounds and requests under way. `_unsent`, `_sought` and `_asked` are the same for ids of which it
    is not known what partition they are in: those to be asked for, and what is waited for before and after that.
    """

    def __init__(
        self,
        cache: CollectionCache,
        codec: RecordCodec,
        reader: RecordReader,
        filters: FilterWriter,
        ready: Callable[[], Awaitable[None]],
        log: Log,
    ) -> None:
        """
        Args:
            ready: returns when it makes sense to warm the cache.
        """
        self._ready = ready
        self._cache = cache
        self._codec = codec
        self._reader = reader
        self._filters = filters
        self._log = log
        self._wanted: list[Key] = []
        self._pending: dict[Key, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsent: list[str] = []
        self._sought: dict[str, asyncio.Future[list[Key | None]]] = {}
        self._asked: set[asyncio.Future[list[Key | None]]] = set()

    async def refresh(self, keys: Sequence[Key]) -> None:
        """Load these partitions, or what is in doubt in them; or wait for whoever does already.

        A partition that is too large to be kept is not there afterwards either.

        Raises:
            PBCachedError: what the request for one of them ended with.
        """
        pending = [self._want(key) for key in keys]
        await asyncio.wait(pending)  # cancels none of them when it is cancelled
        for outcome in pending:
            outcome.result()

    async def locate(self, ids: Sequence[str]) -> list[Key] | None:
        """The partitions of the documents that have these ids now; None where one of them cannot be kept.

        Raises:
            PBCachedError: as `refresh`.
        """
        pending = [self._seek(id_) for id_ in ids]
        await asyncio.wait(pending)
        keys = dict.fromkeys(key for outcome in pending for key in outcome.result())
        return None if None in keys else [key for key in keys if key is not None]

    def _seek(self, id_: str) -> asyncio.Future[list[Key | None]]:
        outcome = self._sought.get(id_)
        if outcome is None:
            outcome = self._sought[id_] = asyncio.get_running_loop().create_future()
            if not self._unsent:
                self._start(self._locate_round())
            self._unsent.append(id_)
        return outcome

    async def _locate_round(self) -> None:
        """Ask for all ids that are sought now. Who seeks one after it was asked for asks anew."""
        ids, self._unsent = self._unsent, []
        outcomes = {id_: self._sought.pop(id_) for id_ in ids}
        groups = [ids[start : start + IDS_AT_ONCE] for start in range(0, len(ids), IDS_AT_ONCE)]
        self._asked.update(outcomes.values())
        await asyncio.gather(*(self._locate({id_: outcomes[id_] for id_ in group}) for group in groups))

    async def _locate(self, outcomes: Mapping[str, asyncio.Future[list[Key | None]]]) -> None:
        found: dict[str, list[Key | None]] = {id_: [] for id_ in outcomes}
        try:
            for state in await self._matching({"id": {"$in": list(outcomes)}}):
                if state.doc_id in found:
                    found[state.doc_id].append(state.key)
        except Exception as error:
            for outcome in outcomes.values():
                fail(outcome, error)
        else:
            for id_, outcome in outcomes.items():
                succeed(outcome, found[id_])
        self._asked.difference_update(outcomes.values())

    async def warm(self) -> None:
        """Load the collection, the newest documents first, until it is there or the memory is nearly full."""
        await self._ready()
        if not self._cache.rule.partition_by:
            if (key := self._cache.key()) is not None:
                await self.refresh([key])
            return
        reported = time.monotonic()
        async for rows in self._reader.newest_first():
            keys = {self.state(row).key: None for row in rows}
            missing = [key for key in keys if key is not None and self._cache.get(key) is None]
            for start in range(0, len(missing), KEYS_AT_ONCE):
                if self._cache.fullness >= WARM_SHARE:
                    self._log.info("cache is full", **self._progress())
                    return
                await self.refresh(missing[start : start + KEYS_AT_ONCE])
                if time.monotonic() - reported >= WARM_REPORTS:
                    reported = time.monotonic()
                    self._log.info("warming", **self._progress())
        self._log.info("warm", **self._progress())

    def warm_in_background(self) -> None:
        """`warm`, without waiting for it. That it fails is logged."""
        self._start(self._warm_quietly())

    async def _warm_quietly(self) -> None:
        try:
            await self.warm()
        except PBCachedError as error:
            self._log.warning("not warmed", collection=self._codec.collection, reason=str(error))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End what is under way. Whoever still waits is told."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        waited_for: list[asyncio.Future[Any]] = [*self._pending.values(), *self._sought.values(), *self._asked]
        for outcome in waited_for:
            fail(outcome, PBCachedError("the database was closed while documents were read"))
        self._pending.clear()
        self._sought.clear()
        self._unsent.clear()
        self._wanted.clear()

    def state(self, row: Row) -> State:
        """A record as the cache takes it."""
        document = self._codec.document(row)
        return self._cache.state(row.id, row.rev, document, dumps(document))

    # the audit

    @property
    def name(self) -> str:
        return self._codec.collection

    def sample(self) -> Key | None:
        """A partition that is cached, any; None where there is none."""
        return self._cache.sample()

    async def compare(self, key: Key) -> bool | None:
        """Does PocketBase hold what is cached? None where nobody can tell: it has changed, or gone, meanwhile."""
        cached = self._cache.get(key)
        states = await self._states([key])
        if cached is None or self._cache.get(key) is not cached:
            return None
        held = {state.record: state for state in states if state.key == key}
        if self._is_too_much(len(held), 0) or len(held) != len(cached.entries):
            return False
        return all(
            (state := held.get(entry.record)) is not None
            and state.document is not None
            and (entry.rev, loads(entry.document)) == (state.rev, loads(state.document))
            for entry in cached.entries
        )

    def distrust(self, key: Key) -> None:
        """Have it loaded anew."""
        self._cache.distrust(key)

    def _progress(self) -> dict[str, Any]:
        return {
            "collection": self._codec.collection,
            "documents": len(self._cache),
            "bytes": self._cache.stats.bytes,
        }

    # requests

    def _want(self, key: Key) -> asyncio.Future[None]:
        outcome = self._pending.get(key)
        if outcome is None:
            outcome = self._pending[key] = asyncio.get_running_loop().create_future()
            if not self._wanted:
                self._start(self._round())
            self._wanted.append(key)
        return outcome

    async def _round(self) -> None:
        """Ask for all that is wanted now."""
        wanted, self._wanted = self._wanted, []
        # What waits for records in doubt gets them by one request, as every such read settles all of them.
        doubtful = [key for key in wanted if self._cache.is_doubtful(key)]
        missing = [key for key in wanted if not self._cache.is_doubtful(key)]
        groups = [missing[start : start + KEYS_AT_ONCE] for start in range(0, len(missing), KEYS_AT_ONCE)]
        requests = [self._decide(self._load, group) for group in groups]
        if doubtful:
            requests.append(self._decide(self._reread, doubtful))
        await asyncio.gather(*requests)

    async def _decide(self, request: Callable[[Sequence[Key]], Awaitable[None]], keys: Sequence[Key]) -> None:
        """Make a request, and tell all who wait for these keys what it ended with."""
        error: Exception | None = None
        try:
            await request(keys)
        except Exception as caught:
            error = caught
        for key in keys:
            outcome = self._pending.pop(key)
            if error is None:
                succeed(outcome, None)
            else:
                fail(outcome, error)

    async def _load(self, keys: Sequence[Key]) -> None:
        readings = {key: self._cache.begin(key) for key in keys}
        try:
            states = await self._states(keys)
        except _TooMany:
            # Together they were too many: each is asked for alone, and the one to blame is not kept.
            for reading in readings.values():
                self._cache.abandon(reading)
            await asyncio.gather(*(self._load([key]) for key in keys))
            return
        except BaseException:
            for reading in readings.values():
                self._cache.abandon(reading)
            raise
        self._keep(readings, states)

    def _keep(self, readings: Mapping[Key, Reading], states: Sequence[State]) -> None:
        of: dict[Key, list[State]] = {key: [] for key in readings}
        for state in states:
            if state.key in of:
                of[state.key].append(state)
        for key, reading in readings.items():
            self._cache.load(reading, of[key])

    async def _states(self, keys: Sequence[Key]) -> list[State]:
        """All documents of these partitions; of one that is too large to be kept, so many that it shows."""
        by = self._cache.rule.partition_by
        if len(by) == 1:
            where: dict[str, Any] = {by[0]: {"$in": [self._cache.values(key)[0] for key in keys]}}
        else:
            each = [
                {field: {"$eq": value} for field, value in zip(by, self._cache.values(key), strict=True)}
                for key in keys
            ]
            where = {"$or": each} if by else {}
        states = await self._matching(where)
        if len(keys) > 1 and self._is_too_much(len(states), sum(len(state.document or b"") for state in states)):
            raise _TooMany
        return states

    async def _reread(self, _: Sequence[Key]) -> None:
        reading = self._cache.begin_again()
        try:
            rows = await self._reader.by_ids(sorted(reading.records))
            self._cache.settle(reading, {row.id: self.state(row) for row in rows.values()})
        finally:
            self._cache.abandon(reading)

    async def _matching(self, where: Mapping[str, Any]) -> list[State]:
        """The documents that match; where they are too many to be kept, just so many that it shows."""
        matches = compile_where(where)
        states: list[State] = []
        size = 0
        async for row in self._reader.all(self._filters.narrow(where) or ()):
            document = self._codec.document(row)
            if matches(document):
                json = dumps(document)
                states.append(self._cache.state(row.id, row.rev, document, json))
                size += len(json)
                if self._is_too_much(len(states), size):
                    break
        return states

    def _is_too_much(self, documents: int, size: int) -> bool:
        return documents > self._cache.rule.max_documents or size > self._cache.max_bytes
