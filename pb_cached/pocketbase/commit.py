"""How a commit is made: operations in, replies out, all of them or none.

`BatchPath` sends one `/api/batch` that begins with the record of the commit in the log. That record's id is
the receipt: it can be created only once, so the same commit can be sent again until its outcome is known. Its `n`
numbers the commits of one server to one log without gaps: 1, 2, 3 and so on.
`SinglePath` is for PocketBase before 0.23, which has no batches: one request for each operation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, Literal, Protocol

import msgspec
from msgspec import Struct

from pb_cached.errors import (
    CollectionNotFound,
    DocumentTooLarge,
    OutcomeUnknown,
    PBCachedError,
    RequestRejected,
    SchemaError,
)
from pb_cached.pocketbase.client import Answer, PocketBaseClient, Unreached, Verdict, by_status, refused
from pb_cached.pocketbase.dialect import Dialect
from pb_cached.pocketbase.ids import first_id_at, new_id

TRIM_PAGE: Final = 500
"""Log records deleted by one request where there is no SQL."""


def records_path(collection: str) -> str:
    return f"/api/collections/{collection}/records"


class Operation(Struct, frozen=True):
    """One record to create, update or delete. `body` is ready JSON."""

    method: Literal["POST", "PATCH", "DELETE"]
    collection: str
    record_id: str
    body: bytes = b""

    @property
    def path(self) -> str:
        records = records_path(self.collection)
        return records if self.method == "POST" else f"{records}/{self.record_id}"

    @property
    def size(self) -> int:
        return len(self.body) + 150


class Reply(Struct, frozen=True):
    """The record after the operation, as PocketBase's JSON; empty after a deletion."""

    record: bytes


class Refused(Exception):
    """PocketBase refused the commit because of one operation. Nothing of it was applied."""

    def __init__(self, index: int, error: RequestRejected | CollectionNotFound) -> None:
        super().__init__(str(error))
        self.index = index
        self.error = error


class TooLarge(Exception):
    """PocketBase takes no request of this size. Nothing of it was applied."""


class CommitPath(Protocol):
    """The interface that the committer works with."""

    @property
    def max_operations(self) -> int: ...

    @property
    def max_bytes(self) -> int: ...

    async def commit(self, operations: Sequence[Operation], *, deadline: float) -> list[Reply]:
        """Apply all operations, or none.

        Raises:
            Refused: because of one operation.
            TooLarge: as a whole.
            OutcomeUnknown: no answer until the deadline (seconds), and it may have been applied.
            PocketBaseUnavailable: likewise, and it was not.
            RequestRejected, AuthenticationFailed, SchemaError: as a whole, whatever it holds.
        """
        ...

    async def trim(self, before: float) -> None:
        """Forget the records of commits made before that time (seconds since the epoch)."""
        ...


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


class _Entry(Struct):
    n: int = 0


class _Ids(Struct):
    items: list[_Id]


class _Id(Struct):
    id: str


class BatchPath:
    """Commits by `/api/batch` (0.23 and later). One commit at a time.

    Mutable state: `_taken`, the last `n` that is taken, or may be.
    """

    def __init__(self, client: PocketBaseClient, dialect: Dialect, log: str, server: str) -> None:
        assert dialect.batch is not None
        self._client = client
        self._dialect = dialect
        self._log = log
        self._server = server
        self._taken = 0
        self.max_operations = max(1, dialect.batch.max_requests - 1)
        self.max_bytes = dialect.batch.max_bytes - 4096

    async def commit(self, operations: Sequence[Operation], *, deadline: float) -> list[Reply]:
        receipt, n = new_id(), self._taken + 1
        requests = [self._entry(receipt, n), *operations]
        body = b'{"requests":[' + b",".join(_request(operation) for operation in requests) + b"]}"
        end = time.monotonic() + deadline
        try:
            answer = await self._client.send(
                "POST", "/api/batch", body=body, repeatable=True, verdict=_batch_verdict, deadline=deadline
            )
        except Unreached as error:
            if not error.unanswered:
                raise
            raise self._unknown(n, operations) from error
        if answer.ok:
            self._taken = n
            return [Reply(bytes(result.body)) for result in _results.decode(answer.content)[1:]]
        index, inner = _culprit(answer)
        if answer.status == 413 or (index is None and _LONG in answer.content):
            raise TooLarge
        if answer.in_doubt or index == 0:
            try:
                if await self._settled(receipt, answer.in_doubt, end):
                    self._taken = n
                    return await self._read_back(operations, end)
            except PBCachedError as error:
                raise self._unknown(n, operations) from error
        if index is None or not 0 < index <= len(operations):
            raise await self._rejection(inner)
        operation = operations[index - 1]
        raise Refused(index - 1, refused(inner, f"{_VERBS[operation.method]} in '{operation.collection}'"))

    async def trim(self, before: float) -> None:
        oldest = first_id_at(before)
        if self._dialect.sql:  # raises no events that every follower would have to read
            query = f"DELETE FROM `{self._log}` WHERE id < '{oldest}'"
            await self._client.call(
                "POST", "/api/sql", body=msgspec.json.encode({"query": query}), repeatable=True
            )
            return
        path = records_path(self._log)
        count = min(TRIM_PAGE, self.max_operations)
        while True:
            params: dict[str, str | int] = {
                "filter": f"id < '{oldest}'", "sort": "id", "perPage": count, "skipTotal": 1,
            }  # fmt: skip
            found = msgspec.json.decode(await self._client.call("GET", path, params=params), type=_Ids).items
            if found:
                deletions = [_request(Operation("DELETE", self._log, item.id)) for item in found]
                body = b'{"requests":[' + b",".join(deletions) + b"]}"
                answer = await self._client.send("POST", "/api/batch", body=body, verdict=_batch_verdict)
                if not answer.ok:  # another server is trimming too
                    return
            if len(found) < count:
                return

    def _entry(self, receipt: str, n: int) -> Operation:
        entry = msgspec.json.encode({"id": receipt, "server": self._server, "n": n})
        return Operation("POST", self._log, receipt, entry)

    async def _settled(self, receipt: str, in_doubt: bool, end: float) -> bool:
        """Was the commit applied? Where the answer is no, it cannot be applied later either.

        The receipt's record decides, never the name of the field that a refusal blames (facts: pocketbase,
        section 11). But looking proves nothing while an attempt may still be on its way: (1) it is sent and gets
        stuck, (2) it is sent again and refused, (3) what it was refused for goes away, (4) the first one arrives
        and is applied. So the receipt is used up, by a record whose `n` is 0, before anybody is told that nothing
        happened.
        """
        if in_doubt:
            entry = self._entry(receipt, 0)
            await self._client.send("POST", entry.path, body=entry.body, repeatable=True, deadline=_left(end))
        answer = await self._client.send("GET", f"{records_path(self._log)}/{receipt}", deadline=_left(end))
        if answer.ok:
            return msgspec.json.decode(answer.content, type=_Entry).n > 0
        if in_doubt:
            raise refused(answer, "read the log")
        return False

    async def _read_back(self, operations: Sequence[Operation], end: float) -> list[Reply]:
        """The replies of a commit whose answer was lost: the records as they are now, which is at least as new."""
        replies = []
        for operation in operations:
            record = b""
            if operation.method != "DELETE":
                path = f"{records_path(operation.collection)}/{operation.record_id}"
                answer = await self._client.send("GET", path, deadline=_left(end))
                if not answer.ok and answer.status != 404:
                    raise refused(answer, "read back")
                record = answer.content if answer.ok else b""
            replies.append(Reply(record))
        return replies

    def _unknown(self, n: int, operations: Sequence[Operation]) -> OutcomeUnknown:
        self._taken = n  # a gap in the numbers can be looked into; two commits of one number cannot
        return OutcomeUnknown(
            f"{len(operations)} writes were sent to PocketBase at {self._client.url}, but it could not be learned "
            "in time whether it applied them. Read before you write them again"
        )

    async def _rejection(self, inner: Answer) -> PBCachedError:
        if inner.status == 404:  # not the caller's record: it must not look as if that were gone
            return SchemaError(
                f"PocketBase at {self._client.url} lacks the collection '{self._log}', or the batch API, so "
                "nothing can be committed. Was it deleted? Open the database again to have it created"
            )
        return await self._client.rejection(inner, "commit")


class SinglePath:
    """Commits before 0.23: each operation is a request of its own, so only one server may write, and a commit
    of several operations can be cut short by a crash."""

    max_operations: Final = 1
    max_bytes: Final = 30 * 1024 * 1024

    def __init__(self, client: PocketBaseClient) -> None:
        self._client = client

    async def commit(self, operations: Sequence[Operation], *, deadline: float) -> list[Reply]:
        replies: list[Reply] = []
        end = time.monotonic() + deadline
        for index, operation in enumerate(operations):
            try:
                replies.append(await self._apply(operation, max(0.1, end - time.monotonic())))
            except (RequestRejected, CollectionNotFound) as error:
                raise Refused(index, error) from error
        return replies

    async def trim(self, before: float) -> None:
        """There is no log."""

    async def _apply(self, operation: Operation, deadline: float) -> Reply:
        what = f"{_VERBS[operation.method]} in '{operation.collection}'"
        try:
            answer = await self._client.send(
                operation.method,
                operation.path,
                body=operation.body or None,
                repeatable=operation.method == "POST",  # its id can be created only once
                deadline=deadline,
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


_LONG: Final = b"validation_length_too_long"
"""More requests than PocketBase allows in a batch: somebody has lowered the number since we asked."""
_VERBS: Final = {"POST": "insert", "PATCH": "update", "DELETE": "delete"}


def _request(operation: Operation) -> bytes:
    head = f'{{"method":"{operation.method}","url":"{operation.path}"'.encode()
    return head + (b',"body":' + operation.body if operation.body else b"") + b"}"


def _left(end: float) -> float:
    return max(0.1, end - time.monotonic())


def _batch_verdict(answer: Answer) -> Verdict:
    if answer.ok and not answer.content.startswith(b"["):
        return Verdict.DOUBT  # somebody's friendly page
    if answer.status != 400:
        return by_status(answer)
    index, inner = _culprit(answer)
    if index is None:
        # Timed out, or shut down, or hung up on: rolled back as a whole (facts: pocketbase, section 5).
        passing = b"Batch transaction failed" in answer.content and b'"requests"' not in answer.content
        return Verdict.AGAIN if passing else Verdict.FINAL
    return Verdict.SIGN_IN if inner.status in (401, 403) else Verdict.FINAL


def _culprit(answer: Answer) -> tuple[int | None, Answer]:
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
