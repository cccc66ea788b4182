"""pb_cached: a caching write-through persistence layer for Parlant on PocketBase.

What is named here is imported when it is first asked for: the command line starts, and can be interrupted, without
waiting for Parlant's modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pb_cached.config import Config
    from pb_cached.database import PocketBaseDocumentDatabase
    from pb_cached.pocketbase.server import PocketBaseServer
    from pb_cached.stores import open_stores

__all__ = ["Config", "PocketBaseDocumentDatabase", "PocketBaseServer", "open_stores"]

_HOMES = {
    "Config": "pb_cached.config",
    "PocketBaseDocumentDatabase": "pb_cached.database",
    "PocketBaseServer": "pb_cached.pocketbase.server",
    "open_stores": "pb_cached.stores",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_HOMES[name]), name)
    return found
