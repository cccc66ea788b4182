"""A process that carries out orders: a line of JSON each, answered by a line of JSON. It ends with its input.

Imports next to nothing, as some processes have it measured how long their own imports take.
"""

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

TOKEN: Final = "POCKETBASE_ADMIN_TOKEN"
"""The variable of the environment that has it, so that no list of processes shows it."""
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
        """Give it an order, one at a time, and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        return msgspec.json.decode(await self.line(), type=answer)

    async def line(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, "the process has ended; what it said of it is above"
        return line

    async def end(self) -> None:
        """Have it end, as there are no more orders."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


@asynccontextmanager
async def child(module: str, *arguments: str, token: str) -> AsyncIterator[Child]:
    """A process that runs a module with these arguments, and has told that it is ready.

    Args:
        token: of PocketBase's superuser, which it finds in its environment.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES,
        env={**os.environ, TOKEN: token},
        cwd=Path(__file__).parents[2],
    )
    started = Child(process)
    try:
        said = await started.line()
        assert said == READY, f"{module} did not start: {said!r}"
        yield started
    finally:
        await started.end()


async def carry_out(order: type[Order], do: Callable[[Order], Awaitable[object]]) -> None:
    """In the process: carry out orders until there are no more."""
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        answer = await do(msgspec.json.decode(line, type=order))
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
