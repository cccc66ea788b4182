"""A streamed message is written now and then while it grows, and whole when it is complete; and whoever reads it
here never learns of that (design: section 7)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Final, cast

import httpx
import pytest
import pytest_asyncio
from parlant.core.agents import AgentId
from parlant.core.async_utils import Timeout
from parlant.core.common import ItemNotFoundError, JSONSerializable
from parlant.core.customers import CustomerId
from parlant.core.engines.alpha.prompt_builder import PromptBuilder
from parlant.core.nlp.generation import StreamingTextGenerationResult, StreamingTextGenerator
from parlant.core.nlp.generation_info import GenerationInfo, UsageInfo
from parlant.core.nlp.service import StreamingTextGeneratorHints
from parlant.core.nlp.tokenization import EstimatingTokenizer
from parlant.core.sessions import Event, EventKind, EventSource, Session, SessionId
from typing_extensions import override

from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.cli.demo.nlp import DeterministicNLP, Tokenizer
from pb_cached.config import CoherenceSettings, StoreSettings, WriteSettings
from pb_cached.errors import DocumentTooLarge, InvalidDocument, NotCommitted, OutcomeUnknown, PocketBaseUnavailable
from pb_cached.stores import Stores, deletions, streaming
from tests.conftest import EXCLUSIVE
from tests.faults import EVERY, Exchange, FaultProxy, Gate, Withheld, delay
from tests.parlant_server import RunningServer, Talk, parlant_server, sdk

pytestmark = pytest.mark.slow  # each opens stores of its own

NEVER: Final = 60.0
"""An interval that does not end while a test runs."""
PATIENCE: Final = 30.0
OFF: Final = CoherenceSettings(mode="off")

OpenServer = Callable[..., AbstractAsyncContextManager[Stores]]


@pytest.fixture(params=[OFF, EXCLUSIVE], ids=["no cache", "cache"])
def coherence(request: pytest.FixtureRequest) -> CoherenceSettings:
    return cast(CoherenceSettings, request.param)


@pytest.fixture(autouse=True)
def no_commits_but_a_tests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests share the collections, and the notes of sessions that one has deleted stay for the others."""
    monkeypatch.setattr(deletions, "LATE_SECONDS", 3600.0)


@pytest_asyncio.fixture
async def open_server(proxy: FaultProxy, pocketbase: PocketBaseServer) -> AsyncIterator[OpenServer]:
    """Opens the stores as one more server does: with a connection, a queue and a cache of its own."""
    async with AsyncExitStack() as stack:

        def open_them(
            interval: float = NEVER, logger: logging.Logger | None = None, **sections: Any
        ) -> AbstractAsyncContextManager[Stores]:
            http = httpx.AsyncClient(timeout=30, trust_env=False)
            stack.push_async_callback(http.aclose)
            settings = StoreSettings(
                session_prefix="streaming_sessions",
                customer_prefix="streaming_customers",
                variable_prefix="streaming_variables",
                streaming_interval=interval,
            )
            return open_stores(
                Config(stores=settings, **sections),
                logger=logger,
                connection_params=pocketbase.connection_params | {"url": proxy.url},
                http_client=http,
            )

        yield open_them


@pytest_asyncio.fixture
async def stores(open_server: OpenServer, coherence: CoherenceSettings) -> AsyncIterator[Stores]:
    async with open_server(coherence=coherence) as opened:
        yield opened


@pytest.fixture
def stored(pocketbase: PocketBaseServer) -> Callable[[Event], Any]:
    """What PocketBase has of an event: its chunks, and how often it was written."""

    async def look(event: Event) -> tuple[list[str | None], int]:
        headers = {"Authorization": pocketbase.connection_params["admin_token"]}
        async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers, trust_env=False) as http:
            path = "/api/collections/streaming_sessions_events/records"
            answer = await http.get(path, params={"filter": f"doc_id = '{event.id}'"})
        (record,) = answer.raise_for_status().json()["items"]
        return httpx.Response(200, content=record["data"]).json()["chunks"], record["rev"]

    return look


class Stream:
    """A streamed message, written as Parlant does: in the same list of chunks, which it goes on to fill."""

    def __init__(self, stores: Stores, session: Session) -> None:
        self.stores = stores
        self.session = session
        self.chunks: list[str | None] = []
        self.event: Event

    @property
    def data(self) -> JSONSerializable:
        text = "".join(chunk for chunk in self.chunks if isinstance(chunk, str))
        return {"message": text, "participant": {"id": "robin"}, "chunks": cast(Any, self.chunks)}

    async def begin(self, *chunks: str) -> Event:
        self.chunks += chunks
        self.event = await self.stores.session_store.create_event(
            self.session.id, EventSource.AI_AGENT, EventKind.MESSAGE, "trace", self.data
        )
        return self.event

    async def go_on(self, *chunks: str | None) -> Event:
        self.chunks += chunks
        return await self.stores.session_store.update_event(self.session.id, self.event.id, {"data": self.data})

    async def read(self) -> list[str | None]:
        """What a reader gets, whichever way it asks."""
        store = self.stores.session_store
        event = await store.read_event(self.session.id, self.event.id)
        assert event in await store.list_events(self.session.id, exclude_deleted=False)
        assert event in await store.list_events(
            self.session.id, kinds=[EventKind.MESSAGE], min_offset=event.offset, exclude_deleted=False
        )
        data = cast(Mapping[str, Any], event.data)
        assert data["message"] == "".join(chunk or "" for chunk in data["chunks"])
        return list(data["chunks"])


@pytest_asyncio.fixture
async def stream(stores: Stores) -> Stream:
    """One that has begun with the chunk "a"."""
    stream = Stream(stores, await begin(stores))
    await stream.begin("a")
    return stream


class Commits:
    """Lets all commits pass, and tells of each."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._made = asyncio.Event()
        proxy.plan("POST", "/api/", self, at=EVERY)

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.forward()
        self._made.set()

    async def until(self, stored: Any, event: Event, chunks: Sequence[str | None]) -> int:
        """Return when PocketBase has these chunks of the event: how often it was written by then."""
        async with asyncio.timeout(PATIENCE):
            while True:
                has, written = await stored(event)
                if has == chunks:
                    return int(written)
                await self._made.wait()
                self._made.clear()


async def begin(stores: Stores) -> Session:
    return await stores.session_store.create_session(CustomerId("ida"), AgentId("robin"))


async def say(stores: Stores, session: Session, data: Any = "hello") -> Event:
    return await stores.session_store.create_event(
        session.id, EventSource.CUSTOMER, EventKind.MESSAGE, "trace", data
    )


async def test_a_chunk_is_read_here_before_it_is_written(stream: Stream, stored: Any) -> None:
    updated = await stream.go_on("b")
    assert cast(Any, updated.data)["chunks"] == ["a", "b"]
    await stream.go_on("c")
    assert await stream.read() == ["a", "b", "c"]
    assert await stored(stream.event) == (["a"], 1)


async def test_the_last_chunk_is_written_before_it_is_acknowledged(stream: Stream, stored: Any) -> None:
    await stream.go_on("b")
    await stream.go_on(None)
    assert await stored(stream.event) == (["a", "b", None], 2)
    assert await stream.read() == ["a", "b", None]


async def test_chunks_are_written_when_the_interval_has_passed(
    open_server: OpenServer, proxy: FaultProxy, stored: Any
) -> None:
    commits = Commits(proxy)
    async with open_server(interval=0.1) as stores:
        stream = Stream(stores, await begin(stores))
        await stream.begin("a")
        for chunk in "bcdef":
            await stream.go_on(chunk)
        assert await commits.until(stored, stream.event, [*"abcdef"]) <= 3


async def test_a_stream_is_written_at_most_once_an_interval_and_twice_more(
    open_server: OpenServer, stored: Any
) -> None:
    interval = 0.05
    async with open_server(interval) as stores:
        stream = Stream(stores, await begin(stores))
        begun = time.monotonic()
        await stream.begin("a")
        for number in range(100):
            await stream.go_on(str(number))
            await asyncio.sleep(0.002)  # the language model
        await stream.go_on(None)
        duration = time.monotonic() - begun
        _, written = await stored(stream.event)
    assert written <= duration / interval + 2


async def test_with_an_interval_of_zero_each_chunk_is_written_before_it_is_acknowledged(
    open_server: OpenServer, stored: Any
) -> None:
    async with open_server(interval=0) as stores:
        stream = Stream(stores, await begin(stores))
        await stream.begin("a")
        for number in range(2, 5):
            await stream.go_on("b")
            assert (await stored(stream.event))[1] == number


async def test_the_sessions_next_event_is_written_after_the_chunks_before_it(
    stream: Stream, proxy: FaultProxy, stored: Any
) -> None:
    """So a cancelled turn leaves its last chunk, as Parlant then says that it was cancelled."""
    await stream.go_on("b")
    gate = Gate()
    commits = 0

    async def hold_the_second(exchange: Exchange) -> None:
        nonlocal commits
        commits += 1
        await (gate if commits == 2 else Exchange.forward)(exchange)

    proxy.plan("POST", "/api/", hold_the_second, at=EVERY)
    cancelled = asyncio.create_task(say(stream.stores, stream.session, {"status": "cancelled"}))
    await gate.reached.wait()
    assert await stored(stream.event) == (["a", "b"], 2)
    assert not cancelled.done()
    gate.open()
    await cancelled


async def test_other_sessions_events_do_not_hurry_a_stream(stream: Stream, stored: Any) -> None:
    await stream.go_on("b")
    await say(stream.stores, await begin(stream.stores))
    assert await stored(stream.event) == (["a"], 1)


async def test_another_field_of_a_streamed_event_can_be_changed(stream: Stream, stored: Any) -> None:
    await stream.go_on("b")
    store = stream.stores.session_store
    updated = await store.update_event(stream.session.id, stream.event.id, {"metadata": {"seen": True}})
    assert updated == await store.read_event(stream.session.id, stream.event.id)
    assert (updated.metadata, cast(Any, updated.data)["chunks"]) == ({"seen": True}, ["a", "b"])
    assert await stored(stream.event) == (["a", "b"], 3)
    await stream.go_on("c")
    whole = await store.update_event(
        stream.session.id, stream.event.id, {"data": {"chunks": ["x"]}, "metadata": {"n": 1}}
    )
    assert (whole.data, whole.metadata) == ({"chunks": ["x"]}, {"n": 1})
    assert whole == await store.read_event(stream.session.id, stream.event.id)


async def test_closing_writes_what_was_held_back(
    open_server: OpenServer, coherence: CoherenceSettings, stored: Any
) -> None:
    async with open_server(coherence=coherence) as stores:
        streams = [Stream(stores, await begin(stores)) for _ in range(3)]
        for stream in streams:
            await stream.begin("a")
            await stream.go_on("b")
    for stream in streams:
        assert await stored(stream.event) == (["a", "b"], 2)


async def test_flushing_writes_what_was_held_back(stream: Stream, stored: Any) -> None:
    await stream.go_on("b")
    await stream.stores.session_store._home.flush()
    assert await stored(stream.event) == (["a", "b"], 2)


async def test_a_deleted_session_takes_what_was_held_back_with_it(stream: Stream) -> None:
    await stream.go_on("b")
    store = stream.stores.session_store
    await store.delete_session(stream.session.id)
    await store.flush()
    for read in (stream.read(), stream.go_on("c"), stream.go_on(None)):
        with pytest.raises(ItemNotFoundError):
            await read
    assert (await store._event_collection.find({"id": {"$eq": cast(Any, stream.event.id)}})).total_count == 0


async def test_a_deleted_event_keeps_its_chunks_and_takes_no_more(stream: Stream, stored: Any) -> None:
    await stream.go_on("b")
    store = stream.stores.session_store
    await store.delete_event(stream.event.id)
    with pytest.raises(ItemNotFoundError):
        await stream.go_on("c")
    assert await store.list_events(stream.session.id) == []
    assert await stream.read() == ["a", "b"]
    await store.flush()
    assert (await stored(stream.event))[0] == ["a", "b"]


async def test_what_could_never_be_written_is_refused_at_once(stream: Stream) -> None:
    await stream.go_on("b")
    for chunk, error in ((object(), InvalidDocument), ("x" * 17_000_000, DocumentTooLarge)):
        with pytest.raises(error):
            await stream.go_on(cast(str, chunk))
        stream.chunks.pop()
    assert await stream.read() == ["a", "b"]


async def test_nobody_can_change_what_is_held_back(stream: Stream) -> None:
    updated = await stream.go_on("b")
    read = await stream.stores.session_store.read_event(stream.session.id, stream.event.id)
    for event in (updated, read):
        cast(Any, event.data)["chunks"].append("mischief")
    stream.chunks.append("not said yet")
    assert await stream.read() == ["a", "b"]


async def test_a_custom_events_data_is_no_stream(stores: Stores, stored: Any) -> None:
    session = await begin(stores)
    event = await stores.session_store.create_event(
        session.id, EventSource.CUSTOMER, EventKind.CUSTOM, "trace", {"chunks": []}
    )
    await stores.session_store.update_event(session.id, event.id, {"data": {"chunks": ["a"]}})
    assert await stored(event) == (["a"], 2)


@pytest.mark.parametrize("by", ["read_event", "list_events"])
async def test_a_read_that_is_overtaken_by_a_write_shows_what_was_written(
    open_server: OpenServer, proxy: FaultProxy, by: str
) -> None:
    """What was held back when it began has been shown to others already."""
    async with open_server(coherence=OFF) as stores:
        stream = Stream(stores, await begin(stores))
        await stream.begin("a")
        await stream.go_on("b")
        withheld = Withheld()
        proxy.plan("GET", "/api/collections/streaming_sessions_events/records", withheld)
        store, session = stores.session_store, stream.session.id

        async def read() -> Event:
            if by == "read_event":
                return await store.read_event(session, stream.event.id)
            (event,) = await store.list_events(session)
            return event

        reader = asyncio.create_task(read())
        await withheld.reached.wait()
        await store.flush()
        withheld.open()
        assert cast(Any, (await reader).data)["chunks"] == ["a", "b"]


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
async def test_a_reader_never_goes_back_in_time(
    open_server: OpenServer, coherence: CoherenceSettings, proxy: FaultProxy, seed: int
) -> None:
    """However long its reads take, and whatever is written meanwhile."""
    seconds = itertools.cycle([0.0, 0.03, 0.01, 0.0, 0.02, 0.005][seed:])

    async def slow(exchange: Exchange) -> None:
        await delay(next(seconds))(exchange)

    async with open_server(interval=0.01, coherence=coherence) as stores:
        stream = Stream(stores, await begin(stores))
        await stream.begin("a")
        proxy.plan("GET", "/api/", slow, at=EVERY)
        proxy.plan("POST", "/api/", slow, at=EVERY)
        shown = acknowledged = 1
        is_complete = False

        async def watch(read: Callable[[], Any]) -> None:
            nonlocal shown
            while not is_complete:
                least = max(shown, acknowledged)
                found = len((await read()).data["chunks"])
                assert found >= least, "somebody has seen more, or was told that more is there"
                shown = max(shown, found)
                await asyncio.sleep(0)

        async def by_list() -> Event:
            (event,) = await stores.session_store.list_events(stream.session.id)
            return event

        async def by_id() -> Event:
            return await stores.session_store.read_event(stream.session.id, stream.event.id)

        async def write() -> None:
            nonlocal acknowledged, is_complete
            for number in range(30):
                await stream.go_on(str(number))
                acknowledged = len(stream.chunks)
                await asyncio.sleep(0.002)
            await stream.go_on(None)
            acknowledged = len(stream.chunks)
            is_complete = True

        await asyncio.gather(write(), *(watch(read) for read in (by_list, by_list, by_id, by_id)))


# When writing fails


async def test_what_cannot_be_written_is_kept_and_the_next_chunks_writer_is_told(
    open_server: OpenServer,
    proxy: FaultProxy,
    stored: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "AGAIN_SECONDS", NEVER)
    async with open_server(
        coherence=EXCLUSIVE, writes=WriteSettings(deadline=0.3), logger=logging.getLogger("streams")
    ) as stores:
        stream = Stream(stores, await begin(stores))
        await stream.begin("a")
        await stream.go_on("b")
        async with proxy.down():
            await stores.session_store.flush()
            assert "not written yet" in caplog.text
            assert await stream.read() == ["a", "b"]
            with pytest.raises((PocketBaseUnavailable, OutcomeUnknown)):
                await stream.go_on("c")
            assert (await stream.read())[:2] == ["a", "b"]
        await stream.go_on("d")
        assert await stored(stream.event) == (["a", "b", "c", "d"], 2)
        await stream.go_on("e")
        assert (await stored(stream.event))[1] == 2, "all is well again, and chunks are held back"


async def test_what_could_not_be_written_is_written_when_pocketbase_is_back(
    open_server: OpenServer, proxy: FaultProxy, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "AGAIN_SECONDS", 0.05)
    commits = Commits(proxy)
    async with open_server(coherence=EXCLUSIVE, writes=WriteSettings(deadline=1.0)) as stores:
        stream = Stream(stores, await begin(stores))
        await stream.begin("a")
        async with proxy.down():
            await stream.go_on("b")
            await stores.session_store.flush()
        await commits.until(stored, stream.event, ["a", "b"])


async def test_an_event_is_written_though_the_chunks_before_it_cannot_be(
    open_server: OpenServer, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_server(coherence=EXCLUSIVE) as stores:
        stream = Stream(stores, await begin(stores))
        await stream.begin("a")
        await stream.go_on("b")

        async def refuse(*_: Any) -> Any:
            raise PocketBaseUnavailable("by order of the test")

        with monkeypatch.context() as broken:
            broken.setattr(stores.session_store._events, "update_one", refuse)
            event = await say(stores, stream.session)
        assert event in await stores.session_store.list_events(stream.session.id)
        assert await stream.read() == ["a", "b"]
        await stream.go_on(None)
        assert await stored(stream.event) == (["a", "b", None], 2)


async def test_an_older_state_is_not_written_over_one_whose_outcome_is_unknown(
    open_server: OpenServer, proxy: FaultProxy, stored: Any
) -> None:
    async def applied_but_silent(exchange: Exchange) -> None:
        await exchange.ask_in_vain()
        await asyncio.Event().wait()

    async with open_server(coherence=EXCLUSIVE, writes=WriteSettings(deadline=0.5)) as stores:
        stream = Stream(stores, await begin(stores))
        await stream.begin("a")
        await stream.go_on("b")
        proxy.plan("POST", "/api/", applied_but_silent, at=EVERY)
        with pytest.raises(OutcomeUnknown):
            await stream.go_on("c", None)
        proxy.forget_plans()
        await stores.session_store.flush()
        assert (await stored(stream.event))[0] == ["a", "b", "c", None]
        assert await stream.read() == ["a", "b", "c", None]


async def test_closing_says_what_it_could_not_write(open_server: OpenServer, proxy: FaultProxy) -> None:
    async with AsyncExitStack() as down:
        with pytest.raises(NotCommitted, match="last chunks of 1 streamed message"):
            async with open_server(coherence=EXCLUSIVE, writes=WriteSettings(deadline=0.3)) as stores:
                stream = Stream(stores, await begin(stores))
                await stream.begin("a")
                await stream.go_on("b")
                await down.enter_async_context(proxy.down())


# Parlant


class Words(StreamingTextGenerator):
    """A language model that says word after word; it stops before `pause`, until it is told to go on."""

    def __init__(self, words: int, pause: int | None = None, seconds: float = 0.0) -> None:
        self.paused = asyncio.Event()
        self.goes_on = asyncio.Event()
        self._words = words
        self._pause = pause
        self._seconds = seconds

    @override
    def generate(
        self, prompt: str | PromptBuilder, hints: Mapping[str, Any] = {}
    ) -> StreamingTextGenerationResult:
        return StreamingTextGenerationResult(
            self._stream(), lambda: GenerationInfo("words", self.id, 0.0, UsageInfo(1, 1))
        )

    async def _stream(self) -> AsyncIterator[str | None]:
        for number in range(self._words):
            if number == self._pause:
                self._pause = None
                self.paused.set()
                await self.goes_on.wait()
            await asyncio.sleep(self._seconds)
            yield f"{number} "
        yield None

    @property
    @override
    def id(self) -> str:
        return "pb_cached/words"

    @property
    @override
    def tokenizer(self) -> EstimatingTokenizer:
        return Tokenizer()


class StreamingNLP(DeterministicNLP):
    def __init__(self, words: Words) -> None:
        self._words_generator = words

    @property
    @override
    def supports_streaming(self) -> bool:
        return True

    @override
    async def get_streaming_text_generator(
        self,
        hints: StreamingTextGeneratorHints = {},  # noqa: B006
    ) -> StreamingTextGenerator:
        return self._words_generator


def streaming_server(stores: Stores, words: Words) -> AbstractAsyncContextManager[RunningServer]:
    async def script(server: Any) -> None:
        p = sdk()
        await server.create_agent(
            "Robin",
            "Says word after word.",
            composition_mode=p.CompositionMode.FLUID,
            output_mode=p.OutputMode.STREAM,
            perceived_performance_policy=p.NullPerceivedPerformancePolicy(),
        )

    return parlant_server(script, nlp_service=lambda _: StreamingNLP(words), **stores.server_args())


async def a_talk(server: RunningServer) -> Talk:
    (agent,) = await server.get("/agents")
    session = await server.send("POST", "/sessions", {"agent_id": agent["id"]})
    return Talk(server, session["id"])


async def complete_reply(stores: Stores, talk: Talk) -> Event:
    """The agent's message after what the customer has said last, when it is complete."""
    session, of = SessionId(talk.session), cast(Any, {"kinds": [EventKind.MESSAGE], "min_offset": talk.heard})
    listener = stores.session_listener
    assert await listener.wait_for_more_events(
        session, source=EventSource.AI_AGENT, timeout=Timeout(PATIENCE), **of
    )
    (message,) = await stores.session_store.list_events(session, **of)
    assert await listener.wait_for_event_completion(session, message.id, Timeout(PATIENCE))
    return await stores.session_store.read_event(session, message.id)


@pytest.mark.slow
async def test_a_reply_that_parlant_streams_is_written_a_few_times_and_arrives_whole(
    open_server: OpenServer, stored: Any
) -> None:
    interval, words = 0.2, Words(100, seconds=0.01)
    async with (
        open_server(interval, coherence=EXCLUSIVE) as stores,
        streaming_server(stores, words) as server,
    ):
        talk = await a_talk(server)
        begun = time.monotonic()
        await talk.say("Count.")
        message = await complete_reply(stores, talk)
        duration = time.monotonic() - begun
        chunks, written = await stored(message)
    said = [f"{number} " for number in range(100)]
    assert cast(Any, message.data)["message"] == "".join(said)
    assert chunks == [*said, None]
    assert 2 <= written <= duration / interval + 2


@pytest.mark.slow
async def test_a_cancelled_turn_leaves_the_last_chunk_that_it_had_said(
    open_server: OpenServer, stored: Any
) -> None:
    """The customer writes again while a reply is streamed."""
    words = Words(30, pause=20)
    async with (
        open_server(NEVER, coherence=EXCLUSIVE) as stores,
        streaming_server(stores, words) as server,
    ):
        talk = await a_talk(server)
        await talk.say("Count.")
        await words.paused.wait()
        (first,) = await stores.session_store.list_events(
            SessionId(talk.session), source=EventSource.AI_AGENT, kinds=[EventKind.MESSAGE]
        )
        assert len((await stored(first))[0]) == 1
        await talk.say("Stop.")
        second = await complete_reply(stores, talk)
        assert await stored(first) == ([f"{number} " for number in range(20)], 2)
        assert (await stored(second))[0][-1] is None
        statuses = [event["data"].get("status") for event in await talk.events(kinds="status")]
        assert "cancelled" in statuses
