"""Parlant's session store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, Final, Self, cast

import semver
from parlant.core.common import ItemNotFoundError, JSONSerializable, UniqueId, Version, generate_id
from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import BaseDocument, CollectionIndex
from parlant.core.sessions import Event, EventId, EventKind, EventSource, SessionDocumentStore, SessionId
from typing_extensions import override

from pb_cached.database import PocketBaseDocumentCollection, PocketBaseDocumentDatabase
from pb_cached.errors import PBCachedError, UniqueViolation
from pb_cached.pocketbase.codec import snapshot
from pb_cached.pocketbase.commit import Operation
from pb_cached.stores.held import HoldsItsWrites, attempts, held
from pb_cached.stores.versions import versions_told

_UNCHANGED_SINCE = "0.8.0"
"""Parlant 3.3 brings events up to this version and knows no way on to its own 0.9.0, though nothing about events
changed between them. Every event of an older Parlant would be refused."""

OFFSETS: Final = CollectionIndex(
    fields=(("session_id", SortDirection.ASC), ("offset", SortDirection.ASC)), unique=True
)
_of_session = held("session_id")


class _Draft:
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

    def succeed(self, event: Event) -> None:
        if not self.outcome.done():
            self.outcome.set_result(event)

    def fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # a cancelled caller is no reason for a warning


class PocketBaseSessionStore(HoldsItsWrites, SessionDocumentStore):
    """Sessions and their events. The writes of a session take turns, and among servers a unique index decides:
    each event has an offset of its own, and none is left out. A cancelled caller's write is still finished.

    Mutable state: `_drafts`, by session the events that wait for its turn: they share it, and a commit.
    """

    def __init__(self, database: PocketBaseDocumentDatabase, allow_migration: bool = False) -> None:
        super().__init__(database, allow_migration)
        self._drafts: dict[SessionId, list[_Draft]] = {}

    create_session = held()(SessionDocumentStore.create_session)
    delete_session = _of_session(SessionDocumentStore.delete_session)
    update_session = _of_session(SessionDocumentStore.update_session)
    set_metadata = _of_session(SessionDocumentStore.set_metadata)
    unset_metadata = _of_session(SessionDocumentStore.unset_metadata)
    upsert_labels = _of_session(SessionDocumentStore.upsert_labels)
    remove_labels = _of_session(SessionDocumentStore.remove_labels)
    delete_event = held()(SessionDocumentStore.delete_event)  # changes one field of its own
    update_event = _of_session(SessionDocumentStore.update_event)

    @override
    async def __aenter__(self) -> Self:
        async with versions_told(self, self._database):
            await super().__aenter__()
        await self._events.ensure_indexes([OFFSETS])
        return self

    @property
    def _sessions(self) -> PocketBaseDocumentCollection[Any]:
        return _ours(self._session_collection)

    @property
    def _events(self) -> PocketBaseDocumentCollection[Any]:
        return _ours(self._event_collection)

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

        Raises:
            ItemNotFoundError: there is no such session.
            InvalidDocument: the data is no JSON. Nothing was written.
            PBCachedError: as `insert_one`.
        """
        draft = _Draft(
            source,
            kind,
            snapshot(trace_id, "$.trace_id"),
            snapshot(data, "$.data"),  # the caller may change it before its turn has come
            snapshot(metadata, "$.metadata"),
            creation_utc or datetime.now(UTC),
        )
        waiting = self._drafts.get(session_id)
        if waiting is None:
            self._drafts[session_id] = [draft]
            self._hold(self._append(session_id))
        else:
            waiting.append(draft)
        return await draft.outcome

    async def _append(self, session_id: SessionId) -> None:
        async with self._turn((str(session_id),)):
            drafts = self._drafts.pop(session_id)
            everyone = list(drafts)
            try:
                if not await self._sessions.exists({"id": {"$eq": session_id}}):
                    raise ItemNotFoundError(item_id=UniqueId(session_id), message="Session not found")
                if await self._append_all(session_id, drafts):  # seldom: what retries costs as much as a write
                    async for attempt in attempts():
                        with attempt:
                            if late := await self._append_all(session_id, drafts):
                                raise late
            except Exception as error:
                for draft in everyone:
                    draft.fail(error)
            finally:
                for draft in everyone:
                    draft.outcome.cancel()  # where the event loop ends; else all have been told

    async def _append_all(self, session_id: SessionId, drafts: list[_Draft]) -> UniqueViolation | None:
        """Give each event its offset, and commit them. What is left in `drafts` came too late: another server has
        taken the offsets."""
        latest = await self._events.greatest({"session_id": {"$eq": session_id}}, "offset")
        offset = 0 if latest is None else latest + 1
        made: list[tuple[_Draft, Event]] = []
        operations: list[Operation] = []
        for draft in drafts:
            event = draft.event(offset)
            try:
                operations.append(self._events.insertion(self._serialize_event(event, session_id)))
            except PBCachedError as error:  # and the offset is the next one's
                draft.fail(error)
                continue
            made.append((draft, event))
            offset += 1
        drafts.clear()
        refusal: UniqueViolation | None = None
        for (draft, event), outcome in zip(made, await self._events.commit(operations), strict=True):
            if outcome is None:
                draft.succeed(event)
            elif isinstance(outcome, UniqueViolation):
                refusal = outcome
                drafts.append(draft)
            else:
                draft.fail(outcome)
        return refusal

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

    @override
    async def _event_document_loader(self, doc: BaseDocument) -> Any:
        if semver.Version.parse(doc["version"]) <= semver.Version.parse(_UNCHANGED_SINCE):
            up_to = cast(SessionDocumentStore, SimpleNamespace(VERSION=Version.from_string(_UNCHANGED_SINCE)))
            migrated = await SessionDocumentStore._event_document_loader(up_to, doc)
            if migrated is None:
                return None
            doc = cast(BaseDocument, {**migrated, "version": Version.String("0.9.0")})
        return await super()._event_document_loader(doc)


def _ours(collection: object) -> PocketBaseDocumentCollection[Any]:
    if not isinstance(collection, PocketBaseDocumentCollection):
        raise PBCachedError("a PocketBaseSessionStore must be open, and on a PocketBaseDocumentDatabase")
    return collection
