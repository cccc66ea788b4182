"""How requests reach PocketBase: by httpx's connections or aiohttp's, which must not be told apart."""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from pb_cached.config import PocketBaseSettings
from pb_cached.errors import ConfigError
from pb_cached.pocketbase.http import DirectClient, Http, own_client
from tests.faults import FaultProxy, cut_after, cut_in_request, cut_in_response

ELSEWHERE = "http://pocketbase.example.org:8090"
TRANSPORTS = ("httpx", "aiohttp")

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def client_by(transport: Any, *, connections: int = 8, connect: float = 5.0, request: float = 10.0) -> Http:
    return own_client(
        PocketBaseSettings(
            transport=transport,
            max_connections=connections,
            connect_timeout=connect,
            request_timeout=request,
        ),
        "http://127.0.0.1",
    )


@pytest_asyncio.fixture(params=TRANSPORTS)
async def http(request: pytest.FixtureRequest) -> AsyncIterator[Http]:
    client = client_by(request.param)
    yield client
    await client.aclose()


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Callable[[Serve], Awaitable[str]]]:
    """Starts servers that answer with what they are told to."""
    servers: list[asyncio.Server] = []

    async def start(answer: Serve) -> str:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await answer(reader, writer)
            writer.close()

        servers.append(await asyncio.start_server(accept, "127.0.0.1", 0))
        return f"http://127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}"

    yield start
    for server in servers:
        server.close()


def saying(head: bytes, body: bytes = b"", then: Callable[[], Awaitable[None]] | None = None) -> Serve:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n" + body)
        await writer.drain()
        if then is not None:
            await then()

    return answer


class Trace:
    """What a transport tells of a request."""

    def __init__(self) -> None:
        self.sent = False

    async def __call__(self, event: str, _: object) -> None:
        if event.endswith(".send_request_headers.started"):
            self.sent = True
        elif event == "connection.connect_tcp.started":
            self.sent = False


async def sent(http: Http, method: str, url: str, error: type[Exception], **more: Any) -> bool:
    """Whether the transport says so, of a request that must fail with this error."""
    trace = Trace()
    with pytest.raises(error) as failure:
        await http.request(method, url, extensions={"trace": trace}, **more)
    assert type(failure.value) is error
    return trace.sent


async def test_answers_come_whole_with_status_and_headers(http: Http, proxy: FaultProxy) -> None:
    answer = await http.request("GET", f"{proxy.url}/api/health")
    assert answer.status_code == 200
    assert msgspec.json.decode(answer.content)["message"] == "API is healthy."
    assert answer.headers["content-type"].startswith("application/json")
    assert (await http.request("GET", f"{proxy.url}/api/nothing")).status_code == 404


@pytest.mark.parametrize("value", ["a+b c", "50%25", "'\\'", "äö&=?#/", "a%2Fb", "~!*()"])
async def test_parameters_arrive_as_they_are(http: Http, proxy: FaultProxy, value: str) -> None:
    await http.request("GET", f"{proxy.url}/api/health", params={"filter": value})
    (exchange,) = proxy.exchanges
    assert httpx.URL(f"http://x{exchange.path}").params["filter"] == value


async def test_a_compressed_answer_is_unpacked(http: Http, serve: Callable[[Serve], Awaitable[str]]) -> None:
    packed = gzip.compress(b'{"message": "packed"}')
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d" % len(packed)
    url = await serve(saying(head, packed))
    assert (await http.request("GET", url)).content == b'{"message": "packed"}'


async def test_redirects_and_cookies_are_not_followed(
    http: Http, serve: Callable[[Serve], Awaitable[str]]
) -> None:
    url = await serve(
        saying(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nSet-Cookie: a=b\r\nContent-Length: 0")
    )
    answer = await http.request("GET", url)
    assert (answer.status_code, answer.headers["location"]) == (302, "/elsewhere")


async def test_where_nothing_listens_nothing_was_sent(http: Http, proxy: FaultProxy) -> None:
    async with proxy.down():
        assert not await sent(http, "POST", proxy.url, httpx.ConnectError, content=b"{}")


async def test_what_is_not_answered_in_time_was_sent(http: Http, serve: Callable[[Serve], Awaitable[str]]) -> None:
    over = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await over.wait()

    url = await serve(silent)
    timeout = httpx.Timeout(5, read=0.2)
    assert await sent(http, "POST", url, httpx.ReadTimeout, content=b"{}", timeout=timeout)
    over.set()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_who_waits_for_a_connection_in_vain_has_sent_nothing(
    transport: str, serve: Callable[[Serve], Awaitable[str]]
) -> None:
    over, arrived = asyncio.Event(), asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await over.wait()
        await saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0")(reader, writer)

    url, http = await serve(slow), client_by(transport, connections=1)
    first = asyncio.create_task(http.request("GET", url))
    await arrived.wait()
    timeout = httpx.Timeout(10, pool=0.1)
    assert not await sent(http, "POST", url, httpx.PoolTimeout, content=b"{}", timeout=timeout)
    over.set()
    assert (await first).status_code == 200
    await http.aclose()


@pytest.mark.parametrize("fault", [cut_in_request, cut_after, cut_in_response])
async def test_a_connection_that_is_cut_leaves_it_open_whether_it_arrived(
    http: Http, proxy: FaultProxy, fault: Any
) -> None:
    """And nobody but us sends it again."""
    assert (
        await http.request("GET", f"{proxy.url}/api/health")
    ).status_code == 200  # by a connection that is kept
    for method in ("POST", "DELETE"):
        proxy.plan(method, "/api/health", fault)
        trace = Trace()
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            await http.request(method, f"{proxy.url}/api/health", extensions={"trace": trace})
        assert trace.sent
        assert proxy.count(method, "/api/health") == 1


async def test_what_is_no_http_is_said_to_be_none(http: Http, serve: Callable[[Serve], Awaitable[str]]) -> None:
    url = await serve(saying(b"SSH-2.0-OpenSSH_9.2"))
    assert await sent(http, "GET", url, httpx.RemoteProtocolError)


async def test_a_name_that_nobody_has_is_a_failed_connection(http: Http) -> None:
    assert not await sent(http, "GET", "http://pocketbase.invalid:1", httpx.ConnectError)


async def test_a_stream_that_is_left_gives_its_connection_up(proxy: FaultProxy, http: Http) -> None:
    for _ in range(20):  # more than there are connections
        async with http.stream("GET", f"{proxy.url}/api/realtime", headers={}, timeout=httpx.Timeout(5)) as stream:
            assert "PB_CONNECT" in (await anext(aiter(stream.aiter_bytes()))).decode()
    assert (await http.request("GET", f"{proxy.url}/api/health")).status_code == 200


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stream_may_be_silent_for_as_long_as_its_own_timeout_says(
    transport: str, proxy: FaultProxy
) -> None:
    http = client_by(transport, request=0.2)
    timeout = httpx.Timeout(5, read=0.8)
    async with http.stream("GET", f"{proxy.url}/api/realtime", headers={}, timeout=timeout) as stream:
        pieces = aiter(stream.aiter_bytes())
        await anext(pieces)
        begun = asyncio.get_running_loop().time()
        with pytest.raises(httpx.ReadTimeout):
            await anext(pieces)
        assert 0.7 < asyncio.get_running_loop().time() - begun < 3
    await http.aclose()


async def test_a_proxy_of_the_environment_is_gone_through_but_not_to_ourselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    settings = PocketBaseSettings()

    def is_direct(url: str) -> bool:
        return not isinstance(own_client(settings, url), httpx.AsyncClient)

    assert is_direct(ELSEWHERE)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert is_direct(ELSEWHERE)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert not is_direct(ELSEWHERE)
    assert all(map(is_direct, ("http://127.0.0.1:8090", "http://localhost:8090", "http://[::1]:8090")))
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert is_direct(ELSEWHERE)


def test_aiohttp_is_taken_where_it_is_there_and_missed_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'pb_cached\[aiohttp\]'"):
        own_client(PocketBaseSettings(transport="aiohttp"), "http://127.0.0.1")
    assert isinstance(own_client(PocketBaseSettings(), "http://127.0.0.1"), DirectClient)


def test_certificates_are_checked() -> None:
    from pb_cached.pocketbase.http import _certificates

    assert _certificates().verify_mode is ssl.CERT_REQUIRED
