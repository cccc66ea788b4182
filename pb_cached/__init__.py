"""pb_cached: a caching write-through persistence layer for Parlant on PocketBase."""

from pb_cached.config import Config
from pb_cached.database import PocketBaseDocumentDatabase
from pb_cached.pocketbase.server import PocketBaseServer
from pb_cached.stores import open_stores

__all__ = ["Config", "PocketBaseDocumentDatabase", "PocketBaseServer", "open_stores"]
