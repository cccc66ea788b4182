"""While a stream says that it is connected, everything that is committed arrives; else it says that it is not, and
goes on trying (design: section 8)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
import tenacity

from pb_cached import PocketBaseServer
from pb_cached.config import Address, Credentials, PocketBaseSettings, Secret
from pb_cached.pocketbase import realtime
from pb_cached.pocketbase.aiohttp_client import AiohttpClient
from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.http import Http, Response, Streamed
from pb_cached.pocketbase.realtime import PATH, RealtimeStream, State, Timing
from pb_cached.pocketbase.server import find_binary
from pb_cached.telemetry import log_through
from tests.binaries import pocketbase_binary
from tests.faults import EVERY, Buffer, Exchange, Fault, FaultProxy, Gate, answer, cut_at_piece, doubled, lagging
from tests.test_client import Account

pytestmark = pytest.mark.slow

LOG = log_through(logging.getLogger("stream"))
QUICK = Timing(overlap=0.3)
NO_HTML = "in place of PocketBase's event stream"
IP_RULE = b'{"data":{},"message":"Invalid realtime client.","status":400}'
INSTALLED = "installed"


class News:
    """Lets a test wait for what it will be told."""

    def __init__(self) -> None:
        self.news = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.news.clear()
                await self.news.wait()


class Recorder(News):
    """The owner of a stream: keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.topics: list[frozenset[str]] = []
        self.numbers: list[int] = []

    def received(self, topic: str, data: bytes) -> None:
        self.numbers.append(msgspec.json.decode(data, type=dict[str, Any])["record"]["n"])
        self.news.set()

    def connected(self, topics: frozenset[str]) -> None:
        self.told.append("connected")
        self.topics.append(topics)
        self.news.set()

    def lost(self, reason: str) -> None:
        self.told.append("lost")
        self.news.set()

    async def until_told(self, *last: str) -> None:
        await self.until(lambda: tuple(self.told[-len(last) :]) == last)

    async def until_connected(self, times: int) -> None:
        await self.until(lambda: self.told.count("connected") >= times)

    async def until_all(self, numbers: set[int]) -> None:
        await self.until(lambda: numbers <= set(self.numbers))


class Lines(News, logging.Handler):
    """What a stream writes into the log."""

    def __init__(self) -> None:
        News.__init__(self)
        logging.Handler.__init__(self)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.news.set()

    async def until_said(self, words: str, *, times: int) -> None:
        """Until these words were logged so many times, and then: as a warning only once."""
        await self.until(lambda: len(self._levels(words)) >= times)
        first, *others = self._levels(words)
        assert (first, set(others)) == ("WARNING", {"DEBUG"} if others else set())

    def _levels(self, words: str) -> list[str]:
        return [record.levelname for record in self.records if words in record.getMessage()]


class Notes:
    """A collection of one test's own. It writes past every proxy."""

    def __init__(self, server: PocketBaseServer, http: httpx.AsyncClient, name: str) -> None:
        self.topic = f"{name}/*"
        self.written: set[int] = set()
        self._name = name
        self._http = http
        self._url = server.url
        self._headers = {"Authorization": server.connection_params["admin_token"]}

    async def create(self) -> None:
        fields = [{"name": "n", "type": "number"}]
        await self._post("/api/collections", {"name": self._name, "type": "base", "fields": fields})

    async def write(self) -> None:
        number = len(self.written) + 1
        self.written.add(number)
        await self._post(f"/api/collections/{self._name}/records", {"n": number})

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        answered = await self._http.post(self._url + path, json=body, headers=self._headers)
        assert answered.status_code == 200, answered.text

    @asynccontextmanager
    async def being_written(self) -> AsyncIterator[None]:
        """Meanwhile three writers write as fast as they can."""
        over = False

        async def write_on() -> None:
            while not over:
                await self.write()

        writers = [asyncio.create_task(write_on()) for _ in range(3)]
        try:
            yield
        finally:
            over = True
            await asyncio.gather(*writers)


class Counting:
    """A client that counts its streams, each from its request to when its connection is given back."""

    def __init__(self, client: Http) -> None:
        self._client = client
        self.open = self.most = self.all = 0
        self.may_close = asyncio.Event()
        self.may_close.set()

    @property
    def timeout(self) -> httpx.Timeout:
        return self._client.timeout

    @property
    def is_closed(self) -> bool:
        return self._client.is_closed

    async def request(self, method: str, url: str, **more: Any) -> Response:
        return await self._client.request(method, url, **more)

    @asynccontextmanager
    async def stream(
        self, method: str, url: str, *, headers: Mapping[str, str], timeout: httpx.Timeout
    ) -> AsyncIterator[Streamed]:
        self.open += 1
        self.all += 1
        self.most = max(self.most, self.open)
        try:
            async with self._client.stream(method, url, headers=headers, timeout=timeout) as streamed:
                try:
                    yield streamed
                finally:
                    await self.may_close.wait()
        finally:
            self.open -= 1

    async def aclose(self) -> None:
        await self._client.aclose()


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="session",
    params=[
        INSTALLED,
        pytest.param("0.23.12", marks=pytest.mark.slow),
        pytest.param("0.36.9", marks=pytest.mark.slow),
    ],
)
async def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[PocketBaseServer]:
    """A server of each version in turn."""
    version = request.param
    binary = find_binary() if version == INSTALLED else pocketbase_binary(version, request.config)
    async with PocketBaseServer(tmp_path_factory.mktemp(f"v{version}"), binary=binary) as running:
        yield running


@pytest_asyncio.fixture
async def writing() -> AsyncIterator[httpx.AsyncClient]:
    """What tests write with; a stream has an HTTP client of its own."""
    async with httpx.AsyncClient(verify=False, timeout=30) as opened:
        yield opened


CLIENTS: dict[str, Callable[[httpx.Limits, httpx.Timeout], Http]] = {
    "a caller's": lambda limits, timeout: httpx.AsyncClient(verify=False, limits=limits, timeout=timeout),
    "aiohttp": lambda limits, timeout: AiohttpClient(ssl.create_default_context(), limits, timeout, {}),
}


@pytest.fixture
def client(request: pytest.FixtureRequest) -> str:
    """Whose connections they are: a caller's, too, where a test is marked to try both."""
    return str(getattr(request, "param", "aiohttp"))


by_both_clients = pytest.mark.parametrize("client", CLIENTS, indirect=True)


@pytest_asyncio.fixture
async def streams(client: str) -> AsyncIterator[Counting]:
    """What streams are opened with. No test leaves one open."""
    counting = Counting(CLIENTS[client](httpx.Limits(), httpx.Timeout(5)))
    yield counting
    assert counting.open == 0
    await counting.aclose()


@pytest.fixture
def http(streams: Counting) -> Http:
    return streams


@pytest_asyncio.fixture
async def notes(pocketbase: PocketBaseServer, writing: httpx.AsyncClient, prefix: str) -> Notes:
    made = Notes(pocketbase, writing, f"{prefix}_notes")
    await made.create()
    return made


@pytest.fixture
def owner() -> Recorder:
    return Recorder()


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, lines = logging.getLogger("stream"), Lines()
    logger.setLevel(logging.DEBUG)
    logger.addHandler(lines)
    yield lines
    logger.removeHandler(lines)


StreamMaker = Callable[..., RealtimeStream]


@pytest.fixture
def make_stream(
    http: httpx.AsyncClient, pocketbase: PocketBaseServer, proxy: FaultProxy, owner: Recorder
) -> StreamMaker:
    """Makes streams that come through the proxy."""

    def make(timing: Timing = QUICK, credentials: Credentials | None = None, **other: Any) -> RealtimeStream:
        token = Credentials(token=Secret(pocketbase.connection_params["admin_token"]))
        address = Address(proxy.url, credentials or token)
        client = PocketBaseClient(other.get("http", http), address, PocketBaseSettings(), LOG)
        return RealtimeStream(client, other.get("owner", owner), LOG, timing)

    return make


# nothing is missed


async def test_nothing_is_lost_while_streams_are_replaced_under_load(
    server: PocketBaseServer,
    http: httpx.AsyncClient,
    writing: httpx.AsyncClient,
    streams: Counting,
    owner: Recorder,
    prefix: str,
) -> None:
    notes, others = (Notes(server, writing, f"{prefix}_{name}") for name in ("notes", "others"))
    await notes.create()
    await others.create()
    address = Address(server.url, Credentials(token=Secret(server.connection_params["admin_token"])))
    client = PocketBaseClient(http, address, PocketBaseSettings(), LOG)
    async with RealtimeStream(client, owner, LOG, QUICK) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        async with notes.being_written():
            for times in range(2, 6):
                stream.replace("the test asks for it")
                await owner.until_connected(times)
            for times in range(6, 11):  # each during the overlap after the one before
                stream.subscribe([notes.topic, others.topic] if times % 2 == 0 else [notes.topic])
                await owner.until_connected(times)
        await owner.until_all(notes.written)
        assert owner.told == ["connected"] * 10
        assert owner.topics[-1] == {notes.topic, others.topic}
    assert len(notes.written) > 100
    assert streams.most == 2


async def test_updates_and_deletions_arrive_as_pocketbase_sent_them(
    make_stream: StreamMaker,
    owner: Recorder,
    notes: Notes,
    pocketbase: PocketBaseServer,
    writing: httpx.AsyncClient,
) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []

    class Keeper(Recorder):
        def received(self, topic: str, data: bytes) -> None:
            sent.append((topic, msgspec.json.decode(data)))
            super().received(topic, data)

    keeper = Keeper()
    async with make_stream(owner=keeper) as stream:
        stream.subscribe([notes.topic])
        await keeper.until_connected(1)
        await notes.write()
        await keeper.until(lambda: len(sent) == 1)
        record = sent[0][1]["record"]
        url = f"{pocketbase.url}/api/collections/{record['collectionName']}/records/{record['id']}"
        headers = {"Authorization": pocketbase.connection_params["admin_token"]}
        await writing.patch(url, json={"n": 5}, headers=headers)
        await keeper.until(lambda: len(sent) == 2)
        await writing.delete(url, headers=headers)
        await keeper.until(lambda: len(sent) == 3)
    assert [(topic, message["action"], message["record"]["n"]) for topic, message in sent] == [
        (notes.topic, "create", 1),
        (notes.topic, "update", 5),
        (notes.topic, "delete", 5),
    ]


async def test_what_was_on_its_way_to_the_old_stream_is_read(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes
) -> None:
    buffer = Buffer(passed=2)
    proxy.plan("GET", PATH, buffer)
    async with make_stream(Timing(overlap=60)) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        await notes.write()
        await buffer.keeps.wait()
        stream.replace("the test asks for it")
        await owner.until_connected(2)
        assert owner.numbers == []
        buffer.open()
        await owner.until_all({1})
        assert stream.state is State.OVERLAPPING


async def test_the_old_stream_is_left_when_the_overlap_is_over(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes
) -> None:
    async with make_stream() as stream:
        states = [stream.state]
        stream.subscribe([notes.topic])
        states.append(stream.state)
        await owner.until_connected(1)
        states.append(stream.state)
        stream.replace("the test asks for it")
        states.append(stream.state)
        await owner.until_connected(2)
        states.append(stream.state)
        first, second = proxy.matching("GET", PATH)
        await first.finished.wait()
        states.append(stream.state)
        assert not second.finished.is_set()
    assert owner.told == ["connected", "connected"]
    assert [*states, stream.state] == [
        *(State.IDLE, State.CONNECTING, State.LIVE, State.REPLACING, State.OVERLAPPING, State.LIVE),
        State.CLOSED,
    ]


@pytest.mark.parametrize("timing", [Timing(age=0.3, overlap=0.1), Timing(idle=0.3, overlap=0.1)])
async def test_a_stream_is_replaced_before_pocketbase_ends_it(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes, timing: Timing
) -> None:
    async with make_stream(timing) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(4)
        await notes.write()
        await owner.until_all(notes.written)
    assert "lost" not in owner.told


@pytest.mark.slow
async def test_a_stream_on_which_something_comes_is_not_idle(
    make_stream: StreamMaker, streams: Counting, owner: Recorder, notes: Notes
) -> None:
    async with make_stream(Timing(idle=5.0)) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        async with notes.being_written(), asyncio.timeout(20):
            end = asyncio.get_running_loop().time() + 6.0
            await owner.until(lambda: asyncio.get_running_loop().time() > end)
        assert owner.told == ["connected"]
    assert streams.all == 1


@pytest.mark.parametrize("fault", [doubled, lagging(0.05)])
async def test_a_stream_that_repeats_or_lags_loses_nothing(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes, fault: Fault
) -> None:
    proxy.plan("GET", PATH, fault, at=EVERY)
    async with make_stream() as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        for _ in range(10):
            await notes.write()
        await owner.until_all(notes.written)
    assert owner.told == ["connected"]


# topics


@by_both_clients
async def test_topics_that_change_often_need_two_connections_in_all(
    make_stream: StreamMaker, streams: Counting, owner: Recorder, notes: Notes
) -> None:
    async with make_stream(Timing(overlap=60)) as stream:
        topics = [notes.topic]
        stream.subscribe(topics)
        await owner.until_connected(1)
        for number in range(10):
            topics.append(f"another{number}/*")
            stream.subscribe(topics)
            await owner.until(lambda: owner.topics[-1] == set(topics))
        await notes.write()
        await owner.until_all({1})
    assert streams.all == 2
    assert owner.told == ["connected"] * 11


async def test_a_stream_that_was_replaced_in_doubt_never_leads_again(
    make_stream: StreamMaker, streams: Counting, owner: Recorder, notes: Notes
) -> None:
    async with make_stream() as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        stream.replace("the test asks for it")
        await owner.until_connected(2)
        stream.subscribe([notes.topic, "other/*"])
        await owner.until_connected(3)
        assert streams.all == 3
    assert streams.most == 2


async def test_a_connection_counts_until_it_is_closed(
    make_stream: StreamMaker, streams: Counting, owner: Recorder
) -> None:
    async with make_stream() as stream:
        stream.subscribe(["any/*"])
        await owner.until_connected(1)
        stream.replace("the test asks for it")
        await owner.until_connected(2)
        streams.may_close.clear()
        stream.subscribe([])
        stream.subscribe(["any/*"])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await owner.until_connected(3)
        streams.may_close.set()
        await owner.until_connected(3)
    assert streams.most == 2


async def test_without_topics_there_is_no_stream(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes
) -> None:
    async with make_stream() as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        stream.subscribe([])
        assert stream.state is State.IDLE
        await proxy.matching("GET", PATH)[0].finished.wait()
        stream.subscribe([notes.topic])
        await owner.until_connected(2)
        await notes.write()
        await owner.until_all({1})
    assert "lost" not in owner.told


# losses


@by_both_clients
async def test_a_stream_that_is_cut_is_lost_and_connected_anew(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes
) -> None:
    async with make_stream() as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        proxy.matching("GET", PATH)[0].hang_up()
        await owner.until_told("lost", "connected")
        await notes.write()
        await owner.until_all({1})


async def test_half_a_message_is_a_loss_and_no_message(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes
) -> None:
    proxy.plan("GET", PATH, cut_at_piece(2))
    async with make_stream() as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        await notes.write()
        await owner.until_told("lost", "connected")
    assert owner.numbers == []


@pytest.mark.parametrize("index", [0, 1])
async def test_either_of_two_streams_that_ends_is_a_loss(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes, index: int
) -> None:
    async with make_stream(Timing(overlap=60)) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        stream.replace("the test asks for it")
        await owner.until_connected(2)
        proxy.matching("GET", PATH)[index].hang_up()
        await owner.until_told("connected", "connected", "lost", "connected")
        await notes.write()
        await owner.until_all({1})


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After how many failures in a row a pause was made; here it takes no time."""
    made: list[int] = []

    def pause(state: tenacity.RetryCallState) -> float:
        made.append(state.attempt_number)
        return 0.0

    monkeypatch.setattr(realtime, "_PAUSES", pause)
    return made


@pytest.mark.parametrize(("steady", "expected"), [(60.0, [1, 2, 3, 4]), (0.0, [])])
async def test_pauses_grow_where_streams_end_soon_and_there_is_none_after_a_long_one(
    make_stream: StreamMaker,
    proxy: FaultProxy,
    owner: Recorder,
    pauses: list[int],
    steady: float,
    expected: list[int],
) -> None:
    async def cut_when_subscribed(exchange: Exchange) -> None:
        await exchange.forward()
        proxy.matching("GET", PATH)[-1].hang_up()

    proxy.plan("POST", PATH, cut_when_subscribed, at=range(1, 6))
    async with make_stream(Timing(steady=steady)) as stream:
        stream.subscribe(["any/*"])
        await owner.until(lambda: owner.told.count("connected") == 6)
    assert pauses == expected


async def test_the_first_attempt_after_a_loss_is_made_at_once_and_those_after_it_ever_later(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, pauses: list[int]
) -> None:
    async with make_stream() as stream:
        stream.subscribe(["any/*"])
        await owner.until_connected(1)
        proxy.plan("GET", PATH, answer(503), at=(2, 3, 4))
        proxy.matching("GET", PATH)[0].hang_up()
        await owner.until_connected(2)
        proxy.matching("GET", PATH)[-1].hang_up()
        await owner.until_connected(3)
    assert proxy.count("GET", PATH) == 6
    assert pauses[0] == 1 and pauses == sorted(pauses)


async def test_a_pocketbase_that_is_killed_is_followed_again_when_it_is_back(
    make_stream: StreamMaker, owner: Recorder, writing: httpx.AsyncClient, folder: Path, proxy: FaultProxy
) -> None:
    async with PocketBaseServer(folder) as server:
        proxy.server = server.url
        notes = Notes(server, writing, "notes")
        await notes.create()
        token = Credentials(token=Secret(server.connection_params["admin_token"]))
        stream = make_stream(credentials=token)
        await stream.__aenter__()
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        os.kill(server.pid, signal.SIGKILL)
        await owner.until_told("lost")
    async with PocketBaseServer(folder) as server:
        proxy.server = server.url
        await owner.until_told("lost", "connected")
        notes = Notes(server, writing, "notes")
        await notes.write()
        await owner.until_all({1})
        await stream.aclose()
    assert owner.told == ["connected", "lost", "connected"]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs signals")
async def test_a_pocketbase_that_stands_still_costs_nothing_that_it_commits_afterwards(
    owner: Recorder,
    http: httpx.AsyncClient,
    writing: httpx.AsyncClient,
    folder: Path,
    lines: Lines,
) -> None:
    async with PocketBaseServer(folder) as server:
        notes = Notes(server, writing, "notes")
        await notes.create()
        address = Address(server.url, Credentials(token=Secret(server.connection_params["admin_token"])))
        client = PocketBaseClient(http, address, PocketBaseSettings(), LOG)
        async with RealtimeStream(client, owner, LOG, Timing(opening=0.2, overlap=0.3)) as stream:
            stream.subscribe([notes.topic])
            await owner.until_connected(1)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                stream.replace("no heartbeat")
                await lines.until_said("gave no usable answer", times=2)
                assert stream.state is State.REPLACING
                write = asyncio.create_task(notes.write())
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await write
            await owner.until_all({1})
            await owner.until_connected(2)
            await notes.write()
            await owner.until_all({1, 2})
        assert owner.told == ["connected", "connected"]


@by_both_clients
async def test_a_stream_that_is_silent_for_too_long_is_lost(
    make_stream: StreamMaker, owner: Recorder, notes: Notes
) -> None:
    async with make_stream(Timing(silence=0.2)) as stream:
        stream.subscribe([notes.topic])
        await owner.until_told("lost", "connected")


async def test_an_owner_that_fails_has_lost_something_and_ends_nothing(
    make_stream: StreamMaker, notes: Notes
) -> None:
    class Failing(Recorder):
        def received(self, topic: str, data: bytes) -> None:
            super().received(topic, data)
            if self.numbers == [1]:
                raise RuntimeError("a bug")

        def connected(self, topics: frozenset[str]) -> None:
            super().connected(topics)
            if len(self.topics) == 1:
                raise RuntimeError("a bug")

    owner = Failing()
    async with make_stream(owner=owner) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        await notes.write()
        await owner.until_told("connected", "lost", "connected")
        await notes.write()
        await owner.until_all({1, 2})


# who we are


async def test_a_dead_token_is_replaced_before_it_makes_us_a_guest(
    make_stream: StreamMaker,
    owner: Recorder,
    notes: Notes,
    pocketbase: PocketBaseServer,
    writing: httpx.AsyncClient,
    prefix: str,
) -> None:
    token = pocketbase.connection_params["admin_token"]
    account = Account(writing, pocketbase.url, token, f"{prefix}@example.org")
    await account.create()
    async with make_stream(credentials=account.credentials) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        await account.kill_tokens()
        stream.replace("no heartbeat")
        await owner.until_connected(2)
        assert stream.state is State.OVERLAPPING
        await notes.write()
        await owner.until_all({1})


async def test_a_token_that_cannot_be_replaced_is_said_to_be_refused(
    make_stream: StreamMaker, owner: Recorder, notes: Notes, lines: Lines
) -> None:
    async with make_stream(credentials=Credentials(token=Secret("dead"))) as stream:
        stream.subscribe([notes.topic])
        await lines.until_said("does not accept the token as a superuser's", times=2)
        assert stream.state is State.CONNECTING
    assert owner.told == []


# what is said, once, while it is tried on


@by_both_clients
@pytest.mark.parametrize(
    ("method", "fault", "words"),
    [
        ("POST", lambda: answer(400, IP_RULE), "must come from the same IP address"),
        ("POST", lambda: answer(403), "PocketBase answered 403"),
        ("POST", lambda: answer(404), "is it several behind one address?"),
        ("POST", lambda: answer(500, b"<html>"), "does not answer like PocketBase"),
        ("GET", lambda: answer(200, b"<html>", "text/html"), f"status 200 and 'text/html' {NO_HTML}"),
        ("GET", lambda: answer(429), f"status 429 and 'application/json' {NO_HTML}"),
        ("GET", lambda: answer(200, b"data:{}\n\n", "text/event-stream"), "ended the stream"),
        ("GET", lambda: answer(200, b"event:PB_CONNECT\ndata:{}\n\n", "text/event-stream"), "clientId"),
        ("GET", lambda: answer(200, b"event:PB_CONNECT\ndata:<>\n\n", "text/event-stream"), "DecodeError"),
        ("GET", lambda: Buffer(passed=1), "is there a proxy that buffers?"),
        ("GET", lambda: Buffer(passed=0), "no answer"),
        ("GET", Gate, "no answer"),
        ("GET", lambda: cut_at_piece(0), "RemoteProtocolError"),
        ("POST", Gate, "gave no usable answer within"),
    ],
)
async def test_trouble_is_said_once_and_ends_when_its_cause_does(
    make_stream: StreamMaker,
    proxy: FaultProxy,
    owner: Recorder,
    notes: Notes,
    lines: Lines,
    method: str,
    fault: Callable[[], Fault],
    words: str,
) -> None:
    proxy.plan(method, PATH, fault(), at=EVERY)
    async with make_stream(Timing(opening=0.3)) as stream:
        stream.subscribe([notes.topic])
        await lines.until_said(words, times=3)
        assert owner.told == []
        proxy.forget_plans()
        await owner.until_connected(1)
        await notes.write()
        await owner.until_all({1})


async def test_a_replacement_that_is_refused_leaves_the_stream_as_it_is(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes, lines: Lines
) -> None:
    async with make_stream() as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        proxy.plan("POST", PATH, answer(400), at=EVERY)
        stream.replace("the test asks for it")
        await lines.until_said("no realtime stream", times=3)
        await notes.write()
        await owner.until_all({1})
        proxy.forget_plans()
        await owner.until_connected(2)
    assert owner.told == ["connected", "connected"]


async def test_an_older_stream_that_is_not_subscribed_again_is_not_needed(
    make_stream: StreamMaker, proxy: FaultProxy, streams: Counting, owner: Recorder, notes: Notes
) -> None:
    async with make_stream() as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        stream.subscribe([notes.topic, "one/*"])
        await owner.until_connected(2)
        proxy.plan("POST", PATH, answer(403))
        stream.subscribe([notes.topic, "two/*"])
        await owner.until_connected(3)
        assert streams.all == 3
        await notes.write()
        await owner.until_all({1})
    assert "lost" not in owner.told


@asynccontextmanager
async def client_of(client: str, connections: int) -> AsyncIterator[Http]:
    limits, timeout = httpx.Limits(max_connections=connections), httpx.Timeout(30, pool=None)
    async with aclosing(CLIENTS[client](limits, timeout)) as opened:
        yield opened


@by_both_clients
async def test_one_connection_is_too_few_and_leaves_the_others_to_their_requests(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes, lines: Lines, client: str
) -> None:
    async with (
        client_of(client, 1) as http,
        make_stream(Timing(connection=0.1, starved=60), http=http) as stream,
    ):
        stream.subscribe([notes.topic])
        await lines.until_said("allow the HTTP client at least three (max_connections)", times=1)
        for _ in range(10):
            assert (await http.request("GET", f"{proxy.url}/api/health")).status_code == 200
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await lines.until(lambda: proxy.count("GET", PATH) > 1)
        stream.replace("the test asks for it")
        await lines.until_said("allow the HTTP client at least three (max_connections)", times=2)
    assert owner.told == []


@by_both_clients
async def test_with_two_connections_a_stream_is_replaced_with_a_loss_that_is_told(
    make_stream: StreamMaker, proxy: FaultProxy, owner: Recorder, notes: Notes, lines: Lines, client: str
) -> None:
    async with client_of(client, 2) as http, make_stream(Timing(connection=0.1), http=http) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        stream.replace("the test asks for it")
        await owner.until_told("connected", "lost", "connected")
        await lines.until_said("allow the HTTP client at least three (max_connections)", times=1)
        await notes.write()
        await owner.until_all({1})


async def test_a_hook_that_reads_what_it_is_given_does_not_stop_the_stream(
    make_stream: StreamMaker, owner: Recorder, notes: Notes
) -> None:
    hooks = {"response": [httpx.Response.aread]}
    async with httpx.AsyncClient(verify=False, event_hooks=hooks) as http, make_stream(http=http) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)


async def test_an_http_client_that_was_closed_is_said_to_be_closed(
    make_stream: StreamMaker, owner: Recorder, notes: Notes, lines: Lines
) -> None:
    async with httpx.AsyncClient(verify=False) as http, make_stream(http=http) as stream:
        stream.subscribe([notes.topic])
        await owner.until_connected(1)
        await http.aclose()
        await owner.until_told("connected", "lost")
        await lines.until_said("http_client that the database was given is closed", times=2)


# the end


async def while_it_waits_for_a_stream(proxy: FaultProxy, stream: RealtimeStream, owner: Recorder) -> None:
    gate = Gate()
    proxy.plan("GET", PATH, gate)
    stream.subscribe(["any/*"])
    await gate.reached.wait()


async def while_it_waits_for_its_name(proxy: FaultProxy, stream: RealtimeStream, owner: Recorder) -> None:
    buffer = Buffer(passed=1)
    proxy.plan("GET", PATH, buffer)
    stream.subscribe(["any/*"])
    await buffer.keeps.wait()


async def while_it_subscribes(proxy: FaultProxy, stream: RealtimeStream, owner: Recorder) -> None:
    gate = Gate()
    proxy.plan("POST", PATH, gate)
    stream.subscribe(["any/*"])
    await gate.reached.wait()


async def while_it_tries_again(proxy: FaultProxy, stream: RealtimeStream, owner: Recorder) -> None:
    proxy.plan("POST", PATH, answer(400), at=EVERY)
    stream.subscribe(["any/*"])
    gate = Gate()
    proxy.plan("GET", "/api/collections?", gate, at=(4,))
    await gate.reached.wait()


async def while_it_lives(proxy: FaultProxy, stream: RealtimeStream, owner: Recorder) -> None:
    stream.subscribe(["any/*"])
    await owner.until_connected(1)


async def while_it_is_replaced(proxy: FaultProxy, stream: RealtimeStream, owner: Recorder) -> None:
    await while_it_lives(proxy, stream, owner)
    gate = Gate()
    proxy.plan("POST", PATH, gate)
    stream.replace("the test asks for it")
    await gate.reached.wait()


async def while_two_overlap(proxy: FaultProxy, stream: RealtimeStream, owner: Recorder) -> None:
    await while_it_lives(proxy, stream, owner)
    stream.replace("the test asks for it")
    await owner.until_connected(2)


async def while_the_older_is_subscribed_again(proxy: FaultProxy, stream: RealtimeStream, owner: Recorder) -> None:
    await while_it_lives(proxy, stream, owner)
    stream.subscribe(["other/*"])
    await owner.until_connected(2)
    gate = Gate()
    proxy.plan("POST", PATH, gate)
    stream.subscribe(["third/*"])
    await gate.reached.wait()


async def when_nothing_was_asked_for(proxy: FaultProxy, stream: RealtimeStream, owner: Recorder) -> None:
    await asyncio.sleep(0)


MOMENTS = [
    when_nothing_was_asked_for,
    while_it_waits_for_a_stream,
    while_it_waits_for_its_name,
    while_it_subscribes,
    while_it_tries_again,
    while_it_lives,
    while_it_is_replaced,
    while_two_overlap,
    while_the_older_is_subscribed_again,
]


@by_both_clients
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("cancelled", [False, True])
async def test_closing_at_any_moment_leaves_no_task_no_connection_and_tells_nothing(
    make_stream: StreamMaker,
    proxy: FaultProxy,
    streams: Counting,
    owner: Recorder,
    moment: Callable[[FaultProxy, RealtimeStream, Recorder], Awaitable[None]],
    cancelled: bool,
) -> None:
    reached = asyncio.Event()

    async def use() -> None:
        async with make_stream(Timing(overlap=60)) as stream:
            await moment(proxy, stream, owner)
            reached.set()
            if cancelled:
                await asyncio.Event().wait()

    using = asyncio.create_task(use())
    await reached.wait()
    told = list(owner.told)
    if cancelled:
        using.cancel()
    await asyncio.wait([using])
    assert streams.open == 0
    assert owner.told == told
    assert not [task for task in asyncio.all_tasks() if "RealtimeStream" in repr(task.get_coro())]
