"""Commits by `/api/batch` (0.23 and later): the record of the commit in the log, and then its operations.

The log record's id is the receipt: it can be created only once, so the same commit can be sent again until its
outcome is known.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from pb_cached.errors import PBCachedError, RequestRejected, SchemaError
from pb_cached.pocketbase.client import Answer, PocketBaseClient, Unreached, Verdict, by_status, refused
from pb_cached.pocketbase.commit import trimming
from pb_cached.pocketbase.commit.interface import (
    CountsRetries,
    Operation,
    Refused,
    Reply,
    TooLarge,
    left,
    records_path,
)
from pb_cached.pocketbase.commit.receipt import Receipts, lane_of
from pb_cached.pocketbase.commit.triggers import FENCED
from pb_cached.pocketbase.dialect import (
    FEWEST_REQUESTS,
    Dialect,
    batch_opened_again,
    batch_requests_allowed,
    is_batch_off,
)
from pb_cached.pocketbase.ids import first_id_at, new_id
from pb_cached.pocketbase.schema import CollectionSpec, SchemaEditor
from pb_cached.pocketbase.sql import Sql


class _Result(Struct):
    status: int
    body: msgspec.Raw


class _Inner(Struct):
    response: msgspec.Raw = msgspec.Raw(b"{}")


class _Requests(Struct):
    requests: dict[str, _Inner] | msgspec.Raw = {}


class _Outer(Struct):
    data: _Requests = msgspec.field(default_factory=_Requests)


class _InnerStatus(Struct):
    status: int = 0


_results: Final = msgspec.json.Decoder(list[_Result])


class _Id(Struct):
    id: str


class _Ids(Struct):
    items: list[_Id]


LANES: Final = 2
"""Commits in flight. While PocketBase applies one, it takes the next one in, and answers the one before: in all a
fifth more. A third one gains nothing (facts: performance, section 1)."""


class BatchPath(CountsRetries):
    """Compares no revisions: of two servers that update a column at once, the last wins.

    Mutable state: `max_operations`, lowered where PocketBase allows fewer; `_free`, the lanes by which nothing is
    under way.
    """

    name: Final = "batch"
    mixes: Final = True
    in_flight: Final = LANES

    def __init__(
        self, client: PocketBaseClient, dialect: Dialect, schema: SchemaEditor, log: CollectionSpec, server: str
    ) -> None:
        assert dialect.batch is not None
        self._client = client
        self._dialect = dialect
        self._schema = schema
        self._spec = log
        self._log = log.name
        super().__init__()
        self.lanes = [Receipts(client, log.name, lane_of(server, number)) for number in range(LANES)]
        self._free = list(reversed(self.lanes))
        self.max_operations = max(1, dialect.batch.max_requests - 1)
        self.max_bytes = dialect.batch.max_bytes - 4096

    async def prepare(self) -> None:
        """See to it that the log is there."""
        await self._schema.ensure(self._spec)

    async def leave(self, collection: str) -> None:
        """Nothing is bound to it."""

    async def commit(self, operations: Sequence[Operation], *, deadline: float) -> list[Reply]:
        lane = self._free.pop()
        try:
            return await self._commit(lane, operations, deadline)
        finally:
            lane.over()
            self._free.append(lane)
            self._free.sort(key=self.lanes.index, reverse=True)  # a server that is little at work needs but one

    async def _commit(self, lane: Receipts, operations: Sequence[Operation], deadline: float) -> list[Reply]:
        receipt, n = new_id(), lane.next
        content = {"guard": receipt}  # an empty one would be a commit of the log path
        entry = Operation("POST", self._log, receipt, lane.entry(receipt, n, content))
        body = b'{"requests":[' + b",".join(map(_request, (entry, *operations))) + b"]}"
        end = time.monotonic() + deadline
        try:
            answer = await self._client.send(
                "POST",
                "/api/batch",
                body=body,
                repeatable=True,
                verdict=batch_verdict,
                deadline=deadline,
                repeated=self._repeated,
            )
        except Unreached as error:
            if not error.unanswered:
                raise
            raise lane.unknown(n, len(operations)) from error
        if answer.ok:
            lane.take(n, receipt)
            return [Reply(bytes(result.body)) for result in _results.decode(answer.content)[1:]]
        index, inner = culprit(answer)
        if answer.in_doubt or (index == 0 and inner.status == 400):  # else it was refused for who we are, or where
            try:
                if await lane.settled(receipt, answer.in_doubt, end):
                    lane.take(n, receipt)
                    return await self._read_back(operations, end)
            except PBCachedError as error:
                raise lane.unknown(n, len(operations)) from error
        if answer.status == 413:
            raise TooLarge
        if (most := batch_requests_allowed(answer)) is not None:
            if await self._adapted(most) and time.monotonic() < end:
                return await self._commit(lane, operations, left(end))
            raise TooLarge(too_few_requests(self._client.url, most))
        if is_batch_off(answer) and time.monotonic() < end:
            if (refusal := await batch_opened_again(self._client, self._dialect, "switched off")) is not None:
                raise refusal
            return await self._commit(lane, operations, left(end))
        if index is None or not 0 < index <= len(operations):
            raise await self._rejection(inner)
        operation = operations[index - 1]
        raise Refused({index - 1: refused(inner, operation.what)})

    async def trim(self, before: float, most_bytes: int | None) -> AsyncGenerator[None]:
        """Its records hold nothing, so their bytes need not be looked at."""
        oldest = first_id_at(before)
        if self._dialect.sql:  # raises no events that every follower would have to read
            async for _ in trimming.delete(Sql(self._client), self._log, f"id<'{oldest}'"):
                yield
            return
        path, step = records_path(self._log), trimming.Step()
        while True:
            count = min(step.records, self.max_operations)
            params: dict[str, str | int] = {
                "filter": f"id < '{oldest}'", "sort": "id", "perPage": count, "skipTotal": 1,
            }  # fmt: skip
            found = msgspec.json.decode(await self._client.call("GET", path, params=params), type=_Ids).items
            if found:
                deletions = [_request(Operation("DELETE", self._log, item.id)) for item in found]
                body = b'{"requests":[' + b",".join(deletions) + b"]}"
                begun = time.monotonic()
                answer = await self._client.send("POST", "/api/batch", body=body, verdict=batch_verdict)
                step.took(time.monotonic() - begun)
                if not answer.ok:  # another server is trimming too
                    return
            if len(found) < count:
                return
            yield

    async def _adapted(self, most: int) -> bool:
        """So many requests PocketBase takes in a batch now, and commits hold no more from now on. Where that
        leaves no room, it takes as many as before, if we may make it: tells whether we could.

        Raises:
            RequestRejected: there is no room, and nothing that we may do.
        """
        if most < FEWEST_REQUESTS:
            refusal = await batch_opened_again(self._client, self._dialect, f"limited to {most} requests")
            if refusal is None:
                return True
            if most < 2:
                raise refusal
        self.max_operations = most - 1
        return False

    async def _read_back(self, operations: Sequence[Operation], end: float) -> list[Reply]:
        """The replies of a commit whose answer was lost: the records as they are now, which is at least as new."""
        replies = []
        for operation in operations:
            record = b""
            if operation.method != "DELETE":
                path = f"{records_path(operation.collection)}/{operation.record_id}"
                answer = await self._client.send("GET", path, deadline=left(end))
                if not answer.ok and answer.status != 404:
                    raise refused(answer, "read back")
                record = answer.content if answer.ok else b""
            replies.append(Reply(record))
        return replies

    async def _rejection(self, inner: Answer) -> PBCachedError:
        if inner.status == 404:  # not the caller's record: it must not look as if that were gone
            return SchemaError(
                f"PocketBase at {self._client.url} lacks the collection '{self._log}', or the batch API, so "
                "nothing can be committed. Was it deleted? Open the database again to have it created"
            )
        if FENCED.encode() in inner.content:
            return SchemaError(
                f"the log '{self._log}' has become one of the log path, by another server: open the database again"
            )
        return await self._client.rejection(inner, "commit")


def _request(operation: Operation) -> bytes:
    head = f'{{"method":"{operation.method}","url":"{operation.path}"'.encode()
    return head + (b',"body":' + operation.body if operation.body else b"") + b"}"


def too_few_requests(url: str, most: int) -> RequestRejected:
    """The error for a write that takes a longer batch than PocketBase allows."""
    return RequestRejected(
        f"commit: a write takes more than the {most} requests that PocketBase at {url} allows in a batch now; "
        "nothing was written. Allow more in its dashboard (Settings, Application, Batch API)",
        status=400,
    )


def batch_verdict(answer: Answer) -> Verdict:
    """What an answer of `/api/batch` means for the request."""
    if answer.ok and not answer.content.startswith(b"["):
        return Verdict.DOUBT  # somebody's friendly page
    if is_batch_off(answer):
        return Verdict.FINAL  # whoever we are
    if answer.status != 400:
        return by_status(answer)
    index, inner = culprit(answer)
    if index is None:
        # Timed out, or shut down, or hung up on: rolled back as a whole (facts: pocketbase, section 5).
        passing = b"Batch transaction failed" in answer.content and b'"requests"' not in answer.content
        return Verdict.AGAIN if passing else Verdict.FINAL
    return Verdict.SIGN_IN if inner.status in (401, 403) else Verdict.FINAL


def culprit(answer: Answer) -> tuple[int | None, Answer]:
    """Which request of a batch was refused, and the answer to it."""
    try:
        requests = msgspec.json.decode(answer.content, type=_Outer).data.requests
        if isinstance(requests, dict) and requests:
            key, inner = next(iter(requests.items()))
            if key.isdigit():
                status = msgspec.json.decode(inner.response, type=_InnerStatus).status
                return int(key), Answer(status, bytes(inner.response))
    except msgspec.DecodeError:
        pass
    return None, answer
