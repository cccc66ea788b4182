"""What is known of one log: which commits have come, which are missing, and until when answers may rest on that.

Each server numbers its commits, so a number that was left out shows. It may be late, as the stream keeps no
order, or may never come, as its commit was refused at last; that is looked up in the log. Meanwhile what follows
it waits, so the commits of a server are applied in its own order.

Does no I/O and never awaits. Times are seconds of one clock, which also runs while the machine sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from pb_cached.coherence.entries import Entry, Gap

PATIENCE: Final = 0.1
"""Seconds that a missing number is waited for before it is looked up: the stream is seldom later than that."""
MOST_EARLY: Final = 10_000
"""Commits that wait for a missing one. Beyond them it is waited for no longer."""

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Seconds, those in which a laptop was asleep among them."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class _Server:
    """One that writes to the log. `early`: what has come before its turn; `known`: the highest number that is
    known to be taken; `since`: when the first one that is missing was missed."""

    __slots__ = ("early", "expected", "known", "since")

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.known = expected - 1
        self.early: dict[int, Entry] = {}
        self.since: float | None = None


class Feed:
    """One log.

    Mutable state: `_servers`; `newest`, the latest time that PocketBase has given an entry, from where on the
    log is read after a gap; `good_until`, when answers may no longer be given from what has come; `_proof`, when
    was sent what has last shown that the stream lives, None where there is none, or what was missed is not
    caught up with; `_doubtful`, since when there are changes that have come and could not be applied yet.
    """

    def __init__(self, log: str, max_staleness: float) -> None:
        self.log = log
        self.newest = ""
        self.good_until = 0.0
        self._max_staleness = max_staleness
        self._proof: float | None = None
        self._doubtful: float | None = None
        self._servers: dict[str, _Server] = {}

    @property
    def is_proven(self) -> bool:
        """Has the stream shown that it brings this log, and is nothing from before it missing?"""
        return self._proof is not None

    def arrived(self, entry: Entry) -> list[Entry]:
        """A commit has come. Those whose turn it is now, in their order."""
        self.newest = max(self.newest, entry.created)
        server = self._servers.get(entry.server)
        if server is None:
            # What it did before is in what was loaded since, or is caught up with.
            self._servers[entry.server] = _Server(entry.n + 1)
            return [entry]
        if entry.n < server.expected:
            return [entry]  # late or repeated, and to what it changed that is all the same
        server.known = max(server.known, entry.n)
        server.early[entry.n] = entry
        if len(server.early) > MOST_EARLY:
            server.expected = min(server.early)
        return self._due(server)

    @property
    def is_waiting(self) -> bool:
        """Is a number missing?"""
        return any(server.since is not None for server in self._servers.values())

    def beat(self, name: str, last: int) -> bool:
        """A server tells the last number that it has taken. Is one missing?"""
        server = self._servers.get(name)
        if server is None:
            self._servers[name] = _Server(last + 1)
            return False
        if last > server.known:
            server.known = last
            self._due(server)
        return server.since is not None

    def doubt(self, is_doubtful: bool = True) -> None:
        """There are changes that have come and could not be applied yet; or there are none any more."""
        if not is_doubtful:
            self._doubtful = None
        elif self._doubtful is None:
            self._doubtful = now()
        self._judge()

    def settle(self, gap: Gap) -> list[Entry]:
        """What was missing has been looked up and come, or does not exist. Those whose turn it is now."""
        server = self._servers[gap.server]
        server.expected = max(server.expected, gap.last + 1)
        return self._due(server)

    def overdue(self) -> Iterator[Gap]:
        """What has been missing for longer than it is waited for."""
        for name, server in self._servers.items():
            if server.since is not None and now() - server.since >= PATIENCE:
                yield Gap(name, server.expected, min([*server.early, server.known + 1]) - 1)

    def _due(self, server: _Server) -> list[Entry]:
        due = []
        while (entry := server.early.pop(server.expected, None)) is not None:
            due.append(entry)
            server.expected += 1
        if server.expected > server.known:
            server.since = None
        elif server.since is None or due:
            server.since = now()
        self._judge()
        return due

    def proven(self, sent: float) -> None:
        """The stream has brought what was sent at that time, and nothing from before it is missing."""
        self._proof = max(sent, self._proof or 0.0)
        self._judge()

    def lost(self) -> None:
        """Something may be missing from now on."""
        self._proof = None
        self._judge()

    def forget(self) -> None:
        """The log is another one: it was restored, or made anew."""
        self._servers.clear()
        self.newest = ""
        self.lost()

    def _judge(self) -> None:
        if self._proof is None:
            self.good_until = 0.0
            return
        since = [self._doubtful, *(server.since for server in self._servers.values())]
        self.good_until = min([self._proof, *(s for s in since if s is not None)]) + self._max_staleness
