"""Answers by the cache. What it lacks is loaded; what no partition can answer goes to PocketBase.

A partition that is missing is loaded once, however many wait for it. Who is cancelled leaves it to the others, and
a load that fails is nobody's answer but theirs who waited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import CollectionSort

from pb_cached.cache.collection import DELETED, CollectionCache, State
from pb_cached.cache.partition import Entry, Key, Partition, decoded
from pb_cached.cache.predicate import Predicate, compile_where
from pb_cached.cache.query import least_of, values_of
from pb_cached.errors import SchemaError
from pb_cached.exact import dumps, loads
from pb_cached.pocketbase.codec import RecordCodec, Row
from pb_cached.pocketbase.commit import Operation, Reply
from pb_cached.pocketbase.filters import FilterWriter
from pb_cached.pocketbase.records import RecordReader
from pb_cached.reading.direct import DirectReads, Document, Found, Match
from pb_cached.reading.order import first_of, position

ROUNDS: Final = 5
"""How often partitions are refreshed for one reader before the reader goes to PocketBase."""


_record: Final = attrgetter("record")


class Candidates(NamedTuple):
    """The entries among which all matches are."""

    entries: Sequence[Entry]
    ordered: bool
    """They rise strictly by `creation_utc` and `id`."""
    rising: bool
    """They rise strictly by the partition's sequence."""


class CachedReads:
    """Reads of one collection through its cache.

    Mutable state: `_under_way`, the refresh of each partition that somebody waits for.
    """

    def __init__(
        self,
        cache: CollectionCache,
        direct: DirectReads,
        codec: RecordCodec,
        reader: RecordReader,
        filters: FilterWriter,
    ) -> None:
        self.cache = cache
        self._direct = direct
        self._codec = codec
        self._reader = reader
        self._filters = filters
        self._under_way: dict[Key, asyncio.Task[None]] = {}

    # answers

    async def find(
        self, where: Mapping[str, Any], predicate: Predicate, limit: int | None, descending: bool
    ) -> Found:
        candidates = self._at_hand(where) or await self._fetched(where)
        if candidates is None:
            return await self._direct.find(where, predicate, limit, descending)
        found = [document for document in decoded(candidates.entries) if predicate(document)]
        if not candidates.ordered:
            found.sort(key=position, reverse=descending)
        elif descending:
            found.reverse()
        return Found(found if limit is None else found[:limit], len(found))

    async def first(self, where: Mapping[str, Any], predicate: Predicate) -> Match | None:
        candidates = self._at_hand(where) or await self._fetched(where)
        if candidates is None:
            return await self._direct.first(where, predicate)
        return _first_match(candidates.entries, predicate)

    async def first_sorted(
        self, where: Mapping[str, Any], predicate: Predicate, sort: CollectionSort
    ) -> Document | None:
        candidates = self._at_hand(where) or await self._fetched(where)
        if candidates is None:
            return await self._direct.first_sorted(where, predicate, sort)
        if candidates.rising and len(sort) == 1 and sort[0][0] == self.cache.rule.sequence:
            descending = sort[0][1] == SortDirection.DESC
            entries = candidates.entries[::-1] if descending else candidates.entries
            match = _first_match(entries, predicate)
            return match.document if match else None
        return first_of([document for document in decoded(candidates.entries) if predicate(document)], sort)

    # changes

    def committed(self, operation: Operation, reply: Reply) -> None:
        """PocketBase has committed an operation on this collection."""
        if operation.method == "DELETE" or not reply.record:
            self.cache.apply(State(operation.record_id, DELETED))
            return
        try:
            self.cache.apply(self._state(self._codec.row(reply.record)))
        except SchemaError:  # somebody has taken a column away, and the write will be repeated
            self.cache.clear()

    def uncertain(self, operation: Operation) -> None:
        """Nobody knows whether this operation was applied, or will be yet."""
        key = self.cache.key_of(operation.record_id)
        if operation.method == "POST":
            try:
                key = self._state(self._codec.row(operation.body)).key
            except SchemaError:
                key = None
        elif self.cache.rule.partition_by in loads(operation.body or b"{}"):
            key = None
        self.cache.avoid(key)

    # partitions

    def _at_hand(self, where: Mapping[str, Any]) -> Candidates | None:
        """The candidates, if all that it takes is in memory."""
        keys = self._keys(where)
        if keys is None or (partitions := self._partitions(keys)) is None:
            return None
        candidates = self._candidates(where, partitions)
        if candidates.entries:
            self.cache.stats.hits += 1
        else:
            self.cache.stats.negative_hits += 1
        return candidates

    async def _fetched(self, where: Mapping[str, Any]) -> Candidates | None:
        """The candidates, when what was missing has been loaded; None where partitions cannot answer."""
        keys = self._keys(where) or await self._located(where)
        if keys is None:
            return None
        for _ in range(ROUNDS):
            partitions = self._partitions(keys)
            if partitions is not None:
                return self._candidates(where, partitions)
            missing = [key for key in keys if self.cache.get(key) is None]
            if not all(self.cache.may_keep(key) for key in missing):
                return None
            self.cache.stats.misses += 1
            await asyncio.gather(*(self._refreshed(key) for key in missing))
        return None

    def _keys(self, where: Mapping[str, Any]) -> list[Key] | None:
        """The partitions in which all matches are."""
        rule = self.cache.rule
        if not rule.partition_by:
            return _all([self.cache.key("")])
        values = values_of(where, rule.partition_by)
        if values is not None:
            return _all([self.cache.key(value) for value in values])
        ids = values_of(where, "id") if rule.unique_ids else None
        if ids is None:
            return None
        places = [self.cache.place(id_) for id_ in ids]
        return _all([place and place[0] for place in places])

    async def _located(self, where: Mapping[str, Any]) -> list[Key] | None:
        """The partitions of documents of which only the ids are known: one record of each tells."""
        ids = values_of(where, "id") if self.cache.rule.unique_ids else None
        if ids is None:
            return None
        states = [self._state(row) for row in await self._rows({"id": {"$in": list(ids)}})]
        return _all([state.key for state in states])

    def _partitions(self, keys: Sequence[Key]) -> list[Partition] | None:
        partitions = []
        for key in keys:
            partition = self.cache.get(key)
            if partition is None:
                return None
            partitions.append(partition)
        return partitions

    def _candidates(self, where: Mapping[str, Any], partitions: Sequence[Partition]) -> Candidates:
        rule = self.cache.rule
        if rule.unique_ids and (ids := values_of(where, "id")) is not None:
            return self._by_ids(ids, partitions)
        if len(partitions) == 1:
            (partition,) = partitions
            least = least_of(where, rule.sequence) if rule.sequence else None
            return Candidates(partition.since(least, self.cache.facts), partition.ordered, partition.rising)
        entries = sorted((entry for partition in partitions for entry in partition.entries), key=_record)
        return Candidates(entries, False, False)

    def _by_ids(self, ids: Sequence[Any], partitions: Sequence[Partition]) -> Candidates:
        entries = []
        for id_ in ids:
            place = self.cache.place(id_)
            for partition in partitions:
                if place is not None and place[0] == partition.key:
                    entries.append(partition.entries[partition.index(place[1])])
        entries.sort(key=_record)
        return Candidates(entries, len(entries) < 2, False)

    # loads

    async def _refreshed(self, key: Key) -> None:
        """Load a partition, or what is in doubt in it, or wait for whoever does."""
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self._refresh(key))
            task.add_done_callback(lambda done: self._ended(key, done))
        await asyncio.shield(task)

    def _ended(self, key: Key, task: asyncio.Task[None]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # whoever waited has it; that nobody did is no reason for a warning

    async def _refresh(self, key: Key) -> None:
        again = self.cache.begin_again(key)
        reading = again or self.cache.begin(key)
        try:
            if again is not None:
                rows = (await self._reader.by_ids(sorted(again.records))).values()
                self.cache.settle(again, {row.id: self._state(row) for row in rows})
                return
            by = self.cache.rule.partition_by
            found = await self._rows({by: {"$eq": self.cache.value(key)}} if by else {})
            self.cache.load(reading, map(self._state, found))
        finally:
            self.cache.abandon(reading)

    async def _rows(self, where: Mapping[str, Any]) -> list[Row]:
        """The records that match; or so many that it is clear that they are too many to be kept."""
        predicate = compile_where(where)
        rows: list[Row] = []
        async for row in self._reader.all(self._filters.narrow(where) or ()):
            if predicate(self._codec.document(row)):
                rows.append(row)
                if len(rows) > self.cache.rule.max_documents:
                    break
        return rows

    def _state(self, row: Row) -> State:
        document = self._codec.document(row)
        return self.cache.state(row.id, row.rev, document, dumps(document))


def _all(keys: Sequence[Key | None]) -> list[Key] | None:
    """Each key once; None where one of them is unknown."""
    return None if None in keys else [key for key in dict.fromkeys(keys) if key is not None]


def _first_match(entries: Sequence[Entry], predicate: Predicate) -> Match | None:
    for entry in entries:
        document = loads(entry.document)
        if predicate(document):
            return Match(entry.record, document)
    return None
