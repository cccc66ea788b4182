"""How much may wait: beyond that callers wait themselves, and get in in the order in which they came."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from pb_cached.config import WriteSettings
from pb_cached.errors import QueueFull


class Room:
    """Room for what waits, by `max_queued_records` and `max_queued_bytes`.

    Mutable state, changed between awaits only: `records` and `bytes` of what is in it; `_waiting`, callers for
    whom there is no room, in their order.
    """

    def __init__(self, settings: WriteSettings) -> None:
        self._settings = settings
        self.records = 0
        self.bytes = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_full(self) -> bool:
        """One more always has room where there is any, however large it is."""
        return bool(self._waiting) or self._has_none

    @property
    def _has_none(self) -> bool:
        return self.records >= self._settings.max_queued_records or self.bytes >= self._settings.max_queued_bytes

    def enter(self, size: int) -> None:
        """One more, of so many bytes. Who finds the room full waits first."""
        self.records += 1
        self.bytes += size

    def leave(self, size: int) -> None:
        """One of that size waits no more."""
        self.records -= 1
        self.bytes -= size
        if self._waiting:
            self._admit()

    async def wait_and_enter(self, size: int, until: float) -> None:
        """Enter as soon as there is room.

        Args:
            until: a moment of the monotonic clock.

        Raises:
            QueueFull: there was none until then.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await turn
            self.enter(size)
        except TimeoutError:
            raise QueueFull(
                f"{self.records} writes of about {self.bytes:,} bytes wait for their turn, and there was no room "
                f"for one more for {self._settings.deadline:g} s (max_queued_records, max_queued_bytes under "
                "[writes]); nothing was written"
            ) from None
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)
            self._admit()

    def _admit(self) -> None:
        """Let in the next one who waits, if there is room. That one lets in the next when it has entered."""
        while self._waiting and not self._has_none:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
