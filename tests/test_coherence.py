"""Servers that share one PocketBase, each a process with a cache of its own, are answered as the rules 1 to 5 of
the design's section 10 say, whatever happens to the stream, to PocketBase, and by foreign hands."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest
import pytest_asyncio

from pb_cached import PocketBaseServer, open_stores
from tests.checker import NEVER, POCKETBASE, Op, check, key_of, rules
from tests.coherent_server import (
    MAX_STALENESS,
    PREFIX,
    Commit,
    Diary,
    Done,
    Historian,
    begun,
    note_key,
    nothing,
    now,
    read_all,
    session_key,
    settings,
)
from tests.faults import EVERY, FaultProxy, cut_at_piece, scrambled
from tests.test_client import PASSWORD, Account

pytestmark = pytest.mark.slow

SECONDS: Final = 2.5
"""Of work."""
FIELDS: Final = ("customer_id", "agent_id", "consumption_offsets")
"""Each is one server's own, until others join."""
SCRAMBLED: Final = 0.3
BOUND: Final = MAX_STALENESS
"""What the checker allows: what the README promises, and nothing on top of it."""
GONE_SECONDS: Final = 60.0


Run = Callable[..., Awaitable["Servers"]]
Meanwhile = Callable[["Servers"], Awaitable[Any]]


class Servers:
    """The processes, and what they have left."""

    def __init__(self, folder: Path, name: str, params: dict[str, str], bound: float, commit: Commit) -> None:
        self.sessions: list[str] = []
        self.history: list[Op] = []
        self.done: list[Done] = []
        self.passing = f"passing {name}"
        self._folder = folder
        self._params = params
        self._bound = bound
        self._commit: Commit = commit
        self._processes: list[asyncio.subprocess.Process] = []
        self._stack = AsyncExitStack()
        self._numbers = itertools.count()

    async def work(self, meanwhile: Meanwhile, broken: dict[int, str]) -> None:
        """Have them work, while something happens, until all is over."""
        async with (
            self._stack,
            httpx.AsyncClient(timeout=30) as http,
            open_stores(settings("off", self._commit), connection_params=self._params, http_client=http) as stores,
        ):
            for number in range(len(FIELDS)):
                await self._start(broken.get(number, ""))
            setup = Historian("setup", self.passing, stores)
            self.sessions = [session.id for _ in FIELDS if (session := await setup.create())]
            await self._tell(self.sessions)
            assert await self._heard() == [["ready"]] * len(FIELDS)
            await self._tell([])
            await meanwhile(self)
            await self._tell([])
            passing = sorted({id_ for ids in await self._heard() for id_ in ids})
            await self._tell(passing)
            async with asyncio.timeout(GONE_SECONDS):
                assert [await process.wait() for process in self._processes] == [0] * len(self._processes)
            last = Historian(POCKETBASE, self.passing, stores)
            await read_all(last, self.sessions, passing)
        self.done = [
            msgspec.json.decode(file.read_bytes(), type=Done) for file in sorted(self._folder.glob("*.json"))
        ]
        diaries = [op for file in sorted(self._folder.glob("*.diary")) for op in Diary.read(file)]
        told = [op for done in self.done for op in done.history]
        self.history += [*setup.history, *last.history, *diaries, *told]

    async def join(self) -> None:
        """One more begins, and works."""
        before, self._processes = self._processes, []
        try:
            await self._start()
            await self._tell(self.sessions)
            assert await self._heard() == [["ready"]]
            await self._tell([])
        finally:
            self._processes = [*before, *self._processes]

    async def kill(self) -> None:
        """The one that came last ends, without a chance to do anything about it."""
        process = self._processes.pop()
        process.kill()
        await process.wait()

    async def stop(self, number: int, seconds: float) -> None:
        """One does nothing for a while, and does not know of it."""
        self._processes[number].send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._processes[number].send_signal(signal.SIGCONT)

    async def _start(self, broken: str = "") -> None:
        number = next(self._numbers)
        is_mortal = number >= len(FIELDS)
        work = {
            "name": f"s{number}", "seed": number, "own": FIELDS[number % len(FIELDS)], "params": self._params,
            "passing": self.passing, "bound": self._bound, "history": str(self._folder / f"{number}.json"),
            "diary": str(self._folder / f"{number}.diary") if is_mortal else "",
            "broken": broken, "commit": self._commit,
        }  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.coherent_server", msgspec.json.encode(work).decode()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        self._stack.push_async_callback(_ended, process)
        self._processes.append(process)

    async def _tell(self, words: Sequence[str]) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(words) + b"\n")
            await process.stdin.drain()

    async def _heard(self) -> list[list[str]]:
        lines = []
        async with asyncio.timeout(GONE_SECONDS):
            for process in self._processes:
                assert process.stdout is not None
                lines.append(msgspec.json.decode(await process.stdout.readline(), type=list[str]))
        return lines


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@pytest.fixture
def run(tmp_path: Path, prefix: str) -> Run:
    numbers = itertools.count()

    async def run_them(
        params: dict[str, str],
        meanwhile: Meanwhile,
        broken: dict[int, str] | None = None,
        bound: float = BOUND,
        commit: Commit = "auto",
    ) -> Servers:
        servers = Servers(tmp_path, f"{prefix} {next(numbers)}", params, bound, commit)
        await servers.work(meanwhile, broken or {})
        return servers

    return run_them


async def nothing_happens(_: Servers) -> None:
    await asyncio.sleep(SECONDS)


def assert_coherent(servers: Servers, bound: float = BOUND) -> None:
    violations = check(servers.history, bound)
    assert not violations, "\n".join([f"{len(violations)} violations", *violations[:20]])
    hits, through = (sum(getattr(done, name) for done in servers.done) for name in ("hits", "through"))
    assert hits > 2 * through, "the caches had little part in it"
    for done in servers.done:
        assert done.state == "following"
        assert done.refused < len(done.history) / 10


@pytest_asyncio.fixture
async def own_pocketbase(tmp_path: Path) -> AsyncIterator[PocketBaseServer]:
    """One of a test's own, at an address that it keeps when it is started again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with PocketBaseServer(tmp_path / "pocketbase", port=port) as server:
        yield server


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=10) as client:
        yield client


async def test_servers_that_share_sessions_are_coherent(run: Run, pocketbase: PocketBaseServer) -> None:
    assert_coherent(await run(pocketbase.connection_params, nothing_happens))


@pytest.mark.soak
async def test_they_are_where_commits_are_batches(run: Run, own_pocketbase: PocketBaseServer) -> None:
    """And PocketBase's own events tell what they have changed."""
    assert_coherent(await run(own_pocketbase.connection_params, nothing_happens, commit="batch"))


@pytest.mark.soak
async def test_they_are_where_the_stream_of_batches_is_cut_again_and_again(
    run: Run, own_pocketbase: PocketBaseServer
) -> None:
    async with FaultProxy(own_pocketbase.url) as proxy:
        proxy.plan("GET", "/api/realtime", cut_at_piece(60), at=range(1, 13))
        params = own_pocketbase.connection_params | {"url": proxy.url}
        assert_coherent(await run(params, nothing_happens, commit="batch"))


@pytest.mark.soak
async def test_they_are_where_the_stream_delays_repeats_and_reorders(
    run: Run, pocketbase: PocketBaseServer, proxy: FaultProxy
) -> None:
    proxy.plan("GET", "/api/realtime", scrambled(1, SCRAMBLED), at=EVERY)
    params = pocketbase.connection_params | {"url": proxy.url}
    assert_coherent(await run(params, nothing_happens))


@pytest.mark.soak
async def test_they_are_where_the_stream_is_cut_again_and_again(
    run: Run, pocketbase: PocketBaseServer, proxy: FaultProxy
) -> None:
    proxy.plan("GET", "/api/realtime", cut_at_piece(60), at=range(1, 13))
    servers = await run(pocketbase.connection_params | {"url": proxy.url}, nothing_happens)
    assert proxy.count("GET", "/api/realtime") > 6
    assert_coherent(servers)


@pytest.mark.slow
async def test_servers_that_are_broken_on_purpose_are_found_out(run: Run, pocketbase: PocketBaseServer) -> None:
    """That a swap is ever read takes a reader at the right moment, which a short time of work need not bring."""
    broken = {1: "drops commits", 2: "swaps commits"}
    dropped: set[str] = set()
    swapped: set[str] = set()
    for _ in range(3):
        servers = await run(pocketbase.connection_params, nothing_happens, broken=broken)
        violations = check(servers.history, BOUND)
        assert not [v for v in violations if "s0's" in v], "and nobody else is blamed"
        dropped |= rules(v for v in violations if "s1's" in v)
        swapped |= rules(v for v in violations if "s2's" in v)
        if dropped & {"4", "5"} and "3" in swapped:
            break
    assert dropped & {"4", "5"}
    assert "3" in swapped


@pytest.mark.soak
async def test_they_are_where_pocketbase_stands_still_for_longer_than_answers_may_be_old(
    run: Run, own_pocketbase: PocketBaseServer
) -> None:
    async def stand_still(_: Servers) -> None:
        await asyncio.sleep(SECONDS / 3)
        os.kill(own_pocketbase.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(2 * MAX_STALENESS)
        finally:
            os.kill(own_pocketbase.pid, signal.SIGCONT)
        await asyncio.sleep(SECONDS / 2)

    assert_coherent(await run(own_pocketbase.connection_params, stand_still))


@pytest.mark.soak
@pytest.mark.parametrize("commit", ["log", "batch"])
async def test_they_are_where_servers_begin_in_the_middle_are_stopped_and_are_killed(
    run: Run, own_pocketbase: PocketBaseServer, commit: Commit
) -> None:
    async def come_and_go(servers: Servers) -> None:
        await servers.join()
        await servers.stop(0, 2 * MAX_STALENESS)
        await asyncio.sleep(SECONDS / 3)
        await servers.kill()
        await servers.join()
        await asyncio.sleep(SECONDS / 3)
        await servers.kill()
        await asyncio.sleep(SECONDS / 3)

    servers = await run(own_pocketbase.connection_params, come_and_go, commit=commit)
    assert {"s3", "s4"} <= {op.process for op in servers.history if op.end < NEVER}, "the killed have not written"
    assert_coherent(servers)


@pytest.mark.soak
async def test_they_are_where_pocketbase_is_killed_and_started_again(
    run: Run, own_pocketbase: PocketBaseServer
) -> None:
    async def kill(_: Servers) -> None:
        for _time in range(2):
            await asyncio.sleep(SECONDS / 3)
            os.kill(own_pocketbase.pid, signal.SIGKILL)
            await own_pocketbase.__aexit__(None, None, None)
            await own_pocketbase.__aenter__()
        await asyncio.sleep(SECONDS / 2)

    assert_coherent(await run(own_pocketbase.connection_params, kill))


@pytest.mark.soak
async def test_they_are_where_their_tokens_expire(
    run: Run, pocketbase: PocketBaseServer, http: httpx.AsyncClient, prefix: str
) -> None:
    account = Account(http, pocketbase.url, pocketbase.connection_params["admin_token"], f"{prefix}@example.org")
    await account.create()
    params = {"url": pocketbase.url, "admin_email": account.email, "admin_password": PASSWORD}

    async def expire(_: Servers) -> None:
        await asyncio.sleep(SECONDS / 3)
        await account.kill_tokens()
        await asyncio.sleep(2 * MAX_STALENESS)

    assert_coherent(await run(params, expire))


class Hand:
    """A person in the dashboard, say: changes records as PocketBase lets everybody do. Notes what it did."""

    def __init__(self, servers: Servers, http: httpx.AsyncClient, url: str) -> None:
        self._servers = servers
        self._http = http
        self._records = f"{url}/api/collections/{PREFIX}_sessions_{{}}/records"
        self._chance = random.Random(7)
        self._number = 0

    async def meddle(self) -> None:
        end = now() + SECONDS
        while now() < end:
            for meddle in (self._edit_a_session, self._add_and_delete_an_event, self._add_and_delete_a_session):
                self._number += 1
                await meddle(self._chance.choice(self._servers.sessions), f"hand-{self._number}")
                await asyncio.sleep(self._chance.uniform(0, 0.05))

    async def _edit_a_session(self, session: str, value: str) -> None:
        (record,) = await self._found("sessions", f"doc_id='{session}'")
        edit = {"title": msgspec.json.encode(value).decode(), "metadata": f'{{"note":"{value}"}}'}
        values = {session_key(session, "title"): value, session_key(session, "note"): value}
        await self._do("PATCH", "sessions", f"/{record['id']}", edit, values)

    async def _add_and_delete_an_event(self, session: str, value: str) -> None:
        if not (found := await self._found("events", f"session_id='{session}'", sort="-offset")):
            return
        offset = found[0]["offset"] + 1
        event = {**found[0], "doc_id": value, "offset": offset, "deleted": False}
        event |= {"data": f'{{"text":"{value}"}}', "metadata": f'{{"note":"{value}"}}'}
        values = {key_of(session, offset): value, note_key(session, offset): value}
        if added := await self._do("POST", "events", "", event, values):
            await asyncio.sleep(0.1)
            await self._do("DELETE", "events", f"/{added}", None, dict.fromkeys(values))

    async def _add_and_delete_a_session(self, session: str, value: str) -> None:
        (record,) = await self._found("sessions", f"doc_id='{session}'")
        made = {**record, "doc_id": value, "customer_id": self._servers.passing, "agent_id": value}
        made |= {"title": f'"{value}"', "metadata": f'{{"note":"{value}"}}', "consumption_offsets": '{"client":0}'}
        if added := await self._do("POST", "sessions", "", made, begun(value, self._servers.passing, value)):
            await asyncio.sleep(0.1)
            await self._do("DELETE", "sessions", f"/{added}", None, nothing(value))

    async def _found(self, collection: str, where: str, **params: str) -> list[Any]:
        answer = await self._http.get(self._records.format(collection), params={"filter": where, **params})
        return list(answer.raise_for_status().json()["items"])

    async def _do(
        self, method: str, collection: str, path: str, body: Any, values: Mapping[str, str | None]
    ) -> str:
        """The id of the record that was changed; empty where PocketBase refuses it, as it does what was written
        over a state that the hand has not seen."""
        content = None if body is None else {key: value for key, value in body.items() if key not in ("id", "rev")}
        begin = now()
        answer = await self._http.request(method, self._records.format(collection) + path, json=content)
        if answer.is_error:
            return ""
        self._servers.history.append(Op("hand", "write", begin, now(), values))
        return str(answer.json()["id"]) if answer.content else "-"


@pytest.mark.soak
async def test_they_are_where_foreign_hands_edit_add_and_delete_records(
    run: Run, pocketbase: PocketBaseServer
) -> None:
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(headers=headers, timeout=10) as http:

        async def meddle(servers: Servers) -> None:
            await Hand(servers, http, pocketbase.url).meddle()

        servers = await run(pocketbase.connection_params, meddle)
    assert sum(op.process == "hand" for op in servers.history) > 20
    assert_coherent(servers)
