"""An HTTP proxy that misbehaves as a test tells it to: it stands between us and a real PocketBase.

    async with FaultProxy(pocketbase.url) as proxy:
        proxy.plan("POST", "/api/batch", cut_after)           # the next such request, once
        proxy.plan("GET", "/api/", answer(503), at=(1, 2))    # the next two
        ...
        assert proxy.count("POST", "/api/batch") == 2

It understands requests and responses just far enough to know where they end. A fault is a function that is given
the `Exchange` and does with it what it likes; a test may write its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Container
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

EVERY = range(1, 1_000_000)
"""For `at`: each request that matches."""

STREAM = ("GET", "/api/realtime")
"""PocketBase's answer to it has no end."""

_PIECE = 64 * 1024


class Exchange:
    """One request on its way to PocketBase, and what becomes of it. Attributes are for reading.

    `status` is what PocketBase, or the fault in its place, answered last; None while nobody has. `finished` is set
    when nothing more will happen.
    """

    def __init__(
        self,
        request: list[bytes],
        reader: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        host: str,
        port: int,
    ) -> None:
        line, _, _ = request[0].partition(b"\r\n")
        self.method, self.path, _ = line.decode().split(" ")
        self.body = b"".join(request[1:])
        self.status: int | None = None
        self.finished = asyncio.Event()
        self._request = b"".join(request)
        self._reader = reader
        self._client = client
        self._server = (host, port)

    async def forward(self) -> None:
        """What happens without a fault."""
        async with contextlib.aclosing(self.ask()) as response:
            async for piece in response:
                await self.send(piece)

    async def ask(self) -> AsyncGenerator[bytes, None]:
        """Give PocketBase the request, and yield its response piece by piece, the head first."""
        async with self._connected() as (reader, writer):
            writer.write(self._request)
            pieces = _pieces(reader, bodiless=self.method == "HEAD")
            head = await anext(pieces)
            self.status = int(head.split(b" ", 2)[1])
            yield head
            async for piece in pieces:
                yield piece

    async def ask_in_vain(self) -> None:
        """Give PocketBase the request, and wait until it has answered, but tell nobody."""
        async with contextlib.aclosing(self.ask()) as response:
            async for _ in response:
                pass

    async def ask_half(self) -> None:
        """Give PocketBase the first half of the request, and hang up on it."""
        async with self._connected() as (_, writer):
            writer.write(self._request[: len(self._request) // 2])
            await writer.drain()

    def replace(self, old: bytes, new: bytes) -> None:
        """PocketBase is to get the request with other words in its head."""
        head, separator, body = self._request.partition(b"\r\n\r\n")
        self._request = head.replace(old, new) + separator + body

    async def send(self, content: bytes) -> None:
        """Give the client a part of the response."""
        self._client.write(content)
        await self._client.drain()

    async def reply(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        """Answer in the place of PocketBase."""
        self.status = status
        head = f"HTTP/1.1 {status} Fault\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.send(head.encode() + body)

    async def left(self) -> None:
        """Return when the client has hung up. For answers that have no end: it sends nothing meanwhile."""
        with contextlib.suppress(ConnectionError):
            await self._reader.read(1)

    def hang_up(self) -> None:
        """Close the client's connection."""
        self._client.transport.abort()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self._server)
        try:
            yield reader, writer
        finally:
            writer.close()


Fault = Callable[[Exchange], Awaitable[None]]


async def cut_before(exchange: Exchange) -> None:
    """Hang up before PocketBase learns of the request."""
    exchange.hang_up()


async def cut_in_request(exchange: Exchange) -> None:
    """PocketBase gets half of the request, the client no answer."""
    await exchange.ask_half()
    exchange.hang_up()


async def cut_after(exchange: Exchange) -> None:
    """PocketBase does what it is asked to, but its answer is lost."""
    await exchange.ask_in_vain()
    exchange.hang_up()


async def cut_in_response(exchange: Exchange) -> None:
    """PocketBase does what it is asked to, but only the beginning of its answer arrives."""
    async with contextlib.aclosing(exchange.ask()) as response:
        head = await anext(response)
        body = await anext(response, b"")
        await exchange.send(head + body[: len(body) // 2])
    exchange.hang_up()


async def twice(exchange: Exchange) -> None:
    """PocketBase gets the request two times, and the client the answer to the second."""
    await exchange.ask_in_vain()
    await exchange.forward()


def again_later(seconds: float) -> Fault:
    """Everything happens, and then PocketBase gets the request once more. Nobody is told the second answer."""

    async def fault(exchange: Exchange) -> None:
        await exchange.forward()
        await asyncio.sleep(seconds)
        await exchange.ask_in_vain()

    return fault


async def lost_by_gateway(exchange: Exchange) -> None:
    """PocketBase does what it is asked to, but whoever stands before it says 502."""
    await exchange.ask_in_vain()
    await exchange.reply(502, b"<html>Bad Gateway</html>")


def answer(
    status: int,
    body: bytes = b'{"data":{},"message":"By order of the test."}',
    content_type: str = "application/json",
) -> Fault:
    """PocketBase is not asked; the client gets this answer."""

    async def fault(exchange: Exchange) -> None:
        await exchange.reply(status, body, content_type)

    return fault


def at_most(size: int, content: bytes) -> Fault:
    """A PocketBase, or what stands before it, that takes no larger bodies, and says so with this one."""

    async def fault(exchange: Exchange) -> None:
        if len(exchange.body) > size:
            await exchange.reply(413, content)
        else:
            await exchange.forward()

    return fault


def delay(seconds: float) -> Fault:
    """Everything happens, but later."""

    async def fault(exchange: Exchange) -> None:
        await asyncio.sleep(seconds)
        await exchange.forward()

    return fault


async def doubled(exchange: Exchange) -> None:
    """Every piece of the body arrives two times: of a stream of events, every event."""
    async with contextlib.aclosing(exchange.ask()) as response:
        await exchange.send(await anext(response))
        async for piece in response:
            await exchange.send(piece + piece)


def lagging(seconds: float) -> Fault:
    """Every piece of the answer arrives later, in its order."""

    async def fault(exchange: Exchange) -> None:
        async with contextlib.aclosing(exchange.ask()) as response:
            async for piece in response:
                await asyncio.sleep(seconds)
                await exchange.send(piece)

    return fault


def scrambled(seed: int, most: float) -> Fault:
    """Of a stream, every event after the greeting arrives later, by up to `most` seconds and each by another time;
    one in five arrives twice."""

    async def fault(exchange: Exchange) -> None:
        chance = random.Random(seed)

        async def send_late(piece: bytes) -> None:
            await asyncio.sleep(chance.uniform(0, most))
            with contextlib.suppress(ConnectionError):
                await exchange.send(piece)

        async with contextlib.aclosing(exchange.ask()) as response, asyncio.TaskGroup() as late:
            for _ in range(2):
                await exchange.send(await anext(response))
            async for piece in response:
                for _ in range(chance.choice((1, 1, 1, 1, 2))):
                    late.create_task(send_late(piece))

    return fault


def cut_at_piece(number: int) -> Fault:
    """Of the answer, whose head is piece 0, half of this piece arrives, and nothing after it."""

    async def fault(exchange: Exchange) -> None:
        async with contextlib.aclosing(exchange.ask()) as response:
            for _ in range(number):
                await exchange.send(await anext(response))
            piece = await anext(response)
            await exchange.send(piece[: len(piece) // 2])
        exchange.hang_up()

    return fault


class Buffer:
    """Passes on so many pieces of the answer, the head being the first, and keeps what follows until it is opened.
    `keeps` is set when it keeps something."""

    def __init__(self, passed: int) -> None:
        self.keeps = asyncio.Event()
        self._passed = passed
        self._opened = asyncio.Event()

    def open(self) -> None:
        self._opened.set()

    async def __call__(self, exchange: Exchange) -> None:
        async with contextlib.aclosing(exchange.ask()) as response:
            for _ in range(self._passed):
                await exchange.send(await anext(response))
            async for piece in response:
                self.keeps.set()
                await self._opened.wait()
                await exchange.send(piece)


class Valve:
    """Passes everything on until it is shut; what comes then is lost, though nothing shows that."""

    def __init__(self, *, is_shut: bool = False) -> None:
        self.is_shut = is_shut

    async def __call__(self, exchange: Exchange) -> None:
        async with contextlib.aclosing(exchange.ask()) as response:
            async for piece in response:
                if not self.is_shut or b"PB_CONNECT" in piece or piece.startswith(b"HTTP/"):
                    await exchange.send(piece)


class Gate:
    """Holds requests until it is opened; then they reach PocketBase, also where their client has left."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._opened = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def open(self) -> None:
        self._opened.set()

    async def __call__(self, exchange: Exchange) -> None:
        self.reached.set()
        await self._opened.wait()
        await exchange.forward()


class Withheld(Gate):
    """PocketBase answers at once, but its answer arrives when this is opened."""

    async def __call__(self, exchange: Exchange) -> None:
        pieces = [piece async for piece in exchange.ask()]
        self.reached.set()
        await self._opened.wait()
        for piece in pieces:
            await exchange.send(piece)


@dataclass
class _Rule:
    method: str
    prefix: str
    fault: Fault
    at: Container[int]
    seen: int = field(default=0)

    def is_due(self, exchange: Exchange) -> bool:
        if exchange.method != self.method or not exchange.path.startswith(self.prefix):
            return False
        self.seen += 1
        return self.seen in self.at


class FaultProxy:
    """Passes on what no plan speaks of. `exchanges` is everything that arrived here, in that order."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.exchanges: list[Exchange] = []
        self._rules: list[_Rule] = []
        self._port = 0
        self._listener: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def plan(self, method: str, prefix: str, fault: Fault, at: Container[int] = (1,)) -> None:
        """Do this to those requests of this method whose path begins so. `at` counts them from now on, from 1."""
        self._rules.append(_Rule(method, prefix, fault, at))

    def forget_plans(self) -> None:
        self._rules.clear()

    def count(self, method: str, prefix: str) -> int:
        """How many such requests have arrived."""
        return len(self.matching(method, prefix))

    def matching(self, method: str, prefix: str) -> list[Exchange]:
        return [e for e in self.exchanges if e.method == method and e.path.startswith(prefix)]

    @contextlib.asynccontextmanager
    async def down(self) -> AsyncIterator[None]:
        """Meanwhile nothing listens at `url`, and what was connected is cut."""
        self._stop_listening()
        for connection in self._connections.values():
            connection.transport.abort()
        try:
            yield
        finally:
            await self._listen()

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop_listening()
        for task, connection in list(self._connections.items()):
            connection.transport.abort()
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._listener.sockets[0].getsockname()[1]

    def _stop_listening(self) -> None:
        assert self._listener is not None
        self._listener.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections[task] = writer
        task.add_done_callback(self._connections.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while not writer.is_closing():
                request = [piece async for piece in _pieces(reader)]
                host = urlsplit(self.server)
                exchange = Exchange(request, reader, writer, str(host.hostname), host.port or 80)
                self.exchanges.append(exchange)
                due = [rule.fault for rule in self._rules if rule.is_due(exchange)]
                fault = due[0] if due else Exchange.forward
                try:
                    if (exchange.method, exchange.path) == STREAM:
                        await _until_left(exchange, fault)
                    else:
                        await fault(exchange)
                finally:
                    exchange.finished.set()


async def _until_left(exchange: Exchange, fault: Fault) -> None:
    """A stream has no end of its own: PocketBase learns at once that its client has left."""
    answering, leaving = asyncio.ensure_future(fault(exchange)), asyncio.create_task(exchange.left())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.wait({answering, leaving})
    if not answering.cancelled():
        answering.result()


async def _pieces(reader: asyncio.StreamReader, *, bodiless: bool = False) -> AsyncIterator[bytes]:
    """One HTTP/1.1 message as it came: its head, then its body bit by bit."""
    head = await reader.readuntil(b"\r\n\r\n")
    yield head
    headers = dict(line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:] if b":" in line)
    if bodiless:
        return
    if b"chunked" in headers.get(b"transfer-encoding", b""):
        size = -1
        while size != 0:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
        return
    left = int(headers.get(b"content-length", 0))
    while left:
        piece = await reader.readexactly(min(left, _PIECE))
        left -= len(piece)
        yield piece
