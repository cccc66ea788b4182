"""The memory that the caches of all collections share: partitions, the least recently used the first to go."""

from __future__ import annotations

import math
from collections.abc import Callable

from cachetools import Cache, LRUCache

from pb_cached.cache.partition import Key, Partition


class Memory:
    """At most `max_bytes` of partitions, overhead included.

    Mutable state: `_partitions`, and `bytes`, which is the sum of their sizes after every call.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        # Their sizes change while they are here, so they are counted here and not by the LRU.
        self._partitions: LRUCache[Key, Partition] = LRUCache(math.inf)
        self._owners: list[Callable[[Partition], None]] = []

    def join(self, evicted: Callable[[Partition], None]) -> int:
        """A number for a collection's keys, whose evicted partitions are reported to it."""
        self._owners.append(evicted)
        return len(self._owners) - 1

    def get(self, key: Key) -> Partition | None:
        """A partition, which is now the most recently used."""
        return self._partitions.get(key)

    def peek(self, key: Key) -> Partition | None:
        """A partition, which nobody uses by that."""
        return Cache.__getitem__(self._partitions, key) if key in self._partitions else None

    def fits(self, partition: Partition) -> bool:
        return partition.size <= self.max_bytes

    def add(self, partition: Partition) -> None:
        """Keep a partition that fits; others may have to go for it."""
        self._partitions[partition.key] = partition
        self._grow(partition.size)

    def replace(self, before: Partition, after: Partition) -> None:
        """A partition has changed, which is no use of it. If it has grown, others may have to go; or itself."""
        Cache.__setitem__(self._partitions, before.key, after)
        self._grow(after.size - before.size)

    def remove(self, key: Key) -> Partition | None:
        partition = self._partitions.pop(key, None)
        if partition is not None:
            self.bytes -= partition.size
        return partition

    def of(self, number: int) -> list[Key]:
        """The keys of a collection's partitions, the empty ones among them."""
        return [key for key in self._partitions if _number(key) == number]

    def _grow(self, by: int) -> None:
        self.bytes += by
        while self.bytes > self.max_bytes:
            key, partition = self._partitions.popitem()
            self.bytes -= partition.size
            self._owners[_number(key)](partition)


def _number(key: Key) -> int:
    """Of the collection that a key belongs to."""
    return int(key.partition(":")[0]) if isinstance(key, str) else int(key[0])
