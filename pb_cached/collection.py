"""Parlant's `DocumentCollection` on PocketBase: the one place where reading meets writing.

Semantics are those of Parlant's in-memory database (facts: parlant, section 5, last column): order by
`creation_utc` and `id`, exact totals, cursors, "first inserted" wins, shallow merge, upsert. PocketBase narrows
by filter, the compiled predicate decides.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import Any, Concatenate, Final, Generic, ParamSpec, TypeVar, cast

import msgspec
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection, Where
from parlant.core.persistence.document_database import (
    CollectionIndex,
    CollectionSort,
    DeleteResult,
    DocumentCollection,
    FindResult,
    InsertResult,
    TDocument,
    UpdateResult,
)

from pb_cached.cache.collection import CollectionCache, Rule
from pb_cached.cache.predicate import Predicate, compile_where
from pb_cached.cache.stats import CollectionStats
from pb_cached.cache.watches import Wake
from pb_cached.coherence import FollowedCollection
from pb_cached.connection import Connection
from pb_cached.errors import (
    InvalidDocument,
    InvalidFilter,
    PBCachedError,
    RequestRejected,
    SchemaError,
    StaleRevision,
)
from pb_cached.exact import Json, loads
from pb_cached.pocketbase.codec import RecordCodec, Row, snapshot
from pb_cached.pocketbase.commit import LogPath, Operation, Reply
from pb_cached.pocketbase.filters import FilterWriter
from pb_cached.pocketbase.records import RecordReader
from pb_cached.pocketbase.schema import CollectionSpec, IndexSpec
from pb_cached.reading import CachedReads, DirectReads, Loader, Match, Reads, WatchedCommits
from pb_cached.reading.order import position
from pb_cached.telemetry import Log
from pb_cached.writes import Committer, Overtaken, RecordChanges, State
from pb_cached.writes.basis import built_on, note_read, note_written
from pb_cached.writes.calls import Calls, Generation

P = ParamSpec("P")
S = TypeVar("S", bound="PocketBaseDocumentCollection[Any]")
T = TypeVar("T")

DELETED_TOGETHER: Final = 200
"""Documents that are read, and then deleted. Others' writes wait for no more than these."""

_ATTEMPTS: Final = 1000
"""How often an update looks for another match when the one it found was taken from it. Each time some other's
change has succeeded."""


class Caching(msgspec.Struct, frozen=True):
    """How a collection is cached."""

    rule: Rule
    is_on: bool
    """Else every read goes to PocketBase."""
    follows: str | None = None
    """The log that others commit to; None where nobody else writes."""


def _counted(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """A write, which `flush` waits for wherever it is."""

    @wraps(method)
    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        generation = self._calls.begin()
        try:
            return await method(self, *args, **kwargs)
        finally:
            self._calls.end(generation)

    return call


class PocketBaseDocumentCollection(DocumentCollection[TDocument], Generic[TDocument]):
    """A collection of documents. Every document it returns belongs to the caller."""

    def __init__(
        self,
        spec: CollectionSpec,
        codec: RecordCodec,
        connection: Connection,
        committer: Committer,
        caching: Caching,
        patience: float,
        log: Log,
    ) -> None:
        """
        Args:
            patience: seconds for which an update is tried again that other servers overtake.
        """
        self.codec = codec
        self.reader = RecordReader(connection.client, connection.dialect, codec)
        self.filters = FilterWriter(codec.columns, connection.dialect)
        self._spec = msgspec.structs.replace(spec, columns=codec.layout.declared)
        self._connection = connection
        self._committer = committer
        self._log = log
        make = partial(self._new_cache, caching)
        self._cached = connection.cached(spec.name, codec.layout, make) if caching.is_on else None
        self._reads: Reads = self._cached or self._direct(self.reader)
        self._watched = self._cached or WatchedCommits(
            caching.rule, partial(committer.follow, spec.name), partial(committer.unfollow, spec.name)
        )
        self._changes = RecordChanges(codec, self._record, self._apply, patience)
        self._calls = Calls()
        self._mending: set[asyncio.Task[Reply]] = set()
        self._looks_before = caching.follows is not None and not isinstance(committer.path, LogPath)
        """Nobody compares revisions, and what is cached may be older than what PocketBase has."""
        self._closed = False

    def _direct(self, reader: RecordReader) -> DirectReads:
        return DirectReads(self.codec, reader, self.filters, self._connection.dialect)

    def _new_cache(self, caching: Caching) -> CachedReads:
        connection, log, codec = self._connection, caching.follows, self.codec
        cache = CollectionCache(caching.rule, connection.memory)
        loads = partial(Loader, cache, codec, self.reader, self.filters, log=self._log)
        if log is None or connection.follower is None:
            loader, may_answer, reader = loads(ready=_at_once), _always, self.reader
        else:
            follower = connection.follower
            loader = loads(ready=partial(follower.caught_up, log))
            followed = FollowedCollection(cache, codec, loader.state)
            may_answer = follower.follow(log, followed, self.reader)
            follower.audit.add(loader)
            reader = RecordReader(
                connection.client, connection.dialect, codec, seen=lambda rows: reads.glimpsed(rows)
            )
        settled = partial(self._committer.settled, self._spec.name)
        reads = CachedReads(cache, loader, self._direct(reader), codec, settled, may_answer)
        self._committer.follow(self._spec.name, reads)
        return reads

    def close(self) -> None:
        """Take no more calls. What was submitted is committed all the same, and who watches is woken to see that
        it is over."""
        self._closed = True
        self._watched.wake_all()

    @property
    def undecided(self) -> int:
        """How many calls that write are under way."""
        return self._calls.under_way

    async def flush(self) -> None:
        """Return when every write called so far is decided. Those whose callers have left may be in the queue."""
        await self._calls.over()
        await self._changes.flush()

    def stats(self) -> CollectionStats | None:
        """What the collection's cache holds and has done; None where it has no cache."""
        return self._cached.cache.snapshot() if self._cached else None

    async def warm(self) -> None:
        """Read the collection into its cache, the newest documents first, until it is there or the cache full."""
        self._require_open()
        if self._cached:
            await self._read(self._cached.loader.warm)

    def warm_in_background(self) -> None:
        """The same, without waiting. That it fails is logged."""
        if self._cached:
            self._cached.loader.warm_in_background()

    @property
    def hears_everything(self) -> bool:
        """Does a watch hear of all changes that reads show, or of this process's own alone?"""
        return self._cached is not None

    def watch(self, filters: Where, wake: Wake) -> Callable[[], None]:
        """Call `wake` whenever a read with this filter may show something new. Until what is returned is called.

        Watch first, then look, then wait: what has changed since the look has woken. `wake` must only note it.
        What woke it is seen by the next read.
        """
        self._require_open()
        return self._watched.watch(filters, wake)

    def wake(self, filters: Where) -> None:
        """Have everybody look again who watches this: a read may show something new that was not written."""
        self._watched.wake(filters)

    async def find(
        self,
        filters: Where,
        limit: int | None = None,
        cursor: Cursor | None = None,
        sort_direction: SortDirection | None = None,
    ) -> FindResult[TDocument]:
        """Documents in the order of `creation_utc`, then `id`.

        Args:
            limit: the most to return; None for all.
            cursor: only those after it, in the order asked for.

        Returns:
            `total_count` counts all matches after the cursor, also those beyond the limit.

        Raises:
            InvalidFilter: an unknown operator, a malformed filter, or a limit, cursor or direction that is none.
        """
        self._require_open()
        _require_filter(filters)
        _require_page(limit, cursor, sort_direction)
        descending = sort_direction == SortDirection.DESC
        at = (str(cursor.creation_utc), str(cursor.id)) if cursor is not None else None
        found = await self._read(self._reads.find, filters, limit, descending, at)
        has_more = found.total > len(found.documents)
        last = found.documents[-1] if has_more and found.documents else None
        return FindResult(
            items=cast(Any, found.documents),
            total_count=found.total,
            has_more=has_more,
            next_cursor=Cursor(creation_utc=position(last)[0], id=ObjectId(position(last)[1])) if last else None,
        )

    async def find_one(self, filters: Where, sort: CollectionSort | None = None) -> TDocument | None:
        """The first match: in the order of `sort`, ties in the order of insertion; without it, the first inserted.

        A value that is missing, or None, sorts before all others.

        Raises:
            InvalidFilter: as `find`.
        """
        self._require_open()
        _require_filter(filters)
        _require_sort(sort)
        if sort:
            return cast(TDocument | None, await self._read(self._reads.first_sorted, filters, sort))
        match = await self._read(self._reads.first, filters)
        if match is None:
            return None
        note_read(match.record, match.rev)
        return cast(TDocument, match.document)

    async def exists(self, filters: Where) -> bool:
        """Is there a match? What `find_one` tells too, at a fraction of its cost where the match is cached.

        Raises:
            InvalidFilter: as `find`.
        """
        self._require_open()
        _require_filter(filters)
        return await self._read(self._reads.exists, filters)

    def exists_at_hand(self, filters: Where) -> bool | None:
        """The same, if it is known without waiting for anything; else None."""
        return None if self._cached is None or self._closed else self._cached.exists_at_hand(filters)

    async def greatest(self, filters: Where, field: str, *, anew: bool = False) -> Json:
        """The greatest value of a field among all matches; None where there is none.

        Args:
            anew: ask PocketBase, when the commit under way is decided: what follows from the answer then has the
                best chance to be true still when it is committed.

        Raises:
            InvalidFilter: as `find`.
        """
        self._require_open()
        _require_filter(filters)
        if anew:
            await self._committer.settled(self._spec.name)
            return await self._read(self._direct(self.reader).greatest, filters, field)
        return await self._read(self._reads.greatest, filters, field)

    def greatest_at_hand(self, filters: Where, field: str) -> tuple[Json] | None:
        """The same, if it is known without waiting for anything; else None."""
        return None if self._cached is None or self._closed else self._cached.greatest_at_hand(filters, field)

    async def ensure_indexes(self, indexes: Sequence[CollectionIndex]) -> None:
        """Create the indexes that are missing. One that PocketBase refuses is reported and left out."""
        self._require_open()
        specs = []
        for index in indexes:
            columns = []
            for field, direction in index.fields:
                column = self.codec.columns.get(field)
                if column is None:
                    raise InvalidFilter(f"collection '{self._spec.name}' has no field '{field}' to index")
                columns.append((column.name, direction == SortDirection.DESC))
            specs.append(IndexSpec(tuple(columns), index.unique))
        await self._connection.schema.ensure_indexes(self._spec, specs)

    @_counted
    async def insert_one(self, document: TDocument) -> InsertResult:
        """Insert a document. Returns when PocketBase has committed it; the caller's object is not kept.

        Raises:
            InvalidDocument: keys are missing, or a value is not JSON. Nothing was written.
            DocumentTooLarge: likewise.
            UniqueViolation: a unique index refuses it.
            OutcomeUnknown, PocketBaseUnavailable: see `Committer.write`.
        """
        self._require_open()
        await self._insert(document)
        return InsertResult(acknowledged=True)

    def fit(self, operations: Sequence[Operation]) -> int:
        """See `Committer.fit`."""
        return self._committer.fit(operations)

    @_counted
    async def commit(self, operations: Sequence[Operation]) -> Sequence[Reply]:
        """Commit operations, all of them or none. They fit into one commit, and nothing that must come before them
        or after them is undecided.

        Returns:
            What became of each: see `left`.

        Raises:
            PBCachedError: as `insert_one`.
        """
        self._require_open()
        replies = await self._committer.write(*operations, apart=True)
        for operation, reply in zip(operations, replies, strict=True):
            if not operation.is_open and not self._is_whole(operation, reply):
                await self._made_whole(operation)
        return replies

    def commit_at_once(self, operation: Operation, decided: Callable[[Exception | None], None]) -> bool:
        """`commit` an operation, if there is nothing to wait for before that. Did it begin?

        Args:
            decided: called when it is committed; or with what `commit` would raise.
        """
        if self._closed or self._committer.is_full:
            return False
        outcome = self._committer.submit(operation, apart=True)
        outcome.add_done_callback(partial(self._decided, operation, self._calls.begin(), decided))
        return True

    def _decided(
        self,
        operation: Operation,
        call: Generation,
        decided: Callable[[Exception | None], None],
        outcome: asyncio.Future[list[Reply]],
    ) -> None:
        error = _error_of(outcome)
        if error is None and not self._is_whole(operation, outcome.result()[0]):
            mending = asyncio.create_task(self._made_whole(operation))
            self._mending.add(mending)
            mending.add_done_callback(partial(self._mended, call, decided))
            return
        self._calls.end(call)
        decided(error)

    def _mended(
        self, call: Generation, decided: Callable[[Exception | None], None], mending: asyncio.Task[Reply]
    ) -> None:
        self._mending.discard(mending)
        self._calls.end(call)
        decided(_error_of(mending))

    @_counted
    async def update_one(self, filters: Where, params: TDocument, upsert: bool = False) -> UpdateResult[TDocument]:
        """Merge `params` into the first match: the fields that it names, and no others. Within a store's method,
        only if the match is what the method has read.

        Args:
            upsert: insert `params`, which must then be a whole document, where nothing matches.

        Returns:
            The document as it was committed, other writers' changes to its other fields included.

        Raises:
            As `insert_one`, InvalidFilter, and within a store's method StaleRead.
        """
        self._require_open()
        _require_filter(filters)
        _require_document(params)
        params = cast(TDocument, snapshot(params))  # the caller may change it while the match is looked for
        matches = compile_where(filters)
        for _ in range(_ATTEMPTS):
            since = self._changes.now
            match = await self._read(self._reads.first, filters)
            if match is None:
                if not upsert:
                    return UpdateResult(True, 0, 0, None)
                inserted, reply = await self._insert(params)
                return UpdateResult(True, 0, 0, cast(TDocument, self.left(inserted, reply)))
            basis = built_on(match.record)
            found = _state(match) if basis is None or not self._looks_before else await self._looked_at(match)
            with suppress(Overtaken):
                updated = await self._changes.make(found, since, matches, cast(dict[str, Any], params), basis)
                note_written(match.record)
                return UpdateResult(True, 1, 1, cast(TDocument, updated))
        raise StaleRevision(f"update in '{self._spec.name}': others were faster with every match", status=409)

    @_counted
    async def delete_one(self, filters: Where) -> DeleteResult[TDocument]:
        """Delete the first match.

        Raises:
            As `update_one`.
        """
        self._require_open()
        _require_filter(filters)
        matches = compile_where(filters)
        for _ in range(_ATTEMPTS):
            since = self._changes.now
            match = await self._read(self._reads.first, filters)
            if match is None:
                return DeleteResult(True, 0, None)
            with suppress(Overtaken):
                deleted = await self._changes.make(_state(match), since, matches, None)
                return DeleteResult(True, 1, cast(TDocument, deleted))
        raise StaleRevision(f"delete in '{self._spec.name}': others were faster with every match", status=409)

    @_counted
    async def delete_many(self, filters: Where) -> int:
        """Delete every match that is there now: read and deleted page by page, in as many commits as it takes, so
        there may be any number of them. A failure leaves the rest, and may be repeated.

        Returns:
            How many were deleted here, and not by others meanwhile.

        Raises:
            As `delete_one`.
        """
        self._require_open()
        _require_filter(filters)
        return await self._read(self._delete_many, filters, compile_where(filters))

    async def _delete_many(self, filters: Where, matches: Predicate) -> int:
        if self._cached:
            self._cached.forget(filters)
        deleted = 0
        for filter_ in self.filters.narrow(filters) or ():
            since = self._changes.now
            async for rows in self.reader.pages(filter_, DELETED_TOGETHER):
                deleted += await self._delete_page(rows, since, matches)
                since = self._changes.now
        return deleted

    async def _delete_page(self, rows: Sequence[Row], since: int, matches: Predicate) -> int:
        deleted = 0
        for _ in range(_ATTEMPTS):
            found = [State(row.id, row.rev, self.codec.document(row), row) for row in rows]
            found = [state for state in found if matches(state.document)]
            changes = (self._changes.make(state, since, matches, None) for state in found)
            outcomes = await asyncio.gather(*changes, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException) and not isinstance(outcome, Overtaken):
                    raise outcome
            overtaken = [
                state.record
                for state, outcome in zip(found, outcomes, strict=True)
                if isinstance(outcome, Overtaken)
            ]
            deleted += len(found) - len(overtaken)
            if not overtaken:
                return deleted
            since = self._changes.now
            rows = list((await self.reader.by_ids(overtaken)).values())
        raise StaleRevision(f"delete in '{self._spec.name}': others were faster with every match", status=409)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def _require_open(self) -> None:
        if self._closed:
            raise PBCachedError(
                f"collection '{self._spec.name}': its database is closed; open it again, and the collection"
            )

    # reading

    async def _read(self, read: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a read gives. PocketBase refuses a filter over a column that somebody has taken away with the
        reason that it gives to all it does not like, so the collection is looked at."""
        try:
            return await read(*args, **kwargs)
        except RequestRejected as error:
            if error.status == 400:
                await self._connection.schema.require(self._spec)
            raise

    # writing

    async def _insert(self, document: Mapping[str, Any]) -> tuple[Operation, Reply]:
        _require_document(document)
        self.codec.require(document)
        operation = self.codec.insert(snapshot(document))
        return operation, await self._apply(operation)

    def left(self, operation: Operation, reply: Reply) -> dict[str, Json]:
        """The document that an insert or an update left."""
        return self.codec.document(self.codec.row(reply.record)) if reply.record else loads(operation.document)

    async def _looked_at(self, match: Match) -> State:
        """What PocketBase has of a match now; where it has nothing any more, what the match was."""
        row = await self._record(match.record)
        return _state(match) if row is None else State(row.id, row.rev, self.codec.document(row), row)

    async def _record(self, record_id: str) -> Row | None:
        """A record that others have changed, as it is now."""
        row = (await self._read(self.reader.by_ids, [record_id])).get(record_id)
        if self._cached:
            self._cached.seen(record_id, row)
        return row

    async def _apply(self, operation: Operation) -> Reply:
        (reply,) = await self._committer.write(operation)
        return reply if self._is_whole(operation, reply) else await self._made_whole(operation)

    def _is_whole(self, operation: Operation, reply: Reply) -> bool:
        """Has PocketBase all that was written? It drops columns that a collection does not have, and says nothing.
        So its reply is looked at, before anybody is told that it is done."""
        if not reply.record or operation.method == "DELETE":
            return True
        try:
            self.codec.row(reply.record)
        except SchemaError:
            return False
        return True

    async def _made_whole(self, operation: Operation) -> Reply:
        """Add the columns that are missing, and write it again."""
        await self._connection.schema.ensure(self._spec, as_it_was=True)
        again = Operation("PATCH", operation.collection, operation.record_id, operation.body)
        (reply,) = await self._committer.write(again)
        return reply


def _error_of(outcome: asyncio.Future[Any]) -> Exception | None:
    if outcome.cancelled():
        return PBCachedError("the event loop has ended before it was known what became of the write")
    return cast(Exception | None, outcome.exception())


def _always() -> bool:
    return True


async def _at_once() -> None:
    return


def _state(match: Match) -> State:
    return State(match.record, match.rev, match.document)


def _require_filter(filters: object) -> None:
    if filters.__class__ is not dict and not isinstance(filters, Mapping):  # asking for the class is cheaper
        raise InvalidFilter(f"a filter must be a mapping such as {{'id': {{'$eq': ...}}}}, not {filters!r:.60}")


def _require_page(limit: object, cursor: object, direction: object) -> None:
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
        raise InvalidFilter(f"limit must be a whole number or None, not {limit!r:.60}")
    if limit is not None and limit < 0:
        raise InvalidFilter(f"limit must not be negative, got {limit}")
    if cursor is not None and not isinstance(cursor, Cursor):
        raise InvalidFilter(
            f"cursor must be a Cursor, such as the next_cursor of the page before, or None, not {cursor!r:.60}"
        )
    if direction is not None:
        _require_direction(direction, "sort_direction")


def _require_sort(sort: object) -> None:
    if sort is None:
        return
    if isinstance(sort, str) or not isinstance(sort, Sequence):
        raise InvalidFilter(f"sort must be a sequence of (field, SortDirection), not {sort!r:.60}")
    for part in sort:
        if not (isinstance(part, Sequence) and len(part) == 2 and isinstance(part[0], str)):
            raise InvalidFilter(f"sort must be a sequence of (field, SortDirection), and holds {part!r:.60}")
        _require_direction(part[1], f"the direction of '{part[0]}'")


def _require_direction(direction: object, what: str) -> None:
    if not isinstance(direction, SortDirection):
        raise InvalidFilter(f"{what} must be SortDirection.ASC or SortDirection.DESC, not {direction!r:.60}")


def _require_document(document: object) -> None:
    if not isinstance(document, Mapping):
        raise InvalidDocument(f"a document must be a mapping such as a dict, not {type(document).__name__}")
