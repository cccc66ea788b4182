"""Parlant's own stores and listener, as they come, over any document databases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from parlant.core.common import IdGenerator
from parlant.core.context_variables import ContextVariableDocumentStore
from parlant.core.customers import CustomerDocumentStore
from parlant.core.persistence.document_database import DocumentDatabase
from parlant.core.sessions import PollingSessionListener, SessionDocumentStore

from bench.peers import Peer
from bench.peers.contents import StockStores

STORES = ("sessions", "customers", "variables")


@asynccontextmanager
async def stock_stores(database: Callable[[str], DocumentDatabase]) -> AsyncIterator[StockStores]:
    """The open stores.

    Args:
        database: makes the one of a store, by its name among `STORES`. Each opens a collection of the same name,
            so each has a database of its own.
    """
    sessions, customers, variables = map(database, STORES)
    async with (
        SessionDocumentStore(sessions) as session_store,
        CustomerDocumentStore(IdGenerator(), customers) as customer_store,
        ContextVariableDocumentStore(IdGenerator(), variables) as variable_store,
    ):
        yield StockStores(session_store, customer_store, variable_store)


def stock_peer(name: str, stores: StockStores) -> Peer:
    """A peer whose waits poll, as Parlant's do."""
    return Peer(name, stores.sessions, stores.customers, stores.variables, PollingSessionListener(stores.sessions))
