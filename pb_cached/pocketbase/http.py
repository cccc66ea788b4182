"""How requests reach PocketBase: by the caller's HTTP client, as it is, or by one of ours.

Ours is aiohttp's session; or a transport of httpx without the client around it. Redirects, cookies, hooks and the
merging of settings are of no use here, and take longer than the rest of a small request (facts: performance,
section 2).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import ssl
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, Final, Protocol

import httpx

from pb_cached.config import PocketBaseSettings
from pb_cached.errors import ConfigError

KEEPALIVE_SECONDS: Final = 90.0
"""Below the 180 seconds after which the least patient PocketBase closes an idle connection."""

_HEADERS: Final = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": "pb_cached"}
_LOCAL: Final = ("127.0.0.1", "localhost", "::1")
"""No proxy of the environment leads to ourselves."""


class Response(Protocol):
    """An answer that has been read."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def content(self) -> bytes: ...


class Streamed(Protocol):
    """An answer that is being read."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def aiter_bytes(self) -> AsyncIterator[bytes]: ...


class OwnClient(Protocol):
    """What we use of an `httpx.AsyncClient`. Its errors are httpx's."""

    @property
    def timeout(self) -> httpx.Timeout: ...

    @property
    def is_closed(self) -> bool: ...

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
        """Send a request, and return its answer when it has been read."""
        ...

    def stream(
        self, method: str, url: str, *, headers: Mapping[str, str], timeout: httpx.Timeout
    ) -> AbstractAsyncContextManager[Streamed]:
        """Send a request, and leave it to the caller to read the answer."""
        ...

    async def aclose(self) -> None: ...


class DirectClient:
    """What we use of an `httpx.AsyncClient`, straight on its transport.

    Mutable state: `is_closed`.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport, timeout: httpx.Timeout) -> None:
        self.timeout = timeout
        self.is_closed = False
        self._transport = transport

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
    ) -> httpx.Response:
        """Send a request, and return its answer when it has been read."""
        request = self._request(method, url, params, content, headers, timeout, extensions)
        response = await self._transport.handle_async_request(request)
        async with aclosing(response):
            await response.aread()
        return response

    @asynccontextmanager
    async def stream(
        self, method: str, url: str, *, headers: Mapping[str, str], timeout: httpx.Timeout
    ) -> AsyncIterator[httpx.Response]:
        """Send a request, and leave it to the caller to read the answer."""
        request = self._request(method, url, None, None, headers, timeout, None)
        async with aclosing(await self._transport.handle_async_request(request)) as response:
            yield response

    def _request(
        self,
        method: str,
        url: str,
        params: Mapping[str, str | int] | None,
        content: bytes | None,
        headers: Mapping[str, str] | None,
        timeout: httpx.Timeout | None,
        extensions: Mapping[str, Any] | None,
    ) -> httpx.Request:
        return httpx.Request(
            method,
            _parsed(url),
            params=params,
            content=content,
            headers={**_HEADERS, **(headers or {})},
            extensions={"timeout": (timeout or self.timeout).as_dict(), **(extensions or {})},
        )

    async def aclose(self) -> None:
        self.is_closed = True
        await self._transport.aclose()


Http = httpx.AsyncClient | OwnClient


def own_client(settings: PocketBaseSettings, url: str) -> Http:
    """The client used where the caller passes none. It follows the environment's proxies, but not to ourselves.

    Raises:
        ConfigError: its transport is not installed.
    """
    host = httpx.URL(url).host
    proxies = {} if host in _LOCAL or urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    if proxies.keys() & {"all", httpx.URL(url).scheme}:
        return http_client(settings)
    certificates, limits, timeout = _certificates(), _limits(settings), _timeout(settings)
    has_aiohttp = importlib.util.find_spec("aiohttp") is not None
    if settings.transport == "httpx" or (settings.transport == "auto" and not has_aiohttp):
        return DirectClient(httpx.AsyncHTTPTransport(verify=certificates, limits=limits), timeout)
    if not has_aiohttp:
        raise ConfigError(
            'pocketbase.transport = "aiohttp" needs aiohttp: pip install \'pb_cached[aiohttp]\', or set "auto"'
        )
    from pb_cached.pocketbase.aiohttp_client import AiohttpClient

    return AiohttpClient(certificates, limits, timeout, _HEADERS)


def http_client(settings: PocketBaseSettings) -> httpx.AsyncClient:
    """A whole client of httpx. It follows the environment's proxies, but not to ourselves."""
    return httpx.AsyncClient(
        verify=_certificates(),
        mounts=dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]")),
        timeout=_timeout(settings),
        limits=_limits(settings),
    )


def _timeout(settings: PocketBaseSettings) -> httpx.Timeout:
    return httpx.Timeout(settings.request_timeout, connect=settings.connect_timeout)


def _limits(settings: PocketBaseSettings) -> httpx.Limits:
    return httpx.Limits(
        max_connections=settings.max_connections,
        max_keepalive_connections=settings.max_connections,
        keepalive_expiry=KEEPALIVE_SECONDS,
    )


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Those that httpx would load anew for each client, which takes longer than opening a store."""
    return httpx.create_ssl_context()


@functools.lru_cache(maxsize=1024)
def _parsed(url: str) -> httpx.URL:
    """Parsing takes a tenth of a small request, and most URLs are used again and again."""
    return httpx.URL(url)


def reading_first(http: Http) -> Http:
    """The caller's client with its connections, cookies and hooks; the hooks get responses that have been read.

    One that raises, as `raise_for_status` does, makes httpx close the response, and what was not read by then is
    lost. The caller's own object is left as it is.
    """
    if not isinstance(http, httpx.AsyncClient) or not http.event_hooks["response"]:
        return http
    twin = copy.copy(http)
    twin.event_hooks = {**http.event_hooks, "response": [httpx.Response.aread, *http.event_hooks["response"]]}
    return twin


def unhooked(http: Http) -> Http:
    """The caller's client without hooks for responses: one that reads what it is given would never end."""
    if not isinstance(http, httpx.AsyncClient):
        return http
    twin = copy.copy(http)
    twin.event_hooks = {**http.event_hooks, "response": []}
    return twin
