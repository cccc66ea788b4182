"""What must hold, and what we aim at: every number that the project promises, and why those fall short that do.

Each is measured by one workload, mostly the one that its key begins with.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from bench.results import Row


class Target(Struct, frozen=True):
    key: str
    what: str
    bound: float
    aim: float
    unit: str
    """Behind the number: `x` for a ratio."""
    is_least: bool = False
    """Must the bound be reached? If not, it must not be passed."""
    why: str = ""
    """Where it is known to fall short: the reason, and what would change it."""

    def holds(self, value: float, bound: float) -> bool:
        return value >= bound if self.is_least else value <= bound

    def row(self, values: Sequence[float]) -> Row:
        """How what was measured stands to it."""
        value = statistics.median(values)
        passes = self.holds(value, self.bound)
        words = "at least" if self.is_least else "at most"
        return Row(
            key=self.key,
            what=self.what,
            wanted=f"{words} {self.bound:,g}{self.suffix}",
            aim=f"{self.aim:,g}{self.suffix}",
            unit=self.unit,
            values=list(values),
            verdict="pass" if passes else "short",
            reaches_aim=self.holds(value, self.aim),
            why="" if passes else self.why,
        )

    @property
    def suffix(self) -> str:
        return self.unit if self.unit in ("x", "%") else f" {self.unit}"


def _least(key: str, what: str, bound: float, aim: float, unit: str = "x", why: str = "") -> Target:
    return Target(key, what, bound, aim, unit, True, why)


def _most(key: str, what: str, bound: float, aim: float, unit: str = "x", why: str = "") -> Target:
    return Target(key, what, bound, aim, unit, False, why)


_MEMORY: Final = "against Parlant's in-memory store"
_BARE: Final = "of bare /api/batch requests"
_PLAIN: Final = "against a plain adapter"
_POST: Final = "against a bare POST (p50)"
_LONE: Final = (
    "The triggers that apply a commit take PocketBase half as long as the insert itself, and in mode realtime the "
    "commit comes back by the stream. An insert-only log for events would take a third of that away."
)
_CROWD: Final = (
    "This process and PocketBase work at the same time, on two cores that they share: for an event they take some "
    "110 and 95 microseconds by the log path, 160 and 300 by the batch path, where in mode realtime each record "
    "comes back by the stream. The plain adapter never does two things at once, so it has the machine to itself: "
    "the less two cores are worth together, the smaller the ratio is."
)
_FOLLOWER: Final = (
    "PocketBase encodes each commit anew for each follower, and here followers share the writers' two cores, so "
    "their own CPU is in it. With machines of their own PocketBase's part is left, as the table has it."
)
_PAUSE: Final = (
    "The values of the rounds lie on both sides of the bound, as the machine drifts. Entries that the collector "
    "need not look at would change it."
)

_ALL: Final = (
    _least("reads.list.1000", f"list_events of 20 at 1,000 events, {_MEMORY}", 8, 15),
    _least("reads.list.10000", f"list_events of 20 at 10,000 events, {_MEMORY}", 80, 150),
    _least("reads.list.100000", f"list_events of 20 at 100,000 events, {_MEMORY}", 800, 1500),
    _most("reads.one", "find_one by id, cached, against a look-up and decoding", 3, 2),
    _most("reads.twenty", "find of 20, cached, against decoding them", 1.6, 1.3),
    _least("writes.log.bare", f"create_event, 100 sessions, log path, {_BARE}", 100, 200, "%"),
    _least("writes.batch.bare", f"create_event, 100 sessions, batch path, {_BARE}", 45, 60, "%"),
    _least("writes.log.plain", f"create_event, 100 sessions, log path, {_PLAIN}", 30, 60, why=_CROWD),
    _least("writes.batch.plain", f"create_event, 100 sessions, batch path, {_PLAIN}", 15, 20, why=_CROWD),
    _least("updates.log.bare", f"updates of 100 sessions, log path, {_BARE}", 100, 200, "%"),
    _least("updates.batch.bare", f"updates of 100 sessions, batch path, {_BARE}", 45, 60, "%"),
    _most("lone.log", f"one writer's acknowledgement, log path, {_POST}", 1.25, 1.1, why=_LONE),
    _most("lone.batch", f"one writer's acknowledgement, batch path, {_POST}", 1.25, 1.1, why=_LONE),
    _most("crowd.p99", "100 writers' p99, log path, against single POSTs", 0.33, 0.1),
    _least("hot.log", f"100 writers of one session, log path, {_PLAIN}", 3, 20),
    _least("hot.batch", f"100 writers of one session, batch path, {_PLAIN}", 3, 10),
    _most("streaming.writes", "writes of a streamed reply, beyond duration / streaming_interval", 2, 1, "writes"),
    _most("waits.idle", "1,000 idle waits, of a core", 1, 0.1, "%"),
    _most("waits.same", "an event's commit to the end of a wait on the same server (p50)", 2, 0.5, "ms"),
    _most("waits.other", "an event's commit to the end of a wait on another server (p50)", 10, 3, "ms"),
    _most("opening.million", "opening a session store with 1,000,000 events", 100, 30, "ms"),
    _most("opening.growth", "opening with the most events, against opening with 10", 1.5, 1.1),
    _most("memory.events", "memory of a cached event beyond its JSON", 500, 250, "bytes"),
    _most("memory.sessions", "memory of a cached session beyond its JSON", 500, 250, "bytes"),
    _most("memory.pause", "a full garbage collection at 200,000 cached documents", 10, 3, "ms", why=_PAUSE),
    _most("following.share", "following 10,000 changes a second, of a core", 25, 6.25, "%"),
    _most("following.one", "what a following server costs the writers, one of them", 5, 1, "%", why=_FOLLOWER),
    _most("following.four", "what each of four following servers costs them", 5, 1, "%", why=_FOLLOWER),
    _most("following.gap", "catching up after 10 s, 1,000 of 100,000 cached documents changed", 1, 0.5, "s"),
)

TARGETS: Final = {target.key: target for target in _ALL}
