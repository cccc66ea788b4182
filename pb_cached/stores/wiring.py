"""`open_stores`: everything that a Parlant server needs, opened in order and closed in reverse.

One database per store, as each store opens a collection called `metadata`. All of them share one connection.
"""

# The container's keys are Parlant's abstract classes.
# mypy: disable-error-code="type-abstract"

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
from msgspec import Struct
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.agents import AgentStore
from parlant.core.context_variables import ContextVariableStore
from parlant.core.customers import CustomerStore
from parlant.core.emission.event_publisher import EventPublisherFactory
from parlant.core.emissions import EventEmitterFactory
from parlant.core.loggers import Logger
from parlant.core.nlp.service import NLPService
from parlant.core.persistence.common import MigrationRequired
from parlant.core.sessions import SessionListener, SessionStore
from parlant.core.tracer import Tracer

from pb_cached.cache.rules import PARLANT
from pb_cached.config import (
    CONFIG_VARIABLE,
    Config,
    PocketBaseSettings,
    checked_config,
    environment_is_silent,
    exclusive,
    find_url,
    near,
)
from pb_cached.database import PocketBaseDocumentDatabase
from pb_cached.errors import ConfigError, EmbeddedServerError
from pb_cached.pocketbase.server import PocketBaseServer
from pb_cached.stats import Stats
from pb_cached.stores.customers import PocketBaseCustomerStore
from pb_cached.stores.listener import PocketBaseSessionListener
from pb_cached.stores.sessions import PocketBaseSessionStore
from pb_cached.stores.variables import PocketBaseContextVariableStore
from pb_cached.telemetry import log_through

if TYPE_CHECKING:
    from lagom import Container


Configure = Callable[["Container"], Awaitable["Container"]]
"""What `p.Server` takes as `configure_container`."""


class StoresStats(Struct, frozen=True, kw_only=True):
    """What the caches of the three stores hold and have done. All three tell the same `cache_bytes`: they share
    one memory."""

    sessions: Stats
    """With the events."""
    customers: Stats
    variables: Stats
    """With their values."""


class Stores:
    """The open stores, and how to hand them to `p.Server`."""

    def __init__(
        self,
        session_store: PocketBaseSessionStore,
        customer_store: PocketBaseCustomerStore,
        variable_store: PocketBaseContextVariableStore,
        databases: Sequence[PocketBaseDocumentDatabase],
        stack: AsyncExitStack,
    ) -> None:
        """
        Args:
            databases: the three stores', in the same order.
        """
        self.session_store = session_store
        self.customer_store = customer_store
        self.variable_store = variable_store
        self.session_listener = PocketBaseSessionListener(session_store)
        self._databases = databases
        self._stack = stack

    def stats(self) -> StoresStats:
        """The caches' counters, store by store and collection by collection. Costs next to nothing; without a
        cache, there are no collections in it.

        Raises:
            PBCachedError: the stores are closed.
        """
        sessions, customers, variables = (database.stats() for database in self._databases)
        return StoresStats(sessions=sessions, customers=customers, variables=variables)

    def server_args(self, configure_container: Configure | None = None) -> dict[str, Any]:
        """The arguments that make `p.Server(**stores.server_args())` keep its conversations here.

        Args:
            configure_container: what you would give to `p.Server`. It is called when ours is done, and may change
                anything of it.
        """

        async def configure(container: Container) -> Container:
            container = await self._configure_listener(container)
            # What a container defines it defines once; but a clone of it may define it anew.
            return container if configure_container is None else await configure_container(container.clone())

        return {
            "session_store": self.session_store,
            "customer_store": self.customer_store,
            "variable_store": self.variable_store,
            "configure_container": configure,
        }

    async def _configure_listener(self, container: Container) -> Container:
        container[SessionListener] = self.session_listener
        return container

    async def configure_container(self, container: Container) -> Container:
        """The older wiring, `p.Server(configure_container=stores.configure_container)`: rebinds whatever holds the
        stores that Parlant made before.

        The service registry holds the emitter of the old session store, by which tools emit events, and is
        replaced by one that holds ours. That must be done before tool services are registered in it.
        """
        # Imports for more than a second, which nobody else should wait for.
        from parlant.core.services.tools.service_registry import ServiceDocumentRegistry, ServiceRegistry

        container[SessionStore] = self.session_store
        container[CustomerStore] = self.customer_store
        container[ContextVariableStore] = self.variable_store
        container[EventEmitterFactory] = EventPublisherFactory(container[AgentStore], self.session_store)
        container[ServiceRegistry] = await self._stack.enter_async_context(
            ServiceDocumentRegistry(
                database=TransientDocumentDatabase(),
                event_emitter_factory=container[EventEmitterFactory],
                logger=container[Logger],
                tracer=container[Tracer],
                nlp_services_provider=lambda: {"__nlp__": container[NLPService]},
                allow_migration=False,
            )
        )
        return await self._configure_listener(container)


@asynccontextmanager
async def open_stores(
    config: Config | str | os.PathLike[str] | None = None,
    *,
    logger: Any = None,
    connection_params: Mapping[str, Any] | None = None,
    http_client: httpx.AsyncClient | None = None,
) -> AsyncIterator[Stores]:
    """Open the three stores that Parlant persists conversations in.

    With no URL configured anywhere and no `POCKETBASE_*` variable set, an embedded PocketBase is started, and its
    data lies in `data_dir` of `[pocketbase]`.

    Args:
        config: a `Config`, a TOML file, or None for the file that `PB_CACHED_CONFIG` names, or the defaults.
        logger: Parlant's, structlog's or the standard library's; None for our own.
        connection_params: as for `PocketBaseDocumentDatabase`.
        http_client: used as it is, and never closed.

    Raises:
        ConfigError: the configuration cannot be used.
        MigrationRequired: (Parlant's) the data is an older version's, and `migrate` under `[stores]` is off.
        ServerOutdated: (Parlant's) the data is a newer version's.
        PBCachedError: PocketBase cannot be used.
    """
    settings = checked_config(config) if isinstance(config, Config) else Config.load(config)
    _refuse_unknown_collections(
        settings, "Config" if isinstance(config, Config) else str(config or os.environ.get(CONFIG_VARIABLE))
    )
    log = log_through(logger, settings.logging)
    async with AsyncExitStack() as stack:
        if find_url(settings, connection_params) is None and connection_params is None and environment_is_silent():
            _refuse_credentials_without_url(settings.pocketbase)
            try:
                server = await stack.enter_async_context(PocketBaseServer(settings.pocketbase.data_dir, log=log))
            except EmbeddedServerError as error:
                raise ConfigError(
                    "no PocketBase URL is configured (POCKETBASE_URL, or url under [pocketbase]), "
                    f"and the embedded PocketBase cannot be used: {error}"
                ) from error
            connection_params = server.connection_params
            if settings.coherence.mode is None:  # nobody else knows where it is
                settings = exclusive(settings)

        async def database(prefix: str) -> PocketBaseDocumentDatabase:
            return await stack.enter_async_context(
                PocketBaseDocumentDatabase(
                    logger if logger is not None else log,
                    connection_params,
                    collection_prefix=prefix,
                    http_client=http_client,
                    config=settings,
                )
            )

        of = settings.stores
        databases = (
            await database(of.session_prefix),
            await database(of.customer_prefix),
            await database(of.variable_prefix),
        )
        for other in databases[1:]:
            other.closing = databases[0].closing  # all of them are closed together
        sessions = PocketBaseSessionStore(databases[0], of.migrate, streaming_interval=of.streaming_interval)
        customers = PocketBaseCustomerStore(databases[1], of.migrate, ids=of.customer_ids)
        variables = PocketBaseContextVariableStore(databases[2], of.migrate)
        for store in (sessions, customers, variables):
            try:
                await stack.enter_async_context(store)
            except MigrationRequired as error:
                raise MigrationRequired(
                    f"{error} An older Parlant wrote its data: set `migrate = true` under [stores] to have it "
                    "brought up to date. Servers with the older Parlant cannot open it afterwards"
                ) from error
        yield Stores(sessions, customers, variables, databases, stack)


def _refuse_unknown_collections(settings: Config, source: str) -> None:
    """Settings for collections that none of the stores has, and would so have no effect."""
    named_by = [("cache.warm", name) for name in settings.cache.warm]
    named_by += [(f"collections.{name}", name) for name in settings.collections]
    known = tuple(PARLANT)
    for key, name in named_by:
        if name not in known:
            raise ConfigError(
                f"{source}: {key}: none of Parlant's three stores has a collection '{name}'{near(name, known)}; "
                f"expected some of {', '.join(known)}"
            )


def _refuse_credentials_without_url(settings: PocketBaseSettings) -> None:
    """They are for a PocketBase that is not named: an embedded one in its place would be empty."""
    for key in ("admin_email", "admin_password_file", "admin_token_file"):
        if getattr(settings, key) is not None:
            raise ConfigError(
                f"pocketbase.{key} is set, but no url: set url under [pocketbase], or POCKETBASE_URL; or remove "
                f"{key} to have an embedded PocketBase"
            )
