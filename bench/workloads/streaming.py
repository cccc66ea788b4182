"""A reply that is streamed, as Parlant's engine writes it: by its own event publisher, the whole message again
with each chunk, until a None ends it.

Chunks come at the pace of a model, and wait for the call before them as the engine's do. So the rate says little
but whether a peer keeps up: 0.5 replies a second is the pace itself where a reply takes two seconds. What counts
is how long the engine waits for each chunk's call, PocketBase's CPU for a reply, and what is written: the
messages' states that are committed, and the bytes that PocketBase's process writes to disk. The plain adapter
commits a state with each call. Ours acknowledges most chunks before they are committed (`streaming_interval`), and
shows them to its readers at once.

Alone a reply has as many chunks as a long answer of a model has tokens, and twenty at once have fewer, as the
plain adapter takes them one after the other.

When the rounds are over each reply is read back from PocketBase, and must be what was streamed.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import psutil
from parlant.core.agents import Agent, AgentId
from parlant.core.emission.event_publisher import EventPublisher
from parlant.core.emissions import MessageEventHandle
from parlant.core.sessions import MessageEventData, Participant, SessionId

from bench.peers import Peer
from bench.peers.ours import OurPeer, ours, reopened
from bench.peers.plain import plain
from bench.results import Series
from bench.rounds import Contender
from bench.run import Run
from bench.samples import EVENTS_OF_A_SESSION, session_of
from pb_cached.config import STREAMING_INTERVAL

EVENTS: Final = 1_000
"""Stored before; each reply is said in one of their sessions."""
AT_ONCE: Final = 20
SAMPLED: Final = 0.05
"""Seconds between two looks at what PocketBase has written."""
_WORDS: Final = ("the", "train", "left", "umbrella", "found", "yesterday", "counter", "please", "ticket", "today")
_AGENT: Final = Agent(AgentId("robin"), "Robin", None, datetime(2026, 11, 25, tzinfo=UTC), 3, [])


@dataclass(frozen=True)
class Reply:
    """What a model says, chunk by chunk, at an even pace."""

    chunks: Sequence[str]
    seconds: float

    @classmethod
    def of(cls, chunks: int, seconds: float) -> Reply:
        """A chunk is three words, about 20 characters."""
        words = random.Random(chunks)
        return cls([" ".join(words.choices(_WORDS, k=3)) + " " for _ in range(chunks)], seconds)


@dataclass
class Streams:
    """The replies that a peer has been given to write."""

    peer: Peer
    reply: Reply
    said: dict[SessionId, int] = field(default_factory=dict)
    """How many of them each session holds."""
    states: list[int] = field(default_factory=list)
    """Committed of all messages, in each turn."""
    bytes: list[int] = field(default_factory=list)
    """Written to disk in each turn."""

    async def work(self, replies: int) -> list[float]:
        """So many at once, each in a session of its own."""
        before, written = _committed(self.peer), _written(self.peer.servers)
        waits: list[float] = []
        await asyncio.gather(*(self._stream(number, waits) for number in range(replies)))
        after = _committed(self.peer)
        self.states.append(len(waits) if before is None or after is None else after - before)
        self.bytes.append(_written(self.peer.servers) - written)
        return waits

    async def _stream(self, number: int, waits: list[float]) -> None:
        """As the engine's generator does it (parlant/core/engines/alpha/canned_response_generator.py): it keeps
        one list of chunks, which it appends to, and hands over."""
        session = session_of(number * EVENTS_OF_A_SESSION)
        publisher = EventPublisher(_AGENT, self.peer.session_store, session)
        chunks: list[str | None] = []
        message = ""
        handle: MessageEventHandle | None = None
        begun = time.perf_counter()
        for place, chunk in enumerate((*self.reply.chunks, None)):
            due = begun + self.reply.seconds * place / len(self.reply.chunks)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            chunks.append(chunk)
            message += chunk or ""
            data = MessageEventData(
                message=message, participant=Participant(id=_AGENT.id, display_name=_AGENT.name), chunks=chunks
            )
            called = time.perf_counter()
            if handle is None:
                handle = await publisher.emit_message_event("f" * 32, data)
            else:
                handle = await handle.update(data)
            waits.append(time.perf_counter() - called)
        self.said[session] = self.said.get(session, 0) + 1

    async def check(self) -> None:
        """Each message is in PocketBase, past all caches, and complete."""
        whole = {"chunks": [*self.reply.chunks, None], "message": "".join(self.reply.chunks)}
        async with AsyncExitStack() as stack:
            store = self.peer.session_store
            if isinstance(self.peer, OurPeer):
                store = (await stack.enter_async_context(reopened(self.peer))).session_store
            for session, replies in self.said.items():
                said = [event.data for event in await store.list_events(session)]
                complete = sum(isinstance(data, Mapping) and data.items() >= whole.items() for data in said)
                assert complete == replies, f"{self.peer.name}: {complete} of {replies} are complete in {session}"


async def measure(run: Run) -> None:
    reply = Reply.of(run.scaled(200, 40), run.scaled(20, 6) / 10)
    many = Reply.of(run.scaled(40, 10), run.scaled(10, 3) / 10)
    async with AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(ours(EVENTS, mode="realtime", commit="log")),
            await stack.enter_async_context(plain(EVENTS)),
        ]
        alone = await _rounds(run, peers, reply, 1)
        for streams in alone:
            await _watch(run, streams)
        mine = alone[0]
        run.judge("streaming.writes", [states - reply.seconds / STREAMING_INTERVAL for states in mine.states])
        at_once = await _rounds(run, peers, many, AT_ONCE)
    for each, replies in ((alone, 1), (at_once, AT_ONCE)):
        run.note("streaming: " + "; ".join(_told(streams, replies) for streams in each))


async def _rounds(run: Run, peers: Sequence[Peer], reply: Reply, replies: int) -> list[Streams]:
    streams = [Streams(peer, reply) for peer in peers]
    await run.take_turns(
        "streaming",
        [Contender(each.peer.name, each.work, replies, each.peer.servers) for each in streams],
        of="replies at once",
        size=replies,
        unit="reply",
    )
    for each in streams:
        await each.check()
        del each.states[0], each.bytes[0]  # of the round that warms up
    return streams


async def _watch(run: Run, streams: Streams) -> None:
    """One more reply, to see when PocketBase writes."""
    begun, before = time.perf_counter(), _written(streams.peer.servers)
    points = [(0.0, 0.0)]
    streaming = asyncio.ensure_future(streams.work(1))
    while not streaming.done():
        await asyncio.wait([streaming], timeout=SAMPLED)
        written = _written(streams.peer.servers) - before
        points.append((time.perf_counter() - begun, written / 1000))
    await streaming
    del streams.states[-1], streams.bytes[-1]
    if points[-1][1]:
        run.add_series(
            Series(
                workload="streaming",
                name=streams.peer.name,
                x="seconds of a streamed reply",
                y="kB that PocketBase has written",
                points=points,
            )
        )


def _committed(peer: Peer) -> int | None:
    """The states of documents that ours has committed so far. The plain adapter commits one with each call."""
    return peer.stores.stats().sessions.writes.records if isinstance(peer, OurPeer) else None


def _written(servers: Sequence[psutil.Process]) -> int:
    """Bytes that went to disk; 0 where the system does not tell."""
    try:
        return sum(server.io_counters().write_bytes for server in servers)
    except (AttributeError, NotImplementedError):
        return 0


def _told(streams: Streams, replies: int) -> str:
    reply, states = streams.reply, statistics.median(streams.states) / replies
    told = (
        f"{streams.peer.name}, {replies} at once, {len(reply.chunks)} chunks in {reply.seconds:g} s: "
        f"{states:,.1f} writes of a message"
    )
    written = statistics.median(streams.bytes) / replies
    return f"{told}, {written / 1000:,.0f} kB on disk" if written else told
