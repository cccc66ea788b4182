"""This library, on an embedded PocketBase."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import msgspec
import psutil

from bench.peers import Peer
from bench.peers.contents import Contents, StockStores, add_variables, check, parts
from bench.peers.embedded import QUIET, pocketbase
from bench.peers.filling import fill
from pb_cached import Config, open_stores
from pb_cached.config import CoherenceSettings, PocketBaseSettings
from pb_cached.stores import Stores

Mode = Literal["realtime", "exclusive", "off"]
Commit = Literal["log", "batch"]


@dataclass(frozen=True, kw_only=True)
class OurPeer(Peer):
    """With what is our own."""

    stores: Stores
    config: Config
    connection_params: Mapping[str, str]
    """Of its PocketBase, for other servers on it."""


def name_of(mode: Mode, commit: Commit) -> str:
    return f"pb_cached, {commit}, {mode}"


def config_of(mode: Mode, commit: Commit) -> Config:
    return Config(
        pocketbase=PocketBaseSettings(commit=commit),
        coherence=CoherenceSettings(mode=mode),
        logging=QUIET,
    )


@asynccontextmanager
async def ours(size: int | Contents, *, mode: Mode, commit: Commit) -> AsyncIterator[OurPeer]:
    contents, config = Contents.of(size), config_of(mode, commit)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(pocketbase())
        stores = await stack.enter_async_context(open_stores(config, connection_params=server.connection_params))
        known = StockStores(stores.session_store, stores.customer_store, stores.variable_store)
        prefixes = {"sessions": config.stores.session_prefix, "customers": config.stores.customer_prefix}
        for part in parts(contents, known):
            await fill(server.data_dir, f"{prefixes[part.store]}_{part.name}", part)
        await add_variables(known)
        await check(contents, known)
        yield OurPeer(
            name=name_of(mode, commit),
            session_store=stores.session_store,
            customer_store=stores.customer_store,
            variable_store=stores.variable_store,
            session_listener=stores.session_listener,
            servers=[psutil.Process(server.pid)],
            stores=stores,
            config=config,
            connection_params=server.connection_params,
        )


@asynccontextmanager
async def reopened(peer: OurPeer) -> AsyncIterator[Stores]:
    """Stores without a cache on the same PocketBase: they tell what it really holds."""
    config = msgspec.structs.replace(peer.config, coherence=CoherenceSettings(mode="off"))
    async with open_stores(config, connection_params=peer.connection_params) as stores:
        yield stores
