"""What all databases of one event loop share per PocketBase: the HTTP client, the sign-in, the dialect, one
committer for each log, and the cache.

A connection opens with its first database and closes with its last.
"""

from __future__ import annotations

import asyncio
import secrets
import weakref
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Final

import httpx
import msgspec

from pb_cached.cache.collection import Rule
from pb_cached.cache.memory import Memory
from pb_cached.coherence import Follower
from pb_cached.config import Address, Config
from pb_cached.errors import ConfigError
from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.codec import all_columns
from pb_cached.pocketbase.commit import BatchPath, CommitPath, Installation, LogPath, SinglePath
from pb_cached.pocketbase.commit.installation import drop_orphans
from pb_cached.pocketbase.dialect import Dialect, probe
from pb_cached.pocketbase.forms import ArrayForm, Form, RecordForm, commit_layout
from pb_cached.pocketbase.http import Http, own_client
from pb_cached.pocketbase.schema import Layout, SchemaEditor, log_collection
from pb_cached.reading import CachedReads
from pb_cached.telemetry import Log
from pb_cached.writes import Committer


class Connection:
    """One PocketBase, as one event loop sees it.

    Mutable state: `_committers`, one per log, each made by the first who asks for it; `_caches`, one per
    collection and schema (by another schema its documents are others), likewise; `opened`, the collections that
    were, as Parlant calls them.
    """

    def __init__(
        self, client: PocketBaseClient, dialect: Dialect, config: Config, log: Log, users: Callable[[], int]
    ) -> None:
        """
        Args:
            users: counts the databases that it is open for.
        """
        self.users = users
        self.close_within: float | None = None
        """Seconds that closing may still take; None for `close_timeout`."""
        self.opened: set[str] = set()
        self.client = client
        self.dialect = dialect
        self.schema = SchemaEditor(client, dialect, log)
        self.memory = Memory(config.cache.max_bytes)
        self._config = config
        self._log = log
        self._server = secrets.token_hex(6)
        self._has_told = False
        self._committers: dict[str, asyncio.Task[Committer]] = {}
        self.follower = (
            Follower(client, self._server, config.coherence, dialect.sql, log)
            if config.mode == "realtime" and config.caches
            else None
        )
        self._caches: dict[tuple[str, Layout], CachedReads] = {}

    async def committer(self, log: str) -> Committer:
        """The committer of a log, which is there when this returns, also where it was deleted since the committer
        was made."""
        making = self._committers.get(log)
        if making is not None and not _has_failed(making):
            committer = await asyncio.shield(making)
            await committer.path.prepare()
            return committer
        making = self._committers[log] = asyncio.create_task(self._new_committer(log))
        return await asyncio.shield(making)

    async def form(self, path: CommitPath, log: str, collection: str, layout: Layout, rule: Rule) -> Form:
        """How operations on a collection are written; commits can hold them when this returns.

        Args:
            rule: tells what numbers its documents.

        Raises:
            SchemaError: the triggers that commits go by cannot be installed.
        """
        if not isinstance(path, LogPath):
            return RecordForm()
        order = commit_layout(log, collection, all_columns(layout), rule.sequence, rule.partition_by)
        await path.use(order)
        return ArrayForm(order)

    async def _new_committer(self, log: str) -> Committer:
        path = await self._path(log)
        await path.prepare()
        tell = self._log.info if len(self._committers) == 1 else self._log.debug  # once is enough
        tell("commit path chosen", log=log, path=path.name)
        committer = Committer(path, self._config.writes, self._log)
        committer.trim_in_background()
        return committer

    async def _path(self, log: str) -> CommitPath:
        """The path that this installation commits by. Where triggers are, no other may be taken."""
        if self.dialect.family == "0.22":
            return SinglePath(self.client)
        sql = self.dialect.sql
        installation = Installation(self.client, self.schema, log, sql, self._log)
        is_there = await installation.is_there()
        wanted = "batch" if self._config.pocketbase.native_events else self._config.pocketbase.commit
        if wanted == "batch" and is_there:
            raise ConfigError(
                f"the log '{log}' at {self.client.url} has the log path's triggers: `pb-cached init --uninstall` "
                'takes them away, when no server is at work; or set commit = "auto" and native_events = false '
                "under [pocketbase]"
            )
        if wanted == "log" and not (is_there or sql):
            raise ConfigError(
                'pocketbase.commit = "log" needs the SQL endpoint of PocketBase 0.39 or later, which '
                f'{self.client.url} does not have, or not for us; set "auto" or "batch"'
            )
        if is_there and not sql:
            self._log.warning("without the SQL endpoint, triggers can be neither verified nor mended", log=log)
        if is_there or (wanted != "batch" and sql):
            return LogPath(self.client, self.dialect, log, self._server, installation)
        if self.dialect.batch is not None:
            return BatchPath(self.client, self.dialect, self.schema, log_collection(log), self._server)
        return SinglePath(self.client)

    def can_follow(self, committer: Committer) -> bool:
        """Can others' commits to this log be followed? It takes a log. Where there is none, that is said, once."""
        can = isinstance(committer.path, LogPath | BatchPath)
        if not (can or self._has_told):
            self._has_told = True
            self._log.warning(
                "every read asks PocketBase: others' writes cannot be followed where commits have no log; where "
                'nobody else writes, `mode = "exclusive"` under [coherence] has reads come from memory',
                path=committer.path.name,
            )
        return can

    def follow_log(self, committer: Committer, log: str, home: str) -> None:
        """Follow what others commit to this log, from the moment that it is subscribed on."""
        path = committer.path
        assert self.follower is not None and isinstance(path, LogPath | BatchPath)
        self.follower.follow_log(
            log,
            home,
            path.lanes,
            self._config.writes.log_retention,
            committer.trim_in_background,
            path.repair if isinstance(path, LogPath) else None,
        )

    def cached(self, collection: str, layout: Layout, make: Callable[[], CachedReads]) -> CachedReads:
        """The cached reads of a collection, made by the first database that asks for them."""
        if (collection, layout) not in self._caches:
            self._caches[collection, layout] = make()
        return self._caches[collection, layout]

    def forget(self, collection: str) -> None:
        """Keep nothing of a collection that was deleted."""
        for (name, _), reads in self._caches.items():
            if name == collection:
                reads.cache.clear()

    async def close(self) -> None:
        """Drain all committers. Raises what the first of them raises, after all have been tried."""
        if self.follower is not None:
            await self.follower.aclose()
        for reads in self._caches.values():
            await reads.loader.close()
        making = list(self._committers.values())
        for task in making:
            task.cancel()  # those that are ready stay so; whoever waited for the others has left
        await asyncio.gather(*making, return_exceptions=True)
        ready = [task.result() for task in making if not _has_failed(task)]
        outcomes = await asyncio.gather(
            *(committer.close(self.close_within) for committer in ready), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome


class _Shared:
    """A connection and how many databases use it."""

    def __init__(self) -> None:
        self.users = 0
        self.opening = asyncio.Lock()
        self.connection: Connection | None = None
        self.own_http: Http | None = None


_shared: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, _Shared]]] = (
    weakref.WeakKeyDictionary()
)


@asynccontextmanager
async def connection_to(
    address: Address, config: Config, http: httpx.AsyncClient | None, log: Log
) -> AsyncIterator[Connection]:
    """The connection to a PocketBase, shared by all who use the same address, settings and HTTP client.

    Args:
        http: used as it is, and never closed. Without one, the connection has its own.

    Raises:
        PocketBaseUnavailable, AuthenticationFailed, RequestRejected: it cannot be opened.
    """
    connections = _shared.setdefault(asyncio.get_running_loop(), {})
    settings = msgspec.json.encode(
        (config.pocketbase, config.writes, config.cache, config.collections, config.coherence)
    )
    key = (address, settings, id(http) if http else None)
    shared = connections.setdefault(key, _Shared())
    shared.users += 1
    try:
        # One opens, the others wait. One who is cancelled or fails leaves it to the next.
        async with shared.opening:
            if shared.connection is None:
                if http is None and shared.own_http is None:
                    shared.own_http = own_client(config.pocketbase, address.url)
                shared.connection = await _open(
                    address, config, http or shared.own_http, log, lambda: shared.users
                )
        yield shared.connection
    finally:
        shared.users -= 1
        if shared.users == 0:
            del connections[key]
            try:
                if shared.connection is not None:
                    await shared.connection.close()
            finally:
                if shared.own_http is not None:
                    await shared.own_http.aclose()


async def _open(
    address: Address, config: Config, http: Http | None, log: Log, users: Callable[[], int]
) -> Connection:
    assert http is not None
    client = PocketBaseClient(http, address, config.pocketbase, log)
    dialect = await probe(
        client,
        max_requests=config.writes.max_commit_records + 2,  # the log's record, and a write of two operations
        manage=config.pocketbase.manage_settings,
        log=log,
    )
    if dialect.sql:
        await drop_orphans(client, log)
    log.debug("connected", url=address.url, **msgspec.structs.asdict(dialect))
    connection = Connection(client, dialect, config, log, users)
    if connection.follower is not None:
        await connection.follower.start()
    return connection


def _has_failed(task: asyncio.Task[Committer]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
