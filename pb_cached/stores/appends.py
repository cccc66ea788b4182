"""Events that wait for their session: they share its turn, and a commit.

An event's offset follows from the last one of its session, so those of one session are written one after the
other, and a busy one would get one event into each commit. So whatever has come when the session's turn is there
is numbered in the order in which it came, and committed together.

Between servers a unique index decides: who comes too late reads again, and takes the offsets that follow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

from parlant.core.common import JSONSerializable, generate_id
from parlant.core.sessions import Event, EventId, EventKind, EventSource, SessionId

from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.errors import PBCachedError, UniqueViolation
from pb_cached.outcomes import fail, succeed
from pb_cached.pocketbase.commit import Operation
from pb_cached.stores.held import attempts


class Draft:
    """An event that has no offset yet, and who waits for it."""

    __slots__ = ("created", "data", "kind", "metadata", "outcome", "source", "trace_id")

    def __init__(
        self,
        source: EventSource,
        kind: EventKind,
        trace_id: str,
        data: JSONSerializable,
        metadata: Mapping[str, JSONSerializable],
        created: datetime,
    ) -> None:
        """
        Args:
            data, metadata: nobody changes them any more.
        """
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
    """

    def __init__(
        self,
        events: Callable[[], PocketBaseDocumentCollection[Any]],
        serialize: Callable[[Event, SessionId], Mapping[str, Any]],
        take_turn: Callable[[SessionId], None],
    ) -> None:
        """
        Args:
            take_turn: has `append` called in the session's turn.
        """
        self._events = events
        self._serialize = serialize
        self._take_turn = take_turn
        self._waiting: dict[SessionId, list[Draft]] = {}

    async def add(self, session_id: SessionId, draft: Draft) -> Event:
        """Append an event. It is committed when this returns."""
        waiting = self._waiting.get(session_id)
        if waiting is None:
            self._waiting[session_id] = [draft]
            self._take_turn(session_id)
        else:
            waiting.append(draft)
        return await draft.outcome

    async def append(self, session_id: SessionId, prepare: Callable[[], Awaitable[None]]) -> None:
        """Append all that waits, and tell who waits for it. To be called in the session's turn.

        Args:
            prepare: comes first. What it raises is raised to all of them.
        """
        drafts = self._waiting.pop(session_id)
        everyone = tuple(drafts)
        try:
            await prepare()
            if await self._number(session_id, drafts):  # seldom: what retries costs as much as a write
                async for attempt in attempts():
                    with attempt:
                        if late := await self._number(session_id, drafts):
                            raise late
        except Exception as error:
            for draft in everyone:
                fail(draft.outcome, error)
        finally:
            for draft in everyone:
                draft.outcome.cancel()  # where the event loop ends; else all have been told

    async def _number(self, session_id: SessionId, drafts: list[Draft]) -> UniqueViolation | None:
        """Give each event its offset, and commit them. What is left in `drafts` came too late: another server has
        taken the offsets."""
        events = self._events()
        latest = await events.greatest({"session_id": {"$eq": session_id}}, "offset")
        offset = 0 if latest is None else latest + 1
        made: list[tuple[Draft, Event]] = []
        operations: list[Operation] = []
        for draft in drafts:
            event = draft.event(offset)
            try:
                operations.append(events.codec.insert(self._serialize(event, session_id)))
            except PBCachedError as error:  # and the offset is the next one's
                fail(draft.outcome, error)
                continue
            made.append((draft, event))
            offset += 1
        drafts.clear()
        refusal: UniqueViolation | None = None
        for (draft, event), outcome in zip(made, await events.commit(operations), strict=True):
            if outcome is None:
                succeed(draft.outcome, event)
            elif isinstance(outcome, UniqueViolation):
                refusal = outcome
                drafts.append(draft)
            else:
                fail(draft.outcome, outcome)
        return refusal
