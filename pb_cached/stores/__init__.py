"""Parlant's side: its three stores over our databases, and the wiring into `p.Server`."""

from pb_cached.stores.customers import PocketBaseCustomerStore
from pb_cached.stores.listener import PocketBaseSessionListener
from pb_cached.stores.sessions import PocketBaseSessionStore
from pb_cached.stores.variables import PocketBaseContextVariableStore
from pb_cached.stores.wiring import Stores, StoresStats, open_stores

__all__ = [
    "PocketBaseContextVariableStore",
    "PocketBaseCustomerStore",
    "PocketBaseSessionListener",
    "PocketBaseSessionStore",
    "Stores",
    "StoresStats",
    "open_stores",
]
