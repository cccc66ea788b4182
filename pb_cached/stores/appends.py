"""Events that wait for their session: they share its turn, and a commit.

An event's offset follows from the last one of its session, so those of one session are written one after the
other, and a busy one would get one event into each commit. So whatever has come when the session's turn is there
is numbered in the order in which it came, and committed together.

Between servers a unique index decides: who comes too late reads again, and takes the offsets that follow. It does
so at once, and asks PocketBase itself: who waits, or reads a whole session first, is too late again.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Final, TypeGuard

from cachetools import LRUCache
from parlant.core.common import JSONSerializable, generate_id
from parlant.core.sessions import Event, EventId, EventKind, EventSource, SessionId

from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.errors import (
    DocumentTooLarge,
    InvalidDocument,
    OutcomeUnknown,
    PBCachedError,
    PocketBaseUnavailable,
    QueueFull,
    RequestRejected,
    SchemaError,
    UniqueViolation,
)
from pb_cached.exact import dumps
from pb_cached.outcomes import fail, succeed
from pb_cached.pocketbase.commit import Operation
from pb_cached.stores.held import RETRY_AFTER
from pb_cached.writes.room import Room

CONTENDED_SECONDS: Final = 1.0
"""After another server has written to a session, its last offset is asked for at PocketBase."""


class Draft:
    """An event that has no offset yet, and who waits for it, and until when."""

    __slots__ = ("created", "data", "kind", "metadata", "outcome", "size", "source", "trace_id", "until")

    def __init__(
        self,
        source: EventSource,
        kind: EventKind,
        trace_id: str,
        data: JSONSerializable,
        metadata: Mapping[str, JSONSerializable],
        created: datetime,
        deadline: float,
    ) -> None:
        """
        Args:
            data, metadata: nobody changes them any more.
            deadline: seconds until it must have been sent.
        """
        self.until = time.monotonic() + deadline
        self.size = len(dumps((data, metadata)))
        self.source = source
        self.kind = kind
        self.trace_id = trace_id
        self.data = data
        self.metadata = metadata
        self.created = created
        self.outcome: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

    def event(self, offset: int) -> Event:
        return Event(
            id=EventId(generate_id()),
            source=self.source,
            kind=self.kind,
            offset=offset,
            creation_utc=self.created,
            trace_id=self.trace_id,
            data=self.data,
            metadata=self.metadata,
            deleted=False,
        )


class Appends:
    """The drafts of a store.

    Mutable state: `_waiting`, by session; there is an entry exactly while somebody is to take its turn.
    `_contended` tells until when a session's last offset is asked for at PocketBase: others write to it too, and
    the cache hears of that too late.
    """

    def __init__(
        self,
        events: Callable[[], PocketBaseDocumentCollection[Any]],
        serialize: Callable[[Event, SessionId], Mapping[str, Any]],
        take_turn: Callable[[SessionId], None],
        room: Room,
        deadline: float,
    ) -> None:
        """
        Args:
            take_turn: has `append` called in the session's turn.
            room: for what is not decided.
            deadline: seconds until a draft must have been sent.
        """
        self._events = events
        self._serialize = serialize
        self._take_turn = take_turn
        self._room = room
        self._deadline = deadline
        self._waiting: dict[SessionId, list[Draft]] = {}
        self._contended: LRUCache[SessionId, float] = LRUCache(1000)

    def add(self, session_id: SessionId, draft: Draft) -> None:
        """Have an event appended. There is room for it."""
        self._room.enter(draft.size)
        self._add(session_id, draft)

    def _add(self, session_id: SessionId, draft: Draft) -> None:
        waiting = self._waiting.get(session_id)
        if waiting is None:
            self._waiting[session_id] = [draft]
            self._take_turn(session_id)
        else:
            waiting.append(draft)

    async def wait_and_add(self, session_id: SessionId, draft: Draft) -> None:
        """The same, as soon as there is room.

        Raises:
            QueueFull: there was none until the draft's deadline.
        """
        await self._room.wait_and_enter(draft.size, draft.until)
        self._add(session_id, draft)

    async def append(self, session_id: SessionId, prepare: Callable[[], Awaitable[None]]) -> None:
        """Append all that waits, and tell who waits for it. To be called in the session's turn.

        Args:
            prepare: comes first. What it raises is raised to all of them.
        """
        drafts = deque(self._waiting.pop(session_id))
        try:
            await prepare()
            await self._append(session_id, drafts)
        except Exception as error:
            for draft in drafts:
                fail(draft.outcome, error)
        finally:
            for draft in drafts:
                draft.outcome.cancel()  # where the event loop ends; else all have been told
                self._room.leave(draft.size)

    def give_up(self, session_id: SessionId) -> float | None:
        """The turn does not come: tell those whose deadline has passed.

        Returns:
            The deadline of the first one who still waits; None where nobody does, and nobody need take the turn.
        """
        drafts = deque(self._waiting.pop(session_id))
        self._drop_overdue(drafts, None)
        if not drafts:
            return None
        self._waiting[session_id] = list(drafts)
        return drafts[0].until

    async def _append(self, session_id: SessionId, drafts: deque[Draft]) -> None:
        """Append these in their order, as many at once as a commit takes, and the next ones when it is known what
        became of those before: no event is ever there whose predecessor may still come. Takes those away that are
        decided.

        A commit that PocketBase refuses leaves nothing, so its events are numbered anew: all of them where another
        server has taken the offsets; else all but the one that is to blame, who is being looked for by halves.

        Raises:
            PBCachedError: none of those that are left will be written for this reason.
        """
        most = len(drafts)
        late: UniqueViolation | None = None
        while self._drop_overdue(drafts, late):
            offset = await self._next_offset(session_id, anew=late is not None)
            made, operations = self._number(session_id, drafts, most, offset)
            if not made:
                continue
            try:
                await self._events().commit(operations)
            except OutcomeUnknown as error:
                for draft, _ in made:
                    drafts.popleft()
                    self._told(draft, error)
                raise PocketBaseUnavailable(
                    f"it is not known whether the events before this one were written ({error}); "
                    "of this one nothing was written"
                ) from error
            except (RequestRejected, DocumentTooLarge, InvalidDocument, SchemaError) as error:
                if _is_late(error):
                    self._contended[session_id] = time.monotonic() + CONTENDED_SECONDS
                    if late is not None:
                        await asyncio.sleep(random.uniform(0, RETRY_AFTER))
                    late = error
                    continue
                if len(made) == 1:
                    self._told(drafts.popleft(), error)
                    most = 2
                else:
                    most = len(made) // 2
                continue
            for draft, event in made:
                drafts.popleft()
                self._room.leave(draft.size)
                succeed(draft.outcome, event)
            most *= 2
            late = None

    async def _next_offset(self, session_id: SessionId, *, anew: bool) -> int:
        if self._contended and self._contended.get(session_id, 0.0) > time.monotonic():
            anew = True
        latest = await self._events().greatest({"session_id": {"$eq": session_id}}, "offset", anew=anew)
        return 0 if latest is None else latest + 1

    def _number(
        self, session_id: SessionId, drafts: deque[Draft], most: int, offset: int
    ) -> tuple[list[tuple[Draft, Event]], list[Operation]]:
        """The first drafts as events: as many as fit into one commit, and no more than `most`. Those that cannot
        be encoded are told, and their offset is the next one's."""
        events = self._events()
        made: list[tuple[Draft, Event]] = []
        operations: list[Operation] = []
        refused: list[Draft] = []
        for draft in itertools.islice(drafts, most):
            event = draft.event(offset + len(made))
            try:
                operation = events.codec.insert(self._serialize(event, session_id))
            except PBCachedError as error:
                refused.append(draft)
                self._told(draft, error)
                continue
            made.append((draft, event))
            operations.append(operation)
        for draft in refused:
            drafts.remove(draft)
        fitting = events.fit(operations)
        return made[:fitting], operations[:fitting]

    def _drop_overdue(self, drafts: deque[Draft], late: UniqueViolation | None) -> bool:
        """Tell those whose deadline has passed: of them nothing was written. Is anybody left?"""
        now = time.monotonic()
        while drafts and drafts[0].until < now:
            error = late or QueueFull(
                f"the session's writes before this event took longer than {self._deadline:g} s (deadline under "
                "[writes]); nothing of it was written"
            )
            self._told(drafts.popleft(), error)
        return bool(drafts)

    def _told(self, draft: Draft, error: Exception) -> None:
        self._room.leave(draft.size)
        fail(draft.outcome, error)


def _is_late(error: Exception) -> TypeGuard[UniqueViolation]:
    """Has another server taken the offsets? Some other unique index is the event's own affair."""
    return isinstance(error, UniqueViolation) and (not error.fields or "offset" in error.fields)
