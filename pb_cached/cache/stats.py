"""What the cache tells about itself: counters since it was made, and what it holds now."""

from __future__ import annotations

from msgspec import Struct


class CollectionStats(Struct, frozen=True, kw_only=True):
    """The cache of one collection. Every read is counted as one of the first four."""

    hits: int
    """Reads answered from memory."""
    negative_hits: int
    """Reads answered from memory: there is none."""
    misses: int
    """Reads that waited for a load."""
    through: int
    """Reads that no partition can answer: they went to PocketBase."""
    loads: int
    """Partitions loaded."""
    rereads: int
    """Times that records in doubt were read again."""
    evictions: int
    """Partitions dropped to make room for others."""
    documents: int
    """In memory now."""
    bytes: int
    """Taken by them, overhead included."""


class Stats(Struct, frozen=True, kw_only=True):
    """A database. `msgspec.to_builtins` makes a dict of it."""

    cache_bytes: int
    """Taken by the cache that all databases of this PocketBase share, their documents included."""
    cache_max_bytes: int
    """The most that it may take; 0 where nothing is cached."""
    collections: dict[str, CollectionStats]
    """By the collections that are open and cached."""
