"""A real Parlant server in this process, with the demo's deterministic language model, spoken to over HTTP."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import httpx
import uvicorn

from pb_cached.cli.demo.nlp import DeterministicNLP

if TYPE_CHECKING:
    import parlant.sdk as p
    from lagom import Container

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 30.0
TURN_SECONDS: Final = 30.0

_home = tempfile.TemporaryDirectory(prefix="parlant-home-")

Script = Callable[["p.Server"], Awaitable[Any]]
"""What a user writes inside `async with p.Server(...) as server:`."""


def sdk() -> Any:
    """`parlant.sdk`, which takes seconds to import and makes its home where PARLANT_HOME says at that moment."""
    with mock.patch.dict(os.environ, PARLANT_HOME=_home.name):
        import parlant.sdk

    return parlant.sdk


@dataclass(frozen=True)
class RunningServer:
    http: httpx.AsyncClient
    container: Container

    async def get(self, path: str, **params: Any) -> Any:
        return (await self.http.get(path, params=params)).raise_for_status().json()

    async def send(self, method: str, path: str, body: Any) -> Any:
        return (await self.http.request(method, path, json=body)).raise_for_status().json()


@dataclass
class Talk:
    """The customer's side of one session."""

    server: RunningServer
    session: str
    heard: int = field(default=0)
    """Offsets below this one have been read."""

    async def say(self, message: str) -> None:
        body = {"kind": "message", "source": "customer", "message": message}
        event = await self.server.send("POST", f"/sessions/{self.session}/events", body)
        self.heard = event["offset"] + 1

    async def events(self, **params: Any) -> list[Any]:
        return list(await self.server.get(f"/sessions/{self.session}/events", wait_for_data=0, **params))

    async def reply(self, containing: str = "") -> str:
        """The next message of the agent that contains this, when the agent has completed its turn."""
        reply = ""
        async with asyncio.timeout(TURN_SECONDS):
            while True:
                for event in await self.events(min_offset=self.heard):
                    self.heard = event["offset"] + 1
                    if event["kind"] == "message" and event["source"] == "ai_agent":
                        said = str(event["data"]["message"])
                        reply = said if containing in said else reply
                    elif reply and _completes_a_turn(event):
                        return reply
                await asyncio.sleep(0.02)

    async def ask(self, message: str, containing: str = "") -> str:
        await self.say(message)
        return await self.reply(containing)


def _completes_a_turn(event: Any) -> bool:
    return bool(event["kind"] == "status" and (event["data"].get("data") or {}).get("stage") == "completed")


@asynccontextmanager
async def parlant_server(script: Script, **arguments: Any) -> AsyncIterator[RunningServer]:
    """Start `p.Server(**arguments)`, run the script in it, and stop it in order when the context ends."""
    p = sdk()
    arguments.setdefault("nlp_service", lambda _: DeterministicNLP())
    port, tool_port = _free_ports()
    opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    serving: list[uvicorn.Server] = []

    class Uvicorn(uvicorn.Server):
        """One that stops as if by Ctrl-C, but leaves signals to pytest."""

        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            if config.port == port:
                serving.append(self)

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            await super().serve(sockets)
            raise asyncio.CancelledError  # without it Parlant waits for its background tasks for ever

    async def serve() -> None:
        server = p.Server(
            host="127.0.0.1",
            port=port,
            tool_service_port=tool_port,
            log_level=p.LogLevel.WARNING,
            **arguments,
        )
        async with server:
            await script(server)
            opened.set_result(server)

    with mock.patch.object(uvicorn, "Server", Uvicorn):
        task = asyncio.create_task(serve())
        try:
            await _first_of(opened, task)
            await _first_of(asyncio.ensure_future(opened.result().ready.wait()), task)
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=TURN_SECONDS, trust_env=False
            ) as http:
                yield RunningServer(http, opened.result().container)
        finally:
            for server in serving:
                server.should_exit = True
            if not serving:
                task.cancel()
            await asyncio.wait([task], timeout=STOP_SECONDS)
    assert task.done(), f"the Parlant server did not stop within {STOP_SECONDS:g} s"
    if not task.cancelled():
        task.result()


async def _first_of(awaited: asyncio.Future[Any], task: asyncio.Task[None]) -> None:
    """Wait for something that the server does, or for the server's end before it, which is raised."""
    await asyncio.wait({awaited, task}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    if not awaited.done():
        awaited.cancel()
        if task.done():
            task.result()
        raise TimeoutError(f"the Parlant server was not ready within {START_SECONDS:g} s")


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])
