"""Events that wait for their session: they share its turn, and a commit.

An event's offset follows from the last one of its session, so those of one session are written one after the
other, and a busy one would get one event into each commit. So whatever has come when the session's turn is there
is numbered in the order in which it came, and committed together. Mostly nothing stands in an event's way: then it
is on its way before its caller waits, and costs no task.

Between servers a unique index decides: who comes too late takes the offsets that follow. Where PocketBase can be
left to number events, a session that several servers write to is left to it for as long as they do: nobody comes
too late then, and its own order is as fair as it gets. Where it cannot, the last offset is asked for, and at once:
who waits, or reads a whole session first, or brings much, is too late again.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeGuard

from cachetools import LRUCache
from parlant.core.common import JSONSerializable, generate_id
from parlant.core.sessions import Event, EventId, EventKind, EventSource, SessionId

from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.errors import (
    DocumentTooLarge,
    InvalidDocument,
    OutcomeUnknown,
    PocketBaseUnavailable,
    QueueFull,
    RecordNotFound,
    RequestRejected,
    SchemaError,
    UniqueViolation,
)
from pb_cached.exact import dumps
from pb_cached.outcomes import fail, succeed
from pb_cached.pocketbase.commit import Operation, Reply
from pb_cached.stores.held import RETRY_AFTER
from pb_cached.stores.turns import Turns
from pb_cached.writes.calls import Calls, Generation
from pb_cached.writes.room import Room

CONTENDED_SECONDS: Final = 1.0
"""For so long after another server has written to a session, its offsets are PocketBase's affair."""


class Draft:
    """An event that has no offset yet, and who waits for it, and until when."""

    __slots__ = ("call", "created", "data", "kind", "metadata", "outcome", "size", "source", "trace_id", "until")

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
        self.call: Generation | None = None
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


class _Contention:
    """Another server writes to a session: until when that counts, and the last offset that was ours."""

    __slots__ = ("last", "until")

    def __init__(self, until: float, last: int) -> None:
        self.until = until
        self.last = last


class Appends:
    """The drafts of a store.

    Mutable state: `_waiting`, by session; there is an entry exactly while somebody is to take its turn.
    `_contended` tells until when a session's offsets are PocketBase's affair: others write to it too, and the
    cache hears of that too late.
    """

    def __init__(
        self,
        events: Callable[[], PocketBaseDocumentCollection[Any]],
        serialize: Callable[[Event, SessionId], Mapping[str, Any]],
        is_ready: Callable[[SessionId], bool],
        make_ready: Callable[[SessionId], Awaitable[None]],
        begin: Callable[[SessionId], None],
        turns: Turns,
        room: Room,
        calls: Calls,
        deadline: float,
    ) -> None:
        """
        Args:
            is_ready: is it known, without waiting for anything, that a session may be appended to?
            make_ready: waits until it may. What this raises is raised to all that wait for it.
            begin: has `append` called in the session's turn.
            room, calls: for what is not decided.
            deadline: seconds until a draft must have been sent.
        """
        self._events = events
        self._serialize = serialize
        self._is_ready = is_ready
        self._make_ready = make_ready
        self._begin = begin
        self._turns = turns
        self._room = room
        self._calls = calls
        self._deadline = deadline
        self._waiting: dict[SessionId, list[Draft]] = {}
        self._contended: LRUCache[SessionId, _Contention] = LRUCache(1000)

    def add(self, session_id: SessionId, draft: Draft) -> None:
        """Have an event appended. There is room for it."""
        self._room.enter(draft.size)
        draft.call = self._calls.begin()
        try:
            is_on_its_way = self._submit(session_id, draft)
        except Exception as error:
            self._told(draft, error)
        else:
            if not is_on_its_way:
                self._wait(session_id, draft)

    def _wait(self, session_id: SessionId, draft: Draft, *, first: bool = False) -> None:
        waiting = self._waiting.get(session_id)
        if waiting is None:
            self._waiting[session_id] = [draft]
            self._begin(session_id)
        else:
            waiting.insert(0 if first else len(waiting), draft)

    async def wait_and_add(self, session_id: SessionId, draft: Draft) -> None:
        """The same, as soon as there is room.

        Raises:
            QueueFull: there was none until the draft's deadline.
        """
        draft.call = self._calls.begin()
        try:
            await self._room.wait_and_enter(draft.size, draft.until)
        except BaseException:
            self._calls.end(draft.call)
            raise
        self._wait(session_id, draft)

    # at once

    def _submit(self, session_id: SessionId, draft: Draft) -> bool:
        """Have it committed, in the session's turn, if there is nothing to wait for before that."""
        if session_id in self._waiting or self._is_contended(session_id) or not self._is_ready(session_id):
            return False
        latest = self._events().greatest_at_hand({"session_id": {"$eq": session_id}}, "offset")
        turn = (str(session_id),)
        if latest is None or not self._turns.take_at_once(turn):
            return False
        is_on_its_way = False
        try:
            event = draft.event(_following(*latest))
            operation = self._events().codec.insert(self._serialize(event, session_id))
            decided = partial(self._decided, session_id, draft, event)
            is_on_its_way = self._events().commit_at_once(operation, decided)
        finally:
            if not is_on_its_way:
                self._turns.leave(turn)
        return is_on_its_way

    def _decided(self, session_id: SessionId, draft: Draft, event: Event, error: Exception | None) -> None:
        if error is None:
            self._over(draft)
            succeed(draft.outcome, event)
        elif _is_late(error):
            self._contend(session_id)
            self._wait(session_id, draft, first=True)
        else:
            self._told(draft, error)
        self._turns.leave((str(session_id),))

    # in the session's turn

    async def append(self, session_id: SessionId) -> None:
        """Append all that waits, and tell who waits for it. To be called in the session's turn."""
        drafts = deque(self._waiting.pop(session_id))
        try:
            await self._make_ready(session_id)
            await self._append(session_id, drafts)
        except Exception as error:
            for draft in drafts:
                self._told(draft, error)
        finally:
            for draft in drafts:
                draft.outcome.cancel()  # where the event loop ends; else all have been told
                self._over(draft)

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

        A commit that PocketBase refuses leaves nothing, so its events are numbered anew: where another server has
        taken the offsets; else all but the one that is to blame, who is being looked for by halves.

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
                replies = await self._events().commit(operations)
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
                    self._contend(session_id)
                    if late is not None:
                        most = max(1, len(made) // 2)
                        await asyncio.sleep(random.uniform(0, RETRY_AFTER))
                    late = error
                    continue
                if len(made) == 1:
                    self._told(drafts.popleft(), error)
                    most = 2
                else:
                    most = len(made) // 2
                continue
            for (draft, event), operation, reply in zip(made, operations, replies, strict=True):
                self._written(session_id, draft, event, operation, reply)
                drafts.popleft()
            most *= 2
            late = None

    def _written(
        self, session_id: SessionId, draft: Draft, event: Event, operation: Operation, reply: Reply
    ) -> None:
        if operation.is_open:
            try:
                event = replace(event, offset=self._offset(event, operation, reply))
            except Exception as error:
                self._told(draft, error)
                return
            contention = self._contended.get(session_id)
            if contention is None or event.offset != contention.last + 1:
                self._contend(session_id, event.offset)
            else:
                contention.last = event.offset
        self._over(draft)
        succeed(draft.outcome, event)

    def _offset(self, event: Event, operation: Operation, reply: Reply) -> int:
        """The one that PocketBase has given an event."""
        if not reply.record:
            raise RecordNotFound(f"event '{event.id}' was deleted as soon as it was there", status=404)
        return int(self._events().left(operation, reply)["offset"])

    async def _next_offset(self, session_id: SessionId, *, anew: bool) -> int | None:
        """The offset after the last one; None where it is left to PocketBase."""
        events = self._events()
        anew = anew or self._is_contended(session_id)
        if anew and events.codec.may_leave_open("offset"):
            return None
        return _following(await events.greatest({"session_id": {"$eq": session_id}}, "offset", anew=anew))

    def _is_contended(self, session_id: SessionId) -> bool:
        contention = self._contended.get(session_id) if self._contended else None
        return contention is not None and contention.until > time.monotonic()

    def _contend(self, session_id: SessionId, last: int = -1) -> None:
        """Another server has just written to it."""
        self._contended[session_id] = _Contention(time.monotonic() + CONTENDED_SECONDS, last)

    def _number(
        self, session_id: SessionId, drafts: deque[Draft], most: int, offset: int | None
    ) -> tuple[list[tuple[Draft, Event]], list[Operation]]:
        """The first drafts as events: as many as fit into one commit, and no more than `most`. Those that cannot
        be encoded are told, and their offset is the next one's."""
        events = self._events()
        made: list[tuple[Draft, Event]] = []
        operations: list[Operation] = []
        refused: list[Draft] = []
        for draft in itertools.islice(drafts, most):
            place = len(made)
            event = draft.event(place if offset is None else offset + place)
            try:
                document = self._serialize(event, session_id)
                if offset is None:
                    operation = events.codec.append(document, "offset", place + 1)
                else:
                    operation = events.codec.insert(document)
            except Exception as error:
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
        self._over(draft)
        fail(draft.outcome, error)

    def _over(self, draft: Draft) -> None:
        """It is decided, and no more than once."""
        call, draft.call = draft.call, None
        if call is not None:
            self._room.leave(draft.size)
            self._calls.end(call)


def _following(latest: int | None) -> int:
    """The offset after the last one."""
    return 0 if latest is None else latest + 1


def _is_late(error: Exception) -> TypeGuard[UniqueViolation]:
    """Has another server taken the offsets? Some other unique index is the event's own affair."""
    return isinstance(error, UniqueViolation) and (not error.fields or "offset" in error.fields)
