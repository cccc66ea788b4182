"""What others' commits do to the cache of one collection.

A commit carries what it has changed, so it is applied, and not merely taken as a reason to read again. Where it
does not say enough (a column that holds a value's image, a schema that is not ours, a record that was changed by
a foreign hand) there is doubt, and doubt is resolved by reading.

Does no I/O and never awaits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pb_cached.cache.collection import DELETED, CollectionCache, State
from pb_cached.coherence.entries import Payload
from pb_cached.errors import SchemaError
from pb_cached.exact import dumps, loads
from pb_cached.pocketbase.codec import RecordCodec, Row


class FollowedCollection:
    """The cache of a collection, as the feed sees it. Holds no state of its own."""

    def __init__(self, cache: CollectionCache, codec: RecordCodec, state: Callable[[Row], State]) -> None:
        """
        Args:
            state: a record as the cache takes it.
        """
        self.cache = cache
        self.codec = codec
        self._state = state

    def apply(self, layout: str, payload: Payload) -> list[str]:
        """Make the cache what a commit has made of PocketBase. Returns the records of which it does not tell
        enough: whoever reads them tells it what they are now."""
        unclear: list[str] = []
        is_ours = layout == self.codec.commit_layout
        if any(self.cache.key_of(values[0]) is None for values in payload.d):
            self.cache.watches.all_changed()  # nobody knows where they were
        for values in payload.d:
            self.cache.apply(State(values[0], DELETED))
        for values in payload.u:
            if not is_ours:
                self.cache.altered(values[0], values[1] + 1)
                if self.cache.key_of(values[0]) is None:  # and may have come to a partition that is cached
                    unclear.append(values[0])
            elif not self._update(values):
                self._alter(values)
        for values in payload.c:
            if not (is_ours and self._insert(values)):
                unclear.append(values[0])
        return unclear

    def restored(self) -> None:
        """PocketBase is not what it was: nothing holds that was known of its records."""
        self.cache.restart()

    def deleted(self, record: str) -> None:
        """A foreign hand has deleted a record."""
        if self.cache.key_of(record) is None:
            self.cache.watches.all_changed()
        self.cache.apply(State(record, DELETED))

    def changed(self, row: Row) -> None:
        """Somebody has made this of a record, and whoever does so raises its revision."""
        self.cache.apply(self._state(row))

    def edited(self, row: Row) -> None:
        """A foreign hand has made this of a record, or somebody whose commits we cannot read."""
        self.cache.edited(self._state(row))

    def _insert(self, values: Sequence[Any]) -> bool:
        key = self._key(values)
        if key is not None and not self.cache.minds(key):
            return True
        sequence = self.cache.rule.sequence
        if sequence is not None and self.codec.is_open(values, sequence):
            return False
        try:
            document = self.codec.inserted(values)
        except (SchemaError, ValueError):
            return False
        self.cache.apply(self.cache.state(values[0], 1, document, dumps(document)))
        return True

    def _update(self, values: Sequence[Any]) -> bool:
        record, rev = values[0], values[1]
        entry = self.cache.entry(record)
        if entry is None or entry.rev != rev:
            return False
        try:
            document = self.codec.updated(loads(entry.document), values)
        except SchemaError:
            return False
        if document is None:
            return False
        self.cache.apply(self.cache.state(record, rev + 1, document, dumps(document)))
        return True

    def _alter(self, values: Sequence[Any]) -> None:
        """An update does not tell what it has left. Where it moves the record, nobody knows from where."""
        named = [self.codec.named(values, field) for field in self.cache.rule.partition_by]
        if not any(is_named for is_named, _ in named):
            self.cache.altered(values[0], values[1] + 1)
        elif all(value is not None for _, value in named):
            self.cache.altered(values[0], values[1] + 1, self.cache.key(*(value for _, value in named)))
        else:
            self.cache.clear()

    def _key(self, values: Sequence[Any]) -> Any:
        """The partition that an inserted record belongs to, where that can be told without decoding it."""
        parts = []
        for field in self.cache.rule.partition_by:
            is_told, value = self.codec.told(values, field)
            if not is_told:
                return None
            parts.append(value)
        return self.cache.key(*parts)
