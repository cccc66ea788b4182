"""One partition: all documents of a collection that share a key, as bytes, in the order of their insertion.

A document is kept as its JSON and decoded anew for each reader, so nobody can change what another one reads, and
the garbage collector has nothing to look at: entries and partitions hold strings, bytes and tuples alone.
Partitions never change; a change makes a new one, so whoever looks at one sees one state.

Does no I/O and never awaits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, Final, cast

import msgspec
from msgspec import Struct

from pb_cached.exact import Json, loads

Key = str | tuple[Any, ...]
"""What partitions are looked up by, over all collections: the collection's number, and the values that the
partition's documents share. See `CollectionCache.key`."""

ENTRY_BYTES: Final = 300
"""What a document takes beside its JSON: the entry, the record's id, and its places in the indexes. Measured, as
the other two, on 200,000 documents: `python -m bench --only memory`."""
PARTITION_BYTES: Final = 340
"""What a partition takes beside its entries: itself, its key, its place in the LRU."""
SINGLE_BYTES: Final = 480
"""What a document that is a partition by itself takes beside its JSON, all of it together."""

_record: Final = attrgetter("record")
_decode: Final = msgspec.json.Decoder(list[Any]).decode


class Entry(Struct, frozen=True, gc=False, eq=False):
    """One document: the record that holds it, how often it was changed, and its JSON."""

    record: str
    rev: int
    document: bytes


class Facts(Struct, gc=False):
    """The fields that order documents, decoded without the rest."""

    creation_utc: Any = None
    id: Any = None
    sequence: Any = None


class FactReader:
    """Decodes `Facts` of documents whose order among themselves stands in the field `sequence`, if any."""

    def __init__(self, sequence: str | None) -> None:
        self._sequence = sequence
        fields = [(name, Any, None) for name in ("creation_utc", "id")]
        kind = (
            msgspec.defstruct("Facts", [*fields, ("sequence", Any, None)], rename={"sequence": sequence}, gc=False)
            if sequence
            else msgspec.defstruct("Facts", fields, namespace={"sequence": None}, gc=False)
        )
        self._decode: Callable[[bytes], Facts] = msgspec.json.Decoder(cast(type[Facts], kind)).decode

    def __call__(self, document: bytes) -> Facts:
        try:
            return self._decode(document)
        except msgspec.DecodeError:  # lone surrogates
            whole = loads(document)
            sequence = whole.get(self._sequence) if self._sequence else None
            return Facts(whole.get("creation_utc"), whole.get("id"), sequence)


class Single(Entry, frozen=True, gc=False, eq=False):
    """A partition of one document. Where each document is one, a quarter of their memory would be the rest."""

    key: Key

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self,)

    @property
    def size(self) -> int:
        return len(self.document) + SINGLE_BYTES

    @property
    def ordered(self) -> bool:
        return True

    @property
    def rising(self) -> bool:
        return False


class Several(Struct, frozen=True, gc=False, eq=False):
    """A partition of any number of documents, by the rising ids of their records.

    `ordered`: they also rise strictly by `creation_utc` and `id`, the order in which they are found.
    `rising`: they also rise strictly by `sequence`, all of them integers, so that it can be bisected.
    """

    key: Key
    entries: tuple[Entry, ...]
    size: int
    ordered: bool
    rising: bool


Partition = Single | Several
"""Complete: a document of this key that is not here does not exist."""


def partition_of(key: Key, entries: Iterable[Entry], facts: FactReader) -> Partition:
    """The partition that holds these entries and no others."""
    ordered = tuple(sorted(entries, key=_record))
    if len(ordered) == 1:
        (entry,) = ordered
        return Single(entry.record, entry.rev, entry.document, key)
    size = PARTITION_BYTES + sum(map(weight, ordered))
    return Several(key, ordered, size, *_order(ordered, facts))


def find(partition: Partition, record: str) -> Entry | None:
    """The record's entry."""
    entries = partition.entries
    at = bisect_left(entries, record, key=_record)
    return entries[at] if at < len(entries) and entries[at].record == record else None


def put(partition: Partition, entry: Entry, facts: FactReader) -> Partition:
    """The partition with this entry, in the place of the same record's if there is one."""
    if isinstance(partition, Single):
        others = () if partition.record == entry.record else (partition,)
        return partition_of(partition.key, (*others, entry), facts)
    entries = partition.entries
    is_last = not entries or entries[-1].record < entry.record  # as most are
    at = len(entries) if is_last else bisect_left(entries, entry.record, key=_record)
    replaced = entries[at : at + 1] if at < len(entries) and entries[at].record == entry.record else ()
    before, after = entries[:at], entries[at + len(replaced) :]
    if not (before or after):
        return partition_of(partition.key, (entry,), facts)
    # What stood out of order may stand so no longer: that it is not noticed costs time, and no answer.
    ordered, rising = _order((*before[-1:], entry, *after[:1]), facts)
    return Several(
        partition.key,
        (*before, entry, *after),
        partition.size + weight(entry) - sum(map(weight, replaced)),
        partition.ordered and ordered,
        partition.rising and rising,
    )


def drop(partition: Partition, record: str, facts: FactReader) -> Partition:
    """The partition without the record's entry."""
    left = tuple(entry for entry in partition.entries if entry.record != record)
    if len(left) < 2:
        return partition_of(partition.key, left, facts)
    size = PARTITION_BYTES + sum(map(weight, left))
    return Several(partition.key, left, size, partition.ordered, partition.rising)


def since(partition: Partition, least: int | None, facts: FactReader) -> tuple[Entry, ...]:
    """The entries whose `sequence` is at least this; all of them where it is not rising."""
    entries = partition.entries
    if least is None or not partition.rising:
        return entries

    def sequence(entry: Entry) -> int:
        return facts(entry.document).sequence  # type: ignore[no-any-return]

    # Most ask for what is new, which stands at the end: look there first, in strides that grow.
    end = len(entries)
    start, stride = end, 1
    while start > 0 and sequence(entries[start - 1]) >= least:
        end, start, stride = start, max(0, start - stride), stride * 2
    return entries[bisect_left(entries, least, start, end, key=sequence) :]


def highest(partition: Partition, facts: FactReader) -> int:
    """The highest `sequence`; -1 where there is none."""
    entries = partition.entries[-1:] if partition.rising else partition.entries
    numbers = [facts(entry.document).sequence for entry in entries]
    return max((number for number in numbers if type(number) is int), default=-1)


def position(facts: Facts) -> tuple[str, str]:
    """Where a document stands among those that are found."""
    return facts.creation_utc if isinstance(facts.creation_utc, str) else "", str(facts.id or "")


def weight(entry: Entry) -> int:
    """The bytes of memory that an entry takes among several."""
    return len(entry.document) + ENTRY_BYTES


def decoded(entries: Sequence[Entry]) -> list[dict[str, Json]]:
    """The documents: new objects at each call."""
    try:
        return _decode(b"[" + b",".join([entry.document for entry in entries]) + b"]")
    except msgspec.DecodeError:  # lone surrogates
        return [loads(entry.document) for entry in entries]


def _order(entries: Sequence[Entry], facts: FactReader) -> tuple[bool, bool]:
    """Are they `ordered`, and `rising`?"""
    ordered = rising = True
    before: Facts | None = None
    for entry in entries:
        each = facts(entry.document)
        ordered = ordered and (before is None or position(before) < position(each))
        rising = rising and type(each.sequence) is int and (before is None or before.sequence < each.sequence)
        before = each
    return ordered, rising
