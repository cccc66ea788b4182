"""Fixtures: real PocketBase servers on loopback, and databases on them under prefixes of their own."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.config import CacheSettings, CoherenceSettings, PocketBaseSettings
from tests.faults import FaultProxy

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def silent_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what the machine's environment says about PocketBase."""
    for name in (
        "POCKETBASE_URL",
        "POCKETBASE_ADMIN_TOKEN",
        "POCKETBASE_ADMIN_EMAIL",
        "POCKETBASE_ADMIN_PASSWORD",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("PB_CACHED_CONFIG", raising=False)


TESTS_OF_A_SERVER = 15
"""PocketBase looks at all of its collections for each that is made, so a server slows down with those of the tests
before: after so many a new one takes over."""


class Servers:
    """One server after the other."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._stack = AsyncExitStack()
        self._server: PocketBaseServer | None = None
        self._tests = 0

    async def next(self) -> PocketBaseServer:
        """The server for the next test."""
        if self._server is None or self._tests == TESTS_OF_A_SERVER:
            await self.close()
            folder = self._folders.mktemp("pocketbase")
            self._server = await self._stack.enter_async_context(PocketBaseServer(folder))
            self._tests = 0
        self._tests += 1
        return self._server

    async def close(self) -> None:
        await self._stack.aclose()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pocketbases(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    opened = Servers(tmp_path_factory)
    yield opened
    await opened.close()


@pytest_asyncio.fixture(loop_scope="session")
async def pocketbase(pocketbases: Servers) -> PocketBaseServer:
    """A server for all tests that leave it running."""
    return await pocketbases.next()


@pytest_asyncio.fixture
async def proxy(pocketbase: PocketBaseServer) -> AsyncIterator[FaultProxy]:
    """What stands between us and PocketBase, and makes faults."""
    async with FaultProxy(pocketbase.url) as opened:
        yield opened


@pytest.fixture
def prefix() -> str:
    """A collection prefix that no other test uses."""
    return f"test{next(_numbers)}"


DatabaseMaker = Callable[..., PocketBaseDocumentDatabase]

EXCLUSIVE = CoherenceSettings(mode="exclusive")
CACHES: Mapping[str, Mapping[str, Any]] = {
    "no cache": {"pocketbase": PocketBaseSettings(commit="batch")},
    "cache": {"coherence": EXCLUSIVE},
    # Evicts all the time, and reads through what does not fit.
    "tiny cache": {
        "coherence": EXCLUSIVE,
        "cache": CacheSettings(max_bytes=4_000),
        "pocketbase": PocketBaseSettings(commit="batch"),
    },
}
"""How a database may be configured to read, and to write: by default commits go by the log. All answers must be
the same."""


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """Sections of a `Config`, with and without a cache: for tests whose answers must not depend on it."""
    return CACHES[request.param]


@pytest.fixture
def make_database(pocketbase: PocketBaseServer, prefix: str) -> DatabaseMaker:
    """Makes databases of this test's prefix; several of them stand for several openings, or several servers."""

    def make(**options: Any) -> PocketBaseDocumentDatabase:
        options.setdefault("collection_prefix", prefix)
        config = options.pop("config", Config())
        if config.coherence.mode is None:  # else each of them would follow the others
            config = msgspec.structs.replace(config, coherence=CoherenceSettings(mode="off"))
        params = options.pop("connection_params", pocketbase.connection_params)
        return PocketBaseDocumentDatabase(options.pop("logger", None), params, config=config, **options)

    return make


@pytest_asyncio.fixture
async def database(
    make_database: DatabaseMaker, cache: Mapping[str, Any]
) -> AsyncIterator[PocketBaseDocumentDatabase]:
    async with make_database(config=Config(**cache)) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What soaks is slow."""
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker("slow")
