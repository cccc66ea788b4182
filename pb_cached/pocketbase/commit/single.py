"""Commits before 0.23, which has no batches: one request for each operation."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Final

from pb_cached.errors import CollectionNotFound, DocumentTooLarge, OutcomeUnknown, RequestRejected
from pb_cached.pocketbase.client import PocketBaseClient, Unreached, Verdict, by_status, refused
from pb_cached.pocketbase.commit.interface import CountsRetries, Operation, Refused, Reply, left


class SinglePath(CountsRetries):
    """Each operation is a request of its own, so only one server may write, and a commit of several operations can
    be cut short by a crash."""

    name: Final = "single"
    mixes: Final = True
    in_flight: Final = 1
    max_operations: Final = 1
    max_bytes: Final = 30 * 1024 * 1024

    def __init__(self, client: PocketBaseClient) -> None:
        self._client = client
        super().__init__()

    async def prepare(self) -> None:
        """There is no log."""

    async def leave(self, collection: str) -> None:
        """Nothing is bound to it."""

    async def commit(self, operations: Sequence[Operation], *, deadline: float) -> list[Reply]:
        replies: list[Reply] = []
        end = time.monotonic() + deadline
        for index, operation in enumerate(operations):
            try:
                replies.append(await self._apply(operation, left(end)))
            except (RequestRejected, CollectionNotFound) as error:
                raise Refused({index: error}) from error
        return replies

    async def trim(self, before: float, most_bytes: int | None) -> AsyncGenerator[None]:
        """There is no log."""
        return
        yield

    async def _apply(self, operation: Operation, deadline: float) -> Reply:
        what = operation.what
        try:
            answer = await self._client.send(
                operation.method,
                operation.path,
                body=operation.body or None,
                repeatable=operation.method == "POST",  # its id can be created only once
                deadline=deadline,
                repeated=self._repeated,
            )
        except Unreached as error:
            if not error.unanswered:
                raise
            raise OutcomeUnknown(f"{what}: PocketBase did not say whether it was applied") from error
        if answer.ok:
            return Reply(answer.content)
        if by_status(answer) is Verdict.DOUBT:
            raise OutcomeUnknown(f"{what}: status {answer.status} does not tell whether it was applied")
        if answer.status == 413:
            raise DocumentTooLarge(f"{what}: PocketBase takes no request of {len(operation.body):,} bytes")
        refusal = refused(answer, what, operation.path)
        if operation.method == "POST" and isinstance(refusal, RequestRejected) and "id" in refusal.codes:
            # Ids are ours alone: a record that is there already is our own first attempt.
            found = await self._client.send("GET", f"{operation.path}/{operation.record_id}")
            if found.ok:
                return Reply(found.content)
        raise refusal
