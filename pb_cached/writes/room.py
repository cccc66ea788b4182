"""How much may wait: beyond that callers wait themselves, and get in in the order in which they came."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from pb_cached.config import WriteSettings
from pb_cached.errors import QueueFull

_Waiting = tuple[asyncio.Future[None], int, int]
"""Who waits, and the bytes and records to enter with."""


class Room:
    """Room for what waits, by `max_queued_records` and `max_queued_bytes`.

    Mutable state, changed between awaits only: `records` and `bytes` of what is in it; `_waiting`, callers for
    whom there is no room, in their order; `_closed`, nobody waits any more.
    """

    def __init__(self, settings: WriteSettings) -> None:
        self._settings = settings
        self.records = 0
        self.bytes = 0
        self._waiting: deque[_Waiting] = deque()
        self._closed = False

    @property
    def is_full(self) -> bool:
        """One more always has room where there is any, however large it is."""
        return bool(self._waiting) or self._has_none

    @property
    def _has_none(self) -> bool:
        return self.records >= self._settings.max_queued_records or self.bytes >= self._settings.max_queued_bytes

    def enter(self, size: int, records: int = 1) -> None:
        """One more, of so many bytes. Who finds the room full waits first."""
        self.records += records
        self.bytes += size

    def leave(self, size: int, records: int = 1) -> None:
        """One of that size waits no more."""
        self.records -= records
        self.bytes -= size
        if self._waiting:
            self._admit()

    def close(self) -> None:
        """Let in whoever waits: there is nothing left to wait for."""
        self._closed = True
        self._admit()

    async def wait_and_enter(self, size: int, until: float, records: int = 1) -> None:
        """Enter as soon as there is room.

        Args:
            until: a moment of the monotonic clock.

        Raises:
            QueueFull: there was none until then.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = turn, size, records
        self._waiting.append(waiting)
        self._admit()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await self._let_in(waiting)
        except TimeoutError:
            raise QueueFull(
                f"{self.records} records of about {self.bytes:,} bytes wait to be written, and there was no room "
                f"for one more for {self._settings.deadline:g} s (max_queued_records, max_queued_bytes under "
                "[writes]); nothing was written"
            ) from None
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            self._admit()

    async def _let_in(self, waiting: _Waiting) -> None:
        turn, size, records = waiting
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # let in just as the time was over
                self.leave(size, records)
            raise

    def _admit(self) -> None:
        """Let in the next ones who wait, while there is room. They have entered before anybody else can."""
        while self._waiting and (self._closed or not self._has_none):
            turn, size, records = self._waiting.popleft()
            if not turn.done():
                self.enter(size, records)
                turn.set_result(None)
