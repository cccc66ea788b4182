"""The proof that a commit happened: a record in a log, whose id can be created only once."""

from __future__ import annotations

import time

import msgspec
from msgspec import Struct

from pb_cached.errors import OutcomeUnknown
from pb_cached.pocketbase.client import PocketBaseClient, refused
from pb_cached.pocketbase.commit.interface import left, records_path


class _Entry(Struct):
    n: int = 0


def lane_of(server: str, number: int) -> str:
    """How a server signs the commits of one of its lanes. To who follows, each lane is a server of its own."""
    return f"{server}-{number}" if number else server


class Receipts:
    """The receipts of a server's commits to one log by one of its lanes, one commit at a time.

    `n` numbers them without gaps: 1, 2, 3 and so on. Mutable state: `_taken`, the last `n` that is taken, or may
    be, and `_unknown`, those of them of which nobody knows; `acknowledged`, the last receipt that PocketBase had,
    and when that was known, by the monotonic clock; `heard`, the last time that was heard of PocketBase's clock
    (whoever hears of it says so), and `_sent_after`, the same when the commit under way was begun.
    """

    def __init__(self, client: PocketBaseClient, log: str, server: str) -> None:
        self._client = client
        self.server = server
        self._taken = 0
        self._unknown: set[int] = set()
        self.acknowledged: tuple[str, float] | None = None
        self.path = records_path(log)
        self.heard = ""
        self._sent_after: str | None = None

    @property
    def next(self) -> int:
        """The number that the next commit gets."""
        return self._taken + 1

    @property
    def last(self) -> int:
        """The last number that is taken, or may be."""
        return self._taken

    @property
    def after(self) -> str:
        """A time by PocketBase's clock, before which no number beyond `last` can have been taken."""
        return self.heard if self._sent_after is None else self._sent_after

    def is_known(self, n: int) -> bool:
        """Has PocketBase's answer told that it has the commit of this number?"""
        return n <= self._taken and n not in self._unknown

    def take(self, n: int, receipt: str = "") -> None:
        """The numbers up to this one are taken, by a commit of this receipt if there is one."""
        self._taken = max(self._taken, n)
        self._sent_after = None
        if receipt:
            self.acknowledged = receipt, time.monotonic()

    def over(self) -> None:
        """No commit is under way."""
        self._sent_after = None

    def entry(self, receipt: str, n: int, content: dict[str, str] | None = None) -> bytes:
        """The JSON of a commit's record in the log, which is about to be sent."""
        if n == self.next:
            self._sent_after = self.heard
        return msgspec.json.encode({"id": receipt, "server": self.server, "n": n, **(content or {})})

    async def settled(self, receipt: str, in_doubt: bool, end: float) -> bool:
        """Was the commit applied? Where the answer is no, it cannot be applied later either.

        The receipt's record decides, never the name of the field that a refusal blames (facts: pocketbase,
        section 11). But looking proves nothing while an attempt may still be on its way: (1) it is sent and gets
        stuck, (2) it is sent again and refused, (3) what it was refused for goes away, (4) the first one arrives
        and is applied. So the receipt is used up, by a record whose `n` is 0, before anybody is told that nothing
        happened.

        Args:
            in_doubt: an attempt may still be on its way.
            end: of the monotonic clock, until when to ask.
        """
        if in_doubt:
            body = self.entry(receipt, 0, {"guard": receipt})
            await self._client.send("POST", self.path, body=body, repeatable=True, deadline=left(end))
        answer = await self._client.send("GET", f"{self.path}/{receipt}", deadline=left(end))
        if answer.ok:
            return msgspec.json.decode(answer.content, type=_Entry).n > 0
        if in_doubt or answer.status != 404:  # a commit that arrived twice was refused and applied
            raise refused(answer, "read the log")
        return False

    def unknown(self, n: int, writes: int) -> OutcomeUnknown:
        """The error for a commit of which nothing could be learned. Its number counts as taken: a gap in the
        numbers can be looked into, two commits of one number cannot."""
        self._unknown.update(range(self.next, n + 1))
        self.take(n)
        return OutcomeUnknown(
            f"{writes} writes were sent to PocketBase at {self._client.url}, but it could not be learned "
            "in time whether it applied them. Read before you write them again"
        )
