"""Turns of a conversation: what Parlant's stores are asked for between a customer's message and the agent's reply.

A turn is replayed by the calls that Parlant 3.3 makes, in their order (facts: parlant, section 2): an agent with
five variables, a reply in one piece, no tools. The language model, which would take seconds, is left out.

`turns` are taken one after the other, `turns at once` by fifty customers, or ten in a quick run. Every customer
talks in a session of 20 events that is stored already, and goes on to another session after a few turns, so that
histories stay short; where few are stored, they come round again. A round lasts about half a second: slow peers
take fewer turns in it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Final, cast

from parlant.core.app_modules.sessions import SessionUpdateParamsModel
from parlant.core.common import JSONSerializable
from parlant.core.context_variables import ContextVariableStore
from parlant.core.customers import Customer
from parlant.core.sessions import AgentState, EventKind, EventSource, Session, SessionId, SessionStore
from parlant.core.tags import Tag

from bench.peers import Peer
from bench.peers.json_file import NAME as FILE
from bench.peers.json_file import json_file
from bench.peers.memory import NAME as MEMORY
from bench.peers.memory import memory
from bench.peers.mongodb import mongodb
from bench.peers.ours import OurPeer, ours, reopened
from bench.peers.plain import plain
from bench.rounds import Contender
from bench.run import Run
from bench.samples import AGENT, EVENTS_OF_A_SESSION, stored_session

EVENTS_OF_A_TURN: Final = 7
TURNS_OF_A_SESSION: Final = 3
CUSTOMERS: Final = 50
"""Who talk at once."""
MOST_TURNS: Final = 30
"""Of a contender's round, one after the other: there are so many sessions only."""
SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)
SIZES_AT_ONCE: Final = (1_000, 100_000, 1_000_000)
"""Fewer, as fifty customers of the plain adapter take seconds for a turn each."""
LARGEST_MEMORY: Final = 100_000
LARGEST_MEMORY_AT_ONCE: Final = 1_000
LARGEST_FILE: Final = 10_000
_QUESTION: Final = "a message of usual length, as customers write them when they have lost something on a train"
_ANSWER: Final = (
    "Thank you for telling us. We have looked for it, and it waits for you at the counter of the station."
)


async def turn(peer: Peer, session_id: SessionId, trace_id: str) -> None:
    """The calls of one turn: those of the API as it takes the customer's message, then those of the engine."""
    session = await peer.session_store.read_session(session_id)
    customer = await peer.customer_store.read_customer(session.customer_id)
    await peer.session_store.create_event(
        session_id=session.id,
        source=EventSource.CUSTOMER,
        kind=EventKind.MESSAGE,
        trace_id=trace_id,
        data={
            "message": _QUESTION,
            "participant": {"id": customer.id, "display_name": customer.name},
            "flagged": False,
            "tags": [],
        },
    )
    session = await peer.session_store.read_session(session.id)
    await _respond(peer, session.id, trace_id)


async def _respond(peer: Peer, session_id: SessionId, trace_id: str) -> None:
    store = peer.session_store
    session = await store.read_session(session_id)
    customer = await peer.customer_store.read_customer(session.customer_id)
    await store.list_events(session.id)
    await _say_status(store, session, trace_id, "acknowledged", {})
    await _load_variables(peer.variable_store, customer)
    await _say_status(store, session, trace_id, "processing", {"stage": "Interpreting"})
    await _say_status(store, session, trace_id, "typing", {})
    await store.create_event(
        session_id=session.id,
        source=EventSource.AI_AGENT,
        kind=EventKind.MESSAGE,
        trace_id=trace_id,
        data={"message": _ANSWER, "participant": {"id": AGENT, "display_name": "Robin"}, "draft": _ANSWER},
    )
    await _say_status(store, session, trace_id, "ready", {})
    await _say_status(store, session, trace_id, "ready", {"stage": "completed"})
    state = AgentState(trace_id=trace_id, applied_guideline_ids=[], journey_paths={})
    await store.update_session(session.id, SessionUpdateParamsModel(agent_states=[*session.agent_states, state]))


async def _say_status(
    store: SessionStore, session: Session, trace_id: str, status: str, data: dict[str, JSONSerializable]
) -> None:
    await store.create_event(
        session_id=session.id,
        source=EventSource.AI_AGENT,
        kind=EventKind.STATUS,
        trace_id=trace_id,
        data={"status": status, "data": data},
    )


async def _load_variables(store: ContextVariableStore, customer: Customer) -> None:
    """The agent's variables, those of all agents, and those of the agent's tags, of which it has none."""
    found = {
        *await store.list_variables(tags=[Tag.for_agent_id(AGENT).id]),
        *await store.list_variables(tags=[]),
        *await store.list_variables(tags=[]),
    }
    keys = [customer.id, *(f"tag:{tag}" for tag in customer.tags), ContextVariableStore.GLOBAL_KEY]
    for variable in found:
        for key in keys:
            if await store.read_value(variable.id, key):
                break


@dataclass
class Conversations:
    """One peer's turns, and what must be there when they are done."""

    peer: Peer
    sessions: int
    """That are stored."""
    turns: Counter[SessionId] = field(default_factory=Counter)
    _numbers: count[int] = field(default_factory=count)
    _traces: count[int] = field(default_factory=count)

    async def take(self, turns: int) -> list[float]:
        """One after the other; returns the seconds of each."""
        waits: list[float] = []
        while len(waits) < turns:
            session_id = self._next_session()
            for _ in range(min(TURNS_OF_A_SESSION, turns - len(waits))):
                waits.append(await self._take_one(session_id))
        return waits

    async def take_at_once(self, turns: int) -> list[float]:
        """By `CUSTOMERS`, each in a session of its own; by fewer if there are fewer turns."""
        shares = [turns // CUSTOMERS + (number < turns % CUSTOMERS) for number in range(CUSTOMERS)]
        taken = await asyncio.gather(*(self.take(share) for share in shares if share))
        return [wait for waits in taken for wait in waits]

    async def seconds_of_one(self) -> float:
        """Of the second turn of a session: the first may have to read what is then known."""
        session_id = self._next_session()
        await self._take_one(session_id)
        return await self._take_one(session_id)

    async def _take_one(self, session_id: SessionId) -> float:
        started = time.perf_counter()
        await turn(self.peer, session_id, f"{next(self._traces):032x}")
        self.turns[session_id] += 1
        return time.perf_counter() - started

    def _next_session(self) -> SessionId:
        return stored_session(next(self._numbers) % self.sessions)

    async def check(self) -> None:
        """Compare what the sessions hold with the turns that were taken; of ours by what PocketBase holds, past
        all caches.

        Raises:
            AssertionError: they differ.
        """
        async with AsyncExitStack() as stack:
            store = self.peer.session_store
            if isinstance(self.peer, OurPeer):
                store = (await stack.enter_async_context(reopened(self.peer))).session_store
            for session_id, turns in self.turns.items():
                await self._check_session(store, session_id, turns)

    async def _check_session(self, store: SessionStore, session_id: SessionId, turns: int) -> None:
        of = f"{self.peer.name}: {session_id} after {turns} turns"
        events = await store.list_events(session_id)
        expected = EVENTS_OF_A_SESSION + turns * EVENTS_OF_A_TURN
        offsets = [event.offset for event in events]
        assert sorted(offsets) == list(range(expected)), f"{of} has the offsets {offsets}"
        answers = sum(cast(dict[str, object], event.data).get("message") == _ANSWER for event in events)
        assert answers == turns, f"{of} has {answers} answers"
        states = (await store.read_session(session_id)).agent_states
        assert len(states) == 5 + turns, f"{of} has {len(states)} states of the agent"


Maker = AbstractAsyncContextManager[Peer]


def makers(run: Run, size: int) -> list[Maker]:
    """Who takes part at this size."""
    made: list[Maker] = []
    if size <= LARGEST_MEMORY:
        made.append(memory(size))
    if size <= LARGEST_FILE:
        made.append(json_file(size))
    if run.options.mongodb:
        made.append(mongodb(run.options.mongodb, size))
    made += [plain(size), ours(size, mode="realtime", commit="log"), ours(size, mode="realtime", commit="batch")]
    if not run.options.is_quick:
        made += [ours(size, mode="exclusive", commit="log"), ours(size, mode="off", commit="log")]
    return made


def talks_at_once(peer: Peer, size: int) -> bool:
    """Does it take turns at once, too? Not where it would be minutes, only to show that they wait."""
    if isinstance(peer, OurPeer):
        return peer.config.coherence.mode != "off"
    return peer.name != FILE and (peer.name != MEMORY or size <= LARGEST_MEMORY_AT_ONCE)


@asynccontextmanager
async def opened(run: Run, makers: Sequence[Maker], size: int) -> AsyncIterator[list[Peer]]:
    async with AsyncExitStack() as stack:
        with run.step(f"filling with {size:,} events", len(makers)) as done:
            peers = []
            for maker in makers:
                peers.append(await stack.enter_async_context(maker))
                done()
        # What one peer has in this process must not cost the others, whose garbage is collected with it.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        yield peers


async def measure(run: Run) -> None:
    sizes = run.sizes(SIZES, SIZES[:1])
    _note_what_is_left_out(run, max(sizes, default=0))
    for size in sizes:
        async with opened(run, makers(run, size), size) as peers:
            await _measure_at(run, size, [Conversations(peer, size // EVENTS_OF_A_SESSION) for peer in peers])


def _note_what_is_left_out(run: Run, largest: int) -> None:
    if largest > LARGEST_FILE:
        run.note(f"turns: {FILE} is left out beyond {LARGEST_FILE:,} events, as each write writes all of them.")
    if largest > LARGEST_MEMORY:
        run.note(f"turns: {MEMORY} is left out beyond {LARGEST_MEMORY:,} events, where a turn takes many seconds.")
    if largest > LARGEST_MEMORY_AT_ONCE:
        run.note(
            f"turns at once: {MEMORY} is left out beyond {LARGEST_MEMORY_AT_ONCE:,} events: they wait for "
            "each other, and are as fast as one after the other."
        )
    if run.options.is_quick:
        run.note("turns: the modes exclusive and off are left out in a quick run.")


async def _measure_at(run: Run, size: int, conversations: Sequence[Conversations]) -> None:
    seconds = run.scaled(500, 100) / 1000
    lone = []
    for each in conversations:
        turns = max(1, min(MOST_TURNS, int(seconds / await each.seconds_of_one())))
        lone.append(Contender(each.peer.name, each.take, turns, each.peer.servers))
    await run.take_turns("turns", lone, of="events stored", size=size, unit="turn")
    if size in SIZES_AT_ONCE:
        await _measure_at_once(run, size, conversations)
    for each in conversations:
        await each.check()


async def _measure_at_once(run: Run, size: int, conversations: Sequence[Conversations]) -> None:
    at_once = [
        Contender(each.peer.name, each.take_at_once, run.scaled(CUSTOMERS, 10), each.peer.servers)
        for each in conversations
        if talks_at_once(each.peer, size)
    ]
    await run.take_turns("turns at once", at_once, of="events stored", size=size, unit="turn")
