"""Reads through the cache, on a real PocketBase: what is in memory is not asked for again, and is never older than
what a reader has been given before (design: section 5, rules 3, 8 and 9)."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypedDict, cast

import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId, SortDirection
from parlant.core.persistence.document_database import DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.cache.collection import Rule
from pb_cached.cache.rules import rule_for
from pb_cached.cache.stats import CollectionStats
from pb_cached.config import CacheSettings, CollectionSettings, WriteSettings
from pb_cached.errors import (
    CollectionNotFound,
    ConfigError,
    InvalidFilter,
    OutcomeUnknown,
    PBCachedError,
    RequestRejected,
)
from tests.conftest import EXCLUSIVE, DatabaseMaker
from tests.faults import EVERY, Exchange, FaultProxy, Gate, answer, cut_after

pytestmark = pytest.mark.slow

DESC = SortDirection.DESC


class Line(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    session_id: str
    offset: int
    text: str


Lines = DocumentCollection[Line]


def line(number: int, session: str = "s1", **fields: Any) -> Line:
    whole = {
        "id": f"{session}-{number}",
        "creation_utc": f"2026-01-01T00:00:{number:02}",
        "version": "1.0.0",
        "session_id": session,
        "offset": number,
        "text": "",
    }
    return cast(Line, whole | fields)


def change(**fields: Any) -> Line:
    return cast(Line, fields)


def of(session: str, **rest: Any) -> Any:
    return {"session_id": {"$eq": session}, **rest}


def by_id(id_: str) -> Any:
    return {"id": {"$eq": id_}}


class Scene:
    """A database behind a proxy, which counts and disturbs, and its collection `events`: lines, by session."""

    def __init__(self, database: PocketBaseDocumentDatabase, proxy: FaultProxy, lines: Lines, prefix: str) -> None:
        self.database = database
        self.proxy = proxy
        self.lines = lines
        self.path = f"/api/collections/{prefix}_events/records"
        self.commits = f"/api/collections/{prefix}_events_log/records?"

    @property
    def stats(self) -> CollectionStats:
        return self.database.stats().collections["events"]

    def asked(self) -> int:
        """How often PocketBase was asked for events."""
        return self.proxy.count("GET", self.path)

    async def asks(self, read: Awaitable[Any]) -> tuple[int, Any]:
        """How often a read asks PocketBase, and its answer."""
        before = self.asked()
        found = await read
        return self.asked() - before, found

    async def numbers(self, session: str = "s1", **rest: Any) -> list[int]:
        return [found["offset"] for found in (await self.lines.find(of(session, **rest))).items]

    async def first(self, id_: str) -> Line | None:
        return await self.lines.find_one(by_id(id_))


SceneMaker = Callable[..., Awaitable[Scene]]


@pytest_asyncio.fixture
async def make(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy, prefix: str
) -> AsyncIterator[SceneMaker]:
    """Makes scenes; by default with a cache, and sessions `s1` and `s2` of three lines each."""
    opened: list[PocketBaseDocumentDatabase] = []

    async def make(*, sessions: int = 2, lines: int = 3, **sections: Any) -> Scene:
        params = pocketbase.connection_params | {"url": proxy.url}
        config = Config(**{"coherence": EXCLUSIVE, "writes": WriteSettings(deadline=5.0)} | sections)
        database = await make_database(connection_params=params, config=config).__aenter__()
        opened.append(database)
        collection = await database.get_or_create_collection("events", Line, identity_loader_for(Line))
        for session in range(1, sessions + 1):
            for number in range(lines):
                await collection.insert_one(line(number, f"s{session}"))
        return Scene(database, proxy, collection, prefix)

    yield make
    proxy.forget_plans()
    for database in opened:
        await database.__aexit__(None, None, None)


@pytest_asyncio.fixture
async def scene(make: SceneMaker) -> Scene:
    return await make()


# --- what is in memory -----------------------------------------------------------------------------------------


async def test_a_partition_is_asked_for_once(scene: Scene) -> None:
    assert await scene.asks(scene.numbers()) == (1, [0, 1, 2])
    assert await scene.asks(scene.numbers()) == (0, [0, 1, 2])
    assert await scene.asks(scene.numbers(offset={"$gte": 1})) == (0, [1, 2])
    assert await scene.asks(scene.numbers(offset={"$gte": 9})) == (0, [])
    latest = scene.lines.find_one(of("s1"), [("offset", DESC)])
    assert await scene.asks(latest) == (0, line(2))


async def test_that_there_is_none_is_known_too(scene: Scene) -> None:
    assert await scene.asks(scene.numbers("nobody")) == (1, [])
    assert await scene.asks(scene.numbers("nobody")) == (0, [])
    assert scene.stats.negative_hits == 1


async def test_an_id_tells_the_partition(scene: Scene) -> None:
    assert await scene.asks(scene.first("s2-1")) == (2, line(1, "s2"))  # where it is, and what is there
    assert await scene.asks(scene.first("s2-2")) == (0, line(2, "s2"))
    assert await scene.asks(scene.lines.find_one(by_id("s2-2") | of("s2"))) == (0, line(2, "s2"))
    assert await scene.asks(scene.lines.find_one(by_id("s2-2") | of("s1"))) == (1, None)
    assert await scene.asks(scene.first("nowhere")) == (1, None)


async def test_alternatives_are_answered_from_their_partitions(scene: Scene) -> None:
    await scene.numbers("s1"), await scene.numbers("s2")
    either: Any = {"$or": [of("s1", offset={"$eq": 2}), of("s2", offset={"$gte": 1})]}
    asked, found = await scene.asks(scene.lines.find(either))
    assert asked == 0
    assert [document["id"] for document in found.items] == ["s2-1", "s1-2", "s2-2"]


async def test_what_no_partition_can_answer_goes_to_pocketbase_and_evicts_nothing(make: SceneMaker) -> None:
    scene = await make(cache=CacheSettings(max_bytes=3_000))
    await scene.numbers("s1")
    kept = scene.stats
    for _ in range(3):
        asked, found = await scene.asks(scene.lines.find({"text": {"$eq": ""}}))
        assert (asked, found.total_count) == (1, 6)
    assert await scene.asks(scene.lines.find({}, limit=4)) != (0, None)
    assert scene.stats.through == kept.through + 4
    assert (scene.stats.evictions, scene.stats.documents) == (0, kept.documents)
    assert await scene.asks(scene.numbers("s1")) == (0, [0, 1, 2])


async def test_a_cursor_within_a_partition_is_followed_in_memory(scene: Scene) -> None:
    page = await scene.lines.find(of("s1"), limit=2)
    asked, rest = await scene.asks(scene.lines.find(of("s1"), limit=2, cursor=page.next_cursor))
    assert (asked, rest.total_count, [document["offset"] for document in rest.items]) == (0, 1, [2])


async def test_a_malformed_filter_is_an_error_whatever_is_cached(scene: Scene) -> None:
    await scene.numbers()
    for bad in (
        {"id": 5},
        of("s1", offset={"$about": 1}),
        {"session_id": "s1"},
        {"$or": 1},
        {"$and": [{"id": 0}]},
    ):
        with pytest.raises(InvalidFilter):
            await scene.lines.find(cast(Any, bad))


async def test_a_returned_document_is_the_callers_own(scene: Scene) -> None:
    for _ in range(2):
        found = await scene.first("s1-1")
        assert found == line(1)
        found["text"] = "scribbled over"


# --- our own writes --------------------------------------------------------------------------------------------


async def test_writes_show_without_asking_again(scene: Scene) -> None:
    await scene.numbers("s1"), await scene.numbers("s2")
    before = scene.asked()
    await scene.lines.insert_one(line(3))
    await scene.lines.update_one(by_id("s1-0"), change(text="new"))
    await scene.lines.delete_one(by_id("s1-1"))
    await scene.lines.update_one(by_id("s1-2"), change(session_id="s2", offset=3))
    assert await scene.numbers("s1") == [0, 3]
    assert sorted(await scene.numbers("s2")) == [0, 1, 2, 3]
    assert await scene.first("s1-0") == line(0, text="new")
    assert await scene.first("s1-2") == line(2, session_id="s2", offset=3)
    assert scene.asked() == before


async def test_ids_that_are_looked_for_at_once_share_requests(scene: Scene) -> None:
    """Of an id alone it is not known in which partition its document is."""
    ids = [f"s1-{number}" for number in range(3)] + ["nobody", "nothing"]
    asked, found = await scene.asks(asyncio.gather(*(scene.first(id_) for id_ in ids * 20)))
    assert asked == 2, "where they are, and the partition"
    assert found == [line(0), line(1), line(2), None, None] * 20


async def test_a_failed_search_for_an_id_is_told_and_not_kept(scene: Scene, proxy: FaultProxy) -> None:
    proxy.plan("GET", scene.path, answer(500), at=(1,))
    outcomes = await asyncio.gather(*(scene.first("s1-1") for _ in range(5)), return_exceptions=True)
    assert all(isinstance(outcome, RequestRejected) for outcome in outcomes)
    assert await scene.first("s1-1") == line(1)


async def test_a_write_whose_caller_left_shows_when_it_is_committed(scene: Scene, proxy: FaultProxy) -> None:
    await scene.numbers()
    gate = Gate()
    proxy.plan("POST", scene.commits, gate)
    caller = asyncio.create_task(scene.lines.insert_one(line(3)))
    await gate.reached.wait()
    caller.cancel()
    assert await scene.numbers() == [0, 1, 2]
    gate.open()
    await scene.database.flush()
    assert await scene.asks(scene.numbers()) == (0, [0, 1, 2, 3])


async def test_a_refused_write_leaves_the_cache_as_it_was(scene: Scene, proxy: FaultProxy) -> None:
    await scene.numbers()
    proxy.plan("POST", scene.commits, answer(500), at=EVERY)
    with pytest.raises(PBCachedError):
        await scene.lines.insert_one(line(3))
    assert await scene.asks(scene.numbers()) == (0, [0, 1, 2])


async def test_what_may_have_been_written_is_not_answered_from_memory(make: SceneMaker, proxy: FaultProxy) -> None:
    scene = await make(writes=WriteSettings(deadline=0.5))
    await scene.numbers("s1"), await scene.numbers("s2")
    proxy.plan("POST", scene.commits, cut_after, at=EVERY)
    with pytest.raises(OutcomeUnknown):
        await scene.lines.insert_one(line(3))
    assert await scene.asks(scene.numbers("s1")) == (1, [0, 1, 2, 3])
    assert await scene.asks(scene.numbers("s1")) == (1, [0, 1, 2, 3])
    assert await scene.asks(scene.numbers("s2")) == (0, [0, 1, 2])


async def test_an_update_that_may_have_moved_a_record_makes_all_partitions_doubtful(
    make: SceneMaker, proxy: FaultProxy
) -> None:
    scene = await make(writes=WriteSettings(deadline=0.5))
    await scene.numbers("s1"), await scene.numbers("s2")
    proxy.plan("POST", scene.commits, cut_after, at=EVERY)
    with pytest.raises(OutcomeUnknown):
        await scene.lines.update_one(by_id("s1-2"), change(session_id="s2", offset=3))
    assert sorted(await scene.numbers("s2")) == [0, 1, 2, 3]
    assert await scene.numbers("s1") == [0, 1]


async def test_whoever_read_pocketbase_never_finds_the_cache_to_be_older(scene: Scene, proxy: FaultProxy) -> None:
    """A commit is applied, and its answer on the way: (1) a reader gets the new state from PocketBase; (2) the
    same reader asks the cache, which does not know of it yet."""
    await scene.numbers()
    applied, answered = asyncio.Event(), asyncio.Event()

    async def slowly(exchange: Exchange) -> None:
        pieces = [piece async for piece in exchange.ask()]
        applied.set()
        await answered.wait()
        for piece in pieces:
            await exchange.send(piece)

    proxy.plan("POST", scene.commits, slowly)
    write = asyncio.create_task(scene.lines.update_one(by_id("s1-0"), change(text="new")))
    await applied.wait()

    async def read_twice() -> tuple[int, Line | None]:
        through = await scene.lines.find({"text": {"$eq": "new"}})
        return through.total_count, await scene.first("s1-0")

    reader = asyncio.create_task(read_twice())
    asyncio.get_running_loop().call_later(0.2, answered.set)
    assert await reader == (1, line(0, text="new"))
    await write


async def test_a_record_that_others_deleted_is_noticed_by_the_write_that_misses_it(
    scene: Scene, make_database: DatabaseMaker
) -> None:
    await scene.numbers()
    async with make_database() as other:
        lines = await other.get_or_create_collection("events", Line, identity_loader_for(Line))
        await lines.delete_one(by_id("s1-1"))
    assert (await scene.lines.update_one(by_id("s1-1"), change(text="late"))).matched_count == 0
    assert await scene.asks(scene.numbers()) == (0, [0, 2])


async def test_a_change_of_others_is_noticed_by_our_own_next_one(
    scene: Scene, make_database: DatabaseMaker
) -> None:
    await scene.numbers()
    async with make_database() as other:
        lines = await other.get_or_create_collection("events", Line, identity_loader_for(Line))
        await lines.update_one(by_id("s1-1"), change(text="theirs"))
    updated = await scene.lines.update_one(by_id("s1-1"), change(offset=7))
    assert updated.updated_document == line(1, text="theirs", offset=7)
    assert await scene.first("s1-1") == line(1, text="theirs", offset=7)


# --- loads -----------------------------------------------------------------------------------------------------


async def test_however_many_ask_a_partition_is_loaded_once(scene: Scene) -> None:
    asked, found = await scene.asks(asyncio.gather(*(scene.numbers() for _ in range(50))))
    assert (asked, found) == (1, [[0, 1, 2]] * 50)
    assert (scene.stats.misses, scene.stats.loads) == (50, 1)


async def test_what_is_missing_at_the_same_time_is_asked_for_together(make: SceneMaker) -> None:
    scene = await make(sessions=30)
    asked, found = await scene.asks(asyncio.gather(*(scene.numbers(f"s{n}") for n in range(1, 31))))
    assert found == [[0, 1, 2]] * 30
    assert asked == 2


async def test_who_waits_for_a_load_gets_it_though_its_first_caller_left(scene: Scene, proxy: FaultProxy) -> None:
    gate = Gate()
    proxy.plan("GET", scene.path, gate)
    first = asyncio.create_task(scene.numbers())
    await gate.reached.wait()
    others = [asyncio.create_task(scene.numbers()) for _ in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    gate.open()
    assert await scene.asks(asyncio.gather(*others)) == (0, [[0, 1, 2]] * 3)
    assert first.cancelled()


async def test_a_failed_load_is_an_error_for_those_who_waited_and_for_nobody_else(
    scene: Scene, proxy: FaultProxy
) -> None:
    proxy.plan("GET", scene.path, answer(400))
    found = await asyncio.gather(*(scene.numbers() for _ in range(3)), return_exceptions=True)
    assert [type(error).__name__ for error in found] == ["RequestRejected"] * 3
    assert await scene.asks(scene.numbers()) == (1, [0, 1, 2])


async def test_what_changes_while_a_load_runs_is_joined_with_it(scene: Scene, proxy: FaultProxy) -> None:
    """The load's rows are older than the writes that are acknowledged before it ends."""
    read, ended = asyncio.Event(), asyncio.Event()

    async def slowly(exchange: Exchange) -> None:
        pieces = [piece async for piece in exchange.ask()]
        read.set()
        await ended.wait()
        for piece in pieces:
            await exchange.send(piece)

    await scene.numbers("s2")  # keeps the ids at hand that are written to
    proxy.plan("GET", f"{scene.path}", slowly)
    reader = asyncio.create_task(scene.numbers())
    await read.wait()
    await scene.lines.insert_one(line(3))
    await scene.lines.update_one(of("s2", offset={"$eq": 2}), change(session_id="s1", offset=4))
    ended.set()
    assert sorted(await reader) == [0, 1, 2, 3, 4]


async def test_closing_while_a_load_runs_tells_its_reader(make: SceneMaker, proxy: FaultProxy) -> None:
    scene = await make()
    gate = Gate()
    proxy.plan("GET", scene.path, gate)
    reader = asyncio.create_task(scene.numbers())
    await gate.reached.wait()
    await scene.database.__aexit__(None, None, None)
    with pytest.raises(PBCachedError, match="closed"):
        await reader
    await scene.database.__aenter__()


# --- bounds ----------------------------------------------------------------------------------------------------


async def test_a_partition_beyond_its_bound_is_read_through(make: SceneMaker) -> None:
    scene = await make(lines=8, collections={"events": CollectionSettings(max_partition_documents=5)})
    for _ in range(2):
        assert await scene.numbers("s1") == list(range(8))
    assert (scene.stats.documents, scene.stats.hits) == (0, 0)


async def test_a_partition_that_outgrows_its_bound_is_read_through_from_then_on(make: SceneMaker) -> None:
    scene = await make(lines=5, collections={"events": CollectionSettings(max_partition_documents=5)})
    assert await scene.numbers("s1") == list(range(5))
    assert scene.stats.documents == 5
    await scene.lines.insert_one(line(5))
    assert await scene.numbers("s1") == list(range(6))
    assert scene.stats.documents == 0


async def test_too_many_together_are_loaded_one_by_one(make: SceneMaker) -> None:
    scene = await make(sessions=3, lines=4, collections={"events": CollectionSettings(max_partition_documents=5)})
    found = await asyncio.gather(*(scene.numbers(f"s{n}") for n in (1, 2, 3)))
    assert found == [list(range(4))] * 3
    assert scene.stats.documents == 12


async def test_a_document_larger_than_the_memory_is_read_through(make: SceneMaker) -> None:
    scene = await make(cache=CacheSettings(max_bytes=5_000))
    await scene.numbers("s2")
    await scene.lines.insert_one(line(3, text="x" * 10_000))
    for _ in range(2):
        assert await scene.numbers("s1") == [0, 1, 2, 3]
    assert await scene.asks(scene.numbers("s2")) == (0, [0, 1, 2])


async def test_no_memory_at_all_is_no_cache(make: SceneMaker) -> None:
    scene = await make(cache=CacheSettings(max_bytes=0))
    for _ in range(2):
        assert await scene.asks(scene.numbers()) == (1, [0, 1, 2])
    assert scene.database.stats().collections == {}
    await scene.database.warm()


async def test_memory_stays_within_its_bound_whatever_is_read(make: SceneMaker) -> None:
    scene = await make(sessions=40, cache=CacheSettings(max_bytes=20_000))
    choices = random.Random(3)
    for _ in range(200):
        session = f"s{choices.randint(1, 40)}"
        assert await scene.numbers(session) == [0, 1, 2]
        stats = scene.database.stats()
        assert stats.collections["events"].bytes == stats.cache_bytes <= stats.cache_max_bytes == 20_000
    assert scene.stats.evictions > 0
    assert scene.stats.hits > 0


# --- openings --------------------------------------------------------------------------------------------------


async def test_databases_of_one_connection_share_what_is_in_memory(make: SceneMaker) -> None:
    one = await make()
    other = await make(sessions=0)
    await one.numbers()
    assert await other.asks(other.numbers()) == (0, [0, 1, 2])
    await other.lines.insert_one(line(3))
    assert await one.asks(one.numbers()) == (0, [0, 1, 2, 3])


async def test_a_collection_that_is_made_anew_begins_empty(make: SceneMaker) -> None:
    one, other = await make(), await make(sessions=0)
    await one.numbers()
    await one.database.delete_collection("events")
    lines = await one.database.get_or_create_collection("events", Line, identity_loader_for(Line))
    assert (await lines.find(of("s1"))).items == []
    await lines.insert_one(line(0))
    assert await other.numbers() == [0]


async def test_what_another_server_wrote_is_read_where_nothing_is_cached(
    make: SceneMaker, make_database: DatabaseMaker
) -> None:
    scene = await make(coherence=Config().coherence)
    await scene.numbers()
    async with make_database() as other:
        lines = await other.get_or_create_collection("events", Line, identity_loader_for(Line))
        await lines.insert_one(line(3))
    assert await scene.numbers() == [0, 1, 2, 3]


# --- warming ---------------------------------------------------------------------------------------------------


async def test_a_warm_collection_is_not_asked_for(make: SceneMaker) -> None:
    scene = await make(sessions=150, lines=2)
    await scene.database.warm("events")
    assert scene.stats.documents == 300
    assert await scene.asks(scene.numbers("s7")) == (0, [0, 1])
    assert await scene.asks(scene.first("s140-1")) == (0, line(1, "s140"))


async def test_warming_stops_before_it_evicts_what_it_brought(make: SceneMaker) -> None:
    scene = await make(sessions=300, lines=1, cache=CacheSettings(max_bytes=150_000))
    await scene.database.warm()
    assert scene.stats.evictions == 0
    assert 120_000 < scene.stats.bytes <= 150_000
    assert await scene.asks(scene.numbers("s300")) == (0, [0])  # the newest
    assert (await scene.asks(scene.numbers("s1")))[0] == 1


async def test_a_collection_can_be_warmed_when_it_is_opened(make: SceneMaker) -> None:
    await make()
    warm = await make(sessions=0, cache=CacheSettings(warm=("events",)))
    async with asyncio.timeout(10):
        while True:
            if warm.stats.documents == 6:
                break
            await asyncio.sleep(0.01)
    assert await warm.asks(warm.numbers()) == (0, [0, 1, 2])


async def test_settings_for_collections_that_nobody_opened_are_told_once_at_the_end(
    make_database: DatabaseMaker, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Any name may come, as long as a database is open; and Parlant's may belong to another process."""
    config = Config(
        cache=CacheSettings(warm=("events", "lines", "liens")),
        collections={
            "variables": CollectionSettings(),
            "lines": CollectionSettings(),
            "leins": CollectionSettings(),
        },
    )
    options = {"config": config, "logger": logging.getLogger("test")}
    one, other = (make_database(collection_prefix=f"{prefix}_{name}", **options) for name in ("a", "b"))
    async with one, other:
        await one.get_or_create_collection("lines", Line, identity_loader_for(Line))
    told = [record.message for record in caplog.records if "no effect" in record.message]
    assert [message.partition("(")[2] for message in told] == [
        "key=cache.warm collections='liens')", "key=collections collections='leins')",
    ]  # fmt: skip


async def test_a_collection_that_is_not_open_cannot_be_warmed(scene: Scene) -> None:
    with pytest.raises(CollectionNotFound, match="'evnts' is not open"):
        await scene.database.warm("evnts")


# --- rules -----------------------------------------------------------------------------------------------------

FIELDS = ("id", "creation_utc", "session_id", "offset")


def test_parlants_collections_have_rules_and_others_go_by_id() -> None:
    assert rule_for("events", FIELDS, None) == Rule(("session_id",), sequence="offset", unique_ids=True)
    assert rule_for("events", ("id", "date"), None) == rule_for("notes", ("id",), None) == Rule(("id",))


def test_what_the_user_sets_counts_and_the_rest_stays() -> None:
    settings = CollectionSettings(max_partition_documents=7, sequence="")
    assert rule_for("events", FIELDS, settings) == Rule(("session_id",), unique_ids=True, max_documents=7)
    assert rule_for("notes", FIELDS, CollectionSettings(partition_by="")) == Rule(())


async def test_a_field_that_no_document_has_is_refused_by_name(make: SceneMaker) -> None:
    with pytest.raises(ConfigError, match=r"collections\.events: its documents have no field 'sesion_id'"):
        await make(collections={"events": CollectionSettings(partition_by="sesion_id")})


# --- everything at once ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("max_bytes", [1_000_000, 6_000], ids=["all fits", "evicts all the time"])
async def test_no_reader_ever_sees_an_older_state_than_before(
    make: SceneMaker, proxy: FaultProxy, max_bytes: int
) -> None:
    """Counters that only rise, one writer each, and many readers in every way there is, while answers are lost,
    late, and asked for again: what a reader has seen of a counter never falls, nor is less than what was
    acknowledged before it asked."""
    scene = await make(sessions=0, cache=CacheSettings(max_bytes=max_bytes))
    choices = random.Random(7)
    counters = [f"s{session}-{number}" for session in (1, 2, 3) for number in range(4)]
    for counter in counters:
        session, _, number = counter.partition("-")
        await scene.lines.insert_one(line(int(number), session, text="0"))
    acknowledged = dict.fromkeys(counters, 0)
    running = True

    async def disturb(exchange: Exchange) -> None:
        fate = choices.random()
        await asyncio.sleep(choices.random() * 0.02)
        if fate < 0.15:
            await exchange.ask_in_vain()
            exchange.hang_up()
        elif fate < 0.2:
            exchange.hang_up()
        elif fate < 0.4:
            pieces = [piece async for piece in exchange.ask()]
            await asyncio.sleep(choices.random() * 0.05)
            for piece in pieces:
                await exchange.send(piece)
        else:
            await exchange.forward()

    proxy.plan("POST", scene.commits, disturb, at=EVERY)
    proxy.plan("GET", scene.path, disturb, at=EVERY)

    async def write(counter: str) -> None:
        for value in range(1, 25):
            await scene.lines.update_one(by_id(counter), change(text=str(value)))
            acknowledged[counter] = value
            await asyncio.sleep(choices.random() * 0.01)

    async def read() -> int:
        seen = dict.fromkeys(counters, 0)
        reads = 0
        while running:
            counter = choices.choice(counters)
            least = {name: max(seen[name], acknowledged[name]) for name in counters}
            where = choices.choice([by_id(counter), of(counter[:2]), {"version": {"$eq": "1.0.0"}}])
            found = {document["id"]: int(document["text"]) for document in (await scene.lines.find(where)).items}
            for name, value in found.items():
                assert value >= least[name], f"{name} fell from {least[name]} to {value}"
                seen[name] = value
            reads += 1
            await asyncio.sleep(0)
        return reads

    readers = [asyncio.create_task(read()) for _ in range(6)]
    await asyncio.gather(*map(write, counters))
    running = False
    assert sum(await asyncio.gather(*readers)) > 100
    assert {document["id"]: document["text"] for document in (await scene.lines.find({})).items} == dict.fromkeys(
        counters, "24"
    )
