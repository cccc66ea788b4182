"""What a read from memory costs, beside Parlant's in-memory database and the bare cost of decoding.

Our session store reads through the cache of an embedded PocketBase, Parlant's from its in-memory database; both
hold the same documents, and twenty sessions far apart are read in turn. We are in exclusive mode: rounds of
nothing but reads leave the event loop no time to follow anything, which no server does; workload `turns` has the
other modes.

* `list_events`: the 20 events of a session; `list_events, 5 of them new`: those from an offset on, as who polls
  asks; `read_session`: its own document.
* `list_events of 500` and `list_events of 500, 5 of them new`: the same of a long conversation.
* `find_one by id` and `find of 20`: the document collection alone, beside decoding the JSON of the same
  documents, which whoever hands out copies has to do: by one look-up in a dict, and in one go.

Everything that is read is in memory, after the first time. At a million events only those sessions are, of our
store, as the rest would have to be loaded through PocketBase's API first; Parlant's looks at all of them for each
read, and is given few.

Before each comparison both stores must give the same answers; each answer is counted; and at the end the cache
must not have asked PocketBase since.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec
from parlant.core.sessions import Event, SessionId, SessionStore

from bench.peers import Peer
from bench.peers.contents import Contents
from bench.peers.memory import memory
from bench.peers.ours import OurPeer, ours
from bench.rounds import Contender, Turns, Work
from bench.run import Run
from bench.samples import EVENTS_OF_A_SESSION, LONG_SESSION, stored_session
from pb_cached.exact import dumps

SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)
JUDGED: Final = (1_000, 10_000, 100_000)
WARM: Final = 100_000
"""A store of so many events is read into memory as a whole."""
SAMPLE: Final = 20
"""Sessions that are read in turn."""
NEW: Final = 5
LONG: Final = 500
FOUND_AT_MOST: Final = 50_000
"""Events of ours in a round: about half a second."""
DECODING: Final = "decoding alone"

Read = Callable[[SessionStore, SessionId], Awaitable[int]]
"""Returns how many it has found."""


async def measure(run: Run) -> None:
    sizes = run.sizes(SIZES, SIZES[:1])
    for size in sizes:
        async with AsyncExitStack() as stack:
            contents = Contents(size, long=LONG)
            our = await stack.enter_async_context(ours(contents, mode="exclusive", commit="log"))
            parlants = await stack.enter_async_context(memory(contents))
            await _compare(run, our, parlants, contents, with_long=size == sizes[0])
            if size == sizes[0]:
                await _against_decoding(run, our)


async def _compare(run: Run, our: OurPeer, parlants: Peer, contents: Contents, *, with_long: bool) -> None:
    size = contents.events
    step = max(1, contents.sessions // SAMPLE)
    sessions = [stored_session(number) for number in range(0, contents.sessions, step)][:SAMPLE]
    if size <= WARM:
        for collection in (our.stores.session_store._events, our.stores.session_store._sessions):
            await collection.warm()
    else:
        run.note(f"reads, {size:,} events stored: of our store only what is read is in memory")
    for id_ in (*sessions, LONG_SESSION):
        answers = await _answers(our.session_store, id_)
        if size <= WARM or id_ == sessions[-1]:  # Parlant's needs a second for each of a million events
            assert answers == await _answers(parlants.session_store, id_), f"both stores hold the same of {id_}"
    before = _misses(our)

    async def against(workload: str, read: Read, ids: Sequence[SessionId], found: int, scanned: bool) -> Turns:
        """
        Args:
            found: by each read.
            scanned: does Parlant's look at all events for it, or at all sessions?
        """
        scan = size if scanned else contents.sessions
        most = FOUND_AT_MOST // found
        fewer = max(1, min(most, run.scaled(400_000, 40_000) // scan))
        return await run.take_turns(
            workload,
            [
                Contender(
                    our.name, _reads(our.session_store, read, ids, found), run.scaled(most, most // 8), our.servers
                ),
                Contender(parlants.name, _reads(parlants.session_store, read, ids, found), fewer),
            ],
            of="events stored",
            size=size,
            unit="read",
        )

    turns = await against("list_events", _list(None), sessions, EVENTS_OF_A_SESSION, True)
    if size in JUDGED:
        run.judge(f"reads.list.{size}", turns.faster(our.name, parlants.name))
    await against("list_events, 5 of them new", _list(EVENTS_OF_A_SESSION - NEW), sessions, NEW, True)
    await against("read_session", _read_session, sessions, 1, False)
    if with_long:
        await against("list_events of 500", _list(None), [LONG_SESSION], LONG, True)
        await against("list_events of 500, 5 of them new", _list(LONG - NEW), [LONG_SESSION], NEW, True)
    assert _misses(our) == before, "everything was read from memory"


async def _answers(store: SessionStore, id_: SessionId) -> tuple[Sequence[Event], object]:
    return await store.list_events(id_), await store.read_session(id_)


def _misses(our: OurPeer) -> int:
    collections = our.stores.stats().sessions.collections
    return sum(collections[name].misses + collections[name].through for name in ("events", "sessions"))


def _list(min_offset: int | None) -> Read:
    async def read(store: SessionStore, id_: SessionId) -> int:
        return len(await store.list_events(id_, min_offset=min_offset))

    return read


async def _read_session(store: SessionStore, id_: SessionId) -> int:
    return int((await store.read_session(id_)).id == id_)


def _reads(store: SessionStore, read: Read, ids: Sequence[SessionId], found: int) -> Work:
    """Reads these sessions in turn."""
    turn = itertools.cycle(ids)

    async def work(reads: int) -> Sequence[float]:
        waits = []
        for id_ in itertools.islice(turn, reads):
            begun = time.perf_counter()
            assert await read(store, id_) == found
            waits.append(time.perf_counter() - begun)
        return waits

    return work


async def _against_decoding(run: Run, our: OurPeer) -> None:
    events: Any = our.stores.session_store._events
    sessions: Any = our.stores.session_store._sessions
    id_ = stored_session(0)
    by_id: Any = {"id": {"$eq": id_}}
    by_session: Any = {"session_id": {"$eq": id_}}
    decode = msgspec.json.Decoder().decode
    found = [dict(document) for document in (await events.find(by_session)).items]
    held, listed = {id_: dumps(dict(await sessions.find_one(by_id)))}, dumps(found)
    assert len(found) == EVENTS_OF_A_SESSION and decode(listed) == found

    async def one(reads: int) -> Sequence[float]:
        for _ in range(reads):
            await sessions.find_one(by_id)
        return []

    async def one_decoded(reads: int) -> Sequence[float]:
        for _ in range(reads):
            decode(held[id_])
        return []

    async def twenty(reads: int) -> Sequence[float]:
        for _ in range(reads):
            await events.find(by_session)
        return []

    async def twenty_decoded(reads: int) -> Sequence[float]:
        for _ in range(reads):
            decode(listed)
        return []

    for key, workload, ours_, theirs, reads in (
        ("reads.one", "find_one by id", one, one_decoded, run.scaled(20_000, 4000)),
        ("reads.twenty", "find of 20", twenty, twenty_decoded, run.scaled(5000, 1000)),
    ):
        contenders = [Contender(our.name, ours_, reads, our.servers), Contender(DECODING, theirs, reads)]
        turns = await run.take_turns(workload, contenders, of="events stored", size=JUDGED[0], unit="read")
        run.judge(key, turns.faster(DECODING, our.name))
