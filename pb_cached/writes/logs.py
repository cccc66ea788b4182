"""Which log the commits of a collection go to.

A commit compiles every trigger of its log, which takes PocketBase 0.1 ms for each collection of it (facts:
pocketbase, section 13), and a log has one commit under way at a time. So busy collections have logs of their own,
and the quiet ones of a database share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pb_cached.config import CollectionSettings

BUSY: Final = frozenset({"sessions", "events", "values"})
"""Parlant's collections that a conversation writes to."""
FAILURES: Final = "_failed_migrations"
"""What the names of collections end with that hold what could not be migrated. A document goes there in the commit
that takes it from its place, so both have one log."""


def shared_log(prefix: str) -> str:
    """The log of a database's quiet collections."""
    return f"{prefix}_log"


def own_log(prefix: str, name: str) -> str:
    """The log that a collection has if it is a busy one."""
    return f"{prefix}_{name}_log"


def log_of(prefix: str, name: str, settings: Mapping[str, CollectionSettings]) -> str:
    """The log of a collection.

    Args:
        name: as Parlant calls it.
        settings: what the user set for collections.
    """
    of = name.removesuffix(FAILURES)
    set_ = settings[of].log if of in settings else None
    return own_log(prefix, of) if (of in BUSY if set_ is None else set_) else shared_log(prefix)
