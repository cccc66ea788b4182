"""Writes of a store that are held by themselves, and not by their caller; and take turns with few others.

Parlant's stores take one lock each, which every write holds until PocketBase has committed it: a hundred sessions
then write one after the other, and no two events ever share a commit. But a write rests on nothing but what it
names, a session say, so here it takes turns with the writes of that session alone.

Parlant also cancels a running turn whenever the customer writes again (facts: parlant, section 3). Its stores
would then give up their lock while the write is still on its way to PocketBase, and the next writer would read the
state from before it: two events with one offset. So each write of ours runs in a task of its own, which keeps its
turn until the write is decided; a cancelled caller only stops waiting for it.

Between servers a unique index decides, and the revision of what a method has read: who comes too late reads again,
and writes what follows from that. An update so contains whatever the others have written meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from datetime import datetime
from enum import Enum
from functools import partial, wraps
from typing import Any, Final, TypeVar, cast

import msgspec
import tenacity

from pb_cached.config import WriteSettings
from pb_cached.database import PocketBaseDocumentDatabase
from pb_cached.errors import NotCommitted, StaleRead, UniqueViolation
from pb_cached.exact import copied, dumps
from pb_cached.stores.turns import Turns
from pb_cached.writes.basis import BuiltOnWhatItReads
from pb_cached.writes.calls import Calls, Generation
from pb_cached.writes.closing import Closing
from pb_cached.writes.room import Room

RETRY_SECONDS: Final = 30.0
"""How long a write is tried again that other servers were faster than, each time with what they left."""
RETRY_AFTER: Final = 0.005
"""Seconds, at most, before that. They do not grow: who waits for longer than others write is always too late."""

TOO_LATE: Final = (UniqueViolation, StaleRead)
"""What other servers' writes make of one that rests on the state from before them."""

Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])
T = TypeVar("T")

_UNCHANGING: Final = (str, int, float, Enum, datetime)

_holder: ContextVar[object | None] = ContextVar("pb_cached_holder", default=None)


class HoldsItsWrites:
    """A store whose writes outlive their callers, and are waited for when the store closes.

    Mutable state: `_calls`, those that are not decided, and `_tasks`, of those that take one; `_turns`, which they
    take; `_room`, for what they write.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock: Any = _NoLock()  # Parlant's own, over the whole store
        database = getattr(self, "_database", None)
        self._limits = database.writes if isinstance(database, PocketBaseDocumentDatabase) else WriteSettings()
        self._room = Room(self._limits)
        self._closing = Closing(self._limits.close_timeout)
        self._calls = Calls()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turns = Turns(type(self).__name__, self._limits.deadline)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: object | None,
    ) -> None:
        """Wait until all writes are decided.

        Raises:
            NotCommitted: some were not when `close_timeout` had passed.
        """
        try:
            async with asyncio.timeout(self._closing.left()):
                while self._calls.under_way:
                    await self._calls.over()
        except TimeoutError:
            raise NotCommitted(
                f"closing the {type(self).__name__} took longer than {self._closing.timeout:g} s: "
                f"{self._room.records} of its writes are not decided. Each of their callers is told"
            ) from None
        self._closing.over()

    async def flush(self) -> None:
        """Return when every write called so far is decided."""
        await self._calls.over()

    def _belong_to(self, database: object) -> None:
        """This database's flush is to wait for the writes here, and they close together."""
        if isinstance(database, PocketBaseDocumentDatabase):
            self._closing = database.closing
            database.flush_first(self.flush)

    def _hold(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do this work in a task that outlives whoever has asked for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._over, self._calls.begin()))
        return task

    def _over(self, generation: Generation, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._calls.end(generation)

    async def _enter(self, size: int) -> float:
        """Take a place among the writes that are not decided, until it is left. Gives the moment until which the
        turn must come.

        Raises:
            QueueFull: there was no room until then.
        """
        until = time.monotonic() + self._limits.deadline
        if self._room.is_full:
            await self._room.wait_and_enter(size, until)
        else:
            self._room.enter(size)
        return until

    def _in_turn(
        self, *of: object, until: float | None = None
    ) -> contextlib.AbstractAsyncContextManager[None, None]:
        """The turn of whatever has these names; without any, nobody's. Within it, methods that are held by the
        same are a part of it. To be used in a task of its own.

        Args:
            until: when it is too late, by the monotonic clock; None for a deadline from now on.

        Raises:
            QueueFull: the turn did not come until then.
        """
        _holder.set(self)
        return self._turns.of(tuple(map(str, of)), until) if of else contextlib.nullcontext()


def held(*by: str, merges: bool = True) -> Callable[[Method], Method]:
    """Make a store's method one whose writes are held by themselves.

    Args:
        by: the parameters that name what the method changes: it takes turns with all methods held by as many
            parameters of the same values. None: with nobody.
        merges: what the method writes follows from what it has read. If not, it writes whole values that its
            caller gives, of which the last one wins.
    """

    def decorate(method: Method) -> Method:
        places = [list(inspect.signature(method).parameters).index(name) - 1 for name in by]

        def named_by(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            values = [
                args[place] if place < len(args) else kwargs.get(name)
                for name, place in zip(by, places, strict=True)
            ]
            return tuple(value for value in values if value is not None)

        @wraps(method)
        async def write(self: HoldsItsWrites, *args: Any, **kwargs: Any) -> Any:
            if _holder.get() is self:  # one write calls another, within its own turn
                return await method(self, *args, **kwargs)

            # A cancelled caller may change its objects before they are written.
            args = tuple(map(_own, args))
            kwargs = {name: _own(value) for name, value in kwargs.items()}

            async def attempt() -> Any:
                with BuiltOnWhatItReads() if merges else contextlib.nullcontext():
                    return await method(self, *args, **kwargs)

            async def hold() -> Any:
                size = sum(map(_size, (*args, *kwargs.values())))
                until = await self._enter(size)
                try:
                    async with self._in_turn(*named_by(args, kwargs), until=until):
                        try:
                            return await attempt()
                        except TOO_LATE:  # seldom: what retries costs as much as a write
                            return await attempts()(attempt)
                finally:
                    self._room.leave(size)

            return await asyncio.shield(self._hold(hold()))

        return cast(Method, write)

    return decorate


def _own(value: Any) -> Any:
    """A copy that shares nothing with the caller's. What cannot be copied is no JSON, or nested out of all
    proportion: the encoder says so."""
    if value is None or isinstance(value, _UNCHANGING):
        return value
    if isinstance(value, dict | list):
        with contextlib.suppress(ValueError):
            return copied(value)  # a quarter of the time that a deep copy takes
    with contextlib.suppress(TypeError, RecursionError):
        return copy.deepcopy(value)
    return value


def _size(value: Any) -> int:
    """About how many bytes it takes."""
    if isinstance(value, dict | list):
        with contextlib.suppress(TypeError, ValueError, RecursionError, msgspec.MsgspecError):
            return len(dumps(value))
    return len(value) if isinstance(value, str) else 0


def attempts() -> tenacity.AsyncRetrying:
    """Tries again what came too late for other servers' writes."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(TOO_LATE),
        wait=tenacity.wait_random(0, RETRY_AFTER),
        stop=tenacity.stop_after_delay(RETRY_SECONDS),
        reraise=True,
    )


class _NoLock:
    """In the place of a store's lock: lets everybody in."""

    @property
    def reader_lock(self) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()

    @property
    def writer_lock(self) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()
