"""A server process, with the stores of this library or of the plain adapter. `Server` is such a process, as who
started it has it.

    POCKETBASE_ADMIN_TOKEN=... python -m bench.processes.server ours http://127.0.0.1:8090
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import NoneType
from typing import Literal, Protocol, Self, cast

from msgspec import Struct
from parlant.core.context_variables import ContextVariableStore
from parlant.core.customers import CustomerStore
from parlant.core.sessions import SessionId, SessionStore

from bench.processes.child import TOKEN, Child, carry_out, child
from bench.processes.traffic import Customer

Whose = Literal["ours", "plain"]


# --- orders and answers ------------------------------------------------------------------------------------------


class Open(Struct, frozen=True, tag=True):
    """Open the stores."""

    settles: bool
    """Answer when commits of other servers are followed."""


class Read(Struct, frozen=True, tag=True):
    """Read what a turn of this session begins with. The answer tells the events of it."""

    session: SessionId


class Talk(Struct, frozen=True, tag=True):
    """Have customers talk for so many seconds."""

    customers: tuple[str, ...]
    """Their names, which no others have had."""
    seconds: float


class Close(Struct, frozen=True, tag=True):
    """Close the stores."""


Order = Open | Read | Talk | Close


class Talked(Struct, frozen=True):
    """What came of it."""

    seconds: float
    """From the first operation until the last one had ended."""
    cpu: float
    """Seconds."""
    waits: list[float]
    """Seconds that each operation took."""
    events: dict[SessionId, int]
    """Written, by the session."""


# --- the process -------------------------------------------------------------------------------------------------


class OpenStores(Protocol):
    """What a server has of any peer."""

    @property
    def session_store(self) -> SessionStore: ...
    @property
    def customer_store(self) -> CustomerStore: ...
    @property
    def variable_store(self) -> ContextVariableStore: ...


class Opening(Protocol):
    """Opens the stores that are at a URL."""

    def __call__(self, url: str, *, settles: bool) -> AbstractAsyncContextManager[OpenStores]: ...


def _ours() -> Opening:
    """Imports what it takes, which nobody else should wait for."""
    from pb_cached import Config, open_stores
    from pb_cached.config import CoherenceSettings, LoggingSettings, PocketBaseSettings

    config = Config(
        coherence=CoherenceSettings(mode="realtime"),
        pocketbase=PocketBaseSettings(commit="log"),
        logging=LoggingSettings(level="warning"),
    )

    @asynccontextmanager
    async def opened(url: str, *, settles: bool) -> AsyncIterator[OpenStores]:
        async with open_stores(config, connection_params={"url": url}) as stores:
            if settles:
                follower = stores.session_store._events._connection.follower
                assert follower is not None
                await asyncio.gather(*map(follower.caught_up, follower._logs))
            yield stores

    return opened


def _plain() -> Opening:
    """The same."""
    import httpx

    from bench.peers.plain_database import PlainDatabase
    from bench.peers.stock import stock_stores

    @asynccontextmanager
    async def opened(url: str, *, settles: bool) -> AsyncIterator[OpenStores]:
        headers = {"Authorization": os.environ[TOKEN]}
        async with (
            httpx.AsyncClient(base_url=url, headers=headers, timeout=30.0, trust_env=False) as http,
            stock_stores(lambda store: PlainDatabase(http, store)) as stores,
        ):
            yield _Stock(stores.sessions, stores.customers, stores.variables)

    return opened


@dataclass(frozen=True)
class _Stock:
    session_store: SessionStore
    customer_store: CustomerStore
    variable_store: ContextVariableStore


async def serve(whose: Whose, url: str) -> None:
    """Carry out orders until there are no more."""
    opening = _ours() if whose == "ours" else _plain()
    async with AsyncExitStack() as stack:
        stores: OpenStores | None = None

        async def do(order: Order) -> object:
            nonlocal stores
            if isinstance(order, Open):
                stores = await stack.enter_async_context(opening(url, settles=order.settles))
                return None
            if isinstance(order, Close):
                await stack.aclose()
                return None
            assert stores is not None, "the stores are opened first"
            return await _carry_out(order, stores)

        await carry_out(Order, do)  # type: ignore[arg-type]


async def _carry_out(order: Read | Talk, stores: OpenStores) -> object:
    if isinstance(order, Read):
        return await first_reads(stores, order.session)
    waits: list[float] = []
    events: dict[SessionId, int] = {}
    begun, used = time.perf_counter(), time.process_time()

    async def talk(name: str) -> None:
        customer = Customer(stores.session_store, name, waits, events)
        while time.perf_counter() - begun < order.seconds:
            await customer.act()

    await asyncio.gather(*map(talk, order.customers))
    return Talked(time.perf_counter() - begun, time.process_time() - used, waits, events)


async def first_reads(stores: OpenStores, session_id: SessionId) -> int:
    """Read what a turn begins with: the session, its history, and what is known of its customer."""
    session = await stores.session_store.read_session(session_id)
    events = await stores.session_store.list_events(session_id)
    customer = await stores.customer_store.read_customer(session.customer_id)
    for variable in await stores.variable_store.list_variables():
        for key in (customer.id, *(f"tag:{tag}" for tag in customer.tags)):
            await stores.variable_store.read_value(variable.id, key)
    return len(events)


# --- who started it ----------------------------------------------------------------------------------------------


class Server:
    """Such a process."""

    def __init__(self, started: Child) -> None:
        self._child = started
        self.process = started.process

    @classmethod
    @asynccontextmanager
    async def start(cls, whose: Whose, url: str, token: str) -> AsyncIterator[Self]:
        """One that has imported what it needs. It has ended when the context ends."""
        async with child("bench.processes.server", whose, url, token=token) as started:
            yield cls(started)

    async def open(self, *, settles: bool) -> None:
        await self._child.ask(Open(settles), NoneType)

    async def read(self, session: SessionId) -> int:
        return await self._child.ask(Read(session), int)

    async def talk(self, customers: Sequence[str], seconds: float) -> Talked:
        return await self._child.ask(Talk(tuple(customers), seconds), Talked)

    async def close(self) -> None:
        await self._child.ask(Close(), NoneType)


if __name__ == "__main__":
    asyncio.run(serve(cast(Whose, sys.argv[1]), sys.argv[2]))
