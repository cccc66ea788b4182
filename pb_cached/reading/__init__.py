"""Answering queries: by PocketBase, or by the cache and, for what it lacks, by PocketBase."""

from pb_cached.reading.cached import CachedReads
from pb_cached.reading.direct import DirectReads, Match, Reads
from pb_cached.reading.loads import Loader
from pb_cached.reading.watched import WatchedCommits

__all__ = ["CachedReads", "DirectReads", "Loader", "Match", "Reads", "WatchedCommits"]
