"""Answers by the cache. What it lacks is loaded; what no partition can answer goes to PocketBase.

What PocketBase has committed can be read from it a moment before its answer has reached us, and with it the cache.
So a read that went to PocketBase waits for the commit under way: else its reader could find the cache to be older.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Final, NamedTuple, TypedDict, TypeVar

import msgspec
from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import CollectionSort

from pb_cached.cache.collection import DELETED, CollectionCache, State
from pb_cached.cache.partition import Entry, Key, Partition, decoded, find, since
from pb_cached.cache.predicate import Predicate, compile_where
from pb_cached.cache.query import MOST_VALUES, keys_of, least_of, only_key, values_of
from pb_cached.errors import SchemaError
from pb_cached.exact import Json, loads
from pb_cached.pocketbase.codec import RecordCodec, Row
from pb_cached.pocketbase.commit import Operation, Reply
from pb_cached.pocketbase.schema import Kind
from pb_cached.reading.direct import DirectReads, Document, Found, Match
from pb_cached.reading.loads import Loader
from pb_cached.reading.order import Position, first_of, is_beyond, position
from pb_cached.reading.watched import Watched

ROUNDS: Final = 5
"""How often partitions are refreshed for one reader before the reader goes to PocketBase."""

_record: Final = attrgetter("record")

T = TypeVar("T")


class Candidates(NamedTuple):
    """The entries among which all matches are."""

    entries: Sequence[Entry]
    matches: Predicate | None
    """Which of them match; None where all of them do."""
    ordered: bool
    """They rise strictly by `creation_utc` and `id`."""
    rising: bool
    """They rise strictly by the partition's sequence."""

    def documents(self) -> list[Document]:
        """The matches, in the order of their insertion."""
        found = decoded(self.entries)
        matches = self.matches
        return found if matches is None else [document for document in found if matches(document)]

    def exist(self) -> bool:
        """Is there a match?"""
        return bool(self.entries) if self.matches is None else self.first() is not None

    def first(self, *, last: bool = False) -> Match | None:
        """The first match, or the last one. Nothing behind it is decoded."""
        for entry in reversed(self.entries) if last else self.entries:
            document = loads(entry.document)
            if self.matches is None or self.matches(document):
                return Match(entry.record, document, entry.rev)
        return None


class CachedReads(Watched):
    """Reads of one collection through its cache, and the one place that tells the cache of our own commits."""

    def __init__(
        self,
        cache: CollectionCache,
        loader: Loader,
        direct: DirectReads,
        codec: RecordCodec,
        settled: Callable[[], Awaitable[None]],
        may_answer: Callable[[], bool],
    ) -> None:
        """
        Args:
            settled: returns when the commit under way, if it touches the collection, is decided.
            may_answer: is the cache known to be fresh enough?
        """
        self._may_answer = may_answer
        places = TypedDict("places", dict.fromkeys(("id", *cache.rule.partition_by), Any), total=False)  # type: ignore[misc]
        self._places = msgspec.json.Decoder(places).decode
        super().__init__(cache)
        self.loader = loader
        self._direct = direct
        self._codec = codec
        self._settled = settled

    # answers

    async def find(
        self, where: Mapping[str, Any], limit: int | None, descending: bool, at: Position | None
    ) -> Found:
        hit = candidates = self._at_hand(where)
        if candidates is None and (candidates := await self._fetched(where)) is None:
            return await self._through(self._direct.find(where, limit, descending, at), where)
        found = candidates.documents()
        if at is not None:
            found = list(filter(is_beyond(at, descending), found))
        if not candidates.ordered:
            found.sort(key=position, reverse=descending)
        elif descending:
            found.reverse()
        if hit:
            self._count(bool(found))
        return Found(found if limit is None else found[:limit], len(found))

    async def first(self, where: Mapping[str, Any]) -> Match | None:
        hit = candidates = self._at_hand(where)
        if candidates is None and (candidates := await self._fetched(where)) is None:
            return await self._through(self._direct.first(where), where)
        match = candidates.first()
        if hit:
            self._count(match is not None)
        return match

    async def first_sorted(self, where: Mapping[str, Any], sort: CollectionSort) -> Document | None:
        hit = candidates = self._at_hand(where)
        if candidates is None and (candidates := await self._fetched(where)) is None:
            return await self._through(self._direct.first_sorted(where, sort), where)
        if candidates.rising and len(sort) == 1 and sort[0][0] == self.cache.rule.sequence:
            match = candidates.first(last=sort[0][1] == SortDirection.DESC)
            document = match.document if match else None
        else:
            document = first_of(candidates.documents(), sort)
        if hit:
            self._count(document is not None)
        return document

    async def exists(self, where: Mapping[str, Any]) -> bool:
        found = self.exists_at_hand(where)
        if found is not None:
            return found
        candidates = await self._fetched(where)
        if candidates is None:
            return await self._through(self._direct.exists(where), where)
        return candidates.exist()

    def exists_at_hand(self, where: Mapping[str, Any]) -> bool | None:
        """`exists`, if it takes nothing that is not in memory; else None."""
        candidates = self._at_hand(where)
        if candidates is None:
            return None
        found = candidates.exist()
        self._count(found)
        return found

    async def greatest(self, where: Mapping[str, Any], field: str) -> Json:
        at_hand = self.greatest_at_hand(where, field)
        if at_hand is not None:
            return at_hand[0]
        candidates = await self._fetched(where)
        if candidates is None:
            return await self._through(self._direct.greatest(where, field), where)
        return self._greatest(candidates, field)

    def greatest_at_hand(self, where: Mapping[str, Any], field: str) -> tuple[Json] | None:
        """`greatest`, if it takes nothing that is not in memory; else None."""
        candidates = self._at_hand(where)
        if candidates is None:
            return None
        greatest = self._greatest(candidates, field)
        self._count(greatest is not None)
        return (greatest,)

    def _greatest(self, candidates: Candidates, field: str) -> Json:
        if candidates.rising and candidates.matches is None and field == self.cache.rule.sequence:
            return self.cache.facts(candidates.entries[-1].document).sequence if candidates.entries else None
        document = first_of(candidates.documents(), ((field, SortDirection.DESC),))
        return document.get(field) if document else None

    async def _through(self, read: Awaitable[T], where: Mapping[str, Any]) -> T:
        self.cache.stats.through += 1
        found = await read
        # What the reader has not found may be cached still: 1. another server deletes a record; 2. the reader,
        # for whom the cache may not answer at this moment, is told so by PocketBase; 3. the cache may answer
        # again, and has not heard of the deletion yet.
        keys = keys_of(where, self.cache)
        for key in (self._keys_by_ids(where) if keys is None else keys) or ():
            self.cache.overtaken(key)
        await self._settled()
        return found

    def _count(self, found: bool) -> None:
        if found:
            self.cache.stats.hits += 1
        else:
            self.cache.stats.negative_hits += 1

    # what became of our own operations

    def committed(self, operation: Operation, reply: Reply) -> None:
        """PocketBase has committed an operation on this collection."""
        if operation.method == "DELETE" or reply.record == b"":
            self.gone(operation)
        elif reply.record is None:
            self.cache.apply(self._state(operation))
        else:
            try:
                self.cache.apply(self.loader.state(self._codec.row(reply.record)))
            except SchemaError:  # somebody has taken a column away, and the write will be repeated
                self.cache.clear()

    def seen(self, record: str, row: Row | None) -> None:
        """This is what PocketBase has of a record that others have changed; None where they have deleted it."""
        self.cache.apply(State(record, DELETED) if row is None else self.loader.state(row))

    def glimpsed(self, rows: Sequence[Row]) -> None:
        """Somebody reads these from PocketBase itself, and must not find older ones here afterwards."""
        for row in rows:
            self.cache.glimpsed(row.id, row.rev, partial(self._key, row))

    def _key(self, row: Row) -> Key | None:
        """The partition of a row; without decoding it, where its columns tell."""
        columns = [self._codec.columns.get(field) for field in self.cache.rule.partition_by]
        if not row.extra and all(column and column.kind is Kind.TEXT for column in columns):
            return self.cache.key(*[self._codec.held(row, field) for field in self.cache.rule.partition_by])
        return self.loader.state(row).key

    def forget(self, where: Mapping[str, Any]) -> None:
        """Most of these partitions' documents are about to go: each would cost as much as all that are left."""
        for key in keys_of(where, self.cache) or ():
            self.cache.forget(key)

    def gone(self, operation: Operation) -> None:
        """The operation's record does not exist any more."""
        self.cache.apply(State(operation.record_id, DELETED))

    def clashed(self, operation: Operation) -> None:
        """Another record has what must be unique, and it may be one that the cache does not know of."""
        for key in self._touched(operation) or ():
            self.cache.distrust(key)

    def uncertain(self, operation: Operation) -> None:
        """Nobody knows whether this operation was applied, or will be yet."""
        keys = self._touched(operation)
        if keys is None:
            self.cache.avoid(None)
        for key in keys or ():
            self.cache.avoid(key)

    def _touched(self, operation: Operation) -> Sequence[Key] | None:
        """The partitions that an operation changes; None where it may be any."""
        key = self._state(operation).key if operation.document else None
        if operation.method != "POST":
            known = self.cache.key_of(operation.record_id)
            if known is not None and operation.method == "PATCH" and key != known:
                return None
            key = known
        return None if key is None else (key,)

    def _state(self, operation: Operation) -> State:
        """What the record is after an insert or an update."""
        document = operation.document
        try:
            placed: Mapping[str, Any] = self._places(document)  # all that tells where it belongs
        except msgspec.DecodeError:  # lone surrogates
            placed = loads(document)
        return self.cache.state(operation.record_id, operation.rev + 1, placed, document)

    # candidates

    def _at_hand(self, where: Mapping[str, Any]) -> Candidates | None:
        """The candidates, if all that it takes is in memory."""
        if not self._may_answer():
            return None
        key = only_key(where, self.cache)
        if key is not None:
            partition = self.cache.get(key)
            return None if partition is None else self._within(partition, where)
        matches = compile_where(where)
        keys = keys_of(where, self.cache)
        if keys is None:
            keys = self._keys_by_ids(where)
        return None if keys is None else self._among(keys, where, matches)

    async def _fetched(self, where: Mapping[str, Any]) -> Candidates | None:
        """The candidates, when what was missing has been loaded; None where partitions cannot answer."""
        matches = compile_where(where)
        keys = keys_of(where, self.cache)
        if keys is None:
            keys = await self._located(where)
        if keys is None:
            return None
        for _ in range(ROUNDS):
            if not self._may_answer():
                return None
            missing = [key for key in keys if self.cache.get(key) is None]
            if not all(self.cache.may_keep(key) for key in missing):
                return None
            if missing:
                self.cache.stats.misses += 1
                await self.loader.refresh(missing)
            candidates = self._among(keys, where, matches)
            if candidates is not None and self._may_answer():
                return candidates
        return None

    def _within(self, partition: Partition, where: Mapping[str, Any]) -> Candidates:
        """The candidates of a query for just this partition: what makes its key need not be asked again."""
        rule = self.cache.rule
        if len(where) == len(rule.partition_by):
            return Candidates(partition.entries, None, partition.ordered, partition.rising)
        rest = {field: condition for field, condition in where.items() if field not in rule.partition_by}
        matches = compile_where(rest)
        if (ids := self._ids(rest)) is not None:
            return self._by_ids(ids, (partition,), matches)
        least = least_of(rest, rule.sequence) if rule.sequence else None
        return Candidates(since(partition, least, self.cache.facts), matches, partition.ordered, partition.rising)

    def _among(self, keys: Sequence[Key], where: Mapping[str, Any], matches: Predicate) -> Candidates | None:
        """The candidates of a query for these partitions; None where one of them is not at hand."""
        partitions = []
        for key in keys:
            partition = self.cache.get(key)
            if partition is None:
                return None
            partitions.append(partition)
        rule = self.cache.rule
        if (ids := self._ids(where)) is not None:
            return self._by_ids(ids, partitions, matches)
        if len(partitions) == 1:
            (partition,) = partitions
            least = least_of(where, rule.sequence) if rule.sequence else None
            entries = since(partition, least, self.cache.facts)
            return Candidates(entries, matches, partition.ordered, partition.rising)
        entries = tuple(sorted((entry for partition in partitions for entry in partition.entries), key=_record))
        return Candidates(entries, matches, False, False)

    def _by_ids(self, ids: Sequence[str], partitions: Sequence[Partition], matches: Predicate) -> Candidates:
        entries = []
        for id_ in ids:
            place = self.cache.place(id_)
            for partition in partitions:
                if place is not None and place[0] == partition.key:
                    entries += [entry for entry in (find(partition, place[1]),) if entry is not None]
        entries.sort(key=_record)
        return Candidates(entries, matches, len(entries) < 2, False)

    def _ids(self, where: Mapping[str, Any]) -> Sequence[str] | None:
        """The ids that the matches have, where ids are unique and so tell the documents."""
        ids = values_of(where, "id") if self.cache.rule.unique_ids else None
        if ids is None or len(ids) > MOST_VALUES or not all(isinstance(id_, str) for id_ in ids):
            return None
        return ids

    def _keys_by_ids(self, where: Mapping[str, Any]) -> list[Key] | None:
        """The partitions of documents of which only the ids are known, if all of them are cached."""
        ids = self._ids(where)
        if ids is None:
            return None
        places = [self.cache.place(id_) for id_ in ids]
        return None if None in places else list(dict.fromkeys(place[0] for place in places if place is not None))

    async def _located(self, where: Mapping[str, Any]) -> list[Key] | None:
        """The same, as PocketBase has it."""
        ids = self._ids(where)
        return None if ids is None else await self.loader.locate(ids)
