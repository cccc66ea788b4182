"""Answering queries: by PocketBase, or by the cache and, for what it lacks, by PocketBase."""

from pb_cached.reading.direct import DirectReads, Match, Reads

__all__ = ["DirectReads", "Match", "Reads"]
