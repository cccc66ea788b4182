"""Parlant's session store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, Final, Self, cast

import semver
from parlant.core.common import ItemNotFoundError, JSONSerializable, UniqueId, Version
from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import BaseDocument, CollectionIndex
from parlant.core.sessions import (
    Event,
    EventId,
    EventKind,
    EventSource,
    EventUpdateParams,
    SessionDocumentStore,
    SessionId,
)
from typing_extensions import override

from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.config import STREAMING_INTERVAL
from pb_cached.database import PocketBaseDocumentDatabase
from pb_cached.errors import ConfigError, NotCommitted, OutcomeUnknown, PBCachedError, QueueFull, named
from pb_cached.exact import dumps, loads
from pb_cached.pocketbase.codec import snapshot
from pb_cached.stores.appends import Appends, Draft
from pb_cached.stores.deletions import Deletions
from pb_cached.stores.held import HoldsItsWrites, held
from pb_cached.stores.streaming import HeldBack, Place, is_on_its_way
from pb_cached.stores.versions import versions_told

_UNCHANGED_SINCE = "0.8.0"
"""Parlant 3.3 brings events up to this version and knows no way on to its own 0.9.0, though nothing about events
changed between them. Every event of an older Parlant would be refused."""

OFFSETS: Final = CollectionIndex(
    fields=(("session_id", SortDirection.ASC), ("offset", SortDirection.ASC)), unique=True
)
_of_session = held("session_id")


class PocketBaseSessionStore(HoldsItsWrites, SessionDocumentStore):
    """Sessions and their events. The writes of a session take turns, and among servers a unique index decides:
    each event has an offset of its own, and none is left out. A cancelled caller's write is still finished.

    Parlant writes a streamed message again with each chunk. Here that is done every so often, and at once when the
    message is complete: an acknowledged chunk is in PocketBase `streaming_interval` later, or before the session's
    next event. Readers of this store see it at once. If it cannot be written, that is logged and tried again until
    it can; meanwhile the message's next chunk is written before it is acknowledged, so its writer is told.

    Args:
        streaming_interval: seconds; 0 writes each chunk before it is acknowledged.

    Raises:
        ConfigError: it is given another database than ours.
    """

    def __init__(
        self,
        database: PocketBaseDocumentDatabase,
        allow_migration: bool = False,
        *,
        streaming_interval: float = STREAMING_INTERVAL,
    ) -> None:
        if not isinstance(database, PocketBaseDocumentDatabase):
            raise ConfigError(
                f"a PocketBaseSessionStore needs a PocketBaseDocumentDatabase, not a {type(database).__name__}"
            )
        super().__init__(database, allow_migration)
        self._log = database.log
        self._home = database
        self._held_back = HeldBack(streaming_interval, self._begin_to_write)
        self._appends = Appends(
            lambda: self._events,
            self._serialize_event,
            self._may_append,
            self._ready_to_append,
            self._begin_to_append,
            self._turns,
            self._room,
            self._calls,
            self._limits.deadline,
        )
        self._deletions: Deletions

    create_session = held()(SessionDocumentStore.create_session)
    update_session = held("session_id", merges=False)(SessionDocumentStore.update_session)
    set_metadata = _of_session(SessionDocumentStore.set_metadata)
    unset_metadata = _of_session(SessionDocumentStore.unset_metadata)
    upsert_labels = _of_session(SessionDocumentStore.upsert_labels)
    remove_labels = _of_session(SessionDocumentStore.remove_labels)
    delete_event = held()(SessionDocumentStore.delete_event)  # changes one field of its own

    @override
    async def __aenter__(self) -> Self:
        async with versions_told(self, self._database):
            await super().__aenter__()
        await self._events.ensure_indexes([OFFSETS])
        self._deletions = Deletions(self._sessions, self._events, self._log)
        await self._deletions.open(self._home)
        self._belong_to(self._home)
        return self

    @override
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: object | None,
    ) -> None:
        """Wait for all writes, and write what is held back.

        Raises:
            NotCommitted: that could not be done.
        """
        try:
            await super().__aexit__(exc_type, exc_value, traceback)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._closing.left()):
                    await self.flush()
        finally:
            await self._deletions.close()
            lost = self._held_back.let_all_go()
        if lost:
            raise NotCommitted(
                f"the last chunks of {len(lost)} streamed messages could not be written, as the log says: "
                f"events {named([event for _, event in lost])}"
            )

    @property
    def _sessions(self) -> PocketBaseDocumentCollection[Any]:
        return cast("PocketBaseDocumentCollection[Any]", self._session_collection)

    @property
    def _events(self) -> PocketBaseDocumentCollection[Any]:
        return cast("PocketBaseDocumentCollection[Any]", self._event_collection)

    @override
    async def flush(self) -> None:
        """Return when every write called so far is decided, and what is held back of streamed messages is written.
        That it cannot be written is logged."""
        await super().flush()
        await asyncio.gather(*map(self._write_or_hold_on, self._held_back.places()))

    # who waits for changes

    @property
    def hears_everything(self) -> bool:
        """Does `watch` hear of all changes that reads show, or of this process's own alone?"""
        return self._events.hears_everything

    def watch(self, session_id: SessionId, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` whenever the session or its events may have changed. Until what is returned is called.

        Watch first, then look, then wait: `wake` must only note it, and what woke it is seen by the next read.
        """
        leave_session = self._sessions.watch({"id": {"$eq": session_id}}, wake)
        leave_events = self._events.watch({"session_id": {"$eq": session_id}}, wake)

        def leave() -> None:
            leave_session()
            leave_events()

        return leave

    # sessions and events

    @_of_session
    async def delete_session(self, session_id: SessionId) -> None:
        """Delete a session and its events. Nobody finds either any more when the session is deleted. If the events
        cannot be deleted then, by a crash, say, they are deleted later: by this store, or when one is opened."""
        await self._deletions.delete(session_id)

    @override
    async def create_event(
        self,
        session_id: SessionId,
        source: EventSource,
        kind: EventKind,
        trace_id: str,
        data: JSONSerializable,
        metadata: Mapping[str, JSONSerializable] = {},
        creation_utc: datetime | None = None,
    ) -> Event:
        """Append an event to a session. It is committed when this returns, and has the offset after the last.

        What is held back of the session's messages is written first: so a turn that was cancelled leaves its last
        chunk in PocketBase before it is said that it was cancelled.

        Raises:
            ItemNotFoundError: there is no such session.
            InvalidDocument: the data is no JSON. Nothing was written.
            QueueFull: the session's writes before it, or those of all sessions, took longer than the deadline.
            PBCachedError: as `insert_one`.
        """
        draft = Draft(
            source,
            kind,
            snapshot(trace_id, "$.trace_id"),
            snapshot(data, "$.data"),  # the caller may change it before its turn has come
            snapshot(metadata, "$.metadata"),
            creation_utc or datetime.now(UTC),
            self._limits.deadline,
        )
        if self._room.is_full:
            await asyncio.shield(self._hold(self._appends.wait_and_add(session_id, draft)))
        else:
            self._appends.add(session_id, draft)
        return await draft.outcome

    def _begin_to_append(self, session_id: SessionId) -> None:
        self._hold(self._append(session_id))

    async def _append(self, session_id: SessionId) -> None:
        until: float | None = None
        while True:
            try:
                async with self._in_turn(session_id, until=until):
                    await self._appends.append(session_id)
                    return
            except QueueFull:  # of the turn: all that `append` meets it tells those who wait
                until = self._appends.give_up(session_id)
                if until is None:
                    return

    def _may_append(self, session_id: SessionId) -> bool:
        return not self._held_back.of(session_id) and bool(
            self._sessions.exists_at_hand({"id": {"$eq": session_id}})
        )

    async def _ready_to_append(self, session_id: SessionId) -> None:
        for event_id in self._held_back.of(session_id):
            await self._write_held_back(session_id, event_id)
        if not await self._sessions.exists({"id": {"$eq": session_id}}):
            raise ItemNotFoundError(item_id=UniqueId(session_id), message="Session not found")

    @_of_session
    async def update_event(self, session_id: SessionId, event_id: EventId, params: EventUpdateParams) -> Event:
        """As Parlant's, but for the chunks of a streamed message: see the class."""
        if "data" not in params:
            await self._write_held_back(session_id, event_id)
        elif params.keys() == {"data"} and is_on_its_way(params["data"]) and self._held_back.may_hold(event_id):
            event = await super().update_event(session_id, event_id, {})
            if event.kind == EventKind.MESSAGE:
                return self._hold_back((session_id, event_id), event, params)
        try:
            event = await super().update_event(session_id, event_id, params)
        except OutcomeUnknown:
            # It may be applied yet. What is held back is older, and must not be written over it.
            if "data" in params and self._held_back.data(event_id) is not None:
                self._held_back.hold((session_id, event_id), dumps(params["data"]))
            raise
        if "data" in params and self._held_back.let_go(event_id):
            self._wake(session_id)  # who was woken by the commit was still shown what lay here
        return self._held_back.laid_over(event)

    def _hold_back(self, place: Place, event: Event, params: EventUpdateParams) -> Event:
        """Hold a chunk back, unless it is one that could not be written: that is said to its writer now."""
        document: Mapping[str, Any] = self._serialize_event(event, place[0])
        data = snapshot({"data": params["data"]})
        self._events.codec.update("", 0, document, data)
        self._held_back.hold(place, dumps(data["data"]))
        self._wake(place[0])
        return replace(event, data=data["data"])

    def _wake(self, session_id: SessionId) -> None:
        self._events.wake({"session_id": {"$eq": session_id}})

    @override
    async def read_event(self, session_id: SessionId, event_id: EventId) -> Event:
        held = self._held_back.data(event_id) is not None
        event = await super().read_event(session_id, event_id)
        if held and self._held_back.data(event_id) is None:
            # It was written while we read, and what we have may be older: it was shown to others.
            event = await super().read_event(session_id, event_id)
        return self._held_back.laid_over(event)

    @override
    async def list_events(self, session_id: SessionId, *args: Any, **kwargs: Any) -> Sequence[Event]:
        held, deleted = self._held_back.of(session_id), self._deletions.decided
        events = await super().list_events(session_id, *args, **kwargs)
        # As in `read_event`; or the session was deleted, and these are what was left of its events at some moment.
        if held - self._held_back.of(session_id) or deleted != self._deletions.decided:
            events = await super().list_events(session_id, *args, **kwargs)
        if not self._held_back.of(session_id):
            return events
        return [self._held_back.laid_over(event) for event in events]

    def _begin_to_write(self, place: Place) -> None:
        self._hold(self._write_or_hold_on(place))

    async def _write_or_hold_on(self, place: Place) -> None:
        try:
            await self._write_held_back(*place)
        except QueueFull:  # the turn did not come
            if self._held_back.data(place[1]) is not None:
                self._held_back.failed(place[1])

    @_of_session
    async def _write_held_back(self, session_id: SessionId, event_id: EventId) -> None:
        data = self._held_back.data(event_id)
        if data is None:
            return
        where: Any = {"id": {"$eq": event_id}, "session_id": {"$eq": session_id}}
        try:
            await self._events.update_one(where, {"data": loads(data)})  # none matches where the session is gone
        except PBCachedError as error:
            self._log.warning(
                "chunks of a streamed message are not written yet",
                session=session_id,
                event_id=event_id,
                reason=str(error),
            )
            self._held_back.failed(event_id)
        else:
            self._held_back.let_go(event_id)

    @override
    async def _event_document_loader(self, doc: BaseDocument) -> Any:
        if semver.Version.parse(doc["version"]) <= semver.Version.parse(_UNCHANGED_SINCE):
            up_to = cast(SessionDocumentStore, SimpleNamespace(VERSION=Version.from_string(_UNCHANGED_SINCE)))
            migrated = await SessionDocumentStore._event_document_loader(up_to, doc)
            if migrated is None:
                return None
            doc = cast(BaseDocument, {**migrated, "version": Version.String("0.9.0")})
        return await super()._event_document_loader(doc)
