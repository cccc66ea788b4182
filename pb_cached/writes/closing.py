"""One deadline for all that closes together."""

from __future__ import annotations

import time
from typing import Final

_LEAST: Final = 0.1
"""Seconds that are left to the last ones too: to see that nothing is undecided takes a moment."""


class Closing:
    """How long closing may still take. It begins with the first who asks, and what is over gives its time back.

    Mutable state: `_end`, a moment of the monotonic clock.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._end: float | None = None

    def left(self) -> float:
        """Seconds."""
        now = time.monotonic()
        if self._end is None or self._end < now - self.timeout:  # that was another time
            self._end = now + self.timeout
        return max(_LEAST, self._end - now)

    def over(self) -> None:
        """All was closed in time: whatever closes next has time of its own."""
        self._end = None
