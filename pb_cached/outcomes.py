"""Futures as somebody's outcome, who may have left meanwhile: then there is nobody to tell, and that is all."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

T = TypeVar("T")


def succeed(outcome: asyncio.Future[T], result: T) -> None:
    """Tell who waits for it, if anybody still does."""
    if not outcome.done():
        outcome.set_result(result)


def fail(outcome: asyncio.Future[Any], error: Exception) -> None:
    """The same, of an error."""
    if not outcome.done():
        outcome.set_exception(error)
        outcome.exception()  # nobody waiting is no reason for a warning
