"""Looking at PocketBase itself: what it is, what it lets us do, and how it would be used."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import statistics
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

import httpx
import msgspec
from msgspec import Struct

from pb_cached.cli.doctor.report import Finding
from pb_cached.config import Config, Credentials
from pb_cached.errors import AuthenticationFailed, PBCachedError
from pb_cached.pocketbase.client import PocketBaseClient, reason_of
from pb_cached.pocketbase.dialect import MIB, BatchLimits, Dialect

SAMPLES: Final = 5
PATIENCE: Final = 5.0
"""Seconds. A server would be more patient, a person is not."""
SLOW_SECONDS: Final = 0.02
"""An answer that takes longer was not given by the same machine, nor by its neighbour."""
SOON_SECONDS: Final = 7 * 86_400
"""A token that ends within so long is worth a word."""
CLOCK_SECONDS: Final = 2.0
MOST_BYTES: Final = 24 * MIB
"""PocketBase itself takes requests up to somewhere beyond it."""
STREAM_SECONDS: Final = 5.0
"""For a stream to say its first word."""


class Health(NamedTuple):
    """How PocketBase answers to `/api/health`."""

    finding: Finding
    headers: Mapping[str, str]
    clock: float
    """Seconds by which PocketBase's clock is before ours. It is told in whole seconds."""


class _Healthy(Struct):
    code: int = 0
    status: int = 0  # what others call it
    message: str = ""


class _Claims(Struct):
    exp: float = 0.0


class _Settings(Struct):
    batch: BatchLimits = BatchLimits()


class _Client(Struct, rename="camel"):
    client_id: str


async def health(http: httpx.AsyncClient, url: str) -> Health:
    """Does it answer, and how fast? Every write of one caller takes at least as long."""
    seconds: list[float] = []
    clocks: list[float] = []
    response = None
    for _ in range(SAMPLES):
        begun, at = time.perf_counter(), time.time()
        try:
            response = await http.get(f"{url}/api/health", timeout=PATIENCE)
        except httpx.RequestError as error:
            return Health(
                Finding(
                    "URL", "bad", f"no answer ({reason_of(error)})", "Is PocketBase running, and the URL right?"
                ),
                {},
                0.0,
            )
        seconds.append(time.perf_counter() - begun)
        if date := response.headers.get("date"):
            with contextlib.suppress(ValueError):
                middle = (at + time.time()) / 2
                clocks.append(parsedate_to_datetime(date).timestamp() + 0.5 - middle)
    assert response is not None
    try:
        healthy = response.is_success and "healthy" in msgspec.json.decode(response.content, type=_Healthy).message
    except msgspec.DecodeError:
        healthy = False
    if not healthy:
        found = f"status {response.status_code} from something that does not answer like PocketBase"
        return Health(Finding("URL", "bad", found, "Check the URL, and what stands before PocketBase"), {}, 0.0)
    typical = statistics.median(seconds)
    finding = Finding("URL", "good", f"answers in {typical * 1000:.1f} ms")
    if typical > SLOW_SECONDS:
        advice = "Each commit takes at least as long: have the servers near PocketBase, and no proxy between them"
        finding = Finding("URL", "weak", finding.found, advice)
    return Health(finding, response.headers, min(clocks, key=abs, default=0.0))


def version(dialect: Dialect, headers: Mapping[str, str]) -> Finding:
    """No endpoint tells it, so it is what follows from the abilities (facts: pocketbase, section 1)."""
    if dialect.family == "0.22":
        advice = "From 0.23 on writes share commits, and several servers may write; from 0.39 on by triggers"
        return Finding("version", "weak", "before 0.23", advice)
    if headers.get("cross-origin-opener-policy") == "same-origin":
        told = "0.40 or later"
    elif dialect.escapes:
        told = "0.39.9 or later"
    elif dialect.sql:
        told = "0.39.0 to 0.39.8"
    else:
        advice = "From 0.39 on commits go by triggers, three times as fast, and updates compare revisions"
        return Finding("version", "weak", "0.23 to 0.38, or the SQL endpoint is closed to us", advice)
    return Finding("version", "good", told)


async def account(client: PocketBaseClient, credentials: Credentials) -> Finding:
    """Are we a superuser, and for how long?"""
    try:
        await client.call("GET", "/api/collections", params={"perPage": 1})
    except AuthenticationFailed as error:
        return Finding("account", "bad", str(error), "Set the token, or the email and password, of a superuser")
    except PBCachedError as error:
        return Finding("account", "bad", str(error))
    if credentials.token is None:
        return Finding("account", "good", f"superuser {credentials.email}, by password")
    end = _end(credentials.token.reveal())
    if end is None:
        return Finding("account", "good", "superuser, by a token that does not tell when it ends")
    told = f"superuser, by a token that ends on {datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M} UTC"
    if end - time.time() > SOON_SECONDS:
        return Finding("account", "good", told)
    advice = "It cannot be renewed: use an email and a password, or a token made to last (impersonation)"
    return Finding("account", "weak", told, advice)


def _end(token: str) -> float | None:
    """When a token ends, in seconds since the epoch, as it says itself."""
    try:
        _, claims, _ = token.split(".")
        content = base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4))
        return msgspec.json.decode(content, type=_Claims).exp or None
    except (ValueError, binascii.Error, msgspec.DecodeError):
        return None


def path(config: Config, dialect: Dialect, batch: BatchLimits, with_triggers: frozenset[str]) -> Finding:
    """By which way commits will go, and why: as `Connection` chooses it.

    Args:
        with_triggers: the logs that have them.
    """
    of = config.pocketbase
    asked = "native_events = true" if of.native_events else f'commit = "{of.commit}"'
    wanted = "batch" if of.native_events else of.commit
    logs = ", ".join(sorted(with_triggers))
    if dialect.family == "0.22":
        return Finding("commits", "weak", "one request for each write: before 0.23 there is nothing else")
    if wanted == "batch" and with_triggers:
        return Finding(
            "commits",
            "bad",
            f"{asked}, but there are the log path's triggers: {logs}",
            "`pb-cached init --uninstall` takes them away, when no server is at work; or set commit = "
            '"auto" and native_events = false under [pocketbase]',
        )
    if with_triggers or (wanted != "batch" and dialect.sql):
        why = "its triggers are there" if with_triggers else "they are made at the first start"
        return Finding("commits", "good", f"log: by triggers; {why}, {asked}")
    if wanted == "log":
        advice = 'Use PocketBase 0.39 or later, open its SQL endpoint to us, or set commit = "auto"'
        return Finding("commits", "bad", f"{asked}, but there is no SQL endpoint for us", advice)
    reason = asked if wanted == "batch" else "no SQL endpoint for us, which triggers take"
    if batch.enabled or of.manage_settings:
        return Finding("commits", "good" if wanted == "batch" else "weak", f"batch: by /api/batch; {reason}")
    return Finding(
        "commits",
        "weak",
        f"one request for each write: {reason}, and the batch API is off",
        "Switch it on, see below",
    )


def cache(config: Config, commits: Finding) -> Finding:
    """How reads are answered.

    Args:
        commits: by which way they go, as `path` tells.
    """
    if not config.caches:
        return Finding("cache", "good", "off, as it is set: every read asks PocketBase")
    if config.mode == "realtime" and not commits.found.startswith(("log:", "batch:")):
        advice = 'Where nobody but one process writes, set mode = "exclusive" under [coherence]'
        return Finding("cache", "weak", "off: others' writes cannot be followed where commits have no log", advice)
    size = f"{config.cache.max_bytes / MIB:g} MiB of it"
    return Finding("cache", "good", f"reads come from memory, {size}, in mode {config.mode}")


async def batch_limits(client: PocketBaseClient, dialect: Dialect) -> BatchLimits:
    """As they are set. Before 0.23 there is no batch API."""
    if dialect.family == "0.22":
        return BatchLimits()
    answer = await client.send("GET", "/api/settings")
    return msgspec.json.decode(answer.content, type=_Settings).batch if answer.ok else BatchLimits()


def batch(config: Config, dialect: Dialect, limits: BatchLimits) -> Finding:
    if dialect.family == "0.22":
        return Finding("batch API", "weak", "there is none before 0.23")
    wanted = config.writes.max_commit_records + 2
    told = (
        f"{limits.max_requests} requests, {limits.max_bytes // MIB} MiB, {limits.timeout:g} s at a time"
        if limits.enabled
        else "off"
    )
    if limits.enabled and limits.max_requests >= wanted:
        return Finding("batch API", "good", told)
    if config.pocketbase.manage_settings:
        return Finding("batch API", "good", f"{told}; the first start sets it to {wanted} requests")
    advice = f"In its dashboard (Settings, Application, Batch API) allow {wanted} requests, or set manage_settings"
    return Finding("batch API", "weak", f"{told}, and manage_settings = false", advice)


async def sql(client: PocketBaseClient) -> Finding:
    answer = await client.send("POST", "/api/sql", body=b'{"query":"SELECT 1"}', repeatable=True)
    if answer.ok:
        return Finding("SQL endpoint", "good", "open to us")
    if answer.status == 404:
        return Finding("SQL endpoint", "weak", "there is none (before 0.39)", "Use PocketBase 0.39 or later")
    advice = (
        "Triggers cannot be made, verified or mended: allow POST /api/sql, also in what stands before PocketBase"
    )
    return Finding("SQL endpoint", "weak", f"closed to us (status {answer.status})", advice)


async def bodies(client: PocketBaseClient, config: Config) -> Finding:
    """How large a request may be: tried out where a body is read and then refused. A proxy often allows 1 MiB."""
    of = config.writes
    sizes = sorted({min(size, MOST_BYTES) for size in (of.max_document_bytes, of.max_commit_bytes, MIB)})
    refused = 0
    while sizes:
        filling = b'{"clientId":"","subscriptions":[],"filling":"' + b"x" * sizes[-1] + b'"}'
        answer = await client.send("POST", "/api/realtime", body=filling, repeatable=True)
        if answer.status != 413:
            break
        refused = sizes.pop()
    taken = f"{sizes[-1] / MIB:g} MiB" if sizes else "less than 1 MiB"
    if not refused:
        return Finding("requests", "good", f"{taken} and more are taken")
    advice = (
        "Raise the limit of what stands before PocketBase (client_max_body_size), or lower max_document_bytes and "
        "max_commit_bytes under [writes]"
    )
    return Finding("requests", "weak", f"{taken} are taken, {refused / MIB:g} MiB are refused", advice)


async def realtime(http: httpx.AsyncClient, client: PocketBaseClient, topic: str) -> Finding:
    """Does a stream open, and is a subscription taken? Nothing is written for it."""
    why = "the stream said nothing"
    try:
        async with asyncio.timeout(STREAM_SECONDS), http.stream("GET", f"{client.url}/api/realtime") as stream:
            async for line in stream.aiter_lines():
                if not line.startswith("data:"):
                    continue
                id_ = msgspec.json.decode(line.removeprefix("data:"), type=_Client).client_id
                body = msgspec.json.encode({"clientId": id_, "subscriptions": [topic]})
                answer = await client.send("POST", "/api/realtime", body=body, repeatable=True)
                if answer.ok:
                    return Finding("realtime", "good", "a stream opens, and a subscription is taken")
                why = f"a subscription is refused (status {answer.status})"
                break
            else:
                why = f"the stream ends at once (status {stream.status_code})"
    except TimeoutError:
        pass
    except (httpx.RequestError, msgspec.DecodeError) as error:
        told = reason_of(error) if isinstance(error, httpx.RequestError) else "is no stream of PocketBase's"
        why = f"the stream {told}"
    advice = "What stands before PocketBase must pass streams on at once (proxy_buffering off), from one address"
    return Finding("realtime", "weak", why, advice)


def clock(seconds: float) -> Finding:
    if abs(seconds) <= CLOCK_SECONDS:
        return Finding("clock", "good", "as ours, to the second")
    told = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} ours"
    advice = "Set all clocks by NTP: ids carry the time, and order what several servers insert"
    return Finding("clock", "weak", told, advice)
