"""Parlant's `DocumentDatabase` and `DocumentCollection` on PocketBase: the one place where reading meets writing.

Semantics are those of Parlant's in-memory database (facts: parlant, section 5, last column): order by
`creation_utc` and `id`, exact totals, cursors, "first inserted" wins, shallow merge, upsert. PocketBase narrows
by filter, the compiled predicate decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, Self, TypeVar, cast

import httpx
import msgspec
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection, Where
from parlant.core.persistence.document_database import (
    BaseDocument,
    CollectionIndex,
    CollectionSort,
    DeleteResult,
    DocumentCollection,
    DocumentDatabase,
    FindResult,
    InsertResult,
    TDocument,
    UpdateResult,
)

from pb_cached.cache.collection import CollectionCache, Rule
from pb_cached.cache.predicate import Predicate, compile_where
from pb_cached.cache.rules import indexed_fields, rule_for
from pb_cached.cache.stats import CollectionStats
from pb_cached.config import Config, checked_config, find_address
from pb_cached.connection import Connection, connection_to
from pb_cached.errors import (
    CollectionExists,
    CollectionNotFound,
    ConfigError,
    InvalidDocument,
    InvalidFilter,
    NotCommitted,
    PBCachedError,
    RequestRejected,
    SchemaError,
    StaleRevision,
)
from pb_cached.exact import Json, loads
from pb_cached.migrations import Failures, Migration
from pb_cached.pocketbase.codec import RecordCodec, Row, snapshot
from pb_cached.pocketbase.commit import Operation, Reply
from pb_cached.pocketbase.filters import FilterWriter
from pb_cached.pocketbase.records import RecordReader
from pb_cached.pocketbase.schema import CollectionSpec, IndexSpec, document_collection
from pb_cached.reading import CachedReads, DirectReads, Loader, Match, Reads
from pb_cached.reading.order import after, position
from pb_cached.stats import Stats
from pb_cached.telemetry import Log, log_through
from pb_cached.writes import Committer, Overtaken, RecordChanges, State

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_PREFIX: Final = "parlant"

DELETED_TOGETHER: Final = 200
"""Documents that are read, and then deleted. Others' writes wait for no more than these."""

_ATTEMPTS: Final = 1000
"""How often an update looks for another match when the one it found was taken from it. Each time some other's
change has succeeded."""


class PocketBaseDocumentDatabase(DocumentDatabase):
    """A Parlant document database whose collections are PocketBase collections called `{prefix}_{name}`.

    Databases of one event loop that speak with the same PocketBase share its connection and its queue.

    Args:
        logger: Parlant's, structlog's or the standard library's; None for our own.
        connection_params: `url` and `admin_token`, or `url`, `admin_email` and `admin_password`. Without it,
            `POCKETBASE_URL`, `POCKETBASE_ADMIN_TOKEN`, or `POCKETBASE_ADMIN_EMAIL` with
            `POCKETBASE_ADMIN_PASSWORD`, then the configuration file.
        collection_prefix: one per Parlant store, as each of them opens a collection called `metadata`.
        http_client: used as it is, and never closed.
        config: a `Config`, or None for the file that `PB_CACHED_CONFIG` names, or the defaults.

    Raises:
        ConfigError: no URL or no credentials are configured, or an argument is not what it must be.
    """

    def __init__(
        self,
        logger: Any = None,
        connection_params: Mapping[str, Any] | None = None,
        *,
        collection_prefix: str | None = None,
        http_client: httpx.AsyncClient | None = None,
        config: Config | None = None,
    ) -> None:
        if http_client is not None and not isinstance(http_client, httpx.AsyncClient):
            raise ConfigError(
                f"http_client: expected an httpx.AsyncClient, not {type(http_client).__module__}."
                f"{type(http_client).__name__}"
            )
        self._config = checked_config(config) if config is not None else Config.load()
        self._address = find_address(self._config, connection_params)
        self._prefix = collection_prefix or DEFAULT_PREFIX
        self._http = http_client
        self._log = log_through(logger, self._config.logging)
        self._held_back: list[Callable[[], Awaitable[None]]] = []
        self._entered = False
        self._exit_stack = AsyncExitStack()
        self._connection: Connection | None = None
        self._committer: Committer | None = None
        self._opening = asyncio.Lock()
        self._collections: dict[str, PocketBaseDocumentCollection[Any]] = {}

    async def __aenter__(self) -> Self:
        """Connect, sign in, and learn what this PocketBase can do.

        Raises:
            PocketBaseUnavailable, AuthenticationFailed, RequestRejected: it cannot be used.
            PBCachedError: it is open already.
        """
        if self._entered:
            raise PBCachedError("the database is open already: enter it once, and hand the object on")
        self._entered = True
        try:
            async with AsyncExitStack() as stack:
                connection = await stack.enter_async_context(
                    connection_to(self._address, self._config, self._http, self._log)
                )
                committer = await connection.committer(self._prefix)
                self._exit_stack = stack.pop_all()
        except BaseException:
            self._entered = False
            raise
        self._connection, self._committer = connection, committer
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit what is queued, then let go of the connection.

        Raises:
            NotCommitted: writes were left when `close_timeout` had passed.
        """
        try:
            await self._submit_held_back()
        finally:
            await self._close()

    async def _close(self) -> None:
        self._held_back.clear()
        for collection in self._collections.values():
            collection.close()
        self._collections.clear()
        connection, committer = self._connection, self._committer
        self._connection = self._committer = None
        try:
            # The last one closes the committer itself, which drains it and accounts for what is left.
            if connection and committer and connection.users() > 1:
                await self._drain(committer)
        finally:
            try:
                await self._exit_stack.aclose()
            finally:
                self._entered = False

    async def _drain(self, committer: Committer) -> None:
        timeout = self._config.writes.close_timeout
        try:
            async with asyncio.timeout(timeout):
                await committer.flush()
        except TimeoutError:
            raise NotCommitted(
                f"closing took longer than {timeout:g} s: {committer.undecided} writes are still on their way. "
                "They may yet be committed, as other databases keep the connection open"
            ) from None

    @property
    def log(self) -> Log:
        return self._log

    def stats(self) -> Stats:
        """What the cache holds and has done, over all and by collection, and what was committed. Costs next to
        nothing."""
        connection, committer = self._opened()
        collections = {name: collection.stats() for name, collection in self._collections.items()}
        return Stats(
            cache_bytes=connection.memory.bytes,
            cache_max_bytes=connection.memory.max_bytes if self._config.caches else 0,
            collections={name: stats for name, stats in collections.items() if stats is not None},
            writes=committer.stats(),
        )

    async def warm(self, *names: str) -> None:
        """Read collections into the cache, the newest documents first, until they are there or the cache is full.
        Progress is logged. Does nothing where there is no cache.

        Args:
            names: collections that are open; none for all of those.

        Raises:
            CollectionNotFound: one of them is not open.
        """
        self._opened()
        for name in names or tuple(self._collections):
            if name not in self._collections:
                raise CollectionNotFound(f"collection '{name}' is not open: get it before you warm it")
            await self._collections[name].warm()

    async def flush(self) -> None:
        """Return when every write submitted so far is decided."""
        _, committer = self._opened()
        await self._submit_held_back()
        await committer.flush()

    def write_first(self, held_back: Callable[[], Awaitable[None]]) -> None:
        """Have `flush`, and closing, wait for this before anything else: it submits what a store has acknowledged
        but not submitted yet."""
        self._held_back.append(held_back)

    async def _submit_held_back(self) -> None:
        for submit in self._held_back:
            await submit()

    async def create_collection(self, name: str, schema: type[TDocument]) -> DocumentCollection[TDocument]:
        """Create a collection.

        Raises:
            CollectionExists: there is one of this name.
            ForeignCollection: the name belongs to a collection that is not ours.
        """
        async with self._opening:
            connection, _ = self._opened()
            spec = document_collection(self._prefix, name, schema)
            if await connection.schema.exists(spec):
                raise CollectionExists(f"collection '{name}' (PocketBase: '{spec.name}') exists already")
            self._forget(name, spec)
            return await self._open(name, spec, schema)

    async def get_collection(
        self,
        name: str,
        schema: type[TDocument],
        document_loader: Callable[[BaseDocument], Awaitable[TDocument | None]],
    ) -> DocumentCollection[TDocument]:
        """Open a collection that exists, and migrate its older documents with the loader.

        Raises:
            CollectionNotFound: there is none.
        """
        async with self._opening:
            connection, _ = self._opened()
            if name in self._collections:
                return cast(DocumentCollection[TDocument], self._collections[name])
            spec = document_collection(self._prefix, name, schema)
            if not await connection.schema.exists(spec):
                raise CollectionNotFound(f"collection '{name}' (PocketBase: '{spec.name}') does not exist")
            return await self._open(name, spec, schema, document_loader)

    async def get_or_create_collection(
        self,
        name: str,
        schema: type[TDocument],
        document_loader: Callable[[BaseDocument], Awaitable[TDocument | None]],
    ) -> DocumentCollection[TDocument]:
        """Open a collection, creating it if need be; a second call returns the same object."""
        async with self._opening:
            self._opened()
            if name in self._collections:
                return cast(DocumentCollection[TDocument], self._collections[name])
            spec = document_collection(self._prefix, name, schema)
            return await self._open(name, spec, schema, document_loader)

    async def delete_collection(self, name: str) -> None:
        """Delete a collection and all of its documents.

        Raises:
            CollectionNotFound: there is none.
            ForeignCollection: it is not ours.
        """
        async with self._opening:
            connection, committer = self._opened()
            spec = document_collection(self._prefix, name, BaseDocument)
            if not await connection.schema.exists(spec):
                self._forget(name, spec)
                raise CollectionNotFound(f"collection '{name}' (PocketBase: '{spec.name}') does not exist")
            await committer.flush()
            await committer.path.leave(spec.name)
            await connection.schema.drop(spec)
            self._forget(name, spec)

    def _forget(self, name: str, spec: CollectionSpec) -> None:
        """Keep nothing of a collection that is not there, whoever deleted it."""
        connection, _ = self._opened()
        connection.forget(spec.name)
        self._collections.pop(name, None)

    def _opened(self) -> tuple[Connection, Committer]:
        if self._connection is None or self._committer is None:
            raise PBCachedError("the database is not open: use it inside `async with`")
        return self._connection, self._committer

    async def _open(
        self,
        name: str,
        spec: CollectionSpec,
        schema: type[TDocument],
        loader: Callable[[BaseDocument], Awaitable[TDocument | None]] | None = None,
    ) -> PocketBaseDocumentCollection[TDocument]:
        connection, committer = self._opened()
        fields = ["id", *(column.field for column in spec.columns)]
        rule = rule_for(name, fields, self._config.collections.get(name))
        if indexed := indexed_fields(rule):
            spec = spec.indexed_by(indexed)
        collection: PocketBaseDocumentCollection[TDocument] = PocketBaseDocumentCollection(
            spec,
            await self._codec(spec),
            connection,
            committer,
            rule if self._config.caches else None,
            self._config.writes.deadline,
            self._log,
        )
        if loader is not None:
            await Migration(
                loader,
                collection.reader,
                collection.codec,
                collection.filters,
                committer,
                partial(self._failures, name),
                self._log,
            ).run()
        self._collections[name] = collection
        if name in self._config.cache.warm:
            collection.warm_in_background()
        return collection

    async def _codec(self, spec: CollectionSpec) -> RecordCodec:
        connection, committer = self._opened()
        layout = await connection.schema.ensure(spec)
        form = await connection.form(committer.path, self._prefix, spec.name, layout)
        most = min(self._config.writes.max_document_bytes, committer.path.max_bytes)
        return RecordCodec(spec.name, layout, most, form)

    async def _failures(self, name: str) -> Failures:
        spec = document_collection(self._prefix, f"{name}_failed_migrations", BaseDocument)
        return Failures(spec.name, await self._codec(spec))


class PocketBaseDocumentCollection(DocumentCollection[TDocument], Generic[TDocument]):
    """A collection of documents. Every document it returns belongs to the caller."""

    def __init__(
        self,
        spec: CollectionSpec,
        codec: RecordCodec,
        connection: Connection,
        committer: Committer,
        rule: Rule | None,
        patience: float,
        log: Log,
    ) -> None:
        """
        Args:
            rule: how the collection is cached; None where every read goes to PocketBase.
            patience: seconds for which an update is tried again that other servers overtake.
        """
        self.codec = codec
        self.reader = RecordReader(connection.client, connection.dialect, codec)
        self.filters = FilterWriter(codec.columns, connection.dialect)
        self._spec = msgspec.structs.replace(spec, columns=codec.layout.declared)
        self._connection = connection
        self._committer = committer
        self._log = log
        self._cached = connection.cached(spec.name, codec.layout, partial(self._new_cache, rule)) if rule else None
        self._reads: Reads = self._cached or self._direct()
        self._changes = RecordChanges(codec, self._record, self._apply, patience)
        self._closed = False

    def _direct(self) -> DirectReads:
        return DirectReads(self.codec, self.reader, self.filters, self._connection.dialect)

    def _new_cache(self, rule: Rule) -> CachedReads:
        cache = CollectionCache(rule, self._connection.memory)
        loader = Loader(cache, self.codec, self.reader, self.filters, self._log)
        reads = CachedReads(
            cache, loader, self._direct(), self.codec, partial(self._committer.settled, self._spec.name)
        )
        self._committer.follow(self._spec.name, reads)
        return reads

    def close(self) -> None:
        """Take no more calls. What was submitted is committed all the same."""
        self._closed = True

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
            InvalidFilter: an unknown operator or a malformed filter.
        """
        self._require_open()
        _require_filter(filters)
        if limit is not None and limit < 0:
            raise InvalidFilter(f"limit must not be negative, got {limit}")
        descending = sort_direction == SortDirection.DESC
        where = after(filters, cursor, descending)
        found = await self._read(self._reads.find, where, limit, descending)
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
        if sort:
            return cast(TDocument | None, await self._read(self._reads.first_sorted, filters, sort))
        match = await self._read(self._reads.first, filters)
        return cast(TDocument, match.document) if match else None

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

    async def insert_one(self, document: TDocument) -> InsertResult:
        """Insert a document. Returns when PocketBase has committed it; the caller's object is not kept.

        Raises:
            InvalidDocument: keys are missing, or a value is not JSON. Nothing was written.
            DocumentTooLarge: likewise.
            UniqueViolation: a unique index refuses it.
            OutcomeUnknown, PocketBaseUnavailable: see `Committer.write`.
        """
        await self._insert(document)
        return InsertResult(acknowledged=True)

    async def update_one(self, filters: Where, params: TDocument, upsert: bool = False) -> UpdateResult[TDocument]:
        """Merge `params` into the first match: the fields that it names, and no others.

        Args:
            upsert: insert `params`, which must then be a whole document, where nothing matches.

        Returns:
            The document as it was committed, other writers' changes to its other fields included.

        Raises:
            As `insert_one`, and InvalidFilter.
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
                return UpdateResult(True, 0, 0, cast(TDocument, await self._insert(params)))
            with suppress(Overtaken):
                updated = await self._changes.make(_state(match), since, matches, cast(dict[str, Any], params))
                return UpdateResult(True, 1, 1, cast(TDocument, updated))
        raise StaleRevision(f"update in '{self._spec.name}': others were faster with every match", status=409)

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

    async def _insert(self, document: Mapping[str, Any]) -> dict[str, Json]:
        self._require_open()
        _require_document(document)
        self.codec.require(document)
        operation = self.codec.insert(document)
        reply = await self._apply(operation)
        return self.codec.document(self.codec.row(reply.record)) if reply.record else loads(operation.document)

    async def _record(self, record_id: str) -> Row | None:
        """A record that others have changed, as it is now."""
        row = (await self._read(self.reader.by_ids, [record_id])).get(record_id)
        if self._cached:
            self._cached.seen(record_id, row)
        return row

    async def _apply(self, operation: Operation) -> Reply:
        """Commit an operation.

        PocketBase drops columns that a collection does not have, and says nothing. So its reply is looked at, and
        where a column is missing it is added and the write repeated, before anybody is told that it is done.
        """
        (reply,) = await self._committer.write(operation)
        if not reply.record or operation.method == "DELETE":
            return reply
        try:
            self.codec.row(reply.record)
        except SchemaError:
            await self._connection.schema.ensure(self._spec, as_it_was=True)
        else:
            return reply
        again = Operation("PATCH", operation.collection, operation.record_id, operation.body)
        (reply,) = await self._committer.write(again)
        return reply


def _state(match: Match) -> State:
    return State(match.record, match.rev, match.document)


def _require_filter(filters: object) -> None:
    if not isinstance(filters, Mapping):
        raise InvalidFilter(f"a filter must be a mapping such as {{'id': {{'$eq': ...}}}}, not {filters!r:.60}")


def _require_document(document: object) -> None:
    if not isinstance(document, Mapping):
        raise InvalidDocument(f"a document must be a mapping such as a dict, not {type(document).__name__}")
