"""The log path: what triggers make of a commit, and what people do to the database that they live in (design:
section 4; facts: pocketbase, section 13)."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypedDict, cast

import httpx
import msgspec
import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId, SortDirection
from parlant.core.persistence.document_database import CollectionIndex, DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.config import CollectionSettings, PocketBaseSettings
from pb_cached.errors import (
    CollectionNotFound,
    ConfigError,
    PBCachedError,
    SchemaError,
    UniqueViolation,
)
from pb_cached.pocketbase.commit import installation, triggers
from tests.conftest import EXCLUSIVE, DatabaseMaker
from tests.faults import EVERY, FaultProxy, answer

pytestmark = pytest.mark.slow

LOG_PATH = Config(pocketbase=PocketBaseSettings(commit="log"))
BATCH_PATH = Config(pocketbase=PocketBaseSettings(commit="batch"))


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    text: str
    stars: int
    tags: list[str]


class LongNote(Note, total=False):
    title: str | None
    weight: float


def note(number: int, **fields: Any) -> Note:
    made = {
        "id": ObjectId(f"n{number}"),
        "creation_utc": f"2026-01-{number + 1:02}",
        "version": Version.String("1.0.0"),
        "text": f"note {number}",
        "stars": number,
        "tags": ["a"],
    }
    return cast(Note, made | fields)


def by_id(number: int) -> Any:
    return {"id": {"$eq": f"n{number}"}}


async def notes_of(database: PocketBaseDocumentDatabase, schema: Any = Note) -> DocumentCollection[Note]:
    return await database.get_or_create_collection("notes", schema, identity_loader_for(schema))


class Dashboard:
    """A person's hands: PocketBase itself, past us."""

    def __init__(self, http: httpx.AsyncClient, prefix: str) -> None:
        self.http = http
        self.table = f"{prefix}_notes"
        self.log = f"{prefix}_log"

    async def sql(self, query: str) -> list[list[str]]:
        answer = (await self.http.post("/api/sql", json={"query": query})).raise_for_status()
        return list(answer.json()["rows"])

    async def records(self) -> dict[str, dict[str, Any]]:
        found = await self.http.get(f"/api/collections/{self.table}/records", params={"perPage": 1000})
        return {record["doc_id"]: record for record in found.raise_for_status().json()["items"]}

    async def triggers(self) -> dict[str, str]:
        rows = await self.sql(
            "SELECT name, sql FROM sqlite_master WHERE type='trigger' "
            f"AND tbl_name IN ('{self.table}', '{self.log}') ORDER BY name"
        )
        return {row[0]: row[1] for row in rows}

    async def edits(self) -> list[str]:
        return [row[0] for row in await self.sql(
            f"SELECT record FROM {triggers.EDITS} WHERE collection='{self.table}' ORDER BY n"
        )]  # fmt: skip

    async def change_collection(self, change: Callable[[dict[str, Any]], Any]) -> httpx.Response:
        collection = (await self.http.get(f"/api/collections/{self.table}")).json()
        change(collection)
        return await self.http.patch(f"/api/collections/{self.table}", json=collection)


@pytest_asyncio.fixture
async def dashboard(pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[Dashboard]:
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers) as http:
        yield Dashboard(http, prefix)


@pytest_asyncio.fixture
async def database(make_database: DatabaseMaker) -> AsyncIterator[PocketBaseDocumentDatabase]:
    async with make_database(config=LOG_PATH) as opened:
        yield opened


@pytest_asyncio.fixture
async def notes(database: PocketBaseDocumentDatabase) -> DocumentCollection[Note]:
    return await notes_of(database)


async def works(notes: DocumentCollection[Note], number: int) -> None:
    """A document can be inserted, changed, read and deleted."""
    await notes.insert_one(note(number))
    changed = await notes.update_one(by_id(number), cast(Note, {"stars": 7, "tags": ["b"]}))
    assert changed.updated_document == await notes.find_one(by_id(number)) == note(number, stars=7, tags=["b"])
    assert (await notes.delete_one(by_id(number))).deleted_count == 1
    assert await notes.find_one(by_id(number)) is None


# --- the path --------------------------------------------------------------------------------------------------


async def test_a_commit_is_one_record_whatever_it_holds(
    notes: DocumentCollection[Note], dashboard: Dashboard
) -> None:
    await asyncio.gather(*(notes.insert_one(note(number)) for number in range(20)))
    await asyncio.gather(
        notes.update_one(by_id(0), cast(Note, {"text": "new"})),
        notes.delete_one(by_id(1)),
        notes.insert_one(note(20)),
    )
    rows = await dashboard.sql(f"SELECT n, payload<>'' FROM `{dashboard.log}` WHERE n>0 ORDER BY id")
    assert [int(n) for n, _ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) <= 4
    records = await dashboard.records()
    assert (records["n0"]["text"], records["n0"]["rev"], records["n2"]["rev"]) == ("new", 2, 1)
    assert "n1" not in records and "n20" in records
    assert all(record["updated"] for record in records.values())
    assert await dashboard.edits() == []


async def test_fields_may_have_any_name(make_database: DatabaseMaker) -> None:
    """Those of SQL's functions and keywords, and of our own columns, among them."""
    names = [
        "key",
        "value",
        "type",
        "atom",
        "id_",
        "parent",
        "fullkey",
        "path",
        "json",
        "root",
        "_v",
        "rev",
        "extra",
    ]
    names += ["select", "order", "log", "layout", "payload", "guard", "stale", "updated", "created", "a-b", "ü"]
    types = {"id": ObjectId, "creation_utc": str, "version": Version.String}
    schema: Any = TypedDict("schema", {**types, **dict.fromkeys(names, str)})  # type: ignore[misc]
    document = {"id": "n1", "creation_utc": "2026", "version": "1.0.0", **{name: f"of {name}" for name in names}}
    async with make_database(config=LOG_PATH) as database:
        notes = await notes_of(database, schema)
        await notes.insert_one(cast(Any, document))
        for name in names:
            changed = await notes.update_one(by_id(1), cast(Any, {name: "new"}))
            document[name] = "new"
            assert changed.updated_document == await notes.find_one(by_id(1)) == document
        assert (await notes.delete_one(by_id(1))).deleted_count == 1


async def test_auto_takes_the_log_path_and_the_batch_path_stays_away_from_it(
    make_database: DatabaseMaker, dashboard: Dashboard
) -> None:
    async with make_database() as database:
        await works(await notes_of(database), 1)
    assert await dashboard.triggers()
    native = Config(pocketbase=PocketBaseSettings(native_events=True))
    for config in (BATCH_PATH, native):
        with pytest.raises(ConfigError, match="uninstall"):
            await make_database(config=config).__aenter__()


@pytest.mark.parametrize(("may_use_sql", "path"), [(True, "log"), (False, "batch")])
async def test_auto_says_once_which_path_it_takes(
    make_database: DatabaseMaker,
    pocketbase: PocketBaseServer,
    proxy: FaultProxy,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
    may_use_sql: bool,
    path: str,
) -> None:
    """However many logs and databases there are on a connection."""
    if not may_use_sql:
        proxy.plan("POST", "/api/sql", answer(403), at=EVERY)
    caplog.set_level(logging.INFO)
    params = {**pocketbase.connection_params, "url": proxy.url}
    config = Config(collections={"notes": CollectionSettings(log=True)})
    async with AsyncExitStack() as stack:
        for name in (prefix, f"{prefix}_second"):
            database = await stack.enter_async_context(
                make_database(
                    connection_params=params,
                    config=config,
                    collection_prefix=name,
                    logger=logging.getLogger("test"),
                )
            )
            await works(await notes_of(database), 1)
            assert database.stats().writes.path == path
    said = [line.getMessage() for line in caplog.records if line.levelno >= logging.INFO and line.name == "test"]
    chosen = [line for line in said if "commit path chosen" in line]
    assert len(chosen) == 1 and f"path={path}" in chosen[0], said


async def test_native_events_are_had_by_the_batch_path(make_database: DatabaseMaker, dashboard: Dashboard) -> None:
    async with make_database(config=Config(pocketbase=PocketBaseSettings(native_events=True))) as database:
        await works(await notes_of(database), 1)
    assert await dashboard.triggers() == {}


async def test_a_batch_path_at_work_is_refused_when_the_log_path_moves_in(
    make_database: DatabaseMaker, dashboard: Dashboard
) -> None:
    async with make_database(config=BATCH_PATH) as older:
        notes = await notes_of(older)
        await notes.insert_one(note(1))
        async with httpx.AsyncClient() as http, make_database(config=LOG_PATH, http_client=http) as newer:
            await works(await notes_of(newer), 2)
            with pytest.raises(SchemaError, match="open the database again"):
                await notes.insert_one(note(3))
    assert set(await dashboard.records()) == {"n1"}


async def test_the_log_path_takes_over_what_the_batch_path_has_written(
    make_database: DatabaseMaker, dashboard: Dashboard
) -> None:
    async with make_database(config=BATCH_PATH) as database:
        notes = await notes_of(database)
        for number in range(4):
            await notes.insert_one(note(number))
    async with make_database() as database:
        assert database.stats().writes.path == "log"
        notes = await notes_of(database)
        await works(notes, 5)
        await notes.update_one(by_id(0), cast(Note, {"text": "new"}))
        assert (await notes.find({})).items == [note(0, text="new"), *map(note, range(1, 4))]


async def test_uninstalling_leaves_the_data_and_lets_the_batch_path_in(
    make_database: DatabaseMaker, dashboard: Dashboard
) -> None:
    async with make_database() as database:
        await (await notes_of(database)).insert_one(note(1))
        await installation.uninstall(database._opened().client, [dashboard.log])
    assert await dashboard.triggers() == {}
    async with make_database(config=BATCH_PATH) as database:
        notes = await notes_of(database)
        assert await notes.find_one(by_id(1)) == note(1)
        await works(notes, 2)
    async with make_database() as database:
        await works(await notes_of(database), 3)


def test_init_installs_and_takes_away_again(pocketbase: PocketBaseServer, prefix: str, tmp_path: Path) -> None:
    names = [f"{prefix}_{part}" for part in ("s", "c", "v")]
    settings = zip(("session_prefix", "customer_prefix", "variable_prefix"), names, strict=True)
    (tmp_path / "c.toml").write_text(
        "[stores]\n" + "".join(f'{key} = "{name}"\n' for key, name in settings), "utf-8"
    )
    params = pocketbase.connection_params
    access = {"POCKETBASE_URL": params["url"], "POCKETBASE_ADMIN_TOKEN": params["admin_token"]}

    def run(*arguments: str) -> list[str]:
        result = subprocess.run(
            [sys.executable, "-m", "pb_cached.cli", "init", "--config", "c.toml", *arguments],
            cwd=tmp_path,
            env={**os.environ, **access, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    assert run() == [f"{name}: ready, commits go by log" for name in names]
    assert run("--uninstall") == [f"{name}: no triggers; the data is as it was" for name in names]
    assert run()[0].endswith("commits go by log")


async def test_several_servers_install_at_once(make_database: DatabaseMaker, dashboard: Dashboard) -> None:
    async def serve(number: int) -> None:
        async with httpx.AsyncClient() as http, make_database(config=LOG_PATH, http_client=http) as database:
            await works(await notes_of(database), number)

    await asyncio.gather(*(serve(number) for number in range(6)))
    assert len(await dashboard.triggers()) == 6


async def test_versions_with_different_schemas_work_beside_each_other(
    make_database: DatabaseMaker, dashboard: Dashboard
) -> None:
    async with make_database() as older, httpx.AsyncClient() as http, make_database(http_client=http) as newer:
        old = await notes_of(older)
        await old.insert_one(note(1))
        new = await notes_of(newer, LongNote)
        await new.insert_one(cast(Note, {**note(2), "title": None, "weight": 1.5}))
        await old.insert_one(note(3))
        await old.update_one(by_id(2), cast(Note, {"stars": 9}))
        await new.update_one(by_id(1), cast(Note, {"title": "late"}))
        expected = [{**note(1), "title": "late"}, {**note(2, stars=9), "title": None, "weight": 1.5}, note(3)]
        assert (await new.find({})).items == expected
    assert len(await dashboard.triggers()) == 7


# --- compare and swap ------------------------------------------------------------------------------------------


async def test_nobody_builds_on_a_state_that_others_have_changed(make_database: DatabaseMaker) -> None:
    """Every increment of every server counts."""
    async with (
        httpx.AsyncClient() as http,
        make_database() as one,
        make_database(http_client=http) as other,
    ):
        servers = [await notes_of(one), await notes_of(other)]
        await servers[0].insert_one(note(1, stars=0))

        async def increment(notes: DocumentCollection[Note]) -> None:
            for _ in range(15):
                while True:
                    seen = cast(Any, await notes.find_one(by_id(1)))["stars"]
                    where: Any = {**by_id(1), "stars": {"$eq": seen}}
                    if (await notes.update_one(where, cast(Note, {"stars": seen + 1}))).modified_count:
                        break

        await asyncio.gather(*(increment(server) for server in servers * 2))
        assert cast(Any, await servers[0].find_one({}))["stars"] == 60


@pytest.mark.parametrize("config", [LOG_PATH, BATCH_PATH], ids=["log", "batch"])
async def test_of_many_who_want_the_same_state_one_gets_it(make_database: DatabaseMaker, config: Config) -> None:
    async with make_database(config=config) as database:
        notes = await notes_of(database)
        await asyncio.gather(*(notes.insert_one(note(number, text="open")) for number in range(5)))
        results = await asyncio.gather(
            *(
                notes.update_one(cast(Any, {"text": {"$eq": "open"}}), cast(Note, {"text": f"taken by {number}"}))
                for number in range(12)
            )
        )
        taken = [cast(Any, result.updated_document)["text"] for result in results if result.modified_count]
        assert len(taken) == len(set(taken)) == 5
        assert sorted(cast(Any, found)["text"] for found in (await notes.find({})).items) == sorted(taken)


@pytest.mark.parametrize("config", [LOG_PATH, BATCH_PATH], ids=["log", "batch"])
async def test_updates_of_one_record_share_a_commit_and_all_are_answered(
    make_database: DatabaseMaker, dashboard: Dashboard, config: Config
) -> None:
    async with make_database(config=config) as database:
        notes = await notes_of(database)
        await notes.insert_one(note(1))
        fields: list[Any] = [{"text": "new"}, {"stars": 5}, {"tags": ["x"]}, {"more": 2**60}]
        results = await asyncio.gather(*(notes.update_one(by_id(1), fields[number % 4]) for number in range(40)))
        assert all(result.modified_count == 1 for result in results)
        whole = {**note(1), "text": "new", "stars": 5, "tags": ["x"], "more": 2**60}
        assert await notes.find_one({}) == results[-1].updated_document == whole
        assert (await dashboard.records())["n1"]["rev"] <= 9
        cast(Any, results[-1].updated_document)["tags"].append("mine")
        assert results[-5].updated_document != results[-1].updated_document


async def test_an_update_of_what_is_deleted_at_once_finds_nothing(make_database: DatabaseMaker) -> None:
    """By a cache that answers at once: what each call has to ask PocketBase may be answered in any order."""
    async with make_database(config=msgspec.structs.replace(LOG_PATH, coherence=EXCLUSIVE)) as database:
        notes = await notes_of(database)
        await notes.insert_one(note(1))
        assert await notes.find_one(by_id(1)) == note(1)
        deleted, updated = await asyncio.gather(
            notes.delete_one(by_id(1)), notes.update_one(by_id(1), cast(Note, {"stars": 3}))
        )
        assert (deleted.deleted_count, updated.matched_count) == (1, 0)


async def test_a_failing_change_fails_alone_though_it_shares_a_record(notes: DocumentCollection[Note]) -> None:
    await notes.ensure_indexes([CollectionIndex((("text", SortDirection.ASC),), unique=True)])
    await asyncio.gather(notes.insert_one(note(1)), notes.insert_one(note(2)))
    params: list[Any] = [{"stars": 5}, {"tags": ["x"]}, {"text": "note 2"}, {"more": 6}]
    outcomes = await asyncio.gather(*(notes.update_one(by_id(1), each) for each in params), return_exceptions=True)
    assert [isinstance(outcome, UniqueViolation) for outcome in outcomes] == [False, False, True, False]
    assert await notes.find_one(by_id(1)) == {**note(1, stars=5, tags=["x"]), "more": 6}


async def test_all_who_violate_a_unique_index_are_found_at_once(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, prefix: str
) -> None:
    async with FaultProxy(pocketbase.url) as proxy:
        params = {**pocketbase.connection_params, "url": proxy.url}
        async with make_database(connection_params=params) as database:
            notes = await notes_of(database)
            pair = CollectionIndex((("text", SortDirection.ASC), ("stars", SortDirection.ASC)), unique=True)
            await notes.ensure_indexes([pair])
            await asyncio.gather(*(notes.insert_one(note(n, text="it's", stars=n)) for n in range(0, 100, 2)))
            path = f"/api/collections/{prefix}_log/records?commit"
            before = proxy.count("POST", path)
            outcomes = await asyncio.gather(
                *(notes.insert_one(note(n, text="it's", stars=n)) for n in range(100)), return_exceptions=True
            )
            assert proxy.count("POST", path) == before + 2
    refused = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, UniqueViolation)]
    assert refused == list(range(0, 100, 2))
    assert cast(UniqueViolation, outcomes[0]).fields == ("text", "stars")


# --- what people do to a database ------------------------------------------------------------------------------


async def test_a_foreign_edit_raises_rev_is_noted_and_is_not_overwritten(
    notes: DocumentCollection[Note], dashboard: Dashboard
) -> None:
    await notes.insert_one(note(1))
    record = (await dashboard.records())["n1"]
    path = f"/api/collections/{dashboard.table}/records/{record['id']}"
    (await dashboard.http.patch(path, json={"text": "by hand"})).raise_for_status()
    assert (await dashboard.records())["n1"]["rev"] == 2
    assert await dashboard.edits() == [record["id"]]
    await notes.update_one(by_id(1), cast(Note, {"stars": 5}))
    assert await notes.find_one({}) == note(1, text="by hand", stars=5)
    (await dashboard.http.delete(path)).raise_for_status()
    added = {"doc_id": "n9", "creation_utc": "2026", "version": "1.0.0", "text": "added", "tags": "[]"}
    (await dashboard.http.post(f"/api/collections/{dashboard.table}/records", json=added)).raise_for_status()
    assert (await dashboard.records())["n9"]["rev"] == 1
    assert len(await dashboard.edits()) == 3


async def test_a_foreign_hand_cannot_write_over_what_it_has_not_seen(
    notes: DocumentCollection[Note], dashboard: Dashboard
) -> None:
    await notes.insert_one(note(1))
    record = (await dashboard.records())["n1"]
    await notes.update_one(by_id(1), cast(Note, {"text": "ours"}))
    stale = {key: record[key] for key in ("doc_id", "text", "stars", "rev")}
    path = f"/api/collections/{dashboard.table}/records/{record['id']}"
    refused = await dashboard.http.patch(path, json=stale)
    assert (refused.status_code, refused.json()["data"]["rev"]["code"]) == (400, "validation_not_unique")
    assert await notes.find_one({}) == note(1, text="ours")


async def test_a_dropped_trigger_is_back_before_anything_is_swallowed(
    notes: DocumentCollection[Note], dashboard: Dashboard
) -> None:
    before = await dashboard.triggers()
    (name,) = (n for n, sql in before.items() if f"NEW.layout='{n.rpartition('_')[2]}'" in sql)
    await dashboard.sql(f"DROP TRIGGER {name}")
    await notes.insert_one(note(1))
    assert set(await dashboard.records()) == {"n1"}
    await works(notes, 2)
    assert await dashboard.triggers() == before


async def test_without_any_trigger_nothing_is_swallowed(
    notes: DocumentCollection[Note], dashboard: Dashboard
) -> None:
    before = await dashboard.triggers()
    for name in before:
        await dashboard.sql(f"DROP TRIGGER {name}")
    await asyncio.gather(*(notes.insert_one(note(number)) for number in range(5)))
    assert len(await dashboard.records()) == 5
    assert await dashboard.triggers() == before


async def test_a_collection_moves_to_the_log_that_its_settings_say(
    make_database: DatabaseMaker, dashboard: Dashboard
) -> None:
    """The watch would take every commit by the other log for an edit by others."""
    own = Config(collections={"notes": CollectionSettings(log=True)})
    async with make_database() as database:
        notes = await notes_of(database)
        await notes.insert_one(note(1))
        async with httpx.AsyncClient() as http, make_database(config=own, http_client=http) as other:
            moved = await notes_of(other)
            await moved.update_one(by_id(1), cast(Note, {"text": "by its own log"}))
            await works(moved, 2)
            await works(notes, 3)  # a server with other settings is no reason for anything to be lost
            await works(moved, 4)
    assert await dashboard.edits() == []
    assert await dashboard.sql(f"SELECT max(n)>0 FROM {dashboard.table}_log") == [["1"]]


async def test_an_emptied_table_of_logs_is_filled_again(
    notes: DocumentCollection[Note], dashboard: Dashboard
) -> None:
    """Without it our own commits would count as edits by others, and be refused."""
    await notes.insert_one(note(1))
    await dashboard.sql(f"DELETE FROM {triggers.LOGS} WHERE log='{dashboard.log}'")
    await works(notes, 2)


async def test_a_column_in_use_cannot_be_removed_and_a_renamed_one_comes_back_with_its_data(
    make_database: DatabaseMaker, dashboard: Dashboard
) -> None:
    async with make_database() as database:
        notes = await notes_of(database)
        await notes.insert_one(note(1))

        def without_text(collection: dict[str, Any]) -> None:
            collection["fields"] = [field for field in collection["fields"] if field["name"] != "text"]

        def renamed(collection: dict[str, Any]) -> None:
            for field in collection["fields"]:
                if field["name"] == "text":
                    field["name"] = "words"

        assert (await dashboard.change_collection(without_text)).status_code == 400
        (
            await dashboard.change_collection(lambda c: c["fields"].append({"name": "theirs", "type": "text"}))
        ).raise_for_status()
        await works(notes, 2)
        (await dashboard.change_collection(renamed)).raise_for_status()
        await notes.insert_one(note(3))
        with pytest.raises(SchemaError, match="text"):
            await notes.find({})
    async with make_database() as database:
        notes = await notes_of(database)
        assert (await notes.find({})).items == [note(1), note(3)]
        await works(notes, 4)


async def test_a_column_in_use_cannot_be_given_another_type(
    notes: DocumentCollection[Note], dashboard: Dashboard
) -> None:
    """Not in one step, as the dashboard does it: its data is not lost, and commits go on."""
    await notes.insert_one(note(1))

    def retype(collection: dict[str, Any]) -> None:
        kept = [field for field in collection["fields"] if field["name"] != "stars"]
        collection["fields"] = [*kept, {"name": "stars", "type": "text"}]

    assert (await dashboard.change_collection(retype)).status_code == 400
    assert (await dashboard.records())["n1"]["stars"] == 1
    await works(notes, 2)
    assert await notes.find_one(by_id(1)) == note(1)


async def test_a_renamed_column_stops_no_other_collection(
    database: PocketBaseDocumentDatabase, notes: DocumentCollection[Note], dashboard: Dashboard
) -> None:
    """A trigger made anew, under the name that the column had, would stop every commit of the log."""

    def renamed(collection: dict[str, Any]) -> None:
        for field in collection["fields"]:
            field["name"] = {"text": "words"}.get(field["name"], field["name"])

    (await dashboard.change_collection(renamed)).raise_for_status()
    others: DocumentCollection[Note] = await database.get_or_create_collection(
        "others", Note, identity_loader_for(Note)
    )
    await works(others, 1)
    await notes.insert_one(note(2))
    assert (await dashboard.records())["n2"]["words"] == "note 2"


async def test_a_deleted_collection_fails_its_own_writes_and_no_others(
    database: PocketBaseDocumentDatabase, notes: DocumentCollection[Note], dashboard: Dashboard
) -> None:
    others: DocumentCollection[Note] = await database.get_or_create_collection(
        "others", Note, identity_loader_for(Note)
    )
    await notes.insert_one(note(1))
    (await dashboard.http.delete(f"/api/collections/{dashboard.table}")).raise_for_status()
    outcomes = await asyncio.gather(
        others.insert_one(note(1)), notes.insert_one(note(2)), others.insert_one(note(3)), return_exceptions=True
    )
    assert [isinstance(outcome, CollectionNotFound) for outcome in outcomes] == [False, True, False]
    assert (await others.find({})).total_count == 2
    again: DocumentCollection[Note] = await database.create_collection("notes", Note)
    await works(again, 5)


async def test_a_deleted_collection_leaves_nothing_that_stands_in_anybodys_way(
    make_database: DatabaseMaker, dashboard: Dashboard
) -> None:
    """SQLite changes no table while a trigger names one that is gone."""
    async with make_database() as database:
        await works(await notes_of(database), 1)
        await database.delete_collection("notes")
        assert not any(dashboard.table in sql for sql in (await dashboard.triggers()).values())
        await works(await notes_of(database), 2)
        (await dashboard.http.delete(f"/api/collections/{dashboard.table}")).raise_for_status()
    assert any(dashboard.table in sql for sql in (await dashboard.triggers()).values())
    async with make_database():
        assert not any(dashboard.table in sql for sql in (await dashboard.triggers()).values())


async def test_a_log_that_has_become_another_one_swallows_nothing(
    notes: DocumentCollection[Note], dashboard: Dashboard, make_database: DatabaseMaker
) -> None:
    """As a backup from before the installation would leave it, or one who deletes the log."""
    await notes.insert_one(note(1))
    for name in await dashboard.triggers():
        await dashboard.sql(f"DROP TRIGGER {name}")
    (await dashboard.http.delete(f"/api/collections/{dashboard.log}")).raise_for_status()
    async with make_database(config=BATCH_PATH):
        with pytest.raises(SchemaError, match="Open the database again"):
            await notes.insert_one(note(2))
    async with make_database(config=LOG_PATH):
        await works(notes, 3)
        await notes.insert_one(note(4))
    assert set(await dashboard.records()) == {"n1", "n4"}


# --- what we may not do -----------------------------------------------------------------------------------------


Opens = Callable[..., Awaitable[PocketBaseDocumentDatabase]]


async def test_an_installation_works_on_when_sql_is_withdrawn(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy
) -> None:
    async with make_database() as database:
        await (await notes_of(database)).insert_one(note(1))
    proxy.plan("POST", "/api/sql", answer(403), at=range(1, 1000))
    params = {**pocketbase.connection_params, "url": proxy.url}
    async with make_database(connection_params=params) as database:
        notes = await notes_of(database)
        await works(notes, 2)
        await notes.ensure_indexes([CollectionIndex((("text", SortDirection.ASC),), unique=True)])
        outcomes = await asyncio.gather(
            *(notes.insert_one(note(n, text=str(n % 3))) for n in range(3, 12)), return_exceptions=True
        )
        assert sum(isinstance(outcome, PBCachedError) for outcome in outcomes) == 6
        assert (await notes.find({})).total_count == 4


async def test_rights_that_are_withdrawn_at_work_stop_no_commit_and_swallow_none(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy, dashboard: Dashboard
) -> None:
    params = {**pocketbase.connection_params, "url": proxy.url}
    async with make_database(connection_params=params, config=LOG_PATH) as database:
        notes = await notes_of(database)
        await works(notes, 1)
        proxy.plan("POST", "/api/sql", answer(403), at=EVERY)
        await works(notes, 2)
        outcomes = await asyncio.gather(
            notes.insert_one(note(3)),
            notes.update_one(by_id(9), cast(Note, {"stars": 1})),
            notes.insert_one(note(4)),
        )
        assert outcomes[0].acknowledged and outcomes[2].acknowledged
        # Now a trigger is lost, and nobody may make it anew.
        for name, sql in (await dashboard.triggers()).items():
            if f"DELETE FROM `{dashboard.table}`" in sql:
                await dashboard.sql(f"DROP TRIGGER {name}")
        with pytest.raises(SchemaError, match="could not be mended, which takes the SQL endpoint"):
            await notes.insert_one(note(5))
        assert set(await dashboard.records()) == {"n3", "n4"}
        proxy.forget_plans()
        await notes.insert_one(note(5))
        await works(notes, 6)
        assert set(await dashboard.records()) == {"n3", "n4", "n5"}


async def test_without_sql_and_batches_each_write_is_a_request_of_its_own(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    for method, path in (("POST", "/api/sql"), ("GET", "/api/settings"), ("PATCH", "/api/settings")):
        proxy.plan(method, path, answer(403), at=range(1, 1000))
    params = {**pocketbase.connection_params, "url": proxy.url}
    async with make_database(connection_params=params, logger=logging.getLogger("test")) as database:
        notes = await notes_of(database)
        await asyncio.gather(*(notes.insert_one(note(number)) for number in range(5)))
        await works(notes, 7)
        assert proxy.count("POST", "/api/batch") == 0
    assert caplog.text.count("where there is no log path either, each write is a request of its own") == 1
    with pytest.raises(ConfigError, match="SQL endpoint"):
        await make_database(connection_params=params, config=LOG_PATH).__aenter__()


async def test_pocketbase_numbers_what_a_commit_leaves_open(
    make_database: DatabaseMaker, dashboard: Dashboard
) -> None:
    """Each group by itself, from what there is when the commit is applied; what has no value is a group too."""
    settings = {"notes": CollectionSettings(partition_by="text", sequence="stars")}
    config = msgspec.structs.replace(LOG_PATH, collections=settings)
    async with make_database(config=config) as database:
        notes = cast(PocketBaseDocumentCollection[Note], await notes_of(database))
        await notes.insert_one(note(0, text="a", stars=7))

        def appended(number: int, text: str, place: int) -> Any:
            return notes.codec.append(note(number, text=text), "stars", place)

        for first in (1, 10):
            await notes.commit(
                [
                    appended(first, "a", 1),
                    appended(first + 1, "", 1),
                    notes.codec.insert(note(first + 2, text="c", stars=first)),
                    appended(first + 3, "a", 2),
                    appended(first + 4, "", 2),
                    appended(first + 5, "it's", 1),
                ]
            )
        stars = {id_: record["stars"] for id_, record in (await dashboard.records()).items()}
        assert stars == {
            "n0": 7, "n1": 8, "n2": 0, "n3": 1, "n4": 9, "n5": 1, "n6": 0,
            "n10": 10, "n11": 2, "n12": 10, "n13": 11, "n14": 3, "n15": 1,
        }  # fmt: skip
        for id_, number in stars.items():
            found = await notes.find_one({"id": {"$eq": id_}})
            assert found is not None and found["stars"] == number, "the cache shows what PocketBase has made of it"
