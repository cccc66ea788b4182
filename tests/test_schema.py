"""Collections become what their TypedDict says and stay so, whoever else works on them: other servers that start
at the same moment, and people in PocketBase's dashboard."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, NamedTuple, TypedDict, cast

import httpx
import msgspec
import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId, SortDirection, Where
from parlant.core.persistence.document_database import (
    CollectionIndex,
    DocumentCollection,
    identity_loader_for,
)

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.errors import (
    CollectionExists,
    CollectionNotFound,
    ForeignCollection,
    InvalidFilter,
    RequestRejected,
    SchemaError,
    UniqueViolation,
)
from pb_cached.pocketbase.schema import IS_EXCEPTIONAL
from tests.conftest import DatabaseMaker
from tests.faults import EVERY, Exchange, FaultProxy, answer, twice

pytestmark = pytest.mark.slow


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    text: str
    stars: int
    done: bool
    about: dict[str, Any] | None


class TaggedNote(Note, total=False):
    tag: str
    score: float


def note(number: int = 1, **fields: Any) -> Note:
    whole = {
        "id": f"n{number}",
        "creation_utc": f"2026-01-01T00:00:{number:02}+00:00",
        "version": "1.0.0",
        "text": f"note {number}",
        "stars": number,
        "done": True,
        "about": {"number": number},
    }
    return cast(Note, whole | fields)


async def notes_of(
    database: PocketBaseDocumentDatabase, schema: type[Any] = Note, name: str = "notes"
) -> DocumentCollection[Any]:
    return await database.get_or_create_collection(name, schema, identity_loader_for(schema))


class Dashboard:
    """What a superuser does by hand, past us."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def collection(self, name: str) -> dict[str, Any]:
        answer = await self._http.get(f"/api/collections/{name}")
        return cast(dict[str, Any], answer.raise_for_status().json())

    async def columns(self, name: str) -> set[str]:
        return {field["name"] for field in (await self.collection(name))["fields"]}

    async def create(self, **collection: Any) -> dict[str, Any]:
        answer = await self._http.post("/api/collections", json={"type": "base", **collection})
        return cast(dict[str, Any], answer.raise_for_status().json())

    async def change(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        collection = await self.collection(name)
        change(collection)
        (await self._http.patch(f"/api/collections/{name}", json=collection)).raise_for_status()

    async def has(self, name: str) -> bool:
        return (await self._http.get(f"/api/collections/{name}")).is_success

    async def drop(self, name: str) -> None:
        (await self._http.delete(f"/api/collections/{name}")).raise_for_status()

    async def remove_column(self, name: str, column: str) -> None:
        def without(collection: dict[str, Any]) -> None:
            collection["fields"] = [field for field in collection["fields"] if field["name"] != column]
            collection["indexes"] = [sql for sql in collection["indexes"] if f"`{column}`" not in sql]

        await self.change(name, without)

    async def rename_column(self, name: str, column: str, to: str) -> None:
        def renamed(collection: dict[str, Any]) -> None:
            next(field for field in collection["fields"] if field["name"] == column)["name"] = to

        await self.change(name, renamed)

    async def insert(self, name: str, record: dict[str, Any]) -> None:
        (await self._http.post(f"/api/collections/{name}/records", json=record)).raise_for_status()

    async def update(self, name: str, record: str, change: dict[str, Any]) -> None:
        (await self._http.patch(f"/api/collections/{name}/records/{record}", json=change)).raise_for_status()

    async def delete(self, name: str, record: str) -> None:
        (await self._http.delete(f"/api/collections/{name}/records/{record}")).raise_for_status()

    async def records(self, name: str) -> list[dict[str, Any]]:
        answer = await self._http.get(f"/api/collections/{name}/records", params={"perPage": 500, "sort": "id"})
        return cast(list[dict[str, Any]], answer.raise_for_status().json()["items"])


@pytest_asyncio.fixture
async def dashboard(pocketbase: PocketBaseServer) -> AsyncIterator[Dashboard]:
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers, trust_env=False) as http:
        yield Dashboard(http)


@pytest.fixture
def make_database(make_database: DatabaseMaker) -> DatabaseMaker:
    """Of the batch path, whose columns nothing holds; what triggers make of it stands in `test_log_path`."""

    def make(**options: Any) -> PocketBaseDocumentDatabase:
        config = options.pop("config", Config())
        batch = msgspec.structs.replace(config.pocketbase, commit="batch")
        return make_database(config=msgspec.structs.replace(config, pocketbase=batch), **options)

    return make


@pytest_asyncio.fixture
async def notes(database: PocketBaseDocumentDatabase) -> DocumentCollection[Note]:
    return await notes_of(database)


class Proxied(NamedTuple):
    """PocketBase, behind a proxy that sees and may change what is said."""

    proxy: FaultProxy
    params: dict[str, str]


@pytest_asyncio.fixture
async def proxied(pocketbase: PocketBaseServer) -> AsyncIterator[Proxied]:
    async with FaultProxy(pocketbase.url) as proxy:
        yield Proxied(proxy, {**pocketbase.connection_params, "url": proxy.url})


@pytest.fixture
def table(prefix: str) -> str:
    return f"{prefix}_notes"


class Heard:
    """A logger that keeps the warnings that it was given."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, message: str, *_: Any, **__: Any) -> None:
        self.warnings.append(message)

    def debug(self, *_: Any, **__: Any) -> None: ...

    info = error = debug


# --- opening together -------------------------------------------------------------------------------------


async def test_servers_that_start_together_share_one_collection(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(httpx.AsyncClient()) for _ in range(6)]
        servers = await asyncio.gather(
            *(stack.enter_async_context(make_database(http_client=client)) for client in clients)
        )
        opened = await asyncio.gather(*(notes_of(server) for server in servers))
        await asyncio.gather(*(each.insert_one(note(n)) for n, each in enumerate(opened)))
        for each in opened:
            assert (await each.find({})).total_count == len(opened)
    assert {"doc_id", "extra", "rev", "updated", "text", "stars", "done", "about"} < await dashboard.columns(table)


async def test_servers_with_different_schemas_that_start_together_get_all_of_their_columns(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    """PocketBase itself would let the last one drop what the others have just added."""
    fields = {"id": ObjectId, "creation_utc": str, "version": Version.String}
    make_schema: Any = TypedDict
    schemas = [make_schema(f"Wider{n}", {**fields, f"own{n}": str}) for n in range(6)]
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(httpx.AsyncClient()) for _ in schemas]
        servers = [await stack.enter_async_context(make_database(http_client=client)) for client in clients]
        await asyncio.gather(*map(notes_of, servers, schemas))
    assert {f"own{n}" for n in range(6)} < await dashboard.columns(table)


@pytest_asyncio.fixture
async def turn_of_another(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str, prefix: str
) -> Callable[[], Awaitable[None]]:
    """Another server is changing the collection. Returns what ends its turn."""
    async with make_database() as database:
        await notes_of(database)
        lock = "z" + hashlib.blake2b(table.encode(), digest_size=7).hexdigest()
        await dashboard.insert(f"{prefix}_log", {"id": lock, "server": "another", "n": 0})
    return partial(dashboard.delete, f"{prefix}_log", lock)


async def test_a_server_waits_while_another_one_changes_the_collection(
    turn_of_another: Callable[[], Awaitable[None]], make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with make_database() as database:
        opening = asyncio.create_task(notes_of(database, TaggedNote))
        await asyncio.wait([opening], timeout=0.5)
        assert not opening.done()
        assert "tag" not in await dashboard.columns(table)
        await turn_of_another()
        await opening
    assert "tag" in await dashboard.columns(table)


async def test_a_server_that_died_in_its_turn_does_not_stop_the_others(
    turn_of_another: Callable[[], Awaitable[None]],
    make_database: DatabaseMaker,
    dashboard: Dashboard,
    table: str,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pb_cached.pocketbase.schema.TURN_SECONDS", 0.2)
    async with make_database() as database:
        await notes_of(database, TaggedNote)
    assert "tag" in await dashboard.columns(table)
    assert await dashboard.records(f"{prefix}_log") == []


async def test_every_rule_is_superusers_only(
    notes: DocumentCollection[Note], dashboard: Dashboard, table: str
) -> None:
    collection = await dashboard.collection(table)
    rules = ("listRule", "viewRule", "createRule", "updateRule", "deleteRule")
    assert [collection[rule] for rule in rules] == [None] * 5


async def test_a_collection_that_somebody_opened_to_others_is_closed_again(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with make_database() as database:
        await notes_of(database)
    await dashboard.change(table, lambda collection: collection.update(listRule="", deleteRule=""))
    async with make_database() as database:
        await notes_of(database)
    collection = await dashboard.collection(table)
    assert (collection["listRule"], collection["deleteRule"]) == (None, None)


# --- columns that come, go and change their names -----------------------------------------------------------


async def test_a_new_field_adds_a_column_and_keeps_the_data(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with make_database() as older:
        await (await notes_of(older)).insert_one(note())
    async with make_database() as newer:
        notes = await notes_of(newer, TaggedNote)
        tagged = {**note(2), "tag": "x", "score": 0.5}
        await notes.insert_one(tagged)
        assert await notes.find_one({"id": {"$eq": "n1"}}) == note()
        assert await notes.find_one({"tag": {"$eq": ""}}) is None
        assert await notes.find_one({"score": {"$lte": 0}}) is None
        assert await notes.find_one({"tag": {"$eq": "x"}}) == tagged
    assert {"tag", "score"} < await dashboard.columns(table)


async def test_a_field_that_is_no_longer_declared_keeps_its_column_and_its_data(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with make_database() as newer:
        await (await notes_of(newer, TaggedNote)).insert_one({**note(), "tag": "kept", "score": 0.5})
    async with make_database() as older:
        notes = await notes_of(older)
        assert await notes.find_one({"tag": {"$eq": "kept"}}) == {**note(), "tag": "kept", "score": 0.5}
        await notes.update_one({}, cast(Note, {"stars": 5}))
    (record,) = await dashboard.records(table)
    assert (record["tag"], record["score"], record["stars"]) == ("kept", 0.5, 5)


@pytest.mark.parametrize("newer_first", [True, False], ids=["the newer made the collection", "the older made it"])
async def test_servers_with_different_fields_read_each_others_documents_as_they_are(
    make_database: DatabaseMaker, newer_first: bool
) -> None:
    """As in a rolling upgrade: what a document lacks, it lacks for everybody."""
    schemas = [TaggedNote, Note] if newer_first else [Note, TaggedNote]
    async with httpx.AsyncClient() as http, make_database() as one, make_database(http_client=http) as other:
        notes = [await notes_of(one, schemas[0]), await notes_of(other, schemas[1])]
        if not newer_first:
            notes.reverse()
        newer, older = notes
        await older.insert_one(note(1))
        await newer.insert_one({**note(2), "tag": "", "score": 0.0})
        await older.insert_one({**note(3), "tag": "undeclared"})
        await newer.update_one({"id": {"$eq": "n1"}}, {"stars": 7})
        await older.update_one({"id": {"$eq": "n2"}}, {"stars": 8})
        await newer.update_one({"id": {"$eq": "n3"}}, {"tag": "declared"})
        expected = [note(1, stars=7), {**note(2, stars=8), "tag": "", "score": 0.0},
                    {**note(3), "tag": "declared"}]  # fmt: skip
        assert (await newer.find({})).items == expected
        if newer_first:  # else the older one does not know of the columns that came after it
            assert (await older.find({})).items == expected


async def test_what_was_stored_before_its_field_had_a_column_can_be_changed_and_stays(
    make_database: DatabaseMaker,
) -> None:
    early = {**note(1), "tag": "early", "score": 2.5}
    async with make_database() as older:
        await (await notes_of(older)).insert_one(cast(Note, early))
    async with make_database() as newer:
        notes = await notes_of(newer, TaggedNote)
        assert await notes.find_one({}) == early
        changed = await notes.update_one({"id": {"$eq": "n1"}}, {"tag": "late"})
        assert changed.updated_document == await notes.find_one({}) == {**early, "tag": "late"}
        assert await notes.find_one({"tag": {"$eq": "late"}}) is not None
        # Whatever else needs `extra` takes nothing of it away.
        await notes.update_one({"id": {"$eq": "n1"}}, {"text": chr(0xD800)})
        assert await notes.find_one({}) == {**early, "tag": "late", "text": chr(0xD800)}
        await notes.update_one({"id": {"$eq": "n1"}}, {"score": 3.5, "text": "plain"})
        assert await notes.find_one({}) == {**early, "tag": "late", "text": "plain", "score": 3.5}


async def test_a_column_that_others_have_added_is_none_of_ours(
    notes: DocumentCollection[Note], make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    await notes.insert_one(note(1))
    await dashboard.change(table, lambda collection: collection["fields"].append({"name": "mine", "type": "text"}))
    async with httpx.AsyncClient() as http, make_database(http_client=http) as database:
        other = await notes_of(database)
        await other.insert_one(note(2))
        assert (await other.find({})).items == [note(1), note(2)]
    assert [record["extra"] for record in await dashboard.records(table)] == ["", ""]


@pytest.mark.parametrize(
    ("column", "text"),
    [("about", "typed by hand"), ("extra", "not json"), ("extra", '{"values":5}'), ("extra", '{"missing":[5]}')],
)
async def test_what_a_hand_has_spoilt_is_named(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str, column: str, text: str
) -> None:
    async with make_database() as database:
        notes = await notes_of(database)
        await notes.insert_one(note())
        (record,) = await dashboard.records(table)
        await dashboard.update(table, record["id"], {column: text})
        with pytest.raises(SchemaError, match=f"column '{column}' of the record '{record['id']}'.*by hand"):
            await notes.find({})


async def test_a_column_removed_while_we_run_is_back_before_an_insert_is_acknowledged(
    notes: DocumentCollection[Note], dashboard: Dashboard, table: str
) -> None:
    await dashboard.remove_column(table, "text")
    await notes.insert_one(note())
    assert (await dashboard.records(table))[0]["text"] == "note 1"
    assert await notes.find_one({}) == note()


async def test_a_column_removed_while_we_run_swallows_none_of_many_inserts(
    notes: DocumentCollection[Note], dashboard: Dashboard, table: str
) -> None:
    await dashboard.remove_column(table, "about")
    await asyncio.gather(*(notes.insert_one(note(n)) for n in range(20)))
    assert (await notes.find({})).items == [note(n) for n in range(20)]


Read = Callable[[DocumentCollection[Note]], Awaitable[Any]]

READS: dict[str, Read] = {
    "all": lambda notes: notes.find({}),
    "by the column": lambda notes: notes.find({"text": {"$eq": ""}}),
    "a page": lambda notes: notes.find({"stars": {"$gte": 0}}, limit=1),
    "the first": lambda notes: notes.find_one({"id": {"$eq": "n1"}}),
    "the first by the column": lambda notes: notes.find_one({}, [("text", SortDirection.ASC)]),
    "an update": lambda notes: notes.update_one({"id": {"$eq": "n1"}}, cast(Note, {"done": True})),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
async def test_a_read_says_that_a_column_was_removed_and_takes_it_for_no_empty_one(
    notes: DocumentCollection[Note], dashboard: Dashboard, table: str, read: Read
) -> None:
    await dashboard.insert(table, RECORD)
    await dashboard.remove_column(table, "text")
    with pytest.raises(SchemaError, match=r"'?text'?.*removed or renamed"):
        await read(notes)
    assert "text" not in await dashboard.columns(table)
    assert (await dashboard.records(table))[0]["stars"] == 1


RECORD = {
    "doc_id": "n1",
    "creation_utc": "2026-01-01T00:00:01+00:00",
    "version": "1.0.0",
    "text": "note 1",
    "stars": 1,
    "done": True,
    "about": '{"number":1}',
    "rev": 1,
}
"""`note(1)`, as it was not written by us, so that no cache knows it."""


@pytest.mark.parametrize("at", [(1,), EVERY], ids=["once", "ever"])
async def test_a_refusal_that_no_missing_column_explains_comes_out_as_it_is(
    make_database: DatabaseMaker, proxied: Proxied, table: str, at: Container[int]
) -> None:
    proxy, params = proxied
    async with make_database(connection_params=params) as database:
        notes, records = await notes_of(database), f"/api/collections/{table}/records"
        read = proxy.count("GET", records)
        proxy.plan("GET", records, answer(400), at=at)
        with pytest.raises(RequestRejected, match="By order of the test") as refusal:
            await notes.find({})
        assert refusal.value.status == 400
        assert proxy.count("GET", records) == read + 1


async def test_opening_brings_a_removed_column_back_and_says_so(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with make_database() as database:
        await (await notes_of(database)).insert_one(note())
    await dashboard.remove_column(table, "stars")
    heard = Heard()
    async with make_database(logger=heard) as database:
        found = await (await notes_of(database)).find_one({})
    assert found == {field: value for field, value in note().items() if field != "stars"}
    assert any("lacks columns" in warning and "stars" in warning for warning in heard.warnings)


@pytest.mark.parametrize("new_name", ["headline", "Text"])
async def test_a_renamed_column_gets_its_name_back_with_its_data(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str, new_name: str
) -> None:
    async with make_database() as database:
        notes = await notes_of(database)
        await notes.insert_one(note(1))
        await dashboard.rename_column(table, "text", new_name)
        with pytest.raises(SchemaError, match="removed or renamed"):
            await notes.find({})
        await notes.insert_one(note(2))
        assert (await notes.find({})).items == [note(1), note(2)]
        await dashboard.rename_column(table, "text", new_name)
    async with make_database() as database:
        assert (await (await notes_of(database)).find({})).items == [note(1), note(2)]
    assert new_name not in await dashboard.columns(table)


async def test_a_renamed_column_still_knows_what_it_holds(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    """A text column that holds JSON looks like any other in PocketBase, but for its field id."""
    async with make_database() as database:
        await (await notes_of(database)).insert_one(note(about={"z": 1, "a": 2}))
    await dashboard.rename_column(table, "about", "concerning")
    async with make_database() as database:
        assert await (await notes_of(database)).find_one({}) == note(about={"z": 1, "a": 2})


async def test_a_column_that_changes_what_it_stores_is_refused(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with make_database() as database:
        await notes_of(database)
    await dashboard.remove_column(table, "about")
    await dashboard.change(table, lambda c: c["fields"].append({"name": "about", "type": "json"}))
    async with make_database() as database:
        with pytest.raises(SchemaError, match=r"'about'.*'json'.*rename it"):
            await notes_of(database)


async def test_a_column_that_somebody_added_stays(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with make_database() as database:
        notes = await notes_of(database)
        await dashboard.change(table, lambda c: c["fields"].append({"name": "theirs", "type": "text"}))
        await notes.insert_one(note())
    async with make_database() as database:
        assert await (await notes_of(database, TaggedNote)).find_one({"id": {"$eq": "n1"}}) is not None
        assert "theirs" in await dashboard.columns(table)


# --- a collection that others delete ------------------------------------------------------------------------


@pytest.mark.parametrize("others_open", [False, True])
async def test_a_collection_deleted_by_others_is_said_to_be_and_can_be_made_again(
    make_database: DatabaseMaker,
    cache: dict[str, Any],
    dashboard: Dashboard,
    table: str,
    prefix: str,
    others_open: bool,
) -> None:
    config = Config(**cache)
    async with AsyncExitStack() as stack:
        if others_open:
            await stack.enter_async_context(make_database(config=config, collection_prefix=f"{prefix}_other"))
        database = await stack.enter_async_context(make_database(config=config))
        notes = await notes_of(database)
        await dashboard.insert(table, RECORD)
        await dashboard.drop(table)
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: notes.insert_one(note()),
            lambda: notes.find({"text": {"$eq": "x"}}),
            lambda: notes.find({}, limit=1),
            lambda: notes.find_one({"id": {"$eq": "n1"}}),
            lambda: notes.update_one({"id": {"$eq": "n1"}}, cast(Note, {"stars": 2})),
            lambda: notes.update_one({"id": {"$eq": "n1"}}, note(), upsert=True),
            lambda: notes.delete_one({"id": {"$eq": "n1"}}),
        ]
        for call in calls:
            with pytest.raises(CollectionNotFound, match="delete_collection"):
                await call()
        assert not await dashboard.has(table)
        with pytest.raises(CollectionNotFound):
            await database.delete_collection("notes")
        again: DocumentCollection[Note] = await database.create_collection("notes", Note)
        assert (await again.find({})).total_count == 0
        await again.insert_one(note(2))
        assert (await again.find({})).items == [note(2)]


async def test_a_collection_deleted_by_others_can_be_created_without_being_deleted_first(
    database: PocketBaseDocumentDatabase, notes: DocumentCollection[Note], dashboard: Dashboard, table: str
) -> None:
    await notes.insert_one(note())
    assert (await notes.find({})).items == [note()]
    await dashboard.drop(table)
    again: DocumentCollection[Note] = await database.create_collection("notes", Note)
    assert again is not notes
    assert (await again.find({})).total_count == 0
    with pytest.raises(CollectionExists):
        await database.create_collection("notes", Note)


async def test_a_read_never_creates_a_collection(
    make_database: DatabaseMaker, proxied: Proxied, dashboard: Dashboard, table: str
) -> None:
    """Neither where it goes while we look for the reason of a refusal."""

    async def drop_and_refuse(exchange: Exchange) -> None:
        await dashboard.drop(table)
        await answer(400)(exchange)

    async with make_database(connection_params=proxied.params) as database:
        notes = await notes_of(database)
        proxied.proxy.plan("GET", f"/api/collections/{table}/records", drop_and_refuse)
        with pytest.raises(CollectionNotFound, match="delete_collection"):
            await notes.find({})
    assert not await dashboard.has(table)


# --- names of columns -------------------------------------------------------------------------------------


def schema_with(*fields: str) -> type[Any]:
    make_schema: Any = TypedDict
    types = {"id": ObjectId, "creation_utc": str, "version": Version.String}
    return cast(type[Any], make_schema("Named", {**types, **dict.fromkeys(fields, str)}))


@pytest.mark.parametrize("field", ["x" * 93, "x" * 94, "x" * 100, "f_" + "y" * 96, "ü" * 24, "a-b" * 16])
async def test_a_field_has_any_name_that_a_column_can_hold(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str, field: str
) -> None:
    document: dict[str, Any] = {"id": "n1", "creation_utc": "2026", "version": "1.0.0", field: "held"}
    async with make_database() as database:
        notes = await notes_of(database, schema_with(field))
        await notes.insert_one(document)
        assert await notes.find_one(cast(Where, {field: {"$eq": "held"}})) == document
    columns = await dashboard.columns(table)
    (column,) = (name for name in columns if len(name) > 50)
    await dashboard.rename_column(table, column, "renamed")
    async with make_database() as database:
        notes = await notes_of(database, schema_with(field))
        assert await notes.find_one({}) == document
        assert columns == await dashboard.columns(table)
        await notes.ensure_indexes([CollectionIndex(fields=((field, SortDirection.ASC),))])
    assert f"(`{column}`)" in str((await dashboard.collection(table))["indexes"])


@pytest.mark.parametrize("field", ["x" * 101, "f_" + "y" * 97, "ü" * 25, "a-b" * 17, "X" * 60])
async def test_a_field_whose_name_no_column_can_hold_is_refused_at_once(
    make_database: DatabaseMaker, proxied: Proxied, field: str
) -> None:
    proxy, params = proxied
    async with make_database(connection_params=params) as database:
        before = len(proxy.exchanges)
        with pytest.raises(SchemaError, match=rf"field '{field}'.* PocketBase allows 100\b"):
            await notes_of(database, schema_with("x" * 60, field))
        assert len(proxy.exchanges) == before


async def test_what_pocketbase_finds_invalid_is_not_sent_again_and_its_reason_is_told(
    make_database: DatabaseMaker, proxied: Proxied
) -> None:
    body = b"""{"data":{"fields":{"3":{"name":{"code":"validation_not_today","message":"Another day."}}}},
        "message":"Failed to create collection.","status":400}"""
    proxy, params = proxied
    async with make_database(connection_params=params) as database:
        created = proxy.count("POST", "/api/collections")
        proxy.plan("POST", "/api/collections", answer(400, body), at=EVERY)
        with pytest.raises(SchemaError, match=r"fields\.3\.name: validation_not_today Another day\."):
            await notes_of(database)
        assert proxy.count("POST", "/api/collections") == created + 1


async def test_a_refusal_because_another_server_was_first_is_no_reason_to_stop(
    make_database: DatabaseMaker, proxied: Proxied, dashboard: Dashboard, table: str
) -> None:
    proxy, params = proxied
    async with make_database(connection_params=params) as database:
        proxy.plan("POST", "/api/collections", twice)
        await (await notes_of(database)).insert_one(note())
        assert [e.status for e in proxy.matching("POST", "/api/collections")][-1] == 400
    assert len(await dashboard.records(table)) == 1


# --- whose collection is it? -----------------------------------------------------------------------------


async def test_a_foreign_collection_is_refused_and_left_as_it_is(
    database: PocketBaseDocumentDatabase, dashboard: Dashboard, table: str
) -> None:
    before = await dashboard.create(name=table, fields=[{"name": "text", "type": "text"}], listRule="")
    for refused in (
        notes_of(database),
        database.create_collection("notes", Note),
        database.get_collection("notes", Note, identity_loader_for(Note)),
        database.delete_collection("notes"),
    ):
        with pytest.raises(ForeignCollection, match=table):
            await refused
    assert await dashboard.collection(table) == before


async def test_prefixes_and_names_that_spell_the_same_do_not_share_a_collection(
    make_database: DatabaseMaker, prefix: str
) -> None:
    async with make_database() as one, make_database(collection_prefix=f"{prefix}_b") as other:
        await (await notes_of(one, name="b_c")).insert_one(note())
        with pytest.raises(ForeignCollection, match=rf"{prefix}\W.*b_c.*{prefix}_b\W.*c"):
            await notes_of(other, name="c")
        with pytest.raises(ForeignCollection):
            await other.delete_collection("c")
        assert (await (await notes_of(one, name="b_c")).find({})).total_count == 1


async def test_prefixes_and_names_with_two_underscores_do_not_get_in_each_others_way(
    make_database: DatabaseMaker, prefix: str
) -> None:
    async with make_database() as one, make_database(collection_prefix=f"{prefix}__b") as other:
        await (await notes_of(one, name="b__c")).insert_one(note(1))
        await (await notes_of(other, name="c")).insert_one(note(2))
        assert (await (await notes_of(one, name="b__c")).find({})).items == [note(1)]


async def test_documents_are_never_kept_among_the_records_of_commits(
    database: PocketBaseDocumentDatabase, dashboard: Dashboard, prefix: str
) -> None:
    with pytest.raises(ForeignCollection, match=f"{prefix}_log"):
        await notes_of(database, name="log")
    with pytest.raises(ForeignCollection, match=f"{prefix}_log"):
        await database.delete_collection("log")
    assert "doc_id" not in await dashboard.columns(f"{prefix}_log")


async def test_a_name_that_pocketbase_cannot_have_is_refused_with_the_rule(
    database: PocketBaseDocumentDatabase,
) -> None:
    for name in ("with space", "ünï", "a-b", "x" * 300, "a_via_b"):
        with pytest.raises(SchemaError, match="letters, digits and underscores"):
            await notes_of(database, name=name)


# --- indexes -----------------------------------------------------------------------------------------------


async def test_ensure_indexes_makes_real_indexes_once(
    notes: DocumentCollection[Note], dashboard: Dashboard, table: str
) -> None:
    asked = [
        CollectionIndex(fields=(("stars", SortDirection.DESC), ("text", SortDirection.ASC))),
        CollectionIndex(fields=(("id", SortDirection.ASC), ("done", SortDirection.ASC)), unique=True),
    ]
    before = (await dashboard.collection(table))["indexes"]
    await notes.ensure_indexes(asked)
    await notes.ensure_indexes(asked)
    made = [sql for sql in (await dashboard.collection(table))["indexes"] if sql not in before]
    assert [sql.partition(" ON ")[2] for sql in made] == [
        f"`{table}` (`stars` DESC, `text`)",
        f"`{table}` (`doc_id`, `done`)",
    ]
    assert [sql.split("INDEX")[0].strip() for sql in made] == ["CREATE", "CREATE UNIQUE"]


async def test_exceptional_records_are_found_by_an_index_of_theirs(
    notes: DocumentCollection[Note], pocketbase: PocketBaseServer, table: str
) -> None:
    """A page asks whether there are any: among a million plain ones that must be one look."""
    headers = {"Authorization": pocketbase.connection_params["admin_token"]}
    query = f"EXPLAIN QUERY PLAN SELECT * FROM {table} WHERE {IS_EXCEPTIONAL} ORDER BY extra LIMIT 1"
    async with httpx.AsyncClient(base_url=pocketbase.url, headers=headers) as http:
        plan = (await http.post("/api/sql", json={"query": query})).json()["rows"]
    assert [row[-1] for row in plan] == [f"SEARCH {table} USING INDEX idx_{table}__extra (extra>?)"]


async def test_an_index_over_an_unknown_field_is_an_error(notes: DocumentCollection[Note]) -> None:
    with pytest.raises(InvalidFilter, match="no field 'colour'"):
        await notes.ensure_indexes([CollectionIndex(fields=(("colour", SortDirection.ASC),))])


async def test_a_unique_index_refuses_the_second_and_names_what_it_covers(notes: DocumentCollection[Note]) -> None:
    await notes.ensure_indexes([CollectionIndex(fields=(("text", SortDirection.ASC),), unique=True)])
    await notes.insert_one(note(1, text="same"))
    with pytest.raises(UniqueViolation) as caught:
        await notes.insert_one(note(2, text="same"))
    assert caught.value.fields == ("text",)
    assert (await notes.find({})).items == [note(1, text="same")]


async def test_a_unique_index_over_duplicates_is_left_out_with_a_warning(make_database: DatabaseMaker) -> None:
    heard = Heard()
    unique_text = CollectionIndex(fields=(("text", SortDirection.ASC),), unique=True)
    by_stars = CollectionIndex(fields=(("stars", SortDirection.ASC),))
    async with make_database(logger=heard) as database:
        notes = await notes_of(database)
        await notes.insert_one(note(1, text="same"))
        await notes.insert_one(note(2, text="same"))
        await notes.ensure_indexes([unique_text, by_stars])
        await notes.insert_one(note(3, text="same"))
        assert (await notes.find({"text": {"$eq": "same"}})).total_count == 3
    assert [warning for warning in heard.warnings if "going on without it" in warning]


async def test_an_index_that_somebody_removed_is_back_after_opening(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with make_database() as database:
        await notes_of(database)
    before = (await dashboard.collection(table))["indexes"]
    await dashboard.change(table, lambda collection: collection["indexes"].clear())
    async with make_database() as database:
        await notes_of(database)
    assert sorted((await dashboard.collection(table))["indexes"]) == sorted(before)


async def test_opening_again_changes_nothing(
    make_database: DatabaseMaker, dashboard: Dashboard, table: str
) -> None:
    async with make_database() as database:
        notes = await notes_of(database)
        await notes.ensure_indexes([CollectionIndex(fields=(("stars", SortDirection.ASC),))])
    before = await dashboard.collection(table)
    async with make_database() as database:
        await notes_of(database)
    assert await dashboard.collection(table) == before
