"""Turns: writes that rest on the same thing are made one after the other, and all others beside each other."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

from pb_cached.errors import QueueFull

Name = tuple[str, ...]
"""What a write rests on: a session's id, say, or those of a variable and a customer."""


class Turns:
    """Mutable state, changed between awaits only: `_taken`, by name the turns that somebody has, each with those
    who wait for it, in their order."""

    def __init__(self, store: str, deadline: float) -> None:
        """
        Args:
            store: whose turns they are.
            deadline: seconds for which who says nothing else waits.
        """
        self._store: Final = store
        self._deadline: Final = deadline
        self._taken: dict[Name, deque[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        """How many are taken."""
        return len(self._taken)

    def of(self, name: Name, until: float | None = None) -> Turn:
        """The turn of what has this name, as an async context manager.

        Args:
            until: when it is too late, by the monotonic clock; None for a deadline from when it is entered.

        Raises:
            QueueFull: when it is entered: it did not come until then.
        """
        return Turn(self, name, until)

    def take_at_once(self, name: Name) -> bool:
        """Take the turn, if nobody has it. It must be left then."""
        if name in self._taken:
            return False
        self._taken[name] = deque()
        return True

    async def take(self, name: Name, until: float | None) -> None:
        if self.take_at_once(name):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._taken[name].append(turn)
        try:
            async with asyncio.timeout(self._deadline if until is None else until - time.monotonic()):
                await self._come(turn, name)
        except TimeoutError:
            raise QueueFull(
                f"{self._store}: the writes before this one took longer than {self._deadline:g} s (deadline under "
                "[writes]); nothing of it was written"
            ) from None

    async def _come(self, turn: asyncio.Future[None], name: Name) -> None:
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came just as its time was over
                self.leave(name)
            raise

    def leave(self, name: Name) -> None:
        """The next one has it, if anybody waits."""
        waiting = self._taken[name]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._taken[name]


class Turn:
    """See `Turns.of`. A class, as a generator takes three times as long."""

    __slots__ = ("_name", "_turns", "_until")

    def __init__(self, turns: Turns, name: Name, until: float | None) -> None:
        self._turns = turns
        self._name = name
        self._until = until

    async def __aenter__(self) -> None:
        await self._turns.take(self._name, self._until)

    async def __aexit__(self, *_: object) -> None:
        self._turns.leave(self._name)
