"""Parlant's MongoDB adapter, on a MongoDB that is there: in databases of our own, dropped before and after."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

from parlant.core.loggers import LogLevel, StdoutLogger
from parlant.core.tracer import LocalTracer

from bench.peers import Peer
from bench.peers.contents import Contents, Document, add_variables, check, parts
from bench.peers.stock import STORES, stock_peer, stock_stores

if TYPE_CHECKING:
    from parlant.adapters.db.mongo_db import MongoDocumentCollection

NAME: Final = "Parlant MongoDB"
_AT_ONCE: Final = 10_000


@asynccontextmanager
async def mongodb(url: str, size: int | Contents) -> AsyncIterator[Peer]:
    """
    Args:
        url: such as `mongodb://127.0.0.1:27017`. Its processes are not looked for: `servers` is empty.

    Raises:
        ImportError: pymongo is not installed.
    """
    from parlant.adapters.db.mongo_db import MongoDocumentDatabase

    contents = Contents.of(size)
    logger = StdoutLogger(LocalTracer(), LogLevel.WARNING)
    async with AsyncExitStack() as stack:
        client: Any = await stack.enter_async_context(import_module("pymongo").AsyncMongoClient(url))
        databases = {}
        for store in STORES:
            name = f"pb_cached_bench_{store}"
            await client.drop_database(name)
            stack.push_async_callback(client.drop_database, name)
            databases[store] = await stack.enter_async_context(MongoDocumentDatabase(client, name, logger))
        stores = await stack.enter_async_context(stock_stores(databases.__getitem__))
        for part in parts(contents, stores):
            inner = cast("MongoDocumentCollection[Any]", part.collection)._collection
            for documents in _batches(part.documents):
                await inner.insert_many(documents)
        await add_variables(stores)
        await check(contents, stores)
        yield stock_peer(NAME, stores)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, _AT_ONCE)):
        yield batch
