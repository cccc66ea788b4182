"""One partition: all documents of a collection that share a key, as bytes, in the order of their insertion.

A document is kept as its JSON and decoded anew for each reader, so nobody can change what another one reads, and
the garbage collector has nothing to look at: entries and partitions hold strings, bytes and tuples alone.

Does no I/O and never awaits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final, cast

import msgspec
from msgspec import Struct

from pb_cached.exact import Json, loads

Key = str | tuple[Any, ...]
"""What partitions are looked up by, over all collections: the collection's number, and the values that the
partition's documents share. See `CollectionCache.key`."""

ENTRY_BYTES: Final = 320
"""What a document takes beside its JSON: the entry, the record's id, and its places in the indexes."""
PARTITION_BYTES: Final = 350
"""What a partition takes beside its entries: itself, its key, its place in the LRU."""

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


def position(facts: Facts) -> tuple[str, str]:
    """Where a document stands among those that are found."""
    return str(facts.creation_utc or ""), str(facts.id or "")


class Partition(Struct, gc=False, eq=False):
    """Complete: a document of this key that is not here does not exist.

    `ordered`: the entries also rise strictly by `creation_utc` and `id`, the order in which they are found.
    `rising`: the entries also rise strictly by `sequence`, all of them integers, so that it can be bisected.
    """

    key: Key
    entries: tuple[Entry, ...] = ()
    size: int = PARTITION_BYTES
    ordered: bool = True
    rising: bool = True

    def index(self, record: str) -> int:
        """Where the record's entry is, or -1."""
        at = bisect_left(self.entries, record, key=_record)
        return at if at < len(self.entries) and self.entries[at].record == record else -1

    def put(self, entry: Entry, facts: FactReader) -> None:
        """Add an entry, or replace the one of the same record."""
        entries = self.entries
        if not entries or entries[-1].record < entry.record:
            self._note_order(entries[-1] if entries else None, entry, facts)
            self.entries = (*entries, entry)
            self.size += weight(entry)
            return
        at = bisect_left(entries, entry.record, key=_record)
        replaced = entries[at].record == entry.record
        self.entries = (*entries[:at], entry, *entries[at + replaced :])
        self.size += weight(entry) - (weight(entries[at]) if replaced else 0)
        self.look_at_order(facts)

    def drop(self, record: str) -> None:
        """Forget the record's entry. What is left is as ordered as it was."""
        at = self.index(record)
        if at >= 0:
            self.size -= weight(self.entries[at])
            self.entries = (*self.entries[:at], *self.entries[at + 1 :])

    def fill(self, entries: Sequence[Entry], facts: FactReader) -> None:
        """Hold these entries and no others."""
        self.entries = tuple(sorted(entries, key=_record))
        self.size = PARTITION_BYTES + sum(map(weight, self.entries))
        self.look_at_order(facts)

    def look_at_order(self, facts: FactReader) -> None:
        self.ordered = self.rising = True
        for before, after in zip((None, *self.entries), self.entries, strict=False):
            self._note_order(before, after, facts)
            if not (self.ordered or self.rising):
                return

    def since(self, least: int | None, facts: FactReader) -> tuple[Entry, ...]:
        """The entries whose `sequence` is at least this; all of them where it is not rising."""
        if least is None or not self.rising:
            return self.entries

        def sequence(entry: Entry) -> int:
            return facts(entry.document).sequence  # type: ignore[no-any-return]

        # Most ask for what is new, which stands at the end: look there first, in strides that grow.
        end = len(self.entries)
        start, stride = end, 1
        while start > 0 and sequence(self.entries[start - 1]) >= least:
            end, start, stride = start, max(0, start - stride), stride * 2
        return self.entries[bisect_left(self.entries, least, start, end, key=sequence) :]

    def highest(self, facts: FactReader) -> int:
        """The highest `sequence`; -1 where there is none."""
        if self.rising and self.entries:
            return facts(self.entries[-1].document).sequence  # type: ignore[no-any-return]
        numbers = [facts(entry.document).sequence for entry in self.entries]
        return max((number for number in numbers if type(number) is int), default=-1)

    def _note_order(self, before: Entry | None, after: Entry, facts: FactReader) -> None:
        later = facts(after.document)
        if type(later.sequence) is not int:
            self.rising = False
        if before is None:
            return
        sooner = facts(before.document)
        self.ordered = self.ordered and position(sooner) < position(later)
        self.rising = self.rising and sooner.sequence < later.sequence


def weight(entry: Entry) -> int:
    """The bytes of memory that an entry takes."""
    return len(entry.document) + ENTRY_BYTES


def decoded(entries: Sequence[Entry]) -> list[dict[str, Json]]:
    """The documents: new objects at each call."""
    try:
        return _decode(b"[" + b",".join([entry.document for entry in entries]) + b"]")
    except msgspec.DecodeError:  # lone surrogates
        return [loads(entry.document) for entry in entries]
