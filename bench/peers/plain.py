"""A plain PocketBase adapter under Parlant's own stores: what one has who writes it straight away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Final

import httpx
import psutil

from bench.peers import Peer
from bench.peers.contents import Contents, add_variables, check, parts
from bench.peers.embedded import pocketbase
from bench.peers.filling import fill
from bench.peers.plain_database import PlainDatabase
from bench.peers.stock import STORES, stock_peer, stock_stores
from pb_cached import PocketBaseServer

NAME: Final = "plain PocketBase adapter"
REQUEST_SECONDS: Final = 30.0


@asynccontextmanager
async def plain(size: int | Contents) -> AsyncIterator[Peer]:
    contents = Contents.of(size)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(pocketbase())
        http = await stack.enter_async_context(connected(server))
        databases = {store: PlainDatabase(http, store) for store in STORES}
        stores = await stack.enter_async_context(stock_stores(databases.__getitem__))
        for part in parts(contents, stores):
            await fill(server.data_dir, f"{part.store}_{part.name}", part)
        await add_variables(stores)
        await check(contents, stores)
        yield replace(stock_peer(NAME, stores), servers=[psutil.Process(server.pid)])


def connected(server: PocketBaseServer) -> httpx.AsyncClient:
    """Signed in as its superuser; connections are kept alive, and as many as httpx allows by default."""
    return httpx.AsyncClient(
        base_url=server.url,
        headers={"Authorization": server.connection_params["admin_token"]},
        timeout=REQUEST_SECONDS,
        trust_env=False,
    )
