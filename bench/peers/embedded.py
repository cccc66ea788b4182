"""A PocketBase of a peer's own, in a folder that goes with it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from pb_cached import PocketBaseServer
from pb_cached.config import LoggingSettings
from pb_cached.telemetry import log_through

QUIET: Final = LoggingSettings(level="warning")


@asynccontextmanager
async def pocketbase() -> AsyncIterator[PocketBaseServer]:
    with tempfile.TemporaryDirectory(prefix="pb-cached-bench-") as folder:
        async with PocketBaseServer(folder, log=log_through(None, QUIET)) as server:
            yield server
