"""What the committer works with: operations in, replies out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final, Literal, Protocol

from msgspec import Struct

from pb_cached.errors import RequestRejected, SchemaError

VERBS: Final = {"POST": "insert", "PATCH": "update", "DELETE": "delete"}


def records_path(collection: str) -> str:
    return f"/api/collections/{collection}/records"


def left(end: float) -> float:
    """Seconds until that moment of the monotonic clock, and at least as many as one attempt needs."""
    return max(0.1, end - time.monotonic())


class Operation(Struct, frozen=True, gc=False):
    """One record to create, update or delete. Everything in it is encoded already."""

    method: Literal["POST", "PATCH", "DELETE"]
    collection: str
    record_id: str
    body: bytes = b""
    """The columns, in the form that the commit path takes (see `forms`)."""
    rev: int = 0
    """The revision that an update or a deletion was built on. Compared where the commit path can."""
    document: bytes = b""
    """JSON of the document that the record is to hold; empty for a deletion."""
    layout: str = ""
    """The order of the columns in the body, where that has one."""
    is_open: bool = False
    """PocketBase is to number it, so nobody knows the document before it is read."""

    @property
    def path(self) -> str:
        records = records_path(self.collection)
        return records if self.method == "POST" else f"{records}/{self.record_id}"

    @property
    def size(self) -> int:
        return len(self.body) + 150

    @property
    def what(self) -> str:
        return f"{VERBS[self.method]} in '{self.collection}'"


class Reply(Struct, frozen=True, gc=False):
    """What became of the record."""

    record: bytes | None = None
    """PocketBase's JSON of it; empty where there is none any more; None where it is as the operation says."""
    is_unread: bool = False
    """It was written, and what PocketBase has made of it could not be read."""


Refusal = RequestRejected | SchemaError
"""Of one operation; the latter where its collection is gone, or not as it must be."""


class Refused(Exception):
    """PocketBase refused the commit because of some operations. Nothing of it was applied."""

    def __init__(self, errors: Mapping[int, Refusal]) -> None:
        """
        Args:
            errors: by the position of the operation; of one at least, if not of all that would be refused.
        """
        super().__init__("; ".join(str(error) for error in errors.values()))
        self.errors = errors


class TooLarge(Exception):
    """PocketBase takes no request of this size. Nothing of it was applied."""

    def __init__(self, error: RequestRejected | None = None) -> None:
        """
        Args:
            error: for a write that cannot be made smaller; None where its documents are too large.
        """
        super().__init__(str(error or ""))
        self.error = error


class Unexplained(Exception):
    """PocketBase refused the commit, and nothing tells why. Nothing of it was applied."""

    def __init__(self, error: RequestRejected) -> None:
        super().__init__(str(error))
        self.error = error


class CountsRetries:
    """A path that counts the requests of commits that were sent again.

    Mutable state: `retries`.
    """

    def __init__(self) -> None:
        self.retries = 0

    def _repeated(self) -> None:
        self.retries += 1


class CommitPath(Protocol):
    """How commits are made."""

    @property
    def name(self) -> str: ...

    @property
    def mixes(self) -> bool:
        """May the operations of a commit be of several layouts?"""
        ...

    @property
    def in_flight(self) -> int:
        """Commits that may be under way at the same time."""
        ...

    @property
    def max_operations(self) -> int: ...

    @property
    def max_bytes(self) -> int: ...

    @property
    def retries(self) -> int:
        """Requests of commits that were sent again."""
        ...

    async def prepare(self) -> None:
        """See to it that the log is there, and as it must be.

        Raises:
            SchemaError: it cannot be made.
        """
        ...

    async def leave(self, collection: str) -> None:
        """Commit nothing to this collection any more: it is about to be deleted."""
        ...

    async def commit(self, operations: Sequence[Operation], *, deadline: float) -> list[Reply]:
        """Apply all operations, or none.

        Raises:
            Refused: because of some of them.
            TooLarge, Unexplained: as a whole.
            OutcomeUnknown: no answer until the deadline (seconds), and it may have been applied.
            PocketBaseUnavailable: likewise, and it was not.
            RequestRejected, AuthenticationFailed, SchemaError: as a whole, whatever it holds.
        """
        ...

    def trim(self, before: float, most_bytes: int | None) -> AsyncGenerator[None]:
        """Forget the records of commits made before that time (seconds since the epoch), and of the others, beyond
        so many bytes, what they hold; None: their bytes are not looked at.

        Goes on from one step to the next, none of which keeps PocketBase's other writers waiting for long.
        """
        ...
