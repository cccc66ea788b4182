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
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextvars import ContextVar
from datetime import datetime
from enum import Enum
from functools import wraps
from typing import Any, Final, TypeVar, cast
from weakref import WeakValueDictionary

import tenacity

from pb_cached.errors import StaleRead, UniqueViolation
from pb_cached.exact import copied
from pb_cached.writes.basis import built_on_what_it_reads

RETRY_SECONDS: Final = 30.0
"""How long a write is tried again that other servers were faster than, each time with what they left."""

TOO_LATE: Final = (UniqueViolation, StaleRead)
"""What other servers' writes make of one that rests on the state from before them."""

Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])
T = TypeVar("T")

_UNCHANGING: Final = (str, int, float, Enum, datetime)

_holder: ContextVar[object | None] = ContextVar("pb_cached_holder", default=None)


class HoldsItsWrites:
    """A store whose writes outlive their callers, and are waited for when the store closes.

    Mutable state: `_writes`, the tasks under way; `_turns`, the locks that somebody has or waits for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock: Any = _NoLock()  # Parlant's own, over the whole store
        self._writes: set[asyncio.Task[Any]] = set()
        self._turns: WeakValueDictionary[tuple[str, ...], asyncio.Lock] = WeakValueDictionary()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: object | None,
    ) -> None:
        while self._writes:
            await asyncio.wait(self._writes)

    def _hold(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do this work in a task that outlives whoever has asked for it."""
        task = asyncio.create_task(work)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return task

    @contextlib.asynccontextmanager
    async def _in_turn(self, *of: object) -> AsyncIterator[None]:
        """The turn of whatever has these names; without any, nobody's. Within it, methods that are held by the
        same are a part of it. To be used in a task of its own."""
        _holder.set(self)
        async with self._turn(tuple(map(str, of))) if of else contextlib.nullcontext():
            yield

    def _turn(self, of: tuple[str, ...]) -> asyncio.Lock:
        lock = self._turns.get(of)
        if lock is None:
            lock = self._turns[of] = asyncio.Lock()
        return lock


def held(*by: str) -> Callable[[Method], Method]:
    """Make a store's method one whose writes are held by themselves.

    Args:
        by: the parameters that name what the method changes: it takes turns with all methods held by as many
            parameters of the same values. None: with nobody.
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
                with built_on_what_it_reads():
                    return await method(self, *args, **kwargs)

            async def hold() -> Any:
                async with self._in_turn(*named_by(args, kwargs)):
                    try:
                        return await attempt()
                    except TOO_LATE:  # seldom: what retries costs as much as a write
                        return await attempts()(attempt)

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


def attempts() -> tenacity.AsyncRetrying:
    """Tries again what came too late for other servers' writes."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(TOO_LATE),
        wait=tenacity.wait_random_exponential(multiplier=0.005, max=0.25),
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
