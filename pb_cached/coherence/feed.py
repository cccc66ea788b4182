"""What is known of one log: which commits have come, which are missing, and until when answers may rest on that.

Each server numbers its commits, so a number that was left out shows. It may be late, as the stream keeps no
order, or may never come, as its commit was refused at last; that is looked up in the log. Meanwhile what follows
it waits, so the commits of a server are applied in its own order. They begin with 1: of a server that was never
heard of, all before the first that comes are missing, but those from before we began to follow the log.

How old may be what is missing? PocketBase's clock tells: a commit has a later time than the one before it, and
than what its server had heard of when it told that there was no more. Our own beats tell moments of our clock
that came before such a time.

Does no I/O and never awaits. Times are seconds of one clock, which also runs while the machine sleeps.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from pb_cached.coherence.entries import Entry, Gap

PATIENCE: Final = 0.1
"""Seconds that a missing number is waited for before it is looked up: the stream is seldom later than that."""
MOST_EARLY: Final = 10_000
"""Commits of a server that wait for a missing one. Beyond them the log begins anew."""
DATES: Final = 100
"""Our beats by which others' times are told. What is older is as old as anything can be."""

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Seconds, those in which a laptop was asleep among them."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class _Server:
    """One that writes to the log. `early`: what has come before its turn; `known`: the highest number that is
    known to be taken; `whole`: up to when what is before `expected` was all that there was; `told`: the last
    number that a beat told, and up to when that was all; `since`: since when the first one that is missing is
    waited for."""

    __slots__ = ("early", "expected", "known", "since", "told", "whole")

    def __init__(self, begun: float) -> None:
        self.expected = 1
        self.known = 0
        self.early: dict[int, Entry] = {}
        self.whole = begun
        self.told = 0, begun
        self.since: float | None = None


class Feed:
    """One log.

    Mutable state: `_servers`, and `_waiting`, those of them of which a number is missing; `newest`, the latest
    time that PocketBase has given an entry of which nothing before is missing, from where on the log is read after
    a gap, and `_later`, the same of what has come since the gap; `behind_since`, since when something may be
    missing that was not read back, and `losses`, how often that has happened; `_begun`, when we began to follow
    the log, and `began`, the first time of PocketBase's since, and how many seconds after that it was heard of;
    `_beats`, the last of ours that came: PocketBase's time, and when they were sent; `_proof`, when was sent what
    has last shown that the stream lives, None where there is none; `_doubtful`, since when there are changes that
    have come and could not be applied yet; `good_until`, when answers may no longer be given from what has come.
    """

    def __init__(self, log: str, max_staleness: float) -> None:
        self.log = log
        self.newest = ""
        self.behind_since: float | None = now()
        self.losses = 0
        self.good_until = 0.0
        self.began: tuple[str, float] | None = None
        self._begun = now()
        self._beats: deque[tuple[str, float]] = deque(maxlen=DATES)
        self._later = ""
        self._max_staleness = max_staleness
        self._proof: float | None = None
        self._doubtful: float | None = None
        self._servers: dict[str, _Server] = {}
        self._waiting: dict[str, _Server] = {}

    @property
    def is_proven(self) -> bool:
        """Has the stream shown that it brings this log, and is nothing from before it missing?"""
        return self._proof is not None

    @property
    def is_waiting(self) -> bool:
        """Is a number missing?"""
        return bool(self._waiting)

    def subscribed(self) -> None:
        """From now on the stream brings the log. What was before we will read, if we have not begun already."""
        if self.began is None:
            self._begun = now()

    def arrived(self, entry: Entry) -> list[Entry]:
        """A commit has come. Those whose turn it is now, in their order."""
        self.came(entry.created)
        server = self._servers.get(entry.server) or self._stranger(entry.server, entry.created)
        if entry.n < server.expected:
            return [entry]  # late or repeated, and to what it changed that is all the same
        server.known = max(server.known, entry.n)
        server.early[entry.n] = entry
        if len(server.early) > MOST_EARLY:
            self.forget()
            return []
        return self._due(entry.server, server)

    def _stranger(self, name: str, created: str) -> _Server:
        """A server that was never heard of."""
        if self.began is None:
            self.began = created, now() - self._begun
        server = self._servers[name] = _Server(self._begun)
        return server

    def came(self, created: str) -> None:
        """An entry has come, of this time. What lies before it is known only while nothing is missing: 1. a gap;
        2. an entry comes by the new stream; 3. that is lost too, before the gap was read back."""
        if self.behind_since is None:
            self.newest = max(self.newest, created)
        else:
            self._later = max(self._later, created)

    def beat(self, name: str, created: str, last: int, after: str) -> bool:
        """A server tells the last number that it has taken. Is one missing?

        Args:
            created: the beat's own time, by PocketBase's clock.
            after: a time by that clock, before which there was no later number.
        """
        server = self._servers.get(name) or self._stranger(name, created)
        server.known = max(server.known, last)
        server.told = max(server.told, (last, self.date(after)))
        self._due(name, server)
        return server.since is not None

    def date(self, created: str) -> float:
        """A moment before that time of PocketBase's; of what is missing, nothing is older than the last one."""
        for stamp, sent in reversed(self._beats):
            if stamp <= created:
                return sent
        return self._begun

    def doubt(self, since: float | None) -> None:
        """Since when there are changes that have come and could not be applied yet; None: there are none."""
        self._doubtful = since
        self._judge()

    def settle(self, gap: Gap) -> list[Entry]:
        """What was missing has been looked up and come, or does not exist. Those whose turn it is now."""
        server = self._servers.get(gap.server)
        if server is None:  # the log was made anew meanwhile
            return []
        due = [server.early.pop(n) for n in sorted(server.early) if n <= gap.last]
        server.expected = max(server.expected, gap.last + 1)
        return due + self._due(gap.server, server)

    def overdue(self) -> list[Gap]:
        """What has been missing for longer than it is waited for."""
        return [
            Gap(name, server.expected, min([*server.early, server.known + 1]) - 1)
            for name, server in self._waiting.items()
            if server.since is not None and now() - server.since >= PATIENCE
        ]

    def _due(self, name: str, server: _Server) -> list[Entry]:
        due = []
        while (entry := server.early.pop(server.expected, None)) is not None:
            due.append(entry)
            server.expected += 1
        if due:
            server.whole = max(server.whole, self.date(due[-1].created))
        last, date = server.told
        if last < server.expected:
            server.whole = max(server.whole, date)
        if server.expected > server.known:
            server.since = None
            self._waiting.pop(name, None)
        elif server.since is None or due:
            server.since = now()
            self._waiting[name] = server
        self._judge()
        return due

    def proven(self, sent: float, created: str) -> None:
        """The stream has brought what was sent at that time, which PocketBase has given another, and nothing from
        before it is missing."""
        self._proof = max(sent, self._proof or 0.0)
        self._beats.append((created, sent))
        self._judge()

    def caught_up(self) -> None:
        """What was missed before the stream was subscribed has been read back."""
        self.behind_since = None
        self.came(self._later)
        self._later = ""

    def lost(self) -> None:
        """Something may be missing from now on, or since the last proof."""
        if self.behind_since is None:
            self.behind_since = now() if self._proof is None else self._proof
        self.losses += 1
        self._proof = None
        self._judge()

    def forget(self) -> None:
        """The log is another one: it was restored, or made anew."""
        self._servers.clear()
        self._waiting.clear()
        self.newest = self._later = ""
        self.began = None
        self._begun = now()
        self.lost()

    def _judge(self) -> None:
        if self._proof is None:
            self.good_until = 0.0
            return
        # What is missing may have been committed as soon as the server had told its last number.
        since = [self._doubtful, *(server.whole for server in self._waiting.values())]
        self.good_until = min([self._proof, *(s for s in since if s is not None)]) + self._max_staleness
