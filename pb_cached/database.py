"""Parlant's `DocumentDatabase` on PocketBase: opens collections, and closes what they share."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, cast

import httpx
from parlant.core.persistence.document_database import (
    BaseDocument,
    DocumentCollection,
    DocumentDatabase,
    TDocument,
)

from pb_cached.cache.collection import Rule
from pb_cached.cache.rules import OTHER, PARLANT, indexed_fields, rule_for
from pb_cached.collection import Caching, PocketBaseDocumentCollection
from pb_cached.config import Config, WriteSettings, checked_config, find_address
from pb_cached.connection import Connection, connection_to
from pb_cached.errors import (
    CollectionExists,
    CollectionNotFound,
    ConfigError,
    NotCommitted,
    PBCachedError,
    named,
)
from pb_cached.migrations import Failures, Migration
from pb_cached.pocketbase.codec import RecordCodec
from pb_cached.pocketbase.commit import CommitPath
from pb_cached.pocketbase.schema import CollectionSpec, document_collection
from pb_cached.stats import Stats
from pb_cached.telemetry import Log, log_through
from pb_cached.writes import Committer, log_of, shared_log, summary
from pb_cached.writes.closing import Closing
from pb_cached.writes.logs import FAILURES

DEFAULT_PREFIX: Final = "parlant"


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
        if not isinstance(collection_prefix, str | None):
            raise ConfigError(f"collection_prefix: expected a string, not {type(collection_prefix).__name__}")
        self._prefix = collection_prefix or DEFAULT_PREFIX
        self._http = http_client
        self._log = log_through(logger, self._config.logging)
        self._flushed_first: list[Callable[[], Awaitable[None]]] = []
        self.closing = Closing(self._config.writes.close_timeout)
        """Shared by all that are closed together with this database."""
        self._entered = False
        self._exit_stack = AsyncExitStack()
        self._connection: Connection | None = None
        self._committers: dict[str, Committer] = {}
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
                shared = shared_log(self._prefix)
                self._committers = {shared: await connection.committer(shared)}
                self._exit_stack = stack.pop_all()
        except BaseException:
            self._entered = False
            raise
        self._connection = connection
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit what was called before, then let go of the connection.

        Raises:
            NotCommitted: writes were left when `close_timeout` had passed.
        """
        left: str | None = None
        is_last = self._connection is not None and self._connection.users() == 1
        try:
            async with asyncio.timeout(self.closing.left()):
                await self._flush_stores()
                for collection in self._collections.values():
                    collection.close()
                await self._flush()
        except TimeoutError:
            left = self._left()
        finally:
            await self._close()
        if left is not None:
            raise NotCommitted(
                f"closing took longer than {self.closing.timeout:g} s: {left}. "
                + (
                    "What of them was not sent is not written"
                    if is_last
                    else "They may yet be committed, as other databases keep the connection open"
                )
            )
        self.closing.over()

    def _left(self) -> str:
        """The writes that are not decided."""
        queued = sum(committer.undecided for committer in self._committers.values())
        called = {name: collection.undecided for name, collection in self._collections.items()}
        count = max(queued, sum(called.values()))  # those of callers who have left are queued at most
        names = named([name for name, undecided in called.items() if undecided])
        return f"{count} writes are still on their way" + (f" (to {names})" if names else "")

    async def _close(self) -> None:
        self._flushed_first.clear()
        for collection in self._collections.values():
            collection.close()
        self._collections.clear()
        connection, self._connection = self._connection, None
        if connection and connection.users() == 1:
            self._warn_of_settings_without_effect(connection.opened)
            connection.close_within = self.closing.left()  # and it accounts for what is left
        self._committers.clear()
        try:
            await self._exit_stack.aclose()
        finally:
            self._entered = False

    def _warn_of_settings_without_effect(self, opened: Collection[str]) -> None:
        """Those for collections that no database of the connection has opened. Any name may still come while it is
        open, and Parlant's may belong to a store that this process does not have."""
        for key, names in (("cache.warm", self._config.cache.warm), ("collections", self._config.collections)):
            unknown = [name for name in names if name not in opened and name not in PARLANT]
            if unknown:
                self._log.warning(
                    "settings had no effect: no such collection was opened", key=key, collections=named(unknown)
                )

    @property
    def log(self) -> Log:
        return self._log

    @property
    def writes(self) -> WriteSettings:
        """How writes are committed, and how long they may take."""
        return self._config.writes

    def stats(self) -> Stats:
        """What the cache holds and has done, over all and by collection, and what was committed. Costs next to
        nothing."""
        connection = self._opened()
        collections = {name: collection.stats() for name, collection in self._collections.items()}
        committers = list(self._committers.values())
        return Stats(
            cache_bytes=connection.memory.bytes,
            cache_max_bytes=connection.memory.max_bytes if self._config.caches else 0,
            collections={name: stats for name, stats in collections.items() if stats is not None},
            writes=summary(
                committers[0].path.name,
                sum(committer.undecided for committer in committers),
                sum(committer.queued_bytes for committer in committers),
                [committer.counters for committer in committers],
            ),
            coherence=connection.follower.stats() if connection.follower else None,
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
        """Return when every write called so far is decided: also those that wait for their turn, in a store or
        behind another of the same record, or for room in the queue."""
        self._opened()
        await self._flush_stores()
        await self._flush()

    async def _flush(self) -> None:
        await asyncio.gather(*(collection.flush() for collection in self._collections.values()))
        await asyncio.gather(*(committer.flush() for committer in self._committers.values()))

    def flush_first(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Have `flush`, and closing, wait for this before anything else: a store has writes that are not submitted
        yet."""
        self._flushed_first.append(flush)

    async def _flush_stores(self) -> None:
        await asyncio.gather(*(flush() for flush in self._flushed_first))

    async def create_collection(self, name: str, schema: type[TDocument]) -> DocumentCollection[TDocument]:
        """Create a collection.

        Raises:
            CollectionExists: there is one of this name.
            ForeignCollection: the name belongs to a collection that is not ours.
        """
        async with self._opening:
            connection = self._opened()
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
            connection = self._opened()
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
            connection = self._opened()
            spec = document_collection(self._prefix, name, BaseDocument)
            if not await connection.schema.exists(spec):
                self._forget(name, spec)
                raise CollectionNotFound(f"collection '{name}' (PocketBase: '{spec.name}') does not exist")
            _, committer = await self._committer(name)
            await committer.flush()
            await committer.path.leave(spec.name)
            await connection.schema.drop(spec)
            self._forget(name, spec)

    def _forget(self, name: str, spec: CollectionSpec) -> None:
        """Keep nothing of a collection that is not there, whoever deleted it."""
        self._opened().forget(spec.name)
        self._collections.pop(name, None)

    def _opened(self) -> Connection:
        if self._connection is None:
            raise PBCachedError("the database is not open: use it inside `async with`")
        return self._connection

    async def _committer(self, name: str) -> tuple[str, Committer]:
        """The log that a collection's commits go to, and its committer."""
        connection = self._opened()
        log = log_of(self._prefix, name, self._config.collections)
        if log not in self._committers:
            self._committers[log] = await connection.committer(log)
        return log, self._committers[log]

    async def _open(
        self,
        name: str,
        spec: CollectionSpec,
        schema: type[TDocument],
        loader: Callable[[BaseDocument], Awaitable[TDocument | None]] | None = None,
    ) -> PocketBaseDocumentCollection[TDocument]:
        connection = self._opened()
        log, committer = await self._committer(name)
        fields = ["id", *(column.field for column in spec.columns)]
        rule = rule_for(name, fields, self._config.collections.get(name))
        if indexed := indexed_fields(rule):
            spec = spec.indexed_by(indexed)
        collection: PocketBaseDocumentCollection[TDocument] = PocketBaseDocumentCollection(
            spec,
            await self._codec(spec, log, committer.path, rule),
            connection,
            committer,
            self._caching(rule, log, committer),
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
        connection.opened.add(name)
        if name in self._config.cache.warm:
            collection.warm_in_background()
        return collection

    def _caching(self, rule: Rule, log: str, committer: Committer) -> Caching:
        """How a collection is cached, if it is. From now on its log is followed, if it must be."""
        connection = self._opened()
        if not self._config.caches or self._config.mode != "realtime":
            return Caching(rule, self._config.caches)
        if not connection.can_follow(committer):
            return Caching(rule, False)
        home = shared_log(self._prefix)
        connection.follow_log(self._committers[home], home, home)
        connection.follow_log(committer, log, home)
        return Caching(rule, True, log)

    async def _codec(self, spec: CollectionSpec, log: str, path: CommitPath, rule: Rule = OTHER) -> RecordCodec:
        connection = self._opened()
        layout = await connection.schema.ensure(spec)
        form = await connection.form(path, log, spec.name, layout, rule)
        most = min(self._config.writes.max_document_bytes, path.max_bytes)
        return RecordCodec(spec.name, layout, most, form)

    async def _failures(self, name: str) -> Failures:
        name += FAILURES
        spec = document_collection(self._prefix, name, BaseDocument)
        log, committer = await self._committer(name)
        return Failures(spec.name, await self._codec(spec, log, committer.path))
