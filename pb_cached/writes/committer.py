"""Group commit: what is queued while a commit is under way becomes the next one.

No timers: a lone write is sent at once, a hundred writers share a commit, and how many share one follows from
how long the one before takes. The writes of a log are applied in the order in which they were submitted, as one
commit is in flight at a time. Where PocketBase does better with two, one of them may hold what stands apart: who
submits such a write sees to it himself that nothing which must come before it, or after it, is undecided.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from operator import attrgetter
from typing import Final, Protocol

from pb_cached.config import WriteSettings
from pb_cached.errors import (
    DocumentTooLarge,
    NotCommitted,
    OutcomeUnknown,
    PBCachedError,
    RecordNotFound,
    UniqueViolation,
)
from pb_cached.outcomes import fail, succeed
from pb_cached.pocketbase.commit import CommitPath, Operation, Refused, Reply, TooLarge, Unexplained
from pb_cached.pocketbase.commit.interface import left
from pb_cached.telemetry import Log
from pb_cached.writes.pace import Pace
from pb_cached.writes.room import Room
from pb_cached.writes.stats import WriteCounters
from pb_cached.writes.telling import Outcome, Telling

TRIM_EVERY: Final = 1000
"""Commits between two trims of the log."""
LOOK_EVERY: Final = 16
"""A log's bytes are looked at each time that this part of those that it may hold has been added."""
GIVE_WAY: Final = 4.0
"""Times as long as a step of trimming took is left to commits before the next one."""


class Follower(Protocol):
    """Who must know what became of the operations on a collection, and know it before their callers do."""

    def committed(self, operation: Operation, reply: Reply) -> None:
        """PocketBase has committed it."""
        ...

    def gone(self, operation: Operation) -> None:
        """It was refused, as its record does not exist (any more)."""
        ...

    def clashed(self, operation: Operation) -> None:
        """It was refused, as another record has what must be unique."""
        ...

    def uncertain(self, operation: Operation) -> None:
        """Nobody knows whether it was applied, or will be yet."""
        ...


class _Write:
    """Operations that succeed or fail together, and whom to tell: whoever was cancelled is told nothing, and the
    write goes on."""

    __slots__ = ("apart", "decided", "failed", "operations", "outcome", "size", "submitted")

    def __init__(self, operations: Sequence[Operation], apart: bool) -> None:
        self.operations = operations
        self.apart = apart
        self.outcome: Outcome = asyncio.get_running_loop().create_future()
        self.decided = self.failed = False
        self.submitted = time.monotonic()
        self.size = sum(map(_size, operations))

    def fits(self, other: _Write) -> bool:
        """Are the operations of both of one layout?"""
        return len({operation.layout for write in (self, other) for operation in write.operations}) == 1


class Committer:
    """The queue of one log, and the tasks that empty it: as many as commits may be in flight.

    Mutable state: `_queue` (not yet sent), `_under_way` (the commits that are), `_tasks` (run exactly while there
    is something for them to do), `_room` (for all that is undecided), `_watching` (who waits for the next commit
    to be decided), `_telling` (who is to be told of the last ones), `_pace` (how many records one may hold) and
    `_ended` (when the last one did), `_trimming` (the task that trims the log, the last one), `_trimmed_at` (after
    how many commits it began) and `_looked_at` (after how many bytes those of the log were looked at), `_closed`
    and `_closing`, `_followers`. All of it is changed between awaits only.
    """

    def __init__(self, path: CommitPath, settings: WriteSettings, log: Log) -> None:
        self.path = path
        self._settings = settings
        self._log = log
        self._queue: deque[_Write] = deque()
        self._under_way: list[list[_Write]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = Room(settings)
        self._watching: list[asyncio.Future[None]] = []
        self._trimming: asyncio.Task[None] | None = None
        self._pace = Pace(settings.max_commit_records, settings.max_commit_seconds)
        self._ended = 0.0
        self._closed = False
        self._closing = asyncio.Event()
        self.counters = WriteCounters()
        self._trimmed_at = 0
        self._looked_at: int | None = None
        self._look_every = settings.log_max_bytes // LOOK_EVERY
        self._followers: dict[str, list[Follower]] = {}
        self._telling = Telling()

    def follow(self, collection: str, follower: Follower) -> None:
        """Tell this follower what becomes of all operations on the collection."""
        self._followers.setdefault(collection, []).append(follower)

    def unfollow(self, collection: str, follower: Follower) -> None:
        """Tell it no more."""
        self._followers[collection].remove(follower)

    async def write(self, *operations: Operation, apart: bool = False) -> list[Reply]:
        """Commit these operations, all or none of them, and return PocketBase's replies in their order.

        Cancelling the caller does not take the write back: it is committed all the same.

        Args:
            apart: nothing that must come before them, or after them, is undecided.

        Raises:
            RequestRejected: or a subclass: PocketBase refused one of the operations.
            OutcomeUnknown, PocketBaseUnavailable: no answer until the deadline.
            QueueFull: there was no room until the deadline.
            NotCommitted: the committer was closed.
        """
        write = _Write(operations, apart)
        if self._room.is_full:
            until = time.monotonic() + self._settings.deadline
            await self._room.wait_and_enter(write.size, until, len(operations))
        else:
            self._room.enter(write.size, len(operations))
        return await self._queued(write)

    def submit(self, *operations: Operation, apart: bool = False) -> Outcome:
        """`write` without waiting: neither for the outcome, nor for room in the queue.

        Raises:
            NotCommitted: the committer was closed.
        """
        write = _Write(operations, apart)
        self._room.enter(write.size, len(operations))
        return self._queued(write)

    @property
    def is_full(self) -> bool:
        """Must a write wait for room?"""
        return self._room.is_full

    def _queued(self, write: _Write) -> Outcome:
        """Who has entered the room is queued."""
        if self._closed:
            self._room.leave(write.size, len(write.operations))
            raise NotCommitted("the database is closed; nothing was written")
        self._queue.append(write)
        if len(self._tasks) < (self.path.in_flight if write.apart else 1):
            self._tasks.add(asyncio.create_task(self._run()))
        return write.outcome

    def _succeed(self, write: _Write, replies: list[Reply]) -> None:
        self._leave(write)
        self._telling.add(write.outcome, replies)

    def _fail(self, write: _Write, error: Exception) -> None:
        if write.decided:
            return
        self._leave(write)
        write.failed = True
        fail(write.outcome, error)

    def _leave(self, write: _Write) -> None:
        write.decided = True
        self._room.leave(write.size, len(write.operations))

    @property
    def queued_bytes(self) -> int:
        """Of all writes that are not decided."""
        return self._room.bytes

    async def flush(self) -> None:
        """Return when every write submitted so far is decided, one way or the other."""
        await self._all_decided([*self._sent(), *self._queue])

    async def _all_decided(self, writes: Sequence[_Write]) -> None:
        while not all(write.decided for write in writes):
            decision: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._watching.append(decision)
            await decision

    def _report(self) -> None:
        """A commit has been decided."""
        watching, self._watching = self._watching, []
        for decision in watching:
            succeed(decision, None)

    @property
    def undecided(self) -> int:
        """How many writes of those submitted so far are not decided."""
        return sum(not write.decided for write in (*self._sent(), *self._queue))

    def _sent(self) -> Iterator[_Write]:
        """The writes of the commits that are under way."""
        return itertools.chain.from_iterable(self._under_way)

    async def settled(self, collection: str) -> None:
        """Return when the commits under way, those that touch this collection, are decided."""
        await self._all_decided(
            [
                write
                for write in self._sent()
                if any(operation.collection == collection for operation in write.operations)
            ]
        )

    async def close(self, within: float | None = None) -> None:
        """Take no more writes, and commit those that are queued. Trimming ends with the step that it is at.

        Args:
            within: seconds that are left of `close_timeout`; None for all of it.

        Raises:
            NotCommitted: some were not committed within `close_timeout`; names their number and collections.
        """
        self._closed = True
        self._closing.set()
        self._room.close()
        if busy := [*self._tasks, *([self._trimming] if self._trimming is not None else [])]:
            await asyncio.wait(busy, timeout=self._settings.close_timeout if within is None else within)
        if self._trimming is not None:
            self._trimming.cancel()
            await asyncio.wait([self._trimming])
        if not (tasks := {task for task in self._tasks if not task.done()}):
            return
        unsent, sent = list(self._queue), list(self._sent())
        self._queue.clear()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        error = NotCommitted(
            f"closing took longer than {self._settings.close_timeout:g} s: {len(unsent)} writes were never sent "
            f"({_summary(unsent)}), and of {len(sent)} it is unknown whether they were applied ({_summary(sent)})"
        )
        for write in (*unsent, *sent):
            self._fail(write, error)
        self._report()
        raise error

    def trim_in_background(self) -> None:
        """Begin to forget what may be forgotten of the log, if that is not under way. No commit waits for it."""
        if not self._closed and (self._trimming is None or self._trimming.done()):
            self._trimming = asyncio.create_task(self._keep_trimmed())

    async def _keep_trimmed(self) -> None:
        """Trim until nothing is due any more. Its failure is no reason to stop."""
        try:
            while True:
                await self._trim()
                if self._closed or not self._is_trim_due:
                    return
        except PBCachedError as error:
            self._log.warning("log not trimmed", reason=str(error))
        except Exception as error:
            self._log.error("log not trimmed", error=repr(error))

    async def _trim(self) -> None:
        """Forget the records of old commits, but of none that may still be sent again; and what the others hold
        beyond `log_max_bytes`, where enough was added to make it worth looking."""
        self._trimmed_at = self.counters.commits
        most_bytes = None
        if self._looked_at is None or self.counters.bytes - self._looked_at >= self._look_every:
            self._looked_at = self.counters.bytes
            most_bytes = self._settings.log_max_bytes
        kept = max(self._settings.log_retention, 2 * self._settings.deadline)
        begun = time.monotonic()
        async with aclosing(self.path.trim(time.time() - kept, most_bytes)) as steps:
            async for _ in steps:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GIVE_WAY * (time.monotonic() - begun)):
                        await self._closing.wait()
                        return
                begun = time.monotonic()

    @property
    def _is_trim_due(self) -> bool:
        counters = self.counters
        return (
            counters.commits - self._trimmed_at >= TRIM_EVERY
            or counters.bytes - (self._looked_at or 0) >= self._look_every
        )

    async def _run(self) -> None:
        # Everything that the tasks ready now submit shares the first commit.
        await asyncio.sleep(0)
        try:
            while writes := self._next():
                self._under_way.append(writes)
                try:
                    await self._commit(writes, time.monotonic() + self._settings.deadline)
                except Exception as error:  # a bug of ours must not leave callers waiting for ever
                    self._log.error("commit failed unexpectedly", error=repr(error))
                    for write in writes:
                        self._fail(write, error)
                finally:
                    self._under_way.remove(writes)
                self._report()
                if self._is_trim_due:
                    self.trim_in_background()
                if self._under_way:  # PocketBase is at work anyway
                    self._telling.all()
                else:
                    await self._telling.by_halves(lambda: bool(self._queue))
        finally:
            self._telling.all()
            if (task := asyncio.current_task()) is not None:
                self._tasks.discard(task)

    @property
    def _most_bytes(self) -> int:
        """Of one commit."""
        return min(self._settings.max_commit_bytes, self.path.max_bytes)

    def fit(self, operations: Sequence[Operation]) -> int:
        """How many of the first of these fit into one commit; one at least, where there is any."""
        if len(operations) <= 1:
            return len(operations)
        most, left_bytes = min(self._settings.max_commit_records, self.path.max_operations), self._most_bytes
        for count, operation in enumerate(operations[:most]):
            left_bytes -= operation.size
            if left_bytes < 0 and count:
                return count
        return min(most, len(operations))

    def _next(self) -> list[_Write]:
        """The writes at the head of the queue that fit into one commit. At least one, where there is any that may
        be committed now."""
        most, most_bytes = min(self._pace.records, self.path.max_operations), self._most_bytes
        taken: list[_Write] = []
        count = size = 0
        is_one_in_order = not all(write.apart for write in self._sent())
        while self._queue:
            write = self._queue[0]
            if not write.apart and is_one_in_order:
                break
            count += len(write.operations)
            size += write.size
            if taken and (count > most or size > most_bytes or not (self.path.mixes or write.fits(taken[0]))):
                break
            taken.append(self._queue.popleft())
        return taken

    async def _commit(self, writes: list[_Write], end: float) -> None:
        """Decide every one of these writes, which have time until `end`, of the monotonic clock, in however many
        parts.

        Who violates a unique index may do so by another write of the same commit, which was not committed either,
        and may never be. So the beaten are told when the others are decided, and where one of those has failed,
        they are tried again.
        """
        while writes:
            beaten = await self._decide(writes, end)
            if not any(write.failed for write in writes if write not in beaten):
                for write, (operation, error) in beaten.items():
                    self._tell_refused(operation, error)
                    self._fail(write, error)
                self.counters.refused += len(beaten)
                return
            writes = list(beaten)

    async def _decide(self, writes: list[_Write], end: float) -> dict[_Write, tuple[Operation, UniqueViolation]]:
        """Decide these writes, but for those that violate a unique index, and return those.

        What PocketBase refuses fails alone, the rest is committed anew.
        """
        beaten: dict[_Write, tuple[Operation, UniqueViolation]] = {}
        while writes:
            operations = [operation for write in writes for operation in write.operations]
            begun, repeated = time.monotonic(), self.path.retries
            self._telling.soon()
            try:
                replies = await self.path.commit(operations, deadline=left(end))
                now = time.monotonic()
                size = sum(write.size for write in writes)
                waited = now - min(write.submitted for write in writes)
                self.counters.committed(len(writes), len(operations), size, now - begun, waited)
                if self.path.retries == repeated:  # else it was not the records that took the time
                    alone_since = max(begun, self._ended)  # PocketBase applies them one after the other
                    self._pace.took(len(operations), now - alone_since)
                self._ended = now
                self._tell_committed(operations, replies)
            except Refused as refusal:
                for index, error in refusal.errors.items():
                    write = _owner(writes, index)
                    if isinstance(error, UniqueViolation):
                        beaten[write] = (operations[index], error)
                        continue
                    self._tell_refused(operations[index], error)
                    self._fail(write, error)
                others = [write for write in writes if not write.decided and write not in beaten]
                self.counters.refused += sum(write.failed for write in writes)
                self.counters.attempts_more += bool(others)
                writes = others
                continue
            except (TooLarge, Unexplained) as refusal:
                if len(writes) > 1:
                    self.counters.attempts_more += 1
                    middle = len(writes) // 2
                    await self._commit(writes[:middle], end)
                    writes = writes[middle:]
                    continue
                self._fail(
                    writes[0],
                    refusal.error
                    or DocumentTooLarge(
                        f"write to {_summary(writes)}: PocketBase takes no request of about "
                        f"{writes[0].size:,} bytes; nothing written"
                    ),
                )
            except Exception as error:
                if not isinstance(error, PBCachedError):
                    # A bug of ours or of a library must not leave callers waiting for ever.
                    self._log.error("commit failed unexpectedly", error=repr(error))
                if isinstance(error, OutcomeUnknown) or not isinstance(error, PBCachedError):
                    self.counters.unknown += 1
                    self._tell_uncertain(operations)
                for write in writes:
                    self._fail(write, error)
            else:
                is_read = not any(map(_is_unread, replies))
                remaining = iter(replies)
                for write in writes:
                    some = [next(remaining) for _ in write.operations]
                    if is_read or not any(map(_is_unread, some)):
                        self._succeed(write, some)
                    else:
                        self._fail(write, _unread(write))
            finally:
                self.counters.retries = self.path.retries
            break
        return beaten

    def _tell_committed(self, operations: Sequence[Operation], replies: Sequence[Reply]) -> None:
        for operation, reply in zip(operations, replies, strict=True):
            for follower in self._followers.get(operation.collection, ()):
                if reply.is_unread:
                    follower.uncertain(operation)
                else:
                    follower.committed(operation, reply)

    def _tell_refused(self, operation: Operation, error: PBCachedError) -> None:
        for follower in self._followers.get(operation.collection, ()):
            if isinstance(error, RecordNotFound):
                follower.gone(operation)
            elif isinstance(error, UniqueViolation):
                follower.clashed(operation)

    def _tell_uncertain(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            for follower in self._followers.get(operation.collection, ()):
                follower.uncertain(operation)


_size: Final = attrgetter("size")
_is_unread: Final = attrgetter("is_unread")


def _unread(write: _Write) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"write to {_summary([write])}: it was committed, but what PocketBase made of it could not be read"
    )


def _owner(writes: Sequence[_Write], index: int) -> _Write:
    for write in writes:
        if index < len(write.operations):
            return write
        index -= len(write.operations)
    raise IndexError(index)


def _summary(writes: Sequence[_Write]) -> str:
    collections = sorted({operation.collection for write in writes for operation in write.operations})
    return ", ".join(collections) or "none"
