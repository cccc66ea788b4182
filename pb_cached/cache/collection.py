"""The cache of one collection. There is one way into it, `apply`, whoever made the change.

What is known of a record is its revision, and three rules decide about a change that arrives:

* a revision that follows the cached one replaces it;
* one that is already known, or that a deletion or a move has overtaken, is dropped;
* everything else is doubt, and a record in doubt is read again before its partition answers.

Reads of PocketBase, of a whole partition or of records in doubt, are under way while changes arrive, and nothing
tells which of the two is later. So each `Reading` gathers the changes of its time, and joins them with its rows by
the same rules when it has ended. Hence the same changes, in any order, repeated or not, end in the same state.

Whatever may make a partition answer differently is told to its `watches`, also where the partition is not cached.
That it is forgotten changes no answer.

Does no I/O and never awaits: every method is one step, and nothing can come between its looking and its acting.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from cachetools import TTLCache
from msgspec import Struct

from pb_cached.cache.memory import Memory
from pb_cached.cache.partition import (
    Entry,
    FactReader,
    Key,
    Partition,
    drop,
    find,
    highest,
    partition_of,
    put,
)
from pb_cached.cache.stats import CollectionStats
from pb_cached.cache.watches import Watches

REMEMBERED: Final = 100_000
"""Deletions and moves that are kept in mind at most."""
REMEMBERED_SECONDS: Final = 120.0
"""How late a change may arrive and still be known as overtaken."""
AVOIDED: Final = 10_000
AVOIDED_SECONDS: Final = 60.0
"""How long a partition is read through that is too large, or that an unfinished write may still change."""
HOLES: Final = 1000
"""Missing numbers that are waited for; beyond them the partition is read again at once."""

SAMPLED: Final = 100_000
"""Records among which a sample is taken: to step over more takes more than a millisecond."""

DELETED: Final = 2**63
"""The revision of what is deleted: no change follows it."""


class Rule(Struct, frozen=True):
    """How a collection is cached."""

    partition_by: tuple[str, ...] = ("id",)
    """The fields whose values the documents of a partition share; `id` for document by document; none for one
    partition that holds the whole collection."""
    sequence: str | None = None
    """An integer field that numbers the documents of a partition from 0, without holes."""
    unique_ids: bool = False
    """No two documents have the same `id`, so an id tells the partition."""
    max_documents: int = 10_000
    """A partition beyond it is read through."""


class State(Struct, frozen=True, gc=False):
    """A record as a change or a read tells it."""

    record: str
    rev: int
    document: bytes | None = None
    """JSON; None where the record is deleted."""
    key: Key | None = None
    """The partition that it belongs to; None where it belongs to none that can be kept."""
    doc_id: str | None = None


class Reading:
    """A read of PocketBase that is under way: of a partition, or of records; and the changes of its time."""

    def __init__(self, key: Key | None, records: frozenset[str]) -> None:
        self.key = key
        self.records = records
        self.changes: dict[str, State] = {}
        self.altered: dict[str, tuple[int, Key | None]] = {}
        self.doubts: set[str] = set()
        self.void = False

    def note(self, change: State, doubtful: bool = False) -> None:
        if doubtful:
            self.doubts.add(change.record)
        known = self.changes.get(change.record)
        if known is None or change.rev > known.rev:
            self.changes[change.record] = change
        elif change.rev == known.rev and change.document != known.document:
            self.doubts.add(change.record)

    def joined(self, record: str, row: State | None) -> State | None:
        """What a record is, by this read's row and by what changed meanwhile."""
        state = self._newer(record, row)
        rev, to = self.altered.get(record, (0, None))
        if rev and (state.rev < rev if state is not None else to is not None and to == self.key):
            self.doubts.add(record)
        return state

    def _newer(self, record: str, row: State | None) -> State | None:
        change = self.changes.get(record)
        if change is None:
            return row
        if change.document is None:
            return None
        if row is None:
            if change.rev > 1:  # it came here from elsewhere, or its deletion is still on its way
                self.doubts.add(record)
            return change
        if change.rev > row.rev + 1 or (change.rev == row.rev and change.document != row.document):
            self.doubts.add(record)
        return change if change.rev > row.rev else row


class Counters:
    """What a collection's cache has done since it was made, and the bytes that it takes: see `CollectionStats`."""

    __slots__ = ("bytes", "evictions", "hits", "loads", "misses", "negative_hits", "rereads", "through")

    def __init__(self) -> None:
        self.hits = self.negative_hits = self.misses = self.through = 0
        self.loads = self.rereads = self.evictions = self.bytes = 0


class CollectionCache:
    """Partitions of one collection, in a memory that several collections share.

    Mutable state, changed by the public methods alone: `_records` (where each cached record is) and `_ids` (which
    record has an id), in step with the partitions in `_memory`; `_doubts` and `_holes` (why a cached partition may
    not answer yet); `_gone` (what was deleted or moved on, up to which revision) and `_altered` (which revision
    there is at least of what is not cached); `_avoided`; `_readings`.
    """

    def __init__(self, rule: Rule, memory: Memory) -> None:
        self.rule = rule
        self.facts = FactReader(rule.sequence)
        self.stats = Counters()
        self.watches = Watches()
        self._memory = memory
        self._number = memory.join(self._evicted)
        self._records: dict[str, Key] = {}
        self._ids: dict[str, str] = {}
        self._doubts: dict[Key, set[str]] = {}
        self._holes: dict[Key, set[int]] = {}
        self._gone: TTLCache[str, int] = TTLCache(REMEMBERED, REMEMBERED_SECONDS)
        self._altered: TTLCache[str, int] = TTLCache(REMEMBERED, REMEMBERED_SECONDS)
        self._avoided: TTLCache[Key, None] = TTLCache(AVOIDED, AVOIDED_SECONDS)
        self._avoid_all_until = 0.0
        self._clock = time.monotonic
        self._readings: set[Reading] = set()

    def __len__(self) -> int:
        return len(self._records)

    def snapshot(self) -> CollectionStats:
        """The counters as they are now."""
        counted = {name: getattr(self.stats, name) for name in Counters.__slots__}
        return CollectionStats(documents=len(self), **counted)

    @property
    def max_bytes(self) -> int:
        """The most that the memory of all collections holds."""
        return self._memory.max_bytes

    @property
    def fullness(self) -> float:
        """The share of that memory which is in use."""
        return self._memory.bytes / self._memory.max_bytes if self._memory.max_bytes else 1.0

    # looking

    def get(self, key: Key) -> Partition | None:
        """A partition that may answer."""
        if key in self._doubts or key in self._holes:
            return None
        return self._memory.get(key)

    def key(self, *values: Any) -> Key | None:
        """The key of the partition whose documents have these values in `partition_by`; None for values that no
        partition can be kept for."""
        if len(values) == 1 and type(values[0]) is str:
            return f"{self._number}:{values[0]}"
        plain = [str.__str__(value) if isinstance(value, str) else value for value in values]
        if all(isinstance(value, str) for value in plain):
            parts = plain if len(plain) == 1 else [f"{len(value)}:{value}" for value in plain]
            return f"{self._number}:" + "".join(parts)
        # What is not equal to itself (NaN) would never be found again.
        if all(value is None or (isinstance(value, int | float | str) and value == value) for value in plain):
            return (self._number, *plain)
        return None

    def values(self, key: Key) -> Sequence[Any]:
        """The values that make this key."""
        if not isinstance(key, str):
            return key[1:]
        _, _, rest = key.partition(":")
        if len(self.rule.partition_by) == 1:
            return (rest,)
        values = []
        while rest:
            length, _, rest = rest.partition(":")
            values.append(rest[: int(length)])
            rest = rest[int(length) :]
        return values

    def key_of(self, record: str) -> Key | None:
        """The partition that a record is cached in."""
        return self._records.get(record)

    def entry(self, record: str) -> Entry | None:
        """A record, if it is cached."""
        key = self._records.get(record)
        partition = self._memory.peek(key) if key is not None else None
        return None if partition is None else find(partition, record)

    def sample(self) -> Key | None:
        """A partition that may answer, any of them; None where there is none. Of very many, one of the older
        ones."""
        if not self._records:
            return None
        place = random.randrange(min(len(self._records), SAMPLED))
        key = next(itertools.islice(self._records.values(), place, None))
        return None if key in self._doubts or key in self._holes else key

    def minds(self, key: Key) -> bool:
        """Does it make a difference to anybody what is in this partition?"""
        return (
            bool(self.watches)
            or self._memory.peek(key) is not None
            or any(reading.key == key for reading in self._readings)
        )

    def place(self, doc_id: str) -> tuple[Key, str] | None:
        """The partition and the record of the document with this id, where ids are unique."""
        record = self._ids.get(doc_id)
        return None if record is None else (self._records[record], record)

    def state(self, record: str, rev: int, document: Mapping[str, Any], json: bytes) -> State:
        """A record with this document, as a change or a read tells it."""
        id_ = document.get("id")
        key = self.key(*[document.get(field, ()) for field in self.rule.partition_by])
        # A copy, as an encoder's own result may sit in a buffer half as large again.
        return State(record, rev, bytes(memoryview(json)), key, id_ if isinstance(id_, str) else None)

    def may_keep(self, key: Key) -> bool:
        """Is this partition worth a load?"""
        if self._memory.max_bytes == 0 or key in self._avoided:
            return False
        return self._avoid_all_until == 0 or self._clock() >= self._avoid_all_until

    # changes

    def apply(self, change: State) -> None:
        """A record was created, updated or deleted, by whomever."""
        gone = self._gone.get(change.record, 0)
        if gone > change.rev:
            return
        known = gone == change.rev
        for reading in self._readings:
            reading.note(change, doubtful=known)
        at = self._records.get(change.record)
        if change.document is None:
            self._gone[change.record] = DELETED
            self._drop(change.record)
        elif at is None:
            self._apply_unknown(change, known)
        else:
            self._apply_known(change, at)
        # Also of what is known already: 1. somebody who watches has looked; 2. the partition was evicted; 3. it
        # was loaded for another reader, with this change; 4. now the change arrives, and is news to who watches.
        self.watches.changed(at, change.key)

    def edited(self, edit: State) -> None:
        """A foreign hand, a person in the dashboard say, wrote this state without regard for its revision."""
        for reading in self._readings:
            reading.note(edit, doubtful=True)
        self._gone[edit.record] = max(edit.rev, self._gone.get(edit.record, 0))
        at = self._records.get(edit.record)
        self._doubt(edit.record, at, edit.key)
        self.watches.changed(at, edit.key)

    def altered(self, record: str, rev: int, to: Key | None = None) -> None:
        """Somebody has made it this revision of a record, and does not say what it holds now.

        Args:
            to: the partition that it is in now, where that is said.
        """
        entry, at = self.entry(record), self._records.get(record)
        if not (entry is not None and entry.rev >= rev) and self._gone.get(record, 0) < rev:
            for reading in self._readings:
                reading.altered[record] = rev, to
            if at is None:  # its creation may be late, and is then overtaken already
                self._altered[record] = max(rev, self._altered.get(record, 0))
            self._doubt(record, at, to)
        if at is None and to is None:
            self.watches.all_changed()
        else:
            self.watches.changed(at, to)

    def glimpsed(self, record: str, rev: int, key: Callable[[], Key | None]) -> None:
        """Somebody was told of this revision of a record, by PocketBase itself: nobody may find an older one here
        from now on.

        Args:
            key: tells the partition that it is in, where that matters.
        """
        at = self._records.get(record)
        if at is None:
            if self._gone.get(record, 0) <= rev:
                self._doubt(record, key())
        elif (entry := self.entry(record)) is not None and entry.rev < rev:
            self._doubt(record, at, key())

    def _apply_unknown(self, change: State, known: bool) -> None:
        if change.key is None or (partition := self._memory.peek(change.key)) is None:
            return
        self._look_for_holes(partition, change)
        if change.rev > 1 or known or self._altered.get(change.record, 0) > change.rev:
            self._doubt(change.record, change.key)
        else:
            self._put(change)

    def _apply_known(self, change: State, at: Key) -> None:
        entry = self.entry(change.record)
        assert entry is not None
        if change.rev == entry.rev + 1:
            if change.key == at:
                self._unlink_id(entry)
            else:
                self._gone[change.record] = change.rev
                self._drop(change.record)
            self._put(change)
        elif change.rev > entry.rev or (change.rev == entry.rev and change.document != entry.document):
            self._doubt(change.record, at, change.key)

    def avoid(self, key: Key | None) -> None:
        """A write whose outcome is unknown may change this partition yet: read it through for a while. None where
        it may be any."""
        if key is None:
            self._avoid_all_until = self._clock() + AVOIDED_SECONDS
            self.clear()
            return
        self._avoided[key] = None
        self.forget(key)
        for reading in self._readings:
            reading.void = True
        self.watches.changed(key)

    def distrust(self, key: Key) -> None:
        """PocketBase holds something in this partition that the cache does not know of: the next reader loads it
        anew, and does not make do with a load that began before."""
        self.overtaken(key)
        self.watches.changed(key)

    def overtaken(self, key: Key) -> None:
        """Somebody has read this partition from PocketBase itself, and must find no older one here. To who watches
        that is no news."""
        self.forget(key)
        for reading in self._readings:
            if reading.key == key:
                reading.void = True

    def forget(self, key: Key) -> None:
        """Drop a partition. The next reader loads it anew."""
        partition = self._memory.remove(key)
        if partition is not None:
            self._unlink(partition)

    def clear(self) -> None:
        """Drop everything, and what running reads are about to bring."""
        for key in self._memory.of(self._number):
            self.forget(key)
        for reading in self._readings:
            reading.void = True
        self.watches.all_changed()

    def restart(self) -> None:
        """PocketBase was restored from a backup: drop everything, also what was known to be deleted."""
        self._gone.clear()
        self._altered.clear()
        self.clear()

    # reads of PocketBase

    def begin(self, key: Key) -> Reading:
        """A read of a whole partition begins: from now on changes are gathered for it."""
        return self._begun(Reading(key, frozenset()))

    def is_doubtful(self, key: Key) -> bool:
        """Does the partition wait for nothing but records in doubt to be read again?"""
        return key in self._doubts and key not in self._holes

    def begin_again(self) -> Reading:
        """A read of all records in doubt begins."""
        return self._begun(Reading(None, frozenset().union(*self._doubts.values())))

    def _begun(self, reading: Reading) -> Reading:
        self._readings.add(reading)
        return reading

    def abandon(self, reading: Reading) -> None:
        """The read failed."""
        self._readings.discard(reading)

    def load(self, reading: Reading, rows: Iterable[State]) -> None:
        """The read of a partition has ended."""
        self._readings.discard(reading)
        if reading.void:
            return
        key = reading.key
        assert key is not None
        self.stats.loads += 1
        found = {row.record: row for row in rows}
        records = found.keys() | reading.changes.keys() | reading.altered.keys()
        states = [reading.joined(record, found.get(record)) for record in records]
        mine = [state for state in states if state is not None and state.key == key]
        # That it comes here changes no answer. Who looks, in a memory too small for all that he looks at, would be
        # woken by his own look, for ever.
        changed: list[Key] = [key] if self._memory.peek(key) is not None else []
        self.forget(key)
        partition = partition_of(key, [_entry(state) for state in mine], self.facts)
        if len(mine) > self.rule.max_documents or not self._memory.fits(partition):
            self._avoided[key] = None
            self.watches.changed(*changed)
            return
        for state in mine:
            elsewhere = self._records.get(state.record)
            if elsewhere is not None:  # it has moved, and nobody told
                self._drop(state.record)
                self._doubt(state.record, elsewhere)
                changed.append(elsewhere)
                reading.doubts.add(state.record)
            self._link(state, key)
        for record in reading.doubts:
            self._doubts.setdefault(key, set()).add(record)
        self.stats.bytes += partition.size
        self._memory.add(partition)
        self.watches.changed(*changed)

    def settle(self, reading: Reading, rows: Mapping[str, State]) -> None:
        """The read of records in doubt has ended: what is not among the rows is not there."""
        self._readings.discard(reading)
        if reading.void:
            return
        self.stats.rereads += 1
        changed: set[Key | None] = set()
        for record in reading.records:
            state = reading.joined(record, rows.get(record))
            for key in [key for key, records in self._doubts.items() if record in records]:
                self._doubts[key].discard(record)
                if not self._doubts[key]:
                    del self._doubts[key]
                changed.add(key)
            changed.add(self._records.get(record))
            if state is not None and state.key is not None and (to := self._memory.peek(state.key)) is not None:
                self._look_for_holes(to, state)
            self._drop(record)
            if state is not None:
                changed.add(state.key)
                self._put(state)
                if record in reading.doubts:
                    self._doubt(record, state.key)
        self.watches.changed(*changed)

    # steps

    def _put(self, state: State) -> None:
        """Lay a record into its partition, where that is kept."""
        if state.key is None or (partition := self._memory.peek(state.key)) is None:
            return
        after = put(partition, _entry(state), self.facts)
        if len(after.entries) > self.rule.max_documents or not self._memory.fits(after):
            self._avoided[partition.key] = None
            self.forget(partition.key)
            return
        self._link(state, partition.key)
        self._replace(partition, after)

    def _drop(self, record: str) -> None:
        """Take a record out of the partition that it is in."""
        key = self._records.pop(record, None)
        partition = self._memory.peek(key) if key is not None else None
        entry = find(partition, record) if partition is not None else None
        if partition is None or entry is None:
            return
        self._unlink_id(entry)
        self._replace(partition, drop(partition, record, self.facts))

    def _replace(self, before: Partition, after: Partition) -> None:
        self.stats.bytes += after.size - before.size
        self._memory.replace(before, after)

    def _link(self, state: State, key: Key) -> None:
        """Note where a record is. The key is the partition's own, so that there is one object of it."""
        self._records[state.record] = key
        if self.rule.unique_ids and state.doc_id is not None:
            self._ids[state.doc_id] = state.record

    def _unlink_id(self, entry: Entry) -> None:
        if self.rule.unique_ids:
            id_ = self.facts(entry.document).id
            if self._ids.get(id_) == entry.record:
                del self._ids[id_]

    def _unlink(self, partition: Partition) -> None:
        self.stats.bytes -= partition.size
        self._doubts.pop(partition.key, None)
        self._holes.pop(partition.key, None)
        for entry in partition.entries:
            if self._records.get(entry.record) == partition.key:
                del self._records[entry.record]
            self._unlink_id(entry)

    def _evicted(self, partition: Partition) -> None:
        self.stats.evictions += 1
        self._unlink(partition)

    def _doubt(self, record: str, *keys: Key | None) -> None:
        for key in keys:
            if key is not None and self._memory.peek(key) is not None:
                self._doubts.setdefault(key, set()).add(record)

    def _look_for_holes(self, partition: Partition, new: State) -> None:
        """A number that does not follow the highest one leaves a hole, which may be a change that is late."""
        if self.rule.sequence is None or new.document is None:
            return
        number = self.facts(new.document).sequence
        if type(number) is not int:
            return
        holes = self._holes.get(partition.key)
        known = highest(partition, self.facts)
        if holes is None:
            if number <= known + 1:
                return
            holes = set()
        if number in holes:
            holes.discard(number)
        elif number > known + 1:
            holes |= set(range(known + 1, min(number, known + 1 + HOLES)))
        if holes:
            self._holes[partition.key] = holes
        else:
            self._holes.pop(partition.key, None)


def _entry(state: State) -> Entry:
    assert state.document is not None
    return Entry(state.record, state.rev, state.document)
