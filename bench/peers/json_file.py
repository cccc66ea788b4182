"""Parlant's JSON files, one for each store: every write writes the whole file anew."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

from parlant.adapters.db.json_file import JSONFileDocumentCollection, JSONFileDocumentDatabase
from parlant.core.loggers import LogLevel, StdoutLogger
from parlant.core.tracer import LocalTracer

from bench.peers import Peer
from bench.peers.contents import Contents, add_variables, check, parts
from bench.peers.stock import STORES, stock_peer, stock_stores

NAME = "Parlant JSON file"


@asynccontextmanager
async def json_file(size: int | Contents) -> AsyncIterator[Peer]:
    contents = Contents.of(size)
    logger = StdoutLogger(LocalTracer(), LogLevel.WARNING)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pb-cached-bench-")))
        databases = {
            store: await stack.enter_async_context(JSONFileDocumentDatabase(logger, folder / f"{store}.json"))
            for store in STORES
        }
        stores = await stack.enter_async_context(stock_stores(databases.__getitem__))
        for part in parts(contents, stores):
            cast(JSONFileDocumentCollection[Any], part.collection).documents.extend(part.documents)
        await add_variables(stores)
        for database in databases.values():
            await database.flush()
        await check(contents, stores)
        yield stock_peer(NAME, stores)
