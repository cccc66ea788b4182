"""Deleting sessions with all of their events, whatever happens in between.

    1. a note of the deletion is written    it says: *if* that session is gone, its events must go
    2. the session is deleted               from here on nobody finds it or them, and nothing brings it back
    3. its events are deleted               page by page, however many there are
    4. the note is deleted                  not before `LATE_SECONDS` have passed

A crash after 1 leaves the session as it was, and a note that means nothing until somebody deletes the session
after all. A crash later leaves a note to which every store that is opened does 3 and 4, and so does this one when
PocketBase was away. Any number of servers may do so at once: what is gone already is no error.

A note outlives its events as another server may have seen the session a moment before 2, and write an event a
moment after 3: its events are deleted a second time before the note is. Nothing is ever looked for but the notes,
so all of it costs as much as there were deletions lately, and not as much as is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast

from parlant.core.common import Version, generate_id
from parlant.core.persistence.common import ObjectId, Where
from parlant.core.persistence.document_database import BaseDocument
from parlant.core.sessions import SessionId

from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.database import PocketBaseDocumentDatabase
from pb_cached.errors import PBCachedError
from pb_cached.telemetry import Log

LATE_SECONDS = 120.0
"""Longer than a write takes: it waits for its turn, for room in the queue and for its commit, half a minute each
at most by default."""
SWEEP_SECONDS = 60.0
"""Between two looks at the notes, while there are any."""
NOTES_AT_ONCE: Final = 100


class Note(BaseDocument, total=False):
    session_id: str


class Deletions:
    """The notes of a session store, and the one task that does what they say.

    Mutable state: `decided`, how many sessions were deleted here, before their events were; `_task`, which runs
    while there is something to do; `_more`, whether something came since it began to look.
    """

    VERSION = Version.from_string("0.1.0")

    def __init__(
        self, sessions: PocketBaseDocumentCollection[Any], events: PocketBaseDocumentCollection[Any], log: Log
    ) -> None:
        self._sessions = sessions
        self._events = events
        self._log = log
        self._notes: PocketBaseDocumentCollection[Note]
        self.decided = 0
        self._task: asyncio.Task[None] | None = None
        self._more = False

    async def open(self, database: PocketBaseDocumentDatabase) -> None:
        """Begin to finish, in the background, what was not finished."""
        notes = await database.get_or_create_collection("deletions", Note, self._load)
        assert isinstance(notes, PocketBaseDocumentCollection)
        self._notes = notes
        self._finish_after(0.0)

    async def close(self) -> None:
        """Leave what is not finished to the next opening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def delete(self, session_id: SessionId) -> None:
        """Delete a session and its events. Once the session is deleted, nothing else is an error: what could not
        be done is done later.

        Raises:
            PBCachedError: the session may still be there.
        """
        note = Note(
            id=ObjectId(generate_id()),
            creation_utc=datetime.now(UTC).isoformat(),
            version=self.VERSION.to_string(),
            session_id=session_id,
        )
        await self._notes.insert_one(note)
        try:
            await self._sessions.delete_one({"id": {"$eq": session_id}})
            self.decided += 1
            try:
                await self._events.delete_many({"session_id": {"$eq": session_id}})
            except PBCachedError as error:
                self._log.warning("events are deleted later", session=session_id, reason=str(error))
        finally:
            self._finish_after(SWEEP_SECONDS)  # also where nobody knows whether the session is still there

    async def _load(self, document: BaseDocument) -> Note | None:
        return document  # type: ignore[return-value]

    def _finish_after(self, seconds: float) -> None:
        self._more = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._finish(seconds))

    async def _finish(self, wait: float) -> None:
        while self._more:
            await asyncio.sleep(wait)
            self._more = False
            try:
                self._more |= await self._sweep()
            except PBCachedError as error:
                if self._notes.is_closed:
                    return
                self._log.warning("deletions are finished later", reason=str(error))
                self._more = True
            wait = SWEEP_SECONDS

    async def _sweep(self) -> bool:
        """Do what the notes say. Is there any that will have to be looked at again?"""
        left = False
        cursor = None
        while True:
            late = (datetime.now(UTC) - timedelta(seconds=LATE_SECONDS)).isoformat()
            page = await self._notes.find({}, limit=NOTES_AT_ONCE, cursor=cursor)
            there = await self._sessions.find(_is_one_of("id", [note["session_id"] for note in page.items]))
            ids = {session["id"] for session in there}
            gone = [note for note in page.items if note["session_id"] not in ids]
            await self._delete_events([note["session_id"] for note in gone])
            done = [note["id"] for note in gone if note["creation_utc"] <= late]
            await self._notes.delete_many(_is_one_of("id", done))
            left |= len(done) < len(gone)
            if page.next_cursor is None:
                return left
            cursor = page.next_cursor

    async def _delete_events(self, sessions: list[str]) -> None:
        deleted = await self._events.delete_many(_is_one_of("session_id", sessions))
        if deleted:
            self._log.info("events of deleted sessions were left, and are deleted", events=deleted, among=sessions)


def _is_one_of(field: str, values: Sequence[str]) -> Where:
    return cast(Where, {field: {"$in": list(dict.fromkeys(values))}})
