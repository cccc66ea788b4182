"""The machine, and what processes have used of it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Sequence
from typing import Final

import psutil
from msgspec import Struct

from bench.results import Machine
from pb_cached.pocketbase.server import find_binary

PACKAGES: Final = ("pb_cached", "parlant", "httpx", "msgspec", "cachetools")


def describe() -> Machine:
    """This machine, and the versions at work on it."""
    versions = {"Python": platform.python_version(), "PocketBase": _pocketbase()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    return Machine(
        system=platform.platform(terse=True),
        processor=_processor(),
        cores=psutil.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        versions=versions,
    )


def _pocketbase() -> str:
    said = subprocess.run([find_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[-1]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as told:
            names = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


class Used(Struct, frozen=True):
    """Seconds: by the clock, of this process's CPU, and of that of a database's processes."""

    wall: float
    client: float
    server: float


class Meter:
    """Tells what was used since it was made."""

    def __init__(self, servers: Sequence[psutil.Process]) -> None:
        self._servers = servers
        self._server = self._server_seconds()
        self._client = time.process_time()
        self._wall = time.perf_counter()

    def used(self) -> Used:
        wall, client = time.perf_counter() - self._wall, time.process_time() - self._client
        return Used(wall, client, self._server_seconds() - self._server)

    def _server_seconds(self) -> float:
        return sum(sum(server.cpu_times()[:2]) for server in self._servers)


def resident_bytes(processes: Sequence[psutil.Process]) -> int:
    """What these processes have in memory."""
    return sum(process.memory_info().rss for process in processes)
