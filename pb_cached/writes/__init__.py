"""Writing: the queue and the committer that turn many callers' writes into few commits."""

from pb_cached.writes.committer import Committer

__all__ = ["Committer"]
