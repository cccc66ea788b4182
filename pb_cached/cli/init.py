"""`pb-cached init`: what the first start of a server does to PocketBase, and the way back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from parlant.core.persistence.common import MigrationRequired, ServerOutdated
from rich.console import Console

from pb_cached.cache.rules import PARLANT
from pb_cached.config import CoherenceSettings, Config, find_address
from pb_cached.connection import connection_to
from pb_cached.errors import PBCachedError
from pb_cached.pocketbase.commit.installation import uninstall as take_away
from pb_cached.stores import open_stores
from pb_cached.telemetry import log_through
from pb_cached.writes import own_log, shared_log


def run(path: Path | None, uninstall: bool) -> int:
    """The exit status: 0, or 1 where it could not be done."""
    console = Console()
    try:
        config = Config.load(path)
        done = asyncio.run(_uninstall(config) if uninstall else _install(config))
    except (PBCachedError, MigrationRequired, ServerOutdated) as error:
        Console(stderr=True).print(str(error), markup=False)
        return 1
    for line in done:
        console.print(line, markup=False, highlight=False)
    return 0


async def _install(config: Config) -> list[str]:
    async with open_stores(msgspec.structs.replace(config, coherence=CoherenceSettings(mode="off"))) as stores:
        stats = stores.stats()
        names = (config.stores.session_prefix, config.stores.customer_prefix, config.stores.variable_prefix)
        paths = (stats.sessions, stats.customers, stats.variables)
        return [
            f"{name}: ready, commits go by {each.writes.path}" for name, each in zip(names, paths, strict=True)
        ]


async def _uninstall(config: Config) -> list[str]:
    of = config.stores
    prefixes = (of.session_prefix, of.customer_prefix, of.variable_prefix)
    names = (*PARLANT, *config.collections)
    logs = [log for prefix in prefixes for log in (shared_log(prefix), *(own_log(prefix, n) for n in names))]
    log = log_through(None, config.logging)
    async with connection_to(find_address(config, None), config, None, log) as connection:
        await take_away(connection.client, logs)
    return [f"{prefix}: no triggers; the data is as it was" for prefix in prefixes]
