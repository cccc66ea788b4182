"""Streamed messages: what is held back of them between two writes.

Parlant writes a whole message again for each of its chunks (facts: parlant, section 10): the 200 chunks of a reply
of 3 kB are 200 writes of 780 kB. So a state of a message that is not complete yet is acknowledged when it lies
here, and PocketBase gets the newest one after an interval. Until then readers are shown what lies here.

What is held back is taken out when it was written, and not before: between the two nobody reads an older state.

Does no I/O and never awaits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import replace
from typing import Any, Final

from parlant.core.sessions import Event, EventId, SessionId

from pb_cached.exact import loads

AGAIN_SECONDS: Final = 5.0
"""After what time it is tried again to write what could not be written. The attempt itself takes its time too."""

Place = tuple[SessionId, EventId]
_NONE: Final[frozenset[EventId]] = frozenset()


class _Held:
    __slots__ = ("data", "overdue", "place", "timer")

    def __init__(self, place: Place, data: bytes, timer: asyncio.TimerHandle) -> None:
        self.place = place
        self.data = data
        self.timer = timer
        self.overdue = False


class HeldBack:
    """The messages of which something is held back.

    Mutable state: `_held` by the event's id, and for each session in `_of` the ids of its events.
    """

    def __init__(self, interval: float, write: Callable[[Place], None]) -> None:
        """
        Args:
            interval: seconds that something is held back for.
            write: starts to write it.
        """
        self._interval = interval
        self._write = write
        self._held: dict[EventId, _Held] = {}
        self._of: dict[SessionId, set[EventId]] = {}

    def may_hold(self, event: EventId) -> bool:
        """Not where nothing ever is; nor where it is overdue already: the next writer is to be told."""
        held = self._held.get(event)
        return self._interval > 0 and not (held is not None and held.overdue)

    def hold(self, place: Place, data: bytes) -> None:
        """Hold this back, in the place of what is held back already, and for no longer than that would have been.

        Args:
            data: the event's, as JSON.
        """
        session, event = place
        if event in self._held:
            self._held[event].data = data
        else:
            self._held[event] = _Held(place, data, self._timer(place, self._interval))
            self._of.setdefault(session, set()).add(event)

    def failed(self, event: EventId) -> None:
        """It could not be written: it stays here, and is tried again."""
        held = self._held[event]
        held.overdue = True
        held.timer.cancel()
        held.timer = self._timer(held.place, AGAIN_SECONDS)

    def let_go(self, event: EventId) -> bool:
        """It was written, or need not be any more. Was there anything?"""
        held = self._held.pop(event, None)
        if held is None:
            return False
        held.timer.cancel()
        session = held.place[0]
        self._of[session].discard(event)
        if not self._of[session]:
            del self._of[session]
        return True

    def let_all_go(self) -> list[Place]:
        """Nothing will be written any more. What that was."""
        places = self.places()
        for _, event in places:
            self.let_go(event)
        return places

    def places(self) -> list[Place]:
        return [held.place for held in self._held.values()]

    def of(self, session: SessionId) -> frozenset[EventId]:
        """The session's messages of which something is held back."""
        held = self._of.get(session)
        return frozenset(held) if held else _NONE

    def data(self, event: EventId) -> bytes | None:
        """What is held back of it, as JSON."""
        held = self._held.get(event)
        return None if held is None else held.data

    def laid_over(self, event: Event) -> Event:
        """The event as readers are to see it."""
        held = self._held.get(event.id)
        return event if held is None else replace(event, data=loads(held.data))

    def _timer(self, place: Place, seconds: float) -> asyncio.TimerHandle:
        # In a context of its own: in the caller's, the write would take itself for a part of the caller's turn.
        return asyncio.get_running_loop().call_later(seconds, self._write, place, context=Context())


def is_on_its_way(data: Any) -> bool:
    """Is this the data of a streamed message that is not complete yet? Complete ones end with None."""
    chunks = data.get("chunks") if isinstance(data, Mapping) else None
    return isinstance(chunks, list | tuple) and not (chunks and chunks[-1] is None)
