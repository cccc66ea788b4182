"""Requests over aiohttp, where that is installed: a third of the CPU that an `httpx.AsyncClient` takes for them.

It tells what httpx's own transport tells, in the same errors and the same words to `trace`, so nobody needs to
know which of them is at work. It knows nothing of PocketBase.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx
import yarl
from msgspec import Struct

Trace = Callable[[str, dict[str, Any]], Awaitable[None]]


class Response(Struct, frozen=True):
    """An answer that has been read."""

    status_code: int
    headers: Mapping[str, str]
    content: bytes


class AiohttpClient:
    """What we use of an `httpx.AsyncClient`.

    Mutable state: `is_closed`.
    """

    def __init__(
        self,
        certificates: ssl.SSLContext,
        limits: httpx.Limits,
        timeout: httpx.Timeout,
        headers: Mapping[str, str],
    ) -> None:
        self.timeout = timeout
        self.is_closed = False
        told = aiohttp.TraceConfig()
        told.on_connection_queued_start.append(_queued)
        told.on_connection_queued_end.append(_queued_no_more)
        told.on_connection_create_start.append(_connecting)
        told.on_connection_create_end.append(_sending)
        told.on_connection_reuseconn.append(_sending)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=limits.max_connections or 0, keepalive_timeout=limits.keepalive_expiry, ssl=certificates
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=_as_aiohttp(timeout),
            trace_configs=[told],
        )
        # Else it sends again by itself what found its connection closed, deletions too. Who sends again is us.
        self._session._retry_connection = False

    async def request(
        self,
        method: str,
        url: str,
        *,
        params: Mapping[str, str | int] | None = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        extensions: Mapping[str, Any] | None = None,
        timeout: httpx.Timeout | None = None,
    ) -> Response:
        """Send a request, and return its answer when it has been read. Raises as httpx does."""
        progress = _Progress(extensions["trace"] if extensions else None)
        with _as_httpx(progress):
            response = await self._begin(progress, method, url, params, content, headers, timeout)
            return Response(response.status, response.headers, await response.read())

    @asynccontextmanager
    async def stream(
        self, method: str, url: str, *, headers: Mapping[str, str], timeout: httpx.Timeout
    ) -> AsyncIterator[Streamed]:
        """Send a request, and leave it to the caller to read the answer."""
        progress = _Progress(None)
        with _as_httpx(progress):
            response = await self._begin(progress, method, url, None, None, headers, timeout)
        try:
            yield Streamed(response, progress)
        finally:
            # What was read to its end leaves its connection to the next request; any other ends with it.
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    async def _begin(
        self,
        progress: _Progress,
        method: str,
        url: str,
        params: Mapping[str, str | int] | None,
        content: bytes | None,
        headers: Mapping[str, str] | None,
        timeout: httpx.Timeout | None,
    ) -> aiohttp.ClientResponse:
        more: dict[str, Any] = {} if timeout is None else {"timeout": _as_aiohttp(timeout)}
        return await self._session.request(
            method,
            _parsed(url) if params is None else _parsed(str(httpx.URL(url, params=params))),
            headers=headers,
            data=content,
            allow_redirects=False,
            trace_request_ctx=progress,
            **more,
        )

    async def aclose(self) -> None:
        self.is_closed = True
        await self._session.close()


class Streamed:
    """An answer that is being read."""

    def __init__(self, response: aiohttp.ClientResponse, progress: _Progress) -> None:
        self.status_code = response.status
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._progress = progress

    async def aiter_bytes(self) -> AsyncIterator[bytes]:
        """Its pieces, as they come."""
        with _as_httpx(self._progress):
            async for piece in self._response.content.iter_any():
                yield piece


@functools.lru_cache(maxsize=1024)
def _parsed(url: str) -> yarl.URL:
    return yarl.URL(url, encoded=True)


def _as_aiohttp(timeout: httpx.Timeout) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(connect=timeout.pool, sock_connect=timeout.connect, sock_read=timeout.read)


class _Progress(Struct):
    """How far a request has come."""

    trace: Trace | None
    is_queued: bool = False
    """It waits for one of the connections."""


async def _queued(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.is_queued = True


async def _queued_no_more(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.is_queued = False


async def _connecting(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    await _tell(context, "connection.connect_tcp.started")


async def _sending(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    await _tell(context, "http11.send_request_headers.started")


async def _tell(context: SimpleNamespace, event: str) -> None:
    if (trace := context.trace_request_ctx.trace) is not None:
        await trace(event, {})


@contextmanager
def _as_httpx(progress: _Progress) -> Iterator[None]:
    """aiohttp's errors as httpx would have raised them."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise (httpx.PoolTimeout if progress.is_queued else httpx.ConnectTimeout)(str(error)) from error
    except aiohttp.ServerTimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except aiohttp.ClientConnectorError as error:
        # aiohttp's own is an OSError that has not always the number of what has happened.
        raise httpx.ConnectError(str(error)) from error.os_error
    except aiohttp.ClientOSError as error:
        raise httpx.ReadError(str(error)) from error
    except aiohttp.ClientError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
