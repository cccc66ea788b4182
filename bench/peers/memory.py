"""Parlant's in-memory database, which it uses where nothing else is configured: nothing is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from parlant.adapters.db.transient import TransientDocumentCollection, TransientDocumentDatabase

from bench.peers import Peer
from bench.peers.contents import Contents, add_variables, check, parts
from bench.peers.stock import stock_peer, stock_stores

NAME = "Parlant in memory"


@asynccontextmanager
async def memory(size: int | Contents) -> AsyncIterator[Peer]:
    contents = Contents.of(size)
    async with stock_stores(lambda _: TransientDocumentDatabase()) as stores:
        for part in parts(contents, stores):
            cast(TransientDocumentCollection[Any], part.collection)._documents.extend(part.documents)
        await add_variables(stores)
        await check(contents, stores)
        yield stock_peer(NAME, stores)
