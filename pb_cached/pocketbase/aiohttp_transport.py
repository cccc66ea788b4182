"""httpx's requests over aiohttp, where that is installed: half of the CPU that httpx's own connections take.

It tells what httpx's own transport tells, in the same errors and the same words to `trace`, so nobody needs to
know which of them is at work. It knows nothing of PocketBase.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx
import yarl
from msgspec import Struct

Trace = Callable[[str, dict[str, Any]], Awaitable[None]]


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Connections of aiohttp, as a transport of httpx."""

    def __init__(self, certificates: ssl.SSLContext, limits: httpx.Limits) -> None:
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
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[told],
        )
        # Else it sends again by itself what found its connection closed, deletions too. Who sends again is us.
        self._session._retry_connection = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout = request.extensions["timeout"]
        progress = _Progress(request.extensions.get("trace"))
        with _as_httpx(progress):
            response = await self._session.request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw],
                data=request.content or None,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(
                    connect=timeout["pool"], sock_connect=timeout["connect"], sock_read=timeout["read"]
                ),
                trace_request_ctx=progress,
            )
        return httpx.Response(response.status, headers=response.raw_headers, stream=_Body(response, progress))

    async def aclose(self) -> None:
        await self._session.close()


class _Progress(Struct):
    """How far a request has come."""

    trace: Trace | None
    is_queued: bool = False
    """It waits for one of the connections."""


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse, progress: _Progress) -> None:
        self._response = response
        self._progress = progress

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx(self._progress):
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        """What was read to its end leaves its connection to the next request; any other ends with it."""
        self._response.release() if self._response.content.at_eof() else self._response.close()


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
