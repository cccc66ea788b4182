"""A log is bounded by time and by bytes, and keeping it so holds up nobody's write (design: section 4)."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any, TypedDict

import httpx
import msgspec
import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId
from parlant.core.persistence.document_database import DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.config import CoherenceSettings, CollectionSettings, PocketBaseSettings, WriteSettings
from pb_cached.errors import NotCommitted
from pb_cached.pocketbase.commit import trimming
from pb_cached.pocketbase.commit.trimming import Step
from pb_cached.pocketbase.ids import first_id_at
from pb_cached.writes import committer
from tests.conftest import DatabaseMaker
from tests.faults import EVERY, FaultProxy, Gate

slow = pytest.mark.slow
MOST_BYTES = 65_536
SOON = 20.0


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    text: str


Notes = DocumentCollection[Note]


def note(id_: str, text: str = "") -> Note:
    return Note(id=ObjectId(id_), creation_utc="2026", version=Version.String("1.0.0"), text=text)


def by_id(id_: str) -> Any:
    return {"id": {"$eq": id_}}


async def open_notes(database: PocketBaseDocumentDatabase) -> Notes:
    return await database.get_or_create_collection("notes", Note, identity_loader_for(Note))


def config(mode: Any = "off", commit: Any = "log", **writes: Any) -> Config:
    return Config(
        pocketbase=PocketBaseSettings(commit=commit),
        writes=WriteSettings(**writes),
        coherence=CoherenceSettings(mode=mode, max_staleness=2.0, heartbeat=0.2),
        collections={"notes": CollectionSettings(log=True)},
    )


class PocketBase:
    """Itself, past us."""

    def __init__(self, http: httpx.AsyncClient, log: str) -> None:
        self.log = log
        self.http = http

    async def sql(self, query: str) -> list[list[str]]:
        answer = (await self.http.post("/api/sql", json={"query": query})).raise_for_status()
        return list(answer.json()["rows"])

    async def commits(self) -> list[list[str]]:
        """Bytes of what each commit of the log holds, and whether it bars the log, in their order."""
        return await self.sql(
            f"SELECT octet_length(payload), guard='' FROM `{self.log}` WHERE n>0 AND id<'z' ORDER BY id"
        )

    async def add_old_commits(self, count: int, guard: bool) -> None:
        first = first_id_at(time.time() - 7_200)[:10]
        await self.sql(
            f"INSERT INTO `{self.log}`(id,n,server{', guard' if guard else ''}) "
            f"SELECT '{first}'||printf('%05d',x),0,'old'{',x' if guard else ''} "
            f"FROM (WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<{count}) SELECT x FROM c)"
        )

    async def old_commits(self) -> int:
        ((count,),) = await self.sql(f"SELECT count(*) FROM `{self.log}` WHERE server='old'")
        return int(count)


@pytest_asyncio.fixture
async def stored(pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[PocketBase]:
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers, timeout=30) as http:
        yield PocketBase(http, f"{prefix}_notes_log")


@pytest.fixture
def through(pocketbase: PocketBaseServer, proxy: FaultProxy) -> Any:
    return {**pocketbase.connection_params, "url": proxy.url}


async def until(condition: Any) -> None:
    async with asyncio.timeout(SOON):
        while not await condition():  # noqa: ASYNC110 - PocketBase tells nobody
            await asyncio.sleep(0.01)


def test_steps_are_as_long_as_they_may_be_whatever_the_records_weigh() -> None:
    for weight, rests_at in ((0.000_01, trimming.MOST), (0.002, range(6, 26)), (5.0, 1)):
        step = Step()
        for _ in range(20):
            step.took(step.records * weight)
        assert step.records == rests_at if isinstance(rests_at, int) else step.records in rests_at


@slow
async def test_no_write_waits_for_a_trim(
    make_database: DatabaseMaker, proxy: FaultProxy, through: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_database(connection_params=through, config=config()) as database:
        notes = await open_notes(database)
        monkeypatch.setattr(committer, "TRIM_EVERY", 1)
        gate = Gate()
        proxy.plan("POST", "/api/sql", gate, at=EVERY)
        await notes.insert_one(note("a"))
        await asyncio.wait_for(gate.reached.wait(), SOON)
        async with asyncio.timeout(SOON):
            for number in range(20):
                await notes.insert_one(note(str(number)))
        assert not gate.is_open
        waiting = [each for each in proxy.matching("POST", "/api/sql") if not each.finished.is_set()]
        assert len(waiting) == 1, "one at a time"
        gate.open()


@slow
async def test_a_trim_that_hangs_holds_closing_no_longer_than_is_set(
    make_database: DatabaseMaker, proxy: FaultProxy, through: Any
) -> None:
    database = await make_database(connection_params=through, config=config(close_timeout=1.0)).__aenter__()
    notes = await open_notes(database)
    await database.flush()
    trims, commits = Gate(), Gate()
    proxy.plan("POST", "/api/sql", trims, at=EVERY)
    for each in database._committers.values():
        if each._trimming is not None:
            await asyncio.wait([each._trimming])
        each.trim_in_background()
    proxy.plan("POST", "/api/collections/", commits, at=EVERY)
    write = asyncio.create_task(notes.insert_one(note("a")))
    await asyncio.wait_for(commits.reached.wait(), SOON)
    begun = time.monotonic()
    with pytest.raises(NotCommitted):
        await database.__aexit__(None, None, None)
    assert 1.0 <= time.monotonic() - begun < 1.9
    with pytest.raises(NotCommitted):
        await write
    trims.open()
    commits.open()


@slow
@pytest.mark.parametrize("commit", ["log", "batch"])
async def test_a_long_log_is_trimmed_in_short_steps(
    make_database: DatabaseMaker, proxy: FaultProxy, through: Any, stored: PocketBase, commit: str
) -> None:
    async with make_database(connection_params=through, config=config(commit=commit)) as database:
        await open_notes(database)
        await stored.add_old_commits(1_000, guard=commit == "log")
        (trimmed,) = [each for name, each in database._committers.items() if name.endswith("notes_log")]
        assert trimmed._trimming is not None
        await asyncio.wait([trimmed._trimming])
        trimmed.trim_in_background()

        async def is_trimmed() -> bool:
            return await stored.old_commits() == 0

        await until(is_trimmed)
    queries = [msgspec.json.decode(each.body)["query"] for each in proxy.matching("POST", "/api/sql")]
    limits = [
        int(limit)
        for query in queries
        if query.startswith("DELETE")
        for limit in re.findall(r"LIMIT (\d+)", query)
    ]
    assert sum(limits) >= 1_000
    assert max(limits) <= trimming.MOST


@slow
async def test_a_log_keeps_no_more_content_than_is_set_and_every_receipt(
    make_database: DatabaseMaker, stored: PocketBase
) -> None:
    async with make_database(config=config(log_max_bytes=MOST_BYTES)) as database:
        notes = await open_notes(database)
        for number in range(40):
            await notes.insert_one(note(str(number), "x" * 5_000))

        async def is_bounded() -> bool:
            return sum(int(size) for size, _ in await stored.commits()) <= MOST_BYTES * 1.2

        await until(is_bounded)
        commits = await stored.commits()
        assert len(commits) == 40
        sizes = [int(size) for size, _ in commits]
        emptied = sizes.count(0)
        assert emptied >= 25
        assert all(size == 0 for size in sizes[:emptied]) and all(size > 5_000 for size in sizes[emptied:])
        assert [bars for _, bars in commits] == ["0"] * 39 + ["1"]
        await notes.insert_one(note("after"))
        assert (await notes.find({})).total_count == 41


@slow
async def test_a_server_that_was_away_for_more_bytes_than_the_log_keeps_shows_nothing_old(
    make_database: DatabaseMaker, proxy: FaultProxy, through: Any, stored: PocketBase
) -> None:
    """Whom no entry of this log has told anything before: only a beat in the database's other log was seen."""
    settings = config("realtime", log_max_bytes=MOST_BYTES)
    async with make_database(config=settings) as other:
        theirs = await open_notes(other)
        await theirs.insert_one(note("a", "old"))
        async with make_database(connection_params=through, config=settings) as database:
            notes = await open_notes(database)

            async def follows() -> bool:
                coherence = database.stats().coherence
                return coherence is not None and coherence.state == "following"

            await until(follows)
            assert await notes.find_one(by_id("a")) == note("a", "old")
            async with proxy.down():
                await theirs.update_one(by_id("a"), Note(text="new"))
                for number in range(40):
                    await theirs.insert_one(note(str(number), "x" * 5_000))

                async def is_emptied() -> bool:
                    return [size for size, _ in await stored.commits()][:20] == ["0"] * 20

                await until(is_emptied)
            await until(follows)
            assert await notes.find_one(by_id("a")) == note("a", "new")
