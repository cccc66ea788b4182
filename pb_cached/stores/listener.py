"""Parlant's session listener, woken by what changes instead of asking four times a second.

Every wait of Parlant's is for a number to reach a mark: the offset of the newest event that counts, or how much of
a streamed message is there. All who wait for the same number share a `_Lookout`: it looks for all of them, when
they come and whenever the session has changed, and tells those whose mark is reached. While nothing changes,
nothing is done.

The store hears of every change where its cache does. With the cache off it hears of this server's own commits,
and looks as often as Parlant's listener for those of the others.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, cast

from parlant.core.async_utils import Timeout
from parlant.core.sessions import Event, EventId, EventKind, EventSource, SessionId, SessionListener
from typing_extensions import override

from pb_cached.outcomes import fail, succeed
from pb_cached.stores.sessions import PocketBaseSessionStore

SAFETY_SECONDS: Final = 60.0
"""How often is looked where every change is heard of: only against a mistake of ours. A thousand waits take
less than a thousandth of a core by it."""
EVENTS_SECONDS: Final = 0.25
"""How often is looked for events of other servers that are not heard of; as by Parlant's listener."""
CHUNKS_SECONDS: Final = 0.1
"""The same, for what is added to a streamed message."""

Look = Callable[[float], Awaitable[float]]
"""The number as it is now; given the lowest mark that anybody waits for, as to be below it is all the same."""

_FOREVER: Final = Timeout.infinite()
_NONE: Final = -math.inf
_ANY: Final = -sys.float_info.max
"""The mark that any event reaches."""
_COMPLETE: Final = math.inf


class PocketBaseSessionListener(SessionListener):
    """Waits for events and for streamed messages of a `PocketBaseSessionStore`: what Parlant's
    `PollingSessionListener` answers, as soon as it is so.

    Mutable state, changed between awaits only: `_lookouts`, by session and what is looked at; there is one exactly
    while somebody waits for it.
    """

    def __init__(self, store: PocketBaseSessionStore) -> None:
        self._store = store
        self._lookouts: dict[tuple[object, ...], _Lookout] = {}

    @override
    async def wait_for_more_events(
        self,
        session_id: SessionId,
        kinds: Sequence[EventKind] = [],
        min_offset: int | None = None,
        source: EventSource | None = None,
        trace_id: str | None = None,
        timeout: Timeout = _FOREVER,
    ) -> bool:
        """Wait until there is an event of these kinds, and so on, that is not deleted.

        Raises:
            ItemNotFoundError: there is no such session, or not any more.
            PBCachedError: it cannot be read.
        """
        kinds = tuple(kinds)

        async def highest_offset(lowest: float) -> float:
            events = await self._store.list_events(
                session_id,
                source=source,
                trace_id=trace_id,
                kinds=kinds,
                min_offset=None if lowest == _ANY else int(lowest),
            )
            return max((event.offset for event in events), default=_NONE)

        what = (session_id, kinds, source, trace_id)
        return await self._wait(session_id, what, highest_offset, min_offset or _ANY, EVENTS_SECONDS, timeout)

    @override
    async def wait_for_event_completion(
        self, session_id: SessionId, event_id: EventId, timeout: Timeout = _FOREVER
    ) -> bool:
        """Wait until the last chunk of a streamed message is there; an event without chunks is complete.

        Raises:
            ItemNotFoundError: there is no such session, or no such event, or not any more.
            PBCachedError: it cannot be read.
        """
        return await self._wait_for_event(session_id, event_id, _completion, _COMPLETE, timeout)

    @override
    async def wait_for_new_streaming_chunks(
        self,
        session_id: SessionId,
        event_id: EventId,
        last_known_chunk_count: int,
        timeout: Timeout = _FOREVER,
    ) -> bool:
        """Wait until a streamed message has more chunks than those, or is complete.

        Raises:
            As `wait_for_event_completion`.
        """
        return await self._wait_for_event(session_id, event_id, _chunks, last_known_chunk_count + 1, timeout)

    async def _wait_for_event(
        self,
        session_id: SessionId,
        event_id: EventId,
        progress: Callable[[Event], float],
        mark: float,
        timeout: Timeout,
    ) -> bool:
        async def look(_: float) -> float:
            return progress(await self._store.read_event(session_id, event_id))

        return await self._wait(session_id, (session_id, event_id, progress), look, mark, CHUNKS_SECONDS, timeout)

    async def _wait(
        self,
        session_id: SessionId,
        what: tuple[object, ...],
        look: Look,
        mark: float,
        interval: float,
        timeout: Timeout,
    ) -> bool:
        """Wait until what is looked at has reached the mark.

        Args:
            what: names it, for all who wait for the same.
            interval: seconds between two looks where not every change is heard of.
        """
        lookout = self._lookouts.get(what)
        if lookout is None:
            every = SAFETY_SECONDS if self._store.hears_everything else interval
            lookout = self._lookouts[what] = _Lookout(look, every, partial(self._store.watch, session_id))
        waiting = lookout.join(mark)
        try:
            # The store is watched by now: what the look that begins here does not show will wake the lookout.
            if seconds := timeout.remaining():
                lookout.wake()
                await asyncio.wait([waiting], timeout=None if seconds == math.inf else seconds)
            if not waiting.done():
                await asyncio.wait([lookout.look()])
            if not waiting.done():
                return False
            waiting.result()
            return True
        finally:
            if lookout.leave(waiting):
                del self._lookouts[what]


class _Lookout:
    """Looks at one number for all who wait for it.

    Looks are made one at a time. Whatever asks for one while one is under way gets the next, and shares it with
    all that ask meanwhile: the one under way may be from before an event that somebody knows of.

    Mutable state, changed between awaits only: `_waiting`, who waits for which mark; `_again`, whether there must
    be a look that begins from now on, and `_next`, which is done when it has ended; `_looking`, the task that
    looks, there exactly while it does; `_timer`, for the look that is due though nothing was heard of.
    """

    def __init__(
        self, look: Look, interval: float, watch: Callable[[Callable[[], None]], Callable[[], None]]
    ) -> None:
        """
        Args:
            interval: seconds after which it looks though nothing was heard of.
            watch: has what it is given called when the number may have changed; returns what ends that.
        """
        self._look = look
        self._interval = interval
        self._waiting: dict[asyncio.Future[None], float] = {}
        self._again = False
        self._next: asyncio.Future[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._unwatch = watch(self.wake)
        self._timer = asyncio.get_running_loop().call_later(interval, self.wake)

    def join(self, mark: float) -> asyncio.Future[None]:
        """What is done when the mark is reached, or when a look has failed that began after this."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[waiting] = mark
        return waiting

    def leave(self, waiting: asyncio.Future[None]) -> bool:
        """Wait no more. Was it the last one, with whom the lookout closes?"""
        del self._waiting[waiting]
        if self._waiting:
            return False
        self._unwatch()
        self._timer.cancel()
        if self._looking is not None:
            self._looking.cancel()
        return True

    def wake(self) -> None:
        """Look: the number may have changed."""
        self._again = True
        if self._looking is None:
            self._looking = asyncio.create_task(self._keep_looking())

    def look(self) -> asyncio.Future[None]:
        """Look. Done when that has ended, however it did; not to be cancelled, as others may wait for it."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        self.wake()
        return self._next

    async def _keep_looking(self) -> None:
        self._timer.cancel()
        try:
            while self._again:
                self._again = False
                ended, self._next = self._next, None
                await self._look_once()
                if ended is not None:
                    ended.set_result(None)
        finally:
            self._looking = None
        self._timer = asyncio.get_running_loop().call_later(self._interval, self.wake)

    async def _look_once(self) -> None:
        marks = {waiting: mark for waiting, mark in self._waiting.items() if not waiting.done()}
        if not marks:
            return
        try:
            number = await self._look(min(marks.values()))
        except Exception as error:
            for waiting in marks:
                fail(waiting, error)
            return
        for waiting, mark in marks.items():
            if number >= mark:
                succeed(waiting, None)


def _completion(event: Event) -> float:
    """How much of the event is there, as `PollingSessionListener.wait_for_event_completion` looks at it."""
    content = cast(dict[str, object], event.data)
    if "chunks" not in content:
        return _COMPLETE
    chunks = cast(list[str | None], content["chunks"])
    return _COMPLETE if chunks and chunks[-1] is None else _NONE


def _chunks(event: Event) -> float:
    """How much of the event is there, as `PollingSessionListener.wait_for_new_streaming_chunks` looks at it."""
    content = cast(dict[str, object], event.data)
    if "chunks" not in content:
        return _COMPLETE
    chunks = cast(list[str | None], content["chunks"])
    return _COMPLETE if chunks and chunks[-1] is None else len(chunks)
