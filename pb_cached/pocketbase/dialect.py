"""What this PocketBase can do: probed once per connection, then only read.

No endpoint tells the version (facts: pocketbase, section 1), so each ability is asked for by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from pb_cached.errors import RequestRejected
from pb_cached.pocketbase.client import Answer, PocketBaseClient
from pb_cached.telemetry import Log

MIB: Final = 1024 * 1024
_OFF: Final = b"Batch requests are not allowed"
_TOO_LONG: Final = b"validation_length_too_long"
FEWEST_REQUESTS: Final = 3
"""What a batch must hold: the log's record, and a write of two operations."""


class BatchLimits(Struct, frozen=True, rename="camel"):
    """`settings.batch` of PocketBase."""

    enabled: bool = False
    max_requests: int = 50
    timeout: float = 3.0
    max_body_size: int = 0

    @property
    def max_bytes(self) -> int:
        return self.max_body_size or 128 * MIB


class Dialect(Struct, frozen=True):
    """The abilities that differ between versions."""

    family: Literal["0.22", "0.23"]
    """`0.23` stands for everything since: collections have `fields` in place of `schema`, and `_superusers`."""
    batch: BatchLimits | None
    """None: there is no batch API, or we may not use it."""
    sql: bool
    """`POST /api/sql`, from 0.39."""
    escapes: bool
    r"""In a filter's string `\\` means one backslash (from 0.39.9). Before, a backslash means itself."""
    may_configure: bool = False
    """May we change PocketBase's settings?"""

    @property
    def per_page(self) -> int:
        """The most records that one page of a listing holds."""
        return 500 if self.family == "0.22" else 1000

    @property
    def filter_bytes(self) -> int:
        """The longest filter. Up to 0.22 the bound is on the whole query, percent-encoded: at most 3 to 1."""
        return 500 if self.family == "0.22" else 3400

    @property
    def filter_expressions(self) -> int:
        return 180


class _Settings(Struct):
    batch: BatchLimits | None = None


class _Total(Struct, rename="camel"):
    total_items: int = 0


async def probe(client: PocketBaseClient, *, max_requests: int, manage: bool, log: Log) -> Dialect:
    """Ask PocketBase what it can do, and switch its batch API on where it is off and we may.

    Args:
        max_requests: what a batch must be allowed to hold.
        manage: may settings be changed?

    Raises:
        AuthenticationFailed: the credentials are not a superuser's.
    """
    await client.call("GET", "/api/collections", params={"perPage": 1})
    newer = (await client.send("GET", "/api/collections/_superusers/auth-methods")).ok
    if not newer:
        return Dialect(family="0.22", batch=None, sql=False, escapes=False)
    return Dialect(
        family="0.23",
        batch=await _batch(client, max_requests, manage, log),
        sql=(await client.send("POST", "/api/sql", body=b'{"query":"SELECT 1"}', repeatable=True)).ok,
        escapes=await _escapes(client),
        may_configure=manage,
    )


async def _batch(client: PocketBaseClient, wanted: int, manage: bool, log: Log) -> BatchLimits | None:
    """The batch API's limits; None where it is off and has to stay off."""
    answer = await client.send("GET", "/api/settings")
    limits = (msgspec.json.decode(answer.content, type=_Settings).batch if answer.ok else None) or BatchLimits()
    if limits.enabled and limits.max_requests > 1 and (limits.max_requests >= wanted or not manage):
        return limits
    reason = "manage_settings is false"
    if manage:
        most = max(wanted, limits.max_requests)
        answer = await _switch_on(client, most)
        if answer.ok:
            log.info("batch API configured", url=client.url, max_requests=most)
            return msgspec.json.decode(answer.content, type=_Settings).batch or limits
        reason = str(await client.rejection(answer, "PATCH /api/settings"))
    if limits.enabled and limits.max_requests > 1:  # the commit's own record takes one
        return limits
    log.warning(
        "the batch API is off, or takes one request at a time, and we may not change that: where there is no log "
        "path either, each write is a request of its own. Its place in the dashboard: Settings, Application",
        url=client.url,
        requests_wanted=wanted,
        reason=reason,
    )
    return None


async def _switch_on(client: PocketBaseClient, max_requests: int) -> Answer:
    change = {"batch": {"enabled": True, "maxRequests": max_requests}}
    return await client.send("PATCH", "/api/settings", body=msgspec.json.encode(change), repeatable=True)


def is_batch_off(answer: Answer) -> bool:
    """Has somebody switched the batch API off since we asked?"""
    return answer.status == 403 and _OFF in answer.content


class _TooLong(Struct, frozen=True):
    code: str = ""
    params: Mapping[str, Any] = {}


class _TooLongRequests(Struct, frozen=True):
    requests: _TooLong = _TooLong()


class _TooLongBatch(Struct, frozen=True):
    data: _TooLongRequests = _TooLongRequests()


def batch_requests_allowed(answer: Answer) -> int | None:
    """How many requests PocketBase takes in a batch, where it has refused one for having more: somebody has
    lowered the number since we asked."""
    if answer.status != 400 or _TOO_LONG not in answer.content:
        return None
    try:
        refusal = msgspec.json.decode(answer.content, type=_TooLongBatch).data.requests
    except msgspec.DecodeError:  # it is about one of the requests
        return None
    most = refusal.params.get("max")
    return most if refusal.code == _TOO_LONG.decode() and isinstance(most, int) else None


async def batch_opened_again(client: PocketBaseClient, dialect: Dialect, was: str) -> RequestRejected | None:
    """What was switched off, or limited too much, is made as it was where we may. Where we may not, the error that
    says what to do.

    Args:
        was: what was done to it, in words.
    """
    most = dialect.batch.max_requests if dialect.batch else BatchLimits().max_requests
    reason = "manage_settings is false"
    if dialect.may_configure:
        answer = await _switch_on(client, most)
        if answer.ok:
            client.log.warning(f"the batch API was {was}; it is on again", url=client.url, max_requests=most)
            return None
        reason = str(await client.rejection(answer, "PATCH /api/settings"))
    return RequestRejected(
        f"commit: the batch API of PocketBase at {client.url} was {was}, and we may not switch it on ({reason}); "
        "nothing was written. Switch it on in its dashboard (Settings, Application, Batch API), with at least "
        f"{most} requests",
        status=403,
    )


async def _escapes(client: PocketBaseClient) -> bool:
    r"""Is `'a\\b'` the same string as `'a\b'`? Asked of a table that surely has a row: our own account's."""
    content = await client.call(
        "GET", "/api/collections/_superusers/records", params={"perPage": 1, "filter": r"'a\\b'='a\b'"}
    )
    return msgspec.json.decode(content, type=_Total).total_items > 0
