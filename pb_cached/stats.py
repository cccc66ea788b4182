"""What a database tells about itself."""

from __future__ import annotations

from msgspec import Struct

from pb_cached.cache.stats import CollectionStats
from pb_cached.coherence.stats import CoherenceStats
from pb_cached.writes.stats import WriteStats


class Stats(Struct, frozen=True, kw_only=True):
    """A database. `msgspec.to_builtins` makes a dict of it."""

    cache_bytes: int
    """Taken by the cache that all databases of this PocketBase share, their documents included."""
    cache_max_bytes: int
    """The most that it may take; 0 where nothing is cached."""
    collections: dict[str, CollectionStats]
    """By the collections that are open and cached."""
    writes: WriteStats
    """The commits of this database."""
    coherence: CoherenceStats | None = None
    """How the caches follow what other servers commit; None where they need not."""
