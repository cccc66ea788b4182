"""Writing: the queue and the committer that turn many callers' writes into few commits; changes of one record."""

from pb_cached.writes.changes import Overtaken, RecordChanges, State
from pb_cached.writes.committer import Committer

__all__ = ["Committer", "Overtaken", "RecordChanges", "State"]
