"""How many records a commit may hold, so that it keeps PocketBase's other writers waiting no longer than is set.

A commit takes what the way there and back does, whatever it holds, and beside that what its records take; only for
the latter do others wait. So:

* a commit whose records took longer than is set: the next one holds half as many;
* one that held as many as it might, and took less than half as long as that: the next one may hold twice as many.

The way's time is learned from commits of a single record, which cannot be smaller, and where a commit was halved,
from both: by the line through them. So a slow way makes no commits small, for more than one of them.

No I/O.
"""

from __future__ import annotations

_APART = 0.75
"""A commit of at most so many times the records of another one tells what the records take."""


class Pace:
    """Mutable state: `records`, how many the next commit may hold; `_way`, the seconds that a commit takes
    whatever it holds; `_halved`, records and seconds of the commit that was too long, until the next one is known.
    """

    def __init__(self, most: int, seconds: float) -> None:
        """
        Args:
            most: records, however fast they are committed.
            seconds: that a commit's records may take.
        """
        self.records = most
        self._most = most
        self._seconds = seconds
        self._way = 0.0
        self._halved: tuple[int, float] | None = None

    def took(self, records: int, seconds: float) -> None:
        """A commit of so many records was answered, at the first attempt, after so many seconds."""
        self._learn(records, seconds)
        theirs = seconds - self._way
        if theirs > self._seconds:
            self._halved = records, seconds
            self.records = max(1, min(self.records, records // 2))
        elif theirs < self._seconds / 2 and records >= self.records:
            self.records = min(self._most, 2 * self.records)

    def _learn(self, records: int, seconds: float) -> None:
        halved, self._halved = self._halved, None
        if records == 1:
            self._way = seconds
        elif halved is not None and records <= _APART * halved[0]:
            a_record = (halved[1] - seconds) / (halved[0] - records)
            self._way = seconds - max(0.0, a_record) * records
        self._way = max(0.0, min(self._way, seconds))
