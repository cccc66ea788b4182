"""Telling callers that they are committed, so that they and PocketBase work at the same time.

Those who share a commit mostly write again when they are told. Were they told all at once, they would all prepare
their next write while PocketBase waits, and all wait while it works. So of a large commit one half is told first;
what they write is on its way when the others are told. What all of them read has been brought up before that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from pb_cached.outcomes import succeed
from pb_cached.pocketbase.commit import Reply

LEAST: Final = 16
"""Callers who are told in halves. Fewer prepare their next writes in less time than a commit more takes."""
PASSES: Final = 8
"""Of the event loop, in which the first half may write again: a store's method takes three. Where nobody does, and
nothing else is to be done, they take a few hundredths of a millisecond each."""

Outcome = asyncio.Future[list[Reply]]


class Telling:
    """Mutable state: `_left`, who is still to be told, and what."""

    def __init__(self) -> None:
        self._left: deque[tuple[Outcome, list[Reply]]] = deque()

    def add(self, outcome: Outcome, replies: list[Reply]) -> None:
        """Somebody is to be told, after those before."""
        self._left.append((outcome, replies))

    def all(self) -> None:
        """Tell everybody, now."""
        self._tell(0)

    def soon(self) -> None:
        """Tell everybody, when what is being sent is on its way."""
        if self._left:
            asyncio.get_running_loop().call_soon(self.all)

    async def by_halves(self, is_there_more: Callable[[], bool]) -> None:
        """Tell everybody; or one half, if they write again soon: then the others are for `soon`.

        Args:
            is_there_more: is something queued?
        """
        if len(self._left) >= LEAST and not is_there_more():
            self._tell(len(self._left) // 2)
            for _ in range(PASSES):
                await asyncio.sleep(0)
                if is_there_more():
                    return
        if not is_there_more():
            self.all()

    def _tell(self, but: int) -> None:
        while len(self._left) > but:
            succeed(*self._left.popleft())
