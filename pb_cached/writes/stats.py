"""What the write path tells about itself."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

SAMPLES: Final = 4096
"""Commits that quantiles are taken over, the last ones."""


class WriteStats(Struct, frozen=True, kw_only=True):
    """The commits of a database, since its logs were opened. Quantiles are over the last 4096 of each log."""

    path: str
    """How commits are made: `log`, `batch`, or `single`."""
    queued: int
    """Writes that wait to be committed, or for the commit that they are in."""
    queued_bytes: int
    writes: int
    """Committed."""
    records: int
    """In them."""
    bytes: int
    commits: int
    commit_records_p50: float
    commit_records_max: int
    commit_seconds_p50: float
    commit_seconds_p99: float
    """How long PocketBase took for a commit, repetitions included."""
    write_seconds_p50: float
    write_seconds_p99: float
    """From the call until it was committed: of the first write of each commit, which waits longest."""
    refused: int
    """Writes that failed alone: PocketBase refused them."""
    attempts_more: int
    """Commits that had to be made anew without what was refused, or in parts."""
    retries: int
    """Requests that were sent again: PocketBase was busy or not there, an answer was lost, or a token was dead."""
    unknown: int
    """Commits of which nobody knows whether they were applied."""


class WriteCounters:
    """What `WriteStats` are made of, for one log. Counting costs nothing that could be measured."""

    def __init__(self) -> None:
        self.writes = self.records = self.bytes = self.commits = 0
        self.refused = self.attempts_more = self.retries = self.unknown = 0
        self.sizes: deque[int] = deque(maxlen=SAMPLES)
        self.commit_seconds: deque[float] = deque(maxlen=SAMPLES)
        self.write_seconds: deque[float] = deque(maxlen=SAMPLES)

    def committed(self, writes: int, records: int, size: int, seconds: float, waited: float) -> None:
        """A commit has succeeded.

        Args:
            seconds: it took.
            waited: seconds since the first of its writes was submitted.
        """
        self.commits += 1
        self.writes += writes
        self.records += records
        self.bytes += size
        self.sizes.append(records)
        self.commit_seconds.append(seconds)
        self.write_seconds.append(waited)


def summary(path: str, queued: int, queued_bytes: int, counters: Sequence[WriteCounters]) -> WriteStats:
    """The numbers of several logs together, as they are now."""

    def ordered(samples: str) -> list[float]:
        return sorted(sample for each in counters for sample in getattr(each, samples))

    def total(counter: str) -> int:
        return sum(getattr(each, counter) for each in counters)

    sizes, commit, write = ordered("sizes"), ordered("commit_seconds"), ordered("write_seconds")
    return WriteStats(
        path=path,
        queued=queued,
        queued_bytes=queued_bytes,
        writes=total("writes"),
        records=total("records"),
        bytes=total("bytes"),
        commits=total("commits"),
        commit_records_p50=_quantile(sizes, 0.5),
        commit_records_max=int(sizes[-1]) if sizes else 0,
        commit_seconds_p50=_quantile(commit, 0.5),
        commit_seconds_p99=_quantile(commit, 0.99),
        write_seconds_p50=_quantile(write, 0.5),
        write_seconds_p99=_quantile(write, 0.99),
        refused=total("refused"),
        attempts_more=total("attempts_more"),
        retries=total("retries"),
        unknown=total("unknown"),
    )


def _quantile(ordered: list[float], share: float) -> float:
    """The least value that this share of all does not exceed; 0 where there is none."""
    if not ordered:
        return 0.0
    places = [(n + 1) / len(ordered) for n in range(len(ordered))]
    return ordered[min(bisect_left(places, share), len(ordered) - 1)]
