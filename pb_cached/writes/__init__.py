"""Writing: the queue and the committer that turn many callers' writes into few commits; changes of one record."""

from pb_cached.writes.changes import Overtaken, RecordChanges, State
from pb_cached.writes.committer import Committer
from pb_cached.writes.logs import log_of, own_log, shared_log
from pb_cached.writes.stats import WriteStats, summary

__all__ = [
    "Committer",
    "Overtaken",
    "RecordChanges",
    "State",
    "WriteStats",
    "log_of",
    "own_log",
    "shared_log",
    "summary",
]
