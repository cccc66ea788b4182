"""What customers and their agent do to the stores of a server, mixed as it is where conversations are looked at
while they go on.

Of all operations 80 % belong to turns: the session and its history are read, the customer's message and the reply
are appended, and the session's state is written. 15 % are what a client that waits for events looks for, those
after the last one that it knows, and 5 % a page of the customer's sessions.

Each answer is looked at: a server sees what it has written.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable
from typing import Final, TypeVar

from parlant.core.agents import AgentId
from parlant.core.common import JSONSerializable
from parlant.core.customers import CustomerId
from parlant.core.guidelines import GuidelineId
from parlant.core.persistence.common import SortDirection
from parlant.core.sessions import AgentState, EventKind, EventSource, SessionId, SessionStore

TURNS: Final = 10
"""Of a conversation; then the customer begins another one, in a session of its own."""
PAGE: Final = 20
OPERATIONS_OF_A_TURN: Final = 5
_STEPS: Final = {"turn": 80 / OPERATIONS_OF_A_TURN, "poll": 15.0, "page": 5.0}
"""How often each of them is next, so that the shares are those of operations."""
_MESSAGE: Final[JSONSerializable] = {
    "message": "a message of usual length, as customers write them when they have lost something on a train",
    "participant": {"id": "0123456789", "display_name": "Ida"},
    "tags": [],
}
_APPLIED: Final = [GuidelineId("0123456789")] * 3

T = TypeVar("T")


class Customer:
    """Who has one conversation after the other.

    Args:
        name: no other customer has it.
        waits: where the seconds go that each operation took.
        events: where it is noted how many events each session was given.
    """

    def __init__(self, store: SessionStore, name: str, waits: list[float], events: dict[SessionId, int]) -> None:
        self._store = store
        self._id = CustomerId(name)
        self._random = random.Random(name)
        self._waits = waits
        self._events = events
        self._session: SessionId | None = None

    async def act(self) -> None:
        """Do what is next."""
        if self._session is None or self._events[self._session] == 2 * TURNS:
            made = await self._timed(self._store.create_session(self._id, AgentId("robin")))
            self._session = made.id
            self._events[made.id] = 0
        (step,) = self._random.choices(list(_STEPS), list(_STEPS.values()))
        if step == "turn":
            await self._turn(self._session)
        elif step == "poll":
            await self._poll(self._session)
        else:
            await self._page(self._session)

    async def _turn(self, id_: SessionId) -> None:
        session = await self._timed(self._store.read_session(id_))
        history = await self._timed(self._store.list_events(id_))
        assert len(history) == self._events[id_], f"{len(history)} of {self._events[id_]} events are seen"
        trace = f"{self._random.getrandbits(128):032x}"
        for source in (EventSource.CUSTOMER, EventSource.AI_AGENT):
            said = await self._timed(self._store.create_event(id_, source, EventKind.MESSAGE, trace, _MESSAGE))
            assert said.offset == self._events[id_], "each event has the offset after the last"
            self._events[id_] += 1
        states = [*session.agent_states, AgentState(trace, _APPLIED, {})]
        await self._timed(self._store.update_session(id_, {"agent_states": states}))

    async def _poll(self, id_: SessionId) -> None:
        known = max(0, self._events[id_] - 2)
        found = await self._timed(self._store.list_events(id_, min_offset=known))
        assert [event.offset for event in found] == list(range(known, self._events[id_]))

    async def _page(self, id_: SessionId) -> None:
        page = await self._timed(
            self._store.list_sessions(customer_id=self._id, limit=PAGE, sort_direction=SortDirection.DESC)
        )
        assert page.items[0].id == id_, "the customer's newest session comes first"

    async def _timed(self, call: Awaitable[T]) -> T:
        begun = time.perf_counter()
        result = await call
        self._waits.append(time.perf_counter() - begun)
        return result
