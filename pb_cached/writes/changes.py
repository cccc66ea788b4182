"""Updates and deletions of records: those of one record take turns, and all that wait become one change.

A change is built on the state that the one before it left, so nobody's update rests on a state that it has not
seen: not of this process, whose changes of a record go one after the other, and not of others where the commit
path compares revisions. A change whose record does not match any more, or is gone, is `Overtaken`: its caller
looks for another match. One that follows from a revision which the record does not have any more is a `StaleRead`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from cachetools import LRUCache

from pb_cached.cache.predicate import Predicate
from pb_cached.errors import (
    DocumentTooLarge,
    InvalidDocument,
    RecordNotFound,
    RequestRejected,
    StaleRead,
    StaleRevision,
)
from pb_cached.exact import Json, dumps, loads
from pb_cached.outcomes import fail, succeed
from pb_cached.pocketbase.codec import RecordCodec, Row
from pb_cached.pocketbase.commit import Operation, Reply

REMEMBERED: Final = 10_000
"""Records of which it is known when they were changed last."""
_WAIT: Final = 0.005
"""Seconds, at most, before a change that another server overtook is tried again. It does not grow: who waits for
longer than the others write is overtaken for ever."""

Document = dict[str, Json]


class Overtaken(Exception):
    """The record is not what the change was meant for any more."""


class State:
    """A record, as far as it is known: a document of a revision, and its row where that was read."""

    __slots__ = ("document", "record", "rev", "row")

    def __init__(self, record: str, rev: int, document: Document, row: Row | None = None) -> None:
        self.record = record
        self.rev = rev
        self.document = document
        self.row = row


class _Change:
    """What one caller wants. `params` None: to delete the record."""

    __slots__ = ("built_on", "matches", "outcome", "params")

    def __init__(self, matches: Predicate, params: Document | None, built_on: int | None) -> None:
        self.matches = matches
        self.params = params
        self.built_on = built_on
        self.outcome: asyncio.Future[Document] = asyncio.get_running_loop().create_future()


class RecordChanges:
    """The changes of one collection's records by this process.

    Mutable state, changed between awaits only: `_waiting`, the changes of a record that wait for those under way;
    there is an entry exactly while a task sees to that record, and then `_deciding` holds those. `_clock` counts
    the changes that were decided, and `_changed` tells for each record which was its last.
    """

    def __init__(
        self,
        codec: RecordCodec,
        read: Callable[[str], Awaitable[Row | None]],
        apply: Callable[[Operation], Awaitable[Reply]],
        patience: float,
    ) -> None:
        """
        Args:
            read: a record as PocketBase has it now.
            patience: seconds for which a change is tried again that other servers overtake.
        """
        self._codec = codec
        self._read = read
        self._apply = apply
        self._patience = patience
        self._waiting: dict[str, list[_Change]] = {}
        self._deciding: dict[str, list[_Change]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock = 0
        self._changed: LRUCache[str, int] = LRUCache(REMEMBERED)

    @property
    def now(self) -> int:
        """A moment. What was read after it shows every change that was decided before it."""
        return self._clock

    async def make(
        self,
        found: State,
        since: int,
        matches: Predicate,
        params: Document | None,
        built_on: int | None = None,
    ) -> Document:
        """Update a record, or delete it, if it still matches then. Cancelling the caller takes nothing back.

        Args:
            found: what was read of it.
            since: `now`, before that was read.
            params: the fields to change, a snapshot; None to delete the record.
            built_on: the revision that they follow from; None where they follow from none.

        Returns:
            The document that it left, or that was deleted: the caller's own.

        Raises:
            Overtaken: nothing was written. Look for another match.
            StaleRead: likewise, as the record is not of the revision any more that this is built on.
            StaleRevision: others changed it again and again.
            PBCachedError: as `Committer.write`.
        """
        change = _Change(matches, params, built_on)
        waiting = self._waiting.get(found.record)
        if waiting is not None:
            waiting.append(change)
        elif self._changed.get(found.record, -1) > since:
            raise Overtaken
        else:
            self._waiting[found.record] = [change]
            task = asyncio.create_task(self._take_turns(found))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(change.outcome)

    async def flush(self) -> None:
        """Return when every change made so far is decided, also those whose callers have left."""
        changes = [*self._waiting.values(), *self._deciding.values()]
        if outcomes := [change.outcome for some in changes for change in some if not change.outcome.done()]:
            await asyncio.wait(outcomes)

    async def _take_turns(self, state: State) -> None:
        record = state.record
        known: State | None = state
        try:
            while changes := self._waiting[record]:
                self._waiting[record] = []
                self._deciding[record] = changes
                known = await self._decide(known, changes)
                self._clock += 1
                self._changed[record] = self._clock
        finally:
            del self._waiting[record]
            self._deciding.pop(record, None)

    async def _decide(self, state: State | None, changes: Sequence[_Change]) -> State | None:
        """Decide every one of these changes. What the record is afterwards; None where it is gone, or unknown."""
        try:
            while changes:
                try:
                    return await self._together(state, changes)
                except _Apart:
                    for change in changes[:-1]:
                        state = await self._decide(state, [change])
                    changes = changes[-1:]
        except Exception as error:
            for change in changes:
                fail(change.outcome, error)
        return None

    async def _together(self, state: State | None, changes: Sequence[_Change]) -> State | None:
        end = time.monotonic() + self._patience
        while True:
            accepted, left = self._fold(state, changes)
            if state is None or not accepted:
                return state
            record = state.record
            try:
                operation = self._operation(state, accepted, left)
                if operation is None:
                    state = await self._again(record)
                    continue
                reply = await self._apply(operation)
            except RecordNotFound:
                state = None
            except StaleRevision:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(random.uniform(0, _WAIT))
                state = await self._again(record)
            except (RequestRejected, DocumentTooLarge, InvalidDocument):
                # Who is to blame? Other errors blame nobody, and what may have been applied is not tried again.
                if len(accepted) > 1:
                    raise _Apart from None
                raise
            else:
                return self._succeed(operation, reply, accepted)

    def _fold(
        self, state: State | None, changes: Sequence[_Change]
    ) -> tuple[list[tuple[_Change, Document]], Document | None]:
        """The changes that can be made, each with what it leaves (or deletes), and what all of them leave.

        What is built on a revision has not seen what stands before it here either.
        """
        document = None if state is None else state.document
        accepted: list[tuple[_Change, Document]] = []
        for change in changes:
            if change.outcome.done():
                continue
            if document is None or not change.matches(document):
                fail(change.outcome, Overtaken())
            elif change.built_on is not None and (accepted or state is None or change.built_on != state.rev):
                fail(change.outcome, self._stale_read())
            elif change.params is None:
                accepted.append((change, document))
                document = None
            else:
                document = {**document, **change.params}
                accepted.append((change, document))
        return accepted, document

    def _operation(
        self, state: State, accepted: Sequence[tuple[_Change, Document]], left: Document | None
    ) -> Operation | None:
        """The one operation that all of these are. None where it takes the record's row."""
        if left is None:
            return self._codec.deletion(state.record, state.rev)
        params: dict[str, Any] = {}
        for change, _ in accepted:
            params |= change.params or {}
        return self._codec.update(state.record, state.rev, state.document, params, state.row)

    def _succeed(
        self, operation: Operation, reply: Reply, accepted: Sequence[tuple[_Change, Document]]
    ) -> State | None:
        if operation.method == "DELETE":
            for change, document in accepted:
                succeed(change.outcome, _own(document))
            return None
        if reply.record is None:
            state: State | None = State(operation.record_id, operation.rev + 1, loads(operation.document))
        else:
            state = self._state(self._codec.row(reply.record)) if reply.record else None
        for change, document in accepted[:-1]:
            succeed(change.outcome, _own(document))
        last, document = accepted[-1]
        succeed(last.outcome, _own(document if state is None else state.document))
        return state

    def _stale_read(self) -> StaleRead:
        return StaleRead(
            f"update in '{self._codec.collection}': others have changed the record since it was read; "
            "nothing was written",
            status=409,
        )

    async def _again(self, record: str) -> State | None:
        row = await self._read(record)
        return None if row is None else self._state(row)

    def _state(self, row: Row) -> State:
        return State(row.id, row.rev, self._codec.document(row), row)


class _Apart(Exception):
    """Together these changes were refused."""


def _own(document: Document) -> Document:
    """A copy that shares nothing."""
    return loads(dumps(document))  # type: ignore[no-any-return]
