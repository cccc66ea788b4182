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
