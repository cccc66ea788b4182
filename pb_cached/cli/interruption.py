"""Ctrl-C, SIGTERM and a terminal's hangup: how a command ends before it is done, and with which exit code.

While nothing has been started there is nothing to undo, and `at_once` ends the process where it is. After that,
`unwinding` cancels what runs, so that it undoes itself. A signal that was ignored when we came stays ignored, as
`nohup` wants it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

EXIT_CODE: Final = 130
"""A shell's own for a command that Ctrl-C has ended."""

_SIGNALS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)  # no SIGHUP on Windows
)


@contextmanager
def at_once() -> Iterator[None]:
    """Ctrl-C ends the process on the spot and without a word. An exception in its place would come out of the
    middle of some import, as a traceback, or be lost in there."""
    with _received([signal.SIGINT], lambda: os._exit(EXIT_CODE)):
        yield


class Unwinding:
    """Cancels a task at the first signal. Later ones change nothing: who closes a terminal hangs up twice, and
    the undoing must not be cut short.

    Mutable state: `began`, whether there was a signal; `_cancel`, set while there is a task to cancel.
    """

    def __init__(self) -> None:
        self.began = False
        self._cancel: Callable[[], object] | None = None

    @contextmanager
    def cancels_this_task(self) -> Iterator[None]:
        import asyncio  # as slow as all else that a command line needs before it can be interrupted

        task = asyncio.current_task()
        assert task is not None
        # A handler runs between any two instructions of this thread, and must wake the loop.
        self._cancel = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        if self.began:
            task.cancel()
        try:
            yield
        finally:
            self._cancel = None

    def begin(self) -> None:
        if not self.began:
            self.began = True
            if self._cancel is not None:
                self._cancel()


@contextmanager
def unwinding() -> Iterator[Unwinding]:
    """While this context lasts, the signals go to the `Unwinding` that it returns."""
    unwinds = Unwinding()
    with _received(_SIGNALS, unwinds.begin):
        yield unwinds


@contextmanager
def _received(signals: Iterable[signal.Signals], act: Callable[[], object]) -> Iterator[None]:
    heard = [one for one in signals if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, lambda *_: act() and None) for one in heard}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
