"""Coherence: the caches of many servers follow what each of them commits."""

from pb_cached.coherence.changes import FollowedCollection
from pb_cached.coherence.follower import Follower
from pb_cached.coherence.stats import CoherenceStats

__all__ = ["CoherenceStats", "FollowedCollection", "Follower"]
