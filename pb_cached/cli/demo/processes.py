"""The Parlant server as a child process: started, awaited, and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

import httpx
import msgspec

from pb_cached.cli.demo.terms import CACHE_REPORT, PORT, TOOL_PORT, VARIABLE
from pb_cached.stores import StoresStats

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 20.0
LAST_LINES: Final = 25

_OURS: Final = ("POCKETBASE_", "PB_CACHED_")
"""Variables that begin so speak of a PocketBase, and a configuration, that are none of the demo's business."""

_NAMES: Final = {
    "url": "POCKETBASE_URL",
    "admin_token": "POCKETBASE_ADMIN_TOKEN",
    "admin_email": "POCKETBASE_ADMIN_EMAIL",
    "admin_password": "POCKETBASE_ADMIN_PASSWORD",
}


class ParlantStopped(Exception):
    """The server ended, or did not come up."""

    def __init__(self, message: str, last_lines: str) -> None:
        super().__init__(message)
        self.last_lines = last_lines


class ParlantProcess:
    """`pb_cached.cli.demo.server` as an async context manager. The token goes by the environment."""

    url: str

    def __init__(self, folder: Path, connection_params: Mapping[str, str]) -> None:
        self._folder = folder
        self._params = connection_params
        self._output = folder / "parlant-server.log"
        self._report = folder / "parlant-server-cache.json"
        self._ready = False

    async def __aenter__(self) -> Self:
        port, tool_port = _free_ports()
        self.url = f"http://127.0.0.1:{port}"
        home = self._folder / "parlant"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_OURS)},
            **{_NAMES[key]: value for key, value in self._params.items()},
            PORT: str(port),
            TOOL_PORT: str(tool_port),
            CACHE_REPORT: str(self._report),
            "PARLANT_HOME": str(home),
            "PYTHONIOENCODING": "utf-8",  # of the log, whatever the terminal's is
        }
        self._report.unlink(missing_ok=True)
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pb_cached.cli.demo.server"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a terminal's signals are for the demo, which ends it in order
            )
        try:
            await self._wait_until_ready()
        except BaseException:
            await self.__aexit__()
            raise
        self._ready = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(asyncio.to_thread(self._stop))

    async def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        async with httpx.AsyncClient(base_url=self.url, timeout=5.0, trust_env=False) as http:
            while time.monotonic() < end:
                if self._process.poll() is not None:
                    raise ParlantStopped(
                        f"the Parlant server ended with code {self._process.returncode}", self._last()
                    )
                with contextlib.suppress(httpx.TransportError):
                    answer = await http.get("/context-variables")
                    if answer.is_success and any(found["name"] == VARIABLE for found in answer.json()):
                        return
                await asyncio.sleep(0.05)
        raise ParlantStopped(f"the Parlant server was not ready within {START_SECONDS:g} s", self._last())

    def cache_report(self) -> StoresStats | None:
        """What the cache has done from the start to the end in order; None where it did not end so."""
        if not self._report.exists():
            return None
        return msgspec.json.decode(self._report.read_bytes(), type=StoresStats)

    def _stop(self) -> None:
        """A server that is up gets the signal on which Parlant ends in order: a SIGTERM kills it as soon as its
        connections are closed, with its stores still open."""
        in_order = self._ready and os.name == "posix"
        self._process.send_signal(signal.SIGINT if in_order else signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _last(self) -> str:
        return "\n".join(self._output.read_text("utf-8", "replace").splitlines()[-LAST_LINES:])


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])
