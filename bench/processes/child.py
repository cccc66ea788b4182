"""A process of ours that carries out orders: a line of JSON each, answered by a line of JSON."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import psutil
from msgspec import Struct

from pb_cached import PocketBaseServer

READY: Final = b"ready\n"
LINE_BYTES: Final = 64 * 1024 * 1024
"""The longest answer."""

Answer = TypeVar("Answer")
Order = TypeVar("Order")


class Child:
    """Such a process, as the workload has it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.process = psutil.Process(process.pid)

    async def ask(self, order: Struct, answer: type[Answer]) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        return msgspec.json.decode(await self.line(), type=answer)

    async def line(self) -> bytes:
        assert self._process.stdout is not None
        return await self._process.stdout.readline()

    async def end(self) -> None:
        """Have it end, as there are no more orders."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


@asynccontextmanager
async def child(module: str, pocketbase: PocketBaseServer) -> AsyncIterator[Child]:
    """A process that runs a module and has told that it is ready.

    Args:
        module: is given the URL as its argument, and the token by the environment.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, pocketbase.url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES,
        env={**os.environ, "POCKETBASE_ADMIN_TOKEN": pocketbase.connection_params["admin_token"]},
        cwd=Path(__file__).parents[2],
    )
    started = Child(process)
    try:
        said = await started.line()
        assert said == READY, f"{module} did not start: {said!r}"
        yield started
    finally:
        await started.end()


async def carry_out(order: type[Order], do: Callable[[Order], Awaitable[Struct]]) -> None:
    """In the process: carry out orders until there are no more."""
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        answer = await do(msgspec.json.decode(line, type=order))
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
