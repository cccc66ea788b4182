"""`pb-cached doctor`, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from pb_cached.cli.doctor import server
from pb_cached.cli.doctor.report import Finding, Report
from pb_cached.cli.doctor.show import show
from pb_cached.cli.doctor.stored import Stored
from pb_cached.config import (
    Address,
    Config,
    LoggingSettings,
    environment_is_silent,
    exclusive,
    find_address,
    find_url,
)
from pb_cached.errors import PBCachedError
from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.dialect import probe
from pb_cached.pocketbase.http import http_client
from pb_cached.pocketbase.server import PocketBaseServer, find_binary
from pb_cached.telemetry import log_through
from pb_cached.writes import shared_log

_LOG = log_through(None, LoggingSettings(level="error"))  # what it has to say is in the report


def run(path: Path | None, as_json: bool) -> int:
    """The exit status: 0 where the PocketBase can be used, else 1."""
    try:
        report = asyncio.run(_examined(Config.load(path)))
    except PBCachedError as error:
        report = Report("")
        report.add(Finding("configuration", "bad", str(error)))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        show(report)
    return 0 if report.usable else 1


async def _examined(config: Config) -> Report:
    """Where no URL is configured, what `open_stores` would start is started for as long as this takes."""
    async with AsyncExitStack() as stack:
        params = None
        if find_url(config) is None and environment_is_silent():
            folder = Path(config.pocketbase.data_dir)
            if not folder.exists():
                binary = find_binary()
                report = Report("")
                told = (
                    f"none is configured: the first start makes a PocketBase of its own in {folder}, with {binary}"
                )
                report.add(Finding("URL", "good", told))
                return report
            embedded = await stack.enter_async_context(PocketBaseServer(folder, log=_LOG))
            params = embedded.connection_params
            if config.coherence.mode is None:
                config = exclusive(config)
        return await _examine(config, find_address(config, params))


async def _examine(config: Config, address: Address) -> Report:
    report = Report(address.url)
    async with http_client(config.pocketbase) as http:
        health = await server.health(http, address.url)
        report.add(health.finding)
        if not report.usable:
            return report
        client = PocketBaseClient(http, address, config.pocketbase, _LOG)
        report.add(await server.account(client, address.credentials))
        if not report.usable:
            return report
        dialect = await probe(client, max_requests=0, manage=False, log=_LOG)
        limits = await server.batch_limits(client, dialect)
        stored = Stored(client, dialect, config.stores, _LOG)
        await stored.look()
        with_triggers = await stored.with_triggers()
        commits = server.path(config, dialect, limits, with_triggers)
        report.add(
            server.version(dialect, health.headers),
            commits,
            server.batch(config, dialect, limits),
            server.cache(config, commits),
        )
        topic = f"{shared_log(config.stores.session_prefix)}/*"
        for about, look in (
            ("SQL endpoint", server.sql(client)),
            ("requests", server.bodies(client, config)),
            ("realtime", server.realtime(http, client, topic)),
        ):
            report.add(await _found(about, look))
        report.add(server.clock(health.clock))
        try:
            findings, report.collections = await stored.collections()
            report.add(*findings)
            report.add(await stored.triggers(with_triggers))
            report.add(*await stored.versions(config.stores.migrate))
            report.add(*await stored.unfinished(report.collections, datetime.now(UTC)))
            findings, report.duplicates = await stored.duplicates()
            report.add(*findings)
        except PBCachedError as error:
            report.add(Finding("collections", "weak", f"not all could be looked at: {error}"))
    return report


async def _found(about: str, look: Awaitable[Finding]) -> Finding:
    """What cannot be found out is a finding too."""
    try:
        return await look
    except PBCachedError as error:
        return Finding(about, "weak", f"could not be found out: {error}")
