"""Writes that are held by themselves, and not by their caller.

Parlant cancels a running turn whenever the customer writes again (facts: parlant, section 3). Its stores would
then give up their lock while the write is still on its way to PocketBase, and the next writer would read the
state from before it: two events with one offset. So each write of ours runs in a task of its own, which holds
the store's lock until the write is decided; a cancelled caller only stops waiting for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])

_holder: ContextVar[object | None] = ContextVar("pb_cached_holder", default=None)


class HoldsItsWrites:
    """A store whose writes outlive their callers, and are waited for when the store closes.

    Mutable state: `_writes`, the tasks under way.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writes: set[asyncio.Task[Any]] = set()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: object | None,
    ) -> None:
        while self._writes:
            await asyncio.wait(self._writes)


def held(method: Method) -> Method:
    """Make a store's method one whose writes are held by themselves."""

    @wraps(method)
    async def write(self: HoldsItsWrites, *args: Any, **kwargs: Any) -> Any:
        if _holder.get() is self:  # one write calls another: it is inside the lock already
            return await method(self, *args, **kwargs)

        # A cancelled caller may change its objects before they are written. What cannot be copied is no JSON, or
        # nested out of all proportion: the encoder says so.
        with contextlib.suppress(TypeError, RecursionError):
            args, kwargs = copy.deepcopy((args, kwargs))

        async def hold() -> Any:
            _holder.set(self)
            return await method(self, *args, **kwargs)

        task = asyncio.create_task(hold())
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)

    return cast(Method, write)
