"""PocketBase's realtime stream: one that is subscribed, always, or its owner knows that there is none.

It knows nothing of what topics and messages mean. Whether a stream that is silent still lives, its owner has to
find out; it can ask for another one then.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Final, Protocol, Self

import msgspec
import tenacity
from msgspec import Struct

from pb_cached.errors import AuthenticationFailed, PBCachedError
from pb_cached.pocketbase.client import Answer, NoConnection, PocketBaseClient, refused
from pb_cached.pocketbase.http import Streamed
from pb_cached.pocketbase.sse import EventParser, Message
from pb_cached.telemetry import Log

PATH: Final = "/api/realtime"

_GREETING: Final = "PB_CONNECT"
_PAUSES: Final = tenacity.wait_random_exponential(multiplier=0.1, max=5.0)
"""Seconds between attempts: short, as a server that follows nothing reads everything from PocketBase."""
_HINTS: Final = {
    400: "from 0.38.2 on, a stream and its subscription must come from the same IP address: is there a proxy that "
    "has several, or does the name of the host stand for several?",
    404: "PocketBase does not know the stream that it has just opened: is it several behind one address?",
}
_MORE_CONNECTIONS: Final = (
    "the stream keeps one, two while it is replaced, and requests need more: allow the HTTP client at least three "
    "(max_connections)"
)


class StreamOwner(Protocol):
    """Whom a stream tells. All of it is told between awaits, in the order in which it happened."""

    def received(self, topic: str, data: bytes) -> None:
        """A message: not always for the first time, nor in the order of commits, nor only while connected."""
        ...

    def connected(self, topics: frozenset[str]) -> None:
        """What is committed from now on arrives, if it is about one of these topics.

        Told of each new stream, also where it replaces one without a loss. The exception is a deletion whose
        transaction began before: PocketBase chooses then whom it will tell.
        """
        ...

    def lost(self, reason: str) -> None:
        """From here on something may be missing, until `connected` is told, and between that and this."""
        ...


@dataclass(frozen=True)
class Timing:
    """All in seconds."""

    idle: float = 240.0
    """A stream is replaced on which nothing came for so long; PocketBase ends it at 300."""
    age: float = 1500.0
    """A stream is replaced that is so old; PocketBase ends it at 1800, from 0.38.2 on."""
    overlap: float = 5.0
    """The old stream is read for so long after the new one is subscribed. What PocketBase had begun to send may
    not have arrived, and of a deletion it tells whoever was subscribed when the transaction, of 3 seconds at most
    by default, came to it."""
    opening: float = 10.0
    """For each of the steps of opening a stream. PocketBase greets in a millisecond."""
    silence: float = 300.0
    """A stream on which nothing came for so long is dead: PocketBase would have ended it."""
    connection: float = 1.0
    """For a free connection of the HTTP client. While we hold one and wait for another, so may everybody else."""
    starved: float = 30.0
    """Until the next attempt where there was none: each may hold up all other requests for `connection`."""
    steady: float = 10.0
    """A stream that lived for so long was a success. One that is lost sooner counts as a failed attempt, lest what
    ends each at once makes us open them in a loop."""


class State(Enum):
    """What there is. Streams in brackets are on their way."""

    IDLE = "no topics, no stream"
    CONNECTING = "[one stream]: at work on it, or in a pause between attempts"
    LIVE = "one stream"
    REPLACING = "one stream, [another]: at work on it, or in a pause between attempts"
    OVERLAPPING = "two streams, of which the older one is only read to its end"
    CLOSED = "no stream, and none will be"


@dataclass(eq=False)
class _Stream:
    """One connection. Its task opens it, reads it, and has closed it when it ends."""

    topics: frozenset[str]
    opened: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None
    answered: bool = False
    client_id: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """PocketBase's name for it. Cancelled where the stream ended before it was greeted."""
    ended: _Trouble | None = None
    spent: bool = False
    """It is too old, or its owner doubts it: it will not be subscribed again."""


class _Trouble(Exception):
    """Why there is no stream. It is said once per `kind` until there has been a steady one."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class RealtimeStream:
    """Keeps one stream subscribed to the topics, while its context is entered.

        from          when                                      to            the owner hears
        IDLE          there are topics                          CONNECTING
        CONNECTING    the stream is subscribed                  LIVE          connected
        LIVE          it is old, doubted, or of other topics    REPLACING
        REPLACING     the second stream is subscribed           OVERLAPPING   connected
        REPLACING     there is no connection for a second       CONNECTING    lost
        OVERLAPPING   the overlap is over                       LIVE
        OVERLAPPING   there are other topics (*)                OVERLAPPING   connected
        OVERLAPPING   the older stream ends                     LIVE          lost, connected
        any of three  the stream ends                           CONNECTING    lost
        any           there are no topics                       IDLE
        any           it is closed                              CLOSED

    So there are never more than two connections. Other topics mean another stream, as PocketBase drops all
    subscriptions of a stream before it takes the new ones, and what it sends between the two is lost. (*) Of two
    streams, the older one is subscribed to them and leads, unless it was replaced for its age or in doubt.

    Mutable state, changed between awaits only: `_topics`, those to be subscribed to; `_leading`, the stream that
    is subscribed; `_trailing`, the one before it, and `_relieved`, since when it is; `_opening`, the next one;
    `_doubt`, why the owner asked for another; `_failures`, attempts in a row that failed, `_not_before`, when the
    pause after the last one ends, and `_said`, the kinds of trouble that the log has been told of; `_tasks`, those
    of all streams that are not closed, and `_keeping`, the task that opens and leaves them.
    """

    def __init__(
        self, client: PocketBaseClient, owner: StreamOwner, log: Log, timing: Timing | None = None
    ) -> None:
        self._client = client
        self._owner = owner
        self._log = log
        self._timing = timing or Timing()
        self._topics: frozenset[str] = frozenset()
        self._leading: _Stream | None = None
        self._trailing: _Stream | None = None
        self._opening: _Stream | None = None
        self._relieved = 0.0
        self._doubt: str | None = None
        self._failures = 0
        self._not_before = 0.0
        self._said: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def state(self) -> State:
        if self._closed:
            return State.CLOSED
        if self._leading is None:
            return State.CONNECTING if self._topics else State.IDLE
        if self._trailing is not None:
            return State.OVERLAPPING
        is_due = self._opening is not None or self._end_of(self._leading) <= time.monotonic()
        return State.REPLACING if is_due else State.LIVE

    def subscribe(self, topics: Iterable[str]) -> None:
        """Follow these topics (`events/*`), and no others; none end the stream. `connected` tells from when on."""
        self._topics = frozenset(topics)
        if not self._topics:
            self._leave_all()
        self._changed.set()

    def replace(self, reason: str) -> None:
        """Get another stream, now; while two overlap, after that. `lost` is not told: who doubts the stream knows
        best since when."""
        self._doubt = reason
        self._not_before = 0.0
        self._changed.set()

    async def __aenter__(self) -> Self:
        self._keeping = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End it. Nothing is told any more, and when this returns no connection is left."""
        self._closed = True
        ending = {*self._tasks, *([self._keeping] if self._keeping else [])}
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)  # whoever is cancelled here leaves them to end by themselves

    # the task that keeps it: it looks, and does the one thing that is due

    async def _keep(self) -> None:
        while True:
            self._changed.clear()
            try:
                if (wait := self._due() - time.monotonic()) > 0:
                    await self._changed_within(wait)
                elif self._trailing is None:
                    await self._open()
                elif self._may_swap(self._trailing):
                    await self._swap(self._trailing)
                else:
                    self._leave(self._trailing)
                    self._trailing = None
            except Exception as error:  # out of the owner's `connected` or `lost`; the state is as it should be
                self._log.error("the owner of the realtime stream failed", error=repr(error))

    def _due(self) -> float:
        """When the next thing is to be done."""
        if self._leading is None:
            return self._not_before if self._topics else math.inf
        if self._trailing is not None:
            return 0.0 if self._may_swap(self._trailing) else self._relieved + self._timing.overlap
        return max(self._not_before, self._end_of(self._leading))

    def _end_of(self, stream: _Stream) -> float:
        """When another one is to take its place."""
        if self._doubt is not None or stream.topics != self._topics:
            return 0.0
        return min(stream.opened + self._timing.age, stream.heard + self._timing.idle)

    def _may_swap(self, trailing: _Stream) -> bool:
        """May the older stream take the lead again? While it is subscribed anew, the other one loses nothing."""
        return self._leading is not None and self._leading.topics != self._topics and not trailing.spent

    async def _changed_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await self._changed.wait()

    async def _open(self) -> None:
        if left := self._tasks - {self._leading.task if self._leading else None}:
            await asyncio.wait(left)  # until they are closed, their connections count
        stream = self._opening = _Stream(self._topics)
        try:
            await self._greeted(stream)
            await self._subscribe(stream, stream.topics)
        except Exception as error:
            self._failed(stream, _named(error))
        else:
            self._took_over(stream)

    async def _greeted(self, stream: _Stream) -> None:
        """Open the stream, up to where PocketBase has named it."""
        # A dead token is a guest's for PocketBase, which sends a guest nothing (facts: pocketbase, section 6).
        if not await self._client.is_superuser(self._timing.opening):
            raise AuthenticationFailed("PocketBase does not accept the token as a superuser's")
        stream.opened = stream.heard = time.monotonic()
        stream.task = asyncio.create_task(self._read(stream))
        self._tasks.add(stream.task)
        stream.task.add_done_callback(self._tasks.discard)
        await asyncio.wait([stream.client_id], timeout=self._timing.opening)
        if stream.ended is not None:
            raise stream.ended
        if not stream.client_id.done():
            what = (
                "opened, but then nothing came: is there a proxy that buffers?" if stream.answered else "no answer"
            )
            raise _Trouble("silent", f"GET {PATH}: {what} ({self._timing.opening:g} s)")

    async def _subscribe(self, stream: _Stream, topics: frozenset[str]) -> None:
        answer = await self._client.send(
            "POST",
            PATH,
            body=msgspec.json.encode({"clientId": stream.client_id.result(), "subscriptions": sorted(topics)}),
            repeatable=True,
            deadline=self._timing.opening,
            connection_within=self._timing.connection,
        )
        if stream.ended is not None:
            raise stream.ended
        if not answer.ok:
            raise _refused(answer)

    async def _swap(self, trailing: _Stream) -> None:
        """Subscribe the older stream to the new topics, and let it lead."""
        topics = self._topics
        try:
            await self._subscribe(trailing, topics)
        except Exception as error:
            trailing.spent = True
            self._say(_named(error))
            return
        if self._leading is not None and self._trailing is trailing:  # neither has ended meanwhile
            trailing.topics = topics
            self._lead(trailing, self._leading)

    async def _read(self, stream: _Stream) -> None:
        """The task of a stream."""
        try:
            async with self._client.stream(
                PATH, read=self._timing.silence, connection_within=self._timing.connection
            ) as response:
                _check(response)
                stream.answered = True
                parser = EventParser()
                async for piece in response.aiter_bytes():
                    for message in parser.feed(piece):
                        self._heard(stream, message)
            trouble = _Trouble("ended", "PocketBase, or what stands before it, ended the stream")
        except Exception as error:  # what the owner cannot take is missing too
            trouble = _named(error)
        self._ended(stream, trouble)

    # what happened: no I/O, no await; the state first, then the owner

    def _heard(self, stream: _Stream, message: Message) -> None:
        stream.heard = time.monotonic()
        is_named = stream.client_id.done()
        if message.event == _GREETING:
            if not is_named:
                stream.client_id.set_result(msgspec.json.decode(message.data, type=_Greeting).clientId)
        elif is_named:
            self._owner.received(message.event, message.data)

    def _took_over(self, stream: _Stream) -> None:
        self._opening = None
        if not self._topics:
            self._leave(stream)
            return
        before = self._leading
        if before is not None:
            before.spent = self._doubt is not None or time.monotonic() >= before.opened + self._timing.age
            self._recovered()
        self._doubt = None
        self._lead(stream, before)

    def _lead(self, stream: _Stream, before: _Stream | None) -> None:
        self._leading, self._trailing = stream, before
        self._relieved = time.monotonic()
        is_news = before is None and self._is_first("subscribed")
        tell = self._log.info if is_news else self._log.debug
        tell("realtime stream subscribed", topics=len(stream.topics))
        self._owner.connected(stream.topics)

    def _failed(self, stream: _Stream, trouble: _Trouble) -> None:
        """An attempt did. Where there is no connection for a second stream, the first one makes room."""
        self._leave(stream)
        self._opening = None
        self._failures += 1
        self._pause(self._failures)
        self._say(trouble)
        if trouble.kind == NoConnection.__name__:
            if self._leading is None:
                self._not_before = time.monotonic() + self._timing.starved
                return
            self._leave_all()
            self._not_before = 0.0
            self._owner.lost("the HTTP client has no connection for a second stream")

    def _ended(self, stream: _Stream, trouble: _Trouble) -> None:
        """A stream did, other than by our leaving it."""
        stream.ended = trouble
        if stream is self._opening:
            stream.client_id.cancel()
            return
        if stream is self._leading:
            self._leave_all()
            if time.monotonic() >= stream.opened + self._timing.steady:
                self._recovered()
            self._pause(self._failures)
            self._failures += 1
        elif stream is self._trailing:
            self._trailing = None
        else:
            return
        self._changed.set()
        self._say(trouble)
        self._owner.lost(str(trouble))
        if self._leading is not None:
            self._owner.connected(self._leading.topics)

    def _leave(self, stream: _Stream) -> None:
        if stream.task is not None:
            stream.task.cancel()

    def _leave_all(self) -> None:
        """All but one that is being opened: it is what we will have next."""
        for stream in (self._leading, self._trailing):
            if stream is not None:
                self._leave(stream)
        self._leading = self._trailing = None

    def _pause(self, failures: int) -> None:
        """Make no attempt for a while, after so many in a row failed; none where none did."""
        pause = 0.0
        if failures:
            state = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
            state.attempt_number = failures
            pause = _PAUSES(state)
        self._not_before = time.monotonic() + pause

    def _recovered(self) -> None:
        self._failures = 0
        self._said.clear()

    def _say(self, trouble: _Trouble) -> None:
        tell = self._log.warning if self._is_first(trouble.kind) else self._log.debug
        tell("no realtime stream, trying again", reason=str(trouble))

    def _is_first(self, kind: str) -> bool:
        """Since the last stream that lived for long. Asking makes it the last time."""
        is_first = kind not in self._said
        self._said.add(kind)
        return is_first


class _Greeting(Struct):
    clientId: str


def _check(response: Streamed) -> None:
    what = response.headers.get("Content-Type", "")
    if response.status_code != 200 or not what.lower().startswith("text/event-stream"):
        raise _Trouble(
            f"answered with {response.status_code}",
            f"GET {PATH}: status {response.status_code} and '{what}' in place of PocketBase's event stream; check "
            "the URL, and what stands before PocketBase",
        )


def _refused(answer: Answer) -> _Trouble:
    hint = _HINTS.get(answer.status)
    reason = str(refused(answer, f"POST {PATH}")) + (f"; {hint}" if hint else "")
    return _Trouble(f"refused with {answer.status}", reason)


def _named(error: Exception) -> _Trouble:
    if isinstance(error, _Trouble):
        return error
    if isinstance(error, NoConnection):
        return _Trouble(NoConnection.__name__, f"{error}; {_MORE_CONNECTIONS}")
    return _Trouble(type(error).__name__, str(error) if isinstance(error, PBCachedError) else repr(error))
