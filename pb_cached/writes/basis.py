"""What a piece of work has read, and what it writes is built on.

A store's method reads a document, and writes back a column that follows from what it has read. If the record has
changed since, the write would undo that change: so within such a piece of work an update carries the revision that
was read, and where the record has another by then it is refused as a `StaleRead`: the work is to be done again.
Who reads and writes outside of one is asked for nothing, and the last write of a column wins.
"""

from __future__ import annotations

from contextvars import ContextVar

_read: ContextVar[dict[str, int] | None] = ContextVar("pb_cached_read", default=None)
"""By record, the first revision of it that was read: a later one may not be what the write follows from."""


class BuiltOnWhatItReads:
    """What is done in here is one piece of work: its updates are built on what it has read."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _read.set({})

    def __exit__(self, *_: object) -> None:
        _read.reset(self._token)


def note_read(record: str, rev: int) -> None:
    """A record of this revision was read."""
    read = _read.get()
    if read is not None:
        read.setdefault(record, rev)


def built_on(record: str) -> int | None:
    """The revision that an update of this record is built on; None where it is built on none."""
    read = _read.get()
    return None if read is None else read.get(record)


def note_written(record: str) -> None:
    """The work has changed the record itself: of what it leaves it has read nothing yet."""
    read = _read.get()
    if read is not None:
        read.pop(record, None)
