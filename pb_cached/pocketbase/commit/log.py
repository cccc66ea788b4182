"""Commits by one record in the log, which triggers make true in the same transaction (0.39 and later).

Three times the rate of `/api/batch`, and true compare-and-swap: an update or deletion says the revision that it
was built on, and where that is not what the record has, the commit is refused. See `triggers`.

PocketBase refuses a commit as a whole, and mostly without a reason. So what the commit touches is looked at:
revisions, then what must be unique, then the triggers themselves. What none of that explains is halved by the
committer, and so is what cannot be looked at: that a look fails is nobody's blame.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from pb_cached.errors import (
    CollectionNotFound,
    PBCachedError,
    PocketBaseUnavailable,
    RecordNotFound,
    RequestRejected,
    SchemaError,
    StaleRevision,
)
from pb_cached.pocketbase.client import (
    Answer,
    PocketBaseClient,
    Unreached,
    Verdict,
    by_status,
    missing_collection,
    refused,
)
from pb_cached.pocketbase.commit import triggers, trimming
from pb_cached.pocketbase.commit.batch import batch_verdict, culprit, too_few_requests
from pb_cached.pocketbase.commit.installation import Installation
from pb_cached.pocketbase.commit.interface import (
    CountsRetries,
    Operation,
    Refusal,
    Refused,
    Reply,
    TooLarge,
    Unexplained,
    left,
)
from pb_cached.pocketbase.commit.looks import multi_gets
from pb_cached.pocketbase.commit.receipt import Receipts
from pb_cached.pocketbase.commit.triggers import CommitLayout
from pb_cached.pocketbase.commit.uniques import violations
from pb_cached.pocketbase.dialect import Dialect, batch_opened_again, batch_requests_allowed, is_batch_off
from pb_cached.pocketbase.ids import first_id_at, new_id
from pb_cached.pocketbase.sql import Sql

_COMMIT: Final = "?commit"
"""Says nothing to PocketBase, and tells commits from beats in its log of requests."""
_FIELDS: Final = "&fields=id,stale"
"""All that we want to see of what we have sent. A log without the last of them has no triggers yet."""
_LARGE: Final = 16_384
"""Bytes of a request. What is smaller may come back as a whole: to pick fields takes PocketBase longer."""
_LOOKS: Final = (0.02, 0.1)
"""Seconds between attempts to look at what a refused commit touches, where PocketBase answers with an error."""
_SHARE_OF_LOOKS: Final = 0.25
"""Of the time that a commit has left: its parts need the rest."""
_LEAST_FOR_LOOKS: Final = 1.0
"""Seconds."""
_SECTIONS: Final = {"POST": b"c", "PATCH": b"u", "DELETE": b"d"}


class _Created(Struct):
    id: str
    stale: str | None = None


class _Field(Struct):
    name: str


class _Fields(Struct):
    fields: list[_Field] = []


class _Row(Struct):
    id: str
    rev: int


class _Rows(Struct):
    items: list[_Row]


class _Records(Struct):
    items: list[msgspec.Raw]


class _Result(Struct):
    body: _Created


_created: Final = msgspec.json.Decoder(_Created)
_fields: Final = msgspec.json.Decoder(_Fields)
_results: Final = msgspec.json.Decoder(list[_Result])
_rows: Final = msgspec.json.Decoder(_Rows)
_records: Final = msgspec.json.Decoder(_Records)
_AS_SAID: Final = Reply()
_DELETED: Final = Reply(b"")
_UNREAD: Final = Reply(is_unread=True)


class LogPath(CountsRetries):
    """One commit at a time.

    Mutable state: `_layouts`, by their keys; `_most_requests`, how many the batch API takes, 0 where it is closed
    to us.
    """

    name: Final = "log"
    in_flight: Final = 1
    """Two are slower (facts: pocketbase, section 13)."""
    max_operations: Final = 5000
    max_bytes: Final = 24 * 1024 * 1024
    """PocketBase takes 32 MiB. The payload is JSON within JSON, whose quotation marks take two bytes."""

    def __init__(
        self, client: PocketBaseClient, dialect: Dialect, log: str, server: str, installation: Installation
    ) -> None:
        self._client = client
        self._dialect = dialect
        self._log = log
        self.receipts = Receipts(client, log, server)
        self.lanes = (self.receipts,)
        self._installation = installation
        super().__init__()
        self._layouts: dict[str, CommitLayout] = {}
        self._most_requests = dialect.batch.max_requests if dialect.batch else 0

    @property
    def mixes(self) -> bool:
        return len(self._layouts) <= max(1, self._most_requests)

    async def prepare(self) -> None:
        """See to it that the log is there.

        Raises:
            SchemaError: it cannot be made.
        """
        await self._installation.prepare()

    async def use(self, layout: CommitLayout) -> None:
        """Commit operations of this layout from now on.

        Raises:
            SchemaError: the triggers could not be installed.
        """
        await self._installation.add(layout)
        self._layouts[layout.key] = layout

    async def leave(self, collection: str) -> None:
        await self._installation.leave(collection)

    async def repair(self) -> bool:
        """Have all triggers back. Tells whether anything was not as it must be.

        Raises:
            SchemaError: PocketBase does not let us.
        """
        return await self._installation.repair()

    async def commit(self, operations: Sequence[Operation], *, deadline: float) -> list[Reply]:
        try:
            return await self._commit(operations, time.monotonic() + deadline)
        finally:
            self.receipts.over()

    async def _commit(self, operations: Sequence[Operation], end: float) -> list[Reply]:
        repaired = False
        while True:
            answer = await self._attempt(operations, end)
            if answer is None:
                return await self._replies(operations, end)
            unseen: Exception | None = None
            try:
                async with asyncio.timeout(_for_looks(end)):
                    if blamed := await self._looked(answer, operations):
                        raise Refused(blamed)
            except (PBCachedError, TimeoutError) as error:
                unseen = error
            if repaired or not await self._mended(end):
                break
            repaired = True
        raise await self._unexplained(answer, operations, unseen)

    async def trim(self, before: float, most_bytes: int | None) -> AsyncGenerator[None]:
        """By SQL, as every deletion of PocketBase's own would send the record to all followers. Where we may not,
        the log is left to those who may. The record that bars the log stays."""
        if not self._dialect.sql:
            return
        sql = Sql(self._client)
        async for _ in trimming.delete(sql, self._log, f"id<'{first_id_at(before)}' AND guard<>''"):
            yield
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(before))
        async for _ in trimming.delete(sql, triggers.EDITS, f"at<'{at}'", "n"):
            yield
        if most_bytes is not None:
            async for _ in trimming.empty(sql, self._log, most_bytes):
                yield

    async def _replies(self, operations: Sequence[Operation], end: float) -> list[Reply]:
        """What became of the records of a commit: what the operations say; and where PocketBase has numbered
        them, what it has made of them, or has of them now, which is at least as new."""
        open_ = [operation for operation in operations if operation.is_open]
        read: dict[str, Reply] = {}
        if open_:
            read = {operation.record_id: _DELETED for operation in open_}
            try:
                async with asyncio.timeout(left(end)):
                    for collection in dict.fromkeys(operation.collection for operation in open_):
                        ids = [operation.record_id for operation in open_ if operation.collection == collection]
                        for content in await multi_gets(self._client, collection, ids):
                            for record in _records.decode(content).items:
                                read[_created.decode(record).id] = Reply(bytes(record))
            except (PBCachedError, TimeoutError):
                read = {operation.record_id: _UNREAD for operation in open_}
        return [
            read.get(operation.record_id) or (_DELETED if operation.method == "DELETE" else _AS_SAID)
            for operation in operations
        ]

    async def _attempt(self, operations: Sequence[Operation], end: float) -> Answer | None:
        """Send the commit, until it is known whether it was applied. None where it was; else the refusal."""
        receipt = new_id()
        entries = self._entries(receipt, operations)
        last = self.receipts.next + len(entries) - 1
        path, body = self._path(entries[0]), entries[0]
        if len(entries) > 1:
            path, body = "/api/batch", b'{"requests":[' + b",".join(map(self._request, entries)) + b"]}"
        try:
            answer = await self._client.send(
                "POST",
                path,
                body=body,
                repeatable=True,
                verdict=batch_verdict if len(entries) > 1 else _verdict,
                deadline=left(end),
                repeated=self._repeated,
            )
        except Unreached as error:
            if not error.unanswered:
                raise
            raise self.receipts.unknown(last, len(operations)) from error
        if answer.ok:
            self.receipts.take(last, receipt)
            return None if _is_triggered(answer, len(entries)) else Answer(404, b"{}")
        if len(entries) > 1:
            _, inner = culprit(answer)
            answer = Answer(inner.status, inner.content, answer.in_doubt)
        if answer.in_doubt or "id" in _codes(answer):
            try:
                if await self.receipts.settled(receipt, answer.in_doubt, end):
                    self.receipts.take(last, receipt)
                    return None
            except PBCachedError as error:
                raise self.receipts.unknown(last, len(operations)) from error
        if answer.status == 413:
            raise TooLarge
        if len(entries) > 1 and time.monotonic() < end:
            if is_batch_off(answer):
                return await self._attempt_again(operations, end, 0, "switched off")
            if (most := batch_requests_allowed(answer)) is not None:
                return await self._attempt_again(operations, end, most, f"limited to {most} requests")
        return answer

    async def _attempt_again(
        self, operations: Sequence[Operation], end: float, most: int, was: str
    ) -> Answer | None:
        """`_attempt`, after the batch API was closed to us, or limited to so many requests. Where it stays so,
        commits hold the operations of one layout from now on, which can do without it."""
        if most < 2:
            if (refusal := await batch_opened_again(self._client, self._dialect, was)) is None:
                return await self._attempt(operations, end)
            self._most_requests = 0
            raise Unexplained(refusal)
        self._most_requests = most
        raise Unexplained(too_few_requests(self._client.url, most))

    def _entries(self, receipt: str, operations: Sequence[Operation]) -> list[bytes]:
        """The records of a commit, one for each layout; the first has the receipt."""
        by_layout: dict[str, list[Operation]] = {}
        for operation in operations:
            by_layout.setdefault(operation.layout, []).append(operation)
        if 1 < self._most_requests < len(by_layout):
            raise Unexplained(too_few_requests(self._client.url, self._most_requests))
        if self._most_requests < 2 <= len(by_layout):
            raise Unexplained(
                RequestRejected(
                    "commit: what concerns several collections takes PocketBase's batch API, which is off; "
                    "nothing was written. Switch it on in its dashboard, and open the database again",
                    status=403,
                )
            )
        return [
            self.receipts.entry(
                receipt if position == 0 else new_id(),
                self.receipts.next + position,
                {"layout": layout, "payload": _payload(some).decode()},
            )
            for position, (layout, some) in enumerate(by_layout.items())
        ]

    def _request(self, entry: bytes) -> bytes:
        return f'{{"method":"POST","url":"{self._path(entry)}","body":'.encode() + entry + b"}"

    def _path(self, entry: bytes) -> str:
        return f"{self.receipts.path}{_COMMIT}{_FIELDS if len(entry) > _LARGE else ''}"

    # refusals

    async def _mended(self, end: float) -> bool:
        """Was the installation not as it must be, and is it now?"""
        try:
            async with asyncio.timeout(_for_looks(end)):
                return await self._installation.repair()
        except (PocketBaseUnavailable, TimeoutError):
            return False

    async def _looked(self, answer: Answer, operations: Sequence[Operation]) -> Mapping[int, Refusal]:
        """`_blamed`, tried a few times."""
        for pause in _LOOKS:
            try:
                return await self._blamed(answer, operations)
            except PBCachedError:
                await asyncio.sleep(pause)
        return await self._blamed(answer, operations)

    async def _blamed(self, answer: Answer, operations: Sequence[Operation]) -> Mapping[int, Refusal]:
        """The operations that the commit was refused for, as far as looking at PocketBase tells."""
        if answer.status != 400:
            return {}
        codes = _codes(answer)
        if triggers.BARRED in codes:
            return await self._homeless(operations)
        stale = await self._stale(operations)
        if stale or triggers.STALE in codes or not self._dialect.sql:
            return stale
        return await violations(self._client, operations, self._layouts)

    async def _homeless(self, operations: Sequence[Operation]) -> dict[int, Refusal]:
        """Those whose collection is not there any more, or has lost its trigger, and columns that one needs."""
        blamed: dict[int, Refusal] = {}
        answers: dict[str, Answer] = {}
        for index, operation in enumerate(operations):
            collection = operation.collection
            if collection not in answers:
                answers[collection] = await self._client.send("GET", f"/api/collections/{collection}")
            answer = answers[collection]
            if answer.status == 404:
                blamed[index] = missing_collection(operation.what)
            elif answer.ok:
                layout = self._layouts[operation.layout]
                lost = layout.columns - {field.name for field in _fields.decode(answer.content).fields}
                if lost and not await self._installation.applies(layout):
                    blamed[index] = SchemaError(
                        f"{operation.what}: PocketBase's collection has lost columns ({', '.join(sorted(lost))}), "
                        "and with them the trigger that commits go by. Open the database again to have them back"
                    )
        return blamed

    async def _stale(self, operations: Sequence[Operation]) -> dict[int, Refusal]:
        """Those whose record is not what they were built on."""
        blamed: dict[int, Refusal] = {}
        by_collection: dict[str, dict[str, int]] = {}
        for index, operation in enumerate(operations):
            if operation.method == "POST":
                continue
            records = by_collection.setdefault(operation.collection, {})
            if operation.record_id in records:  # the one before it changes the record
                blamed[index] = _stale(operation)
            records.setdefault(operation.record_id, index)
        for collection, records in by_collection.items():
            try:
                revs = await self._revs(collection, list(records))
            except CollectionNotFound:
                blamed |= {index: missing_collection(operations[index].what) for index in records.values()}
                continue
            for record_id, index in records.items():
                if record_id not in revs:
                    blamed[index] = RecordNotFound(f"{operations[index].what}: the record is gone", status=404)
                elif revs[record_id] != operations[index].rev:
                    blamed[index] = _stale(operations[index])
        return blamed

    async def _revs(self, collection: str, record_ids: Sequence[str]) -> dict[str, int]:
        contents = await multi_gets(self._client, collection, record_ids, ("id", "rev"))
        return {row.id: row.rev for content in contents for row in _rows.decode(content).items}

    async def _unexplained(
        self, answer: Answer, operations: Sequence[Operation], unseen: Exception | None
    ) -> Exception:
        codes = _codes(answer)
        if answer.status == 404 or triggers.BARRED in codes:
            return SchemaError(
                f"PocketBase at {self._client.url} cannot take commits: the log '{self._log}' or its triggers are "
                "not as they must be, and could not be mended, which takes the SQL endpoint. Was the log deleted? "
                "Open the database again to have it created"
            )
        error = await self._client.rejection(answer, "commit")
        if answer.status != 400 or not isinstance(error, RequestRejected):
            return error
        if unseen is not None:
            reason = str(unseen) or "no answer in time"
            error = RequestRejected(
                f"{error}; what it was refused for could not be looked at: {reason}. Nothing was written",
                status=error.status,
                codes=error.codes,
            )
        return Unexplained(error)


def _payload(operations: Sequence[Operation]) -> bytes:
    sections: dict[bytes, list[bytes]] = {}
    for operation in operations:
        sections.setdefault(_SECTIONS[operation.method], []).append(operation.body)
    return b"{" + b",".join(b'"%b":[%b]' % (name, b",".join(bodies)) for name, bodies in sections.items()) + b"}"


def _is_triggered(answer: Answer, entries: int) -> bool:
    """Has the log all of its columns, and so its triggers?"""
    if entries == 1:
        return _created.decode(answer.content).stale is not None
    return all(result.body.stale is not None for result in _results.decode(answer.content))


def _verdict(answer: Answer) -> Verdict:
    if answer.ok and not answer.content.startswith(b"{"):
        return Verdict.DOUBT  # somebody's friendly page
    return by_status(answer)


def _codes(answer: Answer) -> Mapping[str, str]:
    if answer.status != 400:
        return {}
    error = refused(answer, "commit")
    return error.codes if isinstance(error, RequestRejected) else {}


def _for_looks(end: float) -> float:
    """Seconds that may be spent on finding out why a commit was refused, of those that are left until `end`."""
    return min(left(end), max(_LEAST_FOR_LOOKS, _SHARE_OF_LOOKS * left(end)))


def _stale(operation: Operation) -> StaleRevision:
    return StaleRevision(f"{operation.what}: the record has been changed since it was read", status=409)
